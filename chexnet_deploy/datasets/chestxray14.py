"""The ChestX-ray14 data set on disk: its table, official split, patients and boxes (Wang et al. 2017, CVPR).

Never reads an image's bytes, never repairs a table: what contradicts itself is refused with its row. The patient is the
unit of every split. On disk, under one root:

    Data_Entry_2017_v2020.csv    or Data_Entry_2017.csv; where both are there the corrected v2020 is read, the other not
    train_val_list.txt, test_list.txt      the official split
    BBox_List_2017.csv           boxes drawn by a radiologist; optional
    images*/                     image files anywhere below any of them, as NIH's and others' archives unpack; without such
                                 folders, anywhere below the root

A file is the image whose name its own has before the suffix: copies of the data set are also .PNG, or .jpg. Rows without an image
are counted (`n_absent`), for few people keep all 42 GB, and so are image files without a row.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.datasets.csv_rows import read_names
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.nih_tables import Radiograph, patient_of, read_boxes, read_table
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.inputs import IMAGE_SUFFIXES, name_some
from chexnet_deploy.metrics.localization import Box

Split: TypeAlias = Literal["train", "val", "test"]

SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")
TABLES: Final = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
"""In the order of preference: NIH corrected labels, ages and sexes in 2020."""
TRAIN_VAL_LIST: Final = "train_val_list.txt"
TEST_LIST: Final = "test_list.txt"
BOXES: Final = "BBox_List_2017.csv"


@dataclass(frozen=True, slots=True, eq=False)
class ChestXray14:
    """The data set under one root; made by `ChestXray14.open`.

    Attributes:
        root: the folder.
        table: the table that was read.
        radiographs: every row, in the table's order.
        n_absent: rows whose image is not on disk.
        strays: image files that have no row.
        n_unlisted: rows in neither official list; they belong to no split.
        boxes: image -> its boxes, in the list's order; empty without BBox_List_2017.csv.
        listed: split -> every name it has, on disk or not, in list order.
    """

    root: Path
    table: Path
    radiographs: tuple[Radiograph, ...]
    n_absent: int
    strays: tuple[Path, ...]
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
        images, strays = _find_images(root)
        by_image = read_table(table, images)
        strays += [path for name, path in images.items() if name not in by_image]
        listed = _read_split(root, by_image)
        return cls(
            root=root,
            table=table,
            radiographs=tuple(by_image.values()),
            n_absent=sum(radiograph.path is None for radiograph in by_image.values()),
            strays=tuple(strays),
            n_unlisted=len(by_image) - sum(len(names) for names in listed.values()),
            boxes=read_boxes(root / BOXES, by_image),
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

    def strays_in_words(self) -> str:
        """Return how many image files have no row, and some of their names."""
        return f"{len(self.strays):,} image files without a row in {self.table.name}: {name_some([p.name for p in self.strays])}"

    def left_out(self) -> tuple[str, ...]:
        """Return in words what is left out of the data set as it lies on disk."""
        absent = f"{self.n_absent:,} of {len(self.radiographs):,} rows of {self.table.name} have no image on disk"
        return (*([absent] if self.n_absent else []), *([self.strays_in_words()] if self.strays else []))


def truth(radiographs: Sequence[Radiograph]) -> NDArray[np.bool_]:
    """Return [N, 14] bool, True where the finding is present; columns in FINDINGS order."""
    present = [[finding in radiograph.findings for finding in FINDINGS] for radiograph in radiographs]
    return np.array(present, np.bool_).reshape(len(radiographs), len(FINDINGS))


def is_validation_patient(patient: int) -> bool:
    """Say whether a train_val patient belongs to the validation split; one in ten does.

    The rule never changes: the SHA-256 of the number in decimal ASCII digits, its first 8 bytes as a big-endian
    integer, divisible by 10. It needs no seed and no list, and adding patients moves none.
    """
    return tenth_of(patient) == 0


def tenth_of(patient: int) -> int:
    """Return which tenth of all patients one is of, 0 to 9; see is_validation_patient."""
    return int.from_bytes(hashlib.sha256(str(patient).encode("ascii")).digest()[:8], "big") % 10


def _find_table(root: Path) -> Path:
    for name in TABLES:
        if (root / name).is_file():
            return root / name
    raise DatasetError(
        f"{root}: found none of {', '.join(TABLES)}; needed one of them directly in this folder. "
        f"Next: give the folder that holds it, or a table of your own (CSV, Parquet, or a TOML that describes one)."
    )


def _find_images(root: Path) -> tuple[dict[str, Path], list[Path]]:
    """Return a table's image name -> path, and image files of another name; opens no file.

    Raises:
        DatasetError: two files may be the same image, or a folder can't be read.
    """
    try:
        folders = [
            entry for entry in sorted(root.iterdir()) if entry.name.lower().startswith("image") and entry.is_dir()
        ]
        files = [file for folder in folders for file in _walk(folder, set())] or list(_walk(root, set()))
    except OSError as err:
        raise DatasetError(f"{root}: found {err}; needed readable folders. Next: check their permissions.") from err
    paths: dict[str, Path] = {}
    strays, twice = [], []
    for file in files:
        name = f"{file.stem}.png"  # as the tables write it
        if patient_of(name) is None:
            strays.append(file)
        elif name in paths:
            twice.append((paths[name], file))
        else:
            paths[name] = file
    if twice:
        pairs = name_some([f"{first} and {second}" for first, second in twice])
        raise DatasetError(
            f"{root}: found two files for {len(twice):,} images: {pairs}; needed one file an image. "
            f"Next: move the wrong ones out of {root}."
        )
    return paths, strays


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield the image files below a folder; follows links to folders, for a large disk is often linked in, but none twice."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            yield from _walk(Path(entry.path), seen)
        # is_file: git-annex and DVC leave broken links where a file was not fetched.
        elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
            yield Path(entry.path)


def _read_split(root: Path, by_image: Mapping[str, Radiograph]) -> Mapping[str, tuple[str, ...]]:
    """Return train, val and test names; the patients of any two are disjoint."""
    lists = {name: read_names(root / name) for name in (TRAIN_VAL_LIST, TEST_LIST)}
    for name, images in lists.items():
        unknown = [image for image in images if image not in by_image]
        if unknown:
            raise DatasetError(
                f"{root / name}: found {name_some(unknown)} without a row in the table; needed a row for every listed "
                f"image. Next: take the list and the table from the same release."
            )
    train_val, test = lists[TRAIN_VAL_LIST], lists[TEST_LIST]
    twice = sorted(set(train_val) & set(test))
    if twice:
        raise DatasetError(
            f"{root / TEST_LIST}: found {name_some(twice)} in {TRAIN_VAL_LIST} too; needed each image in one list. "
            f"Next: restore the official lists."
        )
    shared = sorted({by_image[image].patient for image in train_val} & {by_image[image].patient for image in test})
    if shared:
        raise DatasetError(
            f"{root / TEST_LIST}: found patients {name_some(shared)} in {TRAIN_VAL_LIST} too; needed each patient in one "
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
