"""Every TensorRT name the compiler and the session use exists in every version it claims to support.

tensorrt_names.json was read from the binding wheels of each version: class -> its methods, properties and members.
"""

import ast
import json
from pathlib import Path

import pytest

from chexnet_deploy.errors import MissingPackageError, SessionError
from chexnet_deploy.export.tensorrt import compile as compiler
from chexnet_deploy.runtime.sessions.trt_versions import FAMILIES, Family, family_of, open_tensorrt

NAMES: dict[str, dict[str, list[str]]] = json.loads((Path(__file__).parent / "tensorrt_names.json").read_text())
SESSIONS = Path(compiler.__file__).parents[2] / "runtime" / "sessions"
SOURCES = (Path(compiler.__file__), *(SESSIONS / f"{name}.py" for name in ("trt", "trt_lane", "trt_plan", "trt_log")))
# What they call their objects.
CLASS_OF = {
    "runtime": "Runtime",
    "_runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "execution": "IExecutionContext",
    "jit": "IRuntimeConfig",
    "convolution": "IConvolutionLayer",
    "concat": "IConcatenationLayer",
    "whole": "IConcatenationLayer",
    "inspector": "EngineInspector",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "first": "ParserError",
    "profile": "IOptimizationProfile",
    "layer": "ILayer",
}
# Names behind a question to the family's table.
GUARDED = {
    ("IProgressMonitor", None): "has_progress_monitor",
    ("IBuilderConfig", "progress_monitor"): "has_progress_monitor",
    ("ParserError", "node_name"): "names_nodes",
    ("ParserError", "node_operator"): "names_nodes",
    ("ILayer", "precision"): "precision_flags",
    ("TacticSource", None): "tactic_sources",
    ("IConvolutionLayer", "__class__"): "precision_flags",
    ("ICudaEngine", "device_memory_size_v2"): "has_memory_v2",
    ("IExecutionContext", "set_device_memory"): "has_memory_v2",
    ("ICudaEngine", "device_memory_size"): "has_memory_v1",
    ("ICudaEngine", "create_execution_context_without_device_memory"): "has_memory_v1",
    ("IExecutionContext", "device_memory"): "has_memory_v1",
    ("ExecutionContextAllocationStrategy", None): "has_memory_v2",
    ("PreviewFeature", None): "preview_features",
    ("IBuilderConfig", "set_preview_feature"): "preview_features",
    ("IExecutionContext", "is_stream_capturable"): "is_rtx",
    ("DynamicShapesKernelSpecializationStrategy", None): "is_rtx",
    ("IRuntimeConfig", None): "is_rtx",
    ("ICudaEngine", "create_runtime_config"): "is_rtx",
    ("ComputeCapability", None): "is_rtx",
    ("IBuilderConfig", "num_compute_capabilities"): "is_rtx",
    ("IBuilderConfig", "set_compute_capability"): "is_rtx",
}


# Raise SystemError under `python -W error`, since the version that is named; read off deprecateMember in the bindings' sources and
# off the release notes.
DEPRECATED = {
    ("ICudaEngine", "device_memory_size"): (10, 1),
    ("ICudaEngine", "create_execution_context_without_device_memory"): (10, 1),
    ("IExecutionContext", "device_memory"): (10, 1),
    ("ILayer", "precision"): (10, 12),
    ("BuilderFlag", "FP16"): (10, 12),
    ("BuilderFlag", "INT8"): (10, 12),
    ("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS"): (10, 12),
    ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"): (10, 0),
    ("PreviewFeature", "PROFILE_SHARING_0806"): (10, 0),
    ("TacticSource", "CUBLAS"): (10, 0),
    ("TacticSource", "CUDNN"): (10, 0),
}
SUPPORTED = [version for version in NAMES if version != "10.0.1"]


def used_names() -> set[tuple[str, str | None]]:
    """(class, member) of everything taken from TensorRT; member None where only the class is named."""
    used: set[tuple[str, str | None]] = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            owner = name_of(node.value)
            if node.attr in ("__version__", "__name__"):
                continue
            if owner in ("trt", "_trt"):
                used.add((node.attr, None))
            elif owner in CLASS_OF:
                used.add((CLASS_OF[owner], node.attr))
            elif isinstance(node.value, ast.Attribute) and name_of(node.value.value) in ("trt", "_trt"):
                used.add((node.value.attr, node.attr))
    return used


def name_of(node: ast.expr) -> str:
    """The last word of `trt` and of `self._trt`."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def family_of_table(version: str) -> Family:
    return family_of("tensorrt_rtx", version[4:]) if version.startswith("rtx-") else family_of("tensorrt", version)


def asks(family: Family, guard: str) -> bool:
    return not family.has_memory_v2 if guard == "has_memory_v1" else bool(getattr(family, guard))


def test_the_walk_finds_what_the_compiler_uses() -> None:
    used = used_names()
    assert len(used) > 25
    assert {("Builder", "build_serialized_network"), ("MemoryPoolType", "WORKSPACE"), ("ILogger", None)} <= used
    assert {
        ("IExecutionContext", "execute_async_v3"),
        ("IRuntimeConfig", "set_execution_context_allocation_strategy"),
        ("PreviewFeature", None),
    } <= used
    assert {("IConvolutionLayer", "kernel"), ("ICudaEngine", "get_tensor_profile_shape")} <= used


def names_used_with(family: Family) -> list[tuple[str, str | None]]:
    guards = {name: GUARDED.get(name) or GUARDED.get((name[0], None)) for name in used_names()}
    return sorted((name for name, guard in guards.items() if guard is None or asks(family, guard)), key=str)


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_name_exists(version: str) -> None:
    family, names = family_of_table(version), NAMES[version]
    missing = []
    for owner, member in names_used_with(family):
        exists = owner in names and (member is None or member in names[owner] or member in ("__init__", "__class__"))
        if not exists:
            missing.append((owner, member))
    assert missing == []


@pytest.mark.parametrize("version", SUPPORTED)
def test_no_name_is_deprecated(version: str) -> None:
    family = family_of_table(version)
    number = tuple(int(part) for part in version.removeprefix("rtx-").split(".")[:2])
    if family.is_rtx:
        number = (11, 0)  # its names are 11's
    flags = {
        *(("NetworkDefinitionCreationFlag", name) for name in family.creation_flags),
        *(("BuilderFlag", name) for names in family.precision_flags.values() for name in names),
        *(("PreviewFeature", name) for name in family.preview_features),
        *(("TacticSource", name) for name in family.tactic_sources),
    }
    used = {*names_used_with(family), *flags}
    assert {name for name, since in DEPRECATED.items() if name in used and number >= since} == set()


@pytest.mark.parametrize("version", SUPPORTED)
def test_flags_taken_from_the_table_exist(version: str) -> None:
    family, names = family_of_table(version), NAMES[version]
    assert set(family.creation_flags) <= set(names["NetworkDefinitionCreationFlag"])
    assert {flag for flags in family.precision_flags.values() for flag in flags} <= set(names["BuilderFlag"])
    assert "fp32" not in family.precision_flags  # a flag would let an fp32 model run in float16
    assert set(family.tactic_sources) <= set(names["TacticSource"])
    assert set(family.builder_flags) <= set(names["BuilderFlag"])
    assert set(family.preview_features) <= set(names["PreviewFeature"])
    assert family.has_memory_v2 == ("device_memory_size_v2" in names["ICudaEngine"])
    # A guard that says no must say so because the name is not there, or it hides a feature.
    assert family.has_progress_monitor == ("IProgressMonitor" in names)
    assert family.names_nodes == ("node_name" in names["ParserError"])
    assert family.is_rtx == ("ComputeCapability" in names)


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("8.5.2", "JetPack 5"),
        ("7.1.3", "JetPack 5"),
        ("9.2.0", "not supported"),
        ("10.0.1", "10.3 or later"),
        ("10.2.0", "10.3 or later"),
        ("12.0.1", "not supported"),
    ],
)
def test_other_versions_are_refused_by_name(version: str, found: str) -> None:
    with pytest.raises(SessionError, match=found) as caught:
        family_of("tensorrt", version)
    assert version in str(caught.value)


def test_families_do_not_overlap() -> None:
    claims = [(family.backend, major) for family in FAMILIES for major in family.majors]
    assert len(set(claims)) == len(claims)


def test_a_missing_tensorrt_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match=r"chexnet-deploy\[gpu-cu13\]"):
        open_tensorrt("tensorrt")
