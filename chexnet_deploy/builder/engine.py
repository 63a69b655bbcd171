"""ONNX bundle + spec -> plan bundle, on the GPU it will run on; kept only when it gives the known answers.

Two processes that build into one place: the second finds it there, or waits for nothing and is refused.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from chexnet_deploy.builder.compile import Compiled, CompileOptions, compile_onnx
from chexnet_deploy.bundle import PLAN_MODEL, PROBE, Bundle, Check, EngineCard, Manifest, Precision, hash_files
from chexnet_deploy.errors import BundleError, ExportError, GateError, SpecError
from chexnet_deploy.predictor import sigmoid
from chexnet_deploy.sessions.target import open_driver, this_target
from chexnet_deploy.sessions.tensorrt_versions import Backend, Family, open_tensorrt
from chexnet_deploy.sessions.trt import TrtSession
from chexnet_deploy.spec import EngineSpec

_TYPE_OF = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.INT8: "int8"}


def build_engine(
    bundle: Bundle,
    spec: EngineSpec,
    out: Path,
    *,
    backend: Backend = "tensorrt",
    device: int = 0,
    on_phase: Callable[[str, int, int], None] | None = None,
) -> Bundle:
    """Build a plan bundle.

    Args:
        bundle: fp32, fp16 or int8 ONNX.
        spec: of the same precision.
        out: where; nothing may be there yet.
        backend: which TensorRT builds it.
        device: the GPU's number.
        on_phase: called with TensorRT's phase, what is done and of how much.

    Raises:
        BundleError: it is a plan already, `out` exists, or its dialect is not this TensorRT's.
        SpecError: the spec is for another precision.
        MissingPackageError, SessionError: no TensorRT, driver or GPU.
        ExportError: TensorRT refuses the model, or convolutions do not run in the types the bundle promises.
        GateError: the plan answers otherwise than the fp32 model; nothing is kept.
    """
    manifest = bundle.manifest
    if manifest.target is not None:
        raise BundleError(f"{bundle.path} is a plan already. Build from the ONNX bundle it came from.")
    if spec.precision is not manifest.precision:
        raise SpecError(
            f"the spec is for {spec.precision.value}, {bundle.path} is {manifest.precision.value}. Give its own spec."
        )
    if out.exists():
        raise BundleError(f"{out} is there already. Choose another place, or delete it first.")
    cuda = open_driver()
    trt, family = open_tensorrt(backend)
    refuse_other_dialect(bundle, family)
    target = this_target(cuda, backend, str(trt.__version__), device)
    context = cuda.Device(device).retain_primary_context()
    context.push()
    try:
        compiled = compile_onnx(
            trt, family, bundle.read_model(), CompileOptions(manifest.precision, spec.batch), on_phase=on_phase
        )
    finally:
        cuda.Context.pop()
        context.detach()
    refuse_dropped_precision(manifest, compiled)
    types = dict(Counter(compiled.conv_types.values()))
    probe = bundle.read_probe()
    session = TrtSession(
        compiled.plan, backend=backend, resize_px=manifest.preprocessing.resize_px, conv_types=types, device=device
    )
    try:
        step = session.batch_range[1]
        answers = [session.run(probe.pixels[i : i + step])[0] for i in range(0, len(probe.pixels), step)]
    finally:
        session.close()
    logits = np.concatenate(answers)
    gap = float(np.abs(sigmoid(logits) - sigmoid(probe.logits)).max())
    limit = spec.gate.max_abs_probability_difference
    if not gap <= limit:
        raise GateError(
            f"the plan differs from the fp32 model by {gap:.4f} in probability on the probe, limit {limit}; nothing was kept."
        )
    card = EngineCard(
        build_s=compiled.build_s,
        plan_bytes=len(compiled.plan),
        batch=(spec.batch.min, spec.batch.opt, spec.batch.max),
        conv_types=types,
        n_layers=len(compiled.layers),
        warnings=compiled.warnings,
    )
    made = manifest.model_copy(
        update={
            "files": hash_files({PLAN_MODEL: compiled.plan, PROBE: bundle.read_probe_bytes()}),
            "ancestors": (*manifest.ancestors, bundle.id),
            "probe_max_abs_logit_error": float(np.abs(logits - probe.logits).max()),
            "checks": (Check(name="max |probability difference| on the probe", value=gap, limit=limit),),
            "target": target,
            "engine": card,
        }
    )
    # Validated again: model_copy does not.
    return Bundle.write(out, Manifest.model_validate(made.model_dump()), compiled.plan, bundle.read_probe_bytes())


def refuse_other_dialect(bundle: Bundle, family: Family) -> None:
    """Refuse an int8 form that this TensorRT would run as something else.

    Raises:
        BundleError: names the dialect to export.
    """
    needed = "trt8" if family.precision_flags else "typed"
    if bundle.manifest.dialect not in ("float", needed):
        raise BundleError(
            f"{bundle.path} is int8 of the {bundle.manifest.dialect} dialect, but {family.name} needs {needed}. "
            f"Export it: chexnet-deploy export --dialect {needed}"
        )


def refuse_dropped_precision(manifest: Manifest, compiled: Compiled) -> None:
    """Refuse an engine whose convolutions do not run in the types the bundle promises.

    Raises:
        ExportError: names one that does not.
    """
    wanted = _TYPE_OF[manifest.precision]
    # The head is float32 in every bundle; int8 bundles name theirs and the first.
    exempt = set(manifest.float_convolutions) or {list(compiled.conv_types)[-1]}
    wrong = {name: kind for name, kind in compiled.conv_types.items() if name not in exempt and kind != wanted}
    if wrong:
        name, kind = next(iter(wrong.items()))
        raise ExportError(
            f"{len(wrong)} convolutions do not run in {wanted}, e.g. {name} in {kind}: TensorRT dropped the precision. "
            f"Nothing was kept."
        )
