"""The GPU benchmark: `python -m benchmarks.gpu`. Works from a checkout, without the package installed."""
