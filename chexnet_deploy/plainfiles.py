"""Read files that somebody else may have laid out: no link, pipe or device is followed, and no size is believed.

What a path names is opened once; its kind, links and size are read from the open file, so nothing can be swapped between
looking and reading. Knows nothing of what the bytes mean; the caller says which error is its own.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from chexnet_deploy.errors import ChexnetError

_CHUNK_BYTES = 2**20
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
            chunks = list(self._chunks(handle, size))
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def sha256(self) -> str:
        """Return its SHA-256 as 64 hexadecimal digits, in constant memory; raises as `read` does."""
        digest = hashlib.sha256()
        with self._opened() as (handle, size):
            for chunk in self._chunks(handle, size):
                digest.update(chunk)
        return digest.hexdigest()

    @contextmanager
    def _opened(self) -> Iterator[tuple[int, int]]:
        # O_NONBLOCK: opening a named pipe would else wait for its writer, for ever.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if self.follows_links else os.O_NOFOLLOW)
        try:
            where = self.path if self.folder is None else self.path.name
            handle = os.open(where, flags, dir_fd=self.folder)
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
        if status.st_mode & self.refused_mode:
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

    def _chunks(self, handle: int, size: int) -> Iterator[bytes]:
        """Yield exactly as many bytes as the file said it has."""
        left = size
        while left:
            chunk = os.read(handle, min(left, _CHUNK_BYTES))
            if not chunk:
                raise self._changed()
            left -= len(chunk)
            yield chunk
        if os.read(handle, 1):
            raise self._changed()

    def _not_plain(self) -> ChexnetError:
        return self.error(f"{self.path} is not a plain file. Copy it without links. {self.next_step}")

    def _changed(self) -> ChexnetError:
        return self.error(f"{self.path} changed while it was read. {self.next_step}")
