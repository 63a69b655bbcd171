"""A lane: one stream, all the memory one run needs, and TensorRT's execution contexts on it. Part of trt.py.

Nothing is allocated after it is made and its graphs are captured. One thread at a time.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import SessionError
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, Maps
from chexnet_deploy.runtime.sessions.cuda_graphs import CudaGraph, GraphError
from chexnet_deploy.runtime.sessions.driver import Driver
from chexnet_deploy.runtime.sessions.trt_plan import INPUT, OUTPUTS, Plan

STAGES = ("upload", "compute", "download")


class Lane:
    """Needs the CUDA context current for every call, the first too.

    Args:
        driver: with a current context.
        plan: deserialised.
        is_integrated: the GPU reads and writes the CPU's memory, so nothing is copied.

    Raises:
        SessionError: TensorRT gives no execution context.
        CudaError: the driver refuses; nothing is left taken.
    """

    def __init__(self, driver: Driver, plan: Plan, *, is_integrated: bool) -> None:
        self._driver, self._plan, self._is_integrated = driver, plan, is_integrated
        self._host: dict[str, NDArray[Any]] = {}
        self._device: dict[str, Any] = {}
        # By batch size, each with the context it was captured from, which must outlive it.
        self._graphs: dict[int, tuple[CudaGraph, Any]] = {}
        # Undone in the reverse order, each step also where an earlier one failed.
        with ExitStack() as owned:
            self._stream = driver.open_stream()
            owned.callback(driver.close_stream, self._stream)
            self._events = [self._take_event(owned) for _ in range(len(STAGES) + 1)]
            for name, shape in plan.shapes.items():
                self._take_buffers(owned, name, shape)
            # One piece for all contexts of this lane, which never run at once.
            self._memory: Any = driver.take_device(plan.activation_bytes)
            owned.callback(driver.free_device, self._memory)
            owned.callback(self._drop_execution)
            self._execution: Any = self._open_execution()
            owned.callback(self.free_graphs)
            self._owned = owned.pop_all()

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Return logits and maps of checked pixels."""
        n = len(pixels)
        np.copyto(self._host[INPUT][:n], pixels)
        self._upload(n)
        self._compute(n)
        self._download(n)
        self._driver.wait(self._stream)
        # Copies: the buffers belong to the next run.
        return self._host["logits"][:n].copy(), self._host["cam"][:n].copy()

    def stage_times_ms(self, pixels: Pixels) -> Mapping[str, float]:
        """Return the GPU's own times of one run by stage."""
        n = len(pixels)
        np.copyto(self._host[INPUT][:n], pixels)
        self._driver.record(self._events[0], self._stream)
        for event, stage in zip(self._events[1:], (self._upload, self._compute, self._download), strict=True):
            stage(n)
            self._driver.record(event, self._stream)
        self._driver.wait(self._stream)
        pairs = zip(self._events, self._events[1:], strict=False)
        return {name: self._driver.elapsed_ms(*pair) for name, pair in zip(STAGES, pairs, strict=True)}

    def capture(self, api: ModuleType, batches: tuple[int, ...]) -> None:
        """Capture batch sizes as CUDA graphs, launched in place of TensorRT's own calls from then on.

        Each has an execution context of its own: a graph holds its context's state, and another shape would change it.

        Args:
            api: from open_graphs.
            batches: sizes.

        Raises:
            GraphError: a batch size can't be captured; all run without graphs as before.
        """
        try:
            for n in batches:
                self._capture(api, n)
            self._driver.wait(self._stream)
        except (SessionError, GraphError) as err:
            # Of contexts made for graphs alone: runs without them are not touched.
            self.free_graphs()
            raise GraphError(str(err)) from err

    def free_graphs(self) -> None:
        """Drop what was captured; runs go on without."""
        with ExitStack() as owned:
            owned.callback(self._graphs.clear)  # their contexts, once the graphs are gone
            for n in self._graphs:
                owned.callback(self._graphs[n][0].free)

    def free(self) -> None:
        """Give everything back while the context is current; what is freed later would find none.

        Raises:
            CudaError: something could not be freed; everything else was.
        """
        try:
            self._owned.close()
        finally:  # pycuda closes streams and events with their last reference
            self._stream = self._memory = None
            self._events.clear()
            self._host.clear()
            self._device.clear()

    def _take_event(self, owned: ExitStack) -> Any:
        event = self._driver.open_event()
        owned.callback(self._driver.close_event, event)
        return event

    def _take_buffers(self, owned: ExitStack, name: str, shape: tuple[int, ...]) -> None:
        dtype = np.dtype(np.uint8 if name == INPUT else np.float32)
        # Page-locked, so that a copy is a true asynchronous one.
        host = self._driver.take_host(int(np.prod(shape)) * dtype.itemsize)
        owned.callback(self._driver.free_host, host)
        self._host[name] = host.view(dtype).reshape(shape)
        if self._is_integrated:
            self._device[name] = self._driver.mapped_address(host)
            return
        self._device[name] = self._driver.take_device(host.nbytes)
        owned.callback(self._driver.free_device, self._device[name])

    def _drop_execution(self) -> None:
        self._execution = None

    def _open_execution(self) -> Any:
        execution = self._plan.open_execution(int(self._memory))
        for name, memory in self._device.items():
            execution.set_tensor_address(name, int(memory))
        return execution

    def _upload(self, n: int) -> None:
        if not self._is_integrated:
            self._driver.upload(self._device[INPUT], self._host[INPUT][:n], self._stream)

    def _compute(self, n: int) -> None:
        if n in self._graphs:
            graph, _ = self._graphs[n]
            graph.launch()
            return
        self._set_batch(self._execution, n)
        self._execute(self._execution)

    def _download(self, n: int) -> None:
        if not self._is_integrated:
            for name in OUTPUTS:
                self._driver.download(self._host[name][:n], self._device[name], self._stream)

    def _capture(self, api: ModuleType, n: int) -> None:
        execution, handle = self._open_execution(), self._driver.stream_handle(self._stream)
        self._set_batch(execution, n)
        # Once without capture: TensorRT finishes what it put off, which a capture could not hold.
        self._execute(execution)
        self._driver.wait(self._stream)
        if not self._plan.can_capture(execution, handle):
            raise GraphError("TensorRT says that this plan can't be captured; build it again")
        self._graphs[n] = CudaGraph(api, handle, partial(self._enqueue_captured, execution)), execution

    def _set_batch(self, execution: Any, n: int) -> None:
        shape = (n, *self._host[INPUT].shape[1:])
        if not execution.set_input_shape(INPUT, shape):
            raise SessionError(f"TensorRT refuses the shape {list(shape)}. Build with a profile that holds it.")

    def _enqueue_captured(self, execution: Any) -> None:
        if not execution.execute_async_v3(self._driver.stream_handle(self._stream)):
            raise GraphError("TensorRT does something that can't be captured")

    def _execute(self, execution: Any) -> None:
        if not execution.execute_async_v3(self._driver.stream_handle(self._stream)):
            # A context that an earlier failure spoilt says so here, as a CUDA error; else it is TensorRT's own refusal.
            self._driver.wait(self._stream)
            raise SessionError(f"TensorRT could not start the engine{self._plan.why()}.")
