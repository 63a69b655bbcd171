"""One inference lane: requests wait in line, those that wait already are run together, each gets what it would get alone.

Knows nothing of HTTP. Requests are joined only where that was seen to change no bit of an answer on this machine, and only to
batch sizes that were seen to be faster. The same thread asks for the known answers every so often, between two batches: what
they pass through is what images pass through. While they are wrong no image is answered.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple

import numpy as np

from chexnet_deploy.errors import SessionError
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, Maps, Session

log = logging.getLogger("chexnet_deploy.serving")

# Of three, on two cores, the last runs alone: two and then one are as soon done, and two of them sooner.
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Of each size, in turns; the quickest counts, as a machine that is slow for a moment must not choose the sizes.
_RUNS = 3
_WORTH = 0.99  # a larger batch must take at most this share of a smaller one's time per image


class DeadlineError(Exception):
    """A request waited too long to be worth running."""


class Answer(NamedTuple):
    """What one request gets, and what it cost.

    Attributes:
        logits: float32 [N, C].
        maps: float32 [N, C, S/32, S/32].
        queue_s: from submission to the start of its run.
        infer_s: of the run it was part of.
    """

    logits: Logits
    maps: Maps
    queue_s: float
    infer_s: float


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which batch sizes are worth waiting images' while.

    Attributes:
        sizes: rising, from 1 on; each was faster per image than those before it when the plan was measured.
        ms_per_image: of each size.
        is_invariant: every size tried gave each image the bits it gets alone; where not, `sizes` is (1,).
    """

    sizes: tuple[int, ...]
    ms_per_image: tuple[float, ...]
    is_invariant: bool

    def size_for(self, n_waiting: int) -> int:
        """Return the best batch size for so many images; 1 at the least."""
        return max((size for size in self.sizes if size <= n_waiting), default=1)


def measure_plan(session: Session, pixels: Pixels, max_batch: int) -> BatchPlan:
    """Run images alone and in batches; return which sizes gain, if all give the same bits.

    Args:
        session: open.
        pixels: uint8 [N, 1, S, S], different images; repeated where a batch needs more.
        max_batch: no larger one is tried.

    Raises:
        SessionError: the session failed.
    """
    low, high = session.batch_range
    if low > 1:
        # A session that takes no single image gets copies to fill it up (see Lane): nothing is ever alone to compare with.
        return BatchPlan((1,), (float("nan"),), is_invariant=False)
    sizes = [size for size in _SIZES if size <= min(high, max_batch)]
    pixels = np.concatenate([pixels] * -(-sizes[-1] // len(pixels)))
    alone = np.concatenate([session.run(pixels[i : i + 1])[0] for i in range(sizes[-1])])
    quickest_ms = dict.fromkeys(sizes, float("inf"))
    for size in sizes * _RUNS:
        began_s = monotonic()
        logits, _ = session.run(pixels[:size])
        quickest_ms[size] = min(quickest_ms[size], (monotonic() - began_s) * 1000.0 / size)
        if not np.array_equal(logits, alone[:size]):
            return BatchPlan((1,), (quickest_ms[1],), is_invariant=False)
    kept: list[int] = []
    for size in sizes:
        if not kept or quickest_ms[size] <= _WORTH * quickest_ms[kept[-1]]:
            kept.append(size)
    return BatchPlan(tuple(kept), tuple(quickest_ms[size] for size in kept), is_invariant=True)


@dataclass(slots=True)
class _Request:
    pixels: Pixels
    submitted_s: float
    deadline_s: float
    future: "Future[Answer]"


class Lane:
    """Runs what is submitted, one batch after another, in a thread of its own.

    How much may wait is the caller's to bound (see service.py).

    Args:
        session: open; not closed here.
        plan: which batch sizes to join requests to.
        window_s: how long a lane that has just run waits for more images to reach the next size; an idle one never waits.
        on_run: called with the images in each run and its seconds; must not block.
        check: raises where the session no longer gives its known answers; asked every `check_every_s`, after a run that
            failed, and before each run while they are wrong.
        check_every_s: infinity for never.
        on_check: called with whether they were right; must not block.

    Attributes:
        is_failing: the known answers were wrong when they were last asked for.
    """

    def __init__(
        self,
        session: Session,
        plan: BatchPlan,
        *,
        window_s: float,
        on_run: Callable[[int, float], None],
        check: Callable[[], object],
        check_every_s: float,
        on_check: Callable[[bool], None],
    ) -> None:
        self._session, self._plan, self._window_s = session, plan, window_s
        self._on_run, self._check, self._on_check = on_run, check, on_check
        self._check_every_s, self._next_check_s = check_every_s, monotonic() + check_every_s
        self._waiting: deque[_Request] = deque()
        self._n_images = 0
        self._changed = threading.Condition()
        self._is_closing = False
        self.is_failing = False
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    @property
    def n_images(self) -> int:
        """How many images wait."""
        return self._n_images

    def submit(self, pixels: Pixels, deadline_s: float) -> "Future[Answer]":
        """Put one request in line.

        Args:
            pixels: uint8 [N, 1, S, S], N within the session's batch_range.
            deadline_s: on the monotonic clock; what hasn't begun by then ends with DeadlineError.
        """
        request = _Request(pixels, monotonic(), deadline_s, Future())
        with self._changed:
            if self._is_closing:
                raise SessionError("this engine is closed. Send the request again.")
            self._waiting.append(request)
            self._n_images += len(pixels)
            self._changed.notify()
        return request.future

    def close(self) -> None:
        """Run what waits, then end."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        was_busy = False
        while True:
            if monotonic() >= self._next_check_s:
                self._test()
            with self._changed:
                if not self._waiting:
                    was_busy = False
                if not self._waiting and not self._is_closing:
                    left_s = self._next_check_s - monotonic()
                    self._changed.wait(min(max(left_s, 0.0), threading.TIMEOUT_MAX))
                if not self._waiting:
                    if self._is_closing:
                        return
                    continue
                if was_busy and self._window_s > 0.0:
                    self._changed.wait_for(
                        lambda: self._is_closing or self._n_images >= self._plan.sizes[-1], timeout=self._window_s
                    )
                batch = self._take()
            live = [request for request in batch if self._is_live(request)]
            if live:
                self._answer(live)
            was_busy = True

    def _take(self) -> list[_Request]:
        """Return the requests that run next: the first, and those behind it that fit into its batch."""
        limit = self._plan.size_for(self._n_images)
        batch = [self._waiting.popleft()]
        n = len(batch[0].pixels)
        while self._waiting and n + len(self._waiting[0].pixels) <= limit:
            batch.append(self._waiting.popleft())
            n += len(batch[-1].pixels)
        self._n_images -= n
        return batch

    @staticmethod
    def _is_live(request: _Request) -> bool:
        if not request.future.set_running_or_notify_cancel():
            return False
        if monotonic() > request.deadline_s:
            request.future.set_exception(DeadlineError())
            return False
        return True

    def _answer(self, batch: Sequence[_Request]) -> None:
        if self.is_failing:
            self._test()
        if self.is_failing:
            for request in batch:
                request.future.set_exception(SessionError("the known answers are wrong. Start the service anew."))
            return
        try:
            self._run(batch)
        except Exception as err:  # noqa: BLE001 - handed to whoever asked
            if len(batch) > 1:
                # Each on its own: one image's fault must not be another's.
                for request in batch:
                    self._answer([request])
                return
            self._test()
            batch[0].future.set_exception(err)

    def _test(self) -> None:
        """Tell a broken session from one image that it can't answer: only the first is a reason to end the process."""
        try:
            self._check()
            self.is_failing = False
        except Exception as err:  # noqa: BLE001 - whatever it is, the known answers weren't given
            if not self.is_failing:
                log.error("known answers: %s", err)
            self.is_failing = True
        self._next_check_s = monotonic() + self._check_every_s
        self._on_check(not self.is_failing)

    def _run(self, batch: Sequence[_Request]) -> None:
        parts = [request.pixels for request in batch]
        n = sum(map(len, parts))
        # Where the session takes no batch so small, copies fill it up, and their answers are dropped.
        parts += [parts[-1][-1:]] * max(0, self._session.batch_range[0] - n)
        began_s = monotonic()
        logits, maps = self._session.run(parts[0] if len(parts) == 1 else np.concatenate(parts))
        infer_s = monotonic() - began_s
        self._on_run(n, infer_s)
        start = 0
        for request in batch:
            end = start + len(request.pixels)
            queue_s = began_s - request.submitted_s
            request.future.set_result(Answer(logits[start:end], maps[start:end], queue_s, infer_s))
            start = end
