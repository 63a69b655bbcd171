"""An object on its way from the network to disk, and what can become of it.

Writes a DICOM file (PS3.10) piece by piece; a disk that fails refuses the object, never the connection.
"""

import contextlib
import os
import secrets
import struct
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from chexnet_deploy.node.pdu import Command

_IMPLEMENTATION_UID = "2.25.96017534293760619517815940880865202403"  # of this package; drawn once
_PREAMBLE = bytes(128) + b"DICM"  # PS3.10 section 7.1


class Verdict(str, Enum):
    """What became of an image."""

    STORED = "stored"
    AGAIN = "again"  # the same image under the same UID: nothing to do
    NO_ROOM = "no-room"
    MISMATCH = "mismatch"  # the data set is not what the command announced
    UNREADABLE = "unreadable"
    CONFLICT = "conflict"  # another image under a UID that was used

    @property
    def status(self) -> int:
        """The C-STORE status to answer with (PS3.4 table B.2-1)."""
        return _STATUSES[self]


# The standard has no C-STORE status for a UID used twice, which it forbids (PS3.5 section 9). "Cannot understand" makes the
# sender keep its image and show a failure; a warning would let it delete an image that is nowhere else.
_STATUSES = {
    Verdict.STORED: 0x0000,
    Verdict.AGAIN: 0x0000,
    Verdict.NO_ROOM: 0xA700,
    Verdict.MISMATCH: 0xA900,
    Verdict.UNREADABLE: 0xC000,
    Verdict.CONFLICT: 0xC111,
}


class Incoming:
    """An object while it is received: a connection.Transfer.

    Args:
        folder: for its file.
        has_room: without room nothing is written, and the object is refused at its end.
        take: returns the object behind a token to whoever asks first, see Spool.take.

    Attributes:
        start: where the data set begins in the file.
        size: of the file, once the object is whole.
        is_whole: all of it is on disk for good.
    """

    def __init__(
        self, folder: Path, command: Command, syntax: str, *, has_room: bool, take: Callable[[bytes], object | None]
    ) -> None:
        self.token = secrets.token_bytes(16)
        self.command, self.syntax = command, syntax
        self.start = self.size = 0
        self.is_whole = False
        self._is_refused = not has_room
        self._take = take
        self.path = folder / self.token.hex()
        self._file: BinaryIO | None = None
        if has_room:
            with self._refusing_disk_errors():
                self._file = self.path.open("xb")
                self._file.write(_file_header(command, syntax))
                self.start = self._file.tell()

    def write(self, piece: bytes) -> None:
        """Append a piece of the data set; where there is no room, drop it."""
        if self._file is not None:
            with self._refusing_disk_errors():
                self._file.write(piece)

    def finish(self) -> None:
        """Put what was written on disk for good."""
        if self._file is not None:
            with self._refusing_disk_errors():
                self._file.flush()
                os.fsync(self._file.fileno())
                self.size = self._file.tell()
                self._file.close()
                self._file = None
        self.is_whole = not self._is_refused

    def discard(self) -> None:
        """Remove it, unless it was taken."""
        if self._take(self.token) is not None:
            self.remove()

    def remove(self) -> None:
        """Remove it."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _refusing_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # full, over quota, broken: the sender must keep the image, and that is what A700 says
            self._is_refused = True
            self.remove()


def _file_header(command: Command, syntax: str) -> bytes:
    """Return preamble and file meta information (PS3.10 section 7.1).

    Written by hand as UIDs are kept as they were sent: one with a leading zero is against the standard and occurs, and the
    library refuses to write it. Whether the object can be used is decided later.
    """
    rest = b"".join(
        (
            struct.pack("<HH2sxxI", 2, 0x0001, b"OB", 2) + b"\0\1",
            _element(0x0002, b"UI", command.sop_class_uid),
            _element(0x0003, b"UI", command.sop_instance_uid),
            _element(0x0010, b"UI", syntax),
            _element(0x0012, b"UI", _IMPLEMENTATION_UID),
            _element(0x0013, b"SH", "CHEXNET_DEPLOY"),
        )
    )
    return _PREAMBLE + struct.pack("<HH2sHI", 2, 0x0000, b"UL", 4, len(rest)) + rest


def _element(number: int, vr: bytes, text: str) -> bytes:
    value = text.encode("ascii")
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HH2sH", 2, number, vr, len(value)) + value
