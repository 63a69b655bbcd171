"""The limits of a spec beside its AUROC margins, and whether a candidate keeps each: what AUROC can't see.

What is measured on every image (probabilities, the noise of the logits) is compared with its limit as it is. What is an estimate
of other images (decisions that flip, the likeliest finding, calibration) has a 95 % interval clustered by patient, and passes only
where the interval ends within the limit; an interval that reaches beyond it is inconclusive, a value beyond it fails.
"""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.evaluation.spec import Gate
from chexnet_deploy.inputs import MeasuredRecord
from chexnet_deploy.metrics.calibration import CalibrationGrowth
from chexnet_deploy.metrics.intervals import Proportion, clustered_proportion, defined


class GateResult(MeasuredRecord):
    """One limit, and what was measured for it.

    Attributes:
        gate: the name of its field in the spec.
        value: None where it is undefined, as flips without operating points; such a gate passes.
        low, high: 95 % interval clustered by patient; None of what is no estimate, and with fewer than two patients.
        limit: None where the spec declares none.
        finding: whose value this is, the worst; None of what is taken over all.
        n_beyond: of the findings, those beyond the limit, where each is held to it.
        n_more_patients: beside those at hand that would probably decide an inconclusive gate.
    """

    gate: str
    value: float | None
    low: float | None = None
    high: float | None = None
    limit: float | None
    finding: str | None = None
    n_beyond: int = 0
    n_more_patients: int | None = None
    verdict: Literal["pass", "fail", "inconclusive", "not gated"]

    @property
    def measured(self) -> str:
        """The value with its interval, e.g. `0.0083 (0.0073 to 0.0095)`."""
        if self.value is None:
            return "undefined"
        text = f"{self.value:.4f}"
        return text if self.low is None or self.high is None else f"{text} ({self.low:.4f} to {self.high:.4f})"

    @property
    def reason(self) -> str | None:
        """Why it isn't passed, in words; None where it is."""
        of = "" if self.finding is None else f" of {self.finding}"
        if self.verdict == "fail":
            also = f", exceeded by {self.n_beyond} findings" if self.n_beyond > 1 else ""
            return f"{self.gate} {self.measured}{of}, limit {self.limit}{also}"
        if self.verdict == "inconclusive":
            more = (
                "" if self.n_more_patients is None else f"; about {self.n_more_patients} more patients would decide it"
            )
            return f"{self.gate} {self.measured}{of} may be beyond the limit of {self.limit}{more}"
        return None


def judge_limits(
    gate: Gate,
    *,
    probability_differences: Mapping[str, float],
    noise: Mapping[str, float],
    flips: NDArray[np.bool_],
    is_same_likeliest: NDArray[np.bool_] | None,
    growth: Mapping[str, CalibrationGrowth],
    patients: NDArray[np.int64],
) -> tuple[GateResult, ...]:
    """Hold what was measured to a gate's limits.

    Args:
        gate: the limits.
        probability_differences: by the name of their limit.
        noise: by finding; see metrics.agreement.noise_share.
        flips: [N, P] True where a decision differs, of the P findings with an operating point.
        is_same_likeliest: [N] True where both models find the same finding likeliest; None of a model with one finding.
        growth: of the calibration error, by finding.
        patients: [N] whose image it is.
    """
    n_patients = len(np.unique(patients))
    flipped = _flip_share(flips, patients)
    same = None if is_same_likeliest is None else clustered_proportion(is_same_likeliest, patients)
    return (
        *(_bare(name, value, getattr(gate, name)) for name, value in probability_differences.items()),
        _of_the_worst("logit_noise_share", {name: (v, v, v) for name, v in noise.items()}, gate.logit_noise_share, 0),
        _share("flip_share", flipped, gate.flip_share, n_patients),
        _share("likeliest_finding_agreement", same, gate.likeliest_finding_agreement, n_patients, is_least=True),
        _of_the_worst(
            "calibration_error_growth",
            {name: (each.value, each.low, each.high) for name, each in growth.items()},
            gate.calibration_error_growth,
            n_patients,
        ),
    )


def _flip_share(flips: NDArray[np.bool_], patients: NDArray[np.int64]) -> Proportion | None:
    """Return the share of all decisions that flip; None without any decision."""
    n_images, n_findings = flips.shape
    if not n_findings:
        return None
    whose = np.unique(patients, return_inverse=True)[1]
    clusters = np.tile(whose, n_findings)
    if not flips.any():
        # Nothing shows how alike one patient's decisions are. Those on one finding may all be one; on two they are two.
        clusters = clusters * n_findings + np.repeat(np.arange(n_findings), n_images)
    return clustered_proportion(flips.T.ravel(), clusters)


def _bare(name: str, value: float, limit: float) -> GateResult:
    return GateResult(gate=name, value=value, limit=limit, verdict="pass" if value <= limit else "fail")


def _share(
    name: str, share: Proportion | None, limit: float | None, n_patients: int, *, is_least: bool = False
) -> GateResult:
    if share is None:
        return GateResult(gate=name, value=None, limit=limit, verdict="not gated" if limit is None else "pass")
    value, low, high = share.value, share.low, share.high
    if is_least:  # as many agree as don't differ
        verdict, more = _judge(1 - value, 1 - low, None if limit is None else 1 - limit, n_patients, is_share=True)
    else:
        verdict, more = _judge(value, high, limit, n_patients, is_share=True)
    return GateResult(
        gate=name,
        value=value,
        low=defined(low),
        high=defined(high),
        limit=limit,
        n_more_patients=more,
        verdict=verdict,
    )


def _of_the_worst(
    name: str, values: Mapping[str, tuple[float, float, float]], limit: float | None, n_patients: int
) -> GateResult:
    """Judge the finding that is furthest: by its value where that is beyond the limit, else by where its interval ends.

    Without patients (0) the values are no estimates, and have no intervals.
    """
    if not values:
        return GateResult(gate=name, value=None, limit=limit, verdict="not gated" if limit is None else "pass")
    n_beyond = 0 if limit is None else sum(not value <= limit for value, _, _ in values.values())
    by = 0 if n_beyond or limit is None else 2
    finding, (value, low, high) = max(values.items(), key=lambda item: _last_if_nan(item[1][by]))
    verdict, more = _judge(value, high, limit, n_patients)
    is_estimate = n_patients > 0
    return GateResult(
        gate=name,
        value=value,
        low=defined(low) if is_estimate else None,
        high=defined(high) if is_estimate else None,
        limit=limit,
        finding=finding,
        n_beyond=n_beyond,
        n_more_patients=more,
        verdict=verdict,
    )


def _judge(
    value: float, end: float, limit: float | None, n_patients: int, *, is_share: bool = False
) -> tuple[Literal["pass", "fail", "inconclusive", "not gated"], int | None]:
    """Return the verdict on an estimate whose interval ends at `end`, and how many more patients would decide it."""
    if limit is None:
        return "not gated", None
    if not value <= limit:
        return "fail", None
    if end <= limit:
        return "pass", None
    if math.isnan(end) or value == limit:
        return "inconclusive", None
    # Intervals shrink with the root of the number of patients, Wilson's at its end: (end - value)^2 n = t^2 end (1 - end).
    times = ((end - value) / (limit - value)) ** 2
    if is_share:
        times *= limit * (1 - limit) / (end * (1 - end))
    return "inconclusive", max(1, math.ceil(n_patients * (times - 1)))


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value
