"""Walk the elements of a DICOM file, refuse what lies about its own size, and read a value as its VR says (PS3.5 section 6.2).

What the elements mean is header.py's business. pydicom reads a file whose last element declares 4 GB and has 3 bytes,
inflates whatever it is given and follows nesting until Python's stack ends; a file that passed here does none of this to
it. pydicom converts values too, but warns with the patient's value in the warning, and by a setting of the whole process.
References: PS3.5 section 7 (data set), PS3.10 section 7.1 (preamble and meta information).
"""

import contextlib
import math
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from pydicom.datadict import dictionary_VR

from chexnet_deploy.errors import ImageRefusedError, RefusalReason
from chexnet_deploy.images.gray import refusal

MAX_ELEMENTS: Final = 10_000
"""In the whole file, nested ones counted. A CR or DX header has 60 to 300."""
MAX_DEPTH: Final = 8
"""Of sequences within sequences. Radiographs use 3."""

PIXEL_DATA: Final = 0x7FE00010
META_GROUP: Final = 0x0002
TRANSFER_SYNTAX_UID: Final = 0x00020010
IMPLICIT_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2"
_NEXT_STEPS: Final = {
    "1.2.840.10008.1.2.1.99": "inflate it, e.g. by DCMTK's `dcmconv +te`",
    "1.2.840.10008.1.2.2": "rewrite it as little endian, e.g. by DCMTK's `dcmconv +te`",
}

_PREAMBLE_BYTES: Final = 128
_UNDEFINED: Final = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
# PS3.5 section 7.1.2: these have a length of 2 bytes, those of 4.
_SHORT_VRS: Final = frozenset("AE,AS,AT,CS,DA,DS,DT,FL,FD,IS,LO,LT,PN,SH,SL,SS,ST,TM,UI,UL,US".split(","))  # noqa: SIM905
_LONG_VRS: Final = frozenset("OB,OD,OF,OL,OV,OW,SQ,SV,UC,UN,UR,UT,UV".split(","))  # noqa: SIM905
_VRS: Final = _SHORT_VRS | _LONG_VRS


@dataclass(frozen=True, slots=True)
class Element:
    """One data element.

    Attributes:
        vr: its value representation; in implicit VR the dictionary's, which may read "US or SS".
        value: its bytes; of encapsulated pixel data, the bytes of all fragments with their item tags.
        items: of a sequence, its items' elements by tag.
        fragments: of encapsulated pixel data, the bytes of each fragment, the offset table not among them.
    """

    vr: str
    value: memoryview
    items: tuple[Mapping[int, "Element"], ...] = ()
    fragments: tuple[memoryview, ...] | None = None


@dataclass(frozen=True, slots=True)
class Structure:
    """A file whose elements all lie where they say.

    Attributes:
        transfer_syntax_uid: as the meta information says.
        elements: of the data set's top level, by tag; the meta information is not among them.
        header: the bytes up to the pixel data, or to the end where there is none; without private elements passed over.
    """

    transfer_syntax_uid: str
    elements: Mapping[int, Element]
    header: bytes


def is_dicom(content: bytes) -> bool:
    """Return whether the bytes carry the mark of a DICOM file (PS3.10 section 7.1)."""
    return content[_PREAMBLE_BYTES : _PREAMBLE_BYTES + 4] == b"DICM"


def read_structure(name: object, content: bytes, transfer_syntaxes: frozenset[str]) -> Structure:
    """Return where the elements of a DICOM file lie, having checked that they do.

    Args:
        name: what messages call the file.
        content: the whole file.
        transfer_syntaxes: those accepted; all of them little endian, and only IMPLICIT_LITTLE_ENDIAN implicit.

    Raises:
        ImageRefusedError: NOT_DICOM, TRUNCATED, TOO_LARGE, TRANSFER_SYNTAX or DAMAGED_HEADER.
    """
    if not is_dicom(content):
        found, needed = "no DICM mark at byte 128", "a DICOM file as PS3.10 defines it"
        next_step = "write it as a DICOM file (with preamble and meta header)"
        raise ImageRefusedError(RefusalReason.NOT_DICOM, refusal(name, found, needed, next_step))
    walk = _Walk(name, memoryview(content))
    walk.offset = _PREAMBLE_BYTES + 4
    meta = walk.elements(len(content), explicit=True, depth=0, only_group=META_GROUP)
    syntax = bytes(meta[TRANSFER_SYNTAX_UID].value) if TRANSFER_SYNTAX_UID in meta else b""
    uid = syntax.rstrip(b"\0 ").decode("ascii", "replace")
    if uid not in transfer_syntaxes:
        # The value is quoted only where it is a UID: anything may stand in a damaged file.
        said = uid if uid and set(uid) <= set("0123456789.") else "no valid UID"
        raise ImageRefusedError(
            RefusalReason.TRANSFER_SYNTAX,
            refusal(
                name,
                f"transfer syntax {said}",
                "uncompressed little endian, RLE, JPEG, JPEG-LS or JPEG 2000",
                _NEXT_STEPS.get(uid, "have the archive send it as Explicit VR Little Endian"),
            ),
        )
    said = "implicit" if uid == IMPLICIT_LITTLE_ENDIAN else "explicit"
    written = _encoding(walk.content[walk.offset :])
    if written is not None and written != said:
        raise ImageRefusedError(
            RefusalReason.TRANSFER_SYNTAX,
            refusal(
                name,
                f"a data set in {_ENCODINGS[written]}, where transfer syntax {uid} is named",
                f"one in {_ENCODINGS[said]}",
                "have the sender name the transfer syntax that the data are in, or write them in the one it names",
            ),
        )
    elements = walk.elements(len(content), explicit=said == "explicit", depth=0)
    return Structure(uid, elements, walk.header())


_ENCODINGS: Final = {
    "implicit": "implicit VR little endian",
    "explicit": "explicit VR little endian",
    "big": "big endian",
    "deflated": "deflated form",
}


def _encoding(data_set: memoryview) -> str | None:
    """Return how a data set's first element is written, or None where that is none; one of group 8 is usual."""
    if len(data_set) < 8:
        return None
    group, _, length = struct.unpack_from("<HHI", data_set)
    if bytes(data_set[4:6]).decode("latin-1") in _VRS:
        return "big" if group == 0x0800 else "explicit"
    if group == 0x0008 and length <= len(data_set) - 8:
        return "implicit"
    with contextlib.suppress(zlib.error):
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data_set[:4096], 8)
        if inflated[:2] == b"\x08\0":
            return "deflated"
    return None


@dataclass(slots=True)
class _Walk:
    """Where the walk is, and what it has counted."""

    name: object
    content: memoryview
    offset: int = 0
    n_elements: int = 0
    header_end: int = 0
    has_passed_over: bool = False  # a private element, since the last one of the top level
    _left_out: list[int] = field(default_factory=list)
    _known: dict[int, str] = field(default_factory=dict)

    def header(self) -> bytes:
        """Return the bytes up to the pixel data, without the top level's elements in which something was passed over."""
        ends = [0, *self._left_out, self.header_end or len(self.content)]
        return b"".join(self.content[start:end] for start, end in zip(ends[::2], ends[1::2], strict=True))

    def elements(
        self, end: int, *, explicit: bool, depth: int, only_group: int | None = None, delimited: bool = False
    ) -> dict[int, Element]:
        """Return the elements up to `end`, to another group, or (delimited) to an item's end mark."""
        found: dict[int, Element] = {}
        while self.offset < end:
            start = self.offset
            if PIXEL_DATA in found and not self.content[start] and not bytes(self.content[start:end]).strip(b"\0"):
                break  # some writers fill the file's last block with zeros
            tag = self._tag(end)
            if delimited and tag == _ITEM_END:
                self._zero_length(end)
                return found
            if only_group is not None and tag >> 16 != only_group:
                self.offset = start
                return found
            if tag in found:
                raise self._damaged(f"element {_words(tag)} twice")
            if tag >> 16 in (0x0000, 0xFFFE) or (tag >> 16 == META_GROUP) != (only_group is not None):
                raise self._damaged(f"element {_words(tag)} where it can't be")
            self.n_elements += 1
            if self.n_elements > MAX_ELEMENTS:
                raise self._too_large(f"more than {MAX_ELEMENTS:,} elements", "fewer")
            if tag == PIXEL_DATA and depth == 0:
                self.header_end = start
            found[tag] = self._element(tag, end, explicit=explicit, depth=depth)
            if depth == 0 and self.has_passed_over:
                self.has_passed_over = False
                self._left_out += [] if self.header_end else [start, self.offset]
        if delimited:
            raise self._truncated("an item without an end")
        return found

    def _element(self, tag: int, end: int, *, explicit: bool, depth: int) -> Element:
        vr, length = self._vr_and_length(tag, end, explicit=explicit)
        if length == _UNDEFINED:
            if tag == PIXEL_DATA or (_is_private(tag) and vr in ("OB", "OW")):
                return self._fragments(end)
            if vr not in ("SQ", "UN"):
                raise self._damaged(f"element {_words(tag)} of VR {vr} with undefined length")
            # PS3.5 section 6.2.2, note 2: what is UN of undefined length was a sequence, written in implicit VR.
            return self._sequence(end, explicit=explicit and vr == "SQ", depth=depth, delimited=True)
        if length > end - self.offset:
            raise self._truncated(
                f"element {_words(tag)} that declares {length:,} bytes where {end - self.offset:,} are left"
            )
        value_end = self.offset + length
        if vr == "SQ":
            try:
                return self._sequence(value_end, explicit=explicit, depth=depth, delimited=False)
            except ImageRefusedError as err:
                if not _is_private(tag) or err.reason is RefusalReason.TOO_LARGE:
                    raise
                self.has_passed_over = True
                vr, self.offset = "UN", value_end - length
        value = self.content[self.offset : value_end]
        self.offset = value_end
        return Element(vr, value)

    def _sequence(self, end: int, *, explicit: bool, depth: int, delimited: bool) -> Element:
        if depth == MAX_DEPTH:
            raise self._too_large(f"sequences nested deeper than {MAX_DEPTH}", "fewer levels")
        start = self.offset
        items: list[Mapping[int, Element]] = []
        while self.offset < end:
            tag = self._tag(end)
            if delimited and tag == _SEQUENCE_END:
                self._zero_length(end)
                return Element("SQ", self.content[start : self.offset], tuple(items))
            if tag != _ITEM:
                raise self._damaged(f"element {_words(tag)} where an item must begin")
            self.n_elements += 1
            if self.n_elements > MAX_ELEMENTS:
                raise self._too_large(f"more than {MAX_ELEMENTS:,} elements", "fewer")
            length = self._uint32(end)
            if length == _UNDEFINED:
                items.append(self.elements(end, explicit=explicit, depth=depth + 1, delimited=True))
                continue
            if length > end - self.offset:
                raise self._truncated(f"an item that declares {length:,} bytes where {end - self.offset:,} are left")
            items.append(self.elements(self.offset + length, explicit=explicit, depth=depth + 1))
        if delimited:
            raise self._truncated("a sequence without an end")
        return Element("SQ", self.content[start : self.offset], tuple(items))

    def _fragments(self, end: int) -> Element:
        """Return encapsulated pixel data (PS3.5 annex A.4): an offset table, which may be empty, then fragments."""
        start = self.offset
        fragments: list[memoryview] = []
        while self.offset < end:
            tag = self._tag(end)
            if tag == _SEQUENCE_END:
                self._zero_length(end)
                return Element("OB", self.content[start : self.offset], fragments=tuple(fragments[1:]))
            if tag != _ITEM:
                raise self._damaged(f"element {_words(tag)} among the fragments of the pixel data")
            self.n_elements += 1
            if self.n_elements > MAX_ELEMENTS:
                raise self._too_large(f"more than {MAX_ELEMENTS:,} elements", "fewer")
            length = self._uint32(end)
            if length > end - self.offset:
                raise self._truncated(f"a fragment that declares {length:,} bytes where {end - self.offset:,} are left")
            fragments.append(self.content[self.offset : self.offset + length])
            self.offset += length
        raise self._truncated("pixel data without an end")

    def _tag(self, end: int) -> int:
        if end - self.offset < 8:  # no element is shorter
            raise self._truncated(f"{end - self.offset} bytes where an element must begin")
        group, element = struct.unpack_from("<HH", self.content, self.offset)
        self.offset += 4
        return int(group << 16 | element)

    def _uint32(self, end: int) -> int:
        if end - self.offset < 4:
            raise self._truncated("a length cut short")
        self.offset += 4
        return int.from_bytes(self.content[self.offset - 4 : self.offset], "little")

    def _zero_length(self, end: int) -> None:
        if self._uint32(end) != 0:
            raise self._damaged("an end mark with a length")

    def _vr_and_length(self, tag: int, end: int, *, explicit: bool) -> tuple[str, int]:
        if not explicit:
            return self._dictionary_vr(tag), self._uint32(end)
        vr = bytes(self.content[self.offset : self.offset + 2]).decode("latin-1")
        if vr in _SHORT_VRS:
            self.offset += 4  # `_tag` made sure of 4 bytes behind the tag
            return vr, int.from_bytes(self.content[self.offset - 2 : self.offset], "little")
        if vr in _LONG_VRS:
            self.offset += 4  # two reserved
            return vr, self._uint32(end)
        ends = self._private_ends(tag, end) if _is_private(tag) else set()
        if len(ends) != 1:
            raise self._damaged(f"element {_words(tag)} without a VR")
        self.has_passed_over = True
        return "UN", ends.pop() - self.offset

    def _private_ends(self, tag: int, end: int) -> set[int]:
        """Return where a private element without a known VR can end: what follows is an element there.

        It may be written in implicit VR among explicit ones, or in a VR that only its maker knows.
        """
        at = self.offset
        implicit, short = (struct.unpack_from(form, self.content, at)[0] for form in ("<I", "<2xH"))
        ends = [at + 4 + implicit, at + 4 + short]
        if end - at >= 8 and not short:
            ends.append(at + 8 + int.from_bytes(self.content[at + 4 : at + 8], "little"))
        return {to for to in ends if to <= end and self._may_follow(tag, self.content[to : min(to + 6, end)])}

    def _may_follow(self, tag: int, begin: memoryview) -> bool:
        if len(begin) < 6:
            return not begin
        group, element = struct.unpack_from("<HH", begin)
        following = int(group << 16 | element)
        is_known = following == _ITEM_END or bytes(begin[4:]).decode("latin-1") in _VRS
        return following > tag and (is_known or group == tag >> 16)

    def _dictionary_vr(self, tag: int) -> str:
        if tag not in self._known:
            try:
                self._known[tag] = dictionary_VR(tag)
            except KeyError:  # private
                self._known[tag] = "UN"
        return self._known[tag]

    def _damaged(self, found: str) -> ImageRefusedError:
        message = refusal(self.name, found, "a DICOM file as PS3.5 defines it", "send or export it again")
        return ImageRefusedError(RefusalReason.DAMAGED_HEADER, message)

    def _truncated(self, found: str) -> ImageRefusedError:
        return ImageRefusedError(RefusalReason.TRUNCATED, refusal(self.name, found, "the whole file", "copy it again"))

    def _too_large(self, found: str, needed: str) -> ImageRefusedError:
        message = refusal(self.name, found, needed, "check that this is one radiograph")
        return ImageRefusedError(RefusalReason.TOO_LARGE, message)


def _is_private(tag: int) -> bool:
    return bool(tag >> 16 & 1)


def _words(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


_CODE_STRING: Final = re.compile(r"[A-Z0-9_ ]{1,16}")
_UID: Final = re.compile(r"[0-9]+(\.[0-9]+)*")
_DECIMAL: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Values:
    """The values of one level of elements.

    Args:
        name: what messages call the file.
        elements: by tag.
    """

    def __init__(self, name: object, elements: Mapping[int, Element]) -> None:
        self.name = name
        self._elements = elements

    def __contains__(self, tag: int) -> bool:
        return tag in self._elements

    def refuse(self, reason: RefusalReason, found: str, needed: str, next_step: str) -> ImageRefusedError:
        """Return the error that says so of this file."""
        return ImageRefusedError(reason, refusal(self.name, found, needed, next_step))

    def damaged(self, found: str, needed: str) -> ImageRefusedError:
        """Return the error for a value that isn't one."""
        return self.refuse(RefusalReason.DAMAGED_HEADER, found, needed, "send or export it again")

    def element(self, tag: int) -> Element | None:
        """Return the element, or None where it is absent or empty."""
        element = self._elements.get(tag)
        return None if element is None or not len(element.value) else element

    def items(self, tag: int) -> tuple["Values", ...]:
        """Return a sequence's items, without those that hold nothing; none where it is absent."""
        element = self._elements.get(tag)
        return () if element is None else tuple(Values(self.name, item) for item in element.items if item)

    def texts(self, tag: int) -> tuple[str, ...]:
        """Return the values between backslashes, without padding; anything but ASCII comes out as U+FFFD."""
        element = self.element(tag)
        if element is None:
            return ()
        return tuple(part.strip(" \0") for part in bytes(element.value).decode("ascii", "replace").split("\\"))

    def text(self, tag: int) -> str | None:
        """Return the first value, or None where there is none."""
        return next(iter(self.texts(tag)), "") or None

    def code(self, tag: int) -> str | None:
        """Return the first value in capitals, or None where it is none that a code string (CS) can have."""
        text = (self.text(tag) or "").upper()
        return text if _CODE_STRING.fullmatch(text) else None

    def uid(self, tag: int, keyword: str) -> str:
        """Return a UID that must be there."""
        text = self.text(tag) or ""
        if len(text) > 64 or not _UID.fullmatch(text):
            raise self.damaged(f"no valid {keyword}", "a UID of at most 64 digits and dots")
        return text

    def uint16(self, tag: int, keyword: str) -> int | None:
        """Return the one US value, or None where it is absent."""
        element = self.element(tag)
        if element is None:
            return None
        if len(element.value) != 2:
            raise self.damaged(f"{keyword} of {len(element.value)} bytes", "2 bytes")
        return int.from_bytes(element.value, "little")

    def required_uint16(self, tag: int, keyword: str) -> int:
        """Return the one US value of an element that must be there."""
        value = self.uint16(tag, keyword)
        if value is None:
            raise self.damaged(f"no {keyword}", "one")
        return value

    def decimal(self, tag: int, keyword: str) -> float | None:
        """Return the first DS value, or None where it is absent; never infinite."""
        text = self.text(tag)
        if text is None:
            return None
        value = float(text) if _DECIMAL.fullmatch(text) else math.nan
        if not math.isfinite(value):
            raise self.damaged(f"a {keyword} that is no number", "a decimal number")
        return value
