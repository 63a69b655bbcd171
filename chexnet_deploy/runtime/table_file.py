"""Write one table of findings for many images: rows are appended durably, resumed after a crash, published when complete.

    results.csv           every image's row; its name appears when the last row is on the disk
    results.csv.json      the card: the bundle, preprocessing and images it is of; at the end also its SHA-256
    results.csv.partial   the rows so far; of a Parquet table too, which is made of them at the end

A killed run leaves whole rows and at the most one that is torn. The next run drops that one and goes on where a batch was
cut, so that its bytes are those of a run that was never stopped. Another bundle, other images or a changed row are refused.
Predicts nothing.
"""

import fcntl
import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Final

from chexnet_deploy.errors import ImageError, TableError, require
from chexnet_deploy.files import sha256_of_file, show_file, write_file
from chexnet_deploy.runtime.predictor import Prediction
from chexnet_deploy.runtime.table import Row, TableCard, header_bytes, read_back, read_card, row_bytes

SUFFIXES: Final = (".csv", ".parquet")


class Table:
    """A table being written; see open_table.

    Attributes:
        n_done: rows so far, also those of an earlier run.
        n_quarantined: of them, images that can't be read.
    """

    def __init__(self, out: Path, card: TableCard, names: Sequence[str]) -> None:
        self.n_done = 0
        self.n_quarantined = 0
        self._card, self._names = card, names
        self._out = out
        self._partial, self._made = (out.with_name(f"{out.name}.{end}") for end in ("partial", "partial.parquet"))
        self._card_path = out.with_name(f"{out.name}.json")
        self._rows: IO[bytes] | None = None

    def add(self, path: Path, answer: Prediction | ImageError) -> None:
        """Write the next image's row.

        Args:
            path: what was read, as the ImageError's text names it.
            answer: findings, or why there are none.

        Raises:
            TableError: the disk is full or read-only; rows that are done are kept.
        """
        line = row_bytes(self._card, self._names[self.n_done], path, answer)
        self.add_row(Row(line, isinstance(answer, ImageError)))

    def add_row(self, row: Row) -> None:
        """Write the next image's row, which was made elsewhere; raises as `add` does."""
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
            self._partial.unlink(missing_ok=True)  # a Parquet table's rows, where a kill came between
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
            rows.truncate(end)
            if end == 0:
                _write_all(rows, header_bytes(self._card))
        self._rows = rows

    def _finish(self, parquet: ModuleType | None) -> None:
        """Show the table. Its card comes first: where there is a table, there is its SHA-256."""
        assert self.n_done == self._card.n_images
        made = self._partial
        if parquet is not None:
            made = self._made  # one name for it, so that what a kill left is written over
            metadata = {"chexnet_deploy": self._card.model_dump_json()}
            parquet.write_parquet(self._partial, made, self._card.columns, metadata)
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
        MissingPackageError: Parquet needs pyarrow.
    """
    if out.suffix not in SUFFIXES:
        raise TableError(f"{out} ends in {out.suffix or 'nothing'}; needed {' or '.join(SUFFIXES)}. Rename it.")
    parquet = _import_parquet() if out.suffix == ".parquet" else None
    table = Table(out, card, names)
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        is_there = out.exists() or out.is_symlink()
    if is_there:
        table._take_whole()
        yield table
        return
    with _locked(out, table._partial) as rows:
        table._take_up(rows)
        try:
            yield table
            with _writing(out):
                table._finish(parquet)
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
            fcntl.flock(rows, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
