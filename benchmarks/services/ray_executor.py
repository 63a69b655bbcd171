"""Two Ray workers, 2,000 images, one worker killed: is the table the one that a run without Ray makes, byte for byte?

    python -m benchmarks.services.ray_executor BUNDLE [--folder PNGS] [--out benchmarks/results/ray-cpu.json]

Without a folder, phantoms of 1024 x 1024 px are written to a temporary one. Three runs: without Ray, with two workers, and with
two of which one is killed when a quarter of the rows is there. Exits 1 where a table differs.
"""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Annotated, Any, Final

import typer

from benchmarks.common import COMMAND, RESULTS, checkout_environment, write_results
from benchmarks.cpu.folder import draw_phantoms
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.files import sha256_of_file
from chexnet_deploy.images.listing import find_images
from chexnet_deploy.runtime.streaming import usable_cores
from chexnet_deploy.terminal import progress, run_program

WITH_RAY: Final = ("--executor", "ray", "--workers", "2")
DEADLINE_S: Final = 3600.0
DONE: Final = (0, 3)  # 3: but for quarantined images

app = typer.Typer(add_completion=False)


@app.command()
def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    folder: Annotated[Path | None, typer.Option(help="Radiographs; default: phantoms.")] = None,
    n_phantoms: Annotated[int, typer.Option(min=100, help="How many, where there is no folder.")] = 2000,
    out: Annotated[Path, typer.Option(help="The JSON to write.")] = RESULTS / "ray-cpu.json",
) -> None:
    """Run, compare, and write what was found."""
    opened = Bundle.open(bundle)
    with tempfile.TemporaryDirectory(prefix="chexnet-ray-") as place:
        if folder is None:
            folder = Path(place) / "phantoms"
            with progress() as on_phase:
                draw_phantoms(folder, n_phantoms, usable_cores(), on_phase)
        n_images = len(find_images([folder]).names)
        tables = {name: Path(place) / f"{name}.csv" for name in ("local", "ray", "killed")}
        seconds = {
            "local": carry(bundle, folder, tables["local"]),
            "ray": carry(bundle, folder, tables["ray"], *WITH_RAY),
            "killed": carry(bundle, folder, tables["killed"], *WITH_RAY, kill_after=n_images // 4),
        }
        hashes = {name: sha256_of_file(table) for name, table in tables.items()}
        cards = {name: table.with_name(f"{table.name}.json").read_text() for name, table in tables.items()}
    results: dict[str, Any] = {
        "cores": usable_cores(),
        "precision": opened.manifest.precision.value,
        "resize_px": opened.manifest.preprocessing.resize_px,
        "n_images": n_images,
        "workers": 2,
        "killed_after_rows": n_images // 4,
        "seconds_with_start": seconds,
        "table_sha256": hashes,
        "tables_are_equal": len(set(hashes.values())) == 1,
        "cards_are_equal": len(set(cards.values())) == 1,
    }
    typer.echo(write_results(out, results))
    raise typer.Exit(0 if results["tables_are_equal"] and results["cards_are_equal"] else 1)


def carry(bundle: Path, folder: Path, table: Path, *options: str, kill_after: int | None = None) -> float:
    """Run the command as a user does, kill a worker after so many rows, and return how many seconds it all took."""
    words = [*COMMAND, "predict", str(bundle), str(folder), "--out", str(table), *options]
    start = perf_counter()
    with subprocess.Popen(
        words, env=checkout_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        if kill_after is not None:
            _wait_for_rows(table, process, kill_after)
            os.kill(next(worker for worker in workers_of(process.pid)), signal.SIGKILL)
        if process.wait(DEADLINE_S) not in DONE:
            raise RuntimeError(f"predict {' '.join(options)} ended with {process.returncode}")
    return perf_counter() - start


def workers_of(pid: int) -> Iterator[int]:
    """Yield the processes below this one that hold a model for Ray."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            if b"MapWorker" in Path(f"/proc/{child}/cmdline").read_bytes():
                yield child
            yield from workers_of(child)


def _wait_for_rows(table: Path, process: "subprocess.Popen[bytes]", n: int) -> None:
    partial, until = table.with_name(f"{table.name}.partial"), monotonic() + DEADLINE_S
    while not partial.exists() or partial.read_bytes().count(b"\n") <= n:
        if process.poll() is not None or monotonic() > until:
            raise RuntimeError(f"predict ended before {n} rows were there, so nothing could be killed")
        sleep(0.05)


if __name__ == "__main__":
    run_program(app)
