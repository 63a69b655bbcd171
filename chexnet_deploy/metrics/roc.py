"""Areas under ROC curves, and the curve itself: exact, with ties counted one half, undefined where it is undefined.

The band around a curve is pointwise, from resampled patients: at each rate 95 % of such bands hold the true sensitivity; the
whole curve lies in the band less often. Variances of areas are delong.py's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32] | NDArray[np.float64]


def auroc(scores: Scores, truth: NDArray[np.bool_]) -> float:
    """Return the area under one finding's ROC curve (Hanley & McNeil 1982).

    Args:
        scores: [N] any monotone score; a tie counts one half.
        truth: [N] True where the finding is present; one class only gives NaN.
    """
    n_positive = int(truth.sum())
    n_negative = truth.size - n_positive
    if n_positive == 0 or n_negative == 0:
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # Twice the midrank of each distinct score, so that all sums are of integers and therefore exact.
    last = np.cumsum(counts)
    twice_midrank = 2 * last - counts + 1
    twice_rank_sum = int(twice_midrank[inverse][truth].sum())
    twice_wins = twice_rank_sum - n_positive * (n_positive + 1)
    return twice_wins / (2 * n_positive * n_negative)


@dataclass(frozen=True, slots=True)
class MeanAuroc:
    """The mean over findings whose AUROC is defined, and how many those are."""

    value: float
    n_counted: int


def mean_auroc(areas: Mapping[str, float]) -> MeanAuroc:
    """Return the mean of the defined areas; NaN of 0 where none is."""
    defined = [area for area in areas.values() if not math.isnan(area)]
    return MeanAuroc(math.fsum(defined) / len(defined) if defined else math.nan, len(defined))


def roc_curve(scores: Scores, truth: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return false-positive and true-positive rates at every distinct threshold, from (0, 0) to (1, 1).

    Args:
        scores: [N].
        truth: [N] with both classes present.
    """
    order = np.argsort(-scores, kind="stable")
    is_last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    hits = np.cumsum(truth[order])[is_last_of_tie]
    false_alarms = np.cumsum(~truth[order])[is_last_of_tie]
    return np.append(0.0, false_alarms / (~truth).sum()), np.append(0.0, hits / truth.sum())


def youden_threshold(scores: Scores, truth: NDArray[np.bool_]) -> float:
    """Return a threshold with the largest sensitivity + specificity - 1 (Youden 1950); NaN with one class only.

    Of several it is the lowest, and it lies halfway to the next lower score: on a score itself, rounding alone would turn
    that image's decision.
    """
    if truth.all() or not truth.any():
        return math.nan
    thresholds = np.unique(scores)
    positives, negatives = np.sort(scores[truth]), np.sort(scores[~truth])
    sensitivity = 1.0 - np.searchsorted(positives, thresholds, side="left") / positives.size
    specificity = np.searchsorted(negatives, thresholds, side="left") / negatives.size
    best = int(np.argmax(sensitivity + specificity))
    return float(thresholds[max(best - 1, 0) : best + 1].astype(np.float64).mean())


N_RESAMPLES: Final = 500
SEED: Final = 14
LEVEL: Final = 0.95
MAX_UNDEFINED_SHARE: Final = 0.05
"""Of resamples that drew one class only; above it the band of the rest would be one of another quantity."""
RATES: Final = tuple(i / 100 for i in range(101))
"""False-positive rates at which curve and band are given."""
_CELLS_AT_ONCE: Final = 2_000_000  # images x resamples in memory, 16 MB an array


@dataclass(frozen=True, slots=True)
class RocBand:
    """One finding's curve.

    Attributes:
        sensitivity: [101] at RATES.
        low: [101] 2.5 percentiles of the resamples; None above MAX_UNDEFINED_SHARE.
        high: [101] 97.5 percentiles, as low.
        undefined_share: of the resamples; they are left out of the percentiles.
    """

    sensitivity: tuple[float, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    undefined_share: float


def roc_bands(
    scores: Scores,
    truth: NDArray[np.bool_],
    patients: NDArray[np.int64],
    labelled: NDArray[np.bool_] | None = None,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = SEED,
) -> tuple[RocBand | None, ...]:
    """Return each finding's curve and band; None where one class is missing. All findings share the resamples.

    Args:
        scores: [N, C] any monotone score.
        truth: [N, C] True where the finding is present.
        patients: [N]; a patient drawn twice counts twice, with all images.
        labelled: [N, C] True where it is known whether the finding is present; None stands for everywhere.
        n_resamples: how many.
        seed: of the generator.
    """
    names, index = np.unique(patients, return_inverse=True)
    generator = np.random.default_rng(seed)
    times = np.empty((n_resamples, names.size), np.int32)
    for row in times:
        row[:] = np.bincount(generator.integers(0, names.size, names.size), minlength=names.size)
    is_known = np.ones_like(truth) if labelled is None else labelled
    return tuple(
        _band(column[known], present[known], index[known], times)
        if present[known].any() and not present[known].all()
        else None
        for column, present, known in zip(np.ascontiguousarray(scores.T), truth.T, is_known.T, strict=True)
    )


def _band(scores: Scores, truth: NDArray[np.bool_], index: NDArray[np.intp], times: NDArray[np.int32]) -> RocBand:
    curve = np.interp(RATES, *roc_curve(scores, truth))
    order = np.argsort(-scores, kind="stable")
    is_last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    owner, present = index[order], truth[order]
    rows = max(1, _CELLS_AT_ONCE // scores.size)
    resampled = []
    for start in range(0, len(times), rows):
        weights = times[start : start + rows, owner]
        hits = np.cumsum(weights * present, axis=1)[:, is_last_of_tie]
        called = np.cumsum(weights, axis=1)[:, is_last_of_tie]
        for hit, false_alarm in zip(hits, called - hits, strict=True):
            if hit[-1] and false_alarm[-1]:
                rates = np.append(0.0, false_alarm / false_alarm[-1])
                resampled.append(np.interp(RATES, rates, np.append(0.0, hit / hit[-1])))
    undefined_share = 1 - len(resampled) / len(times)
    if undefined_share > MAX_UNDEFINED_SHARE:
        return RocBand(tuple(curve.tolist()), None, None, undefined_share)
    low, high = np.quantile(np.array(resampled), ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    return RocBand(tuple(curve.tolist()), tuple(low.tolist()), tuple(high.tolist()), undefined_share)
