"""Read anyone's predictions beside labels: a CSV file in, scores and truth in one order out.

Computes no statistics and repairs nothing: a score that is no number, a hole or an image without a label is refused.
Columns are found by name; capitals, blanks and underscores don't matter. Predictions have one of two shapes:

    wide    Image Index, prob_Atelectasis, prob_Cardiomegaly, ...     a prefix or suffix out of SCORE_WORDS, or none
    long    image, finding, score                                     every image with every finding, once

Rows that `predict --out` quarantined (a column status says so) have no score: they are left out and counted.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.datasets.csv_rows import (
    FINDING_BY_LETTERS,
    Row,
    find_column,
    find_findings,
    image_name,
    letters_of,
    read_rows,
    require_column,
)
from chexnet_deploy.datasets.data_set import DataSet
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.labelled import Sex, View
from chexnet_deploy.datasets.table_columns import IMAGE_COLUMN_NEEDED, IMAGE_COLUMNS
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.inputs import quote_some

ScoreKind: TypeAlias = Literal["probability", "logit", "score"]

SCORE_WORDS: Final = ("prob", "probability", "proba", "p", "logit", "score", "pred", "prediction")
QUARANTINED: Final = "quarantined"
"""In the column status, of an image that can't be read."""
_FINDING_COLUMNS: Final = ("finding", "label", "class", "pathology", "disease")


@dataclass(frozen=True, slots=True, eq=False)
class LabelledScores:
    """Scores with what the labels say of the same images, in the order of the predictions.

    Attributes:
        names: [N] image names.
        findings: [C] those that both files have.
        scores: float64 [N, C], finite.
        kind: "logit" where the columns say so; "probability" where every score is in 0..1; else "score". Brier score
            and calibration error have a meaning for probabilities only.
        truth: bool [N, C].
        is_labelled: bool [N, C]; a finding is measured on the images that are labelled for it.
        patients, sex, age_years, view: [N] as in LabelledImages.
        unlabelled_findings: predicted, but the labels have no such column; not in `findings`.
        ignored: columns, or findings of the long form, that name no finding.
        n_not_predicted: labelled images that the predictions leave out.
        n_quarantined: images that the predictions name, but couldn't read.
    """

    names: tuple[str, ...]
    findings: tuple[str, ...]
    scores: NDArray[np.float64]
    kind: ScoreKind
    truth: NDArray[np.bool_]
    is_labelled: NDArray[np.bool_]
    patients: NDArray[np.int64]
    sex: tuple[Sex, ...]
    age_years: NDArray[np.float64]
    view: tuple[View, ...]
    unlabelled_findings: tuple[str, ...]
    ignored: tuple[str, ...]
    n_not_predicted: int
    n_quarantined: int = 0


def read_predictions(predictions: Path, labels: DataSet) -> LabelledScores:
    """Return the predictions with their labels.

    A finding with one class only is not refused here: what is undefined on it is for the statistics to say.

    Args:
        predictions: wide or long CSV.
        labels: of these images; a finding has the name that it has there.

    Raises:
        DatasetError: a file can't be read, lacks a column or holds what can't be right, or the two don't fit.
    """
    table, images = labels.table, labels.images
    known = {letters_of(finding): finding for finding in (*images.findings, *images.refused)}
    scored = _read_scores(predictions, {**FINDING_BY_LETTERS, **known})
    row_of = {name: row for row, name in enumerate(images.names)}
    unknown = [name for name in scored.names if name not in row_of]
    if unknown:
        raise DatasetError(
            f"{predictions}: found {len(unknown):,} images without a row in {table}, e.g. {quote_some(unknown)}; "
            f"needed a label for each of the {len(scored.names):,}. Next: give the labels of these images, named alike."
        )
    columns = [c for c, finding in enumerate(scored.findings) if finding in known.values()]
    findings = tuple(scored.findings[c] for c in columns)
    if not findings:
        raise DatasetError(
            f"{predictions} scores {', '.join(scored.findings)}; {table} labels {', '.join(images.findings)}; needed "
            f"one in common. Next: give labels of the findings that were predicted."
        )
    images = images.take(np.array([row_of[name] for name in scored.names], np.intp)).for_findings(findings)
    return LabelledScores(
        names=scored.names,
        findings=findings,
        scores=np.ascontiguousarray(scored.scores[:, columns]),
        kind=scored.kind,
        truth=images.truth,
        is_labelled=images.labelled,
        patients=images.patients,
        sex=images.sex,
        age_years=images.age_years,
        view=images.view,
        unlabelled_findings=tuple(finding for finding in scored.findings if finding not in findings),
        ignored=scored.ignored,
        n_not_predicted=len(row_of) - len(scored.names),
        n_quarantined=scored.n_quarantined,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    names: tuple[str, ...]
    findings: tuple[str, ...]
    scores: NDArray[np.float64]
    kind: ScoreKind
    ignored: tuple[str, ...]
    n_quarantined: int


def _read_scores(path: Path, by_letters: Mapping[str, str]) -> _Scored:
    read = read_rows(path)
    header = next(read)
    status = find_column(header, ("status",))
    quarantined = set[str]()
    rows = read if status is None else _without_quarantined(read, header, status, quarantined)
    image = require_column(header, IMAGE_COLUMNS, IMAGE_COLUMN_NEEDED)
    wide = find_findings(header, SCORE_WORDS, by_letters)
    if wide:
        kinds = {_kind_of(header.fields[place], by_letters) for place in wide.values()}
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
        stated = _kind_of(header.fields[score_place], by_letters)
        used = {image, finding_place, score_place}
        cells = ((row, row.fields[image], row.fields[finding_place], row.fields[score_place]) for row in rows)
    names, findings, scores, unknown = _collect(path, cells, quarantined, by_letters)
    outside = (scores < 0.0) | (scores > 1.0)
    if stated == "probability" and outside.any():
        n, c = (int(index[0]) for index in np.nonzero(outside))
        raise DatasetError(
            f"{path}: found the probability {scores[n, c]:g} of {findings[c]} for {names[n]}; needed 0 to 1. "
            f"Next: write probabilities, or name the column logit or score."
        )
    unused = [name for place, name in enumerate(header.fields) if place not in used and name]
    kind: ScoreKind = "probability" if stated == "score" and not outside.any() else stated
    return _Scored(names, findings, scores, kind, (*unused, *unknown), len(quarantined))


def _without_quarantined(rows: Iterable[Row], header: Row, status: int, quarantined: set[str]) -> Iterator[Row]:
    """Yield the rows that have scores; the images of the others are added to `quarantined`."""
    image = require_column(header, IMAGE_COLUMNS, IMAGE_COLUMN_NEEDED)
    for row in rows:
        if row.fields[status] == QUARANTINED:
            quarantined.add(image_name(row.fields[image]))
        else:
            yield row


def _collect(
    path: Path, cells: Iterable[tuple[Row, str, str, str]], quarantined: Collection[str], by_letters: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...], NDArray[np.float64], tuple[str, ...]]:
    """Return images, findings, scores [N, C] and the names that are no finding, out of (row, image, finding, score).

    Raises:
        DatasetError: there is no finding, a hole, a score twice or none; all images are quarantined.
    """
    by_image: dict[str, dict[str, float]] = {}
    seen: dict[str, str | None] = {}  # the few finding names as written -> the name of ours, if any
    for row, raw_image, written, text in cells:
        image = image_name(raw_image)
        scores = by_image.setdefault(image, {})
        if written not in seen:
            seen[written] = by_letters.get(letters_of(written))
        finding = seen[written]
        if finding is None:
            continue
        if finding in scores:
            raise row.error(f"{finding} of {image} a second time", "each image once, with each finding once")
        scores[finding] = _to_score(row, image, finding, text)
    findings = tuple(finding for finding in by_letters.values() if finding in seen.values())
    unknown = tuple(written for written, finding in seen.items() if finding is None)
    if not by_image and quarantined:
        raise DatasetError(
            f"{path}: found that predict quarantined all {len(quarantined):,} images; needed a score of at least one. "
            f"Next: predict images that can be read."
        )
    if not findings:
        raise DatasetError(
            f"{path}: found the findings {quote_some(unknown)}; needed names out of {', '.join(by_letters.values())}. "
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


def _kind_of(column: str, by_letters: Mapping[str, str]) -> ScoreKind:
    """Say what a column's name says of its scores; "score" where it says nothing."""
    letters = letters_of(column)
    bare = next((letters.replace(finding, "", 1) for finding in by_letters if finding in letters), letters)
    if bare in ("prob", "proba", "probability"):
        return "probability"
    return "logit" if bare == "logit" else "score"
