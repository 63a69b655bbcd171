"""Failures planted in real bundles, sealed as if a careless builder had kept them: does the gate catch each, and by what?

    python -m benchmarks.int8.planted BUNDLES --data ROOT

Each is a kind that has shipped: a layer whose int8 scale is wrong, confidences crushed by a second sigmoid, classes in another
order, answers that depend on the slot of the batch. The fp32 model against itself must pass, or catching them would be easy.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import RESULTS
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import ONNX_MODEL, PROBE, Manifest, hash_files
from chexnet_deploy.datasets import ChestXray14, LabelledImages
from chexnet_deploy.evaluation.engines import Effort, run_bench
from chexnet_deploy.evaluation.machine import Machine, describe_machine
from chexnet_deploy.evaluation.spec import read_spec
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.runtime.sessions.base import run_in_batches
from chexnet_deploy.runtime.sessions.ort import OrtSession
from chexnet_deploy.terminal import print_table, run_program

SCALE_FACTOR, SQUASH, SLOT_NOISE = 4.0, 0.25, 0.05

Plant = Callable[[onnx.ModelProto, list[float]], list[float]]

app = typer.Typer(add_completion=False)


class Outcome(ReportRecord):
    """What the gate said of one bundle."""

    name: str
    verdict: str
    reasons: tuple[str, ...]


class Results(ReportRecord):
    """All outcomes on one machine."""

    machine: Machine
    data: str
    outcomes: tuple[Outcome, ...]


@app.command()
def main(
    bundles: Annotated[Path, typer.Argument(help="Folder with fp32 and int8.")],
    data: Annotated[Path, typer.Option(help="Labelled images in ChestX-ray14's layout.")],
    out: Annotated[Path, typer.Option(help="Results.")] = RESULTS / "planted-cpu.json",
) -> None:
    """Plant each failure, bench it beside fp32, and print what caught it."""
    images = LabelledImages.of(ChestXray14.open(data).split("test"), Bundle.open(bundles / "fp32").manifest.findings)
    outcomes = judge_all(bundles, images)
    words = f"{len(images.names)} test images of {len(set(images.patients.tolist()))} patients"
    results = Results(machine=describe_machine(), data=words, outcomes=outcomes)
    out.write_text(results.model_dump_json(indent=1) + "\n")
    print_table(
        [{"bundle": each.name, "verdict": each.verdict, "": "; ".join(each.reasons)[:110]} for each in outcomes]
    )


def judge_all(bundles: Path, images: LabelledImages) -> tuple[Outcome, ...]:
    """Return the verdicts on fp32, int8 and every planted failure."""
    fp32, int8 = Bundle.open(bundles / "fp32"), Bundle.open(bundles / "int8")
    with tempfile.TemporaryDirectory() as folder:
        candidates = {"fp32": fp32, "int8": int8}
        for name, (parent, plant) in {
            "int8, one layer's scale x 4": (int8, wrong_scale),
            "int8, confidences squashed": (int8, squashed),
            "int8, classes rotated": (int8, rotated),
            "int8, noise by slot": (int8, slot_noise),
        }.items():
            candidates[name] = plant_in(parent, plant, Path(folder) / name.replace(" ", "-"))
        return tuple(_judge(name, bundle, fp32, images) for name, bundle in candidates.items())


def _judge(name: str, bundle: Bundle, fp32: Bundle, images: LabelledImages) -> Outcome:
    spec = read_spec(bundle.manifest.precision.value)
    run = run_bench([(bundle, spec)], fp32, images, data="", effort=Effort(min_runs=1, min_duration_s=0.0))
    (engine,) = run.report.engines
    return Outcome(name=name, verdict=engine.verdict, reasons=engine.reasons)


def plant_in(parent: Bundle, plant: Plant, path: Path) -> Bundle:
    """Write a bundle that is whole, loads and gives its own known answers, but is not the model it says it is."""
    model = onnx.load_from_string(parent.read_model())
    head_bias = plant(model, list(parent.manifest.head_bias))
    content, probe = model.SerializeToString(), parent.read_probe()
    session = OrtSession(content, parent.manifest.preprocessing.resize_px)
    logits, _ = run_in_batches(session, probe.pixels)
    session.close()
    changed = parent.manifest.model_dump() | {
        "files": hash_files({ONNX_MODEL: content, PROBE: parent.read_probe_bytes()}),
        "head_bias": tuple(head_bias),
        "ancestors": (*parent.manifest.ancestors, parent.id),
        "probe_max_abs_logit_error": float(np.abs(logits - probe.logits).max()),
    }
    return Bundle.write(path, Manifest.model_validate(changed), content, parent.read_probe_bytes())


def wrong_scale(model: onnx.ModelProto, head_bias: list[float]) -> list[float]:
    """Multiply one layer's activation scale by four where it is read back: its input arrives four times too large."""
    quantised = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    scale_name = quantised[len(quantised) // 2].input[1]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    scale = numpy_helper.to_array(weights[scale_name])
    wrong = (scale * np.asarray(SCALE_FACTOR, scale.dtype)).astype(scale.dtype)
    copy = numpy_helper.from_array(wrong, f"{scale_name}_wrong")
    model.graph.initializer.append(copy)
    output = quantised[len(quantised) // 2].output[0]
    reader = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == output)
    reader.input[1] = copy.name
    return head_bias


def squashed(model: onnx.ModelProto, head_bias: list[float]) -> list[float]:
    """Divide logits and maps by four: every rank stays, every confidence moves towards one half."""
    _append(model, "squash", np.array(SQUASH, np.float32), "Mul")
    return [SQUASH * bias for bias in head_bias]


def rotated(model: onnx.ModelProto, head_bias: list[float]) -> list[float]:
    """Answer each finding's question with the next one's answer."""
    order = np.roll(np.arange(len(head_bias)), -1)
    _append(model, "order", order.astype(np.int64), "Gather", axis=1)
    return [head_bias[i] for i in order]


def slot_noise(model: onnx.ModelProto, head_bias: list[float]) -> list[float]:
    """Add to each image what its slot in the batch says."""
    graph = model.graph
    constants: dict[str, NDArray[Any]] = {
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "step": np.array(SLOT_NOISE, np.float32),
        "as_rows": np.array([-1, 1], np.int64),
        "as_maps": np.array([-1, 1, 1, 1], np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(value, f"slot_{name}") for name, value in constants.items())
    shared = [
        helper.make_node("Shape", ["pixels"], ["slot_shape"]),
        helper.make_node("Gather", ["slot_shape", "slot_zero"], ["slot_count"]),
        helper.make_node("Range", ["slot_zero", "slot_count", "slot_one"], ["slot_numbers"]),
        helper.make_node("Cast", ["slot_numbers"], ["slot_floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["slot_floats", "slot_step"], ["slot_noise"]),
    ]
    graph.node.extend(shared)
    for output, shape in (("logits", "as_rows"), ("cam", "as_maps")):
        _rename(model, output)
        graph.node.append(helper.make_node("Reshape", ["slot_noise", f"slot_{shape}"], [f"slot_{output}"]))
        graph.node.append(helper.make_node("Add", [f"{output}_before", f"slot_{output}"], [output]))
    return head_bias


def _append(
    model: onnx.ModelProto, name: str, value: NDArray[np.generic], operator: str, axis: int | None = None
) -> None:
    """Put one operator with one constant behind both outputs."""
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    for output in ("logits", "cam"):
        _rename(model, output)
        model.graph.node.append(helper.make_node(operator, [f"{output}_before", name], [output], **attributes))


def _rename(model: onnx.ModelProto, output: str) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == output:
                    names[i] = f"{output}_before"


if __name__ == "__main__":
    run_program(app)
