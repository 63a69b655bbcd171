"""A plan loaded by whichever TensorRT it is for, and execution contexts of it; where their versions differ. Part of trt.py.

Takes no memory of its own on the GPU: contexts are given theirs.
"""

from types import ModuleType
from typing import Any

from chexnet_deploy.errors import SessionError
from chexnet_deploy.runtime.sessions.trt_log import TensorrtLog, create
from chexnet_deploy.runtime.sessions.trt_versions import Family

INPUT, OUTPUTS = "pixels", ("logits", "cam")


class Plan:
    """Needs the CUDA context current for every call, the first too; it must be closed after the last of its contexts is gone.

    Args:
        trt: the TensorRT module.
        family: what it is.
        content: the serialised engine, verified and of this machine.
        cuda_version: of the driver, for messages.

    Attributes:
        batch_profile: smallest, tuned-for and largest batch.
        shapes: of the input and the outputs at the largest batch, by tensor name.
        activation_bytes: memory that one execution context needs, at least 1.

    Raises:
        SessionError: TensorRT refuses it, or does not start on this driver.
    """

    def __init__(self, trt: ModuleType, family: Family, content: bytes, cuda_version: int) -> None:
        self._trt, self._family = trt, family
        self._log = TensorrtLog.of(trt)
        self._runtime: Any = create(trt.Runtime, trt, family, cuda_version)
        self._engine: Any = self._runtime.deserialize_cuda_engine(content)
        engine = self._engine
        if engine is None:
            raise SessionError(f"TensorRT refuses this plan{self.why()}. Build it again here: chexnet-deploy build")
        low, best, high = (int(shape[0]) for shape in engine.get_tensor_profile_shape(INPUT, 0))
        self.batch_profile = low, best, high
        self.shapes = {
            name: (high, *(int(side) for side in tuple(engine.get_tensor_shape(name))[1:]))
            for name in (INPUT, *OUTPUTS)
        }
        size = engine.device_memory_size_v2 if family.has_memory_v2 else engine.device_memory_size
        self.activation_bytes = max(1, int(size))
        # One for all contexts, so that a kernel that one of them compiled is there for the next.
        self._jit: Any = self._make_jit() if family.is_rtx else None

    def open_execution(self, memory: int) -> Any:
        """Return an execution context that works in the memory at this address.

        Raises:
            SessionError: TensorRT gives none.
        """
        engine, trt = self._engine, self._trt
        if self._family.is_rtx:
            execution = engine.create_execution_context(self._jit)
        elif self._family.has_memory_v2:
            execution = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            execution = engine.create_execution_context_without_device_memory()
        if execution is None:
            raise SessionError(
                f"TensorRT gives no execution context{self.why()}. Free GPU memory or build with a smaller batch."
            )
        if self._family.has_memory_v2:
            execution.set_device_memory(memory, self.activation_bytes)
        else:
            execution.device_memory = memory
        return execution

    def can_capture(self, execution: Any, stream: int) -> bool:
        """Say whether TensorRT lets this context be captured on this stream; only RTX knows plans that it doesn't."""
        return not self._family.is_rtx or bool(execution.is_stream_capturable(stream))

    def why(self) -> str:
        """Return the last error that TensorRT logged, as ": its words", or nothing."""
        return self._log.last_error()

    def close(self) -> None:
        """Free it. TensorRT wants contexts gone before the engine, and the engine before the runtime."""
        self._jit = None
        self._engine = None
        self._runtime = None

    def _make_jit(self) -> Any:
        trt, jit = self._trt, self._engine.create_runtime_config()
        # Its lazy default answers the first images with other kernels than the rest.
        jit.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        jit.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        jit.set_runtime_cache(jit.create_runtime_cache())
        return jit
