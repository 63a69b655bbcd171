"""Send what waits in the outbox, by C-STORE, one thread for each destination.

A destination that is away, slow or full is asked again later; what it refuses for good is parked. See outbox.py for order
and waiting.
"""

import contextlib
import socket
import threading
from collections.abc import Callable
from io import BytesIO
from typing import Final, NamedTuple, cast

from pydicom import dcmread
from pynetdicom import AE, evt
from pynetdicom.transport import AssociationSocket

from chexnet_deploy.errors import AuditError
from chexnet_deploy.node.config import Destination
from chexnet_deploy.node.journal import Journal
from chexnet_deploy.node.outbox import Entry, Outbox, OutboxFullError

_CONNECT_S: Final = 5.0
_DISK_PAUSE_S: Final = 1.0
_WARNINGS: Final = frozenset((0xB000, 0xB006, 0xB007))  # stored, with elements changed or left out (PS3.4 table B.2-1)


class Delivery(NamedTuple):
    """How one attempt ended.

    Attributes:
        state: sent; refused for good; or later, as it may pass.
        reason: a code.
        was_let_in: an association was accepted.
    """

    state: str
    reason: str = ""
    was_let_in: bool = True


def deliver(document: bytes, destination: Destination, calling_ae_title: str, timeout_s: float) -> Delivery:
    """Try once to send one DICOM file.

    Args:
        document: a DICOM file (PS3.10).
        destination: whom to call.
        calling_ae_title: our name.
        timeout_s: for each answer of the destination, and for each piece of one.
    """
    try:
        dataset = dcmread(BytesIO(document))
    except Exception:  # noqa: BLE001 - whatever the library makes of it, no attempt will ever send it
        return Delivery("refused", "unreadable")
    application = AE(calling_ae_title)
    application.connection_timeout = _CONNECT_S
    application.acse_timeout = application.dimse_timeout = application.network_timeout = timeout_s
    application.add_requested_context(dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.TransferSyntaxUID)

    def limit_reads(event: evt.Event) -> None:
        # The library waits without end for the rest of a PDU that has begun.
        wrapper = cast(AssociationSocket, event.assoc.dul.socket)
        cast(socket.socket, wrapper.socket).settimeout(timeout_s)

    handlers: list[evt.EventHandlerType] = [(evt.EVT_CONN_OPEN, limit_reads)]
    try:
        association = application.associate(
            destination.host, destination.port, ae_title=destination.ae_title, evt_handlers=handlers
        )
    except OSError:  # its name can't be resolved
        return Delivery("later", "unreachable", was_let_in=False)
    if not association.is_established:
        return _not_let_in(association.is_rejected, bool(association.rejected_contexts))
    try:
        status = association.send_c_store(dataset)
    except (ValueError, RuntimeError):  # the association broke off before or while sending
        return Delivery("later", "broke-off")
    finally:
        with contextlib.suppress(RuntimeError):
            association.release()
    if "Status" not in status:
        return Delivery("later", "no-answer")
    return judge(status.Status)


def judge(status: int) -> Delivery:
    """Return what a C-STORE status means for a document (PS3.4 table B.2-1, PS3.7 annex C)."""
    if status == 0x0000 or status in _WARNINGS:
        return Delivery("sent", "" if status == 0 else f"warning-{status:04x}")
    if 0xA700 <= status <= 0xA7FF:  # out of resources
        # Nothing is wrong with the document, so it isn't counted among those that break a destination.
        return Delivery("later", f"status-{status:04x}", was_let_in=False)
    return Delivery("refused", f"status-{status:04x}")


def _not_let_in(is_rejected: bool, has_rejected_contexts: bool) -> Delivery:  # noqa: FBT001 - pynetdicom's facts
    if is_rejected:
        return Delivery("later", "association-rejected", was_let_in=False)
    if has_rejected_contexts:
        return Delivery("refused", "sop-class-not-accepted")
    return Delivery("later", "unreachable", was_let_in=False)


class Sender:
    """The thread that serves one destination.

    Args:
        on_delivery: called after each attempt with the entry and how it ended; may raise to stop before it is noted.
    """

    def __init__(
        self,
        outbox: Outbox,
        destination: Destination,
        calling_ae_title: str,
        timeout_s: float,
        journal: Journal,
        on_delivery: Callable[[Entry, Destination, Delivery], None],
    ) -> None:
        self._outbox, self._destination, self._journal = outbox, destination, journal
        self._calling_ae_title, self._timeout_s, self._on_delivery = calling_ae_title, timeout_s, on_delivery
        self._wake, self._is_stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name=f"sender-{destination.ae_title}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Say that something was put into the outbox."""
        self._wake.set()

    def stop(self, deadline_s: float) -> None:
        """End after the attempt that is under way, or leave it behind after so many seconds: it is idempotent."""
        self._is_stopping = True
        self._wake.set()
        self._thread.join(deadline_s)

    def _run(self) -> None:
        while not self._is_stopping:
            self._wake.clear()
            try:
                entry, wait_s = self._outbox.next_entry(self._destination.ae_title)
                if entry is None:
                    self._wake.wait(wait_s)
                    continue
                delivery = deliver(entry.document, self._destination, self._calling_ae_title, self._timeout_s)
                self._note(entry, delivery)
            except OutboxFullError:  # a full disk: what was sent is sent again later, which is one document still
                self._journal.say("outbox-disk", destination=self._destination.ae_title)
                self._wake.wait(_DISK_PAUSE_S)
            except AuditError:
                self._journal.say("audit-disk", destination=self._destination.ae_title)
                self._wake.wait(_DISK_PAUSE_S)

    def _note(self, entry: Entry, delivery: Delivery) -> None:
        if delivery.state == "later" and not self._outbox.retry_later(
            entry, delivery.reason, was_let_in=delivery.was_let_in
        ):
            delivery = Delivery("refused", f"{delivery.reason}-too-often")
        self._journal.say(
            f"document-{delivery.state}", destination=self._destination.ae_title, reason=delivery.reason, entry=entry.id
        )
        if delivery.state == "later":
            return
        self._on_delivery(entry, self._destination, delivery)
        if delivery.state == "sent":
            self._outbox.sent(entry)
        elif not delivery.reason.endswith("-too-often"):
            self._outbox.park(entry, delivery.reason)
