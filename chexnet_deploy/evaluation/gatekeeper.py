"""Judge whether a model answers as its parent does: on the probe, and on labelled validation images where there are any.

Every bundle that is made of another one passes here before it is kept. Measures and compares; keeps and refuses nothing itself.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import Check
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.evaluation.parity import compare
from chexnet_deploy.evaluation.spec import Gate
from chexnet_deploy.runtime.score import score_files
from chexnet_deploy.runtime.sessions.base import Logits, Session, run_in_batches, sigmoid

ON_THE_PROBE = "max |probability difference| on the probe"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was measured of one model, and why it fails.

    Attributes:
        checks: for its manifest; that of the probe comes first.
        reasons: empty where it passes.
        probe_max_abs_logit_error: largest |logit difference| to the fp32 model on the probe.
    """

    checks: tuple[Check, ...]
    reasons: tuple[str, ...]
    probe_max_abs_logit_error: float


class Gatekeeper:
    """Judges any number of models beside one parent, whose answers to the validation images are computed once.

    Args:
        parent: its probe holds the fp32 model's answers.
        gate: what a model must pass.
        validation: labelled images of validation patients; None judges on the probe alone.

    Raises:
        ImageError, SessionError: the parent can't answer the validation images.
        SpecError: the gate names another model's findings.
    """

    def __init__(self, parent: Bundle, gate: Gate, validation: LabelledImages | None = None) -> None:
        gate.refuse_strangers(parent.findings)
        self._manifest = parent.manifest
        self._probe = parent.read_probe()
        self._gate = gate
        self._labelled: tuple[LabelledImages, Logits] | None = None
        if validation is not None:
            # Not at the top: a machine that builds plans has no ONNX Runtime.
            from chexnet_deploy.runtime.sessions.ort import OrtSession

            session = OrtSession.open(parent)
            self._labelled = validation, self._score(session, validation)
            session.close()

    def judge(self, session: Session) -> Verdict:
        """Run a model on the probe and on the validation images; its session stays open.

        Raises:
            ImageError, SessionError: see score_files.
        """
        logits, _ = run_in_batches(session, self._probe.pixels)
        gap = float(np.abs(sigmoid(logits) - sigmoid(self._probe.logits)).max())
        limit = self._gate.max_abs_probability_difference
        checks: tuple[Check, ...] = (Check(name=ON_THE_PROBE, value=gap, limit=limit),)
        reasons: tuple[str, ...] = () if gap <= limit else (f"{ON_THE_PROBE} {gap:.4f}, limit {limit}",)
        if self._labelled is not None:
            validation, reference = self._labelled
            more, failures = self.compare(reference, self._score(session, validation), validation)
            checks, reasons = (*checks, *more), (*reasons, *failures)
        return Verdict(checks, reasons, float(np.abs(logits - self._probe.logits).max()))

    def compare(
        self, reference: Logits, candidate: Logits, validation: LabelledImages
    ) -> tuple[list[Check], tuple[str, ...]]:
        """Hold logits [N, C] of the manifest's findings to the gate, beside the parent's; return checks and why they fail."""
        columns = [self._manifest.findings.index(finding) for finding in validation.findings]
        report = compare(
            reference[:, columns],
            candidate[:, columns],
            validation.truth,
            validation.patients,
            validation.findings,
            self._manifest.operating_points,
            self._gate,
            labelled=validation.labelled,
        )
        images = f"on {report.n_images} validation images"
        checks = [
            Check(
                name=f"max |probability difference| {images}",
                value=report.max_abs_probability_difference,
                limit=self._gate.max_abs_probability_difference,
            )
        ]
        losses = [-(f.difference or 0.0) / f.margin for f in report.findings if f.verdict != "not assessable"]
        if losses:
            name = f"largest AUROC loss as a share of its margin, {report.n_assessable} assessable findings {images}"
            checks.append(Check(name=name, value=max(losses), limit=1.0))
        checks += [
            Check(name=f"{each.gate} {images}", value=each.value, limit=each.limit)
            for each in report.gates
            if each.value is not None and each.limit is not None and "probability" not in each.gate
        ]
        return checks, report.reasons if report.verdict == "FAIL" else ()

    def _score(self, session: Session, images: LabelledImages) -> Logits:
        return score_files({"model": session}, images.paths, self._manifest.preprocessing)["model"]


def scaled_difference(got: NDArray[np.floating], wanted: NDArray[np.floating]) -> float:
    """Return max |got - wanted| / max(1, |wanted|): how far logits that should be equal lie apart."""
    return float((np.abs(got - wanted) / np.maximum(1.0, np.abs(wanted))).max())
