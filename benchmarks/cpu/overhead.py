"""What this project adds to the libraries under it: Predictor over bare ONNX Runtime, PNG -> pixels over bare Pillow.

    python -m benchmarks.cpu.overhead BUNDLE IMAGE...      prints both ratios and writes results/overhead-cpu.json

Both sides of a ratio are timed in turns in one process; a ratio is the median of the pairs' ratios.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from benchmarks.common import RESULTS, write_results
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions.ort import load_onnx
from chexnet_deploy.terminal import run_program

app = typer.Typer(add_completion=False)


@app.command()
def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    images: Annotated[list[Path], typer.Argument(help="PNG radiographs.")],
    runs: Annotated[int, typer.Option(min=3, help="Timed pairs for each ratio.")] = 200,
) -> None:
    """Measure both overheads."""
    opened = Bundle.open(bundle)
    side = opened.manifest.preprocessing.resize_px
    session = load_onnx(opened.read_model())
    gray = np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)
    pixels = gray[None, None]
    with Predictor.open(bundle) as predictor:
        # The image has the model's size already, so both run on the same pixels.
        predictor_ratio = ratio(
            lambda _: predictor.predict(gray), lambda _: session.run(None, {"pixels": pixels}), runs
        )

    def bare_pillow(i: int) -> None:
        with Image.open(images[i % len(images)]) as image:
            np.asarray(image.convert("L").resize((side, side), Image.Resampling.BILINEAR))

    decode_ratio = ratio(
        lambda i: opened.manifest.preprocessing(read_image(images[i % len(images)])),
        bare_pillow,
        max(runs, len(images)),
    )
    results = {
        "resize_px": side,
        "precision": opened.manifest.precision.value,
        "predictor_over_onnxruntime_batch_1": predictor_ratio,
        "png_to_pixels_over_pillow": decode_ratio,
        "n_images": len(images),
        "pairs": runs,
    }
    typer.echo(write_results(RESULTS / "overhead-cpu.json", results))


def ratio(ours: Callable[[int], object], theirs: Callable[[int], object], runs: int) -> float:
    """Return the median over pairs of our time over theirs; who goes first changes from pair to pair."""
    ratios = []
    for call in (ours, theirs):
        for i in range(3):
            call(i)
    for i in range(runs):
        seconds = {}
        for call in (ours, theirs) if i % 2 else (theirs, ours):
            start = perf_counter()
            call(i)
            seconds[call is ours] = perf_counter() - start
        ratios.append(seconds[True] / seconds[False])
    return median(ratios)


if __name__ == "__main__":
    run_program(app)
