"""How much faster training loads an image from the prepared cache than from its PNG.

    python -m benchmarks.cpu.loading --data ROOT [--out benchmarks/results/loading-cpu.json]

Both sides give the same pixels to torch, in turns in one process and thread, round after round, and who goes first
changes: reading is `Preprocessing(read_image(path))` image by image, loading is random batches of rows copied out of the
map. Warm: the system keeps all files in memory. Cold: it was told to forget them before each turn, though a disk's own
memory may still know. A cache of few images is quicker than one of 112,120 on both counts, as it fits nearer the core.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Final

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.common import RESULTS, write_results
from chexnet_deploy.datasets import DataSet, open_data
from chexnet_deploy.datasets.chestxray14 import SPLITS
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.images import Preprocessing, read_image
from chexnet_deploy.terminal import progress, run_program
from training.cache import PIXELS, Cache
from training.prepare import prepare

BAR: Final = 5.0
STATES: Final = ("warm", "cold")
SIDES: Final = ("png", "cache")
ORIGINAL_SHAPE: Final = (1024, 1024)

app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="ChestX-ray14 with images of 1024 x 1024 px.")],
    out: Annotated[Path, typer.Option(help="The JSON to write.")] = RESULTS / "loading-cpu.json",
    rounds: Annotated[int, typer.Option(min=3, help="Turns of each side.")] = 9,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows copied at a time.")] = 16,
) -> None:
    """Measure both sides and write the JSON; exits 1 below the bar."""
    dataset, preprocessing = open_data(data), Preprocessing()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, progress() as on_phase:
        prepare(dataset, preprocessing, Path(folder) / "cache", on_phase=on_phase)
        names, paths = _originals(dataset)
        generator = np.random.default_rng(0)
        seconds: dict[str, list[float]] = {f"{side}_{state}": [] for state in STATES for side in SIDES}
        for i in range(len(STATES) * (rounds + 1)):
            state, turn = STATES[i // (rounds + 1)], i % (rounds + 1)
            for side in SIDES if turn % 2 else SIDES[::-1]:
                if state == "cold":
                    _forget([*paths, Path(folder) / "cache" / PIXELS])
                # A mapped page is not forgotten, so the cache is opened anew for each turn; that is not timed.
                cache = Cache.open(Path(folder) / "cache", preprocessing, dataset)
                order = generator.permutation(cache.rows(names))
                start = perf_counter()
                if side == "png":
                    _read(paths, preprocessing)
                else:
                    _load(cache, order, batch_size)
                if turn > 0:  # the first warms up
                    seconds[f"{side}_{state}"].append((perf_counter() - start) / len(paths))
                del cache
            on_phase("measuring", i + 1, len(STATES) * (rounds + 1))
    medians = {name: median(samples) for name, samples in seconds.items()}
    faster = {state: medians[f"png_{state}"] / medians[f"cache_{state}"] for state in STATES}
    results = {
        "n_images": len(paths),
        "original_px": list(ORIGINAL_SHAPE),
        "resize_px": preprocessing.resize_px,
        "batch_size": batch_size,
        "threads": 1,
        "median_s_per_image": medians,
        "times_faster": faster,
        "bar_times_faster": BAR,
        "s_per_image": seconds,
    }
    write_results(out, results)
    for state, times in faster.items():
        typer.echo(
            f"{state}: PNG {medians[f'png_{state}'] * 1e3:.2f} ms, cache {medians[f'cache_{state}'] * 1e3:.4f} ms an "
            f"image, {times:.0f} times faster (bar {BAR:g})"
        )
    raise typer.Exit(0 if min(faster.values()) >= BAR else 1)


def _originals(dataset: DataSet) -> tuple[list[str], list[Path]]:
    """Return names and files of the train and val images that have NIH's own size; smaller copies read faster."""
    on_disk = [
        pair for images in map(dataset.split, SPLITS[:2]) for pair in zip(images.names, images.paths, strict=True)
    ]
    chosen = [(name, path) for name, path in on_disk if read_image(path).shape == ORIGINAL_SHAPE]
    if not chosen:
        raise DatasetError(f"{dataset.root}: found no training image of 1024 x 1024 px. Next: give the original PNGs.")
    return [name for name, _ in chosen], [path for _, path in chosen]


def _read(paths: Sequence[Path], preprocessing: Preprocessing) -> None:
    for path in paths:
        torch.from_numpy(preprocessing(read_image(path)))


def _load(cache: Cache, order: NDArray[np.intp], batch_size: int) -> None:
    for i in range(0, len(order), batch_size):
        torch.from_numpy(cache.pixels[order[i : i + batch_size]])


def _forget(paths: Sequence[Path]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


if __name__ == "__main__":
    run_program(app)
