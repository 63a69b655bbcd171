"""Received images, durable: on disk before they are acknowledged, each once, in the order they came.

    incoming/   what is being received; emptied at start, nobody was told it is here
    received/   acknowledged, not answered yet
    done/       empty markers of what was answered, so that it is known when it is sent again

A name is NUMBER-INSTANCE-DATASET: the order of arrival, and pseudonyms of SOP Instance UID and data set. A marker's name goes on
with what became of the image, and with pseudonyms of its header and its pixels, whatever their encoding. A power failure
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
from collections import Counter
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final, NamedTuple

from pydicom._uid_dict import UID_dictionary
from pydicom.uid import UID, ImplicitVRLittleEndian, SecondaryCaptureImageStorage

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
            NodeError: others may read it, or as `read`.
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
        return cls.read(folder)

    @classmethod
    def read(cls, folder: Path) -> "Pseudonyms":
        """Read the node's key.

        Raises:
            NodeError: it can't be read, or is not a key.
        """
        path = folder / KEY_FILE
        try:
            key = path.read_bytes()
        except OSError as err:
            raise NodeError(
                f"{path} can't be read: {err.strerror}. Give the log in the node's own folder, as the node's user or root."
            ) from err
        if len(key) != _KEY_BYTES:
            raise NodeError(f"{path} has {len(key)} bytes, a key has {_KEY_BYTES}. Restore it from a backup.")
        return cls(key)

    def instance(self, sop_instance_uid: str) -> str:
        """Return the pseudonym that names and logs have for a SOP Instance UID."""
        return self.name("instance", sop_instance_uid.encode())[:_NAME_DIGITS]

    def name(self, kind: str, value: bytes) -> str:
        """Return 64 hexadecimal digits for a value, other ones for another kind of value."""
        return hmac.new(self._key, kind.encode() + b"\0" + value, hashlib.sha256).hexdigest()


_IMPLEMENTATION_UID = "2.25.96017534293760619517815940880865202403"  # of this package; drawn once
_PREAMBLE = bytes(128) + b"DICM"  # PS3.10 section 7.1


class Verdict(str, Enum):
    """What became of an image."""

    STORED = "stored"
    CHANGED = "changed"  # stored too: another data set under a UID that was used; the worker finds out what differs
    AGAIN = "again"  # the same data set under the same UID, which waits or was answered: nothing to do
    DROPPED = "dropped"  # no radiograph, but may lie in a study beside one: not kept
    NO_ROOM = "no-room"
    MISMATCH = "mismatch"  # the data set is not what the command announced
    UNREADABLE = "unreadable"

    @property
    def status(self) -> int:
        """The C-STORE status to answer with (PS3.4 table B.2-1)."""
        return STATUSES[self]


STATUSES: Final = MappingProxyType(
    {
        Verdict.STORED: 0x0000,
        Verdict.CHANGED: 0x0000,
        Verdict.AGAIN: 0x0000,
        Verdict.DROPPED: 0xB006,  # elements discarded: all of them
        Verdict.NO_ROOM: 0xA700,
        Verdict.MISMATCH: 0xA900,
        Verdict.UNREADABLE: 0xC000,
    }
)
"""Every C-STORE status that is answered."""

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_BESIDE_RADIOGRAPHS = (
    "1.1.1",  # Digital X-Ray for processing: raw detector data, no picture yet
    "7.",  # multi-frame Secondary Captures
    "11.",  # presentation states
    "66",  # raw data, registrations, segmentations
    "88.",  # structured reports, key object selections
    "104.",  # encapsulated documents
    "131",  # Basic Structured Display
)
DROPPED_SOP_CLASSES: Final = tuple(
    UID(uid)
    for uid, (_, kind, _, retired, _) in UID_dictionary.items()
    if kind == "SOP Class" and not retired and uid.startswith(tuple(_STORAGE + root for root in _BESIDE_RADIOGRAPHS))
)
"""What lies in studies beside radiographs, our own results among it. It is taken and not kept: a sender that finds no
presentation context for one object of a study often sends none of it. A single-frame Secondary Capture is dropped by its
modality, see RADIOGRAPH_MODALITIES."""

RADIOGRAPH_MODALITIES: Final = frozenset({"CR", "DX"})
"""A Secondary Capture of one of these is a radiograph; ours, and other programs' pictures, are not."""


class Incoming:
    """An object while it is received: a connection.Transfer.

    Args:
        folder: for its file.
        is_written: otherwise the object is refused, or dropped, at its end.
        take: returns the object behind a token to whoever asks first, see Spool.take.

    Attributes:
        start: where the data set begins in the file.
        size: of the file, once the object is whole.
        is_whole: all of it is on disk for good.
    """

    def __init__(
        self, folder: Path, command: Command, syntax: str, *, is_written: bool, take: Callable[[bytes], object | None]
    ) -> None:
        self.token = secrets.token_bytes(16)
        self.command, self.syntax = command, syntax
        self.start = self.size = 0
        self.is_whole = False
        self._is_refused = not is_written
        self._take = take
        self.path = folder / self.token.hex()
        self._file: BinaryIO | None = None
        if is_written:
            with self._refusing_disk_errors():
                self._file = self.path.open("xb")
                self._file.write(_file_header(command, syntax))
                self.start = self._file.tell()

    def write(self, piece: bytes) -> None:
        """Append a piece of the data set; where none is written, drop it."""
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
        data_set: pseudonym of its data set; likewise.
    """

    verdict: Verdict
    instance: str = ""
    data_set: str = ""


ANSWERED: Final = "answered"


class Outcome(NamedTuple):
    """What became of an image.

    Attributes:
        word: ANSWERED, or why it was refused.
        header: pseudonym of what its header says, see identity.py; empty where it is not known.
        pixels: pseudonym of its pixels; likewise.
    """

    word: str
    header: str = ""
    pixels: str = ""


class Stored(NamedTuple):
    """One image of the spool.

    Attributes:
        name: NUMBER-INSTANCE-DATASET.
        path: a DICOM file (PS3.10).
    """

    name: str
    path: Path

    @property
    def instance(self) -> str:
        """The pseudonym of its SOP Instance UID."""
        return self.name.split("-")[1]

    @property
    def data_set(self) -> str:
        """The pseudonym of its data set."""
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
        self._done: dict[str, Outcome] = {}  # by name
        self._names_of: dict[str, tuple[str, ...]] = {}  # by instance, of everything pending or done
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
        for marker in sorted(path.name for path in (folder / DONE).iterdir()):
            name, *outcome = marker.split(".")
            if len(outcome) != len(Outcome._fields):
                raise _foreign(folder, marker)
            spool._done[name] = Outcome(*outcome)
        for path in sorted((folder / RECEIVED).iterdir()):
            if path.stem in spool._done:  # killed between the marker and the removal
                path.unlink()
            else:
                spool._pending[path.stem] = path.stat().st_size
        spool._pending_bytes = sum(spool._pending.values())
        for name in (*spool._done, *spool._pending):
            number, instance = _parts(folder, name)
            spool._names_of[instance] = (*spool._names_of.get(instance, ()), name)
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
            is_written = command.sop_class_uid not in DROPPED_SOP_CLASSES and self.has_room()
            incoming = Incoming(folder, command, transfer_syntax, is_written=is_written, take=self.take)
            self._incoming[incoming.token] = incoming
            return incoming

    def take(self, token: bytes) -> Incoming | None:
        """Return the object behind a token, once: whoever takes it keeps or removes it."""
        with self._lock:
            return self._incoming.pop(token, None)

    def keep(self, incoming: Incoming) -> Kept:
        """Decide about a received object; STORED, CHANGED and AGAIN only once it is on disk for good."""
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
        command = incoming.command
        instance = self._pseudonyms.instance(command.sop_instance_uid)
        if command.sop_class_uid in DROPPED_SOP_CLASSES:
            return Kept(Verdict.DROPPED, instance)
        if not incoming.is_whole:
            return Kept(Verdict.NO_ROOM)
        try:
            with incoming.path.open("rb") as file:
                file.seek(incoming.start)
                identity = identify(file, incoming.size, is_implicit=incoming.syntax == ImplicitVRLittleEndian)
        except ElementFault:
            return Kept(Verdict.UNREADABLE)
        is_announced = (identity.sop_class_uid, identity.sop_instance_uid) == (
            command.sop_class_uid,
            command.sop_instance_uid,
        )
        if not is_announced:
            return Kept(Verdict.MISMATCH, instance)
        if command.sop_class_uid == SecondaryCaptureImageStorage and identity.modality not in RADIOGRAPH_MODALITIES:
            return Kept(Verdict.DROPPED, instance)
        data_set = self._pseudonyms.name("data set", identity.data_set_sha256)[:_NAME_DIGITS]
        return Kept(Verdict.STORED, instance, data_set)

    def _place(self, incoming: Incoming, kept: Kept) -> Verdict:
        known = self._names_of.get(kept.instance, ())
        same = [name for name in known if name.endswith(kept.data_set)]
        # What was refused is judged anew: another model may run by now.
        if any(name not in self._done or self._done[name].word == ANSWERED for name in same):
            return Verdict.AGAIN
        stored = self._stored(f"{self._next_number:012d}-{kept.instance}-{kept.data_set}")
        incoming.path.rename(stored.path)
        # From here on the image is there, come what may; but it is acknowledged only if the folder's entry is safe too.
        self._next_number += 1
        self._names_of[kept.instance] = (*known, stored.name)
        self._pending[stored.name] = incoming.size
        self._pending_bytes += incoming.size
        fsync_path(stored.path.parent)
        return Verdict.CHANGED if len(known) > len(same) else Verdict.STORED

    def next_pending(self) -> Stored | None:
        """Return what has waited longest for an answer."""
        with self._lock:
            return next(map(self._stored, self._pending), None)

    @property
    def n_pending(self) -> int:
        """How many images wait for an answer."""
        return len(self._pending)

    def counts(self) -> Counter[str]:
        """Return how many of the images that are remembered were answered, or refused for each reason."""
        with self._lock:
            return Counter(outcome.word for outcome in self._done.values())

    def outcomes(self, instance: str) -> list[Outcome]:
        """Return what became of the images of one SOP Instance UID, the newest last."""
        with self._lock:
            return [self._done[name] for name in self._names_of.get(instance, ()) if name in self._done]

    def forget(self, instance: str) -> int:
        """Forget that images of one SOP Instance UID were answered, so that they are when they come again; return how many."""
        with self._lock:
            names = [name for name in self._names_of.get(instance, ()) if name in self._done]
            for name in names:
                self._forget(name)
            return len(names)

    def finish(self, stored: Stored, outcome: Outcome) -> None:
        """Remove an answered image and remember what became of it."""
        marker = self.folder / DONE / _marker(stored.name, outcome)
        marker.touch(mode=0o600)
        fsync_path(marker.parent)
        stored.path.unlink(missing_ok=True)
        with self._lock:
            self._pending_bytes -= self._pending.pop(stored.name, 0)
            self._done[stored.name] = outcome
            while len(self._done) > self._settings.remember:
                self._forget(next(iter(self._done)))

    def _forget(self, name: str) -> None:
        (self.folder / DONE / _marker(name, self._done.pop(name))).unlink(missing_ok=True)
        instance = name.split("-")[1]
        self._names_of[instance] = tuple(other for other in self._names_of[instance] if other != name)
        if not self._names_of[instance]:
            del self._names_of[instance]

    def _stored(self, name: str) -> Stored:
        return Stored(name, self.folder / RECEIVED / f"{name}.dcm")


def _parts(folder: Path, name: str) -> tuple[int, str]:
    try:
        number, instance, _ = name.split("-")
        return int(number), instance
    except ValueError as err:
        raise _foreign(folder, name) from err


def _foreign(folder: Path, name: str) -> NodeError:
    return NodeError(f"{folder} holds {name!r}, which is not the spool's. Move it away.")


def _marker(name: str, outcome: Outcome) -> str:
    return ".".join((name, *outcome))
