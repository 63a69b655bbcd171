"""What an area under a ROC curve, or the difference of two, is known to be: intervals and the non-inferiority test.

Takes areas and variances from delong.py; computes none. benchmarks/statistics/coverage.py measures how often the intervals hold.

Student's t is computed here without SciPy, which a scanner does not carry, and tested against it. A share of images, such as
sensitivity, has an interval that knows which images are of one patient.

Images of one patient are alike, so a share of n images is as certain as one of fewer independent ones: the variance
between patients says how many (Rao & Scott 1992, Biometrics 48:577), and Wilson's interval (1927) is taken at that number.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import MetricError

Interval = tuple[float, float]
ALPHA = 0.025  # of the one-sided test; the same decision as the lower end of a 95 % interval

_NORMAL = NormalDist()
_ROUNDING = 1e-12  # differences of areas and relative variances below this are rounding
_NUISANCE = np.linspace(-8.0, 8.0, 513)  # in standard deviations; fine enough for t to three decimals
_LARGEST_DISPERSION = 4.0  # beyond a factor of e^2 either way the sample says nothing; also keeps exp() finite


@dataclass(frozen=True, slots=True)
class AreaEstimate:
    """The area under one finding's ROC curve.

    Attributes:
        area: NaN where one class is missing.
        variance: clustered by patient; NaN with fewer than two patients with positives or with negatives.
        degrees_of_freedom: of `variance`, after Satterthwaite; NaN where the variance is NaN.
    """

    area: float
    variance: float
    degrees_of_freedom: float
    n_positive: int
    n_positive_patients: int
    n_negative_patients: int

    @property
    def n_patients(self) -> int:
        """Patients with a positive image or patients with a negative one, whichever are fewer."""
        return min(self.n_positive_patients, self.n_negative_patients)

    def interval(self, level: float = 0.95) -> Interval:
        """Return a confidence interval inside [0, 1]; NaN where the variance is NaN.

        On the logit scale with Student's t, which of logit, probit and Wilson forms covered best in simulation. A
        variance of zero, as of perfect separation, is not certainty: the area is then taken as a proportion of as many
        as the fewer patients (Wilson 1927).
        """
        tail = _tail(level)
        if math.isnan(self.variance):
            return math.nan, math.nan
        t = student_t_quantile(1 - tail, self.degrees_of_freedom)
        spread = self.area * (1 - self.area)
        if self.variance == 0:
            share = t**2 / self.n_patients
            middle, half = self.area + share / 2, math.sqrt(share * spread + share**2 / 4)
            return max((middle - half) / (1 + share), 0.0), min((middle + half) / (1 + share), 1.0)
        logit, half = math.log(self.area / (1 - self.area)), t * math.sqrt(self.variance) / spread
        return _logistic(logit - half), _logistic(logit + half)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Two models' areas on the same images: of one finding, or of the mean over findings.

    Attributes:
        variance: of the difference, clustered by patient; zero where both models rank every patient alike.
        degrees_of_freedom: of `variance`, after Satterthwaite.
    """

    reference: AreaEstimate
    candidate: AreaEstimate
    variance: float
    degrees_of_freedom: float

    @property
    def difference(self) -> float:
        """Area of the candidate minus the reference's."""
        return self.candidate.area - self.reference.area

    def interval(self, level: float = 0.95) -> Interval:
        """Return a confidence interval: the true differences that a two-sided test does not reject.

        NaN where the variance is NaN; the difference itself, twice, where both models rank every patient alike.
        """
        tail = _tail(level)
        if math.isnan(self.variance):
            return math.nan, math.nan
        if self._variance == 0:
            return self.difference, self.difference
        limit = student_t_quantile(1 - tail, self.degrees_of_freedom)
        return self._bound(-1.0, limit), self._bound(1.0, limit)

    def non_inferiority_p(self, margin: float) -> float:
        """Return the one-sided p-value against H0: true difference <= -margin; NaN where the variance is NaN.

        p < 0.025 and a lower bound of the 95 % interval above -margin are the same decision.
        """
        if math.isnan(self.variance):
            return math.nan
        if self._variance == 0:
            return 0.0 if self.difference > -margin else 1.0
        return student_t_tail(self._t(-margin), self.degrees_of_freedom)

    @property
    def _variance(self) -> float:
        # A difference without variance is not certain: take the most that the fewer patients allow, each worth -1 to 1.
        if self.variance == 0 and abs(self.difference) > _ROUNDING:
            return 1 / self.reference.n_patients
        return self.variance

    @property
    def _dispersion(self) -> float:
        """The relative variance of how strongly these patients show a true difference, see `_t`.

        Shifting one model's scores moves a binormal area A in proportion to phi(Phi^-1(A)); the relative variance of
        that density follows from the area's own variance by the delta method.
        """
        if self.variance == 0:
            return 0.0
        z = _NORMAL.inv_cdf((self.reference.area + self.candidate.area) / 2)
        variance = (self.reference.variance + self.candidate.variance) / 2
        return min(variance * (z / _NORMAL.pdf(z)) ** 2, _LARGEST_DISPERSION)

    def _t(self, truth: float) -> float:
        """Return the t statistic of a true difference, monotone in it.

        Wald's (difference - truth) / standard error errs where a few positive patients decide an area near 1: when no
        hard case was drawn, the loss and its standard error are small together, and a candidate worse by the margin
        passes far too often. So how strongly the patients drawn show a true difference is a nuisance factor, profiled
        out:

            t^2 = min over u of  u^2 + (difference - truth * exp(u * sqrt(dispersion)))^2 / noise

        The noise is the variance less what that factor adds to it, but a quarter at least. With many patients the
        dispersion vanishes and t is Wald's. At a nominal 2.5 % with 20 to 30 positive patients a candidate at the margin
        passes in 2 to 4 % of simulated studies, by Wald in 4 to 12 %: see benchmarks/statistics/coverage.py.
        """
        variance, dispersion = self._variance, self._dispersion
        # difference^2 - variance estimates the squared true difference without bias.
        true_square = max(self.difference**2 - variance, 0.0)
        noise = max(variance - dispersion * true_square, variance / 4)
        expected = truth * np.exp(_NUISANCE * math.sqrt(dispersion))
        squared = float(np.min(_NUISANCE**2 + (self.difference - expected) ** 2 / noise))
        return math.copysign(math.sqrt(squared), self.difference - truth)

    def _bound(self, end: float, limit: float) -> float:
        """Return the true difference between the observed one and `end` at which |t| reaches `limit`, by bisection."""
        if abs(self._t(end)) <= limit:
            return end
        kept, rejected = self.difference, end
        for _ in range(60):
            middle = (kept + rejected) / 2
            if abs(self._t(middle)) <= limit:
                kept = middle
            else:
                rejected = middle
        return kept


_MOST_TIMES = 1e4


def patients_needed(comparison: PairedDifference, margin: float, power: float = 0.8) -> int | None:
    """Return about how many more positive patients would show the candidate to be no worse than the margin.

    It takes the present difference as the true one, and variances and degrees of freedom as proportional to the number of
    positive patients, the former inversely; for power the statistic is taken as normal.

    Args:
        comparison: what the patients at hand show.
        margin: the largest loss of area that is accepted.
        power: the chance to decide with that many.

    Returns:
        0 where it is shown already; None where no number would do, as the difference is at or beyond the margin or
        unknown, or more than ten thousand times as many.
    """
    room = comparison.difference + margin
    p = comparison.non_inferiority_p(margin)
    if math.isnan(p) or not room > 0:
        return None
    if p < ALPHA:
        return 0

    def decides(times: float) -> bool:
        more = _with_patients(comparison, times)
        return more._t(-margin) >= student_t_quantile(1 - ALPHA, more.degrees_of_freedom) + _NORMAL.inv_cdf(power)

    too_few, enough = 1.0, 2.0
    while not decides(enough):
        too_few, enough = enough, 2 * enough
        if enough > _MOST_TIMES:
            return None
    for _ in range(40):
        middle = (too_few + enough) / 2
        if decides(middle):
            enough = middle
        else:
            too_few = middle
    n_positive_patients = comparison.reference.n_positive_patients
    return max(1, math.ceil(n_positive_patients * enough) - n_positive_patients)


def _with_patients(comparison: PairedDifference, times: float) -> PairedDifference:
    """Return what so many times the patients would show, were they like those at hand."""
    reference, candidate = (
        replace(area, variance=area.variance / times) for area in (comparison.reference, comparison.candidate)
    )
    freedom = comparison.degrees_of_freedom * times
    return replace(
        comparison,
        reference=reference,
        candidate=candidate,
        variance=comparison._variance / times,
        degrees_of_freedom=freedom,
    )


def defined(value: float) -> float | None:
    """Return a figure, or None where it is undefined, which is NaN in this package's arithmetic."""
    return None if math.isnan(value) else value


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise MetricError(f"confidence level {level}, needed a fraction between 0 and 1, such as 0.95.")
    return (1 - level) / 2


def student_t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Return the quantile of Student's t distribution; degrees of freedom need not be whole.

    Args:
        probability: within (0, 1).
        degrees_of_freedom: positive.
    """
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees_of_freedom)
    # Newton's method from below: the tail is convex beyond 0, so no step overshoots.
    t = max(_NORMAL.inv_cdf(probability), 0.0)
    log_scale = math.lgamma((degrees_of_freedom + 1) / 2) - math.lgamma(degrees_of_freedom / 2)
    scale = math.exp(log_scale) / math.sqrt(math.pi * degrees_of_freedom)
    for _ in range(200):
        density = scale * (1 + t * t / degrees_of_freedom) ** (-(degrees_of_freedom + 1) / 2)
        step = (student_t_tail(t, degrees_of_freedom) - (1 - probability)) / density
        t += step
        if abs(step) <= 1e-13 * max(t, 1.0):
            break
    return t


def student_t_tail(t: float, degrees_of_freedom: float) -> float:
    """Return the chance that Student's t exceeds `t`."""
    squared = t * t
    if squared == 0:
        return 0.5
    x, y = degrees_of_freedom / (degrees_of_freedom + squared), squared / (degrees_of_freedom + squared)
    tail = 0.5 * _incomplete_beta(degrees_of_freedom / 2, 0.5, x, y)
    return tail if t > 0 else 1 - tail


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), y = 1 - x, by Lentz's continued fraction (DLMF 8.17.22)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, y, x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for k in range(1, 10_000):
        even = k * (b - k) * x / ((a + 2 * k - 1) * (a + 2 * k))
        odd = -(a + k) * (a + b + k) * x / ((a + 2 * k) * (a + 2 * k + 1))
        before = value
        for step in (even, odd):
            d = 1 / (1 + step * d)
            c = 1 + step / c
            value *= c * d
        if abs(value - before) <= 1e-15 * abs(value):
            break
    return front * value


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share of images.

    Attributes:
        value: NaN of no image.
        low: NaN with fewer than two patients.
        high: likewise.
        n_images: of which it is a share.
        n_patients: whose images they are.
    """

    value: float
    low: float
    high: float
    n_images: int
    n_patients: int


def clustered_proportion(
    is_counted: NDArray[np.bool_], patients: NDArray[np.int64], *, level: float = 0.95
) -> Proportion:
    """Return the share of images that count, with its interval clustered by patient.

    Args:
        is_counted: [N].
        patients: [N] whose image it is.
        level: of the interval.
    """
    names, index = np.unique(patients, return_inverse=True)
    n_images, n_patients = is_counted.size, names.size
    if not n_images:
        return Proportion(math.nan, math.nan, math.nan, 0, 0)
    share = int(is_counted.sum()) / n_images
    if n_patients < 2:
        return Proportion(share, math.nan, math.nan, n_images, n_patients)
    excess = np.bincount(index, is_counted - share, n_patients)
    variance = n_patients / (n_patients - 1) * float(excess @ excess) / n_images**2
    # Without variance, as of 0 or 1, every patient may still stand for no more than one image. Never more than all
    # images either: patients who balance each other are luck.
    n_effective = min(share * (1 - share) / variance, n_images) if variance > 0 else float(n_patients)
    ratio = student_t_quantile((1 + level) / 2, n_patients - 1) ** 2 / n_effective
    half = math.sqrt(ratio * share * (1 - share) + ratio**2 / 4)
    middle = share + ratio / 2
    return Proportion(
        share, max((middle - half) / (1 + ratio), 0.0), min((middle + half) / (1 + ratio), 1.0), n_images, n_patients
    )
