"""Put bytes on disk so that a reader sees all of them or none: hashes and atomic writes.

Knows nothing of what the bytes mean. Raises OSError as the system does; callers say what was being written.
"""

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""64 lower-case hexadecimal digits."""


def sha256_hex(content: bytes) -> str:
    """Return the SHA-256 of some bytes as 64 hexadecimal digits (FIPS 180-4)."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file of any size as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_file(path: Path, content: bytes, *, partial_in: Path | None = None) -> None:
    """Write a file that is either complete or as it was before, also after a crash or SIGKILL.

    Args:
        path: where.
        content: all of it.
        partial_in: folder on the same file system for the unfinished file; None for the file's own.
    """
    with tempfile.NamedTemporaryFile(
        dir=partial_in or path.parent, prefix=f".{path.name}.partial-", delete=False
    ) as partial:
        try:
            partial.write(content)
            partial.flush()
            os.fsync(partial.fileno())
            Path(partial.name).chmod(0o644)
            Path(partial.name).replace(path)
        except BaseException:
            Path(partial.name).unlink(missing_ok=True)
            raise
    fsync_path(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty hidden directory beside `path` that becomes `path` when the block ends well.

    After an error the directory is gone; after SIGKILL it stays hidden and the next write to `path` removes it.

    Raises:
        FileExistsError: something is at `path` already; a directory can't be replaced in one step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.partial-"
    _remove_abandoned(path.parent, prefix)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
        partial.chmod(0o755)
        for file in partial.rglob("*"):
            fsync_path(file)
        fsync_path(partial)
        # Rename replaces an *empty* directory silently, so look first.
        if path.exists():
            raise FileExistsError(17, "already exists", str(path))
        partial.rename(path)
        fsync_path(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a new directory of files in one step.

    Raises:
        FileExistsError: something is at `path` already.
    """
    if path.exists():
        raise FileExistsError(17, "already exists", str(path))
    with new_directory(path) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)


def show_file(partial: Path, path: Path) -> None:
    """Give a finished file its name, once its bytes are on the disk.

    Raises:
        FileExistsError: something is at `path` already.
    """
    fsync_path(partial)
    # Rename replaces a file silently, so look first.
    if path.exists() or path.is_symlink():
        raise FileExistsError(17, "already exists", str(path))
    partial.rename(path)
    fsync_path(path.parent)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what a killed writer left: the system drops its lock when it dies."""
    for stale in parent.glob(f"{glob.escape(prefix)}*"):
        try:
            handle = os.open(stale, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
        except BlockingIOError:
            pass  # its writer lives
        finally:
            os.close(handle)


def fsync_path(path: Path) -> None:
    """Put a file's content, or a folder's names, on disk for good."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
