"""What each int8 form keeps on images like its calibration images, and on images of another source.

    python -m benchmarks.int8.sources CHECKPOINT --data ROOT --originals ROOT --name chexnet-96px
    python -m benchmarks.int8.sources --name chexnet-96px --table

All forms get the same calibration images of training patients of `--data`. They answer for its validation and test patients, and
for the test images of `--originals` in NIH's own size. Nothing is chosen here, so test images decide nothing.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import onnx
import typer
from PIL import Image

from benchmarks.common import RESULTS
from benchmarks.int8.accuracy import Accuracy, Judge, answers_of, packages
from chexnet_deploy.bundle.manifest import Dialect
from chexnet_deploy.datasets.data_set import DataSet, open_data
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.evaluation.machine import Machine, describe_machine
from chexnet_deploy.export.from_torch.checkpoint import CheckpointManifest, read_checkpoint
from chexnet_deploy.export.from_torch.to_onnx import trace
from chexnet_deploy.export.quantize.bias import correct_head_bias
from chexnet_deploy.export.quantize.calibration import CalibrationSet, choose_calibration
from chexnet_deploy.export.quantize.graph_edits import producers_of
from chexnet_deploy.export.quantize.variants import prepare
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.inputs import Record
from chexnet_deploy.runtime.score import iter_pixels
from chexnet_deploy.terminal import run_program

N_CALIBRATION_IMAGES = 256
FULL_SIDE_PX = 1024

app = typer.Typer(add_completion=False)


class Row(Record):
    """One form on one set of images.

    Attributes:
        int8_share: multiplications of convolutions that are int8.
        gate: its verdict by engines/int8.toml.
    """

    form: str
    images: str
    n_images: int
    int8_share: float
    gate: str
    accuracy: Accuracy


class Results(Record):
    """All forms of one model on all sets."""

    machine: Machine
    packages: dict[str, str]
    resize_px: int
    rows: tuple[Row, ...]


@app.command()
def main(
    checkpoint: Annotated[Path | None, typer.Argument(help="A .safetensors checkpoint.")] = None,
    data: Annotated[Path | None, typer.Option(help="ChestX-ray14's layout.", envvar="CHEXNET_CHESTXRAY14")] = None,
    originals: Annotated[Path | None, typer.Option(help="The same, with images of 1024 px.")] = None,
    name: Annotated[str, typer.Option(help="results/int8-sources-NAME.json is written or read.")] = "chexnet-96px",
    table: Annotated[bool, typer.Option(help="Print the table of the committed results and stop.")] = False,
) -> None:
    """Measure every form, or print what was measured."""
    path = RESULTS / f"int8-sources-{name}.json"
    if not table:
        if checkpoint is None or data is None or originals is None:
            raise typer.BadParameter("give a checkpoint, --data and --originals")
        results = measure(checkpoint, open_data(data), originals)
        path.write_text(results.model_dump_json(indent=1) + "\n")
    typer.echo(markdown_table(Results.model_validate_json(path.read_text())))


def measure(checkpoint: Path, dataset: DataSet, originals: Path) -> Results:
    """Make every form and judge it on every set."""
    read = read_checkpoint(checkpoint)
    model = trace(read)
    names = choose_calibration(dataset, N_CALIBRATION_IMAGES)
    calibration = CalibrationSet.read(dataset, names, read.manifest.preprocessing).pixels
    sets = read_sets(read.manifest, model, dataset, originals)
    rows = []
    for form, content in _make_forms(model, calibration):
        for row in judge(form, content, sets):
            rows.append(row)
            typer.echo(row.model_dump_json(), err=True)
    return Results(
        machine=describe_machine(),
        packages=packages(),
        resize_px=read.manifest.preprocessing.resize_px,
        rows=tuple(rows),
    )


def read_sets(
    manifest: CheckpointManifest, model: bytes, dataset: DataSet, originals: Path
) -> Mapping[str, tuple[Pixels, Judge]]:
    """Return each set's pixels and what judges answers for them."""
    full = open_data(originals)
    chosen = {
        "validation": dataset.split("val"),
        "test": dataset.split("test"),
        "test, 1024 px originals": _of_full_size(full.split("test")),
    }
    sets = {}
    for name, labelled in chosen.items():
        images = labelled.for_findings(manifest.findings)
        pixels = np.concatenate(list(iter_pixels(images.paths, manifest.preprocessing)))
        sets[name] = pixels, Judge(answers_of(model, pixels), images, manifest.findings, manifest.operating_points)
    return sets


def _of_full_size(images: LabelledImages) -> LabelledImages:
    """Return the images as NIH published them; smaller copies would mix two resolutions in one measurement."""
    return images.take(np.flatnonzero([_side_px(path) == FULL_SIDE_PX for path in images.paths]))


def _side_px(path: Path) -> int:
    with Image.open(path) as image:
        side: int = max(image.size)
    return side


def judge(form: str, content: bytes, sets: Mapping[str, tuple[Pixels, Judge]]) -> Iterator[Row]:
    """Yield what one model keeps on each set."""
    share = int8_share(content)
    for name, (pixels, judge) in sets.items():
        answers = answers_of(content, pixels)
        yield Row(
            form=form,
            images=name,
            n_images=len(pixels),
            int8_share=share,
            gate=judge.compare(judge.reference, answers).summary,
            accuracy=judge.accuracy(answers),
        )


def int8_share(content: bytes) -> float:
    """Return the share of the convolutions' multiplications that have an int8 weight."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(content))
    producers = producers_of(model.graph)
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.value_info, *model.graph.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    counts = {True: 0, False: 0}
    for node in model.graph.node:
        if node.op_type == "Conv":
            multiplications = math.prod(shapes[node.input[1]]) * math.prod(shapes[node.output[0]][2:])
            counts[node.input[1] in producers] += multiplications
    return counts[True] / sum(counts.values())


def _make_forms(model: bytes, calibration: Pixels) -> Iterator[tuple[str, bytes]]:
    single = onnx.load_from_string(model)
    reference = answers_of(model, calibration)
    for dialect in get_args(Dialect):
        made = correct_head_bias(prepare(single, dialect, calibration).build(), reference, calibration)
        yield dialect, made.SerializeToString()


def markdown_table(results: Results) -> str:
    """Return the results as a table for people."""
    lines = [
        "| form | int8 multiplications | images | gate | mean AUROC change | max \\|Δp\\| | flips | logit noise, mean (worst) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results.rows:
        found = row.accuracy
        cells = (
            row.form,
            f"{100 * row.int8_share:.0f} %",
            f"{row.n_images} {row.images}",
            row.gate,
            f"{found.mean_auroc_change:+.4f}",
            f"{found.max_abs_probability_difference:.3f}",
            f"{100 * found.flips_share:.2f} %",
            f"{100 * found.noise_mean:.2f} % ({100 * found.noise_worst:.2f} %)",
        )
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in results.packages.items())
    caption = (
        f"{results.resize_px} px, {N_CALIBRATION_IMAGES} calibration images of training patients. Answers of ONNX Runtime. "
        f"{versions}. {results.machine.processor}."
    )
    return "\n".join([*lines, "", caption])


if __name__ == "__main__":
    run_program(app)
