"""State that all routes share: the running engine, the limit of images in flight, and the swap to another engine.

Everything but opening, decoding and inference happens on one event loop, so nothing here needs a lock.
"""

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import monotonic
from typing import Literal, TypeVar

from chexnet_deploy.errors import ChexnetError, SessionError
from chexnet_deploy.images import ImageReader, Pixels
from chexnet_deploy.serving.http.batching import Answer, DeadlineError
from chexnet_deploy.serving.http.config import ServeConfig
from chexnet_deploy.serving.http.limits import Guard
from chexnet_deploy.serving.http.loaded_model import Engine, RecentImages, open_engine, refuse_unlike
from chexnet_deploy.serving.http.metrics import Metrics
from chexnet_deploy.serving.http.refusals import Fault, RequestError, busy


class Admission:
    """Limit the number of images in flight; for one event loop.

    Args:
        limit: images.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.n_images = 0

    @contextmanager
    def admit(self, n: int) -> Iterator[None]:
        """Count n images as in flight, until the block ends.

        Raises:
            RequestError: 503, there are not as many free.
        """
        if self.n_images + n > self._limit:
            raise busy(Fault.BUSY, f"{self.n_images} images wait, at most {self._limit} may. Try again later.")
        self.n_images += n
        try:
            yield
        finally:
            self.n_images -= n

    @property
    def is_full(self) -> bool:
        """True where not even one more image would be admitted."""
        return self.n_images >= self._limit


log = logging.getLogger("chexnet_deploy.serving")

T = TypeVar("T")


class Service:
    """One service on one bundle; create it on the event loop it runs on.

    Attributes:
        config: as given.
        metrics: of this service alone.
        guard: of its connections.
        admission: of its images.
        reader: of its image files.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.guard = Guard(config, lambda reason: self.metrics.ended.labels(reason).inc())
        self.admission = Admission(config.queue_images)
        self.reader = ImageReader(processes=config.decoders)
        self._recent = RecentImages(config.shadow_images)
        self._decoders = ThreadPoolExecutor(config.decoders, thread_name_prefix="decode")
        self._engine: Engine | None = None
        self._is_draining = False
        self._swapping = asyncio.Lock()
        self._watchers = (self._count_run, self.metrics.count_known_answers, self.metrics.set_saturation)

    @property
    def is_live(self) -> bool:
        """False where the engine no longer gives its known answers: then only a new process helps."""
        return self._engine is None or not self._engine.lane.is_failing

    @property
    def is_ready(self) -> bool:
        """True while images are answered."""
        return self.why_not_ready is None

    @property
    def why_not_ready(self) -> Literal["starting", "known-answers", "draining"] | None:
        """Why no images are answered; None while they are."""
        if self._engine is None:
            return "starting"
        if self._engine.lane.is_failing:
            return "known-answers"
        return "draining" if self._is_draining else None

    async def start(self) -> None:
        """Open the bundle and check its known answers; until then nothing is answered.

        Raises:
            BundleError, TrustError, SessionError, MissingPackageError: see open_engine.
        """
        engine = await asyncio.to_thread(open_engine, self.config, *self._watchers)
        try:
            await asyncio.to_thread(engine.bundle.keep_release)
        except BaseException:
            engine.close()
            raise
        self._take(engine)

    async def swap(self) -> bool:
        """Open the bundle's path again and swap to that engine, if its answers agree with the running one's.

        Until then, and wherever anything fails, the running engine answers. Requests that it has begun, it ends.

        Returns:
            True where another bundle runs now.
        """
        async with self._swapping:
            running = self._engine
            if running is None or self._is_draining:
                return False
            new: Engine | None = None
            try:
                new = await asyncio.to_thread(open_engine, self.config, *self._watchers)
                if (new.bundle.id, new.points.site) == (running.bundle.id, running.points.site):
                    log.info("swap: %s runs already", running.version)
                    self.metrics.swaps.labels("same").inc()
                    await new.retire()
                    return False
                limit = self.config.swap_tolerance
                found = await asyncio.to_thread(refuse_unlike, running, new, self._recent.to_list(), limit)
                await asyncio.to_thread(new.bundle.keep_release)
            except ChexnetError as err:
                log.error("swap refused, %s goes on: %s", running.version, err)
                self.metrics.swaps.labels("refused").inc()
                if new is not None:
                    await new.retire()
                return False
            self._take(new)
            log.info("swap: %s took over from %s, |dp| %.4f", new.version, running.version, found)
            self.metrics.swaps.labels("taken").inc()
            await running.retire()
            return True

    def drain(self) -> None:
        """Report not ready; requests that still arrive are answered until the listener is closed."""
        self._is_draining = True

    async def close(self) -> None:
        """Close the engine, the decoding threads and the reader."""
        if self._engine is not None:
            await self._engine.retire()
        await asyncio.to_thread(self._decoders.shutdown)
        self.reader.close()

    @contextmanager
    def use_engine(self) -> Iterator[Engine]:
        """Use the running engine; a swap meanwhile closes it only afterwards.

        Raises:
            RequestError: 503, none is ready.
        """
        if self._engine is None:
            raise busy(Fault.NOT_READY, "The service is not ready. Try again later.")
        with self._engine as engine:
            yield engine

    async def infer(self, engine: Engine, pixels: Pixels, deadline_s: float) -> Answer:
        """Return an engine's answer to pixels uint8 [N, 1, S, S]; admitted and held by the caller.

        Raises:
            RequestError: 503 it waited beyond the deadline, 422 the engine can't answer it, 500 nor anything else.
        """
        try:
            answer = await asyncio.wrap_future(engine.lane.submit(pixels, deadline_s))
        except DeadlineError as err:
            raise busy(Fault.DEADLINE, "The image waited too long for its turn. Try again later.") from err
        except SessionError as err:
            log.error("%s failed: %s", engine.version, err)
            if engine.lane.is_failing:
                raise RequestError(500, Fault.ENGINE, "The engine no longer gives its known answers.") from err
            raise RequestError(422, Fault.ENGINE, "The model has no finite answer to this image.") from err
        self.metrics.stage.labels("queue").observe(answer.queue_s)
        self.metrics.stage.labels("infer").observe(answer.infer_s)
        self.metrics.count_images(pixels, answer.logits, engine.bundle.manifest.findings)
        self._recent.add(pixels)
        if engine.saturation is not None:
            engine.saturation.offer(pixels)
        return answer

    async def work(self, function: Callable[[], T], deadline_s: float) -> T:
        """Run a function in a decoding thread.

        Raises:
            RequestError: 503, none was free before the deadline; and what the function raises.
        """

        def run() -> T:
            if monotonic() > deadline_s:
                raise busy(Fault.DEADLINE, "The image waited too long to be decoded. Try again later.")
            return function()

        return await asyncio.get_running_loop().run_in_executor(self._decoders, run)

    def metrics_text(self) -> bytes:
        """Return the metrics as they are now."""
        metrics = self.metrics
        metrics.queue.set(0 if self._engine is None else self._engine.lane.n_images)
        metrics.admitted.set(self.admission.n_images)
        metrics.connections.set(self.guard.n_connections)
        metrics.held.set(self.guard.held_bytes)
        metrics.ready.set(int(self.is_ready))
        return metrics.to_text()

    def _take(self, engine: Engine) -> None:
        self._engine = engine
        # What is loaded now is not looked at again: a full collection would keep all requests waiting for a tenth of a second.
        gc.unfreeze()  # of the engine before, which has gone or goes soon
        gc.collect()
        gc.freeze()
        self.metrics.set_engine(engine.bundle, engine.points, engine.backend)
        sizes = ", ".join(map(str, engine.plan.sizes))
        why = "" if engine.plan.is_invariant else " (batches change its answers here, or can't be compared)"
        log.info("ready: %s %s on %s, batches of %s%s", engine.version, engine.precision, engine.backend, sizes, why)
        if engine.points.site is not None:
            log.info("operating points of %s", engine.points.source)

    def _count_run(self, n_images: int, _infer_s: float) -> None:
        self.metrics.batches.observe(n_images)
