"""ONNX -> plan bytes on whichever TensorRT is installed. Writes no file, runs nothing, needs a GPU where TensorRT does.

Precision comes from the ONNX alone: strongly typed networks, and on TensorRT 8.6 flags that its typed parts be obeyed.
"""

import threading
from dataclasses import dataclass
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np

from chexnet_deploy.bundle.manifest import Precision
from chexnet_deploy.errors import ExportError, OnPhase
from chexnet_deploy.evaluation.spec import EngineSpec
from chexnet_deploy.export.tensorrt.layers import Layer, conv_types, layer_lines, parse_inspector, parse_log
from chexnet_deploy.runtime.sessions.trt_log import TensorrtLog, create
from chexnet_deploy.runtime.sessions.trt_versions import Family

INPUT = "pixels"
_MIB = 1 << 20

_WHOLE_BUILD = "building, which takes minutes and tells no steps"  # TensorRT 8.6


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """What to compile for.

    Attributes:
        compute_capability: e.g. "8.9", for a TensorRT that compiles for a GPU that is not there; None for the one here.
        timing_cache: of an earlier build of the same thing; empty for none.
    """

    spec: EngineSpec
    compute_capability: str | None = None
    timing_cache: bytes = b""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A plan and what is known of it.

    Attributes:
        layers: TensorRT's own table of what it made.
        timing_cache: what the next build of the same thing can start from; empty where the family has none.
        table: that table as TensorRT gave it; empty where it gave none.
        conv_types: the type that each of the model's convolutions runs in, by its ONNX node's name; read from the table.
        warnings: what TensorRT warned of, each message once, in order.
    """

    plan: bytes
    layers: tuple[Layer, ...]
    table: str
    conv_types: dict[str, str]
    timing_cache: bytes
    build_s: float
    warnings: tuple[str, ...]


def compile_onnx(
    trt: ModuleType,
    family: Family,
    model: bytes,
    options: CompileOptions,
    *,
    cuda_version: int | None = None,
    cancelled: threading.Event | None = None,
    on_phase: OnPhase | None = None,
) -> Compiled:
    """Compile an ONNX model.

    Args:
        trt: the module, from open_tensorrt.
        family: what it is.
        model: the ONNX file's bytes.
        options: batch profile and limits.
        cuda_version: of the driver, e.g. 12040; None where none is needed.
        cancelled: set it from another thread to stop; needs IProgressMonitor, so not on 8.6.
        on_phase: called with TensorRT's phase, what is done and of how much.

    Raises:
        ExportError: TensorRT can't parse the model (naming the node), refuses to build it, or was cancelled.
        SessionError: TensorRT does not start on this driver.
    """
    log = TensorrtLog.of(trt)
    log.begin(keeps_lines=family.is_rtx)
    start = perf_counter()
    try:
        builder = create(trt.Builder, trt, family, cuda_version)
        network = builder.create_network(_flags(trt.NetworkDefinitionCreationFlag, family.creation_flags))
        _parse(trt, network, log, model, family)
        if family.flattens_concats:
            _flatten_concats(trt, network)
        config = builder.create_builder_config()
        _configure(trt, builder, network, config, family, options)
        if family.has_progress_monitor:
            # Kept in a variable: the config does not keep it alive.
            monitor = _make_monitor(trt, cancelled, on_phase)
            config.progress_monitor = monitor
        elif on_phase is not None:
            on_phase(_WHOLE_BUILD, 0, 1)
        network_layers = (network.get_layer(i) for i in range(network.num_layers))
        conv_names = [layer.name for layer in network_layers if layer.type == trt.LayerType.CONVOLUTION]
        plan = builder.build_serialized_network(network, config)
        if not family.has_progress_monitor and on_phase is not None:
            on_phase(_WHOLE_BUILD, 1, 1)
        if cancelled is not None and cancelled.is_set():
            raise ExportError("the build was cancelled; nothing was kept.")
        if plan is None:
            raise ExportError(
                f"{family.name} built nothing{log.last_error() or ' and gave no reason'}. Nothing was kept. Where memory was "
                f"too small, free some, or give the spec a smaller batch or build.workspace_mib."
            )
        table = "\n".join(layer_lines(log.lines)) if family.is_rtx else _inspect(trt, family, plan, cuda_version)
        warnings = tuple(dict.fromkeys(log.warnings))
    finally:
        log.end()
    layers = parse_log(table.splitlines()) if family.is_rtx else parse_inspector(table)
    return Compiled(
        plan=bytes(plan),
        layers=layers,
        table=table,
        conv_types=conv_types(layers, conv_names),
        timing_cache=bytes(config.get_timing_cache().serialize()) if family.has_timing_cache else b"",
        build_s=perf_counter() - start,
        warnings=warnings,
    )


def _parse(trt: ModuleType, network: Any, log: TensorrtLog, model: bytes, family: Family) -> None:
    parser = trt.OnnxParser(network, log.handle)
    if not parser.parse(model):
        problems = [parser.get_error(i) for i in range(parser.num_errors)]
        first = problems[0]
        node = f"{first.node_operator()} {first.node_name()}" if family.names_nodes else f"number {first.node()}"
        raise ExportError(
            f"{family.name} can't parse this model: node {node}: {first.desc()} ({len(problems)} problems). "
            f"Export it with this package; for TensorRT 8.6 use fp32, fp16 or int8 of the trt8 dialect."
        )
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    if inputs != [INPUT]:
        raise ExportError(f"the model takes {inputs}, needed {INPUT} alone. Export it with this package.")


def _flatten_concats(trt: ModuleType, network: Any) -> None:
    """Let whatever reads a concat of concats read one of all their parts; the builder drops what nothing reads any more."""
    parts: dict[str, list[Any]] = {}
    flat: dict[str, Any] = {}
    for layer in [network.get_layer(i) for i in range(network.num_layers)]:
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        if layer.type != trt.LayerType.CONCATENATION:
            for i, tensor in enumerate(inputs):
                if tensor is not None and tensor.name in flat:
                    layer.set_input(i, flat[tensor.name])
            continue
        name = layer.get_output(0).name
        parts[name] = [part for tensor in inputs for part in parts.get(tensor.name, [tensor])]
        if len(parts[name]) > len(inputs):
            concat, whole = layer, network.add_concatenation(parts[name])
            concat.__class__ = trt.IConcatenationLayer  # the bindings return the base class
            whole.axis, whole.name = concat.axis, f"{layer.name} (flat)"
            flat[name] = whole.get_output(0)


def _configure(
    trt: ModuleType, builder: Any, network: Any, config: Any, family: Family, options: CompileOptions
) -> None:
    spec = options.spec
    for name in family.precision_flags.get(spec.precision.value, ()):
        config.set_flag(getattr(trt.BuilderFlag, name))
    if spec.precision is Precision.FP16 and family.precision_flags:
        _pin_types(trt, network)
    if family.tactic_sources:
        config.set_tactic_sources(_flags(trt.TacticSource, family.tactic_sources))
    for name in family.builder_flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in family.preview_features:
        config.set_preview_feature(getattr(trt.PreviewFeature, name), True)  # noqa: FBT003  # its own signature
    # TF32 would round the fp32 reference to ten bits of mantissa, silently.
    config.clear_flag(trt.BuilderFlag.TF32)
    if spec.build.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.build.workspace_mib * _MIB)
    config.builder_optimization_level = spec.build.optimization_level
    if spec.build.hardware_compatibility == "ampere_plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if family.has_timing_cache:
        cache = config.create_timing_cache(options.timing_cache)
        config.set_timing_cache(cache, ignore_mismatch=False)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.compute_capability is not None:
        if not family.is_rtx:
            raise ExportError(f"{family.name} builds on the GPU it will run on; don't name another one.")
        name = "SM" + options.compute_capability.replace(".", "")
        if not hasattr(trt.ComputeCapability, name):
            known = sorted(n for n in dir(trt.ComputeCapability) if n.startswith("SM"))
            raise ExportError(f"{family.name} does not compile for {name}. It knows {', '.join(known)}.")
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
    profile = builder.create_optimization_profile()
    _, *sides = tuple(network.get_input(0).shape)
    low, best, high = ((n, *sides) for n in (spec.batch.min, spec.batch.opt, spec.batch.max))
    profile.set_shape(INPUT, low, best, high)
    config.add_optimization_profile(profile)


def _pin_types(trt: ModuleType, network: Any) -> None:
    """Ask a weakly typed network for the types that the ONNX holds: the fastest kernel may be another type's."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.CONVOLUTION:
            convolution = network.get_layer(i)
            convolution.__class__ = trt.IConvolutionLayer  # the bindings return the base class
            is_half = convolution.kernel.dtype in (np.dtype(np.float16), trt.DataType.HALF)
            layer.precision = trt.DataType.HALF if is_half else trt.DataType.FLOAT


def _inspect(trt: ModuleType, family: Family, plan: Any, cuda_version: int | None) -> str:
    """Return the inspector's JSON, or nothing where TensorRT shows none: a plan isn't lost for that."""
    runtime = create(trt.Runtime, trt, family, cuda_version)
    engine = runtime.deserialize_cuda_engine(plan)
    inspector = None if engine is None else engine.create_engine_inspector()
    if inspector is None:
        return ""
    # Where batch sizes are open, types are shown for the shapes of an execution context alone.
    execution = engine.create_execution_context()
    if execution is not None and execution.set_input_shape(INPUT, engine.get_tensor_profile_shape(INPUT, 0)[1]):
        inspector.execution_context = execution
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _flags(enum: Any, names: tuple[str, ...]) -> int:
    """By name: the integers differ between versions."""
    return sum(1 << int(getattr(enum, name)) for name in names)


def _make_monitor(trt: ModuleType, cancelled: threading.Event | None, on_phase: OnPhase | None) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined,misc]  # as Log above
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps

        # An exception in here would cancel the build without a word.
        def step_complete(self, phase_name: str, step: int) -> bool:
            if on_phase is not None:
                on_phase(phase_name, step + 1, max(self.totals.get(phase_name, 1), step + 1))
            return cancelled is None or not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if on_phase is not None:
                total = self.totals.get(phase_name, 1)
                on_phase(phase_name, total, total)

    return Monitor()
