"""The ChestX-ray14 data set on disk: its table, official split, patients and boxes (Wang et al. 2017, CVPR).

Never reads an image's bytes, never repairs a table: what contradicts itself is refused with its row. The patient is the
unit of every split. On disk, under one root:

    Data_Entry_2017_v2020.csv    or Data_Entry_2017.csv; where both are there the corrected v2020 is read, the other not
    train_val_list.txt, test_list.txt      the official split
    BBox_List_2017.csv           boxes drawn by a radiologist; optional
    images/, images_*/, images_*/images/   PNG files in any of them, as the archive's parts unpack

Rows without an image are counted (`n_absent`), for few people keep all 42 GB. PNG files without a row are ignored.
"""

import csv
import hashlib
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import DatasetError
from chexnet_deploy.findings import FINDINGS, NO_FINDING

Split: TypeAlias = Literal["train", "val", "test"]

TABLES: Final = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
"""In the order of preference: NIH corrected labels, ages and sexes in 2020."""
TRAIN_VAL_LIST: Final = "train_val_list.txt"
TEST_LIST: Final = "test_list.txt"
BOXES: Final = "BBox_List_2017.csv"

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


@dataclass(frozen=True, slots=True)
class Box:
    """Where a radiologist saw one finding; pixels of the 1024 x 1024 image, origin at the top left."""

    finding: str
    x_px: float
    y_px: float
    width_px: float
    height_px: float


@dataclass(frozen=True, slots=True, eq=False)
class ChestXray14:
    """The data set under one root; made by `ChestXray14.open`.

    Attributes:
        root: the folder.
        table: the table that was read.
        radiographs: every row, in the table's order.
        n_absent: rows whose image is not on disk.
        n_unlisted: rows in neither official list; they belong to no split.
        boxes: image -> its boxes, in the list's order; empty without BBox_List_2017.csv.
        listed: split -> every name it has, on disk or not, in list order.
    """

    root: Path
    table: Path
    radiographs: tuple[Radiograph, ...]
    n_absent: int
    n_unlisted: int
    boxes: Mapping[str, tuple[Box, ...]]
    listed: Mapping[str, tuple[str, ...]]
    _by_image: Mapping[str, Radiograph]

    @classmethod
    def open(cls, root: Path) -> "ChestXray14":
        """Read and cross-check the tables and find the images.

        Args:
            root: the folder that holds the table.

        Raises:
            DatasetError: a file is missing or wrong, or two files contradict each other.
        """
        table = _find_table(root)
        by_image = _read_table(table, _find_images(root))
        listed = _read_split(root, by_image)
        return cls(
            root=root,
            table=table,
            radiographs=tuple(by_image.values()),
            n_absent=sum(radiograph.path is None for radiograph in by_image.values()),
            n_unlisted=len(by_image) - sum(len(names) for names in listed.values()),
            boxes=_read_boxes(root / BOXES, by_image),
            listed=listed,
            _by_image=MappingProxyType(by_image),
        )

    def split(self, name: Split) -> tuple[Radiograph, ...]:
        """Return the images of one split that are on disk, in the order of the official list.

        "test" is the official test list; "val" the `is_validation_patient` part of train_val; "train" the rest of it.
        """
        if name not in self.listed:
            raise DatasetError(f"Found split {name!r}; needed train, val or test. Next: correct the name.")
        radiographs = (self._by_image[image] for image in self.listed[name])
        return tuple(radiograph for radiograph in radiographs if radiograph.path is not None)

    def select(self, images: Sequence[str]) -> tuple[Radiograph, ...]:
        """Return the named images in the order given.

        Raises:
            DatasetError: a name has no row, or its image is not on disk.
        """
        unknown = [image for image in images if image not in self._by_image]
        if unknown:
            raise DatasetError(
                f"{self.table}: found no row for {_some(unknown)}; needed a row for each of the {len(images)} names. "
                f"Next: check that the list belongs to this data set."
            )
        chosen = tuple(self._by_image[image] for image in images)
        absent = [radiograph.image for radiograph in chosen if radiograph.path is None]
        if absent:
            raise DatasetError(
                f"{self.root}: found no file for {_some(absent)}; needed all {len(images)} images. "
                f"Next: unpack them into images/ or shorten the list."
            )
        return chosen

    def split_sha256(self) -> str:
        r"""Return the SHA-256 of the split as it stands on disk.

        Hashed is one line "train 00000002_000.png\n" for each image of `split("train")`, then "val", then "test", in
        their order, so a reordered list, another validation rule and an image more or less all change it.
        """
        digest = hashlib.sha256()
        for name in ("train", "val", "test"):
            for radiograph in self.split(name):
                digest.update(f"{name} {radiograph.image}\n".encode("ascii"))
        return digest.hexdigest()


def truth(radiographs: Sequence[Radiograph]) -> NDArray[np.bool_]:
    """Return [N, 14] bool, True where the finding is present; columns in FINDINGS order."""
    present = [[finding in radiograph.findings for finding in FINDINGS] for radiograph in radiographs]
    return np.array(present, np.bool_).reshape(len(radiographs), len(FINDINGS))


def is_validation_patient(patient: int) -> bool:
    """Say whether a train_val patient belongs to the validation split; one in ten does.

    The rule never changes: the SHA-256 of the number in decimal ASCII digits, its first 8 bytes as a big-endian
    integer, divisible by 10. It needs no seed and no list, and adding patients moves none.
    """
    return int.from_bytes(hashlib.sha256(str(patient).encode("ascii")).digest()[:8], "big") % 10 == 0


def read_image_list(path: Path) -> tuple[str, ...]:
    """Return the names in a list, in its order.

    One name a line; blank lines, blanks around a name, a byte order mark and CRLF are allowed.

    Raises:
        DatasetError: the file can't be read, names no image, names one twice, or a line is not an image name.
    """
    rows: dict[str, int] = {}
    for row, line in enumerate(_read_text(path).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        if not _IMAGE_NAME.fullmatch(name):
            raise _row_error(path, row, f"{name!r}", "an image name like 00000002_000.png")
        if name in rows:
            raise _row_error(path, row, f"{name} again (first in row {rows[name]})", "each name once")
        rows[name] = row
    if not rows:
        raise DatasetError(f"{path}: found no image name; needed at least one. Next: copy the list again.")
    return tuple(rows)


def _row_error(path: Path, row: int, found: str, needed: str) -> DatasetError:
    """Row 1 is the first line of the file, as editors and spreadsheets count."""
    found = found if len(found) <= 200 else f"{found[:200]}..."
    return DatasetError(f"{path}, row {row}: found {found}; needed {needed}. Next: correct the row or copy it again.")


def _some(names: Sequence[object]) -> str:
    shown = ", ".join(str(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5:,} more"


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise DatasetError(f"{path}: found no such file; needed a text file. Next: check the path.")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise DatasetError(f"{path}: found {err}; needed readable UTF-8 text. Next: copy the file again.") from err


def _find_table(root: Path) -> Path:
    for name in TABLES:
        if (root / name).is_file():
            return root / name
    raise DatasetError(
        f"{root}: found none of {', '.join(TABLES)}; needed one of them directly in this folder. "
        f"Next: give the folder that holds the ChestX-ray14 table."
    )


def _find_images(root: Path) -> dict[str, Path]:
    """Return file name -> path over every image folder, without opening a file."""
    folders = [root / "images"]
    for part in sorted(root.glob("images_*")):
        folders += [part, part / "images"]
    paths: dict[str, Path] = {}
    for folder in filter(Path.is_dir, folders):
        try:
            with os.scandir(folder) as entries:
                # is_file: git-annex and DVC leave broken links where a file was not fetched.
                names = [entry.name for entry in entries if entry.name.endswith(".png") and entry.is_file()]
        except OSError as err:
            raise DatasetError(
                f"{folder}: found {err}; needed a readable folder. Next: check its permissions."
            ) from err
        for name in names:
            if name in paths:
                raise DatasetError(
                    f"{folder / name}: found the same name in {paths[name].parent}; needed each image once. "
                    f"Next: remove the wrong one."
                )
            paths[name] = folder / name
    return paths


def _read_rows(path: Path, columns: Sequence[Sequence[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield (row number, values of the columns) for every row that is not blank."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        places = []
        for names in columns:
            place = next((header.index(name) for name in names if name in header), None)
            if place is None:
                found = "columns " + ", ".join(filter(None, header)) if any(header) else "no column names"
                raise _row_error(path, 1, found, f"a column {' or '.join(names)}, separated by commas")
            places.append(place)
        # The first release ends its header, its rows or both with a comma; such empty fields mean nothing.
        width = len(header)
        while not header[width - 1]:
            width -= 1
        n_rows = 0
        for fields in reader:
            if not fields:
                continue
            if len(fields) < width or any(fields[width:]):
                raise _row_error(path, reader.line_num, f"{len(fields)} fields", f"{width}, as the header has")
            n_rows += 1
            yield reader.line_num, [fields[place] for place in places]
    except csv.Error as err:
        raise _row_error(path, reader.line_num, f"a broken row ({err})", "comma-separated values") from err
    if not n_rows:
        raise DatasetError(f"{path}: found a header and no row; needed at least one. Next: copy the file again.")


def _read_table(path: Path, images: Mapping[str, Path]) -> dict[str, Radiograph]:
    radiographs: dict[str, Radiograph] = {}
    findings_of: dict[str, frozenset[str]] = {}  # the same few hundred label fields come again and again
    for row, (image, labels, patient, age, sex, view) in _read_rows(path, _COLUMNS):
        name = _IMAGE_NAME.fullmatch(image)
        if not name:
            raise _row_error(path, row, f"{image!r}", "an image name like 00000002_000.png")
        if image in radiographs:
            raise _row_error(path, row, f"{image} a second time", "one row an image")
        if not _PATIENT.fullmatch(patient) or int(patient) != int(name[1]):
            raise _row_error(path, row, f"Patient ID {patient!r} for {image}", f"the same patient, {int(name[1])}")
        if labels not in findings_of:
            findings_of[labels] = _parse_findings(path, row, labels)
        if sex not in ("F", "M"):
            raise _row_error(path, row, f"sex {sex!r}", "F or M")
        if view not in ("AP", "PA"):
            raise _row_error(path, row, f"view {view!r}", "AP or PA")
        radiographs[image] = Radiograph(
            image=image,
            patient=int(patient),
            findings=findings_of[labels],
            age_years=_parse_age_years(path, row, age),
            sex=cast(Literal["F", "M"], sex),
            view=cast(Literal["AP", "PA"], view),
            path=images.get(image),
        )
    return radiographs


def _parse_findings(path: Path, row: int, labels: str) -> frozenset[str]:
    names = labels.split("|")
    if names == [NO_FINDING]:
        return frozenset()
    for name in names:
        if name == NO_FINDING:
            raise _row_error(path, row, f"{labels!r}", f"{NO_FINDING} alone or findings alone")
        if name not in FINDINGS:
            raise _row_error(path, row, f"finding {name!r}", f"{NO_FINDING} or names out of {', '.join(FINDINGS)}")
    if len(set(names)) < len(names):
        raise _row_error(path, row, f"{labels!r}", "each finding once")
    return frozenset(names)


def _parse_age_years(path: Path, row: int, age: str) -> int:
    """Return whole years of "58", "058Y", "018M" (months) or "011D" (days), as the two releases write them."""
    match = _AGE.fullmatch(age)
    if not match:
        raise _row_error(path, row, f"age {age!r}", "an age like 58 or 058Y")
    return int(match[1]) // {"": 1, "Y": 1, "M": 12, "D": 365}[match[2]]


def _read_split(root: Path, by_image: Mapping[str, Radiograph]) -> Mapping[str, tuple[str, ...]]:
    """Return train, val and test names; the patients of any two are disjoint."""
    lists = {name: read_image_list(root / name) for name in (TRAIN_VAL_LIST, TEST_LIST)}
    for name, images in lists.items():
        unknown = [image for image in images if image not in by_image]
        if unknown:
            raise DatasetError(
                f"{root / name}: found {_some(unknown)} without a row in the table; needed a row for every listed "
                f"image. Next: take the list and the table from the same release."
            )
    train_val, test = lists[TRAIN_VAL_LIST], lists[TEST_LIST]
    twice = sorted(set(train_val) & set(test))
    if twice:
        raise DatasetError(
            f"{root / TEST_LIST}: found {_some(twice)} in {TRAIN_VAL_LIST} too; needed each image in one list. "
            f"Next: restore the official lists."
        )
    shared = sorted({by_image[image].patient for image in train_val} & {by_image[image].patient for image in test})
    if shared:
        raise DatasetError(
            f"{root / TEST_LIST}: found patients {_some(shared)} in {TRAIN_VAL_LIST} too; needed each patient in one "
            f"list. Next: restore the official lists, which share none."
        )
    val_patients = {
        number for number in {by_image[image].patient for image in train_val} if is_validation_patient(number)
    }
    return MappingProxyType(
        {
            "train": tuple(image for image in train_val if by_image[image].patient not in val_patients),
            "val": tuple(image for image in train_val if by_image[image].patient in val_patients),
            "test": test,
        }
    )


def _read_boxes(path: Path, by_image: Mapping[str, Radiograph]) -> Mapping[str, tuple[Box, ...]]:
    boxes: dict[str, tuple[Box, ...]] = {}
    if not path.exists():
        return MappingProxyType(boxes)
    for row, (image, label, *numbers) in _read_rows(path, _BOX_COLUMNS):
        finding = _BOX_FINDING_NAMES.get(label, label)
        if image not in by_image:
            raise _row_error(path, row, f"{image!r}, which has no row in the table", "an image of the table")
        if finding not in FINDINGS:
            raise _row_error(path, row, f"finding {label!r}", f"a name out of {', '.join(FINDINGS)}")
        try:
            x_px, y_px, width_px, height_px = (float(number) for number in numbers)
        except ValueError as err:
            raise _row_error(path, row, f"box {numbers}", "four numbers x, y, w, h") from err
        if not (0 <= x_px < math.inf and 0 <= y_px < math.inf and 0 < width_px < math.inf and 0 < height_px < math.inf):
            raise _row_error(path, row, f"box {numbers}", "x and y of at least 0, w and h above 0, all finite")
        box = Box(finding, x_px, y_px, width_px, height_px)
        if box in boxes.get(image, ()):
            raise _row_error(path, row, f"the same box of {image} a second time", "each box once")
        boxes[image] = (*boxes.get(image, ()), box)
    return MappingProxyType(boxes)
