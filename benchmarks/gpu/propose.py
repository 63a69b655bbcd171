"""Propose the latency limits of a GPU's spec from what was measured on it: `python -m benchmarks.gpu.propose RESULTS.json`.

Limits are committed with the results that they came from. Only rows that are valid and have the runs for a p99 count.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from chexnet_deploy.errors import SessionError
from chexnet_deploy.evaluation.latency import MIN_RUNS_FOR_P99
from chexnet_deploy.terminal import run_program

app = typer.Typer(add_completion=False)


@app.command()
def main(
    results: Annotated[Path, typer.Argument(help="JSON that benchmarks.gpu wrote.", exists=True)],
    margin: Annotated[float, typer.Option(min=1.0, help="Limits are the measured times by this.")] = 1.2,
) -> None:
    """Print the `[gate]` lines of every plan that was measured one image at a time."""
    typer.echo("\n".join(propose(json.loads(results.read_text()), margin)))


def propose(results: Mapping[str, Any], margin: float) -> list[str]:
    """Return the lines.

    Raises:
        SessionError: it was a dry run, or no row counts.
    """
    if results["dry_run"]:
        raise SessionError("these results are a dry run's, made without a GPU. Run the benchmark on the GPU first.")
    singles = {name: row for name, row in results["rows"].items() if "engine" in row and "1" in row.get("batches", {})}
    refused = {name: why for name, row in singles.items() if (why := _why_not(row)) is not None}
    lines = [f"# {name} is left out: {why}" for name, why in refused.items()]
    lines += [
        text for name, row in singles.items() if name not in refused for text in _lines(name, row, results, margin)
    ]
    if len(refused) == len(singles):
        raise SessionError("\n".join(["no row can be proposed. Run the benchmark's plan rows again.", *lines]))
    return lines


def _why_not(row: Mapping[str, Any]) -> str | None:
    entry = row["batches"]["1"]
    n_runs = next(iter(entry["variants"].values()))["n_runs"]
    if "error" in row:
        return str(row["error"])
    if entry["clocks"]["invalid"]:
        return f"its timings are invalid, {entry['clocks']['invalid']}"
    if n_runs < MIN_RUNS_FOR_P99:
        return f"{n_runs} runs, needed {MIN_RUNS_FOR_P99}"
    parity = row.get("parity", {})
    return (
        None
        if parity.get("verdict") in ("PASS", "INCONCLUSIVE")
        else f"its parity is {parity.get('verdict', 'unknown')}"
    )


def _lines(name: str, row: Mapping[str, Any], results: Mapping[str, Any], margin: float) -> Iterator[str]:
    entry = row["batches"]["1"]
    variant, said = next(iter(entry["variants"].items()))
    note = f"; {entry['clocks']['note']}" if entry["clocks"].get("note") else ""
    yield f"# {name} on {results['gpu']['name']}, {variant}, {said['n_runs']} runs{note}: p50 {said['p50_ms']:.3f} ms,"
    yield f"# p99 {said['p99_ms']:.3f} ms, {said['p99_ms'] / said['p50_ms']:.2f} times that; limits are {margin:g} times each."
    yield "[gate]"
    yield f"latency = {{ p50_ms = {_up(margin * said['p50_ms'])}, p99_ms = {_up(margin * said['p99_ms'])} }}"


def _up(ms: float) -> float:
    """Round up to two decimals."""
    return math.ceil(100.0 * ms) / 100.0


if __name__ == "__main__":
    run_program(app)
