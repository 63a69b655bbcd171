"""Sending, to destinations that take, refuse, break off, hang or are away."""

import io
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made when it is imported
    ComputedRadiographyImageStorage,
    SecondaryCaptureImageStorage,
)

from benchmarks.rigs.node_rig import PACS, free_port, write_radiograph
from chexnet_deploy.dicom.node.config import Destination
from chexnet_deploy.dicom.node.config import Outbox as OutboxSettings
from chexnet_deploy.dicom.node.log import Journal
from chexnet_deploy.dicom.node.outbox import Counts, Outbox
from chexnet_deploy.dicom.node.storage_scu import Delivery, Line, Sender, judge
from chexnet_deploy.dicom.node.worker import Answer


@pytest.fixture
def document(tmp_path: Path) -> bytes:
    write_radiograph(tmp_path / "document.dcm", seed=1)
    return (tmp_path / "document.dcm").read_bytes()


class Archive:
    """A destination that answers as it is told."""

    def __init__(self, sop_class: str = ComputedRadiographyImageStorage) -> None:
        self.statuses: list[int] = []
        self.uids: list[str] = []
        self.n_associations = 0
        application = AE(PACS)
        application.require_called_aet = True
        application.add_supported_context(sop_class)
        handlers = [(evt.EVT_C_STORE, self._on_store), (evt.EVT_ACCEPTED, self._on_accepted)]
        self.server = application.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self.port: int = self.server.server_address[1]

    def _on_accepted(self, event: evt.Event) -> None:
        self.n_associations += 1

    def _on_store(self, event: evt.Event) -> int:
        status = self.statuses.pop(0) if self.statuses else 0x0000
        if status < 0:
            event.assoc.abort()
            return 0x0000
        self.uids.append(str(event.request.AffectedSOPInstanceUID))
        return status


@pytest.fixture
def archive() -> Iterator[Archive]:
    made = Archive()
    yield made
    made.server.shutdown()


def line_to(port: int, *, ae_title: str = PACS, timeout_s: float = 2.0) -> Line:
    return Line(Destination(host="127.0.0.1", port=port, ae_title=ae_title), "CHEXNET", timeout_s)


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (0x0000, "sent"),
        (0xB000, "sent"),  # coerced
        (0xB006, "sent"),
        (0xA700, "later"),  # out of resources
        (0xA7FF, "later"),
        (0xA900, "refused"),
        (0xC000, "refused"),
        (0x0122, "refused"),  # SOP class not supported
        (0x0124, "refused"),  # not authorised
    ],
)
def test_statuses_mean_what_the_standard_says(status: int, state: str) -> None:
    assert judge(status).state == state


def test_documents_go_in_one_association(archive: Archive, document: bytes) -> None:
    line = line_to(archive.port)
    assert [line.deliver(document).state for _ in range(5)] == ["sent"] * 5
    line.close()
    assert (len(archive.uids), archive.n_associations) == (5, 1)


def test_what_is_sent_waits_for_no_acknowledgement(
    archive: Archive, document: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five documents that the kernel held back for a delayed acknowledgement each would take 40 ms more."""
    options: list[tuple[int, int, int]] = []

    class Watched(socket.socket):
        def setsockopt(self, *option: Any) -> None:
            options.append(option)
            super().setsockopt(*option)

    monkeypatch.setattr(socket, "socket", Watched)
    line = line_to(archive.port)
    assert line.deliver(document).state == "sent"
    line.close()
    assert (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1) in options


def test_association_that_was_ended_meanwhile_is_opened_again(archive: Archive, document: bytes) -> None:
    line = line_to(archive.port)
    assert line.deliver(document).state == "sent"
    for association in archive.server.active_associations:
        association.abort()
    assert line.deliver(document).state == "sent"
    line.close()


def test_destination_that_is_away_is_asked_again_later(document: bytes) -> None:
    assert line_to(free_port()).deliver(document) == Delivery("later", "unreachable", was_let_in=False)


def test_wrong_title_is_the_destinations_fault_and_never_the_documents(archive: Archive, document: bytes) -> None:
    delivery = line_to(archive.port, ae_title="OTHER").deliver(document)
    assert delivery == Delivery("later", "association-rejected", was_let_in=False)


def test_kind_of_document_that_is_not_taken_is_refused_for_good(document: bytes) -> None:
    made = Archive(SecondaryCaptureImageStorage)
    try:
        assert line_to(made.port).deliver(document) == Delivery("refused", "sop-class-not-accepted")
    finally:
        made.server.shutdown()


def test_association_that_breaks_off_counts_against_the_document(archive: Archive, document: bytes) -> None:
    archive.statuses = [-1]
    delivery = line_to(archive.port).deliver(document)
    assert (delivery.state, delivery.was_let_in) == ("later", True)


def test_nonsense_is_refused_without_a_call() -> None:
    assert line_to(1).deliver(b"nonsense") == Delivery("refused", "unreadable")


@pytest.mark.parametrize("answer", [b"", struct.pack(">BxI", 2, 100) + b"half"])
def test_destination_that_hangs_is_left_after_the_time(document: bytes, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held = []

        def hold() -> None:
            connection, _ = listener.accept()
            connection.recv(65_536)
            connection.sendall(answer)
            held.append(connection)

        thread = threading.Thread(target=hold)
        thread.start()
        start = time.monotonic()
        delivery = line_to(listener.getsockname()[1], timeout_s=1.0).deliver(document)
        assert time.monotonic() - start < 6.0
        thread.join()
        held[0].close()
    assert delivery.state == "later"


def test_sender_keeps_the_order_and_parks_what_is_refused(archive: Archive, document: bytes, tmp_path: Path) -> None:
    outbox = Outbox.open(tmp_path, OutboxSettings(first_retry_s=0.1, max_retry_s=0.2))
    seen: list[Delivery] = []
    archive.statuses = [0xA700, 0x0000, 0xC000, 0x0000]
    destination = Destination(host="127.0.0.1", port=archive.port, ae_title=PACS)
    sender = Sender(
        outbox, destination, "CHEXNET", 2.0, Journal(io.StringIO()), lambda entry, to, delivery: seen.append(delivery)
    )
    for i in range(3):
        outbox.put(f"image-{i}", Answer((document,)), [PACS])
    sender.start()
    deadline_s = time.monotonic() + 20.0
    while outbox.counts().waiting:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    sender.stop(5.0)
    assert [delivery.state for delivery in seen] == ["sent", "refused", "sent"]
    assert outbox.counts() == Counts(waiting=0, sent=2, parked=1)
    outbox.close()
