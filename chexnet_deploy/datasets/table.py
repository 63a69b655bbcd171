"""Anyone's table of images -> a DataSet: CSV or Parquet, one row an image; table_columns.py says which column is what.

Holds a million rows in memory as columns, and repairs nothing: what can't be right is refused with its row. Rows that say
the same of the same image count once. A patient's name or number leaves this module as 62 bits of its SHA-256, above all
numbers of ChestX-ray14; only an image named as ChestX-ray14's are has that data set's patient.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.datasets.chestxray14 import SPLITS, is_validation_patient, tenth_of
from chexnet_deploy.datasets.csv_rows import Row, image_name, letters_of, read_rows
from chexnet_deploy.datasets.data_set import DataSet
from chexnet_deploy.datasets.labelled import LabelledImages, Sex, View
from chexnet_deploy.datasets.nih_tables import patient_of
from chexnet_deploy.datasets.table_columns import Columns, Description, find_columns, read_description
from chexnet_deploy.datasets.table_labels import Labels
from chexnet_deploy.errors import DatasetError, require
from chexnet_deploy.inputs import quote_some

Block: TypeAlias = Sequence[Sequence[str]]
"""Some rows, column by column."""

_BLOCK_ROWS: Final = 8192
_AGE: Final = re.compile(r"(\d{1,3})(?:[.,](\d+))?([YMD]?)", re.ASCII)
_WHOLE: Final = re.compile(r"(\d{1,38})\.0", re.ASCII)  # pandas writes whole numbers as 12.0 beside a gap
_SHORTENED: Final = re.compile(r"\d([.,]\d+)?E\+\d+", re.IGNORECASE | re.ASCII)  # 1.23457E+12, as many others' are
_NOBODY: Final = ("nan", "na", "n/a", "#n/a", "<na>", "nat", "none", "null", "unknown", "?", "-")
_CHEXPERT_PATIENT: Final = r"(?:^|/)(patient\d+)/"
_LATERAL: Final = ("l", "ll", "rl", "lateral", "lat")
_SPLIT_WORDS: Final = (
    dict.fromkeys(("train", "training"), 0)
    | dict.fromkeys(("val", "valid", "validation", "dev"), 1)
    | dict.fromkeys(("test", "testing"), 2)
    | {"": -1}
)
_ONE_PATIENT: Final = 1 << 62


def open_table(path: Path) -> DataSet:
    """Read a table, or the one that a TOML describes, and look for its images; opens none of them.

    Raises:
        DatasetError: a file or an image is missing, a column is not found, or a row can't be right.
        SpecError: the TOML is wrong.
        MissingPackageError: it is a Parquet file, and pyarrow is not installed.
    """
    table = _Table.read(read_description(path))
    table.refuse_missing_files()
    return table.data_set(path)


def read_labels(path: Path) -> DataSet:
    """Read as open_table, but whether the images are on disk doesn't matter: none has a file."""
    table = _Table.read(read_description(path))
    table.files = [""] * len(table.names)
    return table.data_set(path)


class _Memo(dict[str, Any]):
    """What each distinct cell means, worked out once and held once."""

    def __init__(self, mean: Callable[[str], Any]) -> None:
        super().__init__()
        self._mean = mean

    def __missing__(self, cell: str) -> Any:
        meaning = self[cell] = self._mean(cell)
        return meaning


@dataclass(slots=True, eq=False)
class _Table:
    """Rows as columns while they are checked; each check may take rows away.

    Attributes:
        numbers: [N] of the rows, for messages.
        files: [N] where each image should be.
        view: [N] as written.
        split: int8 [N] place in SPLITS, -1 for none.
        patient_cells: [N] as written; empty without such a column.
    """

    path: Path
    stated: Description
    columns: Columns
    names: list[str]
    numbers: NDArray[np.int64]
    findings: tuple[str, ...]
    labels: NDArray[np.int8]
    refused: dict[str, DatasetError]
    sex: list[Sex]
    age_years: NDArray[np.float64]
    view: list[str]
    split: NDArray[np.int8]
    patient_cells: list[str]
    notes: list[str]
    files: list[str]
    patients: NDArray[np.int64]
    patients_unknown: str = ""

    @classmethod
    def read(cls, stated: Description) -> "_Table":
        """Read and check every row; whether files are on disk is not looked at."""
        path = Path(stated.table)
        header, blocks = _open_blocks(path)
        columns = find_columns(header, stated)
        numbers: list[NDArray[np.int64]] = []

        def row_error(i: int, found: str, needed: str) -> DatasetError:
            return Row(path, int(np.concatenate(numbers)[i]), ()).error(found, needed)

        labels = Labels(stated, columns, row_error)
        # The few distinct words are held once, each patient's too.
        memos = {
            "patient": (columns.patient, _Memo(_id_of)),
            "sex": (columns.sex, _Memo(_sex_of)),
            "age": (columns.age, _Memo(_age_years_of)),
            "split": (columns.split, _Memo(lambda cell: _SPLIT_WORDS.get(letters_of(cell), -2))),
        }
        view_memo = _Memo(str.strip)
        names: list[str] = []
        view: list[str] = []
        texts: dict[str, list[Any]] = {name: [] for name in memos}
        for block_numbers, block in blocks:
            numbers.append(block_numbers)
            labels.add(len(names), block)
            for name, (place, memo) in memos.items():
                if place is not None:
                    texts[name] += map(memo.__getitem__, block[place])
            view += map(view_memo.__getitem__, _views_of(columns.view, block))
            names += _names_of(columns, block)
        n = len(names)
        if not n:
            raise DatasetError(f"{path}: found columns and no row; needed at least one. Next: write the table again.")
        findings, matrix = labels.matrix()
        no_split = -1 if columns.split is not None else 0 if stated.split == "train" else 2
        table = cls(
            path=path,
            stated=stated,
            columns=columns,
            names=names,
            numbers=np.concatenate(numbers),
            findings=findings,
            labels=matrix.reshape(n, -1),
            refused=labels.refused,
            sex=texts["sex"] or ["unknown"] * n,
            age_years=np.array(texts["age"] or [np.nan] * n, np.float64),
            view=view,
            split=np.array(texts["split"] or [no_split] * n, np.int8),
            patient_cells=texts["patient"],
            notes=[],
            files=[],
            patients=np.empty(0, np.int64),
        )
        if labels.n_uncertain:
            table.notes.append(f"{labels.n_uncertain:,} labels of -1 are taken as uncertain: {stated.uncertain}")
        if labels.named_nowhere:
            table.notes.append(f"no list names {quote_some(labels.named_nowhere)}, so no image shows it")
        if columns.split is None and stated.split is None:
            table.notes.append(f"{path.name} has no split, so every row is a test image")
        table._check()
        return table

    def _check(self) -> None:
        self._refuse_first(np.array([not name for name in self.names]), lambda i: "no image", "the path of an image")
        self._refuse_first(
            self.split == -2, lambda i: "another word in the column of splits", "train, val or test, or nothing"
        )
        self._choose_views()
        root = f"{self.stated.root}/"
        self.files = [_normal(name if name.startswith("/") else root + name) for name in self.names]
        self._find_patients()
        self._merge_repeated()
        self._split_patients()

    def _refuse_first(self, is_wrong: NDArray[np.bool_], found: Callable[[int], str], needed: str) -> None:
        """Refuse the first of the rows that are wrong."""
        if is_wrong.any():
            i, n_more = int(is_wrong.argmax()), int(is_wrong.sum()) - 1
            self._refuse(i, found(i) + (f", and {n_more:,} more rows like it" if n_more else ""), needed)

    def _refuse(self, i: int, found: str, needed: str) -> NoReturn:
        raise Row(self.path, int(self.numbers[i]), ()).error(found, needed)

    def _keep(self, is_kept: NDArray[np.bool_]) -> None:
        if is_kept.all():
            return
        places = np.flatnonzero(is_kept).tolist()
        for name in ("numbers", "labels", "age_years", "split", "patients"):
            if len(getattr(self, name)):
                setattr(self, name, getattr(self, name)[is_kept])
        for name in ("names", "sex", "view", "patient_cells", "files"):
            if getattr(self, name):
                setattr(self, name, [getattr(self, name)[i] for i in places])

    def _choose_views(self) -> None:
        """Leave out the views that aren't wanted; a lateral one has to be wanted, or not, in so many words."""
        if self.stated.views is not None:
            wanted = {letters_of(view) for view in self.stated.views}
            of = {view: letters_of(view) in wanted for view in set(self.view)}
            is_kept = np.array([of[view] for view in self.view])
            if not is_kept.any():
                raise DatasetError(
                    f"{self.path}: found the views {', '.join(sorted(map(repr, of))[:5])}; needed one of {self.stated.views}. "
                    f"Next: correct `views` in the TOML."
                )
            if not is_kept.all():
                self.notes.append(f"{int((~is_kept).sum()):,} rows of {self.path.name} are of other views")
            self._keep(is_kept)
            return
        lateral = {view: letters_of(view) in _LATERAL for view in set(self.view)}
        self._refuse_first(
            np.array([lateral[view] for view in self.view]),
            lambda i: f"the view {self.view[i]!r} of {self.names[i]}",
            'frontal images, or a TOML that says which, such as views = ["AP", "PA"]',
        )

    def _find_patients(self) -> None:
        pattern, ids = self.stated.patient_in_path, self.patient_cells
        needed = "whose image it is, in the patients' column"
        files = [name.rpartition("/")[2] for name in self.names]
        # Copies of ChestX-ray14's images are .jpg or .dcm too, and their patients the same.
        named = [patient_of(f"{os.path.splitext(file)[0]}.png") for file in files]  # noqa: PTH122 - text, a million times
        if not ids and pattern is None:
            if all(number is not None for number in named):
                self.patients = np.array(named, np.int64)
                return
            pattern = _CHEXPERT_PATIENT
        if pattern is not None:
            ids = [found[1] or "" if (found := re.search(pattern, name)) else "" for name in self.names]
            needed = f"a path in which {pattern} finds the patient"
            if self.stated.patient_in_path is None and not all(ids):
                self.patients = np.full(len(self.names), _ONE_PATIENT, np.int64)
                self.patients_unknown = f"no column of patients in {self.path.name}"
                self.notes.append(
                    f"{self.patients_unknown}: all images are taken as one patient's, so there are no intervals, no verdict on "
                    f"AUROC, and nothing shows that they are new to a model"
                )
                return
        self.patient_cells = []
        self._refuse_first(np.array([not each for each in ids]), lambda i: f"no patient for {self.names[i]}", needed)
        shortened = {each: bool(_SHORTENED.fullmatch(each) or each.startswith("##")) for each in set(ids)}
        self._refuse_first(
            np.array([shortened[each] for each in ids]),
            lambda i: f"the patient {ids[i]!r}, which a spreadsheet or a float has shortened",
            "the whole number; make the column text in the spreadsheet, and write the table again",
        )
        number_of = _Memo(_number_of)
        patients = [number_of[each] if number is None else number for each, number in zip(ids, named, strict=True)]
        for i, (each, number) in enumerate(zip(ids, named, strict=True)):
            if number is not None and (not each.isdecimal() or int(each) != number):
                needed = (
                    f"patient {number}, as ChestX-ray14 names that patient's images so. Images of your own patients need "
                    f"other names, e.g. own_{files[i]}: rename the files"
                )
                self._refuse(i, f"patient {each!r} for {self.names[i]}", needed)
        self.patients = np.array(patients, np.int64)

    def _merge_repeated(self) -> None:
        """Keep the first of the rows that say the same of one image; refuse two that don't."""
        if len(set(self.files)) == len(self.files):
            return
        first: dict[str, int] = {}
        is_kept = np.ones(len(self.files), np.bool_)
        for i, file in enumerate(self.files):
            j = first.setdefault(file, i)
            if j != i:
                is_kept[i] = False
                if self._says(i) != self._says(j):
                    self._refuse(
                        i,
                        f"{self.names[i]} again, with another label or attribute than in row {self.numbers[j]}",
                        "one row an image, or rows that agree; make one of several readers' or boxes' rows first",
                    )
        self.notes.append(f"{int((~is_kept).sum()):,} rows of {self.path.name} repeat another row")
        self._keep(is_kept)

    def _says(self, i: int) -> tuple[object, ...]:
        age = -1.0 if np.isnan(self.age_years[i]) else self.age_years[i]
        return self.labels[i].tobytes(), self.patients[i], self.sex[i], age, self.view[i], self.split[i]

    def _split_patients(self) -> None:
        """Divide patients where the table doesn't, and refuse one who is in two splits."""
        if self.patients_unknown:
            return
        patients, place = np.unique(self.patients, return_inverse=True)
        if self.columns.split is None and self.stated.split == "by patient":
            of = {0: 1, 1: 2}  # a tenth each for val and test
            self.split = np.array([of.get(tenth_of(patient), 0) for patient in patients.tolist()], np.int8)[place]
        if (self.split == 0).any() and not (self.split == 1).any():
            is_val = np.array([is_validation_patient(patient) for patient in patients.tolist()])
            self.split[is_val[place] & (self.split == 0)] = 1
        last = np.full(len(patients), -1, np.int8)
        np.maximum.at(last, place, self.split)
        is_shared = (self.split >= 0) & (self.split != last[place])
        self._refuse_first(
            is_shared,
            lambda i: f"a patient in {SPLITS[self.split[i]]} who is in {SPLITS[last[place[i]]]} too, {self.names[i]}",
            "each patient in one split",
        )

    def refuse_missing_files(self) -> None:
        """Look for every image; one that is missing is refused, or left out where the TOML says so."""
        is_there = np.array([os.path.isfile(file) for file in self.files])  # noqa: PTH113 - a million Paths take minutes
        if self.stated.missing == "leave out":
            if not is_there.all():
                self.notes.append(
                    f"{int((~is_there).sum()):,} of {len(is_there):,} rows of {self.path.name} have no image on disk"
                )
            self.files = [file if found else "" for file, found in zip(self.files, is_there.tolist(), strict=True)]
            return
        self._refuse_first(
            ~is_there,
            lambda i: f"no file {self.files[i]}",
            "every image on disk, or a TOML with another `root`, with a template of the path such as "
            'path = "images/{image_id}.png", or with missing = "leave out"',
        )

    def data_set(self, given: Path) -> DataSet:
        """Return what commands take."""
        word = {view: _view_of(view) for view in set(self.view)}
        return DataSet(
            root=given,
            table=self.path,
            images=LabelledImages(
                names=tuple(self.names),
                files=tuple(self.files),
                findings=self.findings,
                labels=self.labels,
                patients=self.patients,
                sex=tuple(self.sex),
                age_years=self.age_years,
                view=tuple(word[view] for view in self.view),
                refused=MappingProxyType(self.refused),
            ),
            rows=MappingProxyType({name: np.flatnonzero(self.split == i) for i, name in enumerate(SPLITS)}),
            patients_unknown=self.patients_unknown,
            notes=tuple(self.notes),
            next_step="correct `root` in the TOML, or copy the images",
        )


def _open_blocks(path: Path) -> tuple[Row, Iterator[tuple[NDArray[np.int64], Block]]]:
    """Return a table's header, and an iterator over the numbers and the columns of some rows at a time."""
    if path.suffix.lower() in (".parquet", ".pq"):
        with require("table", instead="write the table as CSV."):
            from chexnet_deploy.datasets.parquet import read_blocks
        blocks = read_blocks(path, _BLOCK_ROWS)
        return Row(path, 0, [name for (name,) in next(blocks)]), _number_parquet(blocks)
    rows = read_rows(path)
    return next(rows), _block_rows(rows)


def _number_parquet(blocks: Iterator[Block]) -> Iterator[tuple[NDArray[np.int64], Block]]:
    first = 1  # a Parquet file has no row of names
    for block in blocks:
        yield np.arange(first, first + len(block[0])), block
        first += len(block[0])


def _block_rows(rows: Iterator[Row]) -> Iterator[tuple[NDArray[np.int64], Block]]:
    while some := [*islice(rows, _BLOCK_ROWS)]:
        yield np.array([row.number for row in some]), [*zip(*(row.fields for row in some), strict=False)]


def _names_of(columns: Columns, block: Block) -> list[str]:
    """Return the images' paths as their rows give them."""
    if columns.template is None:
        (place,) = columns.image
        return [*map(image_name, block[place])]
    parts = [[cell.strip() for cell in block[place]] for place in columns.image]
    # A path that lacks a part is none.
    return [image_name(columns.template.format(*cells)) if all(cells) else "" for cells in zip(*parts, strict=True)]


def _normal(path: str) -> str:
    """Return a path in its one form, at no cost where it has it."""
    return os.path.normpath(path) if "/." in path or "//" in path or path.startswith("./") else path


def _views_of(places: Sequence[int], block: Block) -> Sequence[str]:
    """Return the first cell of each row that isn't empty."""
    if len(places) <= 1:
        return block[places[0]] if places else [""] * len(block[0])
    return [
        next((cell for cell in cells if cell.strip()), "") for cells in zip(*(block[p] for p in places), strict=True)
    ]


def _id_of(cell: str) -> str:
    text = cell.strip()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else "" if text.lower() in _NOBODY else text


def _number_of(patient: str) -> int:
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") >> 2 | _ONE_PATIENT


def _sex_of(cell: str) -> Sex:
    word = cell.strip().upper()
    return "F" if word in ("F", "FEMALE") else "M" if word in ("M", "MALE") else "unknown"


def _view_of(view: str) -> View:
    word = view.upper()
    return "AP" if word == "AP" else "PA" if word == "PA" else "unknown"


def _age_years_of(cell: str) -> float:
    """Return years of "58", "63.5", "63,5", "058Y", "018M" (months) or "011D" (days); NaN of anything else."""
    match = _AGE.fullmatch(cell.strip())
    if not match:
        return float("nan")
    return float(f"{match[1]}.{match[2] or 0}") / {"": 1, "Y": 1, "M": 12, "D": 365.25}[match[3]]
