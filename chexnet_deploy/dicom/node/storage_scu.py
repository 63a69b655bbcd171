"""Send what waits in the outbox, by C-STORE, one thread for each destination.

A destination that is away, slow or full is asked again later; what it refuses for good is parked. See outbox.py for order
and waiting.
"""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from io import BytesIO
from typing import Final, NamedTuple, cast

from pydicom import Dataset, dcmread
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.transport import AssociationSocket

from chexnet_deploy.dicom.node.config import Destination
from chexnet_deploy.dicom.node.log import Journal
from chexnet_deploy.dicom.node.outbox import Entry, Outbox, OutboxFullError
from chexnet_deploy.errors import AuditError

_CONNECT_S: Final = 5.0
_DISK_PAUSE_S: Final = 1.0
_MOST_CONTEXTS: Final = 64  # of the 128 that an association has room for
_WARNINGS: Final = frozenset((0xB000, 0xB006, 0xB007))  # stored, with elements changed or left out (PS3.4 table B.2-1)


class _Context(NamedTuple):
    """A kind of document: what it is and how it is encoded."""

    sop_class: str
    syntax: str


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


class Line:
    """The way to one destination: an association that is kept while there is something to send.

    Args:
        destination: whom to call.
        calling_ae_title: our name.
        timeout_s: for each answer of the destination, and for each piece of one.
        tls: for the connection; None: there is none.
    """

    def __init__(
        self, destination: Destination, calling_ae_title: str, timeout_s: float, tls: ssl.SSLContext | None = None
    ) -> None:
        self._destination, self._calling_ae_title, self._timeout_s = destination, calling_ae_title, timeout_s
        self._tls_args = None if tls is None else (tls, destination.host)
        self._association: Association | None = None
        # Every kind of document sent so far is negotiated each time, so that an image's documents go in one association.
        self._contexts: dict[_Context, None] = {}

    def deliver(self, document: bytes) -> Delivery:
        """Try once to send one DICOM file (PS3.10)."""
        try:
            dataset = dcmread(BytesIO(document))
            context = _Context(dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.TransferSyntaxUID)
        except Exception:  # noqa: BLE001 - whatever the library makes of it, no attempt will ever send it
            return Delivery("refused", "unreadable")
        is_new = self._association is None or not self._association.is_established or context not in self._contexts
        if is_new and (failure := self._call(context)) is not None:
            return failure
        delivery = self._send(dataset, context)
        # An association that has been open may have been ended by the other side since.
        return self.deliver(document) if delivery.state == "later" and not is_new else delivery

    def close(self) -> None:
        """Release the association, if there is one."""
        if self._association is not None and self._association.is_established:
            with contextlib.suppress(RuntimeError):
                self._association.release()
        self._association = None

    def _call(self, context: _Context) -> Delivery | None:
        """Open an association; return why there is none."""
        self.close()
        if len(self._contexts) >= _MOST_CONTEXTS:
            self._contexts.clear()
        self._contexts[context] = None
        application = AE(self._calling_ae_title)
        application.connection_timeout = _CONNECT_S
        application.acse_timeout = application.dimse_timeout = application.network_timeout = self._timeout_s
        for sop_class, syntax in self._contexts:
            application.add_requested_context(sop_class, syntax)
        to = self._destination
        handlers: list[evt.EventHandlerType] = [(evt.EVT_CONN_OPEN, self._prepare)]
        try:
            association = application.associate(
                to.host, to.port, ae_title=to.ae_title, evt_handlers=handlers, tls_args=self._tls_args
            )
        except OSError:  # its name can't be resolved
            return Delivery("later", "unreachable", was_let_in=False)
        if association.is_established:
            self._association = association
            return None
        return _not_let_in(association)

    def _prepare(self, event: evt.Event) -> None:
        connection = cast(socket.socket, cast(AssociationSocket, event.assoc.dul.socket).socket)
        # The library waits without end for the rest of a PDU that has begun.
        connection.settimeout(self._timeout_s)
        # Else the data waits 40 ms for the other side to acknowledge the command (Nagle's algorithm, delayed acknowledgement).
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _send(self, dataset: Dataset, context: _Context) -> Delivery:
        association = cast(Association, self._association)
        accepted = [(each.abstract_syntax, each.transfer_syntax[0]) for each in association.accepted_contexts]
        if context not in accepted:
            return Delivery("refused", "sop-class-not-accepted")
        try:
            status = association.send_c_store(dataset)
        except (ValueError, RuntimeError):  # the association broke off before or while sending
            return Delivery("later", "broke-off")
        return judge(status.Status) if "Status" in status else Delivery("later", "no-answer")


def judge(status: int) -> Delivery:
    """Return what a C-STORE status means for a document (PS3.4 table B.2-1, PS3.7 annex C)."""
    if status == 0x0000 or status in _WARNINGS:
        return Delivery("sent", "" if status == 0 else f"warning-{status:04x}")
    if 0xA700 <= status <= 0xA7FF:  # out of resources
        # Nothing is wrong with the document, so it isn't counted among those that break a destination.
        return Delivery("later", f"status-{status:04x}", was_let_in=False)
    return Delivery("refused", f"status-{status:04x}")


def _not_let_in(association: Association) -> Delivery:
    if association.is_rejected:
        return Delivery("later", "association-rejected", was_let_in=False)
    if association.rejected_contexts:
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
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._outbox, self._destination, self._journal, self._on_delivery = outbox, destination, journal, on_delivery
        self._line = Line(destination, calling_ae_title, timeout_s, tls)
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
                    self._line.close()
                    self._wake.wait(wait_s)
                    continue
                self._note(entry, self._line.deliver(entry.document))
            except OutboxFullError:  # a full disk: what was sent is sent again later, which is one document still
                self._journal.say("outbox-disk", destination=self._destination.ae_title)
                self._wake.wait(_DISK_PAUSE_S)
            except AuditError:
                self._journal.say("audit-disk", destination=self._destination.ae_title)
                self._wake.wait(_DISK_PAUSE_S)

        self._line.close()

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
