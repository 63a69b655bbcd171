import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chexnet_deploy.dicom.node.pdu import (
    ECHO_RQ,
    MAX_COMMAND_BYTES,
    STORE_RQ,
    Command,
    MessageReader,
    PduFault,
    PduType,
    Pdv,
    Request,
    accepted_syntaxes,
    read_header,
    read_pdvs,
    read_request,
    write_abort,
    write_busy,
    write_pdv,
)

MAX = 131_072


def element(number: int, value: bytes) -> bytes:
    return struct.pack("<HHI", 0, number, len(value)) + value


def command_set(field: int = STORE_RQ, data_set: int = 0, uid: bytes = b"1.2.3\0") -> bytes:
    us = struct.Struct("<H").pack
    return (
        element(0x0002, b"1.2.840.10008.1.1\0")
        + element(0x0100, us(field))
        + element(0x0110, us(7))
        + element(0x0800, us(data_set))
        + element(0x1000, uid)
    )


def fragment(content: bytes, *, is_command: bool = True, is_last: bool = True, context_id: int = 1) -> Pdv:
    return Pdv(context_id, is_command, is_last, memoryview(content))


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        (0, 4),
        (8, 4),
        (1, 67),
        (1, 65_537),
        (4, 0),
        (4, 4),
        (4, MAX + 1),
        (4, 0xFFFFFFFF),
        (5, 5),
        (7, 0),
    ],
)
def test_header_of_an_illegal_pdu_is_refused(kind: int, length: int) -> None:
    with pytest.raises(PduFault):
        read_header(struct.pack(">BxI", kind, length), max_data_bytes=MAX)


@pytest.mark.parametrize(("kind", "length"), [(1, 68), (1, 65_536), (4, 7), (4, MAX), (5, 4), (6, 4), (7, 4)])
def test_header_of_a_legal_pdu_is_read(kind: int, length: int) -> None:
    header = struct.pack(">BxI", kind, length)
    assert read_header(header, max_data_bytes=MAX) == (PduType(kind), length)


def test_abort_and_rejection_are_as_in_the_standard() -> None:
    assert write_abort(6) == bytes.fromhex("07 00 00000004 00 00 02 06")  # PS3.8 table 9-26
    assert write_busy() == bytes.fromhex("03 00 00000004 00 02 03 02")  # PS3.8 table 9-21


@given(st.binary(max_size=300), st.integers(0, 255), st.booleans())
def test_written_fragment_is_read_again(content: bytes, context_id: int, is_command: bool) -> None:
    pdu = write_pdv(context_id, content, is_command=is_command)
    _, length = read_header(pdu[:6], max_data_bytes=MAX)
    assert length == len(pdu) - 6
    (pdv,) = read_pdvs(pdu[6:])
    assert (pdv.context_id, pdv.is_command, pdv.is_last, bytes(pdv.content)) == (context_id, is_command, True, content)


@given(st.binary(max_size=200))
def test_any_bytes_are_fragments_or_refused(body: bytes) -> None:
    try:
        pdvs = list(read_pdvs(body))
    except PduFault:
        return
    assert sum(len(pdv.content) + 6 for pdv in pdvs) == len(body)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_command_or_refused(content: bytes) -> None:
    try:
        command = MessageReader().read_command(fragment(content))
    except PduFault:
        return
    assert command is not None
    assert command.field in (STORE_RQ, ECHO_RQ)


def test_store_then_its_data_then_echo() -> None:
    reader = MessageReader()
    whole = command_set()
    assert reader.read_command(fragment(whole[:20], is_last=False)) is None
    command = reader.read_command(fragment(whole[20:]))
    assert command == Command(1, STORE_RQ, whole, "1.2.840.10008.1.1", "1.2.3")
    assert not reader.is_between_messages
    reader.check_data(fragment(b"x", is_command=False, is_last=False))
    reader.check_data(fragment(b"x", is_command=False))
    assert reader.is_between_messages
    echo = reader.read_command(fragment(command_set(ECHO_RQ, 0x0101)))
    assert echo is not None
    assert echo.field == ECHO_RQ
    assert reader.is_between_messages


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (command_set(0x0100), "command-not-offered"),  # N-EVENT-REPORT-RQ: a thread each in the library behind
        (command_set(0x8001), "command-not-offered"),  # a response
        (command_set(STORE_RQ, 0x0101), "command-set"),  # a store without a data set
        (command_set(ECHO_RQ, 0x0000), "command-set"),  # an echo with one
        (command_set(uid=b"1.2.3'; DROP"), "command-set"),
        (command_set(uid=b"1" * 66), "command-set"),
        (command_set() + command_set(), "command-set"),  # each element twice
        (command_set()[:-1], "command-set"),
        (b"", "command-set"),
    ],
)
def test_commands_that_are_not_offered_are_refused(content: bytes, reason: str) -> None:
    with pytest.raises(PduFault, match=f"^{reason}$"):
        MessageReader().read_command(fragment(content))


def test_data_without_a_store_is_refused() -> None:
    with pytest.raises(PduFault, match="fragment-order"):
        MessageReader().check_data(fragment(b"x", is_command=False))


def test_endless_command_is_refused() -> None:
    reader = MessageReader()
    reader.read_command(fragment(bytes(MAX_COMMAND_BYTES), is_last=False))
    with pytest.raises(PduFault, match="command-length"):
        reader.read_command(fragment(b"x", is_last=False))


def test_data_in_another_context_is_refused() -> None:
    reader = MessageReader()
    reader.read_command(fragment(command_set()))
    with pytest.raises(PduFault, match="fragment-order"):
        reader.check_data(fragment(b"x", is_command=False, context_id=3))


def item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(content)) + content


@pytest.mark.parametrize(
    ("title", "read"),
    [(b"SCANNER         ", "SCANNER"), (b"  ROOM 1        ", "ROOM 1"), (bytes(16), ""), (b"\xff" * 16, "")],
)
def test_a_request_says_who_asks_whom_for_what(title: bytes, read: str) -> None:
    contexts = b"".join(
        item(0x20, bytes([number, 0, 0, 0]) + item(0x30, syntax) + item(0x40, b"1.2.840.10008.1.2"))
        for number, syntax in ((1, b"1.2.840.10008.1.1"), (3, b"CANARY^NAME"))
    )
    body = bytes(4) + b"CHEXNET".ljust(16) + title + bytes(32) + item(0x10, b"1.2.840.10008.3.1.1.1") + contexts
    assert read_request(body) == Request("CHEXNET", read, {1: "1.2.840.10008.1.1", 3: ""})


@settings(max_examples=300)
@given(st.binary(min_size=68, max_size=300))
def test_any_request_is_read_or_refused(body: bytes) -> None:
    with contextlib.suppress(PduFault):
        read_request(body)


def test_accepted_syntaxes_of_an_answer() -> None:
    accepted = item(0x21, bytes([1, 0, 0, 0]) + item(0x40, b"1.2.840.10008.1.2"))
    refused = item(0x21, bytes([3, 0, 4, 0]) + item(0x40, b""))
    body = bytes(68) + item(0x10, b"1.2.840.10008.3.1.1.1") + accepted + refused
    assert accepted_syntaxes(body) == {1: "1.2.840.10008.1.2"}
