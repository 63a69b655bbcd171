"""The audit log: one line of JSON for each decision, each line bound to all before it, nothing about a patient in any.

A line ends with its own hash, SHA-256 over everything before it in the line, and that names the hash of the previous line.
So an edit, a deletion, an insertion or a changed order breaks the chain. Lines cut from the end break nothing that is
left, and whoever may write the log may write another whole one: both show only against the head, the last line's number
and hash, which is kept in a file beside the log and belongs, from time to time, on another machine or on paper.
"""

import errno
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from chexnet_deploy.errors import AuditError
from chexnet_deploy.files import fsync_path, sha256_hex, write_file

START_HASH: Final = "0" * 64
"""What the first line names as the hash before it."""
HEAD_SUFFIX: Final = ".head"
MAX_LINE_BYTES: Final = 4_096
_HASH_FIELD: Final = ',"hash":"'
_LINE: Final = re.compile(rb'(\{"seq":.*),"hash":"([0-9a-f]{64})"\}')
_HEAD: Final = re.compile(r"(\d+) ([0-9a-f]{64})\n?")

Value = str | int | float | None | Mapping[str, str] | Sequence[str]


class Head(NamedTuple):
    """The end of a chain.

    Attributes:
        seq: the last line's number; 0 for an empty log.
        hash: the last line's hash.
    """

    seq: int
    hash: str


class AuditLog:
    """An audit log that is open for one process to write, from any thread; see `open`.

    Attributes:
        is_writable: False after a line could not be written, until one can again.
    """

    def __init__(self, path: Path, head: Head) -> None:
        self._path = path
        self.head = head
        self.is_writable = True
        self._lock = threading.Lock()
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    @classmethod
    def open(cls, path: Path) -> "AuditLog":
        """Verify a log against its head file and open it; a log that isn't there is begun.

        A kill between a line and its head leaves the log one line ahead, and a power failure may leave a torn line that
        nothing was done upon; the first is accepted, the second is cut off and a line says so. Everything else is refused.

        Raises:
            AuditError: the log was changed or cut short, or can't be read or written.
        """
        try:
            head_path = _head_path(path)
            if not path.exists() and not head_path.exists():
                path.touch(mode=0o600)
                fsync_path(path.parent)
            for stale in path.parent.glob(f".{head_path.name}.partial-*"):  # killed while it wrote a head
                stale.unlink()
            torn = _cut_torn_line(path)
            head = verify(path)
            if head_path.exists():
                _check_not_behind(path, head, read_head(head_path))
            elif head.seq > 1:
                raise AuditError(f"{head_path} is missing, so lines cut from {path} can't be seen. Restore it.")
            log = cls(path, head)
            write_file(head_path, _head_line(head), mode=0o600)
            if torn:
                log.append("torn-line", {"torn_sha256": sha256_hex(torn)})
            return log
        except OSError as err:
            raise _cannot_write(path, err) from err

    def append(self, event: str, fields: Mapping[str, Value] = MappingProxyType({})) -> Head:
        """Write one line and return the new head, both on disk for good.

        Args:
            event: what was decided, a code.
            fields: codes, counts, versions and pseudonyms; never anything from an image's header.

        Raises:
            AuditError: the line can't be written; nothing may be done that it was to record.
        """
        with self._lock:
            line, digest = self._compose(event, fields)
            head = Head(self.head.seq + 1, digest)
            before = os.fstat(self._handle).st_size
            try:
                self._write(line)
                write_file(_head_path(self._path), _head_line(head), mode=0o600)
            except OSError as err:
                # Nothing is done upon this line. Left there, a part of it would break the chain, and whole ones would run
                # ahead of the head.
                os.ftruncate(self._handle, before)
                self.is_writable = False
                raise _cannot_write(self._path, err) from err
            self.head, self.is_writable = head, True
            return head

    def _compose(self, event: str, fields: Mapping[str, Value]) -> tuple[bytes, str]:
        record = {
            "seq": self.head.seq + 1,
            "utc": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "monotonic_s": round(time.monotonic(), 3),
            "event": event,
            **fields,
            "previous": self.head.hash,
        }
        body = json.dumps(record, separators=(",", ":"), ensure_ascii=True)[:-1].encode()
        digest = sha256_hex(body)
        line = body + f'{_HASH_FIELD}{digest}"}}\n'.encode()
        if len(line) > MAX_LINE_BYTES:
            raise AuditError(f"an audit line would have {len(line)} bytes, {MAX_LINE_BYTES} is the most.")
        return line, digest

    def _write(self, line: bytes) -> None:
        if os.write(self._handle, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the log."""
        os.close(self._handle)


def verify(path: Path, head: str | None = None) -> Head:
    """Check every line of a log and return its head.

    Args:
        path: the log.
        head: the hash that the last line must have, as it was noted elsewhere; without one, lines cut from the end and a
            wholly rewritten log can't be told.

    Raises:
        AuditError: the first line that is not as it was written, by number, or another head.
    """
    found = Head(0, START_HASH)
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                found = _check_line(path, line, found)
    except OSError as err:
        raise AuditError(f"{path} can't be read: {err.strerror}. Check the path.") from err
    if head is not None and head != found.hash:
        raise AuditError(
            f"{path} ends with line {found.seq}, hash {found.hash}; the head noted is {head}. "
            f"Lines were cut off, added, or the log was written anew. Compare with a backup."
        )
    return found


def verify_file(path: Path, head: str | None) -> Head:
    """Check a log against a head noted elsewhere or, without one, against the head file beside it.

    Raises:
        AuditError: as `verify`, or the head file is missing.
    """
    if head is not None:
        return verify(path, head)
    found, noted = verify(path), read_head(_head_path(path))
    _check_not_behind(path, found, noted)
    return found


def find(path: Path, instance: str) -> list[dict[str, Any]]:
    """Return the lines about one image, oldest first, having checked the whole log as `verify_file` does.

    Args:
        path: the log.
        instance: its pseudonym.

    Raises:
        AuditError: as verify_file.
    """
    verify_file(path, None)
    with path.open("rb") as file:
        lines = [json.loads(line) for line in file if instance.encode() in line]
    return [line for line in lines if line.get("instance") == instance]


def read_head(path: Path) -> Head:
    """Read a head file.

    Raises:
        AuditError: not a head file.
    """
    try:
        match = _HEAD.fullmatch(path.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError) as err:
        raise AuditError(f"{path} can't be read. Restore it from a backup.") from err
    if match is None:
        raise AuditError(f"{path} is no head file: needed a line's number and its hash. Restore it from a backup.")
    return Head(int(match[1]), match[2])


def _check_line(path: Path, line: bytes, previous: Head) -> Head:
    number = previous.seq + 1
    match = _LINE.fullmatch(line[:-1]) if line.endswith(b"\n") else None
    if match is None:
        raise AuditError(f"{path} line {number} is not as the node writes them: it was changed or cut short.")
    body, digest = match[1], match[2].decode()
    if hashlib.sha256(body).hexdigest() != digest:
        raise AuditError(f"{path} line {number} doesn't have the hash at its end: it was changed.")
    record = json.loads(body + b"}")
    if record["seq"] != number or record["previous"] != previous.hash:
        raise AuditError(f"{path} line {number} doesn't follow the line before it: lines were removed, added or moved.")
    return Head(number, digest)


def _cut_torn_line(path: Path) -> bytes:
    """Cut off what follows the last line's end, and return it."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - MAX_LINE_BYTES)
        file.seek(start)
        tail = file.read()
        torn = tail[tail.rfind(b"\n") + 1 :]
        if torn:
            file.truncate(size - len(torn))
            os.fsync(file.fileno())
        return torn


def _check_not_behind(path: Path, found: Head, noted: Head) -> None:
    # One line ahead is a kill between the two writings. Its chain was checked, so it does follow the line noted.
    if found == noted or (found.seq == noted.seq + 1 and _previous_of_last(path) == noted.hash):
        return
    raise AuditError(
        f"{path} ends with line {found.seq}, but {_head_path(path)} notes line {noted.seq}. Lines were cut off or the log "
        f"was written anew. Keep both files, and start with an empty folder or a restored log."
    )


def _previous_of_last(path: Path) -> str:
    last = path.read_bytes().splitlines()[-1]
    previous: str = json.loads(last)["previous"]
    return previous


def _head_path(path: Path) -> Path:
    return path.with_name(path.name + HEAD_SUFFIX)


def _head_line(head: Head) -> bytes:
    return f"{head.seq} {head.hash}\n".encode()


def _cannot_write(path: Path, err: OSError) -> AuditError:
    return AuditError(
        f"{path} can't be written: {err.strerror}. The node does nothing that it can't record; make room."
    )
