"""The prepared cache: every train and val image resized once, mapped from disk, so that training never reads a PNG.

Opens, checks and looks up; never reads an image (prepare.py does, and makes the cache). No image of the test list is
ever in one. In the cache's folder:

    pixels.u8      uint8 [N, 1, S, S] in C order, nothing before or after; row i is the i-th name of the chunks
    journal.jsonl  while it is being made. Line 1 is a Head; then one Chunk a line, for each part that is done and safe
    index.jsonl    {"version", "sha256"} on a line, then the finished journal, whose SHA-256 that is. Written last, in
                   one step: without it there is no cache
    lock           held by the one process that makes it

Rows are in the table's order. What is listed but has no row is named in its chunk: absent (not on disk) or quarantined
(can't be read, with the reason). The Head holds the key, and a cache with another key is refused:

    preprocessing  its hash, and S
    images         the names of the whole train and val splits, on disk or not, in the table's order
    resizing       what the Pillow at hand makes of one fixed picture. Versions are written down but not compared: a new
                   one rarely changes a pixel, and an old number proves nothing. PNG is lossless, so only resizing can
                   differ; `python -m training.prepare --verify` also reads some images again and compares every bit

Labels are no part of it: they are looked up by name in the table, so correcting one needs no new cache. Nor need the
PNGs stay: only an image that was absent and is on disk now makes a cache too old.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from chexnet_deploy.datasets.data_set import DataSet
from chexnet_deploy.errors import DatasetError, OnPhase
from chexnet_deploy.files import Sha256, sha256_hex
from chexnet_deploy.images.preprocessing import Pixels, Preprocessing
from chexnet_deploy.inputs import Record, quote_some

PIXELS: Final = "pixels.u8"
JOURNAL: Final = "journal.jsonl"
INDEX: Final = "index.jsonl"
LOCK: Final = "lock"
FORMAT_VERSION: Final = 1
_PREPARE: Final = "python -m training.prepare"
_PROBE_SIDE_PX: Final = 1024  # of NIH's images, so that the probe is reduced as they are


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An image on disk that can't be read, and why."""

    name: str
    reason: str


class Listed(NamedTuple):
    """An image of train or val; its path is None where it is not on disk."""

    name: str
    path: Path | None


class Key(Record):
    """What a cache's pixels depend on; see the module's first lines."""

    resize_px: int
    preprocessing_sha256: Sha256
    n_images: Annotated[int, Field(ge=0)]
    images_sha256: Sha256
    resizing_sha256: Sha256

    @classmethod
    def of(cls, listed: Iterable[Listed], preprocessing: Preprocessing) -> "Key":
        """Return the key that a cache of these images must have here and now."""
        names = [image.name for image in listed]
        # Noise with a fixed recipe (Knuth's multiplicative hash): any change of weights or rounding shows in it.
        noise = np.arange(_PROBE_SIDE_PX**2, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
        probe = preprocessing(noise.astype(np.uint8).reshape(_PROBE_SIDE_PX, _PROBE_SIDE_PX))
        return cls(
            resize_px=preprocessing.resize_px,
            preprocessing_sha256=preprocessing.sha256,
            n_images=len(names),
            images_sha256=sha256_hex("".join(f"{name}\n" for name in names).encode()),
            resizing_sha256=sha256_hex(probe.tobytes()),
        )


class Head(Record):
    """A journal's first line: the key, and the versions that took part."""

    key: Key
    tools: dict[str, str]

    @classmethod
    def of(cls, key: Key) -> "Head":
        """Return the key with the versions at hand."""
        return cls(key=key, tools={name: version(name) for name in ("chexnet-deploy", "numpy", "pillow")})


class Chunk(Record):
    """Neighbours in the table that were finished together.

    Attributes:
        names: of its rows, in their order.
        absent: listed, but not on disk.
        quarantined: on disk, but unreadable.
        sha256: of its rows' bytes.
    """

    names: tuple[str, ...]
    absent: tuple[str, ...]
    quarantined: tuple[Quarantined, ...]
    sha256: Sha256

    @property
    def n_listed(self) -> int:
        """How many images of the list it covers, with or without a row."""
        return self.n_read + len(self.absent)

    @property
    def n_read(self) -> int:
        """How many images of it were on disk."""
        return len(self.names) + len(self.quarantined)


@dataclass(frozen=True, slots=True, eq=False)
class Cache:
    """A finished cache; made by `training.prepare.prepare`, opened by `Cache.open`.

    Attributes:
        folder: where it lies.
        names: [N] image names; `pixels[i]` is `names[i]`.
        pixels: uint8 [N, 1, S, S], mapped read-only; copy rows out of it by `pixels[rows]`.
        quarantined: images that could not be read.
        absent: listed images that were not on disk.
        chunks: the parts it was made in.
    """

    folder: Path
    names: tuple[str, ...]
    pixels: Pixels
    quarantined: tuple[Quarantined, ...]
    absent: tuple[str, ...]
    chunks: tuple[Chunk, ...] = field(repr=False)
    _row_of: Mapping[str, int] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, preprocessing: Preprocessing, dataset: DataSet) -> "Cache":
        """Open a finished cache after the cheap checks: the index's hash, the key and the size of the pixels.

        Raises:
            DatasetError: there is none, it is unfinished or damaged, or it is of something else.
        """
        head, chunks = _read_index(folder)
        listed = list_images(dataset)
        refuse_another_key(folder, head, Key.of(listed, preprocessing))
        absent = {name for chunk in chunks for name in chunk.absent}
        appeared = [image.name for image in listed if image.path is not None and image.name in absent]
        if appeared:
            raise DatasetError(
                f"{folder}: found {len(appeared):,} images on disk that were not there when this cache was made "
                f"({quote_some(appeared)}); needed all that are on disk. {_again(folder)}"
            )
        return cls._of(folder, head.key.resize_px, chunks)

    @classmethod
    def _of(cls, folder: Path, resize_px: int, chunks: tuple[Chunk, ...]) -> "Cache":
        names = tuple(chain.from_iterable(chunk.names for chunk in chunks))
        if not names:
            raise DatasetError(f"{folder} holds no image: none of the list could be read. {_again(folder)}")
        shape = (len(names), 1, resize_px, resize_px)
        try:
            found, needed = (folder / PIXELS).stat().st_size, len(names) * resize_px**2
            if found != needed:
                raise DatasetError(
                    f"{folder / PIXELS}: found {found:,} bytes; needed {needed:,} for {len(names):,} images. "
                    f"{_again(folder)}"
                )
            pixels = np.memmap(folder / PIXELS, np.uint8, "r", shape=shape)
        except OSError as err:
            raise DatasetError(f"{folder / PIXELS} can't be read: {err.strerror or err}. {_again(folder)}") from err
        return cls(
            folder=folder,
            names=names,
            pixels=pixels,
            quarantined=tuple(chain.from_iterable(chunk.quarantined for chunk in chunks)),
            absent=tuple(chain.from_iterable(chunk.absent for chunk in chunks)),
            chunks=chunks,
            _row_of={name: row for row, name in enumerate(names)},
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memmap is a copy of its bytes, gigabytes for each loader process; the folder is enough.
        return Cache._of, (self.folder, self.pixels.shape[-1], self.chunks)

    def rows(self, names: Iterable[str]) -> NDArray[np.intp]:
        """Return [n] the row of each name, in the order given.

        Raises:
            DatasetError: a name has no row.
        """
        rows = [(name, self._row_of.get(name)) for name in names]
        without = [name for name, row in rows if row is None]
        if without:
            bad = sorted({image.name for image in self.quarantined}.intersection(without))
            why = f"{len(bad)} of them quarantined: {quote_some(bad)}" if bad else "none of them quarantined"
            raise DatasetError(
                f"{self.folder}: found no row for {len(without)} names ({quote_some(without)}), {why}; needed a row "
                f"for each. Next: take only names that are in the cache, which has no test images."
            )
        return np.array([row for _, row in rows], np.intp)

    def verify(self, on_phase: OnPhase) -> None:
        """Hash every row and compare with what was written.

        Raises:
            DatasetError: a byte has changed.
        """
        damaged: list[str] = []
        start = 0
        for chunk in self.chunks:
            stop = start + len(chunk.names)
            if hashlib.sha256(self.pixels[start:stop].tobytes()).hexdigest() != chunk.sha256:
                damaged.append(f"{chunk.names[0]} to {chunk.names[-1]}")
            on_phase("verifying", stop, len(self.names))
            start = stop
        if damaged:
            raise DatasetError(
                f"{self.folder / PIXELS}: found changed bytes in {len(damaged)} of {len(self.chunks)} parts "
                f"({quote_some(damaged)}); needed what was written. {_again(self.folder)}"
            )


def list_images(dataset: DataSet) -> tuple[Listed, ...]:
    """Return every image of train and val, on disk or not, in the table's order.

    Raises:
        DatasetError: a test image or another image of a test patient is among them.
    """
    rows = np.sort(np.concatenate([dataset.rows["train"], dataset.rows["val"]]))
    chosen = dataset.images.take(rows)
    leaked = np.isin(chosen.patients, list(dataset.patients_of("test")))
    if leaked.any():  # open_data refuses such splits too; this is the last check before training
        names = [name for name, is_leaked in zip(chosen.names, leaked, strict=True) if is_leaked]
        raise DatasetError(
            f"{dataset.root}: found images of test patients among train and val ({quote_some(names)}); needed none. "
            f"Next: correct the split."
        )
    return tuple(
        Listed(name, Path(file) if file else None) for name, file in zip(chosen.names, chosen.files, strict=True)
    )


def refuse_another_key(folder: Path, head: Head, needed: Key) -> None:
    """Raise a DatasetError that says what differs, where a cache is of something else."""
    found = head.key
    if found == needed:
        return
    if found.resize_px != needed.resize_px:
        differs = f"images of {found.resize_px} px; needed {needed.resize_px} px"
    elif found.preprocessing_sha256 != needed.preprocessing_sha256:
        differs = (
            f"another Preprocessing ({found.preprocessing_sha256[:12]}); needed {needed.preprocessing_sha256[:12]}"
        )
    elif found.images_sha256 != needed.images_sha256:
        differs = (
            f"another table or split, of {found.n_images:,} images; needed these {needed.n_images:,}, in the "
            f"table's order"
        )
    else:
        differs = (
            f"pixels resized by Pillow {head.tools.get('pillow', 'of unknown version')}; needed those of Pillow "
            f"{version('pillow')}, which resizes to other values"
        )
    raise DatasetError(f"{folder}: found a cache of {differs}. Next: give another folder. {_again(folder)}")


def read_head(line: bytes, folder: Path) -> Head:
    """Parse a journal's first line.

    Raises:
        DatasetError: it isn't one of this version.
    """
    try:
        return Head.model_validate_json(line)
    except ValidationError as err:
        raise DatasetError(f"{folder}: found a journal that this version can't read. {_again(folder)}") from err


def seal(journal: bytes) -> bytes:
    """Return the index of a finished journal."""
    return json.dumps({"version": FORMAT_VERSION, "sha256": sha256_hex(journal)}).encode("ascii") + b"\n" + journal


def _read_index(folder: Path) -> tuple[Head, tuple[Chunk, ...]]:
    path = folder / INDEX
    try:
        content = path.read_bytes()
    except OSError as err:
        found = "an unfinished cache" if (folder / JOURNAL).exists() else f"no cache ({err.strerror})"
        raise DatasetError(
            f"{folder}: found {found}; needed a finished one. Next: {_PREPARE} ROOT --cache {folder}"
        ) from err
    first, _, journal = content.partition(b"\n")
    try:
        header = json.loads(first)
        made_with, sha256 = header["version"], header["sha256"]
    except (ValueError, TypeError, KeyError) as err:
        raise DatasetError(f"{path} is not the index of a cache. {_again(folder)}") from err
    if made_with != FORMAT_VERSION:
        raise DatasetError(f"{path}: found format {made_with}; needed {FORMAT_VERSION}. {_again(folder)}")
    if sha256 != sha256_hex(journal):
        raise DatasetError(f"{path}: found changed bytes; needed what was written. {_again(folder)}")
    head, *lines = journal.splitlines()
    return read_head(head, folder), tuple(Chunk.model_validate_json(line) for line in lines)


def _again(folder: Path) -> str:
    # Not "delete the folder": it may hold other things.
    return f"To make it again in {folder}, delete this cache's files alone ({', '.join((PIXELS, JOURNAL, INDEX))})"
