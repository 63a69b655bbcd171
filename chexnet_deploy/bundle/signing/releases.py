"""A model line's releases, and the floor: the newest release that has run on a machine. Older ones are refused (rollback).

The floor file is raised in one step under a lock, and never lowered. It is as safe as the folder it lies in: who can
write there can lower it, and a disk put back to an older state takes it along.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError

from chexnet_deploy.errors import TrustError
from chexnet_deploy.files import FirstFormat, PlainFile, write_file
from chexnet_deploy.inputs import Record, describe

LOCK_TIMEOUT_S = 5.0  # the lock is held for one small write; whoever holds it longer hangs, and this must not
_MAX_FLOOR_BYTES = 1024

LineName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
"""A model line: what is released one after the other under one name, e.g. "chexnet-adult"."""

ReleaseNumber = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Release(Record):
    """Which release of which model line a bundle is; every precision and plan of one release has the same.

    Attributes:
        number: greater than that of every release before.
    """

    line: LineName
    number: ReleaseNumber

    def __str__(self) -> str:
        return f"{self.line} {self.number}"


class _Floor(Record):
    format: FirstFormat = 1
    release: Release


def read_floor(path: Path) -> Release:
    """Return the newest release that has run here.

    Raises:
        TrustError: the file is missing or damaged: without it nobody knows what is too old.
    """
    content = PlainFile(
        path=path,
        limit_bytes=_MAX_FLOOR_BYTES,
        error=TrustError,
        next_step="Start it with the release that may run: chexnet-deploy verify BUNDLE --trust FILE --start-floor",
        follows_links=True,
        refused_mode=0o002,
    ).read()
    try:
        return _Floor.model_validate_json(content, strict=True).release
    except ValidationError as err:
        raise TrustError(f"{path} is no floor file: {describe(err)}. Put back the one that was there.") from err


def start_floor(path: Path, release: Release) -> None:
    """Write a floor where none is yet: on a machine's first installation, by whoever installs it.

    Raises:
        TrustError: there is one already, or it can't be written.
    """
    with _locked(path):
        if path.exists() or path.is_symlink():
            raise TrustError(
                f"{path} is there already. A floor rises by itself; to lower it, delete it and start again."
            )
        _write(path, release)


def raise_floor(path: Path, release: Release) -> None:
    """Let nothing older than this release run from now on.

    Raises:
        TrustError: the floor is of another line, above this release already, or can't be written.
    """
    if read_floor(path) == release:
        return  # the ordinary case; it needs no lock and no writable disk
    with _locked(path):
        floor = read_floor(path)
        refuse_older(release, floor, str(path))
        if release.number > floor.number:
            _write(path, release)


def refuse_older(release: Release, floor: Release, where: str) -> None:
    """Refuse a release below the floor.

    Args:
        release: of the bundle.
        floor: of the same line.
        where: the file that says so, for errors.

    Raises:
        TrustError: names both.
    """
    if floor.line != release.line:
        raise TrustError(
            f"{where} is for the model line {floor.line}, not {release.line}. Give each line its own file."
        )
    if release.number < floor.number:
        raise TrustError(
            f"release {release} is older than {floor}, below which {where} lets nothing run. Install {floor} or later."
        )


def _write(path: Path, release: Release) -> None:
    try:
        write_file(path, (_Floor(release=release).model_dump_json() + "\n").encode())
    except OSError as err:
        raise _unwritable(path, err) from err


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock beside the file: the file itself is replaced when it is written."""
    from filelock import FileLock, Timeout

    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.stat()  # a folder that is not there is a mistake, and FileLock would make it
        held = FileLock(lock, timeout=LOCK_TIMEOUT_S, mode=0o600).acquire(poll_interval=0.01)
    except Timeout as err:
        raise TrustError(f"{lock} is held by another process. End that one, then try again.") from err
    except OSError as err:
        raise _unwritable(path, err) from err
    with held:
        yield


def _unwritable(path: Path, err: OSError) -> TrustError:
    return TrustError(f"{path} can't be written: {err.strerror}. Put the floor file where this user may write.")
