import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from chexnet_deploy.metrics.roc import RATES, auroc, mean_auroc, roc_bands, roc_curve, youden_threshold


def test_a_tie_counts_one_half() -> None:
    # pairs (present, absent): 0.8>0.3 wins, 0.8>0.5 wins, 0.5>0.3 wins, 0.5=0.5 ties
    scores = np.array([0.8, 0.5, 0.3, 0.5], np.float32)
    assert auroc(scores, np.array([True, True, False, False])) == 3.5 / 4


@pytest.mark.parametrize("present", [True, False])
def test_one_class_is_undefined(present: bool) -> None:
    assert math.isnan(auroc(np.array([0.1, 0.9], np.float32), np.array([present, present])))


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=40))
def test_equals_brute_force_and_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in rows], np.float32)
    truth = np.array([present for _, present in rows])
    if truth.all() or not truth.any():
        assert math.isnan(auroc(scores, truth))
        return
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[truth] for n in scores[~truth]]
    assert auroc(scores, truth) == pytest.approx(sum(pairs) / len(pairs), abs=1e-15)
    assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)


def test_the_mean_names_how_many_it_counted() -> None:
    mean = mean_auroc({"Mass": 0.8, "Hernia": math.nan, "Edema": 0.6})
    assert (mean.value, mean.n_counted) == (pytest.approx(0.7), 2)
    assert math.isnan(mean_auroc({"Hernia": math.nan}).value)


def test_roc_curve_of_four_images() -> None:
    x, y = roc_curve(np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False]))
    assert x.tolist() == [0, 0, 0.5, 0.5, 1]
    assert y.tolist() == [0, 0.5, 0.5, 1, 1]


def test_youden_threshold_separates_a_separable_finding() -> None:
    assert youden_threshold(np.array([0.1, 0.2, 0.7, 0.9]), np.array([False, False, True, True])) == pytest.approx(0.45)
    # Neighbours in float32 have a number between them in float64.
    low = np.float32(0.7)
    high = np.nextafter(low, np.float32(1))
    assert float(low) < youden_threshold(np.array([low, high]), np.array([False, True])) < float(high)
    assert math.isnan(youden_threshold(np.array([0.1, 0.2]), np.array([True, True])))


# --- Bands round the curves ---------------------------------------------------------------------------------------------


def test_the_band_of_a_curve(rng: np.random.Generator) -> None:
    truth = np.arange(200) % 2 == 0
    scores = np.stack([truth + 0.0, rng.normal(size=200) + truth, np.zeros(200)], axis=1)
    patients = np.arange(200) // 2 % 50
    perfect, ordinary, blind = roc_bands(scores, np.stack([truth] * 3, axis=1), patients)
    assert perfect is not None
    assert set(perfect.sensitivity) == set(perfect.low or ()) == {1.0}
    assert blind is not None
    assert blind.sensitivity == pytest.approx(RATES)  # one tie of all: the diagonal
    assert ordinary is not None
    assert ordinary.low is not None
    assert ordinary.high is not None
    inside = [low <= y <= high for low, y, high in zip(ordinary.low, ordinary.sensitivity, ordinary.high, strict=True)]
    assert np.mean(inside) > 0.95
    again = roc_bands(scores[:, 1:2], truth[:, None], patients)[0]
    assert again == ordinary  # resamples hang on the patients and the seed alone


def test_no_band_where_resamples_often_lack_a_class() -> None:
    truth = np.arange(30) == 0
    band = roc_bands(np.arange(30.0)[::-1, None], truth[:, None], np.arange(30))[0]
    assert band is not None
    assert (band.low, band.high) == (None, None)
    assert band.undefined_share == pytest.approx((29 / 30) ** 30, abs=0.08)  # the one positive patient is not drawn
    assert roc_bands(np.arange(30.0)[:, None], np.zeros((30, 1), np.bool_), np.arange(30)) == (None,)
