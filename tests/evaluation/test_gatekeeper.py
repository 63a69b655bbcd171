"""A model that answers as its parent passes; one that does not is named with what was measured. Beside images: test_quantize.py."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.evaluation.gatekeeper import Gatekeeper, scaled_difference
from chexnet_deploy.evaluation.spec import Gate
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, Maps
from tests.tiny import write_parent

GATE = Gate(
    auroc_margin={"default": 0.01},
    max_abs_probability_difference=0.1,
    p999_abs_probability_difference=0.1,
    latency="not gated",
)
NAME = "max |probability difference| on the probe"


class Shifted:
    """Answers zero and a shift, in batches of few."""

    batch_range = (1, 5)

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        n = len(pixels)
        assert n <= self.batch_range[1]
        return np.full((n, 1), self.shift, np.float32), np.zeros((n, 1, 1, 1), np.float32)

    def conv_types(self) -> Mapping[str, int]:
        return {}

    def stage_times_ms(self, pixels: Pixels) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        raise AssertionError("whoever opened it closes it")


@pytest.fixture
def parent(tmp_path: Path) -> Bundle:
    return write_parent(tmp_path / "parent")


def test_a_model_that_answers_alike_passes(parent: Bundle) -> None:
    verdict = Gatekeeper(parent, GATE).judge(Shifted(0.25))
    assert verdict.reasons == ()
    assert verdict.probe_max_abs_logit_error == 0.25
    ((name, value, limit),) = ((check.name, check.value, check.limit) for check in verdict.checks)
    assert (name, limit) == (NAME, 0.1)
    assert value == pytest.approx(1 / (1 + np.exp(-0.25)) - 0.5, abs=1e-6)


def test_a_model_that_answers_otherwise_fails_with_what_was_measured(parent: Bundle) -> None:
    verdict = Gatekeeper(parent, GATE).judge(Shifted(1.0))
    assert verdict.reasons == (f"{NAME} 0.2311, limit 0.1",)
    assert verdict.checks[0].value > verdict.checks[0].limit


def test_scaled_difference_is_absolute_for_small_logits_and_relative_for_large() -> None:
    wanted = np.array([[0.5, -100.0]])
    assert scaled_difference(wanted + np.array([0.25, 0.0]), wanted) == 0.25
    assert scaled_difference(wanted + np.array([0.0, 1.0]), wanted) == 0.01
