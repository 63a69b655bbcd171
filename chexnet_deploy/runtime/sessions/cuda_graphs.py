"""CUDA graphs, by cuda-bindings: pycuda has none, and a stream is the same handle in both.

A graph is launched in one call where TensorRT makes a few hundred, which is what a single image waits for.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from chexnet_deploy.runtime.sessions.driver import CudaError


class GraphError(CudaError):
    """Work can't be captured, or what was captured can't be launched."""


class CudaGraph:
    """Work captured once from a stream, launched on it again and again.

    Args:
        driver: cuda.bindings.driver.
        stream: a CUDA stream's handle.
        work: puts the work on that stream, waits for nothing and allocates nothing.

    Raises:
        GraphError: the work can't be captured; the stream can be used as before.
    """

    def __init__(self, driver: ModuleType, stream: int, work: Callable[[], None]) -> None:
        self._driver = driver
        self._stream = driver.CUstream(stream)
        # Thread-local: what other threads do meanwhile, torch's allocations say, must not end the capture.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            # Always ended, or the stream would stay in capture mode and never run anything.
            error, unfinished = driver.cuStreamEndCapture(self._stream)
            if error == driver.CUresult.CUDA_SUCCESS:
                driver.cuGraphDestroy(unfinished)
            raise
        (graph,) = self._call("cuStreamEndCapture", self._stream)
        try:
            (self._graph,) = self._call("cuGraphInstantiate", graph, 0)
        finally:
            driver.cuGraphDestroy(graph)
        try:
            # Its memory is taken now and not at the first image.
            self._call("cuGraphUpload", self._graph, self._stream)
        except GraphError:
            driver.cuGraphExecDestroy(self._graph)
            raise

    def launch(self) -> None:
        """Put the work on the stream.

        Raises:
            GraphError: the driver refuses; the context can't be trusted any more.
        """
        self._call("cuGraphLaunch", self._graph, self._stream)

    def free(self) -> None:
        """Give its memory back; nothing of it may be running.

        Raises:
            GraphError: the driver refuses.
        """
        self._call("cuGraphExecDestroy", self._graph)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        try:
            answer = getattr(self._driver, name)(*arguments)
        except RuntimeError as err:  # this driver is too old to have it
            raise GraphError(f"{name}: {err}") from err
        error, *values = answer
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise GraphError(f"{name}: {error.name}")
        return tuple(values)


def open_graphs() -> ModuleType:
    """Import cuda-bindings' driver API.

    Raises:
        GraphError: it is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as err:
        raise GraphError("cuda-bindings is not installed; pip install cuda-bindings brings them") from err
    return driver  # type: ignore[no-any-return]  # cuda-bindings has no types
