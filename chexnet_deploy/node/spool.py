"""Images that were received: on disk for good before they are acknowledged, each once, in the order they came.

    incoming/   what is being received; emptied at start, nobody was told it is here
    received/   acknowledged, not answered yet
    done/       empty markers of what was answered, so that it is known when it is sent again

A name is NUMBER-INSTANCE-PIXELS: the order of arrival, and pseudonyms of SOP Instance UID and pixel data. A power failure
or SIGKILL at any moment leaves an image in exactly one of these states (write, fsync, rename, fsync of the folder).
"""

import os
import threading
from pathlib import Path
from typing import NamedTuple

from pydicom.uid import ImplicitVRLittleEndian

from chexnet_deploy.errors import NodeError
from chexnet_deploy.files import fsync_path
from chexnet_deploy.node.config import MIB, check_private
from chexnet_deploy.node.config import Spool as SpoolSettings
from chexnet_deploy.node.elements import ElementFault, identify
from chexnet_deploy.node.incoming import Incoming, Verdict
from chexnet_deploy.node.pdu import Command
from chexnet_deploy.node.pseudonyms import Pseudonyms

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
