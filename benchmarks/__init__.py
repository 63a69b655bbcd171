"""Benchmarks: measure, write JSON into results/, make the README tables from it. Not part of the wheel."""
