"""The guard with the DICOM library behind it, attacked on loopback by hand-made bytes."""

import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import CTImageStorage

from benchmarks.rigs.node_rig import NODE, SCANNER, echo_s, store, write_radiograph
from benchmarks.services.node_attack import associate, connect, store_command
from chexnet_deploy.dicom.node.config import Limits, Listen
from chexnet_deploy.dicom.node.config import Spool as SpoolSettings
from chexnet_deploy.dicom.node.connection import End
from chexnet_deploy.dicom.node.inbox import INCOMING, Kept, Pseudonyms, Spool, Verdict
from chexnet_deploy.dicom.node.listener import Guard
from chexnet_deploy.dicom.node.pdu import PduType, write_abort, write_busy, write_pdv
from chexnet_deploy.dicom.node.storage_scp import Scp

ABORT = write_abort(6)
QUICK = {"request_deadline_s": 1.0, "pdu_deadline_s": 0.5, "idle_s": 1.0, "quiet_after_s": 0.3}


class Front:
    """A guard and what lies behind it, in this process."""

    def __init__(
        self, folder: Path, titles: tuple[str, ...] = (SCANNER,), tls: ssl.SSLContext | None = None, **limits: float
    ) -> None:
        self.kept: list[Kept] = []
        self.ends: list[End] = []
        self.is_open = True
        folder.mkdir(mode=0o700)
        self.spool = Spool.open(folder, SpoolSettings(min_free_mib=1), Pseudonyms.open(folder))
        listen = Listen.model_construct(
            host="127.0.0.1", port=0, ae_title=NODE, calling_ae_titles=titles, tls=False, networks=("127.0.0.0/16",)
        )
        settings = Limits.model_validate({**QUICK, **limits})
        self.scp = Scp(listen, settings, self.spool, self._keep, lambda: self.is_open)
        self.guard = Guard(listen, settings, self.spool, self.scp.hand_over, self.ends.append, tls)
        self.port = self.guard.start()[1]

    def _keep(self, kept: Kept) -> Verdict:
        self.kept.append(kept)
        return kept.verdict

    def wait_for_end(self, reason: str, *, timeout_s: float = 5.0) -> End:
        deadline_s = time.monotonic() + timeout_s
        while not (found := [end for end in self.ends if reason in (end.reason, end.detail)]):
            assert time.monotonic() < deadline_s, self.ends
            time.sleep(0.01)
        return found[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def front(folder: Path) -> Iterator[Front]:
    made = Front(folder)
    yield made
    made.guard.stop()


def said(connection: socket.socket) -> bytes:
    """Return everything until the node ends the connection."""
    heard = b""
    try:
        while piece := connection.recv(4096):
            heard += piece
    except ConnectionError:
        pass
    return heard


def associated(port: int, *, calling: str = SCANNER) -> socket.socket:
    connection = connect(port, "127.0.0.1")
    assert associate(connection, calling=calling)
    return connection


def test_echo_and_store_go_through(front: Front, tmp_path: Path) -> None:
    assert echo_s(front.port) < 1.0
    images = [write_radiograph(tmp_path / f"{i}.dcm", seed=i, side_px=400) for i in range(3)]
    assert store(front.port, [*images, images[0]]) == [0, 0, 0, 0]
    assert [kept.verdict for kept in front.kept] == [*[Verdict.STORED] * 3, Verdict.AGAIN]


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_uid_against_the_standard_is_stored_all_the_same(front: Front) -> None:
    body = (
        b"\x08\0\x16\0UI\x1a\0" + b"1.2.840.10008.5.1.4.1.1.1\0" + b"\x08\0\x18\0UI\x08\0" + b"1.02.3.5"
        b"\xe0\x7f\x10\0OW\0\0\4\0\0\0" + b"\1\2\3\4"
    )
    implicit = body.replace(b"UI\x1a\0", b"\x1a\0\0\0").replace(b"UI\x08\0", b"\x08\0\0\0").replace(b"OW\0\0", b"")
    command = store_command().replace(b"\x08\0\0\x001.2.3.5\0", b"\x08\0\0\x001.02.3.5")
    assert command != store_command()
    with associated(front.port) as connection:
        connection.sendall(command + write_pdv(1, implicit, is_command=False))
        connection.sendall(struct.pack(">BxI4x", PduType.RELEASE_RQ, 4))
        said(connection)
    assert [kept.verdict for kept in front.kept] == [Verdict.STORED]


def test_closed_desk_answers_a700(front: Front, tmp_path: Path) -> None:
    front.is_open = False
    assert store(front.port, [write_radiograph(tmp_path / "a.dcm", seed=1)]) == [0xA700]
    assert front.spool.n_pending == 0
    assert not list((front.spool.folder / INCOMING).iterdir())


def test_wrong_calling_title_is_not_let_in(front: Front, tmp_path: Path) -> None:
    assert store(front.port, [write_radiograph(tmp_path / "a.dcm", seed=1)], calling="STRANGER") == []


def test_other_networks_are_cut_off(front: Front) -> None:
    with connect(front.port, "127.77.0.1") as connection:
        assert said(connection) == b""
    assert echo_s(front.port, source="127.0.9.9") < 1.0


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n", struct.pack(">BxI", PduType.P_DATA, 100) + bytes(100)])
def test_what_is_no_association_request_is_ended_at_once(front: Front, first: bytes) -> None:
    with connect(front.port, "127.0.0.1") as connection:
        connection.sendall(first)
        start = time.monotonic()
        assert said(connection) in (ABORT, b"")  # unread bytes may turn the end into a reset
    assert time.monotonic() - start < 0.5


def test_4_gb_declared_are_refused_by_their_header(front: Front) -> None:
    with associated(front.port) as connection:
        connection.sendall(struct.pack(">BxI", PduType.P_DATA, 0xFFFFFFFF))
        start = time.monotonic()
        assert said(connection) == ABORT
        assert time.monotonic() - start < 0.5
    front.wait_for_end("pdu-length")


def test_pdu_of_exactly_the_limit_passes_and_one_byte_more_does_not(front: Front) -> None:
    limit = Limits().max_pdu_bytes
    for extra, is_refused in ((0, False), (1, True)):
        with associated(front.port) as connection:
            connection.sendall(store_command())
            content = bytes(limit - 6 + extra)
            connection.sendall(struct.pack(">BxIIBB", PduType.P_DATA, len(content) + 6, len(content) + 2, 1, 0))
            if is_refused:
                assert said(connection) == ABORT
            else:
                connection.sendall(content)
                connection.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    connection.recv(1)


@pytest.mark.parametrize(
    ("sent", "longest_s"),
    [
        (None, 1.5),  # nothing: the association request is due in 1 s
        (b"\x01", 1.5),
        (struct.pack(">BxI", PduType.ASSOCIATE_RQ, 200) + bytes(100), 1.5),
    ],
)
def test_request_that_does_not_come_is_not_waited_for(front: Front, sent: bytes | None, longest_s: float) -> None:
    with connect(front.port, "127.0.0.1") as connection:
        start = time.monotonic()
        if sent:
            connection.sendall(sent)
        said(connection)
        assert 0.8 < time.monotonic() - start < longest_s


def test_pdu_that_does_not_end_is_not_waited_for(front: Front) -> None:
    with associated(front.port) as connection:
        connection.sendall(store_command() + struct.pack(">BxIIBB", PduType.P_DATA, 1000, 996, 1, 0))
        start = time.monotonic()
        assert said(connection) == write_abort(0)
        assert 0.4 < time.monotonic() - start < 1.2
    front.wait_for_end("timed-out")


def test_silent_association_ends_after_the_idle_time(front: Front) -> None:
    with associated(front.port) as connection:
        start = time.monotonic()
        assert said(connection) == write_abort(0)
        assert 0.9 < time.monotonic() - start < 1.8


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_object_mib": 1}, "object-too-large"),
        ({"max_object_mib": 64, "max_association_mib": 1}, "association-too-large"),
    ],
)
def test_what_is_over_a_limit_is_cut_and_leaves_nothing(folder: Path, limits: dict[str, int], reason: str) -> None:
    front = Front(folder, **limits)
    try:
        with associated(front.port) as connection:
            connection.sendall(store_command())
            piece = bytes(65_536)
            fragment = struct.pack(">BxIIBB", PduType.P_DATA, len(piece) + 6, len(piece) + 2, 1, 0) + piece
            with pytest.raises(ConnectionError):
                connection.sendall(fragment * 400)
        front.wait_for_end(reason)
        assert not list((folder / INCOMING).iterdir())
    finally:
        front.guard.stop()


def test_abort_in_the_middle_of_a_store_leaves_nothing(front: Front) -> None:
    with associated(front.port) as connection:
        connection.sendall(store_command() + struct.pack(">BxIIBB", PduType.P_DATA, 1006, 1002, 1, 0) + bytes(1000))
        deadline_s = time.monotonic() + 2.0
        while not list((front.spool.folder / INCOMING).iterdir()):
            assert time.monotonic() < deadline_s
        connection.sendall(write_abort(0))
    deadline_s = time.monotonic() + 2.0
    while list((front.spool.folder / INCOMING).iterdir()):
        assert time.monotonic() < deadline_s
    assert front.kept == []


def test_stores_sent_without_waiting_are_each_answered(front: Front, tmp_path: Path) -> None:
    image = write_radiograph(tmp_path / "a.dcm", seed=1, uid="1.2.3.5")
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = True, True
    write_dataset(out, image)
    with associated(front.port) as connection:
        connection.sendall((store_command() + write_pdv(1, out.getvalue(), is_command=False)) * 3)
        connection.sendall(struct.pack(">BxI4x", PduType.RELEASE_RQ, 4))
        heard = said(connection)
    assert [kept.verdict for kept in front.kept] == [Verdict.STORED, Verdict.AGAIN, Verdict.AGAIN]
    assert heard.endswith(struct.pack(">BxI4x", PduType.RELEASE_RP, 4))


def test_data_without_a_store_and_other_commands_are_refused(front: Front) -> None:
    event_report = store_command().replace(b"\0\0\0\1\2\0\0\0\1\0", b"\0\0\0\1\2\0\0\0\0\1")  # command field 0100H
    assert event_report != store_command()
    for sent, reason in (
        (write_pdv(1, b"data", is_command=False), "fragment-order"),
        (event_report, "command-not-offered"),
        (struct.pack(">BxIIBB", PduType.P_DATA, 6, 200, 1, 0), "pdv-length"),
    ):
        with associated(front.port) as connection:
            connection.sendall(sent)
            assert said(connection) == ABORT
        front.wait_for_end(reason)


def test_a_hundred_silent_connections_of_one_address_dont_keep_it_out(front: Front) -> None:
    silent = [connect(front.port, "127.0.0.1") for _ in range(100)]
    try:
        assert echo_s(front.port) < 1.0
    finally:
        for connection in silent:
            connection.close()


def test_silent_associations_give_way_and_busy_ones_dont(folder: Path, tmp_path: Path) -> None:
    front = Front(folder, max_associations=2, max_associations_per_peer=2, idle_s=30.0)
    try:
        first, second = associated(front.port), associated(front.port)
        assert echo_s(front.port) < 1.0  # after 0.3 s one of the two is quiet
        front.wait_for_end("gave-way")
        first.close()
        second.close()
    finally:
        front.guard.stop()


def test_without_a_place_the_newest_is_told_to_come_later(folder: Path) -> None:
    front = Front(folder, max_associations=1, quiet_after_s=60.0, idle_s=30.0)
    try:
        with associated(front.port), connect(front.port, "127.0.0.1") as late:
            assert not associate(late)
        front.wait_for_end("busy")
    finally:
        front.guard.stop()


def test_devices_behind_one_address_have_limits_of_their_own(folder: Path) -> None:
    # The other device behind the same address holds all that it may have, and none of it is quiet.
    front = Front(
        folder,
        titles=(SCANNER, "OTHER"),
        max_associations_per_peer=2,
        quiet_after_s=60.0,
        idle_s=30.0,
        max_associations=4,
    )
    try:
        held = [associated(front.port, calling="OTHER") for _ in range(2)]
        assert echo_s(front.port) < 1.0  # SCANNER
        with connect(front.port, "127.0.0.1") as third:
            assert not associate(third, calling="OTHER")
        assert front.wait_for_end("busy").calling == "OTHER"
        for connection in held:
            connection.close()
    finally:
        front.guard.stop()


def test_invented_titles_share_one_limit(folder: Path) -> None:
    front = Front(folder, max_associations_per_peer=1, quiet_after_s=60.0, request_deadline_s=0.5)
    try:
        # Each is let through to the library, which rejects it, so none may hold a place for long.
        for i in range(5):
            with connect(front.port, "127.0.0.1") as stranger:
                assert not associate(stranger, calling=f"STRANGER{i}")
        assert echo_s(front.port) < 1.0
        assert {end.detail for end in front.ends if end.calling.startswith("STRANGER")} <= {"calling-ae-title", ""}
    finally:
        front.guard.stop()


def test_ordinary_ends_are_told_apart(front: Front, tmp_path: Path) -> None:
    image = write_radiograph(tmp_path / "a.dcm", seed=1)
    assert store(front.port, [image]) == [0]
    assert front.wait_for_end("released") == End("127.0.0.1", "released", "", SCANNER, NODE)
    assert store(front.port, [image], calling="STRANGER") == []
    assert front.wait_for_end("rejected") == End("127.0.0.1", "rejected", "calling-ae-title", "STRANGER", NODE)
    image.SOPClassUID = CTImageStorage
    assert store(front.port, [image]) == []
    assert front.wait_for_end("no-context") == End("127.0.0.1", "no-context", "", SCANNER, NODE, (CTImageStorage,))
    with associated(front.port) as connection:
        connection.sendall(write_abort(0))
        said(connection)
    assert front.wait_for_end("aborted").detail == "by-peer"
    associated(front.port).close()
    assert front.wait_for_end("cut").calling == SCANNER


def test_called_by_another_title_it_says_so(front: Front) -> None:
    with connect(front.port, "127.0.0.1") as connection:
        assert not associate(connection, called="SOMEBODY")
    assert front.wait_for_end("rejected") == End("127.0.0.1", "rejected", "called-ae-title", SCANNER, "SOMEBODY")


def test_a_foreign_network_is_cut_off_and_named(front: Front) -> None:
    with connect(front.port, "127.1.0.1") as connection:
        assert said(connection) == b""
    assert front.wait_for_end("network") == End("127.1.0.1", "rejected", "network")


def test_a_part_of_a_study_that_is_not_offered_is_named(front: Front, tmp_path: Path) -> None:
    images = [write_radiograph(tmp_path / f"{i}.dcm", seed=i) for i in range(2)]
    images[1].SOPClassUID = CTImageStorage
    assert store(front.port, images) == [0, None]
    assert front.wait_for_end("released").not_accepted == (CTImageStorage,)


@pytest.mark.parametrize(
    "sop_class", ["1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.11.1", "1.2.840.10008.5.1.4.1.1.104.1"]
)
def test_a_study_with_other_objects_goes_through(front: Front, tmp_path: Path, sop_class: str) -> None:
    images = [write_radiograph(tmp_path / f"{i}.dcm", seed=i) for i in range(3)]
    images[1].SOPClassUID = sop_class
    assert store(front.port, images) == [0, 0xB006, 0]
    assert front.wait_for_end("released").not_accepted == ()


def test_rejection_of_a_busy_node_is_transient() -> None:
    assert write_busy()[7] == 2


def test_threads_of_ended_associations_end(front: Front) -> None:
    for _ in range(20):
        associated(front.port).close()
    deadline_s = time.monotonic() + 5.0
    while sum("Acceptor" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
