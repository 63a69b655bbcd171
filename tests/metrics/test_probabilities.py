"""AUPRC, Brier score, calibration error, confusion counts and McNemar against answers counted by hand."""

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, confusion_matrix

from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.probabilities import (
    Confusion,
    ReliabilityBin,
    average_precision,
    brier_score,
    confusion,
    expected_calibration_error,
    mcnemar_exact_p,
    reliability_curve,
)

T, F = True, False


def arrays(scores: list[float], truth: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(scores, np.float64), np.array(truth, np.bool_)


def test_average_precision_of_four_images() -> None:
    # Called from above: present (precision 1/1), absent, present (2/3), absent; each present one is half the recall.
    assert average_precision(*arrays([0.9, 0.8, 0.7, 0.1], [T, F, T, F])) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_tied_images_are_called_together() -> None:
    # One threshold calls all four: recall goes from 0 to 1 at precision 1/2, whatever the order.
    for truth in ([T, T, F, F], [F, T, F, T]):
        assert average_precision(*arrays([0.5] * 4, truth)) == 0.5


def test_average_precision_with_one_class() -> None:
    assert math.isnan(average_precision(*arrays([0.1, 0.9], [F, F])))
    assert average_precision(*arrays([0.1, 0.9], [T, T])) == 1.0


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=1, max_size=60).filter(
        lambda r: any(t for _, t in r)
    )
)
def test_average_precision_equals_scikit_learn_with_ties(rows: list[tuple[int, bool]]) -> None:
    scores, truth = arrays([s for s, _ in rows], [t for _, t in rows])
    assert average_precision(scores, truth) == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
    assert average_precision(scores[::-1], truth[::-1]) == pytest.approx(average_precision(scores, truth), abs=1e-15)


def test_brier_score_of_three_images() -> None:
    # (1 - 0.5)², (0 - 0.5)², (0 - 1)²
    assert brier_score(*arrays([0.5, 0.5, 1.0], [T, F, F])) == pytest.approx((0.25 + 0.25 + 1.0) / 3)
    assert brier_score(*arrays([0.5, 0.5], [F, F])) == 0.25
    assert math.isnan(brier_score(*arrays([], [])))


def test_brier_score_and_average_precision_equal_scikit_learn_on_many(rng: np.random.Generator) -> None:
    probabilities = rng.random(20_000).astype(np.float32).round(3)
    truth = rng.random(20_000) < probabilities
    double = probabilities.astype(np.float64)
    assert brier_score(probabilities, truth) == pytest.approx(brier_score_loss(truth, double), abs=1e-12)
    assert average_precision(probabilities, truth) == pytest.approx(average_precision_score(truth, double), abs=1e-12)


def test_two_bins_of_four_images() -> None:
    scores, truth = arrays([0.9, 0.1, 0.7, 0.3], [T, F, F, F])
    bins = reliability_curve(scores, truth, n_bins=2)
    assert bins == (ReliabilityBin(pytest.approx(0.2), 0.0, 2), ReliabilityBin(pytest.approx(0.8), 0.5, 2))
    # Both bins weigh one half: 0.5 · |0.2 - 0| + 0.5 · |0.8 - 0.5|
    assert expected_calibration_error(scores, truth, 2) == pytest.approx(0.25)


def test_one_bin_is_the_difference_of_mean_and_prevalence() -> None:
    assert expected_calibration_error(*arrays([0.2, 0.4, 0.9], [F, F, T]), 1) == pytest.approx(0.5 - 1 / 3)


def test_equal_probabilities_share_a_bin_in_every_order() -> None:
    # Sorted: .1 | .5 .5 .5 .5 | .9. In thirds of two the run's middle, 3 of 6, falls into the second.
    scores, truth = arrays([0.5, 0.5, 0.1, 0.5, 0.9, 0.5], [T, F, F, T, T, F])
    bins = reliability_curve(scores, truth, n_bins=3)
    assert [(b.n_images, b.observed) for b in bins] == [(1, 0.0), (4, 0.5), (1, 1.0)]
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 1, 3, 5, 4]):
        assert reliability_curve(scores[order], truth[order], n_bins=3) == bins
    # One value has one bin, however many are asked for: |0.3 - 1/4|
    assert expected_calibration_error(*arrays([0.3] * 4, [T, F, F, F]), 15) == pytest.approx(0.05)


def test_without_ties_bins_are_equal_parts_of_the_sorted_images(rng: np.random.Generator) -> None:
    probabilities, truth = rng.permutation(np.linspace(0.01, 0.99, 600)), rng.random(600) < 0.3
    order = np.argsort(probabilities)
    parts = order.reshape(15, 40)
    expected = np.abs(probabilities[parts].mean(axis=1) - truth[parts].mean(axis=1)).mean()
    assert expected_calibration_error(probabilities, truth) == pytest.approx(expected, abs=1e-12)
    sizes = [b.n_images for b in reliability_curve(probabilities[:107], truth[:107])]
    assert len(sizes) == 15
    assert (min(sizes), max(sizes)) == (7, 8)


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=50), st.integers(1, 20))
def test_bins_hold_every_image_once(rows: list[tuple[int, bool]], n_bins: int) -> None:
    probabilities, truth = arrays([s / 8 for s, _ in rows], [t for _, t in rows])
    bins = reliability_curve(probabilities, truth, n_bins=n_bins)
    assert sum(b.n_images for b in bins) == len(rows)
    assert sum(b.n_images * b.observed for b in bins) == pytest.approx(truth.sum())
    assert sum(b.n_images * b.mean_probability for b in bins) == pytest.approx(probabilities.sum())
    means = [b.mean_probability for b in bins]
    assert means == sorted(means)


def test_crushed_confidences_raise_the_calibration_error(rng: np.random.Generator) -> None:
    logits = rng.normal(0.0, 2.0, 20_000)
    probabilities = 1 / (1 + np.exp(-logits))
    truth = rng.random(20_000) < probabilities
    crushed = 1 / (1 + np.exp(-logits / 4))  # the same ranks, so the same AUROC
    assert expected_calibration_error(probabilities, truth) < 0.015
    assert expected_calibration_error(crushed, truth) > 0.1


def test_no_image_has_no_bin() -> None:
    assert reliability_curve(*arrays([], [])) == ()
    assert math.isnan(expected_calibration_error(*arrays([], [])))


def test_decisions_at_and_above_the_threshold() -> None:
    scores, truth = arrays([0.9, 0.5, 0.5, 0.4, 0.1], [T, T, F, T, F])
    counted = confusion(scores, truth, 0.5)
    assert counted == Confusion(true_positives=2, false_positives=1, true_negatives=1, false_negatives=1)
    assert (counted.sensitivity, counted.specificity) == (2 / 3, 1 / 2)
    (tn, fp), (fn, tp) = confusion_matrix(truth, scores >= 0.5)
    assert counted == Confusion(int(tp), int(fp), int(tn), int(fn))


def test_sensitivity_without_positives_is_undefined() -> None:
    counted = confusion(*arrays([0.9, 0.1], [F, F]), 0.5)
    assert math.isnan(counted.sensitivity)
    assert counted.specificity == 0.5
    assert math.isnan(confusion(*arrays([0.9], [T]), 0.5).specificity)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (1, 0, 1.0),
        (0, 5, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_by_hand(b: int, c: int, p: float) -> None:
    assert mcnemar_exact_p(b, c) == mcnemar_exact_p(c, b) == p


@pytest.mark.parametrize(("b", "c"), [(490, 511), (400, 700), (5000, 5100), (900, 200)])
def test_mcnemar_of_many_flips_equals_whole_numbers(b: int, c: int) -> None:
    n, k = b + c, min(b, c)
    exact = float(Fraction(2 * _tail(n, k), 2**n))
    assert mcnemar_exact_p(b, c) == pytest.approx(exact, rel=1e-8)


def _tail(n: int, k: int) -> int:
    term = total = 1
    for i in range(1, k + 1):
        term = term * (n - i + 1) // i
        total += term
    return total


def test_mcnemar_of_every_decision_there_is_takes_no_time() -> None:
    start_s = time.process_time()
    assert mcnemar_exact_p(178_000, 180_000) == pytest.approx(math.erfc((2000 - 1) / math.sqrt(2 * 358_000)), rel=1e-3)
    assert mcnemar_exact_p(0, 358_344) == 0.0
    assert time.process_time() - start_s < 1.0


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_refused(score: float) -> None:
    scores, truth = arrays([score, 0.5], [T, F])
    for call in (average_precision, brier_score, expected_calibration_error, reliability_curve):
        with pytest.raises(MetricError, match="1 scores that are NaN or infinite"):
            call(scores, truth)
    with pytest.raises(MetricError, match="1 scores"):
        confusion(scores, truth, 0.5)


def test_what_has_no_meaning_is_refused() -> None:
    logits, truth = arrays([-3.0, 2.0], [T, F])
    for call in (brier_score, expected_calibration_error, reliability_curve):
        with pytest.raises(MetricError, match=r"probabilities of -3 to 2; needed 0 to 1\. Next: apply the sigmoid"):
            call(logits, truth)
    assert average_precision(logits, truth) == 0.5
    with pytest.raises(MetricError, match="needed \\[N\\] of each"):
        average_precision(logits, truth[:1])
    with pytest.raises(MetricError, match="threshold nan"):
        confusion(logits, truth, math.nan)
    with pytest.raises(MetricError, match="0 bins"):
        reliability_curve(*arrays([0.5], [T]), n_bins=0)
    with pytest.raises(MetricError, match="-1 and 2 flips"):
        mcnemar_exact_p(-1, 2)
