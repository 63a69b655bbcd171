"""A Session on a TensorRT plan: memory taken once on the GPU's primary context, a bounded pool of lanes.

Raw pixels go up, float32 logits and maps come down. Never builds (see export/tensorrt), and never hands TensorRT the bytes of a
plan that was built for another machine. Not safe to use in a child after fork: CUDA itself is not.
"""

import atexit
import logging
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from queue import LifoQueue
from traceback import clear_frames

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.errors import SessionError
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, Maps, check_finite, check_pixels
from chexnet_deploy.runtime.sessions.cuda_graphs import GraphError, open_graphs
from chexnet_deploy.runtime.sessions.driver import (
    CudaError,
    CudaMemoryError,
    open_driver,
    primary_context,
    retain_primary_context,
)
from chexnet_deploy.runtime.sessions.trt_lane import Lane
from chexnet_deploy.runtime.sessions.trt_plan import Plan
from chexnet_deploy.runtime.sessions.trt_target import refuse_other_target, this_target
from chexnet_deploy.runtime.sessions.trt_versions import Backend, open_tensorrt

_LOG = logging.getLogger(__name__)
_MIB = 1 << 20
_open_sessions: "weakref.WeakSet[TrtSession]" = weakref.WeakSet()


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

    _is_closed = True  # until there is something to free

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
        # Looked for before TensorRT does: without a driver its 8.6 ends the process.
        self._driver = open_driver()
        self._trt, self._family = open_tensorrt(backend)
        self._resize_px, self._conv_types, self._pid = resize_px, dict(conv_types), os.getpid()
        self._device = device
        self._is_poisoned = False
        self.batch_range = (0, 0)  # until the plan has been read
        self.graph_batches: tuple[int, ...] = ()
        self.why_no_graphs: str | None = None
        self._plan: Plan | None = None
        self._lanes: LifoQueue[Lane | None] = LifoQueue()
        self._n_lanes = 0
        try:
            retain_primary_context(self._driver, device)
            _open_sessions.add(self)
            self._is_closed = False
            with self._current():
                self._load(plan, lanes)
                if with_graphs:
                    self._capture_graphs()
        except CudaMemoryError as err:
            needed = self._describe_memory(len(plan), lanes)
            clear_frames(err.__traceback__)
            self.close()
            raise SessionError(f"{needed}: {err}. Free its memory, take fewer lanes or a smaller batch.") from err
        except CudaError as err:
            self._is_poisoned = True
            clear_frames(err.__traceback__)
            self.close()
            raise SessionError(f"the GPU failed while the plan was loaded: {err}. Start the process again.") from err
        except BaseException as err:
            # The frames hold execution contexts, which must go before the engine; the traceback keeps its lines.
            clear_frames(err.__traceback__)
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
        return 0 if self._plan is None else self._plan.activation_bytes

    def close(self) -> None:
        """Free the plan and its memory; closing twice does nothing.

        Raises:
            SessionError: the GPU failed; what could not be freed is lost with the process.
        """
        if self._is_closed or os.getpid() != self._pid:
            return
        try:
            with self._current():
                self._free()
        except CudaError as err:
            if not self._is_poisoned:
                raise SessionError(f"the GPU failed while the plan was freed: {err}. Start the process again.") from err

    def _free(self) -> None:
        self._is_closed = True
        _open_sessions.discard(self)
        # All lanes, so that none is in use: a run in another thread is waited for.
        lanes = [self._lanes.get() for _ in range(self._n_lanes)]
        self._lanes.put(None)
        plan, self._plan = self._plan, None
        with ExitStack() as owned:
            # The last first, and each whatever became of those before it.
            if plan is not None:
                owned.callback(plan.close)
            for lane in lanes:
                if lane is not None:
                    owned.callback(lane.free)

    def __del__(self) -> None:
        """Free a session that was dropped without being closed."""
        with suppress(SessionError):
            self.close()

    def _load(self, content: bytes, lanes: int) -> None:
        is_integrated = self._driver.describe(self._device).is_integrated
        self._plan = plan = Plan(self._trt, self._family, content, self._driver.cuda_version())
        low, _, high = plan.batch_profile
        self.batch_range = (low, high)
        for _ in range(lanes):
            self._lanes.put(Lane(self._driver, plan, is_integrated=is_integrated))
            self._n_lanes += 1

    def _capture_graphs(self) -> None:
        """Capture in every lane, or in none: two lanes must not answer at two speeds."""
        assert self._plan is not None
        wanted = tuple(sorted(set(self._plan.batch_profile)))
        lanes = [self._lanes.get() for _ in range(self._n_lanes)]
        try:
            api = open_graphs()
            for lane in lanes:
                assert lane is not None  # None comes with close()
                lane.capture(api, wanted)
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
        if self._is_closed:
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
        except CudaError as err:
            # CUDA's errors are sticky: every later call in this context would fail or, worse, seem to work.
            self._is_poisoned = True
            clear_frames(err.__traceback__)
            raise SessionError(f"the GPU failed on a batch of {len(pixels)}: {err}. Start the process again.") from err
        finally:
            self._lanes.put(lane)

    def _current(self) -> AbstractContextManager[None]:
        return primary_context(self._driver, self._device)

    def _describe_memory(self, plan_bytes: int, lanes: int) -> str:
        free, total = 0, 0
        with suppress(CudaError), self._current():
            free, total = self._driver.memory_info()
        needed = f"a plan of {plan_bytes // _MIB} MiB"
        if self._plan is not None:
            needed += f" and {lanes} lanes of {self._plan.activation_bytes // _MIB} MiB for batch {self.batch_range[1]}"
        return f"needed {needed}; {free // _MIB} of the GPU's {total // _MIB} MiB are free"


@atexit.register
def _close_all() -> None:
    """Close what nobody closed, before Python takes the driver's modules apart."""
    for session in list(_open_sessions):
        session.close()
