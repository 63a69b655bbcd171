"""Results that wait for their destination, in one SQLite file that survives a kill at any moment.

Each destination gets its documents in the order they were put in. One that can't be reached keeps only its own waiting;
one that refuses a document for good gets it parked, with the reason, and the next one. Nothing here knows of networks.
"""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from chexnet_deploy.dicom.node.config import MIB
from chexnet_deploy.dicom.node.config import Outbox as OutboxSettings
from chexnet_deploy.dicom.node.worker import Answer
from chexnet_deploy.errors import NodeError

OUTBOX = "outbox.sqlite"
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE entry (
    id INTEGER PRIMARY KEY AUTOINCREMENT,   -- the order of sending
    source TEXT NOT NULL,                   -- the image's name in the spool
    part INTEGER NOT NULL,                  -- which document of its answer
    destination TEXT NOT NULL,              -- AE title
    document BLOB,                          -- NULL once it was sent and is not kept any more
    state TEXT NOT NULL CHECK (state IN ('waiting', 'sent', 'parked')),
    reason TEXT NOT NULL DEFAULT '',        -- why it was parked, or failed last
    failures INTEGER NOT NULL DEFAULT 0,
    breaks INTEGER NOT NULL DEFAULT 0,      -- failures after the destination had let us in
    not_before_s REAL NOT NULL DEFAULT 0,   -- Unix time of the next attempt
    UNIQUE (source, part, destination)
);
CREATE INDEX next_entry ON entry (destination, state, id);
"""


class OutboxFullError(Exception):
    """There is no room for an answer until a destination takes some."""


class Entry(NamedTuple):
    """One document for one destination."""

    id: int
    source: str
    document: bytes


class Counts(NamedTuple):
    """How many entries are in each state."""

    waiting: int
    sent: int
    parked: int


class Outbox:
    """The outbox's file, for one process at a time; safe to use from several threads.

    Args:
        clock: Unix time in seconds. Kept in the file, so it can't be monotonic; an entry waits at most max_retry_s by it,
            whatever it says, see `next_entry`.
        chance: for the jitter.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        settings: OutboxSettings,
        clock: Callable[[], float],
        chance: Random,
    ) -> None:
        self._connection, self._settings, self._clock, self._chance = connection, settings, clock, chance
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: OutboxSettings,
        *,
        clock: Callable[[], float] = time.time,
        chance: Random | None = None,
    ) -> "Outbox":
        """Open the outbox, or begin one.

        Raises:
            NodeError: the file is damaged, of another version, or can't be opened.
        """
        path = folder / OUTBOX
        try:
            path.touch(mode=0o600)
            connection = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
            # FULL: a committed entry outlives a power failure. secure_delete: a sent document leaves nothing behind.
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "locking_mode=EXCLUSIVE"):
                connection.execute(f"PRAGMA {pragma}")
            (found,) = connection.execute("PRAGMA quick_check").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if found != "ok" or version not in (0, _SCHEMA_VERSION):
                raise NodeError(
                    f"{path} is damaged or of another version ({version}). Move it away to begin a new one."
                )
            if version == 0:
                connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_SCHEMA_VERSION}; COMMIT;")
        except (sqlite3.Error, OSError) as err:
            raise NodeError(f"{path} can't be opened: {err}. Check the disk, and that no other node uses it.") from err
        return cls(connection, settings, clock, chance or Random())

    def put(self, source: str, answer: Answer, destinations: Sequence[str]) -> None:
        """Take an answer for every destination, all of it or nothing; what was put before is left as it is.

        Args:
            source: the image's name in the spool.
            answer: with documents or a refusal, which leaves nothing to send.
            destinations: AE titles.

        Raises:
            OutboxFullError: the documents don't fit below the limit or on the disk.
        """
        n_bytes = sum(map(len, answer.documents)) * len(destinations)
        with self._transaction() as connection:
            (waiting,) = connection.execute(
                "SELECT coalesce(sum(length(document)), 0) FROM entry WHERE state != 'sent'"
            ).fetchone()
            if waiting + n_bytes > self._settings.max_mib * MIB:
                raise OutboxFullError
            connection.executemany(
                "INSERT INTO entry (source, part, destination, document, state) VALUES (?, ?, ?, ?, 'waiting') "
                "ON CONFLICT DO NOTHING",
                [
                    (source, part, destination, document)
                    for part, document in enumerate(answer.documents)
                    for destination in destinations
                ],
            )

    def next_entry(self, destination: str) -> tuple[Entry | None, float]:
        """Return a destination's first waiting entry if it is due, and otherwise how many seconds to wait.

        A later entry never overtakes one that waits for its next attempt.
        """
        with self._transaction() as connection:
            row = connection.execute(
                "SELECT id, source, document, not_before_s FROM entry "
                "WHERE destination = ? AND state = 'waiting' ORDER BY id LIMIT 1",
                (destination,),
            ).fetchone()
        if row is None:
            return None, self._settings.max_retry_s
        # A clock that was set back must not hold results for years.
        wait_s = min(row[3] - self._clock(), self._settings.max_retry_s)
        return (Entry(*row[:3]), 0.0) if wait_s <= 0 else (None, wait_s)

    def sent(self, entry: Entry) -> None:
        """Note that the destination has it; the line stays, so that it isn't put again."""
        kept = "" if self._settings.keep_mib else ", document = NULL"
        self._set(entry, f"state = 'sent', reason = ''{kept}")

    def park(self, entry: Entry, reason: str) -> None:
        """Set an entry aside that its destination will never take; a person has to look."""
        self._set(entry, "state = 'parked', reason = ?", reason)

    def retry_later(self, entry: Entry, reason: str, *, was_let_in: bool) -> bool:
        """Note a failure that may pass; the wait doubles each time, with jitter.

        Args:
            entry: from next_entry.
            reason: a code.
            was_let_in: the destination accepted the association, so the document itself may be what it breaks on.

        Returns:
            False where it was parked instead, as it broke off too often.
        """
        with self._transaction() as connection:
            failures, breaks = connection.execute(
                "SELECT failures, breaks FROM entry WHERE id = ?", (entry.id,)
            ).fetchone()
        breaks += was_let_in
        if breaks >= self._settings.max_breaks:
            self.park(entry, f"{reason}-too-often")
            return False
        longest_s = min(self._settings.first_retry_s * 2.0 ** min(failures, 32), self._settings.max_retry_s)
        # From half to whole: many nodes behind one switch must not come back in step.
        not_before_s = self._clock() + longest_s * self._chance.uniform(0.5, 1.0)
        self._set(
            entry,
            "failures = ?, breaks = ?, not_before_s = ?, reason = ?",
            failures + 1,
            breaks,
            not_before_s,
            reason,
        )
        return True

    def counts(self) -> Counts:
        """Return how many entries wait, were sent, or are parked."""
        with self._transaction() as connection:
            found = dict(connection.execute("SELECT state, count(*) FROM entry GROUP BY state").fetchall())
        return Counts(found.get("waiting", 0), found.get("sent", 0), found.get("parked", 0))

    def resend(self, instance: str) -> int:
        """Let every document about an image that is kept be sent now, were it sent or parked before; return how many.

        Args:
            instance: its pseudonym.
        """
        with self._transaction() as connection:
            return connection.execute(
                "UPDATE entry SET state = 'waiting', failures = 0, breaks = 0, not_before_s = 0, reason = '' "
                "WHERE document IS NOT NULL AND source LIKE ?",
                (f"%-{instance}-%",),
            ).rowcount

    def destinations(self) -> dict[str, dict[str, int]]:
        """Return of each destination how many entries are in each state, with the reason where there is one."""
        found: dict[str, dict[str, int]] = {}
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT destination, state, reason, count(*) FROM entry GROUP BY destination, state, reason"
            ).fetchall()
        for destination, state, reason, count in rows:
            word = "failed" if state == "parked" else state
            found.setdefault(destination, {})[f"{word} {reason}".strip()] = count
        return found

    def forget_sent(self) -> None:
        """Remove the oldest sent entries' documents, and then their lines, so that the file doesn't grow for ever."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE entry SET document = NULL WHERE state = 'sent' AND document IS NOT NULL AND id <= "
                "(SELECT max(id) FROM (SELECT id, sum(length(document)) OVER (ORDER BY id DESC) AS n_bytes FROM entry "
                "WHERE state = 'sent' AND document IS NOT NULL) WHERE n_bytes > ?)",
                (self._settings.keep_mib * MIB,),
            )
            connection.execute(
                "DELETE FROM entry WHERE state = 'sent' AND id <= "
                "(SELECT id FROM entry WHERE state = 'sent' ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (self._settings.remember,),
            )

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _set(self, entry: Entry, change: str, *values: object) -> None:
        with self._transaction() as connection:
            connection.execute(f"UPDATE entry SET {change} WHERE id = ?", (*values, entry.id))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as err:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(err, sqlite3.OperationalError):  # a full disk or an I/O error
                    raise OutboxFullError from err
                raise
