"""F1's thresholds, resamples and the power of a study, each against a formula, a loop or an answer by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.f1 import (
    Estimate,
    estimate_each,
    expected_interval_width,
    expected_undefined_share,
    f1_threshold,
    resample_units,
    score_panels,
)


def test_score_panels_by_hand() -> None:
    ratings = np.array([[c == "1" for c in row] for row in ("1110", "1100", "1010")])[:, :, None]
    # F1(0, 1) = F1(0, 2) = 4/5; the last rater is a label only
    point, resampled = score_panels(ratings, ((1, 2), (0,)), np.arange(4), 5, 0)
    assert point[:, :, 0].tolist() == [pytest.approx([0.8, 0.8])]
    assert resampled.shape == (5, 2, 1)


def test_an_estimate_leaves_undefined_resamples_out_of_its_interval_or_has_none() -> None:
    samples = np.linspace(0, 1, 101)[:, None].repeat(3, axis=1)
    samples[:5, 1] = samples[:6, 2] = np.nan  # 5 of 101 is just below 5 %
    full, few, many = estimate_each(np.array([0.5, math.nan, 0.5]), samples)
    assert (full.value, few.value) == (0.5, None)
    assert (full.low, full.high) == (pytest.approx(0.025), pytest.approx(0.975))
    assert (few.low, few.undefined_share) == (pytest.approx(0.05 + 0.025 * 0.95), 5 / 101)
    assert (many.low, many.high) == (None, None)
    assert estimate_each(np.zeros(1), np.zeros((9, 1)))[0] == Estimate(value=0, low=None, high=None, undefined_share=0)


def test_many_resamples_are_drawn_in_chunks_and_all_are_there() -> None:
    chunks = list(resample_units(4000, 2500, 0))
    assert [len(chunk) for chunk in chunks] == [1000, 1000, 500]


# What few positives allow


def test_expected_shares_and_widths() -> None:
    assert expected_undefined_share(2, 386) == pytest.approx(0.1346, abs=1e-4)
    assert expected_undefined_share(3, 386) == pytest.approx(0.0492, abs=1e-4)  # the fewest with an interval
    assert expected_interval_width(0.5, 96) == pytest.approx(2 * 1.96 * math.sqrt(0.5 * 0.5 * 1.5 / 192), rel=1e-4)
    assert expected_interval_width(1.0, 5) == 0.0


def test_expected_width_is_what_a_bootstrap_gives() -> None:
    reads = np.zeros((2, 2000, 1), np.bool_)
    reads[0, :100] = reads[1, 50:150] = True  # 100 positives each, 50 in common: F1 = 1/2
    point, resampled = score_panels(reads, ((1,), (0,)), np.arange(2000), 4000, 14)
    estimate = estimate_each(point[0, :, 0], resampled[:, :, 0])[0]
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.value == 0.5
    assert estimate.high - estimate.low == pytest.approx(expected_interval_width(0.5, 100), rel=0.05)


# Thresholds


def test_f1_threshold_by_hand() -> None:
    # from .1 up: F1 = 4/6, 4/5, 2/4, 2/3
    scores, truth = np.array([0.9, 0.5, 0.3, 0.1]), np.array([True, False, True, False])
    assert f1_threshold(scores, truth) == 0.3
    assert math.isnan(f1_threshold(scores, np.zeros(4, np.bool_)))


def test_f1_threshold_takes_the_lowest_of_a_tie() -> None:
    # F1 is 2/3 at .9 (1 of 1 hit, 1 missed) and at .1 (2 of 4)
    assert f1_threshold(np.array([0.9, 0.5, 0.3, 0.1]), np.array([True, False, False, True])) == 0.1


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=1, max_size=30))
def test_f1_threshold_is_the_best_of_all(rows: list[tuple[int, bool]]) -> None:
    scores, truth = np.array([s for s, _ in rows], np.float32), np.array([t for _, t in rows])
    if not truth.any():
        return
    f1_at = {t: f1_score(truth, scores >= t, zero_division=0.0) for t in np.unique(scores)}
    assert f1_threshold(scores, truth) == min(t for t, f1 in f1_at.items() if f1 > max(f1_at.values()) - 1e-12)


@pytest.mark.parametrize("scores", [[0.1, math.nan], [0.1, math.inf], [0.1]])
def test_f1_threshold_refuses(scores: list[float]) -> None:
    with pytest.raises(MetricError, match="one finite score a label"):
        f1_threshold(np.array(scores), np.array([True, False]))
