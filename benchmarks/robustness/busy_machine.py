"""Compressed chest radiographs on a machine that others keep busy: none may be refused as damaged, or as too much work.

    python -m benchmarks.robustness.busy_machine      writes results/busy-machine-cpu.json; exit 1 where the bar is missed

Processes that only count keep the machine busy. The radiographs are noisy ramps of a detector's size in JPEG 2000, which costs
more than any other transfer syntax, read by as many threads as a folder's are.
"""

import json
import multiprocessing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import numpy as np
import typer

from benchmarks.rigs.synthetic_dicom import make_dicom
from benchmarks.robustness.dicom_isolation import COLUMNS, ROWS
from chexnet_deploy.errors import ImageRefusedError
from chexnet_deploy.evaluation.machine import describe_machine
from chexnet_deploy.images.reader import ImageReader
from chexnet_deploy.runtime.streaming import usable_cores
from chexnet_deploy.terminal import run_program

RESULTS = Path(__file__).parents[1] / "results" / "busy-machine-cpu.json"
JPEG_2000 = "1.2.840.10008.1.2.4.90"

app = typer.Typer(add_completion=False)


@app.command()
def main(
    n: Annotated[int, typer.Option("-n", help="Radiographs.")] = 100,
    busy: Annotated[int, typer.Option(help="Processes that keep the machine busy.")] = 8,
) -> None:
    """Read them and write what became of them."""
    answers, seconds = read_while_busy(n, busy)
    results = {
        "machine": describe_machine().model_dump(),
        "busy_processes": busy,
        "answers": answers,
        "median_s": median(seconds),
        "slowest_s": max(seconds),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    typer.echo(json.dumps(results, indent=1))
    if set(answers) - {"read", "busy"}:
        raise typer.Exit(1)


def read_while_busy(n: int, busy: int) -> tuple[dict[str, int], list[float]]:
    """Return how many were read, or refused by reason, and how long each took."""
    ramp = np.linspace(0, 4000, COLUMNS)[np.newaxis, :] + np.random.default_rng(0).normal(0, 8, (ROWS, COLUMNS))
    content = make_dicom(np.clip(ramp, 0, 4095).astype(np.uint16), syntax=JPEG_2000)
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_count, daemon=True) for _ in range(busy)]
    threads = usable_cores() + 1
    with ImageReader(processes=max(1, threads - 1)) as reader, ThreadPoolExecutor(threads) as pool:

        def read(_: int) -> tuple[str, float]:
            start = perf_counter()
            try:
                reader.decode(content)
                answer = "read"
            except ImageRefusedError as err:
                answer = err.reason.value
            return answer, perf_counter() - start

        for other in others:
            other.start()
        try:
            done = list(pool.map(read, range(n)))
        finally:
            for other in others:
                other.kill()
    return dict(Counter(answer for answer, _ in done)), [seconds for _, seconds in done]


def _count() -> None:
    while True:
        pass


if __name__ == "__main__":
    run_program(app)
