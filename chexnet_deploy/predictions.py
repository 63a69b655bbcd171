"""Read anyone's predictions beside anyone's labels: two CSV files in, scores and truth in one order out.

Computes no statistics and repairs nothing: a score that is no number, a hole or an image without a label is refused.
Two shapes of predictions are understood, by the names in the header; capitals, blanks and underscores don't matter:

    wide    Image Index, prob_Atelectasis, prob_Cardiomegaly, ...     a prefix or suffix out of SCORE_WORDS, or none
    long    image, finding, score                                     every image with every finding, once

Labels are NIH's Data_Entry_2017*.csv, or wide: an image column, one column of 0 and 1 for each finding, and patients.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.csvfiles import (
    FINDING_BY_LETTERS,
    Row,
    find_findings,
    letters_of,
    quote_some,
    read_rows,
    require_column,
)
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.findings import FINDINGS
from chexnet_deploy.labels import IMAGE_COLUMN_NEEDED, IMAGE_COLUMNS, Sex, View, read_labels

ScoreKind: TypeAlias = Literal["probability", "logit", "score"]

SCORE_WORDS: Final = ("prob", "probability", "proba", "p", "logit", "score", "pred", "prediction")
_FINDING_COLUMNS: Final = ("finding", "label", "class", "pathology", "disease")


@dataclass(frozen=True, slots=True, eq=False)
class LabelledScores:
    """Scores with what the labels say of the same images, in the order of the predictions.

    Attributes:
        names: [N] image names.
        findings: [C] those that both files have, in canonical order.
        scores: float64 [N, C], finite.
        kind: "logit" where the columns say so; "probability" where every score is in 0..1; else "score". Brier score
            and calibration error have a meaning for probabilities only.
        truth: bool [N, C].
        patients: int64 [N]; an id that is no number becomes the first 63 bits of its SHA-256.
        sex: [N] "F", "M" or "unknown".
        age_years: [N] as the labels say; NaN where they don't.
        view: [N] "AP", "PA" or "unknown".
        unlabelled_findings: predicted, but the labels have no such column; not in `findings`.
        ignored: columns, or findings of the long form, that name none of the 14.
        n_not_predicted: labelled images that the predictions leave out.
    """

    names: tuple[str, ...]
    findings: tuple[str, ...]
    scores: NDArray[np.float64]
    kind: ScoreKind
    truth: NDArray[np.bool_]
    patients: NDArray[np.int64]
    sex: tuple[Sex, ...]
    age_years: NDArray[np.float64]
    view: tuple[View, ...]
    unlabelled_findings: tuple[str, ...]
    ignored: tuple[str, ...]
    n_not_predicted: int


def read_predictions(predictions: Path, labels: Path) -> LabelledScores:
    """Return the predictions with their labels.

    A finding with one class only is not refused here: what is undefined on it is for the statistics to say.

    Args:
        predictions: wide or long CSV.
        labels: NIH's table, or a wide CSV. Without a patient column the patient is the number in an NIH image name.

    Raises:
        DatasetError: a file can't be read, lacks a column or holds what can't be right, or the two don't fit.
    """
    scored = _read_scores(predictions)
    labelled, label_findings = read_labels(labels)
    unknown = [name for name in scored.names if name not in labelled]
    if unknown:
        raise DatasetError(
            f"{predictions}: found {len(unknown):,} images without a row in {labels}, e.g. {quote_some(unknown)}; "
            f"needed a label for each of the {len(scored.names):,}. Next: give the labels of these images, named alike."
        )
    columns = [c for c, finding in enumerate(scored.findings) if finding in label_findings]
    findings = tuple(scored.findings[c] for c in columns)
    if not findings:
        raise DatasetError(
            f"{predictions} scores {', '.join(scored.findings)}; {labels} labels {', '.join(label_findings)}; needed "
            f"one in common. Next: give labels of the findings that were predicted."
        )
    rows = [labelled[name] for name in scored.names]
    return LabelledScores(
        names=scored.names,
        findings=findings,
        scores=np.ascontiguousarray(scored.scores[:, columns]),
        kind=scored.kind,
        truth=np.array([[finding in row.present for finding in findings] for row in rows], np.bool_),
        patients=np.array([row.patient for row in rows], np.int64),
        sex=tuple(row.sex for row in rows),
        age_years=np.array([row.age_years for row in rows], np.float64),
        view=tuple(row.view for row in rows),
        unlabelled_findings=tuple(finding for finding in scored.findings if finding not in label_findings),
        ignored=scored.ignored,
        n_not_predicted=len(labelled) - len(scored.names),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    names: tuple[str, ...]
    findings: tuple[str, ...]
    scores: NDArray[np.float64]
    kind: ScoreKind
    ignored: tuple[str, ...]


def _read_scores(path: Path) -> _Scored:
    rows = read_rows(path)
    header = next(rows)
    image = require_column(header, IMAGE_COLUMNS, IMAGE_COLUMN_NEEDED)
    wide = find_findings(header, SCORE_WORDS)
    if wide:
        kinds = {_kind_of(header.fields[place]) for place in wide.values()}
        if len(kinds) > 1:
            columns = [header.fields[place] for place in wide.values()]
            raise header.error(f"the columns {quote_some(columns)}", "scores of one kind, probabilities or logits")
        stated = kinds.pop()
        used = {image, *wide.values()}
        cells = (
            (row, row.fields[image], finding, row.fields[place]) for row in rows for finding, place in wide.items()
        )
    else:
        needed = f"columns named by finding (prob_{FINDINGS[0]}, ...), or two columns finding and score"
        finding_place = require_column(header, _FINDING_COLUMNS, needed)
        score_place = require_column(header, SCORE_WORDS, needed)
        stated = _kind_of(header.fields[score_place])
        used = {image, finding_place, score_place}
        cells = ((row, row.fields[image], row.fields[finding_place], row.fields[score_place]) for row in rows)
    names, findings, scores, unknown = _collect(path, cells)
    outside = (scores < 0.0) | (scores > 1.0)
    if stated == "probability" and outside.any():
        n, c = (int(index[0]) for index in np.nonzero(outside))
        raise DatasetError(
            f"{path}: found the probability {scores[n, c]:g} of {findings[c]} for {names[n]}; needed 0 to 1. "
            f"Next: write probabilities, or name the column logit or score."
        )
    unused = [name for place, name in enumerate(header.fields) if place not in used and name]
    kind: ScoreKind = "probability" if stated == "score" and not outside.any() else stated
    return _Scored(names, findings, scores, kind, (*unused, *unknown))


def _collect(
    path: Path, cells: Iterable[tuple[Row, str, str, str]]
) -> tuple[tuple[str, ...], tuple[str, ...], NDArray[np.float64], tuple[str, ...]]:
    """Return images, findings, scores [N, C] and the names that are no finding, out of (row, image, finding, score)."""
    by_image: dict[str, dict[str, float]] = {}
    seen: dict[str, str | None] = {}  # the few finding names as written -> the name of ours, if any
    for row, raw_image, written, text in cells:
        image = raw_image.strip()
        scores = by_image.setdefault(image, {})
        if written not in seen:
            seen[written] = FINDING_BY_LETTERS.get(letters_of(written))
        finding = seen[written]
        if finding is None:
            continue
        if finding in scores:
            raise row.error(f"{finding} of {image} a second time", "each image once, with each finding once")
        scores[finding] = _to_score(row, image, finding, text)
    findings = tuple(finding for finding in FINDINGS if finding in seen.values())
    unknown = tuple(written for written, finding in seen.items() if finding is None)
    if not findings:
        raise DatasetError(
            f"{path}: found the findings {quote_some(unknown)}; needed names out of {', '.join(FINDINGS)}. "
            f"Next: use these names."
        )
    for image, scores in by_image.items():
        if len(scores) < len(findings):
            missing = next(finding for finding in findings if finding not in scores)
            raise DatasetError(
                f"{path}: found no score of {missing} for {image}; needed all {len(findings)} findings of every image. "
                f"Next: add the missing rows."
            )
    matrix = np.array([[scores[finding] for finding in findings] for scores in by_image.values()], np.float64)
    return tuple(by_image), findings, matrix, unknown


def _to_score(row: Row, image: str, finding: str, text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    # Python's float takes 1_000 too, which no table means.
    if not math.isfinite(score) or "_" in text:
        raise row.error(f"the score {text!r} of {finding} for {image}", "a finite number")
    return score


def _kind_of(column: str) -> ScoreKind:
    """Say what a column's name says of its scores; "score" where it says nothing."""
    letters = letters_of(column)
    bare = next((letters.replace(finding, "", 1) for finding in FINDING_BY_LETTERS if finding in letters), letters)
    if bare in ("prob", "proba", "probability"):
        return "probability"
    return "logit" if bare == "logit" else "score"
