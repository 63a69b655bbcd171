"""The growth of the calibration error, against answers counted by hand and a simulated truth."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.calibration import calibration_growth


def half_of(n: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Labels of n images of as many patients, every other one present."""
    return np.arange(n) % 2 == 0, np.arange(n)


def test_one_probability_for_all_is_one_bin_and_its_shift_is_the_growth() -> None:
    # The reference says 0.5 and half of the images show it: its error is 0. The candidate says 0.6: 0.1 too much.
    truth, patients = half_of(1000)
    growth = calibration_growth(np.full(1000, 0.5), np.full(1000, 0.6), truth, patients)
    assert growth.value == pytest.approx(0.1)
    # Never more than the models differ by.
    assert growth.high == pytest.approx(0.1)
    assert growth.low < 0.1


def test_a_miscalibrated_reference_is_what_growth_is_counted_from() -> None:
    # 0.7 where the share is 0.5: the squared error 0.04 less its bias, a coin's variance over 999. The candidate's 0.6: 0.01
    # less the same.
    truth, patients = half_of(1000)
    bias = 0.25 / 999
    wanted = math.sqrt(0.04 - bias) - math.sqrt(0.01 - bias)
    assert wanted == pytest.approx(0.1, abs=1e-3)
    growth = calibration_growth(np.full(1000, 0.6), np.full(1000, 0.7), truth, patients)
    assert growth.value == pytest.approx(min(wanted, 0.1))  # no more than the models differ by
    assert calibration_growth(np.full(1000, 0.7), np.full(1000, 0.6), truth, patients).value == pytest.approx(-0.1)


def test_equal_models_grow_by_nothing_for_certain() -> None:
    rng = np.random.default_rng(1)
    scores, truth = rng.random(300).astype(np.float32), rng.random(300) < 0.2
    growth = calibration_growth(scores, scores.copy(), truth, np.arange(300) // 3)
    assert (growth.value, growth.low, growth.high) == (0.0, 0.0, 0.0)


def test_bins_are_the_references() -> None:
    # The candidate swaps the answers of the two halves: each half is off by 0.8, though together they are as before.
    truth = np.array([False] * 90 + [True] * 10 + [True] * 90 + [False] * 10)
    reference = np.array([0.1] * 100 + [0.9] * 100)
    assert calibration_growth(reference, 1 - reference, truth, np.arange(200)).value == pytest.approx(0.8)


def test_images_of_one_patient_count_as_one() -> None:
    truth, patients = half_of(400)
    before, after = np.full(400, 0.5), np.full(400, 0.55)
    alone = calibration_growth(before, after, truth, patients)
    # Every image four times, by the same patient: nothing is known that was not known before.
    again = calibration_growth(*(np.tile(a, 4) for a in (before, after)), np.tile(truth, 4), np.tile(patients, 4))
    assert (again.value, again.high) == (pytest.approx(alone.value), pytest.approx(alone.high))
    fourfold = calibration_growth(*(np.tile(a, 4) for a in (before, after)), np.tile(truth, 4), np.arange(1600))
    assert fourfold.high < alone.high


def test_one_patient_has_no_interval() -> None:
    growth = calibration_growth(np.full(4, 0.5), np.full(4, 0.6), half_of(4)[0], np.zeros(4, np.int64))
    assert growth.value == pytest.approx(0.1)
    assert math.isnan(growth.low)
    assert math.isnan(growth.high)


def test_what_is_no_probability_is_refused() -> None:
    truth, patients = half_of(4)
    for reference, candidate in ((np.full(4, 1.5), np.full(4, 0.5)), (np.full(4, 0.5), np.full(3, 0.5))):
        with pytest.raises(MetricError):
            calibration_growth(reference, candidate, truth, patients)
    with pytest.raises(MetricError, match="N > 0"):
        calibration_growth(np.empty(0), np.empty(0), np.empty(0, np.bool_), np.empty(0, np.int64))


@pytest.mark.parametrize("sharpness", [0.7, 1.0])
def test_the_interval_holds_the_truth(sharpness: float) -> None:
    """400 patients with three images alike; the candidate shifts every logit by 0.25, the reference is right or too tame."""
    rng = np.random.default_rng(7)
    logits = rng.normal(-1.5, 1.0, 100_000)
    chance, before, after = (1 / (1 + np.exp(-z)) for z in (logits, sharpness * logits, sharpness * logits + 0.25))
    true = math.sqrt(np.mean((after - chance) ** 2)) - math.sqrt(np.mean((before - chance) ** 2))
    n_held = 0
    for _ in range(300):
        chosen = rng.choice(len(logits), 400).repeat(3)
        truth = rng.random(400).repeat(3) < chance[chosen]  # a patient's three images show the same
        growth = calibration_growth(before[chosen], after[chosen], truth, np.arange(400).repeat(3))
        n_held += growth.low <= true <= growth.high
    assert n_held / 300 > 0.92
