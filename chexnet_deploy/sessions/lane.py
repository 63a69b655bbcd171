"""A lane: one stream, all the memory one run needs, and TensorRT's execution contexts on it. Part of trt.py.

Nothing is allocated after it is made and its graphs are captured. One thread at a time.
"""

from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from chexnet_deploy.errors import SessionError
from chexnet_deploy.preprocessing import Pixels
from chexnet_deploy.sessions.base import Logits, Maps
from chexnet_deploy.sessions.graphs import CudaGraph, GraphError
from chexnet_deploy.sessions.tensorrt_versions import Family

INPUT, OUTPUTS = "pixels", ("logits", "cam")
STAGES = ("upload", "compute", "download")


class Lane:
    """Needs the CUDA context current for every call, the first too.

    Args:
        cuda: pycuda.driver.
        trt: the TensorRT module.
        family: what it is.
        engine: deserialised.
        resize_px: side S of the pixels.
        max_batch: of the plan's profile.
        memory_bytes: activation memory that a context of this engine needs.

    Raises:
        SessionError: TensorRT gives no execution context.
        cuda.Error: as pycuda does.
    """

    def __init__(
        self,
        cuda: ModuleType,
        trt: ModuleType,
        family: Family,
        engine: Any,
        resize_px: int,
        max_batch: int,
        memory_bytes: int,
    ) -> None:
        self._cuda, self._trt, self._family, self._engine = cuda, trt, family, engine
        self._stream: Any = cuda.Stream()
        self._events = [cuda.Event() for _ in range(len(STAGES) + 1)]
        shapes = {INPUT: (max_batch, 1, resize_px, resize_px)}
        for name in OUTPUTS:
            shapes[name] = (max_batch, *tuple(engine.get_tensor_shape(name))[1:])
        self._host: dict[str, Any] = {}
        self._device: dict[str, Any] = {}
        for name, shape in shapes.items():
            dtype = np.dtype(np.uint8 if name == INPUT else np.float32)
            # Page-locked, so that a copy is a true asynchronous one.
            self._host[name] = cuda.pagelocked_empty(shape, dtype)
            self._device[name] = cuda.mem_alloc(self._host[name].nbytes)
        # One piece for all contexts of this lane, which never run at once.
        self._memory_bytes = max(1, memory_bytes)
        self._memory: Any = cuda.mem_alloc(self._memory_bytes)
        self._execution: Any = self._make_context()
        # By batch size, each with the context it was captured from, which must outlive it.
        self._graphs: dict[int, tuple[CudaGraph, Any]] = {}

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Return logits and maps of checked pixels."""
        n = len(pixels)
        np.copyto(self._host[INPUT][:n], pixels)
        self._upload(n)
        self._compute(n)
        self._download(n)
        self._stream.synchronize()
        # Copies: the buffers belong to the next run.
        return self._host["logits"][:n].copy(), self._host["cam"][:n].copy()

    def stage_times_ms(self, pixels: Pixels) -> Mapping[str, float]:
        """Return the GPU's own times of one run by stage."""
        n = len(pixels)
        np.copyto(self._host[INPUT][:n], pixels)
        self._events[0].record(self._stream)
        for event, stage in zip(self._events[1:], (self._upload, self._compute, self._download), strict=True):
            stage(n)
            event.record(self._stream)
        self._stream.synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return {name: float(end.time_since(start)) for name, (start, end) in zip(STAGES, pairs, strict=True)}

    def capture(self, driver: ModuleType, batches: tuple[int, ...]) -> None:
        """Capture each batch size's compute as a graph.

        Each has an execution context of its own: a graph holds its context's state, and another shape would change it.

        Raises:
            GraphError: a batch size can't be captured.
        """
        for n in batches:
            context = self._make_context()
            self._set_batch(context, n)
            # Once without capture: TensorRT finishes what it put off, which a capture could not hold.
            self._execute(context)
            self._stream.synchronize()
            graph = CudaGraph(driver, self._stream.handle, partial(self._enqueue_captured, context))
            self._graphs[n] = graph, context
        self._stream.synchronize()

    def free_graphs(self) -> None:
        """Drop what was captured; runs go on without."""
        for graph, _ in self._graphs.values():
            graph.free()
        self._graphs.clear()

    def free(self) -> None:
        """Give everything back while the context is current; what is freed later would find none."""
        self.free_graphs()
        self._execution = None
        for memory in (*self._device.values(), self._memory):
            memory.free()
        self._device.clear()
        self._host.clear()
        self._events.clear()
        self._memory = self._stream = self._engine = None

    def _upload(self, n: int) -> None:
        self._cuda.memcpy_htod_async(self._device[INPUT], self._host[INPUT][:n], self._stream)

    def _compute(self, n: int) -> None:
        if n in self._graphs:
            graph, _ = self._graphs[n]
            graph.launch()
            return
        self._set_batch(self._execution, n)
        self._execute(self._execution)

    def _download(self, n: int) -> None:
        for name in OUTPUTS:
            self._cuda.memcpy_dtoh_async(self._host[name][:n], self._device[name], self._stream)

    def _make_context(self) -> Any:
        engine, trt = self._engine, self._trt
        if self._family.compiles_without_gpu:
            jit = engine.create_runtime_config()
            # Its lazy default answers the first images with other kernels than the rest.
            jit.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            jit.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            execution = engine.create_execution_context(jit)
        elif self._family.has_memory_v2:
            execution = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            execution = engine.create_execution_context_without_device_memory()
        if execution is None:
            raise SessionError("TensorRT gives no execution context. Free GPU memory or build with a smaller batch.")
        if self._family.has_memory_v2:
            execution.set_device_memory(int(self._memory), self._memory_bytes)
        else:
            execution.device_memory = int(self._memory)
        for name, memory in self._device.items():
            execution.set_tensor_address(name, int(memory))
        return execution

    def _set_batch(self, execution: Any, n: int) -> None:
        shape = (n, *self._host[INPUT].shape[1:])
        if not execution.set_input_shape(INPUT, shape):
            raise SessionError(f"TensorRT refuses the shape {list(shape)}. Build with a profile that holds it.")

    def _enqueue_captured(self, execution: Any) -> None:
        if not execution.execute_async_v3(self._stream.handle):
            raise GraphError("TensorRT does something that can't be captured")

    def _execute(self, execution: Any) -> None:
        if not execution.execute_async_v3(self._stream.handle):
            # A context that an earlier failure spoilt says so here, as a CUDA error; else it is TensorRT's own refusal.
            self._stream.synchronize()
            raise SessionError("TensorRT could not start the engine; its log says why.")
