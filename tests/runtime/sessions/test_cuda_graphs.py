"""What capturing does around the driver. The driver's own behaviour is tested on a GPU: tests marked gpu."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chexnet_deploy.runtime.sessions import cuda_graphs as graphs
from chexnet_deploy.runtime.sessions.cuda_graphs import CudaGraph, GraphError


class Driver:
    """Records calls and fails the one it is told to; its names are checked against the real ones below."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread-local")
    CUresult = SimpleNamespace(CUDA_SUCCESS=0)

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.calls: list[str] = []

    def CUstream(self, handle: int) -> int:
        return handle

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> tuple[object, ...]:
            self.calls.append(name)
            error = SimpleNamespace(name="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED") if name == self.failing else 0
            return (error, "graph") if name in ("cuStreamEndCapture", "cuGraphInstantiate") else (error,)

        return call


def test_work_is_captured_once_and_launched_often() -> None:
    driver, done = Driver(), []
    graph = CudaGraph(driver, 7, lambda: done.append(1))  # type: ignore[arg-type]
    graph.launch()
    graph.launch()
    graph.free()
    assert done == [1]
    assert driver.calls == [
        *("cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy", "cuGraphUpload"),
        *("cuGraphLaunch", "cuGraphLaunch", "cuGraphExecDestroy"),
    ]


@pytest.mark.parametrize("failing", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_what_the_driver_refuses_is_named(failing: str) -> None:
    with pytest.raises(GraphError, match=f"{failing}: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        CudaGraph(Driver(failing), 7, lambda: None)  # type: ignore[arg-type]


def test_work_that_fails_leaves_the_stream_usable() -> None:
    driver = Driver()

    def work() -> None:
        raise GraphError("no")

    with pytest.raises(GraphError, match="no"):
        CudaGraph(driver, 7, work)  # type: ignore[arg-type]
    # A healthy capture ends in a graph, which is nobody's.
    assert driver.calls == ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphDestroy"]


def test_every_name_is_cuda_bindings_own() -> None:
    real = pytest.importorskip("cuda.bindings.driver", reason="NOT RUN: pip install cuda-bindings")
    tree = ast.parse(Path(graphs.__file__).read_text())
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and getattr(node.value, "attr", getattr(node.value, "id", "")) in ("driver", "_driver")
    }
    names |= {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("cu")
        and node.value.isalnum()
    }
    assert {"CUstream", "cuStreamEndCapture", "cuGraphLaunch", "cuGraphUpload"} <= names
    assert [name for name in sorted(names) if not hasattr(real, name)] == []
    assert hasattr(real.CUstreamCaptureMode, "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL")


def test_without_cuda_bindings_the_next_step_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(GraphError, match="pip install cuda-bindings"):
        graphs.open_graphs()
