"""Write one table of findings for many images: rows are appended durably, resumed after a crash, published when complete.

    results.csv           every image's row; its name appears when the last row is on the disk
    results.csv.json      the card: the bundle, preprocessing and images it is of; at the end also its SHA-256
    results.csv.partial   the rows so far; of a Parquet table too, which is made of them at the end

A killed run leaves whole rows and at the most one that is torn. The next run drops that one and goes on where a batch was
cut, so that its bytes are those of a run that was never stopped. Another bundle, other images or a changed row are refused. Rows
of files that changed are replaced, in a table that is whole too. Predicts nothing.
"""

import csv
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, Final

from chexnet_deploy.datasets.predictions import QUARANTINED
from chexnet_deploy.errors import TableError, require
from chexnet_deploy.files import FileContent, lock, require_locks, sha256_of_file, show_file, write_file
from chexnet_deploy.runtime.table import (
    Row,
    TableCard,
    content_of,
    header_bytes,
    read_back,
    read_card,
    row_bytes,
)

SUFFIXES: Final = (".csv", ".parquet")


class Table:
    """A table being written; see open_table.

    Attributes:
        n_done: rows so far, also those of an earlier run.
        n_quarantined: of them, images that can't be read.
    """

    def __init__(self, out: Path, card: TableCard, names: Sequence[str], parquet: ModuleType | None) -> None:
        self.n_done = 0
        self.n_quarantined = 0
        self._card, self._names = card, names
        self._out = out
        self._partial, self._made, self._replaced = (
            out.with_name(f"{out.name}.{end}") for end in ("partial", "partial.parquet", "partial.replaced")
        )
        self._card_path = out.with_name(f"{out.name}.json")
        self._rows: IO[bytes] | None = None
        self._parquet = parquet
        self._stack = ExitStack()

    def contents(self) -> Iterator[FileContent | None]:
        """Yield what the rows that are done say of their files; see content_of."""
        return map(content_of, islice(self._rows_read(), self.n_done))

    def replace(self, rows: Mapping[int, Row]) -> None:
        """Write rows in the place of others that are done, all of them or none; raises as `add` does.

        A table that was whole is begun again with its other rows.
        """
        with _writing(self._out):
            if self._rows is None:
                self._begin_again()
            with self._replaced.open("wb") as fresh, self._partial.open("rb") as before:
                fresh.write(before.readline())
                for place, line in enumerate(before):
                    fresh.write(rows[place].line if place in rows else line)
            rows_file = self._replaced.open("a+b", buffering=0)
            self._stack.callback(rows_file.close)
            lock(rows_file)  # before anybody else can find it
            os.fsync(rows_file.fileno())
            self._replaced.replace(self._partial)
            self._rows = rows_file
        self.n_quarantined = sum(fields[1] == QUARANTINED for fields in self._rows_read())

    def add(self, row: Row) -> None:
        """Write the next image's row.

        Raises:
            TableError: the disk is full or read-only; rows that are done are kept.
        """
        assert self._rows is not None  # a whole table has no next row
        with _writing(self._out):
            _write_all(self._rows, row.line)
        self.n_done += 1
        self.n_quarantined += row.is_quarantined

    def _take_whole(self) -> None:
        """Count the rows of a table that is there already, where it is the one asked for and as it was written."""
        stored = read_card(self._card_path)
        if stored is None or stored.table_sha256 is None or stored.n_quarantined is None:
            raise TableError(f"{self._out} is there already, and not as this command leaves it. Choose another --out.")
        self._card.refuse_other(self._out, stored)
        with _writing(self._out):
            actual = sha256_of_file(self._out)
        if actual != stored.table_sha256:
            raise TableError(
                f"{self._out} was changed after it was written: its sha256 is {actual[:12]}…, its card says "
                f"{stored.table_sha256[:12]}…. Choose another --out, or delete the table and its card."
            )
        with _writing(self._out):
            for rows in (self._partial, self._replaced):  # a Parquet table's, where a kill came between
                rows.unlink(missing_ok=True)
        self.n_done, self.n_quarantined = self._card.n_images, stored.n_quarantined

    def _take_up(self, rows: IO[bytes]) -> None:
        """Begin, or go on after the rows of an earlier run, cut where a batch was."""
        has_rows = os.fstat(rows.fileno()).st_size > 0
        try:
            stored = read_card(self._card_path)
            if stored is not None:
                self._card.refuse_other(self._out, stored)
            elif has_rows:
                raise TableError(
                    f"{self._partial} is there without its card {self._card_path.name}. Delete it, or choose another --out."
                )
        except TableError:
            if not has_rows:
                self._partial.unlink()
            raise
        with _writing(self._out):
            self.n_done, self.n_quarantined, end = read_back(self._partial, self._card, self._names)
            for stale in self._out.parent.glob(f".{glob.escape(self._card_path.name)}.partial-*"):
                stale.unlink()  # what a kill left while the card was written
            # The card before the first row: rows without one would be nobody's.
            write_file(self._card_path, self._card.to_json())
            if self._replaced.exists():
                self._replaced.unlink()  # what a kill left while rows were replaced
            rows.truncate(end)
            if end == 0:
                _write_all(rows, header_bytes(self._card))
        self._rows = rows

    def _rows_read(self) -> Iterator[Sequence[str]]:
        """Yield the fields of the rows on the disk."""
        if self._rows is None and self._parquet is not None:
            yield from self._parquet.read_rows(self._out)
            return
        with (self._out if self._rows is None else self._partial).open(encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines)
            next(rows)
            yield from rows

    def _begin_again(self) -> None:
        """Make a whole table one that is not: after a kill its rows are gone on with."""
        if self._parquet is None:
            self._out.replace(self._partial)
        else:
            with self._replaced.open("wb") as rows:
                rows.write(header_bytes(self._card))
                rows.writelines(map(row_bytes, self._rows_read()))
            self._replaced.replace(self._partial)
            self._out.unlink()
        self._take_up(self._stack.enter_context(_locked(self._out, self._partial)))

    def _finish(self) -> None:
        """Show the table. Its card comes first: where there is a table, there is its SHA-256."""
        if self._rows is None:  # it was whole, and nothing changed
            return
        assert self.n_done == self._card.n_images
        made = self._partial
        if self._parquet is not None:
            made = self._made  # one name for it, so that what a kill left is written over
            metadata = {"chexnet_deploy": self._card.model_dump_json()}
            self._parquet.write_parquet(self._partial, made, self._card.columns, metadata)
        ending = {"n_quarantined": self.n_quarantined, "table_sha256": sha256_of_file(made)}
        write_file(self._card_path, self._card.model_copy(update=ending).to_json())
        show_file(made, self._out)
        self._partial.unlink(missing_ok=True)

    def _forget(self) -> None:
        self._partial.unlink(missing_ok=True)
        self._card_path.unlink(missing_ok=True)


@contextmanager
def open_table(out: Path, card: TableCard, names: Sequence[str]) -> Iterator[Table]:
    """Begin a table, or go on with it; it becomes `out` when the block ends well, after a row for every image.

    A table that is whole already comes with all its rows done. After an error rows are kept, if there are any.

    Args:
        out: .csv or .parquet.
        card: what it is of.
        names: of all images, in order.

    Raises:
        TableError: what is there is of another run or was changed, another process is writing it, or it can't be written.
        UnsupportedSystemError: this is Windows.
        MissingPackageError: Parquet needs pyarrow.
    """
    require_locks("a table that is gone on with")
    if out.suffix not in SUFFIXES:
        raise TableError(f"{out} ends in {out.suffix or 'nothing'}; needed {' or '.join(SUFFIXES)}. Rename it.")
    parquet = _import_parquet() if out.suffix == ".parquet" else None
    table = Table(out, card, names, parquet)
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        is_there = out.exists() or out.is_symlink()
    with table._stack as stack:
        if is_there:
            table._take_whole()
        else:
            table._take_up(stack.enter_context(_locked(out, table._partial)))
        try:
            yield table
            with _writing(out):
                table._finish()
        except BaseException:
            if table.n_done == 0:
                table._forget()
            raise


@contextmanager
def _locked(out: Path, partial: Path) -> Iterator[IO[bytes]]:
    """Yield the file of rows, which no other process writes meanwhile; the system drops the lock when this one dies."""
    with _writing(out):
        rows = partial.open("a+b", buffering=0)
    with rows:
        try:
            lock(rows)
        except BlockingIOError as err:
            raise TableError(f"{partial} is being written by another process. Wait for it, or stop it.") from err
        # Between opening and locking, another process may have given the file its last name.
        if not partial.exists() or not os.path.samestat(partial.stat(), os.fstat(rows.fileno())):
            raise TableError(f"{out} was just finished by another process. Run the same command again.")
        yield rows


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise TableError(
            f"{out} can't be written: {err.strerror}. Rows that are done are kept: check the path, its permissions and the "
            f"space, then run the same command again."
        ) from err


def _write_all(file: IO[bytes], content: bytes) -> None:
    view = memoryview(content)
    while view:  # a nearly full disk takes a part
        view = view[file.write(view) :]


def _import_parquet() -> ModuleType:
    with require("table", so="no Parquet can be written", instead="give an --out that ends in .csv"):
        from chexnet_deploy.runtime import parquet
    return parquet
