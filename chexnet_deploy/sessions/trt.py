"""A Session on a TensorRT plan: pycuda on the primary context, memory taken once, a bounded pool of lanes.

Raw pixels go up, float32 logits and maps come down. Never builds (see builder/), and never hands TensorRT the bytes of a
plan that was built for another machine. Not safe to use in a child after fork: CUDA itself is not.
"""

import atexit
import logging
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import LifoQueue
from typing import Any

from chexnet_deploy.bundle import Bundle
from chexnet_deploy.errors import SessionError
from chexnet_deploy.preprocessing import Pixels
from chexnet_deploy.sessions.base import Logits, Maps, check_finite, check_pixels
from chexnet_deploy.sessions.graphs import GraphError, open_graphs
from chexnet_deploy.sessions.lane import INPUT, Lane
from chexnet_deploy.sessions.target import open_driver, refuse_other_target, this_target
from chexnet_deploy.sessions.tensorrt_versions import Backend, open_tensorrt

_LOG = logging.getLogger(__name__)
_MIB = 1 << 20


class TrtSession:
    """One plan on one GPU. Safe to call from several threads at once: each call takes a lane, or waits for one.

    Args:
        plan: the serialised engine, verified and of this machine.
        backend: which TensorRT it is for.
        resize_px: side S of the pixels it takes.
        conv_types: what the builder read from its layer table.
        lanes: execution contexts that run side by side, each with its own stream and buffers.
        device: the GPU's number.
        with_graphs: replay the plan's smallest, tuned-for and largest batch as CUDA graphs. Other batch sizes run without,
            as all do, with a logged warning, where graphs can't be had.

    Attributes:
        graph_batches: the batch sizes that are replayed.
        why_no_graphs: in words; None where graphs are used or were not asked for.

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
        with_graphs: bool = True,
    ) -> None:
        self._cuda = open_driver()
        self._trt, self._family = open_tensorrt(backend)
        self._resize_px, self._conv_types, self._pid = resize_px, dict(conv_types), os.getpid()
        self._is_poisoned = False
        self.batch_range = (0, 0)  # until the plan has been read
        self.graph_batches: tuple[int, ...] = ()
        self.why_no_graphs: str | None = None
        # The primary context is the one that torch and cupy use: a context of its own would not see their memory.
        self._context: Any = self._cuda.Device(device).retain_primary_context()
        self._engine: Any = None
        self._runtime: Any = None
        # A session that nobody closed is closed before Python takes the driver's modules apart.
        atexit.register(_close_if_alive, weakref.ref(self))
        self._lanes: LifoQueue[Lane | None] = LifoQueue()
        self._n_lanes = 0
        try:
            with self._current():
                self._load(plan, lanes)
                if with_graphs:
                    self._capture_graphs()
        except self._cuda.MemoryError as err:
            needed = self._describe_memory(len(plan), lanes)
            self.close()
            raise SessionError(f"{needed}: {err}. Free its memory, take fewer lanes or a smaller batch.") from err
        except self._cuda.Error as err:
            self._is_poisoned = True  # nothing can be freed in a context that fails
            self.close()
            raise SessionError(f"the GPU failed while the plan was loaded: {err}. Start the process again.") from err
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, bundle: Bundle, *, lanes: int = 1, device: int = 0, with_graphs: bool = True) -> "TrtSession":
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
            with_graphs=with_graphs,
        )

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Return logits and maps of uint8 pixels [N, 1, S, S]; see Session.run."""
        with self._lane_for(pixels) as lane:
            logits, maps = lane.run(pixels)
        check_finite(logits, maps)
        return logits, maps

    def stage_times_ms(self, pixels: Pixels) -> Mapping[str, float]:
        """Return how long one run spends in "upload", "compute" and "download" on the GPU's own clock (CUDA events)."""
        with self._lane_for(pixels) as lane:
            return lane.stage_times_ms(pixels)

    def conv_types(self) -> Mapping[str, int]:
        """Return how many convolutions run in each type, as the builder read it from TensorRT's layer table."""
        return dict(self._conv_types)

    @property
    def device_memory_bytes(self) -> int:
        """Activation memory of one lane; the plan's weights come beside it."""
        engine = self._engine
        return int(engine.device_memory_size_v2 if self._family.has_memory_v2 else engine.device_memory_size)

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

    def _load(self, plan: bytes, lanes: int) -> None:
        log = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(log)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise SessionError("TensorRT refuses this plan. Build it again here: chexnet-deploy build")
        self._engine = engine
        low, _, high = self._batch_profile()
        self.batch_range = (low, high)
        for _ in range(lanes):
            self._lanes.put(self._make_lane())
            self._n_lanes += 1

    def _make_lane(self) -> Lane:
        size = self.device_memory_bytes
        return Lane(self._cuda, self._trt, self._family, self._engine, self._resize_px, self.batch_range[1], size)

    def _capture_graphs(self) -> None:
        """Capture in every lane, or in none: two lanes must not answer at two speeds."""
        wanted = tuple(sorted(set(self._batch_profile())))
        lanes = [self._lanes.get() for _ in range(self._n_lanes)]
        try:
            driver = open_graphs()
            for lane in lanes:
                assert lane is not None  # None comes with close()
                lane.capture(driver, wanted)
            self.graph_batches = wanted
        except GraphError as err:
            self.why_no_graphs = str(err)
            _LOG.warning("no CUDA graphs: %s. The plan runs without them, more slowly for small batches.", err)
            for lane in lanes:
                assert lane is not None
                lane.free_graphs()
        finally:
            for lane in lanes:
                self._lanes.put(lane)

    @contextmanager
    def _lane_for(self, pixels: Pixels) -> Iterator[Lane]:
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
                yield lane
        except (self._cuda.Error, GraphError) as err:
            # CUDA's errors are sticky: every later call in this context would fail or, worse, seem to work.
            self._is_poisoned = True
            raise SessionError(f"the GPU failed on a batch of {len(pixels)}: {err}. Start the process again.") from err
        finally:
            self._lanes.put(lane)

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    def _batch_profile(self) -> tuple[int, int, int]:
        low, best, high = self._engine.get_tensor_profile_shape(INPUT, 0)
        return int(low[0]), int(best[0]), int(high[0])

    def _describe_memory(self, plan_bytes: int, lanes: int) -> str:
        with self._current():
            free, total = self._cuda.mem_get_info()
        needed = f"a plan of {plan_bytes // _MIB} MiB"
        if self._engine is not None:
            needed += f" and {lanes} lanes of {self.device_memory_bytes // _MIB} MiB for batch {self.batch_range[1]}"
        return f"needed {needed}; {free // _MIB} of the GPU's {total // _MIB} MiB are free"


def _close_if_alive(reference: "weakref.ref[TrtSession]") -> None:
    session = reference()
    if session is not None:
        session.close()
