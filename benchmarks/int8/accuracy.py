"""How alike an int8 model answers to the fp32 model it came from, and whether another's loses more; for the int8 benchmarks."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.evaluation.parity import ParityReport, compare
from chexnet_deploy.evaluation.spec import read_spec
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.inputs import Record
from chexnet_deploy.metrics.delong import compare_all
from chexnet_deploy.runtime.sessions.base import Logits, run_in_batches
from chexnet_deploy.runtime.sessions.ort import OrtSession

MIN_POSITIVES = 30  # images; a finding with fewer moves by whole hundredths when one image changes place
_PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "nncf")


class Accuracy(Record):
    """An int8 model beside its fp32 model; logit noise is the RMS logit difference over the fp32 logits' standard deviation.

    Attributes:
        mean_auroc: of the int8 model, mean over findings.
        mean_auroc_change: int8 less fp32.
        worst_finding: of those with enough positive images, the one that loses most; None where there is none.
        flips_share: decisions at the operating points that change.
        signal_db: variance of the fp32 logits over the mean squared difference, all findings together; None where equal.
    """

    mean_auroc: float
    mean_auroc_change: float
    worst_finding: str | None
    worst_auroc_change: float | None
    max_abs_probability_difference: float
    flips_share: float
    noise_mean: float
    noise_worst: float
    signal_db: float | None


class Against(Record):
    """Ours beside another recipe on the same test images, in AUROC.

    Attributes:
        ours: which of our forms.
        mean_difference: ours minus the other's, mean over findings; with its 95 % interval, clustered by patient.
        n_not_inferior: findings for which a loss of the gate's margin is ruled out at one-sided 2.5 %, of `n_assessable`.
    """

    ours: str
    mean_difference: float
    low: float
    high: float
    n_not_inferior: int
    n_assessable: int


@dataclass(frozen=True, slots=True)
class Judge:
    """The fp32 model's answers on labelled images, and what is said of others beside them.

    Attributes:
        reference: [N, C] logits.
        images: the same N, with the truth's columns in the order of `findings`.
        operating_points: probability thresholds by finding.
    """

    reference: Logits
    images: LabelledImages
    findings: tuple[str, ...]
    operating_points: Mapping[str, float]

    def accuracy(self, answers: Logits) -> Accuracy:
        """Compare with the fp32 model."""
        report = self.compare(self.reference, answers)
        assert report.mean_auroc_reference is not None
        assert report.mean_auroc_candidate is not None
        changes = {
            row.finding: row.difference
            for row in report.findings
            if row.difference is not None and row.n_positive >= MIN_POSITIVES
        }
        worst = min(changes, key=lambda name: changes[name], default=None)
        noise = [row.noise_share for row in report.findings if row.noise_share is not None]
        return Accuracy(
            mean_auroc=report.mean_auroc_candidate,
            mean_auroc_change=report.mean_auroc_candidate - report.mean_auroc_reference,
            worst_finding=worst,
            worst_auroc_change=None if worst is None else changes[worst],
            max_abs_probability_difference=report.max_abs_probability_difference,
            flips_share=report.n_flips / max(1, report.n_decisions),
            noise_mean=float(np.mean(noise)),
            noise_worst=max(noise),
            signal_db=signal_db(self.reference, answers),
        )

    def against(self, name: str, ours: Logits, theirs: Logits) -> Against:
        """Ask whether ours is no worse than another recipe."""
        report = self.compare(theirs, ours)
        mean = compare_all(theirs, ours, self.images.truth, self.images.patients).mean
        assert mean is not None  # labelled test images show findings
        low, high = mean.interval()
        return Against(
            ours=name,
            mean_difference=mean.difference,
            low=low,
            high=high,
            n_not_inferior=sum(row.verdict == "pass" for row in report.findings),
            n_assessable=report.n_assessable,
        )

    def compare(self, reference: Logits, candidate: Logits) -> ParityReport:
        """Judge any two by int8's gate."""
        images, gate = self.images, read_spec("int8").gate
        return compare(
            reference,
            candidate,
            images.truth,
            images.patients,
            self.findings,
            self.operating_points,
            gate,
            labelled=images.labelled,
        )


def signal_db(reference: Logits, candidate: Logits) -> float | None:
    """Return 10 log10 of the reference's variance within findings over the mean squared difference; None where equal."""
    single = reference.astype(np.float64)
    noise = float(np.mean((candidate - single) ** 2))
    signal = float(np.mean((single - single.mean(axis=0)) ** 2))
    return None if noise == 0.0 else 10.0 * math.log10(signal / noise)


def answers_of(model: bytes, pixels: Pixels) -> Logits:
    """Return logits [N, C] of an ONNX model in ONNX Runtime."""
    session = OrtSession(model, pixels.shape[-1])
    try:
        return run_in_batches(session, pixels)[0]
    finally:
        session.close()


def cores() -> int:
    """Return how many threads every engine gets."""
    return os.cpu_count() or 1


def packages() -> dict[str, str]:
    """Return the versions of what was compared."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
