"""Bounds that a person can check: Wilks' 59, binomial tails, ties, constant scores, and that one lot a patient is drawn."""

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks.statistics.on_site import TARGETS, World, draw, simulate
from benchmarks.statistics.on_site import choose as choose_at
from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.guarantee import (
    Cut,
    Shortfall,
    _most_wrong,
    _starts,
    confirmed_above,
    draw_one_each,
    fewest_patients,
    reached_by,
)


def test_95_percent_with_95_percent_takes_59_patients() -> None:
    assert fewest_patients(0.95, 0.95) == 59
    assert fewest_patients(0.9, 0.95) == 29
    assert fewest_patients(0.5, 0.75) == 2  # a quarter of samples of two coins are all heads
    scores = np.arange(59.0)
    assert reached_by(scores, 0.95, 0.95) == Cut(0.0, 59, 0)
    assert reached_by(scores[1:], 0.95, 0.95) == Shortfall(58, 1, is_certain=True)
    assert reached_by(scores[:0], 0.95, 0.95) == Shortfall(0, 59, is_certain=True)


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("risk", [0.05, 0.01, 0.2])
def test_the_table_is_the_binomial_s(rate: float, risk: float) -> None:
    found = _most_wrong(3000, rate, risk)
    for n in (1, 2, 20, 59, 93, 300, 1000, 2999):
        most = int(found[n])
        assert most < 0 or binom.cdf(most, n, 1 - rate) <= risk
        assert binom.cdf(most + 1, n, 1 - rate) > risk


def test_of_300_patients_8_may_be_missed() -> None:
    # P(Binomial(300, 0.05) <= 8) = 0.036, of 9 it is 0.067.
    scores = np.random.default_rng(0).permutation(300).astype(float)
    assert reached_by(scores, 0.95, 0.95) == Cut(8.0, 300, 8)


def test_ties_and_constant_scores_only_make_it_safer() -> None:
    tied = np.repeat([1.0, 2.0], 150)
    assert reached_by(tied, 0.95, 0.95) == Cut(1.0, 300, 0)  # 2.0 would miss half
    assert reached_by(np.full(100, 0.5), 0.95, 0.95) == Cut(0.5, 100, 0)
    # None lies above a threshold that all share, so all are taken or none is.
    assert confirmed_above(np.full(100, 0.5), np.ones(100, bool), 0.9, 0.95) == Cut(-np.inf, 100, 0)
    found = confirmed_above(np.full(100, 0.5), np.arange(100) < 50, 0.9, 0.95)
    assert found == Shortfall(100, None, is_certain=False)


def test_ppv_is_confirmed_down_to_where_it_may_no_longer_hold() -> None:
    # 100 patients: the 60 highest are right, all below are wrong. With 46 one may be wrong, with 61 too, with 62 one:
    # P(Binomial(62, 0.1) <= 1) = 0.011 and of 2 = 0.043, of 3 = 0.11.
    scores = np.arange(100.0)[::-1].copy()
    found = confirmed_above(scores, np.arange(100) < 60, 0.9, 0.95)
    assert isinstance(found, Cut)
    assert found.n_patients == 60 + found.n_wrong
    assert binom.cdf(found.n_wrong, found.n_patients, 0.1) <= 0.05
    assert binom.cdf(found.n_wrong + 1, found.n_patients + 1, 0.1) > 0.05
    assert (scores > found.threshold).sum() == found.n_patients


def test_ppv_says_how_many_more() -> None:
    right = np.ones(28, bool)
    assert confirmed_above(np.arange(28.0), right, 0.9, 0.95) == Shortfall(28, 1, is_certain=True)
    # 38 of 40 are right: 95 %, too few of them to show 90 %. Of 80 with 4 wrong P = 0.088, of 100 with 5 0.058, of 120 0.038.
    is_right = np.ones(40, bool)
    is_right[[38, 39]] = False
    found = confirmed_above(np.arange(40.0), is_right, 0.9, 0.95)
    assert isinstance(found, Shortfall)
    assert found.n_more is not None
    assert 60 <= found.n_more <= 100


def test_sequences_share_the_risk() -> None:
    assert _starts(28, 0.9, 0.05) == ()
    assert _starts(100, 0.9, 0.05) == (29,)
    # Of two, each has 2.5 %: 0.9^36 = 0.0225.
    assert _starts(200, 0.9, 0.05) == (36, 144)


def test_one_image_of_each_patient_that_with_the_lowest_lot() -> None:
    patients = np.array([7, 3, 7, 3, 9])
    lots = np.array([5, 2, 1, 8, 4], np.uint64)
    assert sorted(draw_one_each(patients, lots).tolist()) == [1, 2, 4]
    assert draw_one_each(patients[:0], lots[:0]).size == 0


@pytest.mark.parametrize("wrong", [{"rate": 1.0}, {"confidence": 0.0}, {"rate": float("nan")}])
def test_what_means_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(MetricError, match="between 0 and 1"):
        reached_by(np.arange(100.0), **{"rate": 0.9, "confidence": 0.95, **wrong})
    with pytest.raises(MetricError, match="NaN"):
        reached_by(np.array([0.1, np.nan]), 0.5, 0.75)
    with pytest.raises(MetricError, match="labels"):
        confirmed_above(np.arange(9.0), np.ones(8, bool), 0.5, 0.75)


def test_the_simulation_s_true_rates_are_those_of_a_large_site() -> None:
    world, site = World(0.3, 0.9), draw(0.3, 100_000, 0.9, np.random.default_rng(1))
    for rate in TARGETS:
        is_of_class = rate in ("sensitivity", "specificity")
        rows = np.flatnonzero(site.truth == (rate == "sensitivity")) if is_of_class else np.arange(site.truth.size)
        rows = rows[draw_one_each(site.patients[rows], site.lots[rows])]
        scores, truth = site.scores[rows], site.truth[rows]
        seen = {
            "sensitivity": (scores >= 1.0).mean(),
            "specificity": (scores < 1.0).mean(),
            "ppv": truth[scores > 1.0].mean(),
            "npv": (~truth[scores < 1.0]).mean(),
        }[rate]
        assert getattr(world, rate)(1.0) == pytest.approx(seen, abs=0.01)


def test_guarantees_hold_in_simulated_sites() -> None:
    for cell in simulate(0.2, 500, is_rounded=False, n_sites=200, seed=(7,)):
        assert cell.holds >= 0.9  # 200 sites: 95 % give or take 1.5
    site = draw(0.0, 100, 0.9, np.random.default_rng(0))
    assert choose_at(site, "sensitivity", 0.95) == Shortfall(0, 59, is_certain=True)
