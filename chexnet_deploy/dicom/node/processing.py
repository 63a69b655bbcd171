"""Take images from the inbox in order, have each answered, record the decision, put the results into the outbox.

An image under a UID that was used is answered anew where its header or its pixels differ, and not where only their encoding
does. An image leaves the spool only when its decision is in the audit log and its results are in the outbox; a kill before that
repeats the image, with the same results under the same UIDs. One thread, one worker, one image at a time.
"""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Sequence
from time import monotonic

from chexnet_deploy.dicom.node.audit import AuditLog, Value
from chexnet_deploy.dicom.node.config import Health
from chexnet_deploy.dicom.node.inbox import ANSWERED, Outcome, Pseudonyms, Spool, Stored
from chexnet_deploy.dicom.node.log import Journal
from chexnet_deploy.dicom.node.outbox import Outbox, OutboxFullError
from chexnet_deploy.dicom.node.systemd import Notifier
from chexnet_deploy.dicom.node.worker import Answer
from chexnet_deploy.dicom.node.worker_process import Worker, WorkerFault
from chexnet_deploy.errors import AuditError, RefusalReason

WORKER_LOST = "worker-lost"
N_ATTEMPTS = 2
"""An image that a worker dies or hangs on is tried once more, in a new process: it may have been the machine's fault. So is one
that a busy machine had no time for. After that a third process only says so."""
_IDENTITY_DIGITS = 16  # of each pseudonym, to tell images of one UID apart
_PAUSE_S = 0.5  # before a disk, or a worker that didn't start, is tried again


class _StoppingError(Exception):
    """Processing is to end; what is in flight stays in the inbox."""


class Processing:
    """See the module.

    Args:
        destinations: AE titles that get each result.
        max_failed_starts: of the worker in a row, before `has_failed`.
        on_put: called when results were put into the outbox.

    Attributes:
        is_ready: the worker has given the known answers and was not lost since.
        has_failed: the worker can't be started; the node must end.
    """

    def __init__(
        self,
        worker: Worker,
        spool: Spool,
        outbox: Outbox,
        audit: AuditLog,
        pseudonyms: Pseudonyms,
        *,
        destinations: Sequence[str],
        health: Health,
        max_failed_starts: int,
        notifier: Notifier,
        journal: Journal,
        on_put: Callable[[], None],
    ) -> None:
        self._worker, self._spool, self._outbox, self._audit = worker, spool, outbox, audit
        self._pseudonyms, self._destinations, self._health = pseudonyms, tuple(destinations), health
        self._max_failed_starts, self._notifier, self._journal = max_failed_starts, notifier, journal
        self._on_put = on_put
        self.is_ready = self.has_failed = False
        self._n_failed_starts, self._next_test_s = 0, 0.0
        self._wake, self._is_stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="processing", daemon=True)

    def start(self) -> None:
        """Begin; the worker is started first, see `is_ready`."""
        self._thread.start()

    def wake(self) -> None:
        """Say that an image was received."""
        self._wake.set()

    def stop(self, deadline_s: float) -> None:
        """End within so many seconds; an image in hand is left in the spool."""
        self._is_stopping = True
        self._wake.set()
        self._thread.join(deadline_s)

    def _run(self) -> None:
        try:
            while not self._is_stopping and not self.has_failed:
                self._wake.clear()
                if not self._is_worker_well():
                    continue
                stored = self._spool.next_pending()
                if stored is None:
                    self._wake.wait(max(0.0, self._next_test_s - monotonic()))
                else:
                    self._handle(stored)
        except _StoppingError:
            pass
        finally:
            self.is_ready = False
            self._worker.stop()

    def _is_worker_well(self) -> bool:
        """Start the worker where there is none, test it where it is time, and feed the watchdog only after a test."""
        try:
            if not self._worker.is_running:
                self.is_ready = False
                self._worker.start()
                self._journal.say("worker-started", **self._worker.versions)
            elif monotonic() >= self._next_test_s:
                self._worker.self_test()
            else:
                return True
        except WorkerFault as fault:
            self._lost(fault)
            return False
        self.is_ready, self._n_failed_starts = True, 0
        self._next_test_s = monotonic() + self._health.self_test_every_s
        self._try_audit_again()
        self._notifier.say("WATCHDOG=1")
        return True

    def _try_audit_again(self) -> None:
        # While no line can be written no image is taken, so no image would ever find out that there is room again.
        if not self._audit.is_writable:
            with contextlib.suppress(AuditError):
                self._audit.append("writable-again")

    def _lost(self, fault: WorkerFault) -> None:
        self.is_ready = False
        self._journal.say("worker-lost", reason=fault.reason, message=fault.message)
        self._n_failed_starts += 1
        self.has_failed = self._n_failed_starts >= self._max_failed_starts
        if not self.has_failed:
            self._wake.wait(_PAUSE_S)

    def _handle(self, stored: Stored) -> None:
        answer, fault = self._ask(stored)
        header, pixels = (
            self._pseudonyms.name(kind, digest.encode())[:_IDENTITY_DIGITS] if digest else ""
            for kind, digest in (("header", answer.header), ("pixels", answer.pixels))
        )
        outcome = Outcome(answer.refusal or ANSWERED, header, pixels)
        image: dict[str, Value] = {"instance": stored.instance, "data_set": stored.data_set}
        image |= {"header": header, "pixels": pixels}
        earlier = self._spool.outcomes(stored.instance)
        # In this order: nothing is sent that was not recorded, and nothing is forgotten that was not put.
        if outcome in earlier and not answer.refusal:
            self._insist(lambda: self._audit.append("same-image", image))
        else:
            if earlier and outcome not in earlier:
                differs = _difference(earlier[-1], outcome)
                changed = {**image, "differs": differs, "before": earlier[-1].word}
                self._insist(lambda: self._audit.append("changed", changed))
                self._journal.say("changed", instance=stored.instance, differs=differs)
            record: dict[str, Value] = {
                **image,
                "file": self._pseudonyms.name("file", _digest(stored)),
                "versions": dict(self._worker.versions),
                "documents": [self._pseudonyms.name("document", document) for document in answer.documents],
                "reason": answer.refusal,
                "worker": fault,
            }
            self._insist(lambda: self._audit.append("refused" if answer.refusal else "answered", record))
            if answer.refusal:
                self._journal.say("refused", instance=stored.instance, reason=answer.refusal)
            self._insist(lambda: self._outbox.put(stored.name, answer, self._destinations))
            self._on_put()
        self._insist(lambda: self._spool.finish(stored, outcome))
        self._insist(self._outbox.forget_sent)

    def _ask(self, stored: Stored) -> tuple[Answer, str]:
        """Return an image's answer, and the code of the last worker lost over it."""
        busy: Answer | None = None
        reason = ""
        for attempt in range(N_ATTEMPTS + 1):
            while not self._is_worker_well():
                if self._is_stopping or self.has_failed:
                    raise _StoppingError
            try:
                if attempt == N_ATTEMPTS:
                    return busy or self._worker.explain(stored.path, WORKER_LOST), reason
                answer = self._worker.answer(stored.path)
                if answer.refusal != RefusalReason.BUSY.value:
                    return answer, reason
                busy = answer
            except WorkerFault as fault:
                reason = fault.reason
                self.is_ready = False
                self._journal.say("worker-lost", reason=reason)
        return busy or Answer(refusal=WORKER_LOST), reason

    def _insist(self, act: Callable[[], object]) -> None:
        """Do it, as soon as the disk or the outbox has room; meanwhile the node takes no images that it can't keep."""
        while True:
            try:
                act()
                return
            except (AuditError, OutboxFullError, OSError) as err:
                self._journal.say("waiting-for-room", error=type(err).__name__)
            if self._is_stopping:
                raise _StoppingError
            self._wake.wait(_PAUSE_S)
            self._wake.clear()
            self._is_worker_well()


def _difference(before: Outcome, now: Outcome) -> str:
    """Return what differs between two images of one UID, as far as it is known."""
    # A refused image's pixels are not known; where its header is the same, they or the model's judgement differ.
    pairs = {"header": (before.header, now.header), "pixels": (before.pixels, now.pixels)}
    differs = [name for name, (old, new) in pairs.items() if old and new and old != new]
    return " and ".join(differs) or "unknown"


def _digest(stored: Stored) -> bytes:
    digest = hashlib.sha256()
    with stored.path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.digest()
