"""How much of an int8 network's activations lies at the ends of their ranges, on the images that are answered.

Ranges are the largest values on the calibration images with a margin, so there nothing saturates; images unlike them do, often
before any finding's mean moves. No backend shows its activations. So now and then one image is run a second time, by ONNX Runtime
on one core at the lowest priority.
"""

import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.images.preprocessing import Pixels

if TYPE_CHECKING:
    from chexnet_deploy.runtime.sessions.activations import OrtActivations


log = logging.getLogger("chexnet_deploy.serving")

BLOCK: Final = 10  # images whose mean is told: none of them can be told from it
_LOWEST_PRIORITY: Final = 19


class SaturationWatch:
    """Looks into one bundle's activations; for one event loop.

    Args:
        bundle: int8, ONNX, verified.
        every_s: between two images.
        on_block: called in a thread of this watch with tensor -> mean share over a block of images.
    """

    def __init__(self, bundle: Bundle, every_s: float, on_block: Callable[[Mapping[str, float]], None]) -> None:
        assert bundle.manifest.calibration is not None  # of every int8 bundle
        self._bundle, self._names = bundle, bundle.manifest.calibration.activations
        self._every_s, self._on_block = every_s, on_block
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="saturation", initializer=_give_way)
        self._last: tuple[float, Future[None]] | None = None
        self._inside: OrtActivations | None = None
        self._block: list[NDArray[np.float64]] = []

    def offer(self, pixels: Pixels) -> None:
        """Look at the first of uint8 [N, 1, S, S], if it is time for one; never waits."""
        if self._last is not None:
            began_s, run = self._last
            if monotonic() - began_s < self._every_s or not run.done() or run.exception() is not None:
                return
        self._last = monotonic(), self._worker.submit(self._look, pixels[:1].copy())

    def close(self) -> None:
        """End what runs."""
        self._worker.shutdown(cancel_futures=True)

    def _look(self, pixels: Pixels) -> None:
        try:
            if self._inside is None:
                from chexnet_deploy.runtime.sessions.activations import OrtActivations

                self._inside = OrtActivations(self._bundle.read_model(), self._names)
            self._block.append(self._inside.saturated_shares(pixels))
        except Exception as err:
            # It answers nobody, so it must end nothing; and it isn't tried again.
            log.error("int8 saturation isn't watched any more: %s", type(err).__name__)
            raise
        if len(self._block) == BLOCK:
            self._on_block(dict(zip(self._names, np.mean(self._block, axis=0).tolist(), strict=True)))
            self._block.clear()


def can_watch(bundle: Bundle) -> bool:
    """Say whether a bundle's activations can be looked at: int8, not a plan, with ONNX Runtime installed."""
    calibration = bundle.manifest.calibration
    return (
        calibration is not None
        and bool(calibration.activations)
        and bundle.manifest.target is None
        and importlib.util.find_spec("onnxruntime") is not None
    )


def _give_way() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)  # of this thread alone, on Linux
