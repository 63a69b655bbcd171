"""The labels of anyone's table: columns of 0 and 1, or one column of lists, block by block into one matrix.

A column that nobody named in a TOML may hold something else. It is then no finding, and an error for who asks for it.
"""

import ast
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.datasets.csv_rows import FINDING_BY_LETTERS, letters_of
from chexnet_deploy.datasets.findings import FINDINGS, NO_FINDING
from chexnet_deploy.datasets.labelled import NOT_LABELLED
from chexnet_deploy.datasets.table_columns import Columns, Description
from chexnet_deploy.errors import DatasetError

RowError = Callable[[int, str, str], DatasetError]
"""Called with a row's place, what was found and what was needed."""

_POLICIES: Final = {"ignore": NOT_LABELLED, "zeros": 0, "ones": 1}
_UNCERTAIN: Final = -2  # until the policy is applied
_EMPTY: Final = ("", "nan")
_CODES: Final = (
    dict.fromkeys(("0", "0.0", "0,0", "no", "false"), 0)
    | dict.fromkeys(("1", "1.0", "1,0", "yes", "true"), 1)
    | dict.fromkeys(("-1", "-1.0", "-1,0"), _UNCERTAIN)
)


class Labels:
    """Labels as they are read.

    Args:
        stated: the table's description.
        columns: where they are.
        row_error: makes the refusal of a row.

    Attributes:
        refused: finding -> why its column can't be read.
        n_uncertain: cells of -1 to which the policy was applied.
        named_nowhere: words of the TOML that no list holds: a typing error, or rare.
    """

    def __init__(self, stated: Description, columns: Columns, row_error: RowError) -> None:
        self.refused = dict(columns.refused)
        self.n_uncertain = 0
        self.named_nowhere: tuple[str, ...] = ()
        self._stated, self._columns, self._row_error = stated, columns, row_error
        self._codes = _CODES | dict.fromkeys(_EMPTY, _POLICIES[stated.empty])
        self._parts: dict[str, list[NDArray[np.int8]]] = {finding: [] for finding in columns.findings}
        self._lists: dict[str, int] = {}  # distinct cell -> its number
        self._named: list[tuple[str, ...] | None] = []  # findings of each distinct cell, None where it is empty
        self._numbers: list[NDArray[np.int32]] = []

    def add(self, first: int, block: Sequence[Sequence[str]]) -> None:
        """Take some rows, column by column; `first` is the place of the first of them.

        Raises:
            DatasetError: a list, or a cell of a column that the TOML names, can't be right.
        """
        if self._columns.labels is not None:
            cells = block[self._columns.labels]
            for i, cell in enumerate(cells):
                if cell not in self._lists:
                    self._named.append(self._names_in(first + i, cell))
                    self._lists[cell] = len(self._named) - 1
            self._numbers.append(np.fromiter(map(self._lists.__getitem__, cells), np.int32, len(cells)))
        for finding, place in self._columns.findings.items():
            if finding not in self.refused:
                try:
                    self._parts[finding].append(self._read_column(first, finding, block[place]))
                except DatasetError as err:
                    if self._columns.are_named:
                        raise
                    self.refused[finding] = err
                    self._parts[finding].clear()

    def matrix(self) -> tuple[tuple[str, ...], NDArray[np.int8]]:
        """Return findings [C], and labels [N, C] as in LabelledImages."""
        if self._columns.labels is not None:
            return self._matrix_of_lists()
        findings = tuple(finding for finding in self._parts if finding not in self.refused)
        columns = [np.concatenate(self._parts.pop(finding)) for finding in findings]
        return findings, np.stack(columns, axis=1) if columns else np.empty((0, 0), np.int8)

    def _read_column(self, first: int, finding: str, cells: Sequence[str]) -> NDArray[np.int8]:
        codes = [*map(self._codes.get, cells)]
        if None in codes:
            for i, code in enumerate(codes):
                codes[i] = code = self._codes.get(cells[i].strip().lower()) if code is None else code
                if code is None:
                    raise self._row_error(first + i, f"{finding} {cells[i]!r}", "0, 1, -1 or nothing")
        labels = np.array(codes, np.int8)
        is_uncertain = labels == _UNCERTAIN
        if is_uncertain.any():
            if self._stated.uncertain is None:
                needed = '0, 1 or nothing, or a TOML that says uncertain = "ignore", "zeros" or "ones"'
                raise self._row_error(first + int(is_uncertain.argmax()), f"{finding} -1, which is uncertain", needed)
            self.n_uncertain += int(is_uncertain.sum())
            labels[is_uncertain] = _POLICIES[self._stated.uncertain]
        return labels

    def _names_in(self, i: int, cell: str) -> tuple[str, ...] | None:
        text = cell.strip()
        if text.lower() in _EMPTY:
            return () if self._stated.empty == "zeros" else None
        names: Any = text.split("|")
        if text.startswith("["):
            try:
                names = ast.literal_eval(text)  # reads literals alone, and runs nothing
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._row_error(i, f"labels {cell!r}", "names parted by |, or a list like ['mass', 'edema']")
        found = tuple(dict.fromkeys(stripped for name in names if (stripped := name.strip())))
        unknown = [name for name in found if self._columns.is_nih and name not in (*FINDINGS, NO_FINDING)]
        if unknown:
            raise self._row_error(i, f"finding {unknown[0]!r}", f"{NO_FINDING} or names out of {', '.join(FINDINGS)}")
        if NO_FINDING in found and len(found) > 1:
            raise self._row_error(i, repr(cell), f"{NO_FINDING} alone or findings alone")
        return found

    def _check_words(self, columns: Collection[str]) -> None:
        """Refuse lists parted by something else than |, whose findings would all be absent; note what no list names.

        Args:
            columns: findings by their letters.

        Raises:
            DatasetError: names the row.
        """
        read = {letters_of(name) for names in self._named for name in names or ()}
        stated = {word: letters_of(word) for word in self._stated.findings.values()}
        self.named_nowhere = tuple(word for word, letters in stated.items() if letters not in read)
        known = {*columns, *FINDING_BY_LETTERS}
        for number, names in enumerate(self._named):
            for name in names or ():
                whole, parts = letters_of(name), {*map(letters_of, re.split("[,;]", name))}
                if len(parts) > 1 and whole not in stated.values() and not parts.isdisjoint(known):
                    first = int((np.concatenate(self._numbers) == number).argmax())
                    needed = "names parted by |, or a list like ['mass', 'edema']"
                    raise self._row_error(first, f"labels {name!r}", needed)

    def _matrix_of_lists(self) -> tuple[tuple[str, ...], NDArray[np.int8]]:
        if self._stated.findings:
            word_of = dict(self._stated.findings)
        else:  # NIH's names are known, also those that no row has
            words = FINDINGS if self._columns.is_nih else [name for names in self._named for name in names or ()]
            word_of = {word: word for word in words}
        column_of = {letters_of(word): c for c, word in enumerate(word_of.values())}
        self._check_words(column_of)
        each = np.zeros((len(self._named), len(word_of)), np.int8)
        for i, names in enumerate(self._named):
            if names is None:
                each[i] = NOT_LABELLED
            for name in names or ():
                if letters_of(name) in column_of:
                    each[i, column_of[letters_of(name)]] = 1
        return tuple(word_of), each[np.concatenate(self._numbers)]
