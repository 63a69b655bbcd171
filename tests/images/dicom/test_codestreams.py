"""A codestream that isn't the picture its header describes is refused before a codec sees it."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.rigs.synthetic_dicom import COMPRESSED, LOSSLESS, WORDS, make_dicom
from chexnet_deploy.errors import ImageRefusedError, RefusalReason
from chexnet_deploy.images.dicom.header import DicomHeader, read_header

BASELINE, SV1, JPEG_LS, J2K, RLE = (f"1.2.840.10008.1.2.{end}" for end in ("4.50", "4.70", "4.80", "4.90", "5"))
BYTES = ((WORDS - 1000) // 8).astype("u1")
SIDES = struct.pack(">HH", 48, 40)  # rows, columns, as JPEG and JPEG-LS write them


def file(syntax: str) -> bytes:
    return make_dicom(BYTES if syntax == BASELINE else WORDS, syntax=syntax)


def read(content: bytes) -> DicomHeader:
    return read_header("x", content)


@pytest.mark.parametrize("syntax", COMPRESSED)
def test_whole_files_pass(syntax: str) -> None:
    header = read(file(syntax))
    assert (header.transfer_syntax_uid, header.is_compressed) == (syntax, True)


def replaced(syntax: str, old: bytes, new: bytes) -> bytes:
    content = file(syntax)
    head, mark, pixels = content.rpartition(b"\xe0\x7f\x10\x00")  # Pixel Data's tag
    assert old in pixels
    return head + mark + pixels.replace(old, new, 1)


@pytest.mark.parametrize("sides", [(65535, 65535), (48, 41), (40, 48), (0, 40)])
@pytest.mark.parametrize("syntax", [BASELINE, SV1, JPEG_LS])
def test_jpeg_of_another_size(syntax: str, sides: tuple[int, int]) -> None:
    with pytest.raises(ImageRefusedError, match=f"codestream of {sides[1]} x {sides[0]} px") as caught:
        read(replaced(syntax, SIDES, struct.pack(">HH", *sides)))
    assert caught.value.reason is RefusalReason.CONTRADICTION


@pytest.mark.parametrize("sides", [(2**31, 2**31), (41, 48)])
def test_jpeg_2000_of_another_size(sides: tuple[int, int]) -> None:
    # SIZ: after its length and capabilities, columns and rows.
    with pytest.raises(ImageRefusedError, match="codestream of") as caught:
        read(replaced(J2K, struct.pack(">II", 40, 48), struct.pack(">II", *sides)))
    assert caught.value.reason is RefusalReason.CONTRADICTION


def test_signs_must_agree() -> None:
    with pytest.raises(ImageRefusedError, match="signed values in one of"):
        read(replaced(J2K, b"\0\x01\x0f\x01\x01", b"\0\x01\x8f\x01\x01"))  # one component, 16 bits, steps of 1


@pytest.mark.parametrize(
    ("syntax", "old", "new", "reason"),
    [
        (SV1, b"\xff\xc3\0\x0b\x10", b"\xff\xc3\0\x0b\x0b", RefusalReason.CONTRADICTION),  # 11 bits, 12 stored
        (SV1, b"\xff\xc3", b"\xff\xc0", RefusalReason.CONTRADICTION),  # another process
        (SV1, b"\xff\xd8", b"\xff\xd9", RefusalReason.CONTRADICTION),  # no JPEG at all
        (JPEG_LS, SIDES + b"\1", SIDES + b"\3", RefusalReason.COLOUR),
        (J2K, b"\xff\x4f\xff\x51", b"\xff\x4f\xff\x52", RefusalReason.CONTRADICTION),
        (J2K, b"\0\x01\x0f\x01\x01", b"\0\x03\x0f\x01\x01", RefusalReason.COLOUR),
        (J2K, b"\0\x01\x0f\x01\x01", b"\0\x01\x0f\x02\x01", RefusalReason.CONTRADICTION),  # subsampled
        (RLE, struct.pack("<II", 2, 64), struct.pack("<II", 3, 64), RefusalReason.CONTRADICTION),
        (RLE, struct.pack("<II", 2, 64), struct.pack("<II", 2, 63), RefusalReason.TRUNCATED),
        (RLE, struct.pack("<II", 2, 64), struct.pack("<II", 2, 2**31), RefusalReason.TRUNCATED),
    ],
)
def test_refused(syntax: str, old: bytes, new: bytes, reason: RefusalReason) -> None:
    with pytest.raises(ImageRefusedError) as caught:
        read(replaced(syntax, old, new))
    assert caught.value.reason is reason


def with_pixels(syntax: str, make: Callable[[bytes], bytes]) -> bytes:
    """A compressed file whose one fragment is replaced."""
    content = file(syntax)
    header = read(content)
    start = len(header.raw) + 12  # tag, VR, reserved, undefined length
    table_bytes = 8 + struct.unpack_from("<I", content, start + 4)[0]
    length = struct.unpack_from("<I", content, start + table_bytes + 4)[0]
    at = start + table_bytes + 8
    made = make(content[at : at + length])
    return content[: at - 4] + struct.pack("<I", len(made)) + made + content[at + length :]


@pytest.mark.parametrize("syntax", [uid for uid in COMPRESSED if uid != RLE])
def test_a_codestream_cut_short(syntax: str) -> None:
    with pytest.raises(ImageRefusedError, match="without its end mark") as caught:
        read(with_pixels(syntax, lambda stream: stream[: len(stream) // 2]))
    assert caught.value.reason is RefusalReason.TRUNCATED


@pytest.mark.parametrize("padding", [b"", b"\0", b"\xff", b"\0\0\0\0"])
def test_padding_behind_the_end_mark(padding: bytes) -> None:
    assert read(with_pixels(JPEG_LS, lambda stream: stream.rstrip(b"\0") + padding)).is_compressed


def test_a_codestream_of_nothing() -> None:
    with pytest.raises(ImageRefusedError, match="no codestream of the kind"):
        read(with_pixels(J2K, lambda stream: b"\xff\xd9"))
    with pytest.raises(ImageRefusedError, match="bytes of RLE"):
        read(with_pixels(RLE, lambda stream: stream[:10]))
    with pytest.raises(ImageRefusedError, match="but RLE or an unknown codestream"):
        read(with_pixels(J2K, lambda stream: struct.pack("<16I", 2, 64, 90, *[0] * 13) + bytes(60)))


def test_an_rle_bomb() -> None:
    # 6000 x 6000 from a hundred bytes: pydicom would fill 800 MB before it fails.
    content = make_dicom(edits={"Rows": 6000, "Columns": 6000}, syntax="1.2.840.10008.1.2.1")
    with pytest.raises(ImageRefusedError):
        read(content)
    small = file(RLE)
    large = small.replace(b"\x28\0\x10\0US\2\0\x30\0", b"\x28\0\x10\0US\2\0" + struct.pack("<H", 6000))
    large = large.replace(b"\x28\0\x11\0US\2\0\x28\0", b"\x28\0\x11\0US\2\0" + struct.pack("<H", 6000))
    with pytest.raises(ImageRefusedError, match="enough for 36,000,000 pixels") as caught:
        read(large)
    assert caught.value.reason is RefusalReason.TRUNCATED


def test_compressed_and_plain_must_not_be_mixed() -> None:
    plain = file("1.2.840.10008.1.2.1").replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0")
    with pytest.raises(
        ImageRefusedError, match=r"without fragments, where the header names transfer syntax 1.2.840.10008.1.2.5"
    ):
        read(plain)
    packed = file(RLE).replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.1\0")
    with pytest.raises(ImageRefusedError, match="in fragments, where the header names an uncompressed transfer syntax"):
        read(packed)


@pytest.mark.parametrize(
    ("is_really", "named", "found"),
    [
        (J2K, SV1, "but JPEG 2000"),
        (SV1, J2K, "but lossless JPEG"),
        (JPEG_LS, BASELINE, "but JPEG-LS"),
        (BASELINE, JPEG_LS, "but 8-bit JPEG"),
    ],
)
def test_a_codestream_of_another_transfer_syntax_is_named(is_really: str, named: str, found: str) -> None:
    content = make_dicom(BYTES, syntax=is_really)
    with pytest.raises(ImageRefusedError, match=found):
        read(content.replace(is_really.encode().ljust(22, b"\0"), named.encode().ljust(22, b"\0"), 1))


def padded(behind: bytes, words: NDArray[np.uint16] = WORDS, **edits: int) -> bytes:
    return make_dicom(words, {"PixelData": words.tobytes() + behind, **edits})


@pytest.mark.parametrize(
    "behind",
    [
        bytes(2),
        bytes(80),
        bytes(96),
        bytes(512),
        bytes(4096),
        b"\xff" * 80,
        b"\xff\xff",
        b"garbage!",
        bytes(48 * 40 * 2),
    ],
)
def test_pixel_data_padded_at_its_end(behind: bytes) -> None:
    header = read(padded(behind))
    assert (header.rows, header.columns) == (48, 40)
    plain = np.frombuffer(header.pixel_data, "<u2", 48 * 40).reshape(48, 40)
    np.testing.assert_array_equal(plain, WORDS)


@pytest.mark.parametrize(
    "edits",
    [
        {"Rows": 47},
        {"Rows": 32},
        {"Columns": 39},
        {"Columns": 32},
        {"Rows": 40, "Columns": 32},
    ],
)
def test_what_is_left_over_by_other_rows_or_columns_is_no_padding(edits: dict[str, int]) -> None:
    with pytest.raises(ImageRefusedError, match="or padding behind them") as caught:
        read(padded(b"", **edits))
    assert caught.value.reason is RefusalReason.CONTRADICTION


def test_a_black_border_is_no_padding_of_a_narrower_picture() -> None:
    words = np.sin(np.arange(40) / 3)[np.newaxis, :] * 500 + np.arange(48)[:, np.newaxis] + 600
    words[-4:] = 0
    with pytest.raises(ImageRefusedError, match="or padding behind them"):
        read(padded(b"", words.astype(np.uint16), Columns=39))
    assert read(padded(bytes(2 * 48), words.astype(np.uint16))).columns == 40


def test_two_rle_frames() -> None:
    content = file(RLE)
    second = b"\xfe\xff\x00\xe0\4\0\0\0abcd" + content[-8:]
    with pytest.raises(ImageRefusedError, match="2 RLE fragments") as caught:
        read(content[:-8] + second)
    assert caught.value.reason is RefusalReason.MULTI_FRAME


def test_a_shifted_high_bit_is_for_plain_pixels() -> None:
    content = file(SV1).replace(b"\x28\0\x02\x01US\2\0\x0b\0", b"\x28\0\x02\x01US\2\0\x0c\0")
    with pytest.raises(ImageRefusedError, match="shifted High Bit"):
        read(content)


def test_lossless_is_said() -> None:
    assert not any(read(file(syntax)).is_lossy for syntax in LOSSLESS)
    assert read(file(BASELINE)).is_lossy
