"""ONNX bundle + spec -> plan bundle, on the GPU it will run on; kept only when it answers the probe as the fp32 model."""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import (
    FLOAT16_DIALECTS,
    MANIFEST,
    ONNX_MODEL,
    PLAN_MODEL,
    PROBE,
    UNKNOWN,
    EngineCard,
    Manifest,
    Precision,
    Target,
    hash_files,
    parse_manifest,
)
from chexnet_deploy.errors import BundleError, ExportError, GateError, OnPhase, SessionError, SpecError
from chexnet_deploy.evaluation.gatekeeper import Gatekeeper, Verdict
from chexnet_deploy.evaluation.spec import EngineSpec
from chexnet_deploy.export.tensorrt.compile import Compiled, CompileOptions, compile_onnx
from chexnet_deploy.export.tensorrt.layers import bytes_per_image, count_kernels, count_reformats
from chexnet_deploy.export.tensorrt.timing_cache import cache_key, read_cache, write_cache
from chexnet_deploy.files import write_file
from chexnet_deploy.runtime.sessions.driver import CudaError, Driver, open_driver, primary_context
from chexnet_deploy.runtime.sessions.trt import TrtSession
from chexnet_deploy.runtime.sessions.trt_target import this_target
from chexnet_deploy.runtime.sessions.trt_versions import Backend, Family, open_tensorrt


def build_tensorrt_plan(
    bundle: Bundle,
    spec: EngineSpec,
    out: Path,
    *,
    backend: Backend = "tensorrt",
    device: int = 0,
    timing_cache: Path | None = None,
    cancelled: threading.Event | None = None,
    on_phase: OnPhase | None = None,
) -> Bundle:
    """Build a plan bundle. Of two processes that build into one place the second waits, and finds it there.

    Args:
        bundle: fp32, fp16 or int8 ONNX.
        spec: of the same precision.
        out: where; nothing may be there yet.
        backend: which TensorRT builds it.
        device: the GPU's number.
        timing_cache: a file to start from and to write; left aside with a warning where it is not of this build.
        cancelled: set it from another thread or a signal handler to stop at TensorRT's next step; 8.6 has no steps and
            stops when it has built. Nothing is kept.
        on_phase: called with TensorRT's phase, what is done and of how much.

    Raises:
        BundleError: it is a plan already, `out` exists, or its dialect is not this TensorRT's.
        SpecError: the spec is for another precision or GPU.
        MissingPackageError, SessionError: no TensorRT, driver or GPU.
        ExportError: TensorRT refuses the model, or convolutions do not run in the types the bundle promises.
        GateError: the plan answers otherwise than the fp32 model; nothing is kept.
    """
    if bundle.manifest.target is not None:
        raise BundleError(f"{bundle.path} is a plan already. Build from the ONNX bundle it came from.")
    if spec.precision is not bundle.manifest.precision:
        found = bundle.manifest.precision.value
        raise SpecError(f"the spec is for {spec.precision.value}, {bundle.path} is {found}. Give its own spec.")
    if out.exists():
        raise BundleError(f"{out} is there already. Choose another place, or delete it first.")
    driver = open_driver()
    trt, family = open_tensorrt(backend)
    refuse_other_dialect(bundle, family)
    target = this_target(driver, backend, str(trt.__version__), device)
    refuse_other_gpu(spec, target)
    if spec.build.hardware_compatibility != "none" and driver.describe(device).is_integrated:
        raise SpecError(f"{target.gpu} shares its memory with the CPU; such plans run there alone. Omit ampere_plus.")
    with one_builder(out):
        if out.exists():
            raise BundleError(f"another process built {out} meanwhile. Use that one.")
        key = cache_key(bundle.manifest.files[ONNX_MODEL], target, spec)
        cached, left_aside = (b"", None) if timing_cache is None else read_cache(timing_cache, key)
        options = CompileOptions(spec, timing_cache=cached)
        compiled = _compile(driver, device, trt, family, bundle, options, cancelled, on_phase)
        # Before anything is refused: it shows why.
        write_file(out.parent / f"{out.name}.layers.{'txt' if family.is_rtx else 'json'}", compiled.table.encode())
        refuse_dropped_precision(bundle.manifest, compiled)
        if timing_cache is not None and compiled.timing_cache:
            write_cache(timing_cache, key, compiled.timing_cache)
        types = dict(Counter(compiled.conv_types.values()))
        wanted = bundle.manifest.precision.type_name
        verdict, activation_bytes = _judge(bundle, spec, compiled.plan, types, backend, device)
        traffic = bytes_per_image(compiled.layers)
        said_of_table = unknown_types(types), more_traffic_than_fp16(out, bundle.manifest, target, traffic)
        warnings = [left_aside, *said_of_table, *compiled.warnings]
        card = EngineCard(
            build_s=compiled.build_s,
            plan_bytes=len(compiled.plan),
            batch=(spec.batch.min, spec.batch.opt, spec.batch.max),
            conv_types=types,
            fallbacks=tuple(name for name, kind in compiled.conv_types.items() if kind not in (wanted, UNKNOWN)),
            n_kernels=count_kernels(compiled.layers),
            n_reformats=count_reformats(compiled.layers),
            bytes_per_image=traffic,
            activation_bytes=activation_bytes,
            warnings=tuple(warning for warning in warnings if warning is not None),
        )
        return _keep(bundle, out, compiled.plan, verdict, target, card)


@contextmanager
def one_builder(out: Path) -> Iterator[None]:
    """Hold the lock on a place to build into; the system drops it when its holder dies."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock"):
        yield


def _compile(
    driver: Driver,
    device: int,
    trt: ModuleType,
    family: Family,
    bundle: Bundle,
    options: CompileOptions,
    cancelled: threading.Event | None,
    on_phase: OnPhase | None,
) -> Compiled:
    try:
        with primary_context(driver, device):
            return compile_onnx(
                trt,
                family,
                bundle.read_model(),
                options,
                cuda_version=driver.cuda_version(),
                cancelled=cancelled,
                on_phase=on_phase,
            )
    except CudaError as err:
        raise SessionError(
            f"the GPU failed while the plan was built: {err}. Free its memory, or start the process again."
        ) from err


def _judge(
    bundle: Bundle, spec: EngineSpec, plan: bytes, types: dict[str, int], backend: Backend, device: int
) -> tuple[Verdict, int]:
    """Return how the plan answers the probe, and the bytes of activations it needs."""
    side = bundle.manifest.preprocessing.resize_px
    # Without graphs, which would compile for three contexts more.
    session = TrtSession(plan, backend=backend, resize_px=side, conv_types=types, device=device, with_graphs=False)
    try:
        return Gatekeeper(bundle, spec.gate).judge(session), session.device_memory_bytes
    finally:
        session.close()


def _keep(bundle: Bundle, out: Path, plan: bytes, verdict: Verdict, target: Target, card: EngineCard) -> Bundle:
    """Write the plan bundle, if it answers as the fp32 model."""
    if verdict.reasons:
        gap = verdict.checks[0]
        raise GateError(
            f"the plan differs from the fp32 model by {gap.value:.4f} in probability on the probe, limit {gap.limit}; "
            f"nothing was kept."
        )
    probe = bundle.read_probe_bytes()
    manifest = bundle.manifest.child(
        bundle.id,
        files=hash_files({PLAN_MODEL: plan, PROBE: probe}),
        checks=verdict.checks,
        probe_max_abs_logit_error=verdict.probe_max_abs_logit_error,
        target=target,
        engine=card,
    )
    return Bundle.write(out, manifest, plan, probe)


def refuse_other_gpu(spec: EngineSpec, target: Target) -> None:
    """Refuse a spec whose limits were declared for another GPU.

    Raises:
        SpecError: names both.
    """
    if not spec.is_for(target.gpu):
        raise SpecError(
            f"the spec is for a GPU named {spec.gpu}, here is {target.gpu}. Give that GPU's spec, or one for any."
        )


def is_buildable(manifest: Manifest, family: Family) -> bool:
    """Say whether this TensorRT builds a model of this form; the forms for CPUs no TensorRT does."""
    return manifest.target is None and manifest.dialect in ("float", *_dialects_of(family))


def _dialects_of(family: Family) -> tuple[str, ...]:
    return ("trt8",) if family.precision_flags else FLOAT16_DIALECTS


def refuse_other_dialect(bundle: Bundle, family: Family) -> None:
    """Refuse an int8 form that this TensorRT would run as something else.

    Raises:
        BundleError: names the dialect to export.
    """
    taken = _dialects_of(family)
    if not is_buildable(bundle.manifest, family):
        raise BundleError(
            f"{bundle.path} is int8 of the {bundle.manifest.dialect} dialect, but {family.name} needs {' or '.join(taken)}. "
            f"Export it: chexnet-deploy export --dialect {taken[0]}"
        )


def refuse_dropped_precision(manifest: Manifest, compiled: Compiled) -> None:
    """Refuse an engine of which the layer table proves that its convolutions do not run in the types the bundle promises.

    Raises:
        ExportError: names one that does not.
    """
    wanted = manifest.precision.type_name
    # The head is float32 in every bundle; int8 bundles name theirs and the first.
    exempt = set(manifest.float_convolutions) or {list(compiled.conv_types)[-1]}
    # What the table does not say is not refused: it is counted in the card.
    allowed = (wanted, UNKNOWN)
    wrong = {name: kind for name, kind in compiled.conv_types.items() if name not in exempt and kind not in allowed}
    if wrong:
        name, kind = next(iter(wrong.items()))
        raise ExportError(
            f"{len(wrong)} convolutions do not run in {wanted}, e.g. {name} in {kind}: TensorRT dropped the precision. "
            f"Nothing was kept."
        )


def unknown_types(types: Mapping[str, int]) -> str | None:
    """Return a warning where the layer table does not show what some convolutions run in."""
    if not types.get(UNKNOWN):
        return None
    return (
        f"TensorRT's layer table does not show which type {types[UNKNOWN]} of {sum(types.values())} convolutions run in"
    )


def more_traffic_than_fp16(out: Path, manifest: Manifest, target: Target, traffic: int | None) -> str | None:
    """Return a warning where an int8 plan moves more bytes than the fp16 plan of the same checkpoint and GPU beside it.

    Args:
        out: where the int8 plan goes; other plans are looked for in the same folder.
        manifest: of the model it is built from.
        target: what it is built for.
        traffic: bytes an image, by its layer table.
    """
    if manifest.precision is not Precision.INT8 or traffic is None:
        return None
    for path in sorted(out.parent.glob(f"*/{MANIFEST}")):
        try:
            other = parse_manifest(path, path.read_bytes())
        except (BundleError, OSError):
            continue  # not a bundle of this version: nothing to compare with
        is_sibling = (other.precision, other.checkpoint_sha256, other.target) == (
            Precision.FP16,
            manifest.checkpoint_sha256,
            target,
        )
        fewest = other.engine.bytes_per_image if is_sibling and other.engine is not None else None
        if fewest is not None and fewest < traffic:
            return (
                f"this int8 plan moves {traffic / 1e6:.2f} MB an image, the fp16 one in {path.parent} {fewest / 1e6:.2f}: "
                f"expect it to be slower where memory is the limit"
            )
    return None
