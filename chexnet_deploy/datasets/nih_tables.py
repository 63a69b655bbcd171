"""One file of ChestX-ray14's tables and lists -> checked rows: labels, boxes, image names.

Knows nothing of splits or of what is on disk beside the file: see chestxray14.py. Repairs nothing: a row that can't be
right is refused with its number.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, cast

from chexnet_deploy.datasets.csv_rows import Row, read_columns
from chexnet_deploy.datasets.findings import FINDINGS, NO_FINDING
from chexnet_deploy.metrics.localization import Box

_IMAGE_NAME: Final = re.compile(r"(\d{8})_\d{3}\.png", re.ASCII)
_PATIENT: Final = re.compile(r"\d{1,8}", re.ASCII)
_AGE: Final = re.compile(r"(\d{1,4})([YMD]?)", re.ASCII)
# NIH renamed the sex column between downloads of the same table.
_COLUMNS: Final = (
    ("Image Index",),
    ("Finding Labels",),
    ("Patient ID",),
    ("Patient Age",),
    ("Patient Gender", "Patient Sex"),
    ("View Position",),
)
_BOX_COLUMNS: Final = (("Image Index",), ("Finding Label",), ("Bbox [x",), ("y",), ("w",), ("h]",))
_BOX_FINDING_NAMES: Final = MappingProxyType({"Infiltrate": "Infiltration"})  # the box list's own spelling


@dataclass(frozen=True, slots=True)
class Radiograph:
    """One row of the table.

    Attributes:
        image: file name, "00000002_000.png".
        patient: the number in the name and in the Patient ID column.
        findings: names out of FINDINGS; empty for "No Finding".
        age_years: as the table says, even 411: the first release has such ages, and nothing here computes with them.
        sex: as the table says.
        view: both are frontal: AP is taken lying or sitting, PA standing.
        path: None where the table lists an image that is not on disk.
    """

    image: str
    patient: int
    findings: frozenset[str]
    age_years: int
    sex: Literal["F", "M"]
    view: Literal["AP", "PA"]
    path: Path | None


def read_table(path: Path, images: Mapping[str, Path]) -> dict[str, Radiograph]:
    """Return image name -> its row of Data_Entry_2017*.csv, in the table's order.

    Args:
        path: of the table.
        images: image name -> path, of the images on disk.

    Raises:
        DatasetError: the file can't be read, a column is missing or a row can't be right.
    """
    radiographs: dict[str, Radiograph] = {}
    findings_of: dict[str, frozenset[str]] = {}  # the same few hundred label fields come again and again
    for row in read_columns(path, _COLUMNS):
        image, labels, patient, age, sex, view = row.fields
        if image in radiographs:
            raise row.error(f"{image} a second time", "one row an image")
        number = check_patient(row, image, patient)
        if labels not in findings_of:
            findings_of[labels] = _parse_findings(row, labels)
        if sex not in ("F", "M"):
            raise row.error(f"sex {sex!r}", "F or M")
        if view not in ("AP", "PA"):
            raise row.error(f"view {view!r}", "AP or PA")
        radiographs[image] = Radiograph(
            image=image,
            patient=number,
            findings=findings_of[labels],
            age_years=_parse_age_years(row, age),
            sex=cast(Literal["F", "M"], sex),
            view=cast(Literal["AP", "PA"], view),
            path=images.get(image),
        )
    return radiographs


def read_boxes(path: Path, by_image: Mapping[str, Radiograph]) -> Mapping[str, tuple[Box, ...]]:
    """Return image name -> its boxes, in the order of BBox_List_2017.csv; empty where there is no such file.

    Raises:
        DatasetError: as read_table; or a box is of an image that the table lacks.
    """
    boxes: dict[str, tuple[Box, ...]] = {}
    if not path.exists():
        return MappingProxyType(boxes)
    for row in read_columns(path, _BOX_COLUMNS):
        image, label, *numbers = row.fields
        finding = _BOX_FINDING_NAMES.get(label, label)
        if image not in by_image:
            raise row.error(f"{image!r}, which has no row in the table", "an image of the table")
        if finding not in FINDINGS:
            raise row.error(f"finding {label!r}", f"a name out of {', '.join(FINDINGS)}")
        try:
            x_px, y_px, width_px, height_px = (float(number) for number in numbers)
        except ValueError as err:
            raise row.error(f"box {numbers}", "four numbers x, y, w, h") from err
        if not (0 <= x_px < math.inf and 0 <= y_px < math.inf and 0 < width_px < math.inf and 0 < height_px < math.inf):
            raise row.error(f"box {numbers}", "x and y of at least 0, w and h above 0, all finite")
        box = Box(finding, x_px, y_px, width_px, height_px)
        if box in boxes.get(image, ()):
            raise row.error(f"the same box of {image} a second time", "each box once")
        boxes[image] = (*boxes.get(image, ()), box)
    return MappingProxyType(boxes)


def patient_of(image: str) -> int | None:
    """Return the patient number in an image name like 00000002_000.png; None where the name has another form."""
    name = _IMAGE_NAME.fullmatch(image)
    return int(name[1]) if name else None


def check_image(row: Row, image: str) -> int:
    """Return the patient's number in an image's name; refuse another name."""
    patient = patient_of(image)
    if patient is None:
        raise row.error(f"{image!r}", "an image name like 00000002_000.png")
    return patient


def check_patient(row: Row, image: str, patient: str) -> int:
    """Return the patient's number, which the image's name and the Patient ID column must both say."""
    number = check_image(row, image)
    if not _PATIENT.fullmatch(patient) or int(patient) != number:
        raise row.error(f"Patient ID {patient!r} for {image}", f"the same patient, {number}")
    return number


def _parse_findings(row: Row, labels: str) -> frozenset[str]:
    names = labels.split("|")
    if names == [NO_FINDING]:
        return frozenset()
    for name in names:
        if name == NO_FINDING:
            raise row.error(f"{labels!r}", f"{NO_FINDING} alone or findings alone")
        if name not in FINDINGS:
            raise row.error(f"finding {name!r}", f"{NO_FINDING} or names out of {', '.join(FINDINGS)}")
    if len(set(names)) < len(names):
        raise row.error(f"{labels!r}", "each finding once")
    return frozenset(names)


def _parse_age_years(row: Row, age: str) -> int:
    """Return whole years of "58", "058Y", "018M" (months) or "011D" (days), as the two releases write them."""
    match = _AGE.fullmatch(age)
    if not match:
        raise row.error(f"age {age!r}", "an age like 58 or 058Y")
    return int(match[1]) // {"": 1, "Y": 1, "M": 12, "D": 365}[match[2]]
