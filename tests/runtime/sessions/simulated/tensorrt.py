"""What a session touches of TensorRT, over the simulated driver: its rules of ownership, by version. Computes nothing.

Stands for `tensorrt` and, by tensorrt_rtx.py, for `tensorrt_rtx` in processes that tests start. SIM_TENSORRT names the version.
"""

import ctypes
import os
import warnings

__version__ = os.environ.get("SIM_TENSORRT", "10.13.3.9")
MAJOR = int(__version__.split(".")[0])
IS_RTX = MAJOR == 1
SIDE, N_FINDINGS = 32, 14
PROFILE = tuple(int(n) for n in os.environ.get("SIM_PROFILE", "1,4,8").split(","))
ACTIVATION_BYTES = 1 << 16

_cuda = ctypes.CDLL("libcuda.so.1")
_cuda.cuMemFree_v2.argtypes = [ctypes.c_uint64]
_cuda.sim_owns.argtypes = [ctypes.c_uint64, ctypes.c_size_t]
_cuda.sim_has_stream.argtypes = [ctypes.c_void_p]
violations: list[str] = []  # of rules that a real TensorRT answers with a crash


def _deprecated(name: str) -> None:
    if MAJOR >= 10:
        warnings.warn(f"{name} is deprecated", DeprecationWarning, stacklevel=3)


class _Severity:
    def __init__(self, name: str) -> None:
        self.name = name


class ILogger:
    WARNING, ERROR = _Severity("WARNING"), _Severity("ERROR")

    def __init__(self) -> None: ...


class Runtime:
    def __init__(self, log: ILogger) -> None:
        if os.environ.get("SIM_NO_RUNTIME"):
            log.log(ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.log, self.n_engines = log, 0

    def deserialize_cuda_engine(self, plan: bytes) -> "ICudaEngine | None":
        if plan == b"damaged":
            self.log.log(ILogger.ERROR, "Serialization assertion failed")
            return None
        weights = ctypes.c_uint64()
        if _cuda.cuMemAlloc_v2(ctypes.byref(weights), 1 << 20):
            self.log.log(ILogger.ERROR, "out of memory for the weights")
            return None
        return ICudaEngine(self, weights.value)

    def __del__(self) -> None:
        if getattr(self, "n_engines", 0):
            violations.append("the runtime went before its engine")


class DynamicShapesKernelSpecializationStrategy:
    EAGER = 1


class ExecutionContextAllocationStrategy:
    USER_MANAGED = 2


class IRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = 0
    cache: object = None

    def set_execution_context_allocation_strategy(self, strategy: int) -> None: ...

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> bool:
        self.cache = cache
        return True


class ICudaEngine:
    def __init__(self, runtime: Runtime, weights: int) -> None:
        self.runtime, self.weights, self.n_contexts, self.has_owner = runtime, weights, 0, False
        runtime.n_engines += 1

    @property
    def device_memory_size(self) -> int:
        _deprecated("device_memory_size")
        return ACTIVATION_BYTES

    @property
    def device_memory_size_v2(self) -> int:
        if MAJOR == 8:
            raise AttributeError("device_memory_size_v2")
        return ACTIVATION_BYTES

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(n, 1, SIDE, SIDE) for n in PROFILE]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {"pixels": (-1, 1, SIDE, SIDE), "logits": (-1, N_FINDINGS), "cam": (-1, N_FINDINGS, 1, 1)}[name]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context_without_device_memory(self) -> "IExecutionContext":
        _deprecated("create_execution_context_without_device_memory")
        return IExecutionContext(self)

    def create_execution_context(self, how: object) -> "IExecutionContext":
        if IS_RTX and how.cache is None:
            violations.append("an execution context without the runtime cache")
        return IExecutionContext(self)

    def __del__(self) -> None:
        if self.n_contexts:
            violations.append("the engine went before its execution contexts")
        self.runtime.n_engines -= 1
        _cuda.cuMemFree_v2(self.weights)


class IExecutionContext:
    """TensorRT 8.6 without PROFILE_SHARING_0806 (SIM_SHARES_PROFILES unset) gives a profile to the first context alone."""

    def __init__(self, engine: ICudaEngine) -> None:
        self.engine, self.memory, self.batch, self.addresses = engine, 0, 0, {}
        engine.n_contexts += 1
        self.has_profile = MAJOR != 8 or bool(os.environ.get("SIM_SHARES_PROFILES")) or not engine.has_owner
        engine.has_owner = True

    @property
    def device_memory(self) -> int:
        return self.memory

    @device_memory.setter
    def device_memory(self, address: int) -> None:
        _deprecated("device_memory")
        self.memory = address

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = address if size >= ACTIVATION_BYTES else 0

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.batch = shape[0]
        return self.has_profile and PROFILE[0] <= shape[0] <= PROFILE[2]

    def is_stream_capturable(self, stream: int) -> bool:
        return not os.environ.get("SIM_NOT_CAPTURABLE")

    def execute_async_v3(self, stream: int) -> bool:
        if os.environ.get("SIM_LEGACY_WORK"):
            _cuda.sim_legacy_work()  # as another thread's torch, at the worst moment
        sizes = {"pixels": SIDE * SIDE, "logits": 4 * N_FINDINGS, "cam": 4 * N_FINDINGS}
        owned = [_cuda.sim_owns(self.addresses.get(name, 0), self.batch * size) for name, size in sizes.items()]
        return bool(all(owned) and _cuda.sim_owns(self.memory, ACTIVATION_BYTES) and _cuda.sim_has_stream(stream))

    def __del__(self) -> None:
        self.engine.n_contexts -= 1
