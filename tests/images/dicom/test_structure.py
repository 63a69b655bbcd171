"""Elements that lie about their size are refused before anything else reads them; every byte is written by hand here."""

import io
import struct
import zlib

import pydicom
import pytest

from benchmarks.rigs.synthetic_dicom import make_dicom
from chexnet_deploy.errors import ImageRefusedError, RefusalReason
from chexnet_deploy.images.dicom.elements import MAX_DEPTH, MAX_ELEMENTS, Structure, read_structure
from chexnet_deploy.images.dicom.header import TRANSFER_SYNTAXES

UNDEFINED = 0xFFFFFFFF


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    length = len(value) if length is None else length
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr)
    is_long = vr in (b"OB", b"OW", b"SQ", b"UN", b"UT")
    return head + (struct.pack("<2xI", length) if is_long else struct.pack("<H", length)) + value


def mark(tag: int, length: int = 0) -> bytes:
    return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, length)


def item(content: bytes, length: int | None = None) -> bytes:
    return mark(0xFFFEE000, len(content) if length is None else length) + content


ITEM_END, SEQUENCE_END = mark(0xFFFEE00D), mark(0xFFFEE0DD)


def dicom(*elements: bytes, syntax: bytes = b"1.2.840.10008.1.2.1\0") -> bytes:
    return bytes(128) + b"DICM" + element(0x00020010, b"UI", syntax) + b"".join(elements)


def read(content: bytes) -> Structure:
    return read_structure("x", content, TRANSFER_SYNTAXES)


def refused(content: bytes) -> tuple[RefusalReason, str]:
    with pytest.raises(ImageRefusedError) as caught:
        read(content)
    return caught.value.reason, str(caught.value)


ROWS = element(0x00280010, b"US", b"\x07\0")
PIXELS = element(0x7FE00010, b"OW", b"pixels")


def test_values_are_where_they_lie() -> None:
    structure = read(dicom(ROWS, element(0x7FE00010, b"OW", b"pixels")))
    assert {tag: bytes(found.value) for tag, found in structure.elements.items()} == {
        0x00280010: b"\7\0",
        0x7FE00010: b"pixels",
    }
    assert len(structure.header) == 128 + 4 + 8 + 20 + 10  # preamble, mark, transfer syntax, Rows


@pytest.mark.parametrize(
    "sequence",
    [
        element(0x00082218, b"SQ", item(ROWS)),
        element(0x00082218, b"SQ", item(ROWS, UNDEFINED) + ITEM_END),
        element(0x00082218, b"SQ", item(ROWS) + SEQUENCE_END, UNDEFINED),
        element(0x00082218, b"SQ", item(ROWS, UNDEFINED) + ITEM_END + SEQUENCE_END, UNDEFINED),
        # UN of undefined length: implicit VR inside.
        element(0x00082218, b"UN", item(struct.pack("<HHI", 0x28, 0x10, 2) + b"\7\0") + SEQUENCE_END, UNDEFINED),
    ],
)
def test_the_same_sequence_in_every_form(sequence: bytes) -> None:
    found = read(dicom(sequence, element(0x00280011, b"US", b"\x08\0"))).elements
    assert [bytes(inner[0x00280010].value) for inner in found[0x00082218].items] == [b"\7\0"]
    assert bytes(found[0x00280011].value) == b"\x08\0"


def test_implicit_vr_knows_sequences_from_the_dictionary() -> None:
    inner = struct.pack("<HHI", 0x28, 0x10, 2) + b"\7\0"
    outer = struct.pack("<HHI", 0x0008, 0x2218, len(inner) + 8) + item(inner)
    found = read(dicom(outer, syntax=b"1.2.840.10008.1.2\0")).elements
    assert found[0x00082218].items[0][0x00280010].vr == "US"


def test_fragments_without_their_offset_table() -> None:
    pixels = element(0x7FE00010, b"OB", item(b"") + item(b"ab") + item(b"cd") + SEQUENCE_END, UNDEFINED)
    fragments = read(dicom(pixels, syntax=b"1.2.840.10008.1.2.4.50")).elements[0x7FE00010].fragments
    assert fragments is not None
    assert [bytes(fragment) for fragment in fragments] == [b"ab", b"cd"]


@pytest.mark.parametrize(
    ("content", "reason", "found"),
    [
        (b"", RefusalReason.NOT_DICOM, "no DICM mark"),
        (dicom(ROWS)[132:], RefusalReason.NOT_DICOM, "no DICM mark"),
        (dicom(ROWS, syntax=b"1.2.840.10008.1.2.1.99"), RefusalReason.TRANSFER_SYNTAX, "1.2.840.10008.1.2.1.99"),
        (dicom(ROWS, syntax=b"1.2.840.10008.1.2.2\0"), RefusalReason.TRANSFER_SYNTAX, "transfer syntax 1.2.840"),
        (dicom(ROWS, syntax=b"CANARY"), RefusalReason.TRANSFER_SYNTAX, "no valid UID"),
        (bytes(128) + b"DICM" + ROWS, RefusalReason.TRANSFER_SYNTAX, "no valid UID"),
        (dicom(element(0x00080060, b"CS", b"CR", 40)), RefusalReason.TRUNCATED, "declares 40 bytes where 2 are left"),
        (dicom(element(0x7FE00010, b"OW", b"abc", 0xFFFFFFF0)), RefusalReason.TRUNCATED, "4,294,967,280 bytes where 3"),
        (dicom(ROWS)[:-1], RefusalReason.TRUNCATED, "declares 2 bytes where 1 are left"),
        (dicom(ROWS) + b"\0", RefusalReason.TRUNCATED, "1 bytes where an element must begin"),
        (dicom(ROWS) + bytes(512), RefusalReason.DAMAGED_HEADER, "(0000,0000) where it can't be"),  # no pixels yet
        (dicom(ROWS, PIXELS) + b"\n", RefusalReason.TRUNCATED, "1 bytes where an element must begin"),
        (dicom(ROWS, PIXELS) + bytes(511) + b"\1", RefusalReason.DAMAGED_HEADER, "(0000,0000) where it can't be"),
        (dicom(element(0x00082218, b"SQ", item(ROWS, 90))), RefusalReason.TRUNCATED, "an item that declares 90"),
        (
            dicom(element(0x00082218, b"SQ", item(ROWS), UNDEFINED)),
            RefusalReason.TRUNCATED,
            "a sequence without an end",
        ),
        (dicom(element(0x00082218, b"SQ", item(ROWS, UNDEFINED))), RefusalReason.TRUNCATED, "an item without an end"),
        (
            dicom(element(0x7FE00010, b"OB", item(b"")[:-1], UNDEFINED)),
            RefusalReason.TRUNCATED,
            "where an element must",
        ),
        (dicom(element(0x7FE00010, b"OB", item(b""), UNDEFINED)), RefusalReason.TRUNCATED, "pixel data without an end"),
        (
            dicom(element(0x7FE00010, b"OB", item(b"a", 9), UNDEFINED)),
            RefusalReason.TRUNCATED,
            "a fragment that declares",
        ),
        (dicom(ROWS, ROWS), RefusalReason.DAMAGED_HEADER, "(0028,0010) twice"),
        (dicom(ROWS.replace(b"US", b"XX")), RefusalReason.DAMAGED_HEADER, "(0028,0010) without a VR"),
        (dicom(ITEM_END), RefusalReason.DAMAGED_HEADER, "where it can't be"),
        (
            dicom(ROWS, element(0x00020010, b"UI", b"1.2\0")),
            RefusalReason.DAMAGED_HEADER,
            "(0002,0010) where it can't be",
        ),
        (
            dicom(element(0x00280010, b"OB", b"", UNDEFINED)),
            RefusalReason.DAMAGED_HEADER,
            "of VR OB with undefined length",
        ),
        (dicom(element(0x00082218, b"SQ", ROWS)), RefusalReason.DAMAGED_HEADER, "where an item must begin"),
        (dicom(element(0x7FE00010, b"OB", ROWS, UNDEFINED)), RefusalReason.DAMAGED_HEADER, "among the fragments"),
        (
            dicom(element(0x00082218, b"SQ", mark(0xFFFEE0DD, 4), UNDEFINED)),
            RefusalReason.DAMAGED_HEADER,
            "an end mark with a length",
        ),
    ],
)
def test_refused(content: bytes, reason: RefusalReason, found: str) -> None:
    got, message = refused(content)
    assert got is reason
    assert message.startswith("x: found ")
    assert found in message
    assert "CANARY" not in message


@pytest.mark.parametrize("n_zeros", [1, 2, 7, 8, 512, 100_000])
def test_zeros_behind_the_last_element(n_zeros: int) -> None:
    assert set(read(dicom(ROWS, PIXELS) + bytes(n_zeros)).elements) == {0x00280010, 0x7FE00010}
    trailing = element(0xFFFCFFFC, b"OB", bytes(6))  # Data Set Trailing Padding, PS3.10 section 7.2
    assert 0xFFFCFFFC in read(dicom(ROWS, PIXELS, trailing) + bytes(n_zeros)).elements


IMPLICIT, EXPLICIT = b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.1\0"
MODALITY = element(0x00080060, b"CS", b"CR")
MODALITY_IMPLICIT = struct.pack("<HHI", 0x0008, 0x0060, 2) + b"CR"
MODALITY_BIG = struct.pack(">HH2sH", 0x0008, 0x0060, b"CS", 2) + b"CR"


@pytest.mark.parametrize(
    ("data_set", "syntax", "found"),
    [
        (MODALITY_IMPLICIT, EXPLICIT, "implicit VR little endian"),
        (MODALITY_IMPLICIT, b"1.2.840.10008.1.2.4.70", "implicit VR little endian"),
        (MODALITY, IMPLICIT, "explicit VR little endian"),
        (MODALITY_BIG, EXPLICIT, "big endian"),
        (MODALITY_BIG, IMPLICIT, "big endian"),
        (zlib.compress(MODALITY + ROWS, wbits=-15), EXPLICIT, "deflated form"),
    ],
)
def test_data_in_another_transfer_syntax_than_the_header_names(data_set: bytes, syntax: bytes, found: str) -> None:
    reason, message = refused(dicom(data_set, syntax=syntax))
    assert reason is RefusalReason.TRANSFER_SYNTAX
    assert message.startswith(
        f"x: found a data set in {found}, where transfer syntax {syntax.decode().strip(chr(0))} is named"
    )


def test_a_data_set_in_the_syntax_that_is_named() -> None:
    assert 0x00080060 in read(dicom(MODALITY)).elements
    assert 0x00080060 in read(dicom(MODALITY_IMPLICIT, syntax=IMPLICIT)).elements


CREATOR = element(0x00190010, b"LO", b"ACME")


@pytest.mark.parametrize(
    "private",
    [
        struct.pack("<HHI", 0x0019, 0x1001, 4) + b"abcd",  # implicit VR among explicit ones
        struct.pack("<HHI", 0x0019, 0x1001, 4) + b"abcd" + struct.pack("<HHI", 0x0019, 0x1002, 2) + b"ef",
        struct.pack("<HHI", 0x0019, 0x1001, 0),
        struct.pack("<HH2sH", 0x0019, 0x1001, b"ZZ", 4) + b"abcd",  # VRs that only their maker knows
        struct.pack("<HH2s2xI", 0x0019, 0x1001, b"ZZ", 4) + b"abcd",
        struct.pack("<HH2sH", 0x0019, 0x1001, b"??", 4) + b"abcd",
        element(0x00191001, b"SQ", b"no item"),
        element(0x00191001, b"SQ", item(b"no element")),
        element(0x00191001, b"UN", b"whatever"),
        element(0x00191001, b"OB", item(b"") + item(b"ab") + SEQUENCE_END, UNDEFINED),
        element(0x00191001, b"OB", bytes(2**25)),
    ],
)
def test_a_private_element_that_cannot_be_understood_is_passed_over(private: bytes) -> None:
    structure = read(dicom(MODALITY, CREATOR, private, ROWS, PIXELS))
    assert {0x00080060, 0x00190010, 0x00280010, 0x7FE00010} <= set(structure.elements)
    dataset = pydicom.dcmread(io.BytesIO(structure.header))
    assert (dataset.Modality, dataset.Rows) == ("CR", 7)
    last = read(dicom(MODALITY, PIXELS, private.replace(b"\x19\0", b"\xe1\x7f")))  # behind the pixels
    assert structure.elements[0x7FE00010].value == last.elements[0x7FE00010].value


def test_one_within_an_item_takes_its_sequence_from_the_header_alone() -> None:
    private = struct.pack("<HHI", 0x0009, 0x1001, 4) + b"abcd"
    structure = read(dicom(MODALITY, element(0x00082218, b"SQ", item(private + ROWS)), ROWS))
    assert bytes(structure.elements[0x00082218].items[0][0x00280010].value) == b"\7\0"
    assert "AnatomicRegionSequence" not in pydicom.dcmread(io.BytesIO(structure.header))


@pytest.mark.parametrize(
    "private",
    [
        struct.pack("<HHI", 0x0019, 0x1001, 400) + b"abcd",  # longer than the file
        struct.pack("<HHI", 0x0019, 0x1001, 3) + b"abcd",  # no element follows there
        struct.pack("<HH2sH", 0x0019, 0x1001, b"ZZ", 5) + b"abcd",
    ],
)
def test_a_private_element_whose_length_is_not_sound(private: bytes) -> None:
    assert refused(dicom(MODALITY, CREATOR, private, ROWS, PIXELS))[0] is RefusalReason.DAMAGED_HEADER


def test_a_standard_element_is_never_passed_over() -> None:
    public = struct.pack("<HHI", 0x0018, 0x1164, 4) + b"abcd"
    assert refused(dicom(MODALITY, public, ROWS, PIXELS))[0] is RefusalReason.DAMAGED_HEADER


def nested(depth: int, length: int | None) -> bytes:
    inside = ROWS
    for _ in range(depth):
        ends = (ITEM_END, SEQUENCE_END) if length else (b"", b"")
        inside = element(0x00082218, b"SQ", item(inside + ends[0], length) + ends[1], length)
    return inside


@pytest.mark.parametrize("length", [None, UNDEFINED])
def test_nesting_has_a_limit(length: int | None) -> None:
    assert read(dicom(nested(MAX_DEPTH, length))).elements
    assert refused(dicom(nested(MAX_DEPTH + 1, length)))[0] is RefusalReason.TOO_LARGE
    assert refused(dicom(nested(400, length)))[0] is RefusalReason.TOO_LARGE  # pydicom: RecursionError


def test_the_number_of_elements_has_a_limit() -> None:
    def some(n: int) -> bytes:
        return dicom(*(element(0x00091000 + i, b"US", b"\0\0") for i in range(n - 1)))

    assert read(some(MAX_ELEMENTS)).elements  # the transfer syntax is one of them
    assert refused(some(MAX_ELEMENTS + 1))[0] is RefusalReason.TOO_LARGE
    items = element(0x00082218, b"SQ", item(b"") * MAX_ELEMENTS)
    assert refused(dicom(items))[0] is RefusalReason.TOO_LARGE
    fragments = element(0x7FE00010, b"OB", item(b"") * MAX_ELEMENTS + SEQUENCE_END, UNDEFINED)
    assert refused(dicom(fragments))[0] is RefusalReason.TOO_LARGE


def test_a_deflate_bomb_is_not_inflated() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(2**26)) + packer.flush()
    content = dicom(syntax=b"1.2.840.10008.1.2.1.99") + bomb
    assert refused(content)[0] is RefusalReason.TRANSFER_SYNTAX


def test_every_truncation_of_a_file_is_refused() -> None:
    content = make_dicom()
    for length in range(len(content)):
        try:
            structure = read(content[:length])
        except ImageRefusedError:
            continue
        # What ends between two elements is a shorter file, without its pixels.
        assert 0x7FE00010 not in structure.elements
