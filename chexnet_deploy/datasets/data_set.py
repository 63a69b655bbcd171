"""What every command takes by --data: labelled images with their split, out of ChestX-ray14's folder or anyone's table."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.datasets.chestxray14 import SPLITS, ChestXray14, Split
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.inputs import name_some
from chexnet_deploy.metrics.localization import Box


@dataclass(frozen=True, slots=True, eq=False)
class DataSet:
    """Labelled images with their split; made by `open_data`.

    Attributes:
        root: what was given: a folder, a table, or the TOML that describes one.
        table: the file that holds the labels.
        images: every row, on disk or not, in the table's order.
        rows: split -> its rows, on disk or not; no patient is in two of them.
        patients_unknown: why nobody knows whose images these are; empty where the table says so. All are then taken as one
            patient's, so nothing that counts patients can come out of them.
        notes: in words, how the table was read and what of it or of the folder is left out.
        next_step: where images are missing.
        boxes: image -> boxes drawn by a radiologist; none in a table.
    """

    root: Path
    table: Path
    images: LabelledImages
    rows: Mapping[Split, NDArray[np.intp]]
    patients_unknown: str
    notes: tuple[str, ...]
    next_step: str
    boxes: Mapping[str, tuple[Box, ...]] = field(default_factory=dict)

    @property
    def is_chestxray14(self) -> bool:
        """Whether it has that data set's own files, and so its official lists."""
        return self.root.is_dir()

    def split(self, name: Split) -> LabelledImages:
        """Return the images of one split that are on disk, in the order of its list or table.

        Raises:
            DatasetError: there is no such split.
        """
        if name not in self.rows:
            raise DatasetError(f"Found split {name!r}; needed train, val or test. Next: correct the name.")
        rows = self.rows[name]
        return self.images.take(rows[[bool(self.images.files[row]) for row in rows.tolist()]])

    def require(self, name: Split) -> LabelledImages:
        """Return as `split`, at least one image; for train and val only where it is known whose images they are.

        Raises:
            DatasetError: there is none on disk, or patients can't be told apart.
        """
        images = self.split(name)
        if not len(self.rows[name]):
            raise DatasetError(
                f"{self.root}: found no {name} row; needed one at least. Next: give the table a column split of train, val and "
                f'test, or describe it in a TOML with split = "by patient", or split = "{name}" where every row is one.'
            )
        if not images.names:
            notes = f", and {'; '.join(self.notes)}" if self.notes else ""
            raise DatasetError(
                f"{self.root}: found none of the {len(self.rows[name]):,} {name} images on disk{notes}; needed at least one. "
                f"Next: {self.next_step}."
            )
        if self.patients_unknown and name != "test":
            raise DatasetError(
                f"{self.root}: found {self.patients_unknown}; needed whose they are, as no patient may be in two splits. "
                f"Next: name the patients' column, or, where each image is another patient's, the images' column as patient."
            )
        return images

    def patients_of(self, *names: Split) -> frozenset[int]:
        """Return the patients of splits, whether their images are on disk or not."""
        return frozenset(patient for name in names for patient in self.images.patients[self.rows[name]].tolist())

    def select(self, names: Sequence[str]) -> LabelledImages:
        """Return the named images in the order given.

        Raises:
            DatasetError: a name has no row, or its image is not on disk.
        """
        row_of = {name: row for row, name in enumerate(self.images.names)}
        unknown = [name for name in names if name not in row_of]
        if unknown:
            raise DatasetError(
                f"{self.table}: found no row for {name_some(unknown)}; needed a row for each of the {len(names)} names. "
                f"Next: check that the list belongs to this data set."
            )
        chosen = self.images.take(np.array([row_of[name] for name in names], np.intp))
        absent = [name for name, file in zip(chosen.names, chosen.files, strict=True) if not file]
        if absent:
            raise DatasetError(
                f"{self.root}: found no file for {name_some(absent)}; needed all {len(names)} images. "
                f"Next: put them there or shorten the list."
            )
        return chosen

    def split_sha256(self) -> str:
        r"""Return the SHA-256 of the split as it stands on disk.

        Hashed is one line "train 00000002_000.png\n" for each image of `split("train")`, then "val", then "test", in
        their order, so a reordered list, another validation rule and an image more or less all change it.
        """
        digest = hashlib.sha256()
        for name in SPLITS:
            for image in self.split(name).names:
                digest.update(f"{name} {image}\n".encode())
        return digest.hexdigest()


def open_data(root: Path | str) -> DataSet:
    """Read and cross-check a data set, and find its images; opens none of them.

    Args:
        root: ChestX-ray14's folder; or a table, CSV or Parquet; or a TOML that describes one. See table.py.

    Raises:
        DatasetError: a file is missing or wrong, or two contradict each other.
        SpecError: the TOML is wrong.
    """
    root = Path(root)
    if not root.is_dir():
        # Only a table of others needs it, and it may need pyarrow.
        from chexnet_deploy.datasets.table import open_table

        return open_table(root)
    dataset = ChestXray14.open(root)
    row_of = {radiograph.image: row for row, radiograph in enumerate(dataset.radiographs)}
    return DataSet(
        root=root,
        table=dataset.table,
        images=LabelledImages.of(dataset.radiographs),
        rows={name: np.array([row_of[image] for image in dataset.listed[name]], np.intp) for name in SPLITS},
        patients_unknown="",
        notes=dataset.left_out(),
        next_step=f"put the images into {root}/images, called as in {dataset.table.name}, with any image suffix",
        boxes=dataset.boxes,
    )
