"""Decide whether a candidate may replace the fp32 model it came from, from the logits of both on labelled images.

Runs no model and reads no files. AUROC is compared finding by finding with margins declared beforehand; because AUROC is
blind to crushed confidences, probabilities and decisions are compared beside it. Differences are points without intervals.
"""

import math
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.auroc import auroc, mean_auroc
from chexnet_deploy.predictor import sigmoid
from chexnet_deploy.sessions import Logits
from chexnet_deploy.spec import Gate

Verdict: TypeAlias = Literal["PASS", "FAIL", "INCONCLUSIVE"]
EXIT_CODES: dict[str, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FindingParity(_Record):
    """One finding; an AUROC is None where one class is missing, flips are None without an operating point."""

    finding: str
    n_positive: int
    n_positive_patients: int
    auroc_reference: float | None
    auroc_candidate: float | None
    margin: float
    verdict: Literal["pass", "fail", "not assessable"]
    operating_point: float | None
    n_flips: int | None

    @property
    def difference(self) -> float | None:
        """AUROC of the candidate minus the reference's."""
        if self.auroc_reference is None or self.auroc_candidate is None:
            return None
        return self.auroc_candidate - self.auroc_reference


class ParityReport(_Record):
    """Candidate against reference on the same labelled images.

    Attributes:
        n_counted: findings whose AUROC is defined; the two means are over those.
        n_flips: decisions that differ at the operating points, of `n_decisions`.
        verdict: PASS needs every assessable finding within its margin and every other limit kept.
        reasons: why not PASS; empty for PASS.
    """

    n_images: int
    n_patients: int
    findings: tuple[FindingParity, ...]
    mean_auroc_reference: float | None
    mean_auroc_candidate: float | None
    n_counted: int
    max_abs_logit_difference: float
    max_abs_probability_difference: float
    p999_abs_probability_difference: float
    n_flips: int
    n_decisions: int
    verdict: Verdict
    reasons: tuple[str, ...]

    @property
    def n_assessable(self) -> int:
        """Findings with enough positive patients."""
        return sum(finding.verdict != "not assessable" for finding in self.findings)

    @property
    def summary(self) -> str:
        """The verdict with how much of the model it covers, e.g. `PASS on 12 of 14` or `FAIL, 1 of 12 findings`."""
        if self.verdict == "FAIL":
            n_failed = sum(finding.verdict == "fail" for finding in self.findings)
            return f"FAIL, {n_failed} of {self.n_assessable} findings"
        return f"{self.verdict} on {self.n_assessable} of {len(self.findings)}"


def compare(
    reference: Logits,
    candidate: Logits,
    truth: NDArray[np.bool_],
    patients: NDArray[np.int64],
    findings: tuple[str, ...],
    operating_points: dict[str, float],
    gate: Gate,
) -> ParityReport:
    """Compare two models' logits on the same labelled images and judge the candidate by a gate.

    Args:
        reference: float32 [N, C] of the fp32 model.
        candidate: float32 [N, C].
        truth: [N, C] True where the finding is present.
        patients: [N] patient numbers; a finding's positives are counted by patient.
        findings: [C] names.
        operating_points: probability thresholds by finding.
        gate: margins and limits.

    Raises:
        MetricError: shapes differ, there are no images, or the reference is not finite.
    """
    if not reference.shape == candidate.shape == truth.shape == (len(patients), len(findings)) or not len(patients):
        raise MetricError(
            f"got reference {reference.shape}, candidate {candidate.shape}, truth {truth.shape} and {len(patients)} "
            f"patients, needed [N, {len(findings)}] of the same N > 0 images."
        )
    if not np.isfinite(reference).all():
        raise MetricError("the reference answered with NaN or infinity, so nothing can be compared with it.")
    # A candidate that crashed or overflowed fails everywhere: NaN would slip through every `>`.
    is_finite = bool(np.isfinite(candidate).all())
    p_reference = sigmoid(reference)
    # The sigmoid of infinity is an ordinary 1; keep it from looking like an answer.
    p_candidate = np.where(np.isfinite(candidate), sigmoid(candidate), np.float32(np.nan))
    rows = tuple(
        _compare_finding(
            name, p_reference[:, c], p_candidate[:, c], truth[:, c], patients, operating_points.get(name), gate
        )
        for c, name in enumerate(findings)
    )
    gap = np.abs(p_reference.astype(np.float64) - p_candidate)
    numbers = {
        "max_abs_logit_difference": float(np.abs(reference - candidate).max()) if is_finite else math.inf,
        "max_abs_probability_difference": float(gap.max()) if is_finite else 1.0,
        # "higher" is an observed value: interpolation would understate a tail of one image.
        "p999_abs_probability_difference": float(np.quantile(gap, 0.999, method="higher")) if is_finite else 1.0,
    }
    reasons = _reasons(rows, numbers, gate, is_finite=is_finite)
    n_assessable = sum(row.verdict != "not assessable" for row in rows)
    mean_reference = mean_auroc({row.finding: _nan(row.auroc_reference) for row in rows})
    mean_candidate = mean_auroc({row.finding: _nan(row.auroc_candidate) for row in rows})
    return ParityReport(
        n_images=len(patients),
        n_patients=len(np.unique(patients)),
        findings=rows,
        mean_auroc_reference=_none(mean_reference.value),
        mean_auroc_candidate=_none(mean_candidate.value),
        n_counted=mean_candidate.n_counted,
        n_flips=sum(row.n_flips or 0 for row in rows),
        n_decisions=len(patients) * sum(row.n_flips is not None for row in rows),
        verdict="FAIL" if reasons else "PASS" if n_assessable else "INCONCLUSIVE",
        reasons=reasons if reasons or n_assessable else (_too_few(gate),),
        **numbers,
    )


def _compare_finding(
    name: str,
    reference: NDArray[np.float32],
    candidate: NDArray[np.float32],
    truth: NDArray[np.bool_],
    patients: NDArray[np.int64],
    operating_point: float | None,
    gate: Gate,
) -> FindingParity:
    is_finite = bool(np.isfinite(candidate).all())
    area_reference = auroc(reference, truth)
    area_candidate = auroc(candidate, truth) if is_finite else math.nan
    n_positive_patients = len(np.unique(patients[truth]))
    margin = gate.margin_of(name)
    verdict: Literal["pass", "fail", "not assessable"]
    if n_positive_patients < gate.min_positive_patients or math.isnan(area_reference):
        verdict = "not assessable"
    else:
        # Not `difference < -margin`: NaN must fail.
        verdict = "pass" if area_candidate - area_reference >= -margin else "fail"
    flips = None
    if operating_point is not None:
        flips = int(((reference >= operating_point) != (candidate >= operating_point)).sum())
    return FindingParity(
        finding=name,
        n_positive=int(truth.sum()),
        n_positive_patients=n_positive_patients,
        auroc_reference=_none(area_reference),
        auroc_candidate=_none(area_candidate),
        margin=margin,
        verdict=verdict,
        operating_point=operating_point,
        n_flips=flips,
    )


def _reasons(
    rows: tuple[FindingParity, ...], numbers: dict[str, float], gate: Gate, *, is_finite: bool
) -> tuple[str, ...]:
    reasons = [] if is_finite else ["the candidate answered with NaN or infinity"]
    for row in rows:
        if row.verdict == "fail":
            lost = "undefined" if row.difference is None else f"{row.difference:+.4f}"
            reasons.append(f"{row.finding}: AUROC difference {lost}, margin -{row.margin}")
    for name, limit in (
        ("max_abs_probability_difference", gate.max_abs_probability_difference),
        ("p999_abs_probability_difference", gate.p999_abs_probability_difference),
    ):
        if not numbers[name] <= limit:
            reasons.append(f"{name} {numbers[name]:.4f}, limit {limit}")
    return tuple(reasons)


def _too_few(gate: Gate) -> str:
    return f"no finding has {gate.min_positive_patients} positive patients, so AUROC parity is not shown; use more labelled images"


def _none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
