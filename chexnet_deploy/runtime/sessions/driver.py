"""The CUDA driver, as much of it as a session needs, by pycuda or by cuda-bindings.

Both call the same driver library, so streams, memory and contexts are the same things in either. pycuda is taken where it can
be imported; cuda-bindings has wheels and needs no compiler. Runs no TensorRT.
"""

import atexit
import ctypes
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import MissingPackageError, SessionError

# CU_STREAM_NON_BLOCKING: it neither waits for the legacy stream, which torch uses, nor stops it while it is captured.
_NON_BLOCKING = 1
_MAPPED = 2  # CU_MEMHOSTALLOC_DEVICEMAP
CUDA_13 = 13000
"""The version from which a driver runs what is built for CUDA 13, as `cuda_version` counts."""


class CudaError(Exception):
    """A call of the driver failed; SessionError outside of this package's GPU modules."""


class CudaMemoryError(CudaError):
    """The GPU's memory is too small."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        compute_capability: e.g. "9.0".
        is_integrated: it shares the CPU's memory, as on Jetson.
    """

    name: str
    compute_capability: str
    is_integrated: bool


class BindingsDriver:
    """By cuda-bindings. All but what asks for the GPUs needs a current context, see `primary_context`; each call raises CudaError.

    Streams, events and memory are the binding's own objects; `int(memory)` is its device address.

    Args:
        api: cuda.bindings.driver.

    Raises:
        CudaError: the driver does not start.
    """

    binding = "cuda-bindings"

    def __init__(self, api: ModuleType) -> None:
        self._api: Any = api
        self._call("cuInit", 0)

    def count_gpus(self) -> int:
        return int(self._call("cuDeviceGetCount"))

    def describe(self, device: int) -> Gpu:
        gpu, kinds = self._call("cuDeviceGet", device), self._api.CUdevice_attribute
        major, minor, is_integrated = (
            self._call("cuDeviceGetAttribute", getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}"), gpu)
            for name in ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "INTEGRATED")
        )
        name = bytes(self._call("cuDeviceGetName", 256, gpu)).split(b"\0")[0].decode()
        return Gpu(name, f"{major}.{minor}", bool(is_integrated))

    def cuda_version(self) -> int:
        return int(self._call("cuDriverGetVersion"))

    def retain(self, device: int) -> Any:
        """Take a reference to the GPU's primary context; nothing becomes current."""
        gpu = self._call("cuDeviceGet", device)
        return gpu, self._call("cuDevicePrimaryCtxRetain", gpu)

    def release(self, context: Any) -> None:
        """Give that reference back; the last one destroys the context."""
        self._call("cuDevicePrimaryCtxRelease", context[0])

    def push(self, context: Any) -> None:
        self._call("cuCtxPushCurrent", context[1])

    def pop(self, context: Any) -> None:
        try:
            self._call("cuCtxPopCurrent")
        except CudaError:
            # An earlier launch's failure may be reported here, before anything is popped.
            if int(self._call("cuCtxGetCurrent")) == int(context[1]):
                self._call("cuCtxPopCurrent")

    def memory_info(self) -> tuple[int, int]:
        """Return free and total bytes of the GPU."""
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def open_stream(self) -> Any:
        """Open a non-blocking stream."""
        return self._call("cuStreamCreate", _NON_BLOCKING)

    def stream_handle(self, stream: Any) -> int:
        return int(stream)

    def wait(self, stream: Any) -> None:
        self._call("cuStreamSynchronize", stream)

    def close_stream(self, stream: Any) -> None:
        self._call("cuStreamDestroy", stream)

    def open_event(self) -> Any:
        return self._call("cuEventCreate", 0)

    def record(self, event: Any, stream: Any) -> None:
        self._call("cuEventRecord", event, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._call("cuEventElapsedTime", start, end))

    def close_event(self, event: Any) -> None:
        self._call("cuEventDestroy", event)

    def take_host(self, n_bytes: int) -> NDArray[np.uint8]:
        """Take page-locked memory that the GPU can address too."""
        address = int(self._call("cuMemHostAlloc", n_bytes, _MAPPED))
        return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))

    def mapped_address(self, host: NDArray[np.uint8]) -> int:
        """Return the GPU's address of memory from `take_host`."""
        return int(self._call("cuMemHostGetDevicePointer", host.ctypes.data, 0))

    def free_host(self, host: NDArray[np.uint8]) -> None:
        self._call("cuMemFreeHost", host.ctypes.data)

    def take_device(self, n_bytes: int) -> Any:
        return self._call("cuMemAlloc", n_bytes)

    def free_device(self, memory: Any) -> None:
        self._call("cuMemFree", memory)

    def upload(self, memory: Any, host: NDArray[Any], stream: Any) -> None:
        """Copy all of a page-locked array to the GPU, in the stream's order."""
        self._call("cuMemcpyHtoDAsync", memory, host.ctypes.data, host.nbytes, stream)

    def download(self, host: NDArray[Any], memory: Any, stream: Any) -> None:
        """Fill all of a page-locked array from the GPU, in the stream's order."""
        self._call("cuMemcpyDtoHAsync", host.ctypes.data, memory, host.nbytes, stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._api, name)(*arguments)
        if error != self._api.CUresult.CUDA_SUCCESS:
            kind = CudaMemoryError if error == self._api.CUresult.CUDA_ERROR_OUT_OF_MEMORY else CudaError
            raise kind(f"{name}: {error.name}")
        return values[0] if len(values) == 1 else tuple(values)


class PycudaDriver:
    """The same by pycuda.

    Args:
        api: pycuda.driver.

    Raises:
        CudaError: the driver does not start.
    """

    binding = "pycuda"

    def __init__(self, api: ModuleType) -> None:
        self._api: Any = api
        self._call(api.init)

    def count_gpus(self) -> int:
        return int(self._call(self._api.Device.count))

    def describe(self, device: int) -> Gpu:
        gpu, kinds = self._call(self._api.Device, device), self._api.device_attribute
        major, minor = self._call(gpu.compute_capability)
        return Gpu(self._call(gpu.name), f"{major}.{minor}", bool(self._call(gpu.get_attribute, kinds.INTEGRATED)))

    def cuda_version(self) -> int:
        return int(self._call(self._api.get_driver_version))

    def retain(self, device: int) -> Any:
        return self._call(self._call(self._api.Device, device).retain_primary_context)

    def release(self, context: Any) -> None:
        # detach() does nothing in another thread than the context's own, unless the context is current.
        context.push()
        context.detach()

    def push(self, context: Any) -> None:
        self._call(context.push)

    def pop(self, context: Any) -> None:
        try:
            self._call(self._api.Context.pop)
        except CudaError:
            self._call(self._api.Context.pop)  # as in BindingsDriver; pycuda keeps a stack of its own, so it pops ours

    def memory_info(self) -> tuple[int, int]:
        free, total = self._call(self._api.mem_get_info)
        return int(free), int(total)

    def open_stream(self) -> Any:
        return self._call(self._api.Stream, _NON_BLOCKING)

    def stream_handle(self, stream: Any) -> int:
        return int(stream.handle)

    def wait(self, stream: Any) -> None:
        self._call(stream.synchronize)

    def close_stream(self, stream: Any) -> None:
        """Do nothing: pycuda closes a stream with its last reference."""

    def open_event(self) -> Any:
        return self._call(self._api.Event)

    def record(self, event: Any, stream: Any) -> None:
        self._call(event.record, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._call(end.time_since, start))

    def close_event(self, event: Any) -> None:
        """Do nothing: pycuda closes an event with its last reference."""

    def take_host(self, n_bytes: int) -> NDArray[np.uint8]:
        taken: NDArray[np.uint8] = self._call(self._api.pagelocked_empty, n_bytes, np.uint8, "C", _MAPPED)
        return taken

    def mapped_address(self, host: NDArray[np.uint8]) -> int:
        owner: Any = host.base
        return int(self._call(owner.get_device_pointer))

    def free_host(self, host: NDArray[np.uint8]) -> None:
        owner: Any = host.base
        self._call(owner.free)

    def take_device(self, n_bytes: int) -> Any:
        return self._call(self._api.mem_alloc, n_bytes)

    def free_device(self, memory: Any) -> None:
        self._call(memory.free)

    def upload(self, memory: Any, host: NDArray[Any], stream: Any) -> None:
        self._call(self._api.memcpy_htod_async, memory, host, stream)

    def download(self, host: NDArray[Any], memory: Any, stream: Any) -> None:
        self._call(self._api.memcpy_dtoh_async, host, memory, stream)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._api.MemoryError as err:
            raise CudaMemoryError(str(err)) from err
        except self._api.Error as err:
            raise CudaError(str(err)) from err


Driver: TypeAlias = BindingsDriver | PycudaDriver


def open_driver() -> Driver:
    """Start the driver by pycuda, or by cuda-bindings where pycuda can't be imported.

    Raises:
        MissingPackageError: neither is installed.
        SessionError: there is no NVIDIA driver or no GPU, or the driver does not start.
    """
    try:
        driver = _open_binding()
        n_gpus = driver.count_gpus()
    except CudaError as err:
        raise SessionError(f"the NVIDIA driver does not start: {err}. Run: nvidia-smi") from err
    if n_gpus == 0:
        raise SessionError("no NVIDIA GPU was found. Plans are built and run on the GPU they are for.")
    return driver


def _open_binding() -> Driver:
    reason: Exception | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns, too, of what it raises
            import pycuda.driver

        return PycudaDriver(pycuda.driver)
    except ModuleNotFoundError:
        pass
    except ImportError as err:  # it is linked against the driver's libcuda, and against one CUDA version
        reason = err
    try:
        from cuda.bindings import driver

        return BindingsDriver(driver)
    except ModuleNotFoundError as err:
        if reason is None:
            raise MissingPackageError(
                "neither pycuda nor cuda-bindings is installed. Run: pip install cuda-bindings  (wheels, no compiler)"
            ) from err
    except RuntimeError as err:  # it looks for libcuda when it is first called
        reason = err
    raise SessionError(
        f"no NVIDIA driver was found ({reason}). Plans are built and run on the GPU they are for. Run: chexnet-deploy doctor"
    ) from reason


_primary: dict[tuple[str, int], Any] = {}
_releases: list[tuple[int, Driver, Any]] = []
_lock = threading.Lock()


def name_cuda(version: int) -> str:
    """Return a driver's `cuda_version` as NVIDIA writes it: 12040 is "12.4"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def retain_primary_context(driver: Driver, device: int) -> Any:
    """Return the GPU's primary context, the one that torch and cupy use too; retained once for the life of the process.

    The last release destroys a primary context beneath whoever has it current, so it is given back when the process ends.

    Raises:
        CudaError: the driver gives none.
    """
    with _lock:
        key = driver.binding, device
        if key not in _primary:
            _primary[key] = driver.retain(device)
            _releases.append((os.getpid(), driver, _primary[key]))
        return _primary[key]


@atexit.register  # before any session's, so that it runs after them
def _release_all() -> None:
    for pid, driver, context in _releases:
        if os.getpid() == pid:  # a forked child holds no reference of its own
            with suppress(CudaError):
                driver.release(context)


@contextmanager
def primary_context(driver: Driver, device: int) -> Iterator[None]:
    """Make the GPU's primary context current in this thread, and what was current before current again.

    Raises:
        CudaError: the driver gives none.
    """
    context = retain_primary_context(driver, device)
    driver.push(context)
    try:
        yield
    finally:
        driver.pop(context)
