"""The one way a text file with a header becomes rows: every table, list and CSV of others is read here.

Checks the form alone (UTF-8; commas, semicolons or tabs, whichever part the header most; as many fields as the header has);
what a value must be its reader says, with `Row.error`. Columns are found by their exact names (`read_columns`) or, in the
files of strangers, by names of which capitals, blanks and underscores don't matter (`find_column`, `find_findings`).
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Final

from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.inputs import open_text, quote_some, read_text

MAX_QUOTED_CHARACTERS: Final = 200  # of what was found, in a message


@dataclass(frozen=True, slots=True)
class Row:
    """One row, numbered from 1 for the header, as editors and spreadsheets count."""

    path: Path
    number: int
    fields: Sequence[str]

    def error(self, found: str, needed: str) -> DatasetError:
        """Return the refusal of this row."""
        found = found if len(found) <= MAX_QUOTED_CHARACTERS else f"{found[:MAX_QUOTED_CHARACTERS]}..."
        return DatasetError(
            f"{self.path}, row {self.number}: found {found}; needed {needed}. "
            f"Next: correct the row, or copy or write the file again."
        )

    def column_error(self, needed: str) -> DatasetError:
        """Return the refusal of this row as a header that lacks a column."""
        names = ", ".join(repr(name[:60]) for name in self.fields)
        found = names if len(names) <= MAX_QUOTED_CHARACTERS else quote_some(self.fields)
        return DatasetError(
            f"{self.path}, row {self.number}: found the columns {found}; needed {needed}. "
            f"Next: name a column that is there, or correct the header."
        )


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the header, then every row that is not blank, at least one; holds one row at a time.

    Raises:
        DatasetError: as open_text; there is no header or no row, or a row has another number of fields.
    """
    with open_text(path) as file:
        first = file.readline()
        reader = csv.reader(chain([first] if first else [], file), delimiter=_delimiter_of(first), strict=True)
        try:
            header = next(reader, [])
            # NIH's first release ends its header, its rows or both with a comma; such empty fields mean nothing.
            while header and not header[-1].strip():
                header.pop()
            if not header:
                raise Row(path, 1, header).error("no column names", "a header and at least one row")
            yield Row(path, 1, header)
            width, row = len(header), None
            for fields in filter(None, reader):
                row = Row(path, reader.line_num, fields)
                if len(fields) < width or any(fields[width:]):
                    raise row.error(f"{len(fields)} fields", f"{width}, as the header has")
                yield row
        except csv.Error as err:
            raise Row(path, reader.line_num, ()).error(
                f"a broken row ({err})", "values separated by commas, semicolons or tabs, quoted where they hold one"
            ) from err
        if row is None:
            raise DatasetError(
                f"{path}: found a header and no row; needed at least one. Next: copy or write the file again."
            )


def _delimiter_of(header: str) -> str:
    """Return the separator that parts a header into the most fields: Excel writes semicolons where commas are decimal."""
    return max(",;\t", key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), ())))


def read_columns(path: Path, columns: Sequence[Sequence[str]]) -> Iterator[Row]:
    """Yield the rows below the header with the fields of the named columns alone, in the order asked for.

    Args:
        path: of the file.
        columns: for each the exact names it may have.

    Raises:
        DatasetError: as read_rows; or a column is missing.
    """
    rows = read_rows(path)
    header = next(rows)
    places = []
    for names in columns:
        place = next((header.fields.index(name) for name in names if name in header.fields), None)
        if place is None:
            raise header.column_error(f"a column {' or '.join(names)}")
        places.append(place)
    for row in rows:
        yield Row(path, row.number, [row.fields[place] for place in places])


def read_names(path: Path) -> tuple[str, ...]:
    """Return the image names in a list, in its order; whether a data set has them is not known here.

    One name a line; blank lines, blanks around a name, a byte order mark and CRLF are allowed.

    Raises:
        DatasetError: the file can't be read, names no image, or names one twice.
    """
    rows: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name = image_name(line)
        if name in rows:
            raise Row(path, number, (name,)).error(f"{name} again (first in row {rows[name]})", "each name once")
        if name:
            rows[name] = number
    if not rows:
        raise DatasetError(f"{path}: found no image name; needed at least one. Next: copy the list again.")
    return tuple(rows)


def image_name(cell: str) -> str:
    """Return an image's name or path as a cell gives it, stripped; Windows' separators become those of all others."""
    return cell.strip().replace("\\", "/")


def letters_of(name: str) -> str:
    """Return the letters and digits of a name, in small: what is compared where spelling is free."""
    return re.sub(r"[\W_]", "", name.casefold())


FINDING_BY_LETTERS: Final = MappingProxyType({letters_of(finding): finding for finding in FINDINGS})


def find_column(header: Row, names: Sequence[str]) -> int | None:
    """Return the place of the first of the names, given by their letters, that the header has."""
    letters = [letters_of(field) for field in header.fields]
    return next((letters.index(name) for name in names if name in letters), None)


def require_column(header: Row, names: Sequence[str], needed: str) -> int:
    """Return as find_column.

    Raises:
        DatasetError: there is no such column; `needed` says which.
    """
    place = find_column(header, names)
    if place is None:
        raise header.column_error(needed)
    return place


def find_findings(
    header: Row, words: Sequence[str], by_letters: Mapping[str, str] = FINDING_BY_LETTERS
) -> dict[str, int]:
    """Return finding -> its column, in the order of `by_letters`; a word before or after the finding's name is allowed.

    Args:
        header: of the file.
        words: such as prob.
        by_letters: the letters of each finding -> its name.

    Raises:
        DatasetError: a finding has two columns.
    """
    places: dict[str, int] = {}
    for place, name in enumerate(header.fields):
        letters = letters_of(name)
        forms = {letters, *map(letters.removeprefix, words), *map(letters.removesuffix, words)}
        for form in forms & by_letters.keys():
            finding = by_letters[form]
            if finding in places:
                two = quote_some([header.fields[places[finding]], name])
                raise header.error(f"the columns {two}", f"one column of {finding}")
            places[finding] = place
    return {finding: places[finding] for finding in by_letters.values() if finding in places}
