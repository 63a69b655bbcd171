"""Read anyone's labels: NIH's table, or a CSV with an image column, one of 0 and 1 for each finding, and patients.

Repairs nothing: an image without a patient, or with another than its name says, is refused. Columns are found by name;
capitals, blanks and underscores don't matter.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from chexnet_deploy.csvfiles import Row, find_column, find_findings, read_rows, require_column
from chexnet_deploy.findings import FINDINGS
from chexnet_deploy.tables import patient_of, read_table

Sex: TypeAlias = Literal["F", "M", "unknown"]
View: TypeAlias = Literal["AP", "PA", "unknown"]

IMAGE_COLUMNS: Final = ("imageindex", "image", "imageid", "imagename", "filename", "file")
IMAGE_COLUMN_NEEDED: Final = "an image column such as Image Index or image"
_LABEL_WORDS: Final = ("label", "true", "truth", "target", "gt")
_PATIENT_COLUMNS: Final = ("patientid", "patient", "subjectid", "subject")
_SEX_COLUMNS: Final = ("patientsex", "patientgender", "sex", "gender")
_AGE_COLUMNS: Final = ("patientage", "age", "ageyears")
_VIEW_COLUMNS: Final = ("viewposition", "view")
_TRUTH: Final = dict.fromkeys(("0", "0.0", "no", "false"), False) | dict.fromkeys(("1", "1.0", "yes", "true"), True)
_NUMBER: Final = re.compile(r"(\d{1,18})(\.0)?", re.ASCII)  # pandas writes whole numbers as 12.0 beside a gap


@dataclass(frozen=True, slots=True)
class ImageLabel:
    """What the labels say of one image; the findings present, and the rest as in predictions.LabelledScores."""

    present: Collection[str]
    patient: int
    sex: Sex
    age_years: float
    view: View


def read_labels(path: Path) -> tuple[Mapping[str, ImageLabel], tuple[str, ...]]:
    """Return image -> label, and the findings that are labelled, in canonical order.

    Args:
        path: NIH's table, or a wide CSV. Without a patient column the patient is the number in an NIH image name.

    Raises:
        DatasetError: the file can't be read, lacks a column or holds what can't be right.
    """
    rows = read_rows(path)
    header = next(rows)
    if "Finding Labels" in header.fields:
        table = read_table(path, {})
        official = {
            name: ImageLabel(row.findings, row.patient, row.sex, float(row.age_years), row.view)
            for name, row in table.items()
        }
        return official, FINDINGS
    image = require_column(header, IMAGE_COLUMNS, IMAGE_COLUMN_NEEDED)
    columns = find_findings(header, _LABEL_WORDS)
    if not columns:
        raise header.column_error("NIH's column Finding Labels, or columns of 0 and 1 named by finding")
    patient = find_column(header, _PATIENT_COLUMNS)
    others = [find_column(header, names) for names in (_SEX_COLUMNS, _AGE_COLUMNS, _VIEW_COLUMNS)]
    labelled: dict[str, ImageLabel] = {}
    for row in rows:
        fields = row.fields
        name = fields[image].strip()
        if name in labelled:
            raise row.error(f"{name} a second time", "one row an image")
        truth = {finding: _TRUTH.get(fields[place].strip().lower()) for finding, place in columns.items()}
        for finding, present in truth.items():
            if present is None:
                raise row.error(f"{finding} {fields[columns[finding]]!r} for {name}", "0 or 1")
        sex, age, view = ("" if place is None else fields[place].strip().upper() for place in others)
        labelled[name] = ImageLabel(
            present=frozenset(finding for finding, present in truth.items() if present),
            patient=_to_patient(row, name, None if patient is None else fields[patient].strip()),
            sex="F" if sex in ("F", "FEMALE") else "M" if sex in ("M", "MALE") else "unknown",
            age_years=float(age) if _NUMBER.fullmatch(age) else float("nan"),
            view="AP" if view == "AP" else "PA" if view == "PA" else "unknown",
        )
    return labelled, tuple(columns)


def _to_patient(row: Row, image: str, stated: str | None) -> int:
    named = patient_of(image)
    if stated is None and named is not None:
        return named
    if not stated:
        # Images of one patient are alike; without patients every interval would be too narrow.
        raise row.error(f"no patient for {image}", "a column Patient ID, or image names like 00000002_000.png")
    number = _NUMBER.fullmatch(stated)
    if named is not None and (number is None or int(number[1]) != named):
        raise row.error(f"patient {stated!r} for {image}", f"the patient in the name, {named}")
    if number:
        return int(number[1])
    return int.from_bytes(hashlib.sha256(stated.encode()).digest()[:8], "big") >> 1
