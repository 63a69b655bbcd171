"""Which TensorRT this is, and how the supported ones differ: one table, checked against the real names of each version.

Imports TensorRT by name and nothing of this package but errors. Nothing is feature-sniffed: what the table does not
list is refused by name.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType, ModuleType
from typing import Literal

from chexnet_deploy.errors import MissingPackageError, SessionError

Backend = Literal["tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True, slots=True)
class Family:
    """TensorRT versions that are built for alike.

    Attributes:
        name: for messages.
        backend: the Python module.
        majors: major versions; for 8 only 8.6.
        creation_flags: names in NetworkDefinitionCreationFlag that the network is made with.
        precision_flags: by a bundle's precision, names in BuilderFlag without which the ONNX's own float16 and int8 are
            not run as such; empty where the network is strongly typed. Never more than the bundle needs: they would let
            an fp32 model run in float16.
        max_opset: newest ONNX opset its parser reads.
        has_progress_monitor: IProgressMonitor came with 10.0.
        names_nodes: its parser's errors name the ONNX node, from 10.0 on; before, they number it.
        tactic_sources: names in TacticSource to choose kernels from; empty for TensorRT's own choice.
        has_timing_cache: it times kernels while it builds; RTX chooses them at load.
        has_memory_v2: execution contexts are given their memory by the calls that replaced the first ones, which 10 deprecates.
        preview_features: names in PreviewFeature to build with.
        builder_flags: names in BuilderFlag to build with, whatever the precision.
        flattens_concats: it moves less where no concat reads another; what flat concats do to the others: see FAMILIES.
        is_rtx: the GPU is named, not looked for; the layer table is logged, not inspected; and kernels are compiled on the GPU
            at hand when a plan is loaded.
    """

    name: str
    backend: Backend
    majors: tuple[int, ...]
    creation_flags: tuple[str, ...]
    precision_flags: Mapping[str, tuple[str, ...]]
    max_opset: int
    has_progress_monitor: bool
    names_nodes: bool
    tactic_sources: tuple[str, ...]
    has_timing_cache: bool
    has_memory_v2: bool
    preview_features: tuple[str, ...]
    builder_flags: tuple[str, ...]
    flattens_concats: bool
    is_rtx: bool


_TYPED = Family(
    name="TensorRT 10",
    backend="tensorrt",
    majors=(10,),
    creation_flags=("STRONGLY_TYPED",),
    precision_flags=MappingProxyType({}),
    max_opset=19,
    has_progress_monitor=True,
    names_nodes=True,
    tactic_sources=(),
    has_timing_cache=True,
    has_memory_v2=True,
    preview_features=(),
    builder_flags=(),
    # Nested, the growing tensor of a dense block has one place in memory. On TensorRT 8.6 and an H200, flat concats made 531
    # copies of it, and the builder timed so many reformats that it did not end in minutes.
    flattens_concats=False,
    is_rtx=False,
)
FAMILIES = (
    # 8.6 is weakly typed: float16 and int8 must be allowed, and the layer table says whether they were used.
    replace(
        _TYPED,
        name="TensorRT 8.6",
        majors=(8,),
        creation_flags=("EXPLICIT_BATCH",),
        precision_flags=MappingProxyType({"fp16": ("FP16", "OBEY_PRECISION_CONSTRAINTS"), "int8": ("FP16", "INT8")}),
        max_opset=17,
        has_progress_monitor=False,
        names_nodes=False,
        # Its own kernels alone: a small edge system need not carry cuDNN and cuBLAS for a DenseNet.
        tactic_sources=("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"),
        has_memory_v2=False,
        # Else a profile belongs to the first execution context, and there could be one lane and no graph.
        preview_features=("PROFILE_SHARING_0806",),
    ),
    _TYPED,
    # 11 knows no other networks and ignores the flag; BuilderFlag.FP16 and INT8 are gone.
    replace(_TYPED, name="TensorRT 11", majors=(11,)),
    replace(
        _TYPED,
        name="TensorRT for RTX 1",
        backend="tensorrt_rtx",
        majors=(1,),
        has_timing_cache=False,
        # A plan whose kernels take memory themselves can't be captured.
        builder_flags=("REQUIRE_USER_ALLOCATION",),
        # 16 percent fewer bytes an image by its layer table.
        flattens_concats=True,
        is_rtx=True,
    ),
)


def open_tensorrt(backend: Backend) -> tuple[ModuleType, Family]:
    """Import TensorRT and say which it is.

    Raises:
        MissingPackageError: it is not installed.
        SessionError: this version is not supported.
    """
    try:
        module = importlib.import_module(backend)
    except ModuleNotFoundError as err:
        extra = "gpu-cu13" if backend == "tensorrt" else "rtx"
        raise MissingPackageError(
            f"{err.name} is not installed. Run: pip install 'chexnet-deploy[{extra}]' (chexnet-deploy doctor says which fits "
            "the driver). NVIDIA's licence applies: see README."
        ) from err
    return module, family_of(backend, str(module.__version__))


def family_of(backend: Backend, version: str) -> Family:
    """Return the family a version belongs to.

    Raises:
        SessionError: it is not supported; the message says which are.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if backend == "tensorrt" and (major, minor) < (8, 6):
        raise SessionError(
            f"TensorRT {version} is not supported: JetPack 5 and older end at 8.5. Needed: 8.6 (JetPack 6.0), 10.3 or later."
        )
    if backend == "tensorrt" and (10, 0) <= (major, minor) < (10, 3):
        raise SessionError(
            f"TensorRT {version} is not supported: it lacks calls that replaced those which 10 deprecates. "
            f"Needed: 8.6 (JetPack 6.0), 10.3 or later. Run: chexnet-deploy doctor"
        )
    for family in FAMILIES:
        if family.backend == backend and major in family.majors:
            return family
    known = ", ".join(family.name for family in FAMILIES if family.backend == backend)
    raise SessionError(f"{backend} {version} is not supported. Supported: {known}.")
