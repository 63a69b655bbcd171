"""F1 of one rater's yes/no answers against another's: by panel, on resamples, with intervals, and at which threshold.

F1 = 2 TP / (2 TP + FP + FN), the Dice coefficient of the two sets of images, is symmetric in rater and label. Where
neither calls an image positive it is 0/0: NaN. NaN becomes None in an Estimate. Knows no protocols: see radiologists.py.

What few positives allow. The interval of one F1 on n positives is about 3.9 sqrt(f (1-f) (2-f) / 2n) wide
(`expected_interval_width`): at F1 = .4 and n = 10, 30, 100, 300 that is .54, .31, .17, .10. More negatives don't
narrow it. With u images that either calls positive a resample of N images lacks them all with probability
(1 - u/N)^N, about e^-u (`expected_undefined_share`): below u = 3 no interval is given. With no positive label at all
(majority Pneumonia is 0 of 386 images) F1 is 0 whoever is scored, or undefined: neither sensitivity nor skill can be
concluded, only that the label's prevalence is likely below 3/386 = .8 % (rule of three, 95 %); such a finding gets no
interval and no place in a mean.
"""

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.intervals import defined
from chexnet_deploy.metrics.roc import Scores

LEVEL: Final = 0.95
MAX_UNDEFINED_SHARE: Final = 0.05
"""Of resamples; above it a percentile interval of the rest would be one of another quantity."""

_QUANTILES: Final = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_NORMAL_QUANTILE: Final = 1.959963984540054
_CHUNK: Final = 4_000_000  # multiplicities in memory at once, 32 MB


class Estimate(BaseModel):
    """A statistic on all images, and the 2.5 and 97.5 percentiles of its resamples.

    Attributes:
        value: None where undefined.
        low: None where no interval is given: above 5 % undefined, and where low and high would be equal, for a
            bootstrap can't tell how uncertain a 0 or a 1 is.
        high: as low.
        undefined_share: of the resamples; those are left out of the percentiles.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float | None
    low: float | None
    high: float | None
    undefined_share: float


def score_panels(
    ratings: NDArray[np.bool_],
    panels: tuple[tuple[int, ...], ...],
    unit_of: NDArray[np.intp],
    n_resamples: int,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each rater's mean F1 against its panel, [1, S, C] on all images and [B, S, C] on the resamples.

    NaN where any of the F1s is undefined.

    Args:
        ratings: bool [K, N, C].
        panels: [S] for rater k the raters that it is scored against; raters past the panels are labels only.
        unit_of: [N] the unit of each image, numbered from 0.
        n_resamples: B.
        seed: of the resamples.
    """
    pairs = sorted({(min(k, j), max(k, j)) for k, panel in enumerate(panels) for j in panel})
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    # Positives and true positives are sums over images, so those of a resample are its multiplicities times the sums
    # by unit: one matrix product for all raters, pairs and findings.
    indicators = np.concatenate([ratings, ratings[first] & ratings[second]])  # [K + P, N, C]
    n_units = int(unit_of.max()) + 1
    by_unit = np.zeros((n_units, *indicators.shape[::2]))
    np.add.at(by_unit, unit_of, indicators.transpose(1, 0, 2))
    places = [[pairs.index((min(k, j), max(k, j))) for j in panel] for k, panel in enumerate(panels)]

    def score(multiplicities: NDArray[np.float64]) -> NDArray[np.float64]:
        counts = (multiplicities @ by_unit.reshape(n_units, -1)).reshape(-1, *by_unit.shape[1:])
        n_called, n_both = counts[:, : len(ratings)], counts[:, len(ratings) :]
        with np.errstate(invalid="ignore"):  # 0/0 is NaN, as it should be
            f1 = 2 * n_both / (n_called[:, first] + n_called[:, second])
        return np.stack([f1[:, place].mean(axis=1) for place in places], axis=1)

    return score(np.ones((1, n_units))), np.concatenate(
        [score(_multiplicities(drawn)) for drawn in resample_units(n_units, n_resamples, seed)]
    )


def estimate_each(point: NDArray[np.float64], resampled: NDArray[np.float64]) -> tuple[Estimate, ...]:
    """Return an estimate for each of [S] values and their resamples [B, S]."""
    estimates = []
    for value, samples in zip(point.tolist(), resampled.T, strict=True):
        is_undefined = np.isnan(samples)
        share = float(is_undefined.mean())
        low = high = None
        if share <= MAX_UNDEFINED_SHARE:
            low, high = np.quantile(samples[~is_undefined], _QUANTILES).tolist()
            if low == high:  # no true positive at all gives 0 in every resample: a width of 0 would look like certainty
                low = high = None
        estimates.append(Estimate(value=defined(value), low=low, high=high, undefined_share=share))
    return tuple(estimates)


def resample_units(n_units: int, n_resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield the resamples in chunks [B, U]: each row draws U of the units 0..U-1 with replacement."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n_units)
    for start in range(0, n_resamples, rows):
        yield rng.integers(0, n_units, (min(rows, n_resamples - start), n_units))


def f1_threshold(scores: Scores, truth: NDArray[np.bool_]) -> float:
    """Return the score t for which "score >= t" has the largest F1; the lowest of several; NaN without a positive.

    Args:
        scores: [N] finite.
        truth: [N] True where the finding is present.

    Raises:
        MetricError: shapes differ or a score is not finite.
    """
    if scores.shape != truth.shape or not np.isfinite(scores).all():
        raise MetricError(
            f"found {scores.shape} scores, {int((~np.isfinite(scores)).sum())} of them not finite, for {truth.shape} "
            f"labels; needed one finite score a label. Next: score the images again."
        )
    if not truth.any():
        return math.nan
    thresholds = np.unique(scores)
    n_called = scores.size - np.searchsorted(np.sort(scores), thresholds, side="left")
    positives = np.sort(scores[truth])
    n_hits = positives.size - np.searchsorted(positives, thresholds, side="left")
    # Equal fractions of integers round to equal floats, so ties are exact, and argmax takes the first: the lowest.
    return float(thresholds[int(np.argmax(2 * n_hits / (n_called + positives.size)))])


def expected_interval_width(f1: float, n_positive: int) -> float:
    """Return about how wide the 95 % interval of one F1 will be when rater and label each call n images positive.

    The delta method with TP and FP + FN as independent Poisson counts, as they are where positives are rare:
    variance = f (1 - f) (2 - f) / 2n. Images of one patient are alike and widen it; a mean over labels narrows it.

    Args:
        f1: in [0, 1].
        n_positive: at least 1; below 10 the interval is too skew for this to be more than an order of magnitude.
    """
    return 2 * _NORMAL_QUANTILE * math.sqrt(f1 * (1 - f1) * (2 - f1) / (2 * n_positive))


def expected_undefined_share(n_positive: int, n_units: int) -> float:
    """Return the share of resamples that hold none of the n units which rater or label call positive."""
    return (1 - n_positive / n_units) ** n_units


def _multiplicities(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how often each unit is in each resample [B, U]."""
    n_resamples, n_units = drawn.shape
    flat = (drawn + n_units * np.arange(n_resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
