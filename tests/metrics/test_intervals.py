"""Shares of images: never surer for more images of the same patients, and their intervals hold."""

import math

import numpy as np
import pytest

from chexnet_deploy.metrics.intervals import clustered_proportion


def test_a_proportion_is_no_surer_for_copies_of_its_images(rng: np.random.Generator) -> None:
    hit = np.arange(10) < 8
    once = clustered_proportion(hit, np.arange(10))
    thrice = clustered_proportion(np.repeat(hit, 3), np.repeat(np.arange(10), 3))
    assert (thrice.value, thrice.low, thrice.high) == pytest.approx((once.value, once.low, once.high))
    # All ten hit: Wilson's interval at ten patients is n / (n + t^2), t = 2.262 with nine degrees of freedom.
    everyone = clustered_proportion(np.ones(10, np.bool_), np.arange(10))
    assert (everyone.low, everyone.high) == pytest.approx((10 / (10 + 2.2622**2), 1.0), abs=1e-4)
    assert math.isnan(clustered_proportion(hit, np.zeros(10, np.int64)).low)
    assert math.isnan(clustered_proportion(hit[:0], np.arange(0)).value)


def test_the_interval_of_a_proportion_covers(rng: np.random.Generator) -> None:
    # 60 patients with 1 to 6 images each, whose chances differ: true share 0.7.
    covered = 0
    for _ in range(1000):
        chance = rng.beta(2.1, 0.9, 60)
        owner = np.repeat(np.arange(60), rng.integers(1, 7, 60))
        share = clustered_proportion(rng.random(owner.size) < chance[owner], owner)
        covered += share.low <= 0.7 <= share.high
    assert 930 <= covered <= 970
