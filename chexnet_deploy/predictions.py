"""Read anyone's predictions beside anyone's labels: two CSV files in, scores and truth in one order out.

Computes no statistics and repairs nothing: a score that is no number, a hole or an image without a label is refused.
Two shapes of predictions are understood, by the names in the header; capitals, blanks and underscores don't matter:

    wide    Image Index, prob_Atelectasis, prob_Cardiomegaly, ...     a prefix or suffix out of SCORE_WORDS, or none
    long    image, finding, score                                     every image with every finding, once

Labels are NIH's Data_Entry_2017*.csv, or wide: an image column, one column of 0 and 1 for each finding, and patients.
"""

import csv
import hashlib
import io
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final, Literal, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import DatasetError
from chexnet_deploy.findings import FINDINGS
from chexnet_deploy.splits import patient_of
from chexnet_deploy.tables import read_table

ScoreKind: TypeAlias = Literal["probability", "logit", "score"]
Sex: TypeAlias = Literal["F", "M", "unknown"]
View: TypeAlias = Literal["AP", "PA", "unknown"]

SCORE_WORDS: Final = ("prob", "probability", "proba", "p", "logit", "score", "pred", "prediction")
_LABEL_WORDS: Final = ("label", "true", "truth", "target", "gt")
_IMAGE_COLUMNS: Final = ("imageindex", "image", "imageid", "imagename", "filename", "file")
_PATIENT_COLUMNS: Final = ("patientid", "patient", "subjectid", "subject")
_FINDING_COLUMNS: Final = ("finding", "label", "class", "pathology", "disease")
_SEX_COLUMNS: Final = ("patientsex", "patientgender", "sex", "gender")
_AGE_COLUMNS: Final = ("patientage", "age", "ageyears")
_VIEW_COLUMNS: Final = ("viewposition", "view")
_BY_KEY: Final = {re.sub(r"[^a-z]", "", finding.lower()): finding for finding in FINDINGS}
_TRUTH: Final = dict.fromkeys(("0", "0.0", "no", "false"), False) | dict.fromkeys(("1", "1.0", "yes", "true"), True)
_NUMBER: Final = re.compile(r"(\d{1,18})(\.0)?", re.ASCII)  # pandas writes whole numbers as 12.0 beside a gap


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
    labelled, label_findings = _read_labels(labels)
    unknown = [name for name in scored.names if name not in labelled]
    if unknown:
        raise DatasetError(
            f"{predictions}: found {len(unknown):,} images without a row in {labels}, e.g. {_some(unknown)}; needed a "
            f"label for each of the {len(scored.names):,}. Next: give the labels of these images, named alike."
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


@dataclass(frozen=True, slots=True)
class _Labelled:
    present: Collection[str]
    patient: int
    sex: Sex
    age_years: float
    view: View


def _read_scores(path: Path) -> _Scored:
    header, rows = _read_csv(path)
    image = _require_column(path, header, _IMAGE_COLUMNS, "an image column such as Image Index or image")
    wide = _find_findings(path, header, SCORE_WORDS)
    if wide:
        kinds = {_kind_of(header[place]) for place in wide.values()}
        if len(kinds) > 1:
            columns = [header[place] for place in wide.values()]
            _refuse_header(path, columns, "scores of one kind, probabilities or logits")
        stated = kinds.pop()
        cells = (
            (row, fields[image], finding, fields[place]) for row, fields in rows for finding, place in wide.items()
        )
        unused = [name for place, name in enumerate(header) if place not in {image, *wide.values()} and name]
    else:
        needed = f"columns named by finding (prob_{FINDINGS[0]}, ...), or two columns finding and score"
        finding_place = _require_column(path, header, _FINDING_COLUMNS, needed)
        score_place = _require_column(path, header, SCORE_WORDS, needed)
        stated = _kind_of(header[score_place])
        cells = ((row, fields[image], fields[finding_place], fields[score_place]) for row, fields in rows)
        unused = [
            name for place, name in enumerate(header) if place not in {image, finding_place, score_place} and name
        ]
    names, findings, scores, unknown = _collect(path, cells)
    outside = (scores < 0.0) | (scores > 1.0)
    if stated == "probability" and outside.any():
        n, c = (int(index[0]) for index in np.nonzero(outside))
        raise DatasetError(
            f"{path}: found the probability {scores[n, c]:g} of {findings[c]} for {names[n]}; needed 0 to 1. "
            f"Next: write probabilities, or name the column logit or score."
        )
    kind: ScoreKind = "probability" if stated == "score" and not outside.any() else stated
    return _Scored(names, findings, scores, kind, (*unused, *unknown))


def _collect(
    path: Path, cells: Iterable[tuple[int, str, str, str]]
) -> tuple[tuple[str, ...], tuple[str, ...], NDArray[np.float64], tuple[str, ...]]:
    """Return images, findings, scores [N, C] and the names that are no finding, out of (row, image, finding, score)."""
    by_image: dict[str, dict[str, float]] = {}
    seen: dict[str, str | None] = {}  # the few finding names as written -> the name of ours, if any
    for row, raw_image, written, text in cells:
        image = raw_image.strip()
        scores = by_image.setdefault(image, {})
        if written not in seen:
            seen[written] = _BY_KEY.get(_key(written))
        finding = seen[written]
        if finding is None:
            continue
        if finding in scores:
            _refuse_row(path, row, f"{finding} of {image} a second time", "each image once, with each finding once")
        scores[finding] = _to_score(path, row, image, finding, text)
    findings = tuple(finding for finding in FINDINGS if finding in seen.values())
    unknown = tuple(written for written, finding in seen.items() if finding is None)
    if not findings:
        raise DatasetError(
            f"{path}: found the findings {_some(unknown)}; needed names out of {', '.join(FINDINGS)}. "
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


def _read_labels(path: Path) -> tuple[Mapping[str, _Labelled], tuple[str, ...]]:
    """Return image -> label, and the findings that are labelled."""
    header, rows = _read_csv(path)
    if "Finding Labels" in header:
        table = read_table(path, {})
        official = {
            name: _Labelled(row.findings, row.patient, row.sex, float(row.age_years), row.view)
            for name, row in table.items()
        }
        return official, FINDINGS
    image = _require_column(path, header, _IMAGE_COLUMNS, "an image column such as Image Index or image")
    columns = _find_findings(path, header, _LABEL_WORDS)
    if not columns:
        _refuse_header(path, header, "NIH's column Finding Labels, or columns of 0 and 1 named by finding")
    patient = _find_column(header, _PATIENT_COLUMNS)
    others = [_find_column(header, names) for names in (_SEX_COLUMNS, _AGE_COLUMNS, _VIEW_COLUMNS)]
    labelled: dict[str, _Labelled] = {}
    for row, fields in rows:
        name = fields[image].strip()
        if name in labelled:
            _refuse_row(path, row, f"{name} a second time", "one row an image")
        truth = {finding: _TRUTH.get(fields[place].strip().lower()) for finding, place in columns.items()}
        for finding, present in truth.items():
            if present is None:
                _refuse_row(path, row, f"{finding} {fields[columns[finding]]!r} for {name}", "0 or 1")
        sex, age, view = ("" if place is None else fields[place].strip().upper() for place in others)
        labelled[name] = _Labelled(
            present=frozenset(finding for finding, present in truth.items() if present),
            patient=_to_patient(path, row, name, None if patient is None else fields[patient].strip()),
            sex="F" if sex in ("F", "FEMALE") else "M" if sex in ("M", "MALE") else "unknown",
            age_years=float(age) if _NUMBER.fullmatch(age) else float("nan"),
            view="AP" if view == "AP" else "PA" if view == "PA" else "unknown",
        )
    return labelled, tuple(columns)


def _to_patient(path: Path, row: int, image: str, stated: str | None) -> int:
    named = patient_of(image)
    if stated is None and named is not None:
        return named
    if not stated:
        # Images of one patient are alike; without patients every interval would be too narrow.
        _refuse_row(path, row, f"no patient for {image}", "a column Patient ID, or image names like 00000002_000.png")
    number = _NUMBER.fullmatch(stated)
    if named is not None and (number is None or int(number[1]) != named):
        _refuse_row(path, row, f"patient {stated!r} for {image}", f"the patient in the name, {named}")
    if number:
        return int(number[1])
    return int.from_bytes(hashlib.sha256(stated.encode()).digest()[:8], "big") >> 1


def _to_score(path: Path, row: int, image: str, finding: str, text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    # Python's float takes 1_000 too, which no table means.
    if not math.isfinite(score) or "_" in text:
        _refuse_row(path, row, f"the score {text!r} of {finding} for {image}", "a finite number")
    return score


def _find_findings(path: Path, header: Sequence[str], words: Sequence[str]) -> dict[str, int]:
    """Return finding -> its column, in canonical order; a word before or after the finding's name is allowed."""
    places: dict[str, int] = {}
    for place, name in enumerate(header):
        key = _key(name)
        forms = {key, *(key.removeprefix(word) for word in words), *(key.removesuffix(word) for word in words)}
        for form in forms & _BY_KEY.keys():
            finding = _BY_KEY[form]
            if finding in places:
                _refuse_header(path, [header[places[finding]], name], f"one column of {finding}")
            places[finding] = place
    return {finding: places[finding] for finding in FINDINGS if finding in places}


def _find_column(header: Sequence[str], names: Sequence[str]) -> int | None:
    keys = [_key(name) for name in header]
    return next((keys.index(name) for name in names if name in keys), None)


def _require_column(path: Path, header: Sequence[str], names: Sequence[str], needed: str) -> int:
    place = _find_column(header, names)
    if place is None:
        _refuse_header(path, header, needed)
    return place


def _kind_of(column: str) -> ScoreKind:
    """Say what a column's name says of its scores; "score" where it says nothing."""
    key = _key(column)
    bare = next((key.replace(finding, "", 1) for finding in _BY_KEY if finding in key), key)
    if bare in ("prob", "proba", "probability"):
        return "probability"
    return "logit" if bare == "logit" else "score"


def _key(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _read_csv(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return the header and (row number, fields) of the rows that are not blank, at least one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise DatasetError(
            f"{path}: found {err}; needed readable UTF-8 text. Next: check the path and the file."
        ) from err
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)

    def checked() -> Iterator[tuple[int, list[str]]]:
        try:
            for fields in reader:
                if not fields:
                    continue
                if len(fields) < width or any(fields[width:]):
                    _refuse_row(path, reader.line_num, f"{len(fields)} fields", f"{width}, as the header has")
                yield reader.line_num, fields
        except csv.Error as err:
            raise DatasetError(f"{path}, row {reader.line_num}: found {err}. Next: write the file again.") from err

    try:
        header = next(reader, [])
    except csv.Error as err:
        raise DatasetError(f"{path}, row 1: found {err}. Next: write the file again.") from err
    while header and not header[-1].strip():  # NIH's first release ends its lines with commas; they mean nothing
        header.pop()
    width = len(header)
    rows = checked()
    first = next(rows, None)
    if first is None:
        found = "a header and no row" if any(header) else "no column names"
        raise DatasetError(f"{path}: found {found}; needed a header and a row an image. Next: write the file again.")
    return header, chain([first], rows)


def _refuse_header(path: Path, found: Sequence[str], needed: str) -> NoReturn:
    raise DatasetError(
        f"{path}: found the columns {_some(found)}; needed {needed}, separated by commas. "
        f"Next: rename or add the column."
    )


def _refuse_row(path: Path, row: int, found: str, needed: str) -> NoReturn:
    """Row 1 is the header, as editors and spreadsheets count."""
    raise DatasetError(f"{path}, row {row}: found {found}; needed {needed}. Next: correct the row or write it again.")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5:,} more"
