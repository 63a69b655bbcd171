"""Area under the ROC curve: exact, with ties counted one half, undefined where it is undefined.

Patient-clustered variance is not here yet: a difference of two areas is reported as a point.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

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
    """Return the lowest score with the largest sensitivity + specificity - 1 (Youden 1950); NaN with one class only."""
    if truth.all() or not truth.any():
        return math.nan
    thresholds = np.unique(scores)
    positives, negatives = np.sort(scores[truth]), np.sort(scores[~truth])
    sensitivity = 1.0 - np.searchsorted(positives, thresholds, side="left") / positives.size
    specificity = np.searchsorted(negatives, thresholds, side="left") / negatives.size
    return float(thresholds[int(np.argmax(sensitivity + specificity))])
