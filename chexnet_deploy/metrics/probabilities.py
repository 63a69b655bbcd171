"""How good probabilities and decisions are: AUPRC, Brier score, calibration error, sensitivity, specificity, McNemar.

AUROC sees ranks alone, so a model whose confidences are crushed keeps it; Brier score and calibration error see that.
Every figure here is a point: an interval that takes the images of one patient for independent would be too narrow.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.roc import Scores

N_BINS: Final = 15
"""Bins of Guo et al. 2017 (arXiv 1706.04599) and Nixon et al. 2019 (arXiv 1904.01685)."""
_MAX_EXACT: Final = 1000  # discordant decisions up to which McNemar's p is summed in whole numbers


def average_precision(scores: Scores, truth: NDArray[np.bool_]) -> float:
    """Return the area under one finding's precision-recall curve (AUPRC), as scikit-learn's average_precision_score.

    The sum over distinct thresholds of the step in recall times the precision there; nothing is interpolated, and
    images with equal scores enter together, so their order doesn't matter.

    Args:
        scores: [N] any monotone score.
        truth: [N] True where the finding is present; no positive gives NaN, for recall is then undefined.

    Raises:
        MetricError: a score is not finite, or the lengths differ.
    """
    _check(scores, truth)
    n_positive = int(truth.sum())
    if n_positive == 0:
        return math.nan
    order = np.argsort(-scores, kind="stable")
    is_last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    hits = np.cumsum(truth[order])[is_last_of_tie]
    n_called = np.flatnonzero(is_last_of_tie) + 1
    return float((np.diff(hits, prepend=0) * (hits / n_called)).sum() / n_positive)


def brier_score(probabilities: Scores, truth: NDArray[np.bool_]) -> float:
    """Return the mean squared difference of probability and outcome (Brier 1950); 0 is best, NaN of no image.

    Args:
        probabilities: [N] 0..1.
        truth: [N] True where the finding is present; one class only is no obstacle.

    Raises:
        MetricError: a probability is not in 0..1, or the lengths differ.
    """
    _check_probabilities(probabilities, truth)
    if not truth.size:
        return math.nan
    return float(np.mean((probabilities.astype(np.float64) - truth) ** 2))


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """One point of a reliability diagram.

    Attributes:
        mean_probability: of the images in the bin; the abscissa.
        observed: share of them that show the finding; the ordinate.
        n_images: at least 1.
    """

    mean_probability: float
    observed: float
    n_images: int


def reliability_curve(
    probabilities: Scores, truth: NDArray[np.bool_], *, n_bins: int = N_BINS
) -> tuple[ReliabilityBin, ...]:
    """Return the reliability diagram of adaptive bins: each has about the same number of images (Nixon et al. 2019).

    Bins of equal width would hold nearly all images of a rare finding in the first. Images sorted by probability are
    cut into `n_bins` equal parts; images of equal probability all go where the middle of their run falls, so the bins
    depend on no order, and fewer than `n_bins` come out where runs are long.

    Args:
        probabilities: [N] 0..1.
        truth: [N] True where the finding is present.
        n_bins: at least 1.

    Returns:
        The bins that hold an image, by rising probability; none of no image.

    Raises:
        MetricError: a probability is not in 0..1, the lengths differ, or n_bins is below 1.
    """
    bins = equal_mass_bins(probabilities, truth, n_bins=n_bins)
    n_images = np.bincount(bins, minlength=n_bins)
    sums = np.bincount(bins, probabilities.astype(np.float64), n_bins)
    n_present = np.bincount(bins, truth, n_bins)
    return tuple(
        ReliabilityBin(float(sums[b] / n_images[b]), float(n_present[b] / n_images[b]), int(n_images[b]))
        for b in np.flatnonzero(n_images)
    )


def equal_mass_bins(probabilities: Scores, truth: NDArray[np.bool_], *, n_bins: int = N_BINS) -> NDArray[np.int64]:
    """Return which of reliability_curve's bins each image falls into, [N] of 0..n_bins - 1.

    Args:
        probabilities: [N] 0..1.
        truth: [N] True where the finding is present; only its length counts.
        n_bins: at least 1.

    Raises:
        MetricError: as reliability_curve.
    """
    _check_probabilities(probabilities, truth)
    if n_bins < 1:
        raise MetricError(f"Found {n_bins} bins; needed at least 1. Next: give a larger number.")
    _, inverse, counts = np.unique(probabilities.astype(np.float64), return_inverse=True, return_counts=True)
    # Twice the middle of each run, so that all of this is in whole numbers.
    twice_middle = 2 * np.cumsum(counts) - counts
    bin_of_value: NDArray[np.int64] = n_bins * twice_middle // max(2 * truth.size, 1)
    return bin_of_value[inverse]


def expected_calibration_error(probabilities: Scores, truth: NDArray[np.bool_], n_bins: int = N_BINS) -> float:
    """Return the mean |mean probability - observed share| over adaptive bins, weighted by their images; NaN of none.

    Of a finite sample it is above 0 also for a perfectly calibrated model, the more so the fewer images a bin holds:
    compare two models on the same images, not one with 0.

    Args:
        probabilities: [N] 0..1.
        truth: [N] True where the finding is present.
        n_bins: see reliability_curve, which says how the bins are made.

    Raises:
        MetricError: as reliability_curve.
    """
    bins = reliability_curve(probabilities, truth, n_bins=n_bins)
    if not bins:
        return math.nan
    return math.fsum(b.n_images * abs(b.mean_probability - b.observed) for b in bins) / truth.size


@dataclass(frozen=True, slots=True)
class Confusion:
    """Decisions against the truth, counted in images."""

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @property
    def sensitivity(self) -> float:
        """Share of the images with the finding that are called; NaN without any."""
        return _share(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def specificity(self) -> float:
        """Share of the images without the finding that are not called; NaN without any."""
        return _share(self.true_negatives, self.true_negatives + self.false_positives)


def confusion(scores: Scores, truth: NDArray[np.bool_], threshold: float) -> Confusion:
    """Count decisions at an operating point, which must have been chosen on other patients.

    Args:
        scores: [N].
        truth: [N] True where the finding is present.
        threshold: at and above it a finding is called, as in Predictor.

    Raises:
        MetricError: a score or the threshold is not finite, or the lengths differ.
    """
    _check(scores, truth)
    if not math.isfinite(threshold):
        raise MetricError(f"Found the threshold {threshold}; needed a finite number. Next: choose one.")
    called = scores >= threshold
    return Confusion(
        true_positives=int((called & truth).sum()),
        false_positives=int((called & ~truth).sum()),
        true_negatives=int((~called & ~truth).sum()),
        false_negatives=int((~called & truth).sum()),
    )


def mcnemar_exact_p(b: int, c: int) -> float:
    """Return the exact two-sided p that decisions flip one way as often as the other (McNemar 1947).

    Twice the smaller tail of a binomial of b + c fair coins, at most 1. It takes decisions as independent: where
    several are of one patient it is too small, so it may raise an alarm but never prove a difference.

    Args:
        b: decisions that only the first model makes; at least 0.
        c: decisions that only the second makes; at least 0.

    Returns:
        Exact to the last digits up to 1000 flips, to 1e-8 of itself above; 1 without any flip.

    Raises:
        MetricError: a count is negative.
    """
    if b < 0 or c < 0:
        raise MetricError(f"Found {b} and {c} flips; needed counts of at least 0. Next: count them again.")
    n, k = b + c, min(b, c)
    if b == c:
        return 1.0
    if n <= _MAX_EXACT:
        return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / (1 << n))
    # The largest term of the tail by logarithms, the others as ratios to it until they no longer count.
    log_largest = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    tail = ratio = 1.0
    for i in range(k, 0, -1):
        ratio *= i / (n - i + 1)
        tail += ratio
        if ratio < 1e-18 * tail:
            break
    return min(1.0, 2 * math.exp(log_largest) * tail)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _check(scores: Scores, truth: NDArray[np.bool_]) -> None:
    if scores.shape != truth.shape or scores.ndim != 1:
        raise MetricError(
            f"Found {list(scores.shape)} scores and {list(truth.shape)} labels; needed [N] of each. "
            f"Next: give one finding's column."
        )
    n_bad = int((~np.isfinite(scores)).sum())
    if n_bad:
        raise MetricError(f"Found {n_bad} scores that are NaN or infinite; needed none. Next: mend the model's output.")


def _check_probabilities(probabilities: Scores, truth: NDArray[np.bool_]) -> None:
    _check(probabilities, truth)
    if probabilities.size and (probabilities.min() < 0.0 or probabilities.max() > 1.0):
        raise MetricError(
            f"Found probabilities of {probabilities.min():g} to {probabilities.max():g}; needed 0 to 1. "
            f"Next: apply the sigmoid to logits first."
        )
