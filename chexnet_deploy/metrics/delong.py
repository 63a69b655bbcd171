"""Variance of areas under ROC curves, and of their differences, when one patient has many images.

DeLong, DeLong & Clarke-Pearson 1988 (Biometrics 44:837) in the rank form of Sun & Xu 2014 (IEEE Signal Process. Lett.
21:1389), clustered by patient as in Obuchowski 1997 (Biometrics 53:567). With one image per patient it is plain DeLong.

An image's influence on the area is how much it wins over all images of the other class, less the average. Variances are
sums of products of patients' influences, so one pass over the scores serves areas, differences and means over findings.
Knows nothing of verdicts: see parity.py for those.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.intervals import AreaEstimate, PairedDifference
from chexnet_deploy.metrics.roc import Scores

Patients = NDArray[np.int64]
_ROUNDING = 1e-12  # differences of areas and relative variances below this are rounding


@dataclass(frozen=True, slots=True)
class AreaComparison:
    """Two models on the same images.

    Attributes:
        findings: in column order.
        mean: of the areas of the findings counted, with the covariance between findings through shared patients; its
            numbers of images and patients are those of the finding with the fewest. None where nothing is counted.
        counted: columns in the mean.
        left_out: columns whose variance is undefined.
    """

    findings: tuple[PairedDifference, ...]
    mean: PairedDifference | None
    counted: tuple[int, ...]
    left_out: tuple[int, ...]


def estimate_area(scores: Scores, truth: NDArray[np.bool_], patients: Patients) -> AreaEstimate:
    """Return one finding's area with its clustered variance.

    Args:
        scores: [N] any monotone score; a tie counts one half.
        truth: [N] True where the finding is present.
        patients: [N] whose image it is.

    Raises:
        MetricError: shapes differ, there are no images, truth isn't boolean, or a score is NaN.
    """
    columns, labels = _as_columns(scores[:, None]), _as_columns(truth[:, None])
    _check((columns,), labels, patients)
    return _Split.of(labels[0], *_index(patients), np.ones_like(labels[0])).influence(columns[0]).estimate()


def compare_areas(
    reference: Scores, candidate: Scores, truth: NDArray[np.bool_], patients: Patients
) -> PairedDifference:
    """Return one finding's difference of areas between two models on the same images.

    Args:
        reference: [N].
        candidate: [N].
        truth: [N] True where the finding is present.
        patients: [N] whose image it is.

    Raises:
        MetricError: as `estimate_area`.
    """
    return compare_all(reference[:, None], candidate[:, None], truth[:, None], patients).findings[0]


def compare_all(
    reference: Scores,
    candidate: Scores,
    truth: NDArray[np.bool_],
    patients: Patients,
    labelled: NDArray[np.bool_] | None = None,
) -> AreaComparison:
    """Return the differences of areas of all findings, and of their mean.

    Args:
        reference: [N, C].
        candidate: [N, C].
        truth: [N, C] True where the finding is present.
        patients: [N] whose image it is.
        labelled: [N, C] True where that is known; None stands for everywhere.

    Raises:
        MetricError: as `estimate_area`.
    """
    columns = _as_columns(reference), _as_columns(candidate)
    labels = _as_columns(truth)
    known = _as_columns(np.ones_like(truth) if labelled is None else labelled)
    _check(columns, labels, patients)
    index, n_patients = _index(patients)
    influences = []
    for label, is_known, *scores in zip(labels, known, *columns, strict=True):
        split = _Split.of(label, index, n_patients, is_known)
        first, second = split.influence(scores[0]), split.influence(scores[1])
        influences.append((first, second, second.minus(first)))
    findings = tuple(_difference(*each) for each in influences)
    counted = tuple(c for c, finding in enumerate(findings) if not math.isnan(finding.variance))
    return AreaComparison(
        findings=findings,
        mean=_difference(*(_mean([influences[c][which] for c in counted]) for which in range(3))) if counted else None,
        counted=counted,
        left_out=tuple(c for c in range(len(findings)) if c not in counted),
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """What one class of images, positive or negative, adds to a variance.

    Attributes:
        influence: [I] of each patient's images of that class on the area.
        factor: patients with such images over one less: Obuchowski's correction; NaN with fewer than two.
        freedom: degrees of freedom of the sum of squares.
        n_images: how many.
        n_patients: with such images.
    """

    influence: NDArray[np.float64]
    factor: float
    freedom: float
    n_images: int
    n_patients: int

    @property
    def variance(self) -> float:
        """Sum of squares with its correction."""
        return self.factor * float(self.influence @ self.influence)


@dataclass(frozen=True, slots=True)
class _Influence:
    """An area, or a difference or mean of areas, and what each patient adds to it; `n_patients` have a labelled image."""

    area: float
    positive: _Source
    negative: _Source
    n_patients: int

    def minus(self, other: "_Influence") -> "_Influence":
        return _Influence(
            self.area - other.area,
            replace(self.positive, influence=self.positive.influence - other.positive.influence),
            replace(self.negative, influence=self.negative.influence - other.negative.influence),
            self.n_patients,
        )

    @property
    def variance(self) -> float:
        n = self.n_patients
        # Of patients with both classes. It can cancel the rest to rounding, never more, as its factor is the smallest.
        shared = 2 * n / (n - 1) * float(self.positive.influence @ self.negative.influence) if n > 1 else 0.0
        apart = self.positive.variance + self.negative.variance
        return 0.0 if apart + shared < _ROUNDING * apart else apart + shared

    @property
    def degrees_of_freedom(self) -> float:
        return _pooled_freedom([self.positive, self.negative])

    def estimate(self) -> AreaEstimate:
        return AreaEstimate(
            self.area,
            self.variance,
            self.degrees_of_freedom,
            self.positive.n_images,
            self.positive.n_patients,
            self.negative.n_patients,
        )


@dataclass(frozen=True, slots=True)
class _Split:
    """Where one finding's images are and whose, worked out once for every model.

    Attributes:
        positive: image numbers where the finding is present.
        negative: image numbers where it is absent.
        positive_patient: patient number of each of `positive`.
        negative_patient: of each of `negative`.
        m: [I] positive images of each patient.
        n: [I] negative images.
    """

    positive: NDArray[np.intp]
    negative: NDArray[np.intp]
    positive_patient: NDArray[np.intp]
    negative_patient: NDArray[np.intp]
    m: NDArray[np.intp]
    n: NDArray[np.intp]

    @classmethod
    def of(
        cls, truth: NDArray[np.bool_], index: NDArray[np.intp], n_patients: int, known: NDArray[np.bool_]
    ) -> "_Split":
        positive, negative = np.flatnonzero(truth & known), np.flatnonzero(~truth & known)
        own, other = index[positive], index[negative]
        m, n = np.bincount(own, minlength=n_patients), np.bincount(other, minlength=n_patients)
        return cls(positive, negative, own, other, m, n)

    def influence(self, scores: NDArray[Any]) -> _Influence:
        m_total, n_total = len(self.positive), len(self.negative)
        n_patients = int(np.count_nonzero(self.m + self.n))
        if not m_total or not n_total:
            nothing = np.zeros(len(self.m))
            return _Influence(math.nan, _source(nothing, self.m), _source(nothing, self.n), n_patients)
        positive, negative = scores[self.positive], scores[self.negative]
        # Twice the negatives each positive beats, a tie counting one; then twice the positives that beat each negative.
        wins = _twice_below(np.sort(negative), positive)
        losses = 2 * m_total - _twice_below(np.sort(positive), negative)
        twice_wins = int(wins.sum())
        # Whole numbers below 2^53 until the division, so models that rank alike differ by exactly zero.
        won = m_total * np.bincount(self.positive_patient, wins, len(self.m)) - self.m * twice_wins
        lost = n_total * np.bincount(self.negative_patient, losses, len(self.n)) - self.n * twice_wins
        return _Influence(
            twice_wins / (2 * m_total * n_total),
            _source(won / (2 * n_total * m_total**2), self.m),
            _source(lost / (2 * m_total * n_total**2), self.n),
            n_patients,
        )


def _difference(reference: _Influence, candidate: _Influence, change: _Influence) -> PairedDifference:
    return PairedDifference(reference.estimate(), candidate.estimate(), change.variance, change.degrees_of_freedom)


def _source(influence: NDArray[np.float64], images: NDArray[np.intp]) -> _Source:
    n_patients = int(np.count_nonzero(images))
    if n_patients < 2:
        return _Source(influence, math.nan, math.nan, int(images.sum()), n_patients)
    # A patient's m images weigh m (1 + m) / 2: halfway between m independent ones, m, and m copies of one, m^2.
    # The degrees of freedom are one less than the patients of equal weight that would vary as much.
    weights = images * (1.0 + images) / 2
    freedom = max(float(weights.sum() ** 2 / (weights @ weights)) - 1, 1.0)
    return _Source(influence, n_patients / (n_patients - 1), freedom, int(images.sum()), n_patients)


def _mean(findings: Sequence[_Influence]) -> _Influence:
    area = math.fsum(finding.area for finding in findings) / len(findings)
    sources = _mean_source([f.positive for f in findings]), _mean_source([f.negative for f in findings])
    return _Influence(area, *sources, max(f.n_patients for f in findings))


def _mean_source(sources: Sequence[_Source]) -> _Source:
    # A patient's influences add up over findings; the square of the sum brings in every covariance between findings.
    influence = np.mean([source.influence for source in sources], axis=0)
    squares = sum(source.variance / source.factor for source in sources)
    factor = sum(source.variance for source in sources) / squares if squares > 0 else sources[0].factor
    n_images, n_patients = min(s.n_images for s in sources), min(s.n_patients for s in sources)
    return _Source(influence, factor, _pooled_freedom(sources), n_images, n_patients)


def _pooled_freedom(sources: Sequence[_Source]) -> float:
    """Return the degrees of freedom of a sum of independent variances (Satterthwaite 1946)."""
    variances = [source.variance for source in sources]
    if sum(variances) == 0:
        return min(source.freedom for source in sources)
    shares = [variance**2 / source.freedom for variance, source in zip(variances, sources, strict=True)]
    return sum(variances) ** 2 / sum(shares)


def _twice_below(ordered: NDArray[Any], values: NDArray[Any]) -> NDArray[np.intp]:
    """Return twice how many of `ordered` are below each value, an equal one counting half."""
    return np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")


def _as_columns(values: NDArray[Any]) -> NDArray[Any]:
    """Return [C, N] of [N, C], each column contiguous."""
    return np.ascontiguousarray(values.T)


def _index(patients: Patients) -> tuple[NDArray[np.intp], int]:
    """Return each image's patient as a number from 0, and how many patients there are."""
    names, index = np.unique(patients, return_inverse=True)
    return index, len(names)


def _check(columns: Sequence[Scores], labels: NDArray[np.bool_], patients: Patients) -> None:
    if labels.dtype != np.bool_:
        raise MetricError(f"labels are {labels.dtype}, needed True or False: truth > 0, say.")
    shapes = {array.shape[::-1] for array in (*columns, labels)}
    if len(shapes) > 1 or labels.ndim != 2 or patients.shape != labels.shape[1:] or not len(patients):
        raise MetricError(
            f"scores and labels are {sorted(shapes)} and patients {patients.shape}, needed the same N > 0 images in all."
        )
    for scores in columns:
        if np.isnan(scores).any():
            raise MetricError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN, which has no rank.")
