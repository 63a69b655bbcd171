"""A Session on a TensorRT plan: pycuda on the primary context, memory taken once, a bounded pool of lanes.

Raw pixels go up, float32 logits and maps come down. Never builds (see builder/), and never hands TensorRT the bytes of a
plan that was built for another machine. Not safe to use in a child after fork: CUDA itself is not.
"""

import atexit
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import LifoQueue
from types import ModuleType
from typing import Any

import numpy as np

from chexnet_deploy.bundle import Bundle
from chexnet_deploy.errors import SessionError
from chexnet_deploy.preprocessing import Pixels
from chexnet_deploy.sessions.base import Logits, Maps, check_finite, check_pixels
from chexnet_deploy.sessions.target import open_driver, refuse_other_target, this_target
from chexnet_deploy.sessions.tensorrt_versions import Backend, open_tensorrt

_INPUT, _OUTPUTS = "pixels", ("logits", "cam")


class TrtSession:
    """One plan on one GPU. Safe to call from several threads at once: each call takes a lane, or waits for one.

    Args:
        plan: the serialised engine, verified and of this machine.
        backend: which TensorRT it is for.
        resize_px: side S of the pixels it takes.
        conv_types: what the builder read from its layer table.
        lanes: execution contexts, each with its own stream and buffers.
        device: the GPU's number.

    Raises:
        SessionError: no GPU, TensorRT refuses the plan, or the GPU's memory is too small.
    """

    def __init__(
        self,
        plan: bytes,
        *,
        backend: Backend,
        resize_px: int,
        conv_types: Mapping[str, int],
        lanes: int = 1,
        device: int = 0,
    ) -> None:
        self._cuda = open_driver()
        self._trt, _ = open_tensorrt(backend)
        self._resize_px, self._conv_types, self._pid = resize_px, dict(conv_types), os.getpid()
        self._is_poisoned = False
        self.batch_range = (0, 0)  # until the plan has been read
        # The primary context is the one that torch and cupy use: a context of its own would not see their memory.
        self._context: Any = self._cuda.Device(device).retain_primary_context()
        self._engine: Any = None
        self._runtime: Any = None
        # A session that nobody closed is closed before Python takes the driver's modules apart.
        atexit.register(_close_if_alive, weakref.ref(self))
        self._lanes: LifoQueue[_Lane | None] = LifoQueue()
        self._n_lanes = 0
        try:
            with self._current():
                log = self._trt.Logger(self._trt.Logger.ERROR)
                self._runtime = self._trt.Runtime(log)
                engine = self._runtime.deserialize_cuda_engine(plan)
                if engine is None:
                    raise SessionError("TensorRT refuses this plan. Build it again here: chexnet-deploy build")
                self._engine = engine
                self.batch_range = self._read_batch_range()
                for _ in range(lanes):
                    self._lanes.put(_Lane(self._cuda, engine, resize_px, self.batch_range[1]))
                    self._n_lanes += 1
        except self._cuda.Error as err:
            self.close()
            raise SessionError(
                f"the GPU can't hold this plan of {len(plan) >> 20} MiB with {lanes} lanes of batch {self.batch_range[1]}: "
                f"{err}. Free its memory or build with a smaller batch."
            ) from err
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, bundle: Bundle, *, lanes: int = 1, device: int = 0) -> "TrtSession":
        """Load a plan bundle, if it was built for this machine.

        Raises:
            SessionError: it was not, or TensorRT refuses it.
        """
        target, card = bundle.manifest.target, bundle.manifest.engine
        if target is None or card is None:
            raise SessionError(f"{bundle.path} holds an ONNX model. Build a plan of it first: chexnet-deploy build")
        trt, _ = open_tensorrt(target.backend)
        here = this_target(open_driver(), target.backend, str(trt.__version__), device)
        refuse_other_target(target, here, str(bundle.path))
        return cls(
            bundle.read_model(),
            backend=target.backend,
            resize_px=bundle.manifest.preprocessing.resize_px,
            conv_types=card.conv_types,
            lanes=lanes,
            device=device,
        )

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Return logits and maps of uint8 pixels [N, 1, S, S]; see Session.run."""
        if self._context is None:
            raise SessionError("this session is closed. Open the bundle again.")
        if os.getpid() != self._pid:
            raise SessionError(
                "this session was opened before a fork, and CUDA does not survive one. Open it again here."
            )
        if self._is_poisoned:
            raise SessionError(
                "the GPU failed in an earlier run, and its context can't be trusted. Start the process again."
            )
        check_pixels(pixels, self._resize_px, self.batch_range)
        lane = self._lanes.get()
        if lane is None:
            self._lanes.put(None)  # for the next one who waits
            raise SessionError("this session was closed while this call waited. Open the bundle again.")
        try:
            with self._current():
                logits, maps = lane.run(pixels)
        except self._cuda.Error as err:
            # CUDA's errors are sticky: every later call in this context would fail or, worse, seem to work.
            self._is_poisoned = True
            raise SessionError(f"the GPU failed on a batch of {len(pixels)}: {err}. Start the process again.") from err
        finally:
            self._lanes.put(lane)
        check_finite(logits, maps)
        return logits, maps

    def conv_types(self) -> Mapping[str, int]:
        """Return how many convolutions run in each type, as the builder read it from TensorRT's layer table."""
        return dict(self._conv_types)

    def close(self) -> None:
        """Free the plan and its memory; closing twice does nothing."""
        if self._context is None or os.getpid() != self._pid:
            return
        context, self._context = self._context, None
        # All lanes, so that none is in use: a run in another thread is waited for.
        lanes = [self._lanes.get() for _ in range(self._n_lanes)]
        self._lanes.put(None)
        context.push()
        try:
            for lane in lanes:
                if lane is not None:
                    lane.free()
            # In this order: TensorRT wants the contexts gone before the engine, and the engine before the runtime.
            self._engine = self._runtime = None
        except self._cuda.Error:
            # After a failure of the GPU nothing can be freed any more; the process has to go.
            if not self._is_poisoned:
                raise
        finally:
            self._cuda.Context.pop()
            context.detach()

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    def _read_batch_range(self) -> tuple[int, int]:
        low, _, high = self._engine.get_tensor_profile_shape(_INPUT, 0)
        return int(low[0]), int(high[0])


def _close_if_alive(reference: "weakref.ref[TrtSession]") -> None:
    session = reference()
    if session is not None:
        session.close()


class _Lane:
    """One execution context with its stream and all the memory it will ever need."""

    def __init__(self, cuda: ModuleType, engine: Any, resize_px: int, max_batch: int) -> None:
        self._cuda = cuda
        self._stream: Any = cuda.Stream()
        self._execution: Any = engine.create_execution_context()
        if self._execution is None:
            raise SessionError(
                "TensorRT got no memory for an execution context. Free GPU memory or build with a smaller batch."
            )
        shapes = {_INPUT: (max_batch, 1, resize_px, resize_px)}
        for name in _OUTPUTS:
            shapes[name] = (max_batch, *tuple(engine.get_tensor_shape(name))[1:])
        self._host: dict[str, Any] = {}
        self._device: dict[str, Any] = {}
        for name, shape in shapes.items():
            dtype = np.dtype(np.uint8 if name == _INPUT else np.float32)
            # Page-locked, so that a copy is a true asynchronous one.
            self._host[name] = cuda.pagelocked_empty(shape, dtype)
            self._device[name] = cuda.mem_alloc(self._host[name].nbytes)
            self._execution.set_tensor_address(name, int(self._device[name]))

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        n = len(pixels)
        np.copyto(self._host[_INPUT][:n], pixels)
        self._cuda.memcpy_htod_async(self._device[_INPUT], self._host[_INPUT][:n], self._stream)
        if not self._execution.set_input_shape(_INPUT, pixels.shape):
            raise SessionError(f"TensorRT refuses the shape {list(pixels.shape)}. Build with a profile that holds it.")
        if not self._execution.execute_async_v3(self._stream.handle):
            raise SessionError("TensorRT could not start the engine; its log says why.")
        for name in _OUTPUTS:
            self._cuda.memcpy_dtoh_async(self._host[name][:n], self._device[name], self._stream)
        self._stream.synchronize()
        # Copies: the buffers belong to the next run.
        return self._host["logits"][:n].copy(), self._host["cam"][:n].copy()

    def free(self) -> None:
        """Give everything back while the context is current; what is freed later would find none."""
        self._execution = None
        for memory in self._device.values():
            memory.free()
        self._device.clear()
        self._host.clear()
        self._stream = None
