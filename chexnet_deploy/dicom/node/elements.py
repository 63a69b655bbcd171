"""Walk over an encoded data set (PS3.5 section 7) to its pixel data, with constant memory and without recursion.

Runs in the node's own process on whatever a peer sent, so values are skipped but for three, and nothing is decoded. Reading
the header for good is the decoder's work, in a process that may die.
"""

import hashlib
import struct
from typing import BinaryIO, Final, NamedTuple

MAX_ELEMENTS: Final = 20_000
"""A radiograph has a few hundred before its pixels."""
_MAX_DEPTH: Final = 32
_UNDEFINED: Final = 0xFFFFFFFF
_SOP_CLASS, _SOP_INSTANCE, _MODALITY, _PIXEL_DATA = 0x0008_0016, 0x0008_0018, 0x0008_0060, 0x7FE0_0010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFE_E000, 0xFFFE_E00D, 0xFFFE_E0DD
# With a 32-bit length after two reserved bytes (PS3.5 section 7.1.2).
_LONG: Final = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_MAX_VALUE_BYTES: Final = 64  # a UID; a modality has 16 at most


class ElementFault(Exception):
    """A data set can't be followed to its pixel data; the message is a code for logs, never anything from the data set."""


class Identity(NamedTuple):
    """Which image a data set is.

    Attributes:
        modality: (0008,0060), empty where it is absent.
        data_set_sha256: of all its bytes as they were sent.
    """

    sop_class_uid: str
    sop_instance_uid: str
    modality: str
    data_set_sha256: bytes


def identify(file: BinaryIO, end: int, *, is_implicit: bool) -> Identity:
    """Return which image a little endian data set is.

    Args:
        file: at the data set's first byte; buffered and seekable.
        end: where the data set ends, counted from the file's start.
        is_implicit: implicit VR (1.2.840.10008.1.2); every other syntax that is accepted has explicit VRs.

    Raises:
        ElementFault: no pixel data, cut short, out of order, or too many elements or levels.
    """
    begin = file.tell()
    values = {_SOP_CLASS: "", _SOP_INSTANCE: "", _MODALITY: ""}
    levels: list[bool] = []  # is_implicit outside of each sequence or item that is open
    last_tag = -1
    for _ in range(MAX_ELEMENTS):
        tag, length, is_unknown = _read_element_header(file, is_implicit=is_implicit)
        if length != _UNDEFINED and file.tell() + length > end:
            raise ElementFault("cut-short")
        if tag in (_ITEM_END, _SEQUENCE_END):
            if not levels:
                raise ElementFault("out-of-order")
            is_implicit = levels.pop()
            continue
        if not levels:
            if tag <= last_tag:
                raise ElementFault("out-of-order")
            last_tag = tag
            if tag == _PIXEL_DATA:
                file.seek(begin)
                return Identity(values[_SOP_CLASS], values[_SOP_INSTANCE], values[_MODALITY], _digest(file))
            if tag in values and length <= _MAX_VALUE_BYTES:
                values[tag] = file.read(length).decode("ascii", errors="replace").rstrip("\0 ")
                continue
        if length != _UNDEFINED:
            file.seek(length, 1)
            continue
        if len(levels) == _MAX_DEPTH:
            raise ElementFault("too-deep")
        levels.append(is_implicit)
        # A sequence of unknown VR is in implicit VR (PS3.5 section 6.2.2, note 2).
        is_implicit = is_implicit or is_unknown
    raise ElementFault("too-many-elements")


def _read_element_header(file: BinaryIO, *, is_implicit: bool) -> tuple[int, int, bool]:
    """Return tag, length and whether the VR is UN."""
    head = file.read(8)
    if len(head) < 8:
        raise ElementFault("no-pixel-data" if not head else "cut-short")
    group, element, length = struct.unpack("<HHI", head)
    tag = group << 16 | element
    if is_implicit or group == 0xFFFE:
        return tag, length, False
    vr = head[4:6]
    if vr not in _LONG:
        return tag, int.from_bytes(head[6:8], "little"), False
    tail = file.read(4)
    if len(tail) < 4:
        raise ElementFault("cut-short")
    return tag, int.from_bytes(tail, "little"), vr == b"UN"


def _digest(file: BinaryIO) -> bytes:
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.digest()
