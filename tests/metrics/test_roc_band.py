"""Bands round ROC curves: known curves, and nothing drawn where nothing can be known."""

import numpy as np
import pytest

from chexnet_deploy.metrics.roc import RATES, roc_bands


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
