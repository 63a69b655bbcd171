"""By how much one model's probabilities lie further from the observed shares than another's on the same images.

The calibration error of a finite sample is above 0 for a perfect model too (Roelofs et al. 2022, arXiv 2012.08668), and by more
than quantisation moves it. Two things take that out here. The error is the root mean square one with its bias removed (Kumar,
Liang & Ma 2019, "Verified uncertainty calibration", arXiv 1909.10155), where the variance that makes the bias is that between
patients. And one set of bins serves both models: labels and bins are then the same, so the bias of one is that of the other, and
the difference of the squares has none.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.intervals import student_t_quantile
from chexnet_deploy.metrics.probabilities import N_BINS, equal_mass_bins
from chexnet_deploy.metrics.roc import Scores


@dataclass(frozen=True, slots=True)
class CalibrationGrowth:
    """The candidate's calibration error less the reference's, in probability.

    Attributes:
        value: 0 for equal models, negative where the candidate is calibrated better.
        low: 95 % interval, clustered by patient; NaN with fewer than two patients.
        high: likewise.
    """

    value: float
    low: float
    high: float


def calibration_growth(
    reference: Scores, candidate: Scores, truth: NDArray[np.bool_], patients: NDArray[np.int64], *, level: float = 0.95
) -> CalibrationGrowth:
    """Return the growth of one finding's root mean square calibration error.

    Images are put into bins of equal mass by the reference's probability: the question is whether the images that the reference
    calls alike show the finding as often as the candidate says. The interval is that of the difference of the squares, by the
    delta method with patients' contributions and Student's t; its ends are turned into probabilities beside the reference's own
    error, as unfavourably as one standard error of that allows. No growth is larger than the models' own mean difference over
    the bins (the triangle inequality), which needs no labels: that bounds value and ends. In simulation the interval holds the
    truth in 90 to 100 %: least often where it is as large as it can be, which it then misses by a fiftieth.

    Args:
        reference: [N] probabilities 0..1.
        candidate: [N] likewise, of the same images.
        truth: [N] True where the finding is present.
        patients: [N] whose image it is.
        level: of the interval.

    Raises:
        MetricError: a probability is not in 0..1, the lengths differ, or there is no image.
    """
    bins = equal_mass_bins(reference, truth)
    if candidate.shape != reference.shape or not truth.size:
        raise MetricError(
            f"Found {list(candidate.shape)} probabilities beside {list(reference.shape)}; needed [N] of each, N > 0. "
            f"Next: give both models' answers to the same images."
        )
    patient = np.unique(patients, return_inverse=True)[1]
    n_patients = int(patient.max()) + 1
    scores = reference.astype(np.float64), candidate.astype(np.float64)
    before, after = (_squared_error(each - truth, bins, patient) for each in scores)
    apart = _squared_error(scores[1] - scores[0], bins, patient)
    base, difference = before.value, after.value - before.value
    if n_patients < 2:
        return CalibrationGrowth(_grown(base, difference, math.sqrt(apart.value)), math.nan, math.nan)
    correction = n_patients / (n_patients - 1)
    t = student_t_quantile((1 + level) / 2, n_patients - 1)

    def standard_error(pull: NDArray[np.float64]) -> float:
        return math.sqrt(correction * float(pull @ pull))

    base, step = base - correction * before.bias, standard_error(before.pull)
    bases = [max(each, 0.0) for each in (base, base - step, base + step)]
    half = t * standard_error(after.pull - before.pull)
    most = math.sqrt(apart.value + t * standard_error(apart.pull))
    return CalibrationGrowth(
        _grown(bases[0], difference, math.sqrt(apart.value)),
        min(_grown(each, difference - half, most) for each in bases),
        max(_grown(each, difference + half, most) for each in bases),
    )


@dataclass(frozen=True, slots=True)
class _SquaredError:
    """The mean square over images of their bin's mean excess of probability over outcome.

    Attributes:
        bias: what the variance between patients adds to it, but for Bessel's correction.
        pull: [P] how it moves with the weight of each patient; sums to 0.
    """

    value: float
    bias: float
    pull: NDArray[np.float64]


def _squared_error(excess: NDArray[np.float64], bins: NDArray[np.int64], patient: NDArray[np.int64]) -> _SquaredError:
    n = excess.size
    size = np.maximum(np.bincount(bins, minlength=N_BINS), 1)  # bins without an image add nothing to any sum
    sums = np.bincount(bins, excess, N_BINS)
    by_bin = sums**2 / (size * n)
    value = float(by_bin.sum())
    # Through its bin's sum, its bin's size and the number of images.
    pull = 2 * (sums / size)[bins] * excess / n - (by_bin / size)[bins] - value / n
    # Each patient's part of a bin's sum, less the bin's mean.
    cells, cell = np.unique(patient * N_BINS + bins, return_inverse=True)
    parts = np.bincount(cell, excess - (sums / size)[bins])
    bias = float((parts**2 / (size * n)[cells % N_BINS]).sum())
    by_patient: NDArray[np.float64] = np.bincount(patient, pull).astype(np.float64, copy=False)
    return _SquaredError(value, bias, by_patient)


def _grown(base: float, by: float, most: float) -> float:
    """Return by how much the root of a squared error grows, within -most and most."""
    return min(max(math.sqrt(max(base + by, 0.0)) - math.sqrt(base), -most), most)
