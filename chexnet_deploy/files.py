"""Hash files, write them atomically, and read files that somebody else may have laid out.

Knows nothing of what the bytes mean. Writing raises OSError as the system does; callers say what was being written. Reading
follows no link, pipe or device and believes no size: what a path names is opened once, and its kind, links and size are read
from the open file, so nothing can be swapped between looking and reading.
"""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, NamedTuple

from pydantic import Field, StringConstraints

from chexnet_deploy.errors import BundleError, ChexnetError, unsupported

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_OPENS_DIRECTORIES = hasattr(os, "O_DIRECTORY")  # Windows doesn't

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""64 lower-case hexadecimal digits."""
FirstFormat = Annotated[int, Field(strict=True, ge=1, le=1)]
"""Number of a file's format where there was no other yet; no True and no 1.0, which Literal[1] takes."""


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


class FileContent(NamedTuple):
    """What a file held when it was read: its size and its SHA-256."""

    n_bytes: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "FileContent":
        """Measure bytes."""
        return cls(len(content), sha256_hex(content))


def write_file(path: Path, content: bytes, *, partial_in: Path | None = None, mode: int = 0o644) -> None:
    """Write a file that is either complete or as it was before, also after a crash or SIGKILL.

    Args:
        path: where.
        content: all of it.
        partial_in: folder on the same file system for the unfinished file; None for the file's own.
        mode: who may read it.
    """
    handle, name = tempfile.mkstemp(dir=partial_in or path.parent, prefix=f".{path.name}.partial-")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:  # closed before it is renamed: Windows renames no open file
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(mode)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty hidden directory beside `path` that becomes `path` when the block ends well.

    After an error the directory is gone; after SIGKILL it stays hidden and the next write to `path` removes it, but on Windows,
    where directories have no locks and nobody knows whether its writer lives.

    Raises:
        FileExistsError: something is at `path` already; a directory can't be replaced in one step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.partial-"
    _remove_abandoned(path.parent, prefix)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    try:
        with _locked_directory(partial):
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
        with contextlib.suppress(FileNotFoundError, BlockingIOError), _locked_directory(stale) as is_locked:
            if is_locked:
                shutil.rmtree(stale, ignore_errors=True)


def require_locks(what: str) -> None:
    """Refuse what one process alone may write where there is no `lock`: on Windows, whose own locks keep readers out too.

    Raises:
        UnsupportedSystemError: names `what`.
    """
    if fcntl is None:
        raise unsupported(what)


def lock(file: int | IO[bytes]) -> None:
    """Take the lock of an open file; the system drops it when the file is closed, or this process dies.

    Raises:
        BlockingIOError: it is taken.
    """
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _locked_directory(path: Path) -> Iterator[bool]:
    """Hold a directory's lock; False where the system opens no directories."""
    if not _OPENS_DIRECTORIES:
        yield False
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        lock(handle)
        yield True
    finally:
        os.close(handle)


def fsync_path(path: Path) -> None:
    """Put a file's content, or a folder's names, on disk for good; Windows keeps names by itself."""
    if not _OPENS_DIRECTORIES and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if _OPENS_DIRECTORIES else os.O_RDWR)  # Windows flushes what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_CHUNK_BYTES = 2**20
# O_NONBLOCK: opening a named pipe would else wait for its writer, for ever. O_BINARY: Windows changes line ends without.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
# What opening a symbolic link, a socket or a device without a driver answers under these flags.
_NOT_PLAIN = {errno.ELOOP, errno.ENXIO, errno.ENODEV}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainFile:
    """A file that must be plain, and what to say where it isn't.

    Attributes:
        path: where; its last part alone is used where a folder is given.
        folder: an open directory that the file is looked for in, so that several come from the same one; None for none.
        limit_bytes: the most it may have.
        error: raised for everything that is wrong.
        next_step: the last sentence of every error.
        follows_links: links are taken; for files that the user names, not for those that came with a bundle.
        refused_mode: permission bits it must not have.
    """

    path: Path
    folder: int | None = None
    limit_bytes: int
    error: type[ChexnetError]
    next_step: str
    follows_links: bool = False
    refused_mode: int = 0

    def read(self) -> bytes:
        """Return its bytes.

        Raises:
            ChexnetError: `error`; missing, no plain file, linked, too large, or changed while it was read.
        """
        with self._opened() as (handle, size):
            # At once: joining chunks would take the memory twice.
            chunks = list(self._chunks(handle, size, most_bytes=size))
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def sha256(self) -> str:
        """Return its SHA-256 as 64 hexadecimal digits, in constant memory; raises as `read` does."""
        digest = hashlib.sha256()
        with self._opened() as (handle, size):
            for chunk in self._chunks(handle, size, most_bytes=_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    @contextmanager
    def _opened(self) -> Iterator[tuple[int, int]]:
        try:
            if not (_NO_LINKS or self.follows_links) and self.path.is_symlink():
                raise self._not_plain()
            where = self.path if self.folder is None else self.path.name
            handle = os.open(where, _READ | (0 if self.follows_links else _NO_LINKS), dir_fd=self.folder)
            try:
                yield handle, self._checked_size(os.fstat(handle))
            finally:
                os.close(handle)
        except FileNotFoundError as err:
            raise self.error(f"{self.path} is missing. {self.next_step}") from err
        except OSError as err:
            if err.errno in _NOT_PLAIN:
                raise self._not_plain() from err
            raise self.error(f"{self.path} can't be read: {err.strerror}. Check the disk and its permissions.") from err

    def _checked_size(self, status: os.stat_result) -> int:
        if not stat.S_ISREG(status.st_mode):
            raise self._not_plain()
        if status.st_nlink > 1 and not self.follows_links:
            # Under its other name it can be changed by whoever can't write here.
            raise self.error(f"{self.path} has {status.st_nlink} names (hard links). Copy it without links.")
        if status.st_mode & self.refused_mode and hasattr(os, "geteuid"):  # Windows keeps permissions elsewhere
            mode = stat.S_IMODE(status.st_mode)
            raise self.error(
                f"{self.path} has mode {mode:o}, which gives others more than they may have. "
                f"Run: chmod {mode & ~self.refused_mode:o} {self.path}"
            )
        if status.st_size > self.limit_bytes:
            raise self.error(
                f"{self.path} has {status.st_size} bytes, more than the {self.limit_bytes} it may have. {self.next_step}"
            )
        return status.st_size

    def _chunks(self, handle: int, size: int, *, most_bytes: int) -> Iterator[bytes]:
        """Yield exactly as many bytes as the file said it has."""
        left = size
        while left:
            chunk = os.read(handle, min(left, most_bytes))
            if not chunk:
                raise self._changed()
            left -= len(chunk)
            yield chunk
        if os.read(handle, 1) or os.fstat(handle).st_size != size:
            raise self._changed()

    def _not_plain(self) -> ChexnetError:
        return self.error(f"{self.path} is not a plain file. Copy it without links. {self.next_step}")

    def _changed(self) -> ChexnetError:
        return self.error(f"{self.path} changed while it was read. {self.next_step}")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes `path` at the end.

    Raises:
        BundleError: something is there already, or it can't be written.
    """
    if path.exists() or path.is_symlink():
        raise BundleError(f"{path} is there already. Choose another folder, or delete it first.")
    try:
        with new_directory(path) as partial:
            yield partial
    except OSError as err:
        raise BundleError(f"{path} can't be written: {err.strerror}. Choose another folder.") from err
