"""What a table of findings is of, and how its rows look as bytes: the card, the columns, one row, and a row read back.

Writes no file; see table_file.py.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.datasets.predictions import QUARANTINED
from chexnet_deploy.errors import ImageError, TableError
from chexnet_deploy.files import FileContent, FirstFormat, Sha256
from chexnet_deploy.images.listing import one_line
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.runtime.predictor import FileAnswer

ColumnKind: TypeAlias = Literal["text", "count", "probability", "decision"]

OK: Final = "ok"


class Row(NamedTuple):
    """One image's line of a table, ready to be written.

    Attributes:
        line: of a CSV.
        is_quarantined: the image can't be read.
    """

    line: bytes
    is_quarantined: bool


class TableCard(BaseModel):
    """What a table is of: everything that its bytes depend on.

    Attributes:
        bundle: its id.
        preprocessing: the bundle's.
        findings: the bundle's, in its order.
        operating_points: by finding, what is present at and above it: the bundle's, or the site file's.
        absent_below: the site file's, where that is another; between the two nothing is said, and the field is empty.
        site: id of the site file that decides; None for the bundle's own operating points.
        backend: what ran the model: openvino, cpu, cuda, tensorrt or tensorrt_rtx; never "auto", which may become another.
            Answers may differ in their last bits between backends,
        threads: between thread counts of one call (None is all cores),
        batch_size: and between batches, which are cut by place every so many images.
        n_images: rows of the whole table.
        images_sha256: of the images' names in order; see ImageFiles.sha256.
        n_quarantined: rows of images that can't be read; None until the table is whole.
        table_sha256: of the whole table; None until then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: FirstFormat = 1
    bundle: Sha256
    preprocessing: Preprocessing
    findings: tuple[str, ...]
    operating_points: dict[str, float]
    absent_below: dict[str, float] = Field(default={})
    site: Sha256 | None = None
    backend: str
    threads: int | None
    batch_size: Annotated[int, Field(ge=1)]
    n_images: Annotated[int, Field(ge=1)]
    images_sha256: Sha256
    n_quarantined: int | None = None
    table_sha256: Sha256 | None = None

    @property
    def columns(self) -> dict[str, ColumnKind]:
        """The table's columns in order, with their kinds."""
        columns: dict[str, ColumnKind] = {"image": "text", "status": "text"}
        columns |= {f"prob_{finding}": "probability" for finding in self.findings}
        columns |= {f"present_{finding}": "decision" for finding in self.decided}
        columns |= {} if self.site is None else {"site": "text"}
        return columns | {"bundle": "text", "file_bytes": "count", "file_sha256": "text", "reason": "text"}

    @property
    def decided(self) -> tuple[str, ...]:
        """The findings that have an operating point, in order."""
        points = {*self.operating_points, *self.absent_below}
        return tuple(finding for finding in self.findings if finding in points)

    @property
    def begun(self) -> "TableCard":
        """The card as it was when the table was begun."""
        return self.model_copy(update={"n_quarantined": None, "table_sha256": None})

    def to_json(self) -> bytes:
        """Return the bytes of the card's file."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    def refuse_other_site(self, points: OperatingPoints) -> None:
        """Refuse operating points that are not the table's: a site file came, went or changed meanwhile.

        Raises:
            TableError: they are not.
        """
        if points.site != self.site:
            raise TableError(
                f"the table is decided by {_whose(self.site)}, and now there is {_whose(points.site)}. Run the same command "
                f"again with the one, or choose another --out for the other."
            )

    def refuse_other(self, out: Path, stored: "TableCard") -> None:
        """Refuse to go on with a table that was begun with another card.

        Raises:
            TableError: says what differs.
        """
        found, needed = stored.begun.model_dump(), self.begun.model_dump()
        for name, value in needed.items():
            if found[name] != value:
                raise TableError(
                    f"{out} was begun with {name.replace('_', ' ')} {_short(found[name])}; this run has {_short(value)}. "
                    f"A table is of one bundle, one list of images and one way to run. Choose another --out."
                )


def read_card(path: Path) -> TableCard | None:
    """Return a table's card; None where there is none.

    Raises:
        TableError: there is something else.
    """
    try:
        return TableCard.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as err:
        raise TableError(f"{path} is no card of a table that this version understands. Choose another --out.") from err


def header_bytes(card: TableCard) -> bytes:
    """Return the table's first line."""
    return row_bytes(card.columns)


def row_of(card: TableCard, name: str, done: FileAnswer) -> Row:
    """Return one image's row.

    Args:
        card: what the table is of.
        name: the image's, as the table shows it.
        done: what became of it; an ImageError's text may name its path.
    """
    answer, content = done.answer, ["", ""] if done.content is None else [str(field) for field in done.content]
    if isinstance(answer, ImageError):
        blanks = [""] * (len(card.findings) + len(card.decided))
        blanks += [] if card.site is None else [card.site]
        reason = one_line(str(answer).removeprefix(f"{done.path}: "))
        return Row(
            row_bytes([one_line(name), QUARANTINED, *blanks, card.bundle, *content, reason]), is_quarantined=True
        )
    # The shortest digits that name this float32 and no other: nothing is lost, and nothing is made up.
    probabilities = [str(np.float32(answer.probabilities[finding])) for finding in card.findings]
    decisions = ["" if (it := answer.present.get(finding)) is None else str(int(it)) for finding in card.decided]
    decisions += [] if card.site is None else [card.site]
    line = row_bytes([one_line(name), OK, *probabilities, *decisions, card.bundle, *content, ""])
    return Row(line, is_quarantined=False)


def content_of(fields: Sequence[str]) -> FileContent | None:
    """Return what a row says of its file; None where the file was not read, or not answered for."""
    n_bytes, sha256 = fields[-3:-1]
    return FileContent(int(n_bytes), sha256) if n_bytes.isdecimal() else None


def read_back(path: Path, card: TableCard, names: Sequence[str]) -> tuple[int, int, int]:
    """Return the rows that are done, those of them quarantined, and how many bytes they take with the header.

    Counts whole rows up to the last place where a batch was cut. What a kill can leave, a torn last line, ends the rows.

    Raises:
        TableError: a row is not the one of its image: nothing of ours wrote it.
    """
    with path.open("rb") as lines:
        first, header = lines.readline(), header_bytes(card)
        if first != header:
            if header.startswith(first):  # nothing, or torn
                return 0, 0, 0
            raise _changed(path, 1, "another header")
        n_done, n_quarantined, end = 0, 0, len(header)
        kept = (0, 0, end)
        for line in lines:
            if not line.endswith(b"\n"):
                break
            status = _check_row(path, line, n_done, card, names)
            n_done, n_quarantined, end = n_done + 1, n_quarantined + (status == QUARANTINED), end + len(line)
            if n_done % card.batch_size == 0 or n_done == card.n_images:
                kept = (n_done, n_quarantined, end)
    return kept


def _check_row(path: Path, line: bytes, place: int, card: TableCard, names: Sequence[str]) -> str:
    """Return the status of a row, where it is the row of the image at this place."""
    number = place + 2  # the header is row 1
    if place >= card.n_images:
        raise _changed(path, number, f"more rows than the {card.n_images:,} images")
    try:
        fields = next(csv.reader([line.decode()], strict=True))
    except (UnicodeDecodeError, csv.Error) as err:
        raise _changed(path, number, f"a broken row ({err})") from err
    if len(fields) != len(card.columns) or fields[1] not in (OK, QUARANTINED) or fields[-4] != card.bundle:
        raise _changed(path, number, "a row of another form or bundle")
    if fields[0] != one_line(names[place]):
        raise _changed(path, number, f"the image {fields[0]!r}, not {one_line(names[place])!r}")
    return fields[1]


def _changed(path: Path, number: int, found: str) -> TableError:
    return TableError(
        f"{path}, row {number}: found {found}; needed the rows as they were written. "
        f"Delete it and its card to begin again, or choose another --out."
    )


def row_bytes(fields: Iterable[str]) -> bytes:
    """Return a line of the table."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue().encode()


def _whose(site: str | None) -> str:
    return "the bundle's own operating points" if site is None else f"the site file {site[:12]}…"


def _short(value: object) -> str:
    return str(value) if len(str(value)) <= 60 else f"{str(value)[:12]}…"
