"""fp32 bundle -> fp16 or int8 bundle, kept only when it passes the gate beside the model it came from.

Int8 comes in two dialects made from one set of scales: `typed` (float16 around int8, opset 19, TensorRT 10 and later) and
`trt8` (float32 around int8, opset 17, TensorRT 8.6).
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper

from chexnet_deploy.bundle import ONNX_MODEL, PROBE, Bundle, Calibration, Check, Manifest, Precision, hash_files
from chexnet_deploy.errors import BundleError, GateError
from chexnet_deploy.parity import compare
from chexnet_deploy.predictor import sigmoid
from chexnet_deploy.quantize.calibration import CalibrationSet
from chexnet_deploy.quantize.graphs import insert_qdq, quantizable_convs, to_float16
from chexnet_deploy.quantize.ranges import ESTIMATOR, activation_ranges
from chexnet_deploy.scoring import LabelledImages, score_files
from chexnet_deploy.sessions.ort import OrtSession, require_float16_rounding
from chexnet_deploy.spec import Gate


def to_fp16(bundle: Bundle, out: Path, gate: Gate, validation: LabelledImages | None) -> Bundle:
    """Write a typed fp16 bundle of an fp32 bundle.

    Args:
        bundle: fp32.
        out: where; nothing may be there yet.
        gate: what the fp16 model must pass.
        validation: labelled images of validation patients; None gates on the probe alone.

    Raises:
        GateError: it answers too differently; nothing is kept.
        ExportError: a weight is beyond float16.
    """
    _require_fp32(bundle)
    model = to_float16(onnx.load_from_string(bundle.read_model())).SerializeToString()
    return _keep(bundle, model, out, gate, validation, Precision.FP16, "float", None, ())


def to_int8(
    bundle: Bundle,
    calibration: CalibrationSet,
    out: Path,
    gate: Gate,
    validation: LabelledImages,
    *,
    dialect: Literal["typed", "trt8"] = "typed",
    on_images: Callable[[int], None] | None = None,
) -> Bundle:
    """Write an int8 bundle of an fp32 bundle: explicit Q/DQ, symmetric, zero points 0, per-channel weights.

    Args:
        bundle: fp32.
        calibration: images that set the activation ranges.
        out: where; nothing may be there yet.
        gate: what the int8 model must pass.
        validation: labelled images of validation patients.
        dialect: see the module.
        on_images: called with the calibration images done.

    Raises:
        GateError: it answers too differently; nothing is kept.
        CalibrationError: a tensor has no range on these images.
        SessionError: this ONNX Runtime can't check the typed dialect.
    """
    _require_fp32(bundle)
    if dialect == "typed":
        require_float16_rounding()
    single = onnx.load_from_string(bundle.read_model())
    convs = quantizable_convs(single)
    tensors = sorted({node.input[0] for node in convs})
    ranges = activation_ranges(single, tensors, calibration.pixels, on_images=on_images)
    names = [node.output[0] for node in convs]
    single_weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in single.graph.initializer}
    graph = to_float16(single) if dialect == "typed" else single
    model = insert_qdq(graph, ranges, names, single_weights).SerializeToString()
    record = Calibration(list_sha256=calibration.sha256, n_images=len(calibration.images), estimator=ESTIMATOR)
    left_alone = tuple(node.name for node in single.graph.node if node.op_type == "Conv" and node not in convs)
    return _keep(bundle, model, out, gate, validation, Precision.INT8, dialect, record, left_alone)


def _keep(
    parent: Bundle,
    model: bytes,
    out: Path,
    gate: Gate,
    validation: LabelledImages | None,
    precision: Precision,
    dialect: Literal["float", "typed", "trt8"],
    calibration: Calibration | None,
    float_convolutions: tuple[str, ...],
) -> Bundle:
    """Run the new model beside its parent, and write it as a bundle if it passes."""
    old = parent.manifest
    probe = parent.read_probe()
    candidate = OrtSession(model, old.preprocessing.resize_px)
    logits, _ = candidate.run(probe.pixels)
    gap = float(np.abs(sigmoid(logits) - sigmoid(probe.logits)).max())
    limit = gate.max_abs_probability_difference
    checks = [Check(name="max |probability difference| on the probe", value=gap, limit=limit)]
    reasons = [] if gap <= limit else [f"max |probability difference| on the probe {gap:.4f}, limit {limit}"]
    if validation is not None:
        reference = OrtSession.open(parent)
        scores = score_files({"parent": reference, "new": candidate}, validation.paths, old.preprocessing)
        reference.close()
        report = compare(
            scores["parent"],
            scores["new"],
            validation.truth,
            validation.patients,
            old.findings,
            old.operating_points,
            gate,
        )
        reasons += report.reasons if report.verdict == "FAIL" else ()
        images = f"on {report.n_images} validation images"
        losses = [-(f.difference or 0.0) / f.margin for f in report.findings if f.verdict != "not assessable"]
        checks.append(
            Check(
                name=f"max |probability difference| {images}", value=report.max_abs_probability_difference, limit=limit
            )
        )
        if losses:
            name = f"largest AUROC loss as a share of its margin, {report.n_assessable} assessable findings {images}"
            checks.append(Check(name=name, value=max(losses), limit=1.0))
    candidate.close()
    if reasons:
        raise GateError(
            f"the {precision.value} model does not pass its gate, so no bundle was kept: {'; '.join(reasons)}. "
            f"Use fp16, or calibrate on more images."
        )
    manifest = Manifest(
        precision=precision,
        dialect=dialect,
        findings=old.findings,
        preprocessing=old.preprocessing,
        head_bias=old.head_bias,
        operating_points=old.operating_points,
        files=hash_files({ONNX_MODEL: model, PROBE: parent.read_probe_bytes()}),
        checkpoint_sha256=old.checkpoint_sha256,
        trained_on=old.trained_on,
        scope=old.scope,
        ancestors=(*old.ancestors, parent.id),
        calibration=calibration,
        probe_max_abs_logit_error=float(np.abs(logits - probe.logits).max()),
        checks=tuple(checks),
        tools={name: version(name) for name in ("chexnet-deploy", "onnx", "onnxruntime")},
        float_convolutions=float_convolutions,
    )
    return Bundle.write(out, manifest, model, parent.read_probe_bytes())


def _require_fp32(bundle: Bundle) -> None:
    if bundle.manifest.precision is not Precision.FP32 or bundle.manifest.target is not None:
        raise BundleError(f"{bundle.path} is {bundle.manifest.precision.value}; only an fp32 ONNX bundle is quantised.")
