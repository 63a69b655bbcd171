"""fp32 bundle -> fp16 or int8 bundle, kept only when it passes its gate beside the fp32 model.

Int8 comes in the dialects of variants.py. Where one does not pass, the convolutions that int8 hurts most stay in floating
point, as few as needed to pass; the manifest names them.
"""

from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import (
    FLOAT16_DIALECTS,
    ONNX_MODEL,
    PROBE,
    Calibration,
    Dialect,
    Precision,
    hash_files,
)
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.errors import BundleError, GateError
from chexnet_deploy.evaluation.gatekeeper import Gatekeeper, Verdict
from chexnet_deploy.evaluation.spec import Gate
from chexnet_deploy.export.quantize.bias import correct_head_bias, read_head_bias
from chexnet_deploy.export.quantize.calibration import CalibrationSet
from chexnet_deploy.export.quantize.graph_edits import quantised_activations
from chexnet_deploy.export.quantize.qdq import to_float16
from chexnet_deploy.export.quantize.sensitivity import Sensitivity, fewest_float_convolutions, measure_sensitivity
from chexnet_deploy.export.quantize.variants import ESTIMATOR, prepare
from chexnet_deploy.runtime.sessions.base import run_in_batches
from chexnet_deploy.runtime.sessions.ort import OrtSession, require_float16_rounding

MAX_FLOAT_CONVOLUTIONS = 32  # a quarter of them; beyond, fp16 is the better choice
SENSITIVITY_IMAGES = 16
N_WEAKEST = 10


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
    model = to_float16(onnx.load_from_string(bundle.read_model()))
    verdict = _judge(Gatekeeper(bundle, gate, validation), model, bundle)
    if verdict.reasons:
        raise GateError(
            f"the fp16 model does not pass its gate, so no bundle was kept: {'; '.join(verdict.reasons)}. Use fp32."
        )
    return _write(bundle, model, out, Precision.FP16, verdict)


def to_int8(
    bundle: Bundle,
    calibration: CalibrationSet,
    out: Path,
    gate: Gate,
    validation: LabelledImages,
    *,
    dialect: Dialect = "typed",
    on_images: Callable[[int], None] | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> Bundle:
    """Write an int8 bundle of an fp32 bundle: explicit Q/DQ, zero points 0.

    Args:
        bundle: fp32.
        calibration: images that set the activation ranges and round the weights.
        out: where; nothing may be there yet.
        gate: what the int8 model must pass.
        validation: labelled images of validation patients.
        dialect: see variants.py.
        on_images: called with the calibration images done.
        on_layer: called with the convolutions measured, where the gate fails and the most sensitive are looked for.

    Raises:
        GateError: it answers too differently even with a quarter of the convolutions in floating point; nothing is kept.
        CalibrationError: a tensor has no range on these images.
        SessionError: this ONNX Runtime can't check the dialects with float16.
    """
    _require_fp32(bundle)
    if dialect in FLOAT16_DIALECTS:
        require_float16_rounding()
    single = onnx.load_from_string(bundle.read_model())
    prepared = prepare(single, dialect, calibration.pixels, on_images=on_images)
    gatekeeper = Gatekeeper(bundle, gate, validation)
    session = OrtSession.open(bundle)
    reference, _ = run_in_batches(session, calibration.pixels)
    session.close()

    def build(float_convs: Collection[str] = ()) -> onnx.ModelProto:
        return correct_head_bias(prepared.build(float_convs), reference, calibration.pixels)

    model = build()
    verdict = _judge(gatekeeper, model, bundle)
    left: tuple[str, ...] = ()
    ranking: tuple[Sensitivity, ...] = ()
    if verdict.reasons:
        ranking = measure_sensitivity(prepared, calibration.pixels[:SENSITIVITY_IMAGES], on_layer=on_layer)
        found = fewest_float_convolutions(
            [each.convolution for each in ranking],
            lambda names: not _judge(gatekeeper, build(names), bundle).reasons,
            at_most=MAX_FLOAT_CONVOLUTIONS,
        )
        if found is None:
            raise GateError(
                f"the int8 model does not pass its gate, even with {MAX_FLOAT_CONVOLUTIONS} convolutions in floating point, so "
                f"no bundle was kept: {'; '.join(verdict.reasons)}. Use fp16, or calibrate on more images."
            )
        left = found
        model = build(left)
        verdict = _judge(gatekeeper, model, bundle)
    never = tuple(node.name for node in single.graph.node if node.op_type == "Conv" and node.name not in prepared.convs)
    record = Calibration(
        list_sha256=calibration.sha256,
        n_images=len(calibration.images),
        image_files=calibration.files,
        estimator=ESTIMATOR,
        logit_mean=tuple(reference.mean(axis=0, dtype=np.float64).tolist()),
        logit_sd=tuple(reference.std(axis=0, dtype=np.float64).tolist()),
        activations=quantised_activations(model),
    )
    weakest = {each.convolution: each.logit_noise for each in ranking[:N_WEAKEST]}
    return _write(bundle, model, out, Precision.INT8, verdict, dialect, record, (*never, *left), weakest)


def _judge(gatekeeper: Gatekeeper, model: onnx.ModelProto, parent: Bundle) -> Verdict:
    session = OrtSession(model.SerializeToString(), parent.manifest.preprocessing.resize_px)
    verdict = gatekeeper.judge(session)
    session.close()
    return verdict


def _write(
    parent: Bundle,
    model: onnx.ModelProto,
    out: Path,
    precision: Precision,
    verdict: Verdict,
    dialect: Dialect | Literal["float"] = "float",
    calibration: Calibration | None = None,
    float_convolutions: Sequence[str] = (),
    weakest: dict[str, float] | None = None,
) -> Bundle:
    content, probe = model.SerializeToString(), parent.read_probe_bytes()
    manifest = parent.manifest.child(
        parent.id,
        files=hash_files({ONNX_MODEL: content, PROBE: probe}),
        checks=verdict.checks,
        probe_max_abs_logit_error=verdict.probe_max_abs_logit_error,
        precision=precision,
        dialect=dialect,
        head_bias=tuple(read_head_bias(model).tolist()),
        calibration=calibration,
        tools={name: version(name) for name in ("chexnet-deploy", "onnx", "onnxruntime")},
        float_convolutions=tuple(float_convolutions),
        weakest_convolutions=weakest or {},
    )
    return Bundle.write(out, manifest, content, probe)


def _require_fp32(bundle: Bundle) -> None:
    if bundle.manifest.precision is not Precision.FP32 or bundle.manifest.target is not None:
        raise BundleError(f"{bundle.path} is {bundle.manifest.precision.value}; only an fp32 ONNX bundle is quantised.")
