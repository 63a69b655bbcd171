"""Received images, durable: on disk before they are acknowledged, each once, in the order they came.

    incoming/   what is being received; emptied at start, nobody was told it is here
    received/   acknowledged, not answered yet
    done/       empty markers of what was answered, so that it is known when it is sent again

A name is NUMBER-INSTANCE-PIXELS: the order of arrival, and pseudonyms of SOP Instance UID and pixel data. A power failure
or SIGKILL at any moment leaves an image in exactly one of these states (write, fsync, rename, fsync of the folder). A disk
that fails refuses the object, never the connection.

Pseudonyms are HMACs (RFC 2104) under a key that never leaves the node. A plain SHA-256 of an image or of its SOP Instance UID
is no secret: whoever has the image can look it up in a log. The hospital, which has both the key and the image, can still
prove which image a line is about.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import struct
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydicom.uid import ImplicitVRLittleEndian

from chexnet_deploy.dicom.node.config import MIB, check_private
from chexnet_deploy.dicom.node.config import Spool as SpoolSettings
from chexnet_deploy.dicom.node.elements import ElementFault, identify
from chexnet_deploy.dicom.node.pdu import Command
from chexnet_deploy.errors import NodeError
from chexnet_deploy.files import fsync_path

KEY_FILE = "node.key"
_KEY_BYTES = 32


class Pseudonyms:
    """The node's key, in use.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def open(cls, folder: Path) -> "Pseudonyms":
        """Read the node's key; make it where the folder has none yet.

        Raises:
            NodeError: others may read it, or it is not a key.
        """
        path = folder / KEY_FILE
        if not path.exists():
            partial = folder / f".{KEY_FILE}.partial"
            partial.unlink(missing_ok=True)
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(handle, os.urandom(_KEY_BYTES))
                os.fsync(handle)
            finally:
                os.close(handle)
            partial.rename(path)
            fsync_path(folder)
        check_private(path)
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise NodeError(f"{path} has {len(key)} bytes, a key has {_KEY_BYTES}. Restore it from a backup.")
        return cls(key)

    def name(self, kind: str, value: bytes) -> str:
        """Return 64 hexadecimal digits for a value, other ones for another kind of value."""
        return hmac.new(self._key, kind.encode() + b"\0" + value, hashlib.sha256).hexdigest()


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


INCOMING, RECEIVED, DONE = "incoming", "received", "done"
_NAME_DIGITS = 32  # of each pseudonym: 128 bits


class Kept(NamedTuple):
    """What became of an object.

    Attributes:
        instance: pseudonym of its SOP Instance UID; empty where it was not looked at.
        pixels: pseudonym of its pixel data; likewise.
    """

    verdict: Verdict
    instance: str = ""
    pixels: str = ""


class Stored(NamedTuple):
    """One image of the spool.

    Attributes:
        name: NUMBER-INSTANCE-PIXELS.
        path: a DICOM file (PS3.10).
    """

    name: str
    path: Path

    @property
    def instance(self) -> str:
        """The pseudonym of its SOP Instance UID."""
        return self.name.split("-")[1]

    @property
    def pixels(self) -> str:
        """The pseudonym of its pixel data."""
        return self.name.split("-")[2]


class Spool:
    """The spool's folders, for one process at a time.

    Args:
        folder: the node's; opened by `open`.
    """

    def __init__(self, folder: Path, settings: SpoolSettings, pseudonyms: Pseudonyms) -> None:
        self.folder, self._settings, self._pseudonyms = folder, settings, pseudonyms
        self._lock = threading.Lock()
        self._incoming: dict[bytes, Incoming] = {}
        self._pending: dict[str, int] = {}  # name to size in bytes, by arrival
        self._done: dict[str, None] = {}
        self._pixels_of: dict[str, str] = {}  # by instance, of everything pending or done
        self._pending_bytes = 0
        self._next_number = 1

    @classmethod
    def open(cls, folder: Path, settings: SpoolSettings, pseudonyms: Pseudonyms) -> "Spool":
        """Open the spool and set right what a kill left.

        Raises:
            NodeError: others may read the folder, or something in it is not the spool's.
        """
        spool = cls(folder, settings, pseudonyms)
        for name in (INCOMING, RECEIVED, DONE):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
            check_private(folder / name)
        fsync_path(folder)
        for path in (folder / INCOMING).iterdir():
            path.unlink()
        spool._done = dict.fromkeys(sorted(path.name for path in (folder / DONE).iterdir()))
        for path in sorted((folder / RECEIVED).iterdir()):
            if path.stem in spool._done:  # killed between the marker and the removal
                path.unlink()
            else:
                spool._pending[path.stem] = path.stat().st_size
        spool._pending_bytes = sum(spool._pending.values())
        for name in (*spool._done, *spool._pending):
            number, instance, pixels = _parts(folder, name)
            spool._pixels_of[instance] = pixels
            spool._next_number = max(spool._next_number, number + 1)
        return spool

    def has_room(self) -> bool:
        """Whether an image would be taken now."""
        free = os.statvfs(self.folder)
        is_free = free.f_bavail * free.f_frsize >= self._settings.min_free_mib * MIB
        return is_free and self._pending_bytes < self._settings.max_mib * MIB

    def begin(self, command: Command, transfer_syntax: str) -> Incoming:
        """Start receiving an object; where there is no room, one that will be refused."""
        with self._lock:
            folder = self.folder / INCOMING
            incoming = Incoming(folder, command, transfer_syntax, has_room=self.has_room(), take=self.take)
            self._incoming[incoming.token] = incoming
            return incoming

    def take(self, token: bytes) -> Incoming | None:
        """Return the object behind a token, once: whoever takes it keeps or removes it."""
        with self._lock:
            return self._incoming.pop(token, None)

    def keep(self, incoming: Incoming) -> Kept:
        """Decide about a received object; STORED and AGAIN only once it is on disk for good."""
        try:
            kept = self._judge(incoming)
            if kept.verdict is not Verdict.STORED:
                return kept
            with self._lock:
                return kept._replace(verdict=self._place(incoming, kept))
        except OSError:
            return Kept(Verdict.NO_ROOM)
        finally:
            incoming.remove()  # nothing to remove where it was renamed

    def _judge(self, incoming: Incoming) -> Kept:
        if not incoming.is_whole:
            return Kept(Verdict.NO_ROOM)
        try:
            with incoming.path.open("rb") as file:
                file.seek(incoming.start)
                identity = identify(file, incoming.size, is_implicit=incoming.syntax == ImplicitVRLittleEndian)
        except ElementFault:
            return Kept(Verdict.UNREADABLE)
        command = incoming.command
        is_announced = (identity.sop_class_uid, identity.sop_instance_uid) == (
            command.sop_class_uid,
            command.sop_instance_uid,
        )
        return Kept(
            Verdict.STORED if is_announced else Verdict.MISMATCH,
            self._pseudonyms.name("instance", command.sop_instance_uid.encode())[:_NAME_DIGITS],
            self._pseudonyms.name("pixels", identity.pixels_sha256)[:_NAME_DIGITS],
        )

    def _place(self, incoming: Incoming, kept: Kept) -> Verdict:
        known = self._pixels_of.get(kept.instance)
        if known is not None:
            return Verdict.AGAIN if known == kept.pixels else Verdict.CONFLICT
        stored = self._stored(f"{self._next_number:012d}-{kept.instance}-{kept.pixels}")
        incoming.path.rename(stored.path)
        # From here on the image is there, come what may; but it is acknowledged only if the folder's entry is safe too.
        self._next_number += 1
        self._pixels_of[kept.instance] = kept.pixels
        self._pending[stored.name] = incoming.size
        self._pending_bytes += incoming.size
        fsync_path(stored.path.parent)
        return Verdict.STORED

    def next_pending(self) -> Stored | None:
        """Return what has waited longest for an answer."""
        with self._lock:
            return next(map(self._stored, self._pending), None)

    @property
    def n_pending(self) -> int:
        """How many images wait for an answer."""
        return len(self._pending)

    def finish(self, stored: Stored) -> None:
        """Remove an answered image and remember that it was answered."""
        marker = self.folder / DONE / stored.name
        marker.touch(mode=0o600)
        fsync_path(marker.parent)
        stored.path.unlink(missing_ok=True)
        with self._lock:
            self._pending_bytes -= self._pending.pop(stored.name, 0)
            self._done[stored.name] = None
            while len(self._done) > self._settings.remember:
                oldest = next(iter(self._done))
                del self._done[oldest]
                self._pixels_of.pop(oldest.split("-")[1], None)
                (self.folder / DONE / oldest).unlink(missing_ok=True)

    def _stored(self, name: str) -> Stored:
        return Stored(name, self.folder / RECEIVED / f"{name}.dcm")


def _parts(folder: Path, name: str) -> tuple[int, str, str]:
    try:
        number, instance, pixels = name.split("-")
        return int(number), instance, pixels
    except ValueError as err:
        raise NodeError(f"{folder} holds {name!r}, which is not the spool's. Move it away.") from err
