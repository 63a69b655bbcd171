"""Read DICOM upper-layer PDUs (PS3.8 section 9.3) and DIMSE messages (PS3.7) only as far as a guard needs.

Bytes in, facts or a refusal out: no sockets, no files, no clock. A PDU is judged by its six header bytes before anything
of it is buffered, and a message by the order of its fragments, so that what lies behind the guard is never handed
something large, partial or out of turn.
"""

import re
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

HEADER_BYTES: Final = 6
"""Type, a reserved byte and the length of what follows, big endian (PS3.8 table 9-11)."""
MAX_NEGOTIATION_BYTES: Final = 65_536
"""A-ASSOCIATE PDUs: 128 presentation contexts with every transfer syntax take about 40 KB."""
MAX_COMMAND_BYTES: Final = 4_096
"""A C-STORE-RQ command set takes about 300 bytes."""

_CONTROL_BYTES: Final = 4  # of A-ASSOCIATE-RJ, A-RELEASE-RQ, A-RELEASE-RP and A-ABORT (PS3.8 tables 9-21 to 9-26)
_AC_FIXED_BYTES: Final = 68  # protocol version to the last reserved byte (PS3.8 table 9-17), without the header
_UID: Final = re.compile(r"[0-9.]{1,64}")  # PS3.5 section 9.1; leading zeros occur in the field and hurt nobody

STORE_RQ: Final = 0x0001
ECHO_RQ: Final = 0x0030
_NO_DATA_SET: Final = 0x0101  # (0000,0800) Command Data Set Type (PS3.7 section E.1)


class PduFault(Exception):
    """A peer broke the protocol or a limit.

    Attributes:
        reason: a code for logs; never anything the peer sent.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PduType(IntEnum):
    """PS3.8 section 9.3.1."""

    ASSOCIATE_RQ = 1
    ASSOCIATE_AC = 2
    ASSOCIATE_RJ = 3
    P_DATA = 4
    RELEASE_RQ = 5
    RELEASE_RP = 6
    ABORT = 7


class Pdv(NamedTuple):
    """One presentation data value: a fragment of a command or of a data set (PS3.8 section 9.3.5.1 and annex E.2)."""

    context_id: int
    is_command: bool
    is_last: bool
    content: memoryview


class Command(NamedTuple):
    """A whole DIMSE command that this node offers.

    Attributes:
        field: STORE_RQ or ECHO_RQ.
        encoded: the command set as sent, implicit VR little endian.
        sop_class_uid: (0000,0002).
        sop_instance_uid: (0000,1000); empty for C-ECHO.
    """

    context_id: int
    field: int
    encoded: bytes
    sop_class_uid: str
    sop_instance_uid: str


def read_header(header: bytes, *, max_data_bytes: int) -> tuple[PduType, int]:
    """Return a PDU's type and the length in bytes of what follows its header.

    Args:
        header: the first six bytes.
        max_data_bytes: of a P-DATA-TF PDU, as this node declared when the association was negotiated.

    Raises:
        PduFault: an unknown type, or longer than a PDU of that type may be.
    """
    kind, length = struct.unpack(">BxI", header)
    if not PduType.ASSOCIATE_RQ <= kind <= PduType.ABORT:
        raise PduFault("unknown-pdu")
    if kind in (PduType.ASSOCIATE_RQ, PduType.ASSOCIATE_AC):
        is_legal = _AC_FIXED_BYTES <= length <= MAX_NEGOTIATION_BYTES
    elif kind == PduType.P_DATA:
        is_legal = _CONTROL_BYTES < length <= max_data_bytes
    else:
        is_legal = length == _CONTROL_BYTES
    if not is_legal:
        raise PduFault("pdu-length")
    return PduType(kind), length


def read_pdvs(body: bytes) -> Iterator[Pdv]:
    """Yield the fragments in a P-DATA-TF PDU.

    Args:
        body: what follows the header.

    Raises:
        PduFault: the fragments' lengths don't add up to the PDU's.
    """
    view, place = memoryview(body), 0
    while place < len(view):
        if len(view) - place < 6:
            raise PduFault("pdv-length")
        length, context_id, control = struct.unpack_from(">IBB", view, place)
        end = place + 4 + length
        if length < 2 or end > len(view):
            raise PduFault("pdv-length")
        yield Pdv(context_id, bool(control & 1), bool(control & 2), view[place + 6 : end])
        place = end


def write_pdv(context_id: int, content: bytes, *, is_command: bool) -> bytes:
    """Return a P-DATA-TF PDU that holds one last fragment."""
    control = 2 | int(is_command)
    return struct.pack(">BxIIBB", PduType.P_DATA, len(content) + 6, len(content) + 2, context_id, control) + content


def write_abort(reason: int) -> bytes:
    """Return an A-ABORT PDU of the service provider (PS3.8 table 9-26); 0 no reason, 6 invalid parameter value."""
    return struct.pack(">BxIxxBB", PduType.ABORT, _CONTROL_BYTES, 2, reason)


def write_busy() -> bytes:
    """Return the A-ASSOCIATE-RJ PDU for "try again later": transient, local limit exceeded (PS3.8 table 9-21)."""
    return struct.pack(">BxIxBBB", PduType.ASSOCIATE_RJ, _CONTROL_BYTES, 2, 3, 2)


class Request(NamedTuple):
    """What an A-ASSOCIATE-RQ PDU asks for (PS3.8 section 9.3.2).

    Attributes:
        abstract_syntaxes: by presentation context; anything that is no UID reads as empty.
    """

    called: str
    calling: str
    abstract_syntaxes: dict[int, str]


def read_request(body: bytes) -> Request:
    """Return who asks whom for what, for limits and logs; the library behind the guard judges it.

    Args:
        body: an A-ASSOCIATE-RQ PDU without its header.

    Raises:
        PduFault: its items' lengths don't add up.
    """
    called, calling = (
        "".join(map(chr, title)).strip() if all(0x20 <= letter < 0x7F for letter in title) else ""
        for title in (body[4:20], body[20:36])
    )
    asked = {}
    for kind, item in _items(memoryview(body)[_AC_FIXED_BYTES:]):
        if kind == 0x20 and len(item) >= 4:  # presentation context
            syntaxes = [
                bytes(value).decode("ascii", "replace").rstrip("\0") for sub, value in _items(item[4:]) if sub == 0x30
            ]
            asked[item[0]] = syntaxes[0] if syntaxes and _UID.fullmatch(syntaxes[0]) else ""
    return Request(called, calling, asked)


def accepted_syntaxes(body: bytes) -> dict[int, str]:
    """Return the transfer syntax of each accepted presentation context (PS3.8 section 9.3.3.2).

    Args:
        body: an A-ASSOCIATE-AC PDU without its header.

    Raises:
        PduFault: not an A-ASSOCIATE-AC PDU's content.
    """
    accepted = {}
    for kind, item in _items(memoryview(body)[_AC_FIXED_BYTES:]):
        if kind == 0x21 and item[2] == 0:  # presentation context, result "acceptance"
            syntaxes = [bytes(value).decode("ascii").rstrip("\0") for sub, value in _items(item[4:]) if sub == 0x40]
            accepted[item[0]] = syntaxes[0]
    return accepted


def _items(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    place = 0
    while place < len(view):
        try:
            kind, length = struct.unpack_from(">BxH", view, place)
        except struct.error as err:
            raise PduFault("item-length") from err
        yield kind, view[place + 4 : place + 4 + length]
        place += 4 + length


class MessageReader:
    """Follow the order of one association's fragments: a command, then its data set if it has one, then the next command.

    A data set with no C-STORE before it, or a command inside a data set, is refused: what reads the stream further on would
    keep it in memory without limit.
    """

    def __init__(self) -> None:
        self._command = bytearray()
        self._context_id = 0
        self._is_in_data_set = False

    def read_command(self, pdv: Pdv) -> Command | None:
        """Take a command fragment; return the command when it is whole.

        Raises:
            PduFault: out of turn, too long, or not a request that this node offers.
        """
        if self._is_in_data_set or (self._command and pdv.context_id != self._context_id):
            raise PduFault("fragment-order")
        if len(self._command) + len(pdv.content) > MAX_COMMAND_BYTES:
            raise PduFault("command-length")
        self._command += pdv.content
        self._context_id = pdv.context_id
        if not pdv.is_last:
            return None
        command = _parse_command(pdv.context_id, bytes(self._command))
        self._command.clear()
        self._is_in_data_set = command.field == STORE_RQ
        return command

    def check_data(self, pdv: Pdv) -> None:
        """Refuse a data set fragment that doesn't belong to the C-STORE begun last.

        Raises:
            PduFault: out of turn.
        """
        if not self._is_in_data_set or pdv.context_id != self._context_id:
            raise PduFault("fragment-order")
        self._is_in_data_set = not pdv.is_last

    @property
    def is_between_messages(self) -> bool:
        """Whether nothing is half received."""
        return not self._is_in_data_set and not self._command


def _parse_command(context_id: int, encoded: bytes) -> Command:
    """Read the elements of a command set that decide whether it is let through (PS3.7 section 6.3.1)."""
    elements: dict[int, bytes] = {}
    place = 0
    while place < len(encoded):
        if len(encoded) - place < 8:
            raise PduFault("command-set")
        group, element, length = struct.unpack_from("<HHI", encoded, place)
        place += 8
        if group != 0 or element in elements or length > len(encoded) - place:
            raise PduFault("command-set")
        elements[element] = encoded[place : place + length]
        place += length
    field, data_set_type = (_us(elements, element) for element in (0x0100, 0x0800))
    if field not in (STORE_RQ, ECHO_RQ):
        raise PduFault("command-not-offered")
    if (data_set_type == _NO_DATA_SET) != (field == ECHO_RQ):
        raise PduFault("command-set")
    _us(elements, 0x0110)  # Message ID
    instance = _uid(elements, 0x1000) if field == STORE_RQ else ""
    return Command(context_id, field, encoded, _uid(elements, 0x0002), instance)


def _us(elements: dict[int, bytes], element: int) -> int:
    value = elements.get(element, b"")
    if len(value) != 2:
        raise PduFault("command-set")
    return int.from_bytes(value, "little")


def _uid(elements: dict[int, bytes], element: int) -> str:
    # Padded to even length with one NUL (PS3.5 section 9.4).
    text = elements.get(element, b"").decode("ascii", errors="replace").rstrip("\0")
    if not _UID.fullmatch(text):
        raise PduFault("command-set")
    return text
