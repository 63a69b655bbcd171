"""`python -m training.prepare ROOT --cache DIR`: read and resize every train and val image once; cache.py has the format.

Never reads a test image. reading.py's processes read and this one writes: rows are appended in order, so an image that
can't be read leaves no hole, and a full disk is an error and not a signal, as it would be under a memory map. A chunk
counts once its rows are on disk and then its line is in the journal, so SIGKILL at any moment loses no finished chunk.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import numpy as np
import typer
from pydantic import ValidationError

from chexnet_deploy.datasets.data_set import DataSet, open_data
from chexnet_deploy.errors import DatasetError, OnPhase, SpecError
from chexnet_deploy.files import write_file
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.inputs import describe, quote_some
from chexnet_deploy.terminal import progress, run_program
from training.cache import (
    INDEX,
    JOURNAL,
    LOCK,
    PIXELS,
    Cache,
    Chunk,
    Head,
    Key,
    Listed,
    Quarantined,
    list_images,
    read_head,
    refuse_another_key,
    seal,
)
from training.reading import Answer, read_batch, read_batches

CHUNK_IMAGES: Final = 1024  # listed images: 49 MiB of rows at 224 px, some seconds of work to lose
MAX_BAD: Final = 100
_BATCH_IMAGES: Final = 16  # for one trip to a worker
_N_COMPARED: Final = 32  # images that --verify reads again


def prepare(
    dataset: DataSet,
    preprocessing: Preprocessing,
    folder: Path,
    *,
    workers: int | None = None,
    max_bad: int = MAX_BAD,
    chunk_images: int = CHUNK_IMAGES,
    on_phase: OnPhase,
) -> Cache:
    """Open the cache in a folder; make it first, or finish it, where need be.

    Args:
        dataset: the whole of it; only its train and val images are read.
        preprocessing: how.
        folder: of this one cache, made if need be.
        workers: processes, None for one a core; with more than one, a script that calls this needs the usual
            `if __name__ == "__main__":`, as they are spawned.
        max_bad: with more images than this that can't be read, nothing is finished.
        chunk_images: listed images that are finished together.
        on_phase: called with the phase's name, what is done and of how much.

    Raises:
        DatasetError: the folder can't be written or holds another cache, another process is making it, or too many
            images can't be read. Finished chunks are kept, and the next call goes on after them.
    """
    if not (folder / INDEX).exists():
        images = list_images(dataset)
        if all(image.path is None for image in images) or dataset.patients_unknown:
            dataset.require("train")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_strangers(folder)
            with _locked(folder):
                if not (folder / INDEX).exists():  # who held the lock before may have finished it
                    _make(images, preprocessing, folder, workers, max_bad, chunk_images, on_phase)
        except BrokenProcessPool as err:
            raise DatasetError(
                f"{folder}: a worker process died, perhaps for want of memory; finished chunks are kept. "
                f"Next: run this again, with fewer --workers."
            ) from err
        except OSError as err:
            raise DatasetError(
                f"{folder} can't be written: {err.strerror or err}; finished chunks are kept. "
                f"Next: check the path, its permissions and the space, and run this again."
            ) from err
    cache = Cache.open(folder, preprocessing, dataset)
    _refuse_too_many(folder, cache.quarantined, max_bad)
    return cache


def compare_with_images(cache: Cache, dataset: DataSet, preprocessing: Preprocessing) -> int:
    """Read some images again, spread over the cache, compare every pixel, and return how many were still on disk.

    Raises:
        DatasetError: one is not what it was, or is read otherwise than it was.
    """
    spread = np.unique(np.linspace(0, len(cache.names) - 1, _N_COMPARED).astype(np.intp)).tolist()
    paths = dict(list_images(dataset))
    n_compared = 0
    for row in spread:
        path = paths[cache.names[row]]
        if path is None:
            continue
        images, reasons = read_batch([path], preprocessing)
        if reasons[0] is not None or not np.array_equal(images[0], cache.pixels[row : row + 1]):
            raise DatasetError(
                f"{path}: found other pixels than in {cache.folder} ({reasons[0] or 'it reads well'}); the file or the "
                f"decoder has changed. Next: restore it, or delete the cache and make it again."
            )
        n_compared += 1
    return n_compared


def _refuse_strangers(folder: Path) -> None:
    there = {path.name for path in folder.iterdir()}
    if there and there.isdisjoint({PIXELS, JOURNAL, LOCK}):
        raise DatasetError(
            f"{folder}: found {quote_some(sorted(there))}, which no cache holds. Next: give a new folder."
        )


def _make(
    images: Sequence[Listed],
    preprocessing: Preprocessing,
    folder: Path,
    workers: int | None,
    max_bad: int,
    chunk_images: int,
    on_phase: OnPhase,
) -> None:
    """Append chunk after chunk behind those that are finished, and seal the journal."""
    chunks = _resume(folder, images, preprocessing, on_phase)
    n_listed = sum(chunk.n_listed for chunk in chunks)
    row_bytes = preprocessing.resize_px**2
    plan = [images[i : i + chunk_images] for i in range(n_listed, len(images), chunk_images)]
    n_left = sum(len(_present(listed)) for listed in plan)
    _refuse_little_space(folder, n_left * row_bytes)
    batches = [[r.path for r in batch if r.path] for listed in plan for batch in _batches(listed)]
    with (
        closing(read_batches(batches, preprocessing, workers)) as answers,
        (folder / PIXELS).open("ab") as pixels,
        (folder / JOURNAL).open("ab") as journal,
    ):
        pixels.truncate(sum(len(chunk.names) for chunk in chunks) * row_bytes)
        done = sum(chunk.n_read for chunk in chunks)
        total = done + n_left
        for listed in plan:
            chunk = _write_chunk(listed, answers, pixels, partial(_count, on_phase, done, total))
            chunks.append(chunk)
            done += chunk.n_read
            _refuse_too_many(folder, [image for chunk in chunks for image in chunk.quarantined], max_bad)
            _sync(pixels)  # before the line that says so
            journal.write(chunk.model_dump_json().encode("ascii") + b"\n")
            _sync(journal)
    write_file(folder / INDEX, seal((folder / JOURNAL).read_bytes()))
    (folder / JOURNAL).unlink()


def _write_chunk(
    listed: Sequence[Listed], answers: Iterator[Answer], pixels: BinaryIO, on_images: Callable[[int], None]
) -> Chunk:
    """Append the rows of some neighbours, and return what to write into the journal."""
    digest = hashlib.sha256()
    names: list[str] = []
    bad: list[Quarantined] = []
    for batch in _batches(listed):
        arrays, reasons = next(answers)
        for array in arrays:
            pixels.write(array.data)
            digest.update(array.data)
        for image, reason in zip(batch, reasons, strict=True):
            if reason is None:
                names.append(image.name)
            else:
                bad.append(Quarantined(image.name, reason))
        on_images(len(names) + len(bad))
    absent = tuple(image.name for image in listed if image.path is None)
    return Chunk(names=tuple(names), absent=absent, quarantined=tuple(bad), sha256=digest.hexdigest())


def _resume(folder: Path, images: Sequence[Listed], preprocessing: Preprocessing, on_phase: OnPhase) -> list[Chunk]:
    """Return the finished chunks that still hold, and cut the journal back to them; begin one where there is none."""
    for name in (JOURNAL, INDEX):  # what a kill inside write_file leaves
        for left in folder.glob(f".{name}.partial-*"):
            left.unlink()
    path, key = folder / JOURNAL, Key.of(images, preprocessing)
    chunks: list[Chunk] = []
    if not path.exists():
        if (folder / PIXELS).exists():
            raise DatasetError(
                f"{folder / PIXELS}: found pixels without a journal; needed both or none. Next: delete {folder}."
            )
        write_file(path, Head.of(key).model_dump_json().encode("ascii") + b"\n")
        return chunks
    first, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]  # a line that was cut has no end
    refuse_another_key(folder, read_head(first, folder), key)
    start = 0
    (folder / PIXELS).touch()
    with (folder / PIXELS).open("rb") as pixels:
        for line in lines:
            try:
                chunk = Chunk.model_validate_json(line)
            except ValidationError:
                break
            if not _still_holds(chunk, images[start : start + chunk.n_listed], pixels, preprocessing):
                break
            start += chunk.n_listed
            chunks.append(chunk)
            on_phase("checking what is finished", len(chunks), len(lines))
    write_file(path, b"\n".join([first, *lines[: len(chunks)], b""]))
    return chunks


def _still_holds(chunk: Chunk, listed: Sequence[Listed], pixels: BinaryIO, preprocessing: Preprocessing) -> bool:
    """Say whether a chunk's bytes are as written and nothing that it left out could be read now."""
    rows = pixels.read(len(chunk.names) * preprocessing.resize_px**2)
    if hashlib.sha256(rows).hexdigest() != chunk.sha256:
        return False
    paths = dict(listed)
    bad = [image.name for image in chunk.quarantined]
    if {*chunk.names, *chunk.absent, *bad} != paths.keys() or any(paths[name] is not None for name in chunk.absent):
        return False
    _, reasons = read_batch([path for name in bad if (path := paths[name]) is not None], preprocessing)
    return None not in reasons


def _present(listed: Sequence[Listed]) -> list[Listed]:
    return [image for image in listed if image.path is not None]


def _count(on_phase: OnPhase, before: int, total: int, n_images: int) -> None:
    on_phase("preparing", before + n_images, total)


def _batches(listed: Sequence[Listed]) -> Iterable[Sequence[Listed]]:
    present = _present(listed)
    return (present[i : i + _BATCH_IMAGES] for i in range(0, len(present), _BATCH_IMAGES))


def _refuse_too_many(folder: Path, bad: Sequence[Quarantined], max_bad: int) -> None:
    if len(bad) > max_bad:
        shown = "; ".join(f"{image.name}: {image.reason}" for image in bad[:3])
        raise DatasetError(
            f"{folder}: found {len(bad)} images that can't be read ({shown}{'; ...' if len(bad) > 3 else ''}); needed "
            f"at most {max_bad}. Next: copy them again and run this again, or leave more of them out by --max-bad."
        )


def _refuse_little_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DatasetError(
            f"{folder}: found {free_bytes / 2**20:,.0f} MiB free; needed {needed_bytes / 2**20:,.0f} MiB more. "
            f"Next: make room, or give a folder on another disk."
        )


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system drops when this process dies."""
    with (folder / LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise DatasetError(
                f"{folder}: another process is preparing this cache. Next: wait until it has finished."
            ) from err
        yield


app = typer.Typer(add_completion=False)


@app.command()
def main(
    root: Annotated[Path, typer.Argument(help="Labelled images: ChestX-ray14's folder, a table, or its TOML.")],
    cache: Annotated[Path, typer.Option(help="Folder of the cache; an unfinished one in it goes on.")],
    resize_px: Annotated[int, typer.Option(help="S: 224 for the paper's recipes.")] = 224,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every row of it, and read some images again to compare.")
    ] = False,
    max_bad: Annotated[int, typer.Option(min=0, help="How many images may be left out as unreadable.")] = MAX_BAD,
) -> None:
    """Read and resize every train and val image once, so that training reads no PNG."""
    try:
        preprocessing = Preprocessing(resize_px=resize_px)
    except ValidationError as err:
        raise SpecError(f"--resize-px: {describe(err)}.") from err
    dataset = open_data(root)
    with progress() as on_phase:
        made = prepare(dataset, preprocessing, cache, workers=workers, max_bad=max_bad, on_phase=on_phase)
        if verify:
            made.verify(on_phase)
            n_compared = compare_with_images(made, dataset, preprocessing)
    for image in made.quarantined:
        typer.echo(f"quarantined {image.name}: {image.reason}")
    if made.quarantined:
        typer.echo("To take in a mended image: delete the cache and make it again.")
    if made.absent:
        typer.echo(f"not on disk: {len(made.absent):,} listed images: {quote_some(made.absent)}")
    if verify:
        typer.echo(f"verified: every row as written, {n_compared} images read again and equal")
    typer.echo(f"{cache}: {len(made.names):,} images of {resize_px} px, {len(made.quarantined)} quarantined")


if __name__ == "__main__":
    run_program(app)
