"""The model beside radiologists: thresholds, and the three protocols of radiologists.py on the images both have.

A model's thresholds are those of the largest F1 on NIH labels, chosen on patients without expert reads who are not in
the official test list either: its images are never used to tune anything. Or they are given.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.predictions import LabelledScores
from chexnet_deploy.datasets.radiologist_labels import MAJORITY_READERS, ExpertLabels
from chexnet_deploy.errors import DatasetError, SpecError
from chexnet_deploy.evaluation.records import ReaderComparison, ReaderRoc, RocPoint, Threshold
from chexnet_deploy.evaluation.scores import decision_values, interval_of
from chexnet_deploy.metrics.delong import estimate_area
from chexnet_deploy.metrics.f1 import f1_threshold
from chexnet_deploy.metrics.probabilities import confusion
from chexnet_deploy.metrics.radiologists import (
    MODEL,
    Answers,
    ReaderStudy,
    majority_protocol,
    paper_protocol,
    readers_only_protocol,
)
from chexnet_deploy.metrics.roc import Scores, roc_curve

NO_POSITIVE = "no positive image to choose its threshold on"
NO_THRESHOLD = "no threshold is known"


def choose_thresholds(
    values: Scores, truth: NDArray[np.bool_], findings: Sequence[str], labelled: NDArray[np.bool_] | None = None
) -> tuple[Threshold, ...]:
    """Return each finding's threshold of the largest F1; a finding without a positive image has none.

    Args:
        values: [N, C] probabilities, or other scores.
        truth: [N, C] NIH labels.
        findings: [C] names.
        labelled: [N, C] True where the label is known; None stands for everywhere.
    """
    thresholds = []
    is_known = np.ones_like(truth) if labelled is None else labelled
    for finding, column, label, known in zip(findings, values.T, truth.T, is_known.T, strict=True):
        scores, present = column[known], label[known]
        at = f1_threshold(scores, present)
        if math.isnan(at):
            continue
        called = scores >= at
        f1 = float(2 * (called & present).sum() / (called.sum() + present.sum()))
        thresholds.append(Threshold(finding=finding, probability=at, f1=f1, n_positive=int(present.sum())))
    return tuple(thresholds)


def tuning_rows(patients: NDArray[np.int64], labels: ExpertLabels, test_patients: Collection[int]) -> NDArray[np.bool_]:
    """Return [N] True where an image may be used to choose thresholds: no expert reads, not in the official test list."""
    held_out = np.union1d(labels.patients, np.fromiter(test_patients, np.int64))
    return ~np.isin(patients, held_out)


def read_thresholds(path: Path, findings: Sequence[str], *, are_probabilities: bool) -> tuple[Threshold, ...]:
    """Return the thresholds of a JSON object, finding -> number; findings that it leaves out have none.

    Raises:
        SpecError: the file can't be read, is no such object, or names a finding that was not scored.
    """
    needed = f'needed a JSON object of finding and threshold, like {{"{findings[0]}": 0.3}}'
    try:
        stated = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise SpecError(f"{path}: found {err}; {needed}. Next: check the path and the file.") from err
    if not isinstance(stated, dict) or not stated:
        raise SpecError(f"{path}: found {type(stated).__name__} without thresholds; {needed}. Next: write one.")
    thresholds = []
    for name, value in stated.items():
        if name not in findings:
            raise SpecError(
                f"{path}: found {name!r}; needed names out of the findings scored, {', '.join(findings)}. "
                f"Next: correct the name or remove it."
            )
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or (are_probabilities and not 0 <= value <= 1):
            wanted = "a probability, 0 to 1" if are_probabilities else "a finite number"
            raise SpecError(f"{path}: found {value!r} for {name}; needed {wanted}. Next: correct it.")
        thresholds.append(Threshold(finding=name, probability=float(value)))
    return tuple(sorted(thresholds, key=lambda threshold: findings.index(threshold.finding)))


def run_protocols(
    labels: ExpertLabels, findings: Sequence[str], decisions: NDArray[np.bool_] | None
) -> tuple[ReaderStudy, ReaderStudy, ReaderStudy]:
    """Return the study by the paper's protocol, against readers only and against the majority.

    Args:
        labels: of the images that were decided on, in their order.
        findings: [C] out of FINDINGS.
        decisions: bool [N, C] of the model; None for the readers alone.
    """
    answers = answers_of(labels, findings, decisions)
    majority = labels.majority[:, _columns_of(findings)]
    return (
        paper_protocol(answers),
        readers_only_protocol(answers),
        majority_protocol(answers, majority, MAJORITY_READERS),
    )


def answers_of(labels: ExpertLabels, findings: Sequence[str], decisions: NDArray[np.bool_] | None) -> Answers:
    """Return the readers' and the model's answers; arguments as of run_protocols."""
    reads = labels.reads[:, :, _columns_of(findings)]
    return Answers(tuple(findings), labels.patients, labels.readers, reads, decisions)


def compare_with_readers(
    labelled: LabelledScores,
    labels: ExpertLabels,
    thresholds: Sequence[Threshold],
    *,
    thresholds_from: str,
    why_none: str = NO_THRESHOLD,
) -> ReaderComparison:
    """Return the reader study on the images that have both reads and scores.

    Args:
        labelled: scores; their NIH labels are not used.
        labels: the readers'.
        thresholds: of some findings.
        thresholds_from: in words.
        why_none: why the other findings have none.

    Raises:
        DatasetError: no image has both, or no finding has a threshold.
    """
    row_of = {name: row for row, name in enumerate(labelled.names)}
    common = [image for image in labels.images if image in row_of]
    if not common:
        raise DatasetError(
            f"found none of the {len(labels.images)} expert-read images among the {len(row_of):,} scored; needed at "
            f"least one. Next: score images of the official test list."
        )
    at = {threshold.finding: threshold.probability for threshold in thresholds}
    columns = [c for c, finding in enumerate(labelled.findings) if finding in at and finding in FINDINGS]
    if not columns:
        raise DatasetError(f"found no finding with a threshold: {why_none}. Next: give --thresholds FILE.")
    findings = tuple(labelled.findings[c] for c in columns)
    both = labels.select(common)
    rows = np.array([row_of[image] for image in common])[:, None]
    decisions = decision_values(labelled)[rows, columns] >= np.array([at[finding] for finding in findings])
    return ReaderComparison(
        n_read=len(labels.images),
        n_images=len(common),
        n_patients=np.unique(both.patients).size,
        thresholds_from=thresholds_from,
        thresholds=tuple(threshold for threshold in thresholds if threshold.finding in findings),
        left_out={
            **{finding: "not read by them" for finding in labelled.findings if finding not in FINDINGS},
            **{finding: why_none for finding in labelled.findings if finding in FINDINGS and finding not in at},
            **{finding: "not scored" for finding in FINDINGS if finding not in labelled.findings},
        },
        majority_readers=MAJORITY_READERS,
        studies=run_protocols(both, findings, decisions),
        roc=_rocs(both, findings, labelled.scores[rows, columns], decisions),
    )


def _rocs(
    labels: ExpertLabels, findings: Sequence[str], scores: NDArray[np.float64], decisions: NDArray[np.bool_]
) -> tuple[ReaderRoc, ...]:
    """Return the model's curve against the majority; the readers who voted would look better there than they are."""
    others = {reader: labels.reads[r] for r, reader in enumerate(labels.readers) if reader not in MAJORITY_READERS}
    rocs = []
    for c, finding in enumerate(findings):
        column = FINDINGS.index(finding)
        truth = labels.majority[:, column]
        answers = {reader: reads[:, column] for reader, reads in others.items()} | {MODEL: decisions[:, c]}
        estimate = estimate_area(scores[:, c], truth, labels.patients)
        is_defined = not math.isnan(estimate.area)
        x, y = (edge.tolist() for edge in roc_curve(scores[:, c], truth)) if is_defined else ((), ())
        rocs.append(
            ReaderRoc(
                finding=finding,
                n_positive=int(truth.sum()),
                auroc=estimate.area if is_defined else None,
                auroc_interval=interval_of(estimate),
                false_positive_rates=tuple(x),
                sensitivities=tuple(y),
                points=_points(answers, truth),
            )
        )
    return tuple(rocs)


def _points(answers: Mapping[str, NDArray[np.bool_]], truth: NDArray[np.bool_]) -> tuple[RocPoint, ...]:
    points = []
    for rater, called in answers.items():
        counts = confusion(called.astype(np.float64), truth, 0.5)
        is_defined = bool(truth.any() and not truth.all())
        points.append(
            RocPoint(
                rater=rater,
                false_positive_rate=1 - counts.specificity if is_defined else None,
                sensitivity=counts.sensitivity if is_defined else None,
            )
        )
    return tuple(points)


def _columns_of(findings: Sequence[str]) -> list[int]:
    return [FINDINGS.index(finding) for finding in findings]
