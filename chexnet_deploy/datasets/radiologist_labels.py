"""Five radiologists' reads of ChestX-ray14 test images, and the majority label made from three of them.

The files are those of Nabulsi et al. 2021 (Scientific Reports 11:15523, arXiv 2010.11375), "all findings": 810 frontal
PA images of the official test split. Research and educational use. On disk, in one folder:

    test_individual_readers.csv    one row an image and reader: Image ID, Patient ID, Reader ID, YES or NO per finding
    test_labels.csv                one row an image: the majority of MAJORITY_READERS

There is no pool of readers: the same five read every image, so the reads are a full array [R, N, C], and a file where
a reader misses an image is refused. Their columns Abnormal (0/1 in one file, YES/NO in the other) and Other are not
among the 14 findings and not read. Knows nothing of scores, and repairs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.datasets.csv_rows import Row, read_columns
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.nih_tables import check_patient
from chexnet_deploy.errors import DatasetError

READERS_FILE: Final = "test_individual_readers.csv"
MAJORITY_FILE: Final = "test_labels.csv"
MAJORITY_READERS: Final = ("4343882785", "4343883593", "4343883996")
"""The three, drawn at random by the authors, whose majority test_labels.csv holds; the other two are for comparison."""

_IMAGE_COLUMNS: Final = (("Image ID",), ("Patient ID",))
_FINDING_COLUMNS: Final = tuple((finding, finding.replace("_", " ")) for finding in FINDINGS)
_IS_PRESENT: Final = {"YES": True, "NO": False}


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLabels:
    """Every reader's answers and the majority's on the same images; made by `ExpertLabels.open`.

    Attributes:
        images: [N] names, in the order of their first row in the readers' file.
        patients: [N] int64 patient numbers.
        readers: [R] IDs in ascending order, as text: they are names, not numbers.
        reads: [R, N, C] True where the reader saw the finding; C in FINDINGS order.
        majority: [N, C] True where at least two of MAJORITY_READERS saw it.
    """

    images: tuple[str, ...]
    patients: NDArray[np.int64]
    readers: tuple[str, ...]
    reads: NDArray[np.bool_]
    majority: NDArray[np.bool_]

    @classmethod
    def open(cls, root: Path) -> "ExpertLabels":
        """Read both files of a folder and check one against the other.

        Raises:
            DatasetError: a file is missing or wrong, or the majority is not that of MAJORITY_READERS.
        """
        images, readers, reads = read_individual_readers(root / READERS_FILE)
        majority_images, labels = read_majority(root / MAJORITY_FILE)
        if set(images) != set(majority_images):
            odd = sorted(set(images) ^ set(majority_images))
            raise DatasetError(
                f"{root / MAJORITY_FILE}: found {_first(odd)} in this file or in {READERS_FILE} alone; needed the same "
                f"images in both. Next: take both files from the same release."
            )
        row_of = {image: row for row, image in enumerate(majority_images)}
        majority = labels[[row_of[image] for image in images]]
        _check_majority(root / MAJORITY_FILE, images, readers, reads, majority)
        patients = np.array([int(image[:8]) for image in images], np.int64)
        return cls(images, patients, readers, reads, majority)

    def select(self, images: Sequence[str]) -> "ExpertLabels":
        """Return the named images alone, in the order given.

        Raises:
            DatasetError: no name, a name twice, or a name that has no reads.
        """
        row_of = {image: row for row, image in enumerate(self.images)}
        unknown = [image for image in images if image not in row_of]
        if unknown or not images or len(set(images)) < len(images):
            found = f"{_first(unknown)} without expert reads" if unknown else "no image, or an image twice"
            raise DatasetError(
                f"Expert reads: found {found}; needed images out of the {len(row_of)} that were read, each once. "
                f"Next: score only images that have reads."
            )
        rows = [row_of[image] for image in images]
        return replace(
            self,
            images=tuple(images),
            patients=self.patients[rows],
            reads=self.reads[:, rows],
            majority=self.majority[rows],
        )


def read_individual_readers(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], NDArray[np.bool_]]:
    """Return images [N] in file order, reader IDs [R] in ascending order, and reads [R, N, C] in FINDINGS order.

    Raises:
        DatasetError: the file can't be read, a column is missing, a row can't be right, a reader read an image twice or
            not at all.
    """
    answers: dict[tuple[str, str], list[bool]] = {}
    for row in read_columns(path, (*_IMAGE_COLUMNS, ("Reader ID",), *_FINDING_COLUMNS)):
        image, patient, reader, *cells = row.fields
        check_patient(row, image, patient)
        if not reader:
            raise row.error("no Reader ID", "the ID of a reader")
        if (image, reader) in answers:
            raise row.error(f"a second read of {image} by reader {reader}", "one row an image and reader")
        answers[image, reader] = _parse_cells(row, cells)
    images = tuple(dict.fromkeys(image for image, _ in answers))
    readers = tuple(sorted({reader for _, reader in answers}))
    missed = [f"{image} by reader {reader}" for image in images for reader in readers if (image, reader) not in answers]
    if missed:
        raise DatasetError(
            f"{path}: found no read of {_first(missed)}; needed each of the {len(images)} images read by each of the "
            f"{len(readers)} readers. Next: remove images that some reader missed, or copy the file again."
        )
    return images, readers, np.array([[answers[image, reader] for image in images] for reader in readers], np.bool_)


def read_majority(path: Path) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
    """Return images [N] in file order and their majority labels [N, C] in FINDINGS order.

    Raises:
        DatasetError: the file can't be read, a column is missing, a row can't be right or an image has two rows.
    """
    labels: dict[str, list[bool]] = {}
    for row in read_columns(path, (*_IMAGE_COLUMNS, *_FINDING_COLUMNS)):
        image, patient, *cells = row.fields
        check_patient(row, image, patient)
        if image in labels:
            raise row.error(f"{image} a second time", "one row an image")
        labels[image] = _parse_cells(row, cells)
    return tuple(labels), np.array(list(labels.values()), np.bool_)


def _parse_cells(row: Row, cells: Sequence[str]) -> list[bool]:
    for finding, cell in zip(FINDINGS, cells, strict=True):
        if cell not in _IS_PRESENT:
            raise row.error(f"{cell!r} for {finding}", "YES or NO")
    return [_IS_PRESENT[cell] for cell in cells]


def _check_majority(
    path: Path,
    images: Sequence[str],
    readers: Sequence[str],
    reads: NDArray[np.bool_],
    majority: NDArray[np.bool_],
) -> None:
    """Refuse a majority file that isn't the majority of the three readers the authors name.

    A reader scored against a label that holds their own vote is scored too well, so who voted must be certain.
    """
    absent = sorted(set(MAJORITY_READERS) - set(readers))
    if absent:
        raise DatasetError(
            f"{path.parent / READERS_FILE}: found no read by {_first(absent)}; needed all three readers whose majority "
            f"{MAJORITY_FILE} holds. Next: copy the readers' file again."
        )
    votes = reads[[readers.index(reader) for reader in MAJORITY_READERS]].sum(axis=0)
    wrong = [f"{FINDINGS[c]} of {images[i]}" for i, c in np.argwhere((votes >= 2) != majority)]
    if wrong:
        raise DatasetError(
            f"{path}: found another label than the majority of readers {', '.join(MAJORITY_READERS)} for "
            f"{_first(wrong)}; needed their majority. Next: take both files from the same release."
        )


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"
