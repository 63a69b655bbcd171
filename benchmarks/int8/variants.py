"""What each of our int8 forms keeps of one fp32 CheXNet, and what TensorRT for RTX makes of it: accuracy beside traffic.

    python -m benchmarks.int8.variants CHECKPOINT --data ROOT --name demo
    python -m benchmarks.int8.variants --name demo --table

All forms get the same calibration images of training patients, and answer in ONNX Runtime on the validation patients.
Kernels and bytes are read from RTX's layer table, which needs no GPU; nothing here is a speed.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args
from unittest.mock import patch

import numpy as np
import onnx
import typer

from benchmarks.common import RESULTS
from benchmarks.int8.accuracy import Accuracy, Judge, answers_of, packages
from chexnet_deploy.bundle.manifest import FLOAT16_DIALECTS, Dialect
from chexnet_deploy.datasets import DataSet, open_data
from chexnet_deploy.evaluation.machine import Machine, describe_machine
from chexnet_deploy.evaluation.spec import read_spec
from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint
from chexnet_deploy.export.from_torch.to_onnx import trace
from chexnet_deploy.export.quantize import variants as forms
from chexnet_deploy.export.quantize.bias import correct_head_bias
from chexnet_deploy.export.quantize.calibration import CalibrationSet, choose_calibration
from chexnet_deploy.export.quantize.qdq import to_float16
from chexnet_deploy.export.tensorrt.compile import CompileOptions, compile_onnx
from chexnet_deploy.export.tensorrt.layers import bytes_per_image, count_kernels
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.inputs import Record
from chexnet_deploy.runtime.score import iter_pixels
from chexnet_deploy.runtime.sessions.trt_versions import open_tensorrt
from chexnet_deploy.terminal import run_program

COMPUTE_CAPABILITY = "8.9"
FP16 = "fp16"

app = typer.Typer(add_completion=False)


class Traffic(Record):
    """What RTX's layer table says of a form."""

    n_kernels: int
    bytes_per_image: int | None
    conv_types: dict[str, int]


class Form(Record):
    """One form.

    Attributes:
        gate: its verdict by engines/int8.toml.
        reasons: why it is no pass on all.
        traffic: None for a form that RTX is not given.
    """

    name: str
    gate: str
    reasons: tuple[str, ...]
    accuracy: Accuracy
    traffic: Traffic | None


class Results(Record):
    """All forms of one model."""

    machine: Machine
    packages: dict[str, str]
    resize_px: int
    n_images: int
    n_patients: int
    n_calibration_images: int
    fp32_mean_auroc: float
    forms: tuple[Form, ...]


@app.command()
def main(
    checkpoint: Annotated[Path | None, typer.Argument(help="A .safetensors checkpoint.")] = None,
    data: Annotated[Path | None, typer.Option(help="ChestX-ray14's layout.", envvar="CHEXNET_CHESTXRAY14")] = None,
    name: Annotated[str, typer.Option(help="results/int8-forms-NAME.json is written or read.")] = "demo",
    table: Annotated[bool, typer.Option(help="Print the table of the committed results and stop.")] = False,
) -> None:
    """Measure every form, or print what was measured."""
    path = RESULTS / f"int8-forms-{name}.json"
    if not table:
        if checkpoint is None or data is None:
            raise typer.BadParameter("give a checkpoint, and ChestX-ray14 by --data or CHEXNET_CHESTXRAY14")
        path.write_text(measure(checkpoint, open_data(data)).model_dump_json(indent=1) + "\n")
    typer.echo(markdown_table(Results.model_validate_json(path.read_text())))


def measure(checkpoint: Path, dataset: DataSet, *, n_calibration_images: int = 256) -> Results:
    """Make every form and judge it on the validation patients."""
    read = read_checkpoint(checkpoint)
    manifest, model = read.manifest, trace(read)
    images = dataset.require("val").for_findings(manifest.findings)
    pixels = np.concatenate(list(iter_pixels(images.paths, manifest.preprocessing)))
    names = choose_calibration(dataset, n_calibration_images)
    calibration = CalibrationSet.read(dataset, names, manifest.preprocessing).pixels
    judge = Judge(answers_of(model, pixels), images, manifest.findings, manifest.operating_points)
    judged = []
    for name, content in _make_forms(model, calibration):
        answers = answers_of(content, pixels)
        report = judge.compare(judge.reference, answers)
        traffic = _compile(content) if name in (FP16, *FLOAT16_DIALECTS) else None
        found = Form(
            name=name, gate=report.summary, reasons=report.reasons, accuracy=judge.accuracy(answers), traffic=traffic
        )
        judged.append(found)
        typer.echo(found.model_dump_json(), err=True)
    return Results(
        machine=describe_machine(),
        packages=packages(),
        resize_px=manifest.preprocessing.resize_px,
        n_images=len(images.names),
        n_patients=len(np.unique(images.patients)),
        n_calibration_images=len(calibration),
        fp32_mean_auroc=judge.accuracy(judge.reference).mean_auroc,
        forms=tuple(judged),
    )


def _make_forms(model: bytes, calibration: Pixels) -> Iterator[tuple[str, bytes]]:
    single = onnx.load_from_string(model)
    yield FP16, to_float16(single).SerializeToString()
    reference = answers_of(model, calibration)

    def finish(prepared: forms.Prepared) -> bytes:
        content: bytes = correct_head_bias(prepared.build(), reference, calibration).SerializeToString()
        return content

    dialects: tuple[Dialect, ...] = get_args(Dialect)
    for dialect in dialects:
        prepared = forms.prepare(single, dialect, calibration)
        yield dialect, finish(prepared)
        if dialect == "mixed":
            yield "mixed, activations not centred", finish(_uncentred(prepared))
            with patch.object(forms, "equalise_outputs", lambda model, *_: model):
                yield "mixed, output channels not equalised", finish(forms.prepare(single, "mixed", calibration))


def _uncentred(prepared: forms.Prepared) -> forms.Prepared:
    """Return the same with half the steps, as the other forms with signed activations have them."""
    activations = {
        name: replace(how, scale=np.float16(2.0 * float(how.scale)), is_centred=False)
        for name, how in prepared.activations.items()
    }
    return replace(prepared, activations=activations)


def _compile(model: bytes) -> Traffic:
    # The spec's precision chooses nothing where networks are strongly typed.
    options = CompileOptions(read_spec("int8"), compute_capability=COMPUTE_CAPABILITY)
    compiled = compile_onnx(*open_tensorrt("tensorrt_rtx"), model, options)
    return Traffic(
        n_kernels=count_kernels(compiled.layers),
        bytes_per_image=bytes_per_image(compiled.layers),
        conv_types=dict(Counter(compiled.conv_types.values())),
    )


def markdown_table(results: Results) -> str:
    """Return the results as a table for people."""
    lines = [
        "| form | gate | mean AUROC change | max \\|Δp\\| | flips | logit noise, mean (worst) | RTX: kernels | RTX: MB an image |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for form in results.forms:
        found, traffic = form.accuracy, form.traffic
        cells = (
            form.name,
            form.gate,
            f"{found.mean_auroc_change:+.4f}",
            f"{found.max_abs_probability_difference:.3f}",
            f"{100 * found.flips_share:.2f} %",
            f"{100 * found.noise_mean:.2f} % ({100 * found.noise_worst:.2f} %)",
            "" if traffic is None else str(traffic.n_kernels),
            "" if traffic is None or traffic.bytes_per_image is None else f"{traffic.bytes_per_image / 1e6:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in results.packages.items())
    caption = (
        f"{results.n_images} validation images of {results.n_patients} patients, {results.resize_px} px, fp32 mean AUROC "
        f"{results.fp32_mean_auroc:.3f}; {results.n_calibration_images} calibration images of training patients. Answers of ONNX "
        f"Runtime; layer tables of TensorRT for RTX, compute capability {COMPUTE_CAPABILITY}. {versions}. "
        f"{results.machine.processor}."
    )
    return "\n".join([*lines, "", caption])


if __name__ == "__main__":
    run_program(app)
