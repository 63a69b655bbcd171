"""Labelled scores -> every figure of every finding, their mean, and the subgroups. Reads no files and runs no model."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.datasets.labelled import subgroups
from chexnet_deploy.datasets.predictions import LabelledScores
from chexnet_deploy.evaluation.records import (
    Curve,
    FindingScore,
    Interval,
    OperatingPoint,
    ReliabilityPoint,
    Share,
    Subgroup,
    SubgroupFinding,
)
from chexnet_deploy.metrics.delong import AreaComparison, compare_all, estimate_area
from chexnet_deploy.metrics.intervals import AreaEstimate, clustered_proportion, defined
from chexnet_deploy.metrics.probabilities import (
    average_precision,
    brier_score,
    expected_calibration_error,
    reliability_curve,
)
from chexnet_deploy.metrics.roc import RocBand, mean_auroc, roc_bands
from chexnet_deploy.runtime.sessions.base import sigmoid

MIN_POSITIVE_PATIENTS: Final = 20
"""In a subgroup, and as many patients without the finding; below, an AUROC says next to nothing."""
_NO_PROBABILITIES: Final = "the scores are neither probabilities nor logits"


@dataclass(frozen=True, slots=True)
class Scored:
    """The part of an Evaluation that scores and labels alone decide; fields as there."""

    findings: tuple[FindingScore, ...]
    mean_auroc: float | None
    mean_auroc_interval: Interval | None
    n_counted: int
    left_out: dict[str, str]
    undefined: dict[str, str]
    subgroups: tuple[Subgroup, ...]


def evaluate_scores(labelled: LabelledScores, operating_points: Mapping[str, float]) -> Scored:
    """Return every figure.

    Args:
        labelled: scores and labels; AUROC is of the scores as they are, all else of `decision_values`.
        operating_points: finding -> threshold, chosen on other patients; findings without one get no decisions.

    Raises:
        MetricError: there are no images or a score is not finite.
    """
    comparison = compare_all(labelled.scores, labelled.scores, labelled.truth, labelled.patients, labelled.is_labelled)
    bands = roc_bands(labelled.scores, labelled.truth, labelled.patients, labelled.is_labelled)
    values = decision_values(labelled)
    findings = tuple(
        _score_finding(
            labelled, c, values[:, c], comparison.findings[c].reference, bands[c], operating_points.get(name)
        )
        for c, name in enumerate(labelled.findings)
    )
    left_out = {row.finding: row.undefined["auroc"] for row in findings if row.auroc is None}
    mean = mean_auroc({row.finding: math.nan if row.auroc is None else row.auroc for row in findings})
    interval, undefined = _mean_interval(findings, comparison)
    return Scored(
        findings=findings,
        mean_auroc=defined(mean.value),
        mean_auroc_interval=interval,
        n_counted=mean.n_counted,
        left_out=left_out,
        undefined=undefined,
        subgroups=_subgroups(labelled),
    )


def decision_values(labelled: LabelledScores) -> NDArray[np.float32] | NDArray[np.float64]:
    """Return what thresholds are compared with, [N, C]: probabilities where the scores can be made into them."""
    return sigmoid(labelled.scores) if labelled.kind == "logit" else labelled.scores


def interval_of(estimate: AreaEstimate) -> Interval | None:
    """Return the 95 % interval of an area; None where its variance is undefined."""
    low, high = estimate.interval()
    return None if math.isnan(low) else (low, high)


def _score_finding(
    labelled: LabelledScores,
    column: int,
    values: NDArray[np.float32] | NDArray[np.float64],
    estimate: AreaEstimate,
    band: RocBand | None,
    threshold: float | None,
) -> FindingScore:
    rows = labelled.is_labelled[:, column]
    truth, values, patients = labelled.truth[rows, column], values[rows], labelled.patients[rows]
    undefined = _undefined_of(estimate)
    brier = ece = None
    reliability: tuple[ReliabilityPoint, ...] = ()
    if labelled.kind == "score":
        undefined |= {"brier": _NO_PROBABILITIES, "ece": _NO_PROBABILITIES}
    else:
        brier, ece = brier_score(values, truth), expected_calibration_error(values, truth)
        reliability = tuple(ReliabilityPoint(**asdict(b)) for b in reliability_curve(values, truth))
    point = None if threshold is None else _decide(values >= threshold, truth, patients, threshold)
    if point is not None and point.sensitivity.value is None:
        undefined["sensitivity"] = undefined["auroc"]
    if point is not None and point.specificity.value is None:
        undefined["specificity"] = undefined["auroc"]
    return FindingScore(
        finding=labelled.findings[column],
        n_positive=estimate.n_positive,
        n_positive_patients=estimate.n_positive_patients,
        n_negative_patients=estimate.n_negative_patients,
        auroc=defined(estimate.area),
        auroc_interval=interval_of(estimate),
        auprc=defined(average_precision(labelled.scores[rows, column], truth)),
        brier=brier,
        ece=ece,
        operating_point=point,
        roc=None if band is None else Curve(**asdict(band)),
        reliability=reliability,
        undefined=undefined,
    )


def _undefined_of(estimate: AreaEstimate) -> dict[str, str]:
    """Return why an area, its interval, its curve or the precision-recall area is undefined."""
    if not estimate.n_positive_patients:
        reason = "no image shows the finding"
        return dict.fromkeys(("auroc", "auroc_interval", "auprc", "roc"), reason)
    if not estimate.n_negative_patients:
        return dict.fromkeys(("auroc", "auroc_interval", "roc"), "every image shows the finding")
    if math.isnan(estimate.variance):
        which = "with" if estimate.n_positive_patients < 2 else "without"
        return {"auroc_interval": f"all images {which} the finding are of one patient"}
    return {}


def _decide(
    called: NDArray[np.bool_], truth: NDArray[np.bool_], patients: NDArray[np.int64], threshold: float
) -> OperatingPoint:
    return OperatingPoint(
        threshold=threshold,
        sensitivity=_share(called[truth], patients[truth]),
        specificity=_share(~called[~truth], patients[~truth]),
    )


def _share(is_counted: NDArray[np.bool_], patients: NDArray[np.int64]) -> Share:
    share = clustered_proportion(is_counted, patients)
    return Share(
        value=defined(share.value),
        interval=None if math.isnan(share.low) else (share.low, share.high),
        n_images=share.n_images,
        n_patients=share.n_patients,
    )


def _mean_interval(
    findings: tuple[FindingScore, ...], comparison: AreaComparison
) -> tuple[Interval | None, dict[str, str]]:
    """Return the interval of the mean over all defined areas: of fewer findings it would be one of another mean."""
    defined = [row for row in findings if row.auroc is not None]
    unsure = [row.finding for row in defined if row.auroc_interval is None]
    if not defined:
        return None, dict.fromkeys(("mean_auroc", "mean_auroc_interval"), "no finding has an AUROC")
    if unsure or comparison.mean is None:
        return None, {"mean_auroc_interval": f"no interval of {', '.join(unsure)}"}
    return interval_of(comparison.mean.reference), {}


def _subgroups(labelled: LabelledScores) -> tuple[Subgroup, ...]:
    rows_of = subgroups(labelled.sex, labelled.age_years.tolist(), labelled.view)
    found = [_subgroup(labelled, name, rows) for name, rows in rows_of.items()]
    for kind in ("sex", "age", "view"):
        grouped = [rows for name, rows in rows_of.items() if name.startswith(f"{kind} ")]
        rest = ~np.any([np.zeros(len(labelled.names), np.bool_), *grouped], axis=0)
        if rest.any():
            found.append(_subgroup(labelled, f"{kind} not stated", rest))
    return tuple(found)


def _subgroup(labelled: LabelledScores, name: str, rows: NDArray[np.bool_]) -> Subgroup:
    return Subgroup(
        name=name,
        n_images=int(rows.sum()),
        n_patients=np.unique(labelled.patients[rows]).size,
        findings=tuple(
            _subgroup_finding(finding, labelled.scores[known, c], labelled.truth[known, c], labelled.patients[known])
            for c, finding in enumerate(labelled.findings)
            for known in (rows & labelled.is_labelled[:, c],)
        ),
    )


def _subgroup_finding(
    finding: str, scores: NDArray[np.float64], truth: NDArray[np.bool_], patients: NDArray[np.int64]
) -> SubgroupFinding:
    n_with, n_without = np.unique(patients[truth]).size, np.unique(patients[~truth]).size
    estimate, why_not = None, None
    if n_with < MIN_POSITIVE_PATIENTS:
        why_not = f"not assessable: {n_with} positive patients, needed {MIN_POSITIVE_PATIENTS}"
    elif n_without < MIN_POSITIVE_PATIENTS:
        why_not = f"not assessable: {n_without} patients without it, needed {MIN_POSITIVE_PATIENTS}"
    else:
        estimate = estimate_area(scores, truth, patients)
    return SubgroupFinding(
        finding=finding,
        n_positive=int(truth.sum()),
        n_positive_patients=n_with,
        auroc=None if estimate is None else estimate.area,
        auroc_interval=None if estimate is None else interval_of(estimate),
        why_not=why_not,
    )
