"""A loaded bundle with its request queue, and the check before another one replaces it."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.signing.trust import read_trust
from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.errors import ServeError
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Session, run_in_batches, sigmoid
from chexnet_deploy.runtime.sessions.open import check_known_answers, open_session, resolve_provider
from chexnet_deploy.serving.http.batching import BatchPlan, Lane, measure_plan
from chexnet_deploy.serving.http.config import ServeConfig
from chexnet_deploy.serving.http.saturation import SaturationWatch, can_watch

_PLAN_PROBES = 16


@dataclass(slots=True, eq=False)
class Engine:
    """A loaded bundle that has given its known answers on this machine.

    Attributes:
        bundle: verified.
        backend: what runs it.
        session: open.
        points: that decide.
        plan: which batch sizes gain here, measured when it was opened.
        lane: the line in front of it.
        saturation: of its int8 activations; None where they can't be looked at, or aren't to be.
        n_users: requests that hold it; for one event loop.
    """

    bundle: Bundle
    backend: str
    session: Session
    points: OperatingPoints
    plan: BatchPlan
    lane: Lane
    saturation: SaturationWatch | None = None
    n_users: int = 0
    is_idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def version(self) -> str:
        """What the protocol calls the model's version: the first 12 digits of the bundle's id."""
        return self.bundle.id[:12]

    @property
    def precision(self) -> str:
        """The type most convolutions are meant to run in."""
        return self.bundle.manifest.precision.value

    def __enter__(self) -> "Engine":
        self.n_users += 1
        self.is_idle.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.n_users -= 1
        if not self.n_users:
            self.is_idle.set()

    async def retire(self) -> None:
        """Wait until no request uses it, then close it."""
        if self.n_users:
            await self.is_idle.wait()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Run the queued requests, then free the model."""
        self.lane.close()
        self.session.close()
        if self.saturation is not None:
            self.saturation.close()


def open_engine(
    config: ServeConfig,
    on_run: Callable[[int, float], None],
    on_check: Callable[[bool], None],
    on_saturation: Callable[[Mapping[str, float]], None],
) -> Engine:
    """Verify the bundle and the site file beside it, load it, check its known answers and measure which batches gain.

    The caller calls `bundle.keep_release()` once it takes over: a release refused in a swap must not lock out the running one.

    Raises:
        BundleError, TrustError, SessionError, MissingPackageError: see Bundle.open and open_session.
    """
    trust = read_trust(config.trust)
    # The link is followed once: all files are the same bundle's, whatever it names a moment later.
    bundle = Bundle.open(_follow(config.bundle), trust=trust)
    points, probe = OperatingPoints.of(bundle.manifest, bundle.read_site()), bundle.read_probe()
    session = open_session(bundle, threads=config.threads, provider=config.provider)
    try:
        plan = measure_plan(session, probe.pixels[:_PLAN_PROBES], config.max_batch)
    except BaseException:
        session.close()
        raise
    backend = resolve_provider(config.provider) if bundle.manifest.target is None else bundle.manifest.target.backend
    lane = Lane(
        session,
        plan,
        window_s=config.window_ms / 1000.0,
        on_run=on_run,
        check=lambda: check_known_answers(session, bundle, probe=probe, at_once=plan.sizes[-1]),
        check_every_s=config.self_test_s or math.inf,
        on_check=on_check,
    )
    is_watched = config.saturation_s > 0.0 and can_watch(bundle)
    saturation = SaturationWatch(bundle, config.saturation_s, on_saturation) if is_watched else None
    return Engine(bundle, backend, session, points, plan, lane, saturation)


def refuse_unlike(running: Engine, new: Engine, recent: Sequence[Pixels], tolerance: float) -> float:
    """Compare an engine with the one it would replace; return the largest |probability difference|.

    Args:
        running: answers now, and goes on doing so.
        new: not asked by anyone yet.
        recent: the newest images' pixels, uint8 [1, 1, S, S] each.
        tolerance: largest difference allowed.

    Raises:
        ServeError: it has other findings or other preprocessing, or answers differ by more.
        SessionError: one of them failed.
    """
    before, after = running.bundle.manifest, new.bundle.manifest
    for name, old_value, new_value in (
        ("findings", before.findings, after.findings),
        ("preprocessing", before.preprocessing, after.preprocessing),
    ):
        if old_value != new_value:
            raise ServeError(f"the new bundle has other {name} than the one that runs. Restart the service with it.")
    pixels = np.concatenate([new.bundle.read_probe().pixels, *recent])
    old_scores, new_scores = (sigmoid(run_in_batches(engine.session, pixels)[0]) for engine in (running, new))
    difference = float(np.abs(old_scores - new_scores).max())
    if difference > tolerance:
        raise ServeError(
            f"the new bundle's probabilities differ by up to {difference:.4f} from the running one's on {len(pixels)} images, "
            f"{tolerance:g} is allowed. Restart the service with it if that is meant."
        )
    return difference


class RecentImages:
    """The newest images' pixels, in memory alone.

    Args:
        limit: how many.
    """

    def __init__(self, limit: int) -> None:
        self._pixels: deque[Pixels] = deque(maxlen=limit)

    def add(self, pixels: Pixels) -> None:
        """Keep uint8 [N, 1, S, S]."""
        self._pixels.extend(pixels[i : i + 1].copy() for i in range(len(pixels)))

    def to_list(self) -> list[Pixels]:
        """Return them, oldest first, uint8 [1, 1, S, S] each."""
        return list(self._pixels)


def _follow(path: Path) -> Path:
    return path.resolve() if path.is_symlink() else path
