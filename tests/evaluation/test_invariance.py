"""A session whose answers depend on where an image stands is caught; the real ones are not."""

from collections.abc import Mapping

import numpy as np
import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.evaluation.invariance import measure_invariance
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, Maps
from chexnet_deploy.runtime.sessions.open import open_session

PIXELS = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1).repeat(32, axis=2).repeat(32, axis=3)


class Moody:
    """Answers an image's mean, plus what its slot, its batch or its neighbours add."""

    batch_range = (1, 16)

    def __init__(self, slot: float = 0.0, size: float = 0.0, neighbour: float = 0.0) -> None:
        self.slot, self.size, self.neighbour = slot, size, neighbour

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        n = len(pixels)
        logits = pixels.mean(axis=(1, 2, 3))[:, None] + self.slot * np.arange(n)[:, None] + self.size * (n - 1)
        logits = logits + self.neighbour * (pixels[:1].mean() != pixels.mean())
        return logits.astype(np.float32), np.zeros((n, 1, 1, 1), np.float32)

    def conv_types(self) -> Mapping[str, int]:
        return {}

    def stage_times_ms(self, pixels: Pixels) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        pass


def test_an_even_tempered_session_spreads_by_nothing() -> None:
    report = measure_invariance(Moody(), PIXELS, 16)
    assert report.max_abs_probability_difference == 0.0
    assert (report.batch_sizes, report.n_images) == ((1, 2, 3, 4, 5, 6, 7, 8, 16), 8)


def test_what_a_slot_a_size_and_a_neighbour_add_is_measured() -> None:
    slots = measure_invariance(Moody(slot=0.1), PIXELS, 16).slots
    assert slots.max_abs_logit_difference == pytest.approx(1.5, abs=1e-6)  # fifteen slots further
    assert slots.max_abs_probability_difference == pytest.approx(1 / (1 + np.exp(-1.5)) - 0.5, abs=1e-6)
    assert measure_invariance(Moody(size=0.1), PIXELS, 16).slots.max_abs_logit_difference == pytest.approx(
        1.5, abs=1e-6
    )
    moody = measure_invariance(Moody(neighbour=0.25), PIXELS, 16)
    assert (moody.slots.max_abs_logit_difference, moody.neighbours.max_abs_logit_difference) == (0.0, 0.25)


def test_no_larger_batch_is_tried_than_the_session_takes() -> None:
    assert measure_invariance(Moody(), PIXELS, 64).batch_sizes[-1] == 16
    assert measure_invariance(Moody(), PIXELS, 3).batch_sizes == (1, 2, 3)


def test_fp32_keeps_its_answers(bundles: dict[str, Bundle]) -> None:
    session = open_session(bundles["fp32"], provider="cpu")
    report = measure_invariance(session, bundles["fp32"].read_probe().pixels, 16)
    session.close()
    assert report.max_abs_probability_difference < 1e-5
