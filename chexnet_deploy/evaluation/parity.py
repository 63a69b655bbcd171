"""Decide whether a candidate may replace the fp32 model it came from, from the answers of both on labelled images.

Runs no model and reads no files. For each finding a paired non-inferiority test of AUROC, clustered by patient, with a margin
declared beforehand; every assessable finding must pass (intersection-union, so no correction for many findings is due).
AUROC is blind to crushed confidences, so probabilities, decisions and calibration are compared beside it.
"""

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import MetricError
from chexnet_deploy.evaluation.gates import GateResult, judge_limits
from chexnet_deploy.evaluation.spec import Gate
from chexnet_deploy.inputs import AnyFloat, MeasuredRecord, name_some
from chexnet_deploy.metrics.agreement import flips, noise_share, observed_quantile, rank_churn
from chexnet_deploy.metrics.calibration import CalibrationGrowth, calibration_growth
from chexnet_deploy.metrics.delong import compare_all
from chexnet_deploy.metrics.intervals import ALPHA, PairedDifference, defined, patients_needed
from chexnet_deploy.metrics.probabilities import expected_calibration_error, mcnemar_exact_p
from chexnet_deploy.metrics.roc import mean_auroc
from chexnet_deploy.runtime.sessions.base import Logits, sigmoid

Verdict: TypeAlias = Literal["PASS", "FAIL", "INCONCLUSIVE"]
EXIT_CODES: dict[str, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


class FindingParity(MeasuredRecord):
    """One finding; what is undefined is None.

    Attributes:
        difference_low, difference_high: 95 % interval of the AUROC difference, clustered by patient.
        p_value: one-sided, of the hypothesis that the candidate loses the margin or more.
        verdict: "pass" where a loss of the margin is ruled out, "fail" where the difference itself is beyond the margin,
            "inconclusive" between the two.
        why_not_assessable: in words.
        n_more_patients: positive patients beside those at hand that would probably (80 %) decide an inconclusive finding.
        n_gained, n_lost: decisions at the operating point that turn to present, and to absent.
        mcnemar_p: exact, two-sided, of their balance; takes images as independent, so it is too small where flips share
            patients.
        ece_reference, ece_candidate: expected calibration error, 15 bins of equal mass.
        calibration_growth: of the root mean square calibration error, in probability; see metrics.calibration.
        calibration_growth_low, calibration_growth_high: its 95 % interval, clustered by patient.
        rank_churn: mean change of place in a worklist, as a share of its length.
        noise_share: root mean square logit difference over the reference logits' standard deviation.
        map_correlation_median, map_correlation_p01: of the activation maps over images.
    """

    finding: str
    n_positive: int
    n_positive_patients: int
    auroc_reference: float | None
    auroc_candidate: float | None
    difference_low: float | None
    difference_high: float | None
    p_value: float | None
    margin: float
    verdict: Literal["pass", "fail", "inconclusive", "not assessable"]
    why_not_assessable: str | None
    n_more_patients: int | None
    operating_point: float | None
    n_gained: int | None
    n_lost: int | None
    mcnemar_p: float | None
    ece_reference: float | None
    ece_candidate: float | None
    calibration_growth: float | None = None
    calibration_growth_low: float | None = None
    calibration_growth_high: float | None = None
    rank_churn: float | None
    noise_share: float | None
    map_correlation_median: float | None
    map_correlation_p01: float | None

    @property
    def difference(self) -> float | None:
        """AUROC of the candidate minus the reference's."""
        if self.auroc_reference is None or self.auroc_candidate is None:
            return None
        return self.auroc_candidate - self.auroc_reference

    @property
    def growth(self) -> CalibrationGrowth | None:
        """The growth of the calibration error with its interval."""
        if self.calibration_growth is None:
            return None
        ends = _nan(self.calibration_growth_low), _nan(self.calibration_growth_high)
        return CalibrationGrowth(self.calibration_growth, *ends)

    @property
    def n_flips(self) -> int | None:
        """Decisions that differ at the operating point."""
        return None if self.n_gained is None or self.n_lost is None else self.n_gained + self.n_lost


class SubgroupParity(MeasuredRecord):
    """One group of patients; reported, not gated: groups are too small for margins of their own.

    Attributes:
        n_assessable: findings with enough positive patients in the group; the mean difference is over those.
        worst_finding: of them, the one that loses most.
    """

    group: str
    n_images: int
    n_patients: int
    n_assessable: int
    mean_difference: float | None
    difference_low: float | None
    difference_high: float | None
    worst_finding: str | None
    worst_difference: float | None
    max_abs_probability_difference: float
    n_flips: int


class ParityReport(MeasuredRecord):
    """Candidate against reference on the same labelled images.

    Attributes:
        n_counted: findings whose AUROC is defined; the two means are over those.
        left_out: findings without an AUROC, by name.
        mean_difference_low, mean_difference_high: 95 % interval, with the covariance between findings; None where one of
            the counted findings has no variance.
        n_flips: decisions that differ at the operating points, of `n_decisions`.
        gates: the limits beside the AUROC margins, each with what was measured for it; none in reports of before.
        verdict: PASS needs every assessable finding non-inferior, at least one of them, and every other limit kept.
        reasons: why not PASS; empty for PASS.
    """

    n_images: int
    n_patients: int
    findings: tuple[FindingParity, ...]
    mean_auroc_reference: float | None
    mean_auroc_candidate: float | None
    mean_difference_low: float | None
    mean_difference_high: float | None
    n_counted: int
    left_out: tuple[str, ...]
    max_abs_logit_difference: AnyFloat
    p999_abs_logit_difference: AnyFloat
    max_abs_probability_difference: float
    p999_abs_probability_difference: float
    n_flips: int
    n_decisions: int
    gates: tuple[GateResult, ...] = ()
    subgroups: tuple[SubgroupParity, ...]
    verdict: Verdict
    reasons: tuple[str, ...]

    @property
    def n_assessable(self) -> int:
        """Findings with enough positive patients."""
        return sum(finding.verdict != "not assessable" for finding in self.findings)

    @property
    def summary(self) -> str:
        """The verdict with how much of the model it covers or what decided it, e.g. `PASS on 12 of 14`, `FAIL by flip_share`."""
        if self.verdict == "PASS" or not self.n_assessable:
            return f"{self.verdict} on {self.n_assessable} of {len(self.findings)}"
        wanted = "fail" if self.verdict == "FAIL" else "inconclusive"
        if n := sum(finding.verdict == wanted for finding in self.findings):
            return f"{self.verdict}, {n} of {self.n_assessable} findings"
        return f"{self.verdict} by {next((g.gate for g in self.gates if g.verdict == wanted), 'answers that are not finite')}"


def compare(
    reference: Logits,
    candidate: Logits,
    truth: NDArray[np.bool_],
    patients: NDArray[np.int64],
    findings: tuple[str, ...],
    operating_points: Mapping[str, float],
    gate: Gate,
    *,
    labelled: NDArray[np.bool_] | None = None,
    groups: Mapping[str, NDArray[np.bool_]] | None = None,
    map_correlation: NDArray[np.float32] | None = None,
) -> ParityReport:
    """Compare two models' logits on the same labelled images and judge the candidate by a gate.

    Args:
        reference: float32 [N, C] of the fp32 model.
        candidate: float32 [N, C].
        truth: [N, C] True where the finding is present.
        patients: [N] patient numbers: the unit of every count and variance.
        findings: [C] names.
        operating_points: probability thresholds by finding.
        gate: margins and limits.
        labelled: [N, C] True where that is known; None stands for everywhere. What needs no label is of all images.
        groups: by name, [N] True for the images of a subgroup.
        map_correlation: [N, C] of both models' activation maps, see metrics.agreement; None where not measured.

    Raises:
        MetricError: shapes differ, there are no images, or the reference is not finite.
    """
    if not reference.shape == candidate.shape == truth.shape == (len(patients), len(findings)) or not len(patients):
        raise MetricError(
            f"got reference {reference.shape}, candidate {candidate.shape}, truth {truth.shape} and {len(patients)} "
            f"patients, needed [N, {len(findings)}] of the same N > 0 images."
        )
    known = np.ones_like(truth) if labelled is None else labelled
    if not np.isfinite(reference).all():
        raise MetricError("the reference answered with NaN or infinity, so nothing can be compared with it.")
    # A candidate that crashed or overflowed fails everywhere: NaN would slip through every `>`.
    is_finite = bool(np.isfinite(candidate).all())
    # Not probabilities: float32 sigmoids make ties that the logits don't have. A finding whose answers aren't finite has no
    # area, and must not cost the others theirs.
    areas = compare_all(
        reference, np.where(np.isfinite(candidate).all(axis=0), candidate, reference), truth, patients, known
    )
    p_reference = sigmoid(reference)
    # The sigmoid of infinity is an ordinary 1; keep it from looking like an answer.
    p_candidate = np.where(np.isfinite(candidate), sigmoid(candidate), np.float32(np.nan))
    rows = tuple(
        _compare_finding(
            name,
            (reference[:, c], candidate[:, c]),
            (p_reference[:, c], p_candidate[:, c]),
            truth[:, c],
            known[:, c],
            patients,
            areas.findings[c],
            operating_points.get(name),
            gate,
            None if map_correlation is None else map_correlation[:, c],
        )
        for c, name in enumerate(findings)
    )
    gap = np.abs(p_reference.astype(np.float64) - p_candidate)
    logit_gap = np.abs(reference.astype(np.float64) - candidate)
    numbers = {
        "max_abs_logit_difference": float(logit_gap.max()) if is_finite else math.inf,
        "p999_abs_logit_difference": observed_quantile(logit_gap, 0.999) if is_finite else math.inf,
        "max_abs_probability_difference": float(gap.max()) if is_finite else 1.0,
        "p999_abs_probability_difference": observed_quantile(gap, 0.999) if is_finite else 1.0,
    }
    decided = [c for c, name in enumerate(findings) if name in operating_points]
    points = np.array([operating_points[findings[c]] for c in decided], np.float32)
    limits = judge_limits(
        gate,
        probability_differences={name: numbers[name] for name in numbers if "probability" in name},
        # Of a finding that nobody can assess, what the reference's logits spread over may be noise too.
        noise={
            row.finding: row.noise_share
            for row in rows
            if row.noise_share is not None and row.verdict != "not assessable"
        },
        flips=(p_reference[:, decided] >= points) != (p_candidate[:, decided] >= points),
        is_same_likeliest=_is_same_likeliest(reference, candidate) if len(findings) > 1 else None,
        growth={row.finding: growth for row in rows if (growth := row.growth) is not None},
        patients=patients,
    )
    failures = _failures(rows, limits, is_finite=is_finite)
    doubts = _doubts(rows, limits, gate, len(np.unique(patients)))
    mean_reference = mean_auroc({row.finding: _nan(row.auroc_reference) for row in rows})
    mean_candidate = mean_auroc({row.finding: _nan(row.auroc_candidate) for row in rows})
    low, high = math.nan, math.nan
    if is_finite and areas.mean is not None and len(areas.counted) == mean_candidate.n_counted:
        low, high = areas.mean.interval()
    return ParityReport(
        n_images=len(patients),
        n_patients=len(np.unique(patients)),
        findings=rows,
        mean_auroc_reference=defined(mean_reference.value),
        mean_auroc_candidate=defined(mean_candidate.value),
        mean_difference_low=defined(low),
        mean_difference_high=defined(high),
        n_counted=mean_candidate.n_counted,
        left_out=tuple(row.finding for row in rows if row.difference is None),
        n_flips=sum(row.n_flips or 0 for row in rows),
        n_decisions=len(patients) * len(decided),
        gates=limits,
        subgroups=tuple(
            _compare_group(
                name, chosen, (reference, candidate), truth, known, patients, findings, operating_points, gate
            )
            for name, chosen in (groups or {}).items()
            if is_finite and chosen.any()
        ),
        verdict="FAIL" if failures else "INCONCLUSIVE" if doubts else "PASS",
        reasons=(*failures, *doubts),
        **numbers,
    )


def _compare_finding(
    name: str,
    logits: tuple[NDArray[np.float32], NDArray[np.float32]],
    probabilities: tuple[NDArray[np.float32], NDArray[np.float32]],
    truth: NDArray[np.bool_],
    known: NDArray[np.bool_],
    patients: NDArray[np.int64],
    areas: PairedDifference,
    operating_point: float | None,
    gate: Gate,
    map_correlation: NDArray[np.float32] | None,
) -> FindingParity:
    reference, candidate = logits
    is_finite = bool(np.isfinite(candidate).all())
    margin = gate.margin_of(name)
    # Without a finite candidate `areas` hold the reference twice: they say nothing of it.
    area_candidate = areas.candidate.area if is_finite else math.nan
    low, high = areas.interval() if is_finite else (math.nan, math.nan)
    why_not = _why_not_assessable(areas, gate) if known.any() else "no image is labelled for it"
    verdict: Literal["pass", "fail", "inconclusive", "not assessable"]
    if why_not is not None:
        verdict = "not assessable"
    elif not area_candidate - areas.reference.area >= -margin:  # not `<`: NaN must fail
        verdict = "fail"
    else:
        verdict = "pass" if areas.non_inferiority_p(margin) < ALPHA else "inconclusive"
    changed = None if operating_point is None else flips(*probabilities, operating_point)
    p_reference, p_candidate = (each[known] for each in probabilities)
    growth = None
    if is_finite and known.any():
        growth = calibration_growth(p_reference, p_candidate, truth[known], patients[known])
    maps = None if map_correlation is None or np.isnan(map_correlation).all() else map_correlation
    return FindingParity(
        finding=name,
        n_positive=int(truth[known].sum()),
        n_positive_patients=areas.reference.n_positive_patients,
        auroc_reference=defined(areas.reference.area),
        auroc_candidate=defined(area_candidate),
        difference_low=defined(low),
        difference_high=defined(high),
        p_value=defined(areas.non_inferiority_p(margin)) if is_finite else None,
        margin=margin,
        verdict=verdict,
        why_not_assessable=why_not,
        n_more_patients=patients_needed(areas, margin) if verdict == "inconclusive" else None,
        operating_point=operating_point,
        n_gained=None if changed is None else changed.gained,
        n_lost=None if changed is None else changed.lost,
        mcnemar_p=None if changed is None else mcnemar_exact_p(changed.gained, changed.lost),
        ece_reference=defined(expected_calibration_error(p_reference, truth[known])),
        ece_candidate=defined(expected_calibration_error(p_candidate, truth[known])) if is_finite else None,
        calibration_growth=None if growth is None else growth.value,
        calibration_growth_low=None if growth is None else defined(growth.low),
        calibration_growth_high=None if growth is None else defined(growth.high),
        rank_churn=rank_churn(reference, candidate) if is_finite else None,
        noise_share=defined(noise_share(reference, candidate)) if is_finite else None,
        map_correlation_median=None if maps is None else float(np.nanmedian(maps)),
        map_correlation_p01=None if maps is None else float(np.nanquantile(maps, 0.01, method="lower")),
    )


def _why_not_assessable(areas: PairedDifference, gate: Gate) -> str | None:
    n_patients = areas.reference.n_positive_patients
    if math.isnan(areas.reference.area):
        return "one class only, so it has no AUROC"
    if n_patients < gate.min_positive_patients:
        return f"{n_patients} positive patients, {gate.min_positive_patients} are needed"
    if math.isnan(areas.variance):
        return "all positive or all negative images are one patient's, so the clustered variance is undefined"
    return None


def _compare_group(
    name: str,
    chosen: NDArray[np.bool_],
    logits: tuple[Logits, Logits],
    truth: NDArray[np.bool_],
    known: NDArray[np.bool_],
    patients: NDArray[np.int64],
    findings: tuple[str, ...],
    operating_points: Mapping[str, float],
    gate: Gate,
) -> SubgroupParity:
    reference, candidate = (values[chosen] for values in logits)
    areas = compare_all(reference, candidate, truth[chosen], patients[chosen], known[chosen])
    assessable = [c for c, each in enumerate(areas.findings) if _why_not_assessable(each, gate) is None]
    mean = None
    if assessable:
        mean = compare_all(
            reference[:, assessable],
            candidate[:, assessable],
            truth[chosen][:, assessable],
            patients[chosen],
            known[chosen][:, assessable],
        ).mean
    worst = min(assessable, key=lambda c: areas.findings[c].difference, default=None)
    p_reference, p_candidate = sigmoid(reference), sigmoid(candidate)
    changed = [
        flips(p_reference[:, c], p_candidate[:, c], operating_points[finding])
        for c, finding in enumerate(findings)
        if finding in operating_points
    ]
    low, high = (math.nan, math.nan) if mean is None else mean.interval()
    return SubgroupParity(
        group=name,
        n_images=int(chosen.sum()),
        n_patients=len(np.unique(patients[chosen])),
        n_assessable=len(assessable),
        mean_difference=None if mean is None else mean.difference,
        difference_low=defined(low),
        difference_high=defined(high),
        worst_finding=None if worst is None else findings[worst],
        worst_difference=None if worst is None else areas.findings[worst].difference,
        max_abs_probability_difference=float(np.abs(p_reference - p_candidate).max()),
        n_flips=sum(each.gained + each.lost for each in changed),
    )


def _is_same_likeliest(reference: Logits, candidate: Logits) -> NDArray[np.bool_]:
    """Say for each image whether both find the same finding likeliest; an answer that isn't finite finds none."""
    is_same: NDArray[np.bool_] = reference.argmax(axis=1) == candidate.argmax(axis=1)
    return is_same & np.isfinite(candidate).all(axis=1)


def _failures(rows: tuple[FindingParity, ...], limits: tuple[GateResult, ...], *, is_finite: bool) -> tuple[str, ...]:
    reasons = [] if is_finite else ["the candidate answered with NaN or infinity"]
    for row in rows:
        if row.verdict == "fail":
            lost = "undefined" if row.difference is None else f"{row.difference:+.4f}"
            reasons.append(f"{row.finding}: AUROC difference {lost}, margin -{row.margin}")
    return (*reasons, *(each.reason for each in limits if each.verdict == "fail" and each.reason is not None))


def _doubts(
    rows: tuple[FindingParity, ...], limits: tuple[GateResult, ...], gate: Gate, n_patients: int
) -> tuple[str, ...]:
    of_limits = tuple(each.reason for each in limits if each.verdict == "inconclusive" and each.reason is not None)
    if all(row.verdict == "not assessable" for row in rows):
        return (_why_none(rows, gate, n_patients), *of_limits)
    of_areas = (
        f"{row.finding}: AUROC difference {row.difference:+.4f} ({row.difference_low:+.4f} to {row.difference_high:+.4f}) does "
        f"not rule out a loss of {row.margin}; about {row.n_more_patients} more positive patients would decide it"
        for row in rows
        if row.verdict == "inconclusive"
    )
    return (*of_areas, *of_limits)


def _why_none(rows: tuple[FindingParity, ...], gate: Gate, n_patients: int) -> str:
    """Return why no finding is assessable: in each one's own words where more images alone wouldn't help."""
    n = gate.min_positive_patients
    if n_patients == 1:
        return "all images are of one patient, or nobody knows whose, so AUROC parity is not shown; use those of more patients"
    if all(row.n_positive_patients < n for row in rows):
        return f"no finding has {n} positive patients, so AUROC parity is not shown; use more labelled images"
    named: dict[str, list[str]] = {}
    for row in rows:
        named.setdefault(row.why_not_assessable or "", []).append(row.finding)
    return f"AUROC parity is not shown: {'; '.join(f'{name_some(names)}: {why}' for why, names in named.items())}"


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
