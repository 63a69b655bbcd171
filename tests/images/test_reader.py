"""read_image: what it accepts keeps its values, what it can't know it refuses, and damage never passes as a picture."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from chexnet_deploy.errors import ImageError
from chexnet_deploy.images.gray import MAX_FILE_MIB, MAX_PIXELS
from chexnet_deploy.images.reader import read_image

# [48, 40]: value = x + 3y, so any swap of axes or channels shows.
GRAY = (np.arange(40)[np.newaxis, :] + 3 * np.arange(48)[:, np.newaxis]).astype(np.uint8)
OPAQUE = np.full_like(GRAY, 255)


def encoded(pixels: NDArray[np.generic], kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bits: int, colour_type: int, raw: bytes, *extra: bytes) -> bytes:
    """A PNG written by hand, so that forms Pillow can't write are tested too. raw: rows, each after a filter byte."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def written(folder: Path, content: bytes, name: str = "x.png") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def palette_png(order: NDArray[np.uint8]) -> bytes:
    """GRAY as a palette picture whose palette is the grays in the given order."""
    image = Image.fromarray(np.argsort(order).astype(np.uint8)[GRAY], "L")
    indexed = Image.frombytes("P", image.size, image.tobytes())
    indexed.putpalette(np.repeat(order, 3).tobytes())
    buffer = io.BytesIO()
    indexed.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(encoded(GRAY), id="gray"),
        pytest.param(encoded(np.stack([GRAY, OPAQUE], -1)), id="gray+alpha"),
        pytest.param(encoded(np.stack([GRAY] * 3, -1)), id="rgb"),
        pytest.param(encoded(np.stack([GRAY] * 3 + [OPAQUE], -1)), id="rgba"),
        pytest.param(palette_png(np.arange(256, dtype=np.uint8)), id="palette"),
        pytest.param(palette_png(np.arange(255, -1, -1, dtype=np.uint8)), id="palette backwards"),
        pytest.param(encoded(GRAY, icc_profile=b"any", dpi=(72, 72)), id="icc profile"),
    ],
)
def test_png_values_are_kept(tmp_path: Path, content: bytes) -> None:
    gray = read_image(written(tmp_path, content))
    assert gray.dtype == np.uint8
    assert gray.flags.c_contiguous
    assert gray.flags.writeable
    np.testing.assert_array_equal(gray, GRAY)


def test_the_contents_decide_and_not_the_name(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(written(tmp_path, encoded(GRAY), "x.jpg")), GRAY)


@pytest.mark.parametrize("shape", [(48, 40), (48, 40, 3)])
def test_jpeg_equals_pillow(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.broadcast_to(GRAY.reshape(48, 40, *[1] * (len(shape) - 2)), shape)
    path = written(tmp_path, encoded(np.ascontiguousarray(pixels), "JPEG"), "x.jpg")
    np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path).convert("L")))


def test_16_bit_is_scaled_by_its_own_range(tmp_path: Path) -> None:
    values = np.full((40, 40), 1000, np.uint16)
    values[0, :5] = [1000, 1001, 1002, 1255, 1510]  # span 510: two steps are one gray level
    gray = read_image(written(tmp_path, encoded(values)))
    assert gray[0, :5].tolist() == [0, 1, 1, 128, 255]  # 0.5 -> 1 and 127.5 -> 128: half up
    assert gray[1:].max() == 0


def test_12_bits_in_16_lose_no_gray_level(tmp_path: Path) -> None:
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    gray = read_image(written(tmp_path, encoded(ramp)))
    assert len(np.unique(gray)) == 256
    assert (np.diff(gray.ravel().astype(int)) >= 0).all()


def test_full_16_bit_range(tmp_path: Path) -> None:
    gray = read_image(written(tmp_path, encoded(np.arange(65536, dtype=np.uint16).reshape(256, 256))))
    expected = (np.arange(65536) / 257 + 0.5).astype(np.uint8)  # 65535 / 255 = 257
    np.testing.assert_array_equal(gray.ravel(), expected)


def with_orientation(value: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(GRAY, kind, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_orientation_1_is_upright(tmp_path: Path, kind: str) -> None:
    assert read_image(written(tmp_path, with_orientation(1, kind))).shape == (48, 40)


LARGE = zlib.compress(bytes(3_000_000))
EXIF_6 = b"II*\0\x08\0\0\0" + b"\1\0\x12\1\3\0\1\0\0\0\6\0\0\0" + bytes(4)
XMP = b'<rdf:Description tiff:Orientation="%d"/>' + b" " * 2_000_000


def with_chunks(*chunks: bytes, behind: bool = False) -> bytes:
    """Return GRAY as a PNG with chunks more, before its pixels or behind them."""
    content = encoded(GRAY)
    at = len(content) - 12 if behind else 33
    return content[:at] + b"".join(chunks) + content[at:]


def xmp_chunk(orientation: int, *, packed: bool) -> bytes:
    text = XMP % orientation
    head = b"XML:com.adobe.xmp\0" + (b"\1\0" if packed else b"\0\0") + b"\0\0"
    return chunk(b"iTXt", head + (zlib.compress(text) if packed else text))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([chunk(b"iCCP", b"any\0\0" + LARGE)], id="large ICC"),
        pytest.param([chunk(b"iCCP", b"junk")], id="damaged ICC"),
        pytest.param([chunk(b"zTXt", b"Comment\0\0" + LARGE)], id="large text"),
        pytest.param([chunk(b"tEXt", b"Comment\0" + bytes(9_000_000))] * 8, id="72 MB of text"),
        pytest.param([xmp_chunk(1, packed=True)], id="large packed XMP"),
        pytest.param([xmp_chunk(9, packed=False)], id="XMP orientation 9"),
        pytest.param([chunk(b"zTXt", b"Raw profile type exif\0\0junk")], id="junk in a raw profile"),
        pytest.param(
            [chunk(b"pHYs", b"\0"), chunk(b"gAMA", b""), chunk(b"prVt", b"any")], id="junk beside the picture"
        ),
        pytest.param([chunk(b"eXIf", b"")], id="empty EXIF"),
        pytest.param([chunk(b"eXIf", b"\0\0\x11\0\0\1\4\0")], id="junk EXIF"),
        pytest.param([chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff")], id="EXIF cut off"),
    ],
)
def test_metadata_is_passed_over(tmp_path: Path, extra: list[bytes], behind: bool) -> None:
    np.testing.assert_array_equal(read_image(written(tmp_path, with_chunks(*extra, behind=behind))), GRAY)


@pytest.mark.parametrize("value", [0, 9, 65535])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_orientation_outside_1_to_8_is_none(tmp_path: Path, kind: str, value: int) -> None:
    assert read_image(written(tmp_path, with_orientation(value, kind))).shape == (48, 40)


@pytest.mark.parametrize(
    "content",
    [
        *(with_orientation(value, kind) for kind in ("PNG", "JPEG") for value in range(2, 9)),
        with_chunks(xmp_chunk(6, packed=True)),
        with_chunks(xmp_chunk(6, packed=False), behind=True),
        with_chunks(chunk(b"eXIf", b"junk"), xmp_chunk(3, packed=False)),
        with_chunks(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n26\n" + EXIF_6.hex().encode())),
        encoded(GRAY, "JPEG", xmp=XMP[:60] % 8),
    ],
)
def test_an_orientation_that_turns_is_refused_wherever_it_stands(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ImageError, match=r"EXIF orientation [2-8]; needed an upright picture"):
        read_image(written(tmp_path, content))


def test_metadata_that_is_damaged_is_still_damage(tmp_path: Path) -> None:
    content = with_chunks(chunk(b"tEXt", b"Comment\0words")).replace(b"words", b"worms")
    with pytest.raises(ImageError, match="bad checksum in PNG chunk b'tEXt'"):
        read_image(written(tmp_path, content))


def test_texts_that_unpack_to_gigabytes_cost_one(tmp_path: Path) -> None:
    bomb = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(50_000_000)))
    start = perf_counter()
    np.testing.assert_array_equal(read_image(written(tmp_path, with_chunks(*[bomb] * 100))), GRAY)
    assert perf_counter() - start < 5.0


def animated(kind: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(GRAY), Image.fromarray(255 - GRAY)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def coloured() -> NDArray[np.uint8]:
    pixels = np.stack([GRAY] * 3, -1)
    pixels[47, 39, 2] ^= 1  # one step of blue in the last pixel
    return pixels


def nearly_opaque(channels: int) -> NDArray[np.uint8]:
    alpha = OPAQUE.copy()
    alpha[47, 39] = 254
    return np.stack([GRAY] * channels + [alpha], -1)


def rows(height: int, row_bytes: int) -> bytes:
    """A ramp of bytes in rows of the given length."""
    return b"".join(b"\0" + bytes(i % 256 for i in range(y, y + row_bytes)) for y in range(height))


def plain(value: int) -> NDArray[np.uint16]:
    return np.full((40, 40), value, np.uint16)


REFUSED = {
    "0 bytes": b"",
    "neither a PNG nor a JPEG nor a DICOM file": b"Image Index,Finding Labels\n",
    "true colour": encoded(coloured()),
    "not opaque": encoded(nearly_opaque(1)),
    "not opaque ": encoded(nearly_opaque(3)),
    "not opaque  ": encoded(GRAY, transparency=7),
    "true colour ": encoded(np.ascontiguousarray(coloured()[..., ::-1])),
    "16-bit pixels all equal to 0": encoded(plain(0)),
    "16-bit pixels all equal to 65535": encoded(plain(65535)),
    "16-bit colour or alpha": png(40, 40, 16, 4, rows(40, 160)),
    "16-bit colour or alpha ": png(40, 40, 16, 2, rows(40, 240)),
    "16-bit colour or alpha  ": png(40, 40, 16, 6, rows(40, 320)),
    "16-bit gray with a transparent value": png(40, 40, 16, 0, rows(40, 80), chunk(b"tRNS", b"\0\1")),
    "1 bits a channel": png(40, 40, 1, 0, rows(40, 5)),
    "4 bits a channel": png(40, 40, 4, 0, rows(40, 20)),
    "an animated PNG": animated("PNG"),
    "a multi-picture JPEG": animated("MPO"),
    "EXIF orientation 6": with_orientation(6, "PNG"),
    "EXIF orientation 3": with_orientation(3, "JPEG"),
    "40 x 31 px": encoded(GRAY[:31]),
    "1 x 48 px": encoded(GRAY[:, :1], "JPEG"),
    "0 x 48 px": png(0, 48, 8, 0, b""),
    "no IEND": encoded(GRAY)[:-12],
    "truncated in b'IDAT'": encoded(GRAY)[:-20],
    "820 bytes of pixel rows; needed 1,968": png(40, 48, 8, 0, rows(20, 40)),  # whole chunks, rows 20..47 missing
    "damaged data ": png(40, 48, 8, 0, rows(48, 40)[:-1]),
    "colour type 5": png(40, 48, 8, 5, rows(48, 40)),
    "damaged data": encoded(GRAY, "JPEG")[:-1],
    "PNG starting with": b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
}


@pytest.mark.parametrize("found", REFUSED, ids=str.strip)
def test_refused(tmp_path: Path, found: str) -> None:
    path = written(tmp_path, REFUSED[found])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: found ")
    assert found.strip() in message
    assert "; needed " in message
    assert ". Next: " in message
    assert "\n" not in message


def test_cmyk_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(GRAY).convert("CMYK").save(path)
    with pytest.raises(ImageError, match="found Pillow mode CMYK; needed gray"):
        read_image(path)


def missing(folder: Path) -> Path:
    return folder / "absent.png"


def directory(folder: Path) -> Path:
    return folder


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


def device(folder: Path) -> Path:
    return Path("/dev/zero")


def sparse(folder: Path) -> Path:
    with (folder / "big.png").open("wb") as file:
        file.truncate(MAX_FILE_MIB * 2**20 + 1)
    return folder / "big.png"


def null_byte(folder: Path) -> Path:
    return folder / "a\0b.png"


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (missing, "no such file"),
        (directory, "a directory"),
        (pipe, "a pipe or device"),
        (device, "a pipe or device"),
        (sparse, "167,772,161 bytes"),
        (null_byte, "can't be read"),
    ],
)
def test_not_a_regular_file(tmp_path: Path, make: Callable[[Path], Path], found: str) -> None:
    with pytest.raises(ImageError, match=f"found {found}" if make is not null_byte else found):
        read_image(make(tmp_path))


@pytest.mark.parametrize("sides", [(6001, 6000), (65535, 65535), (20000, 20000), (2**31 - 1, 32)])
def test_a_bomb_is_refused_on_its_header(tmp_path: Path, sides: tuple[int, int]) -> None:
    path = written(tmp_path, png(*sides, 8, 0, bytes(100)))
    with pytest.raises(ImageError, match=f"needed at most {MAX_PIXELS:,} pixels"):  # Pillow's warning would be an error
        read_image(path)


def test_a_jpeg_bomb_is_refused_on_its_header(tmp_path: Path) -> None:
    content = encoded(GRAY, "JPEG")
    start = content.index(b"\xff\xc0") + 5  # SOF0: length, precision, then height and width
    bomb = content[:start] + struct.pack(">HH", 65535, 65535) + content[start + 4 :]
    with pytest.raises(ImageError, match="found 65535 x 65535 px"):
        read_image(written(tmp_path, bomb))


def test_largest_picture_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, png(6000, 6000, 8, 0, bytes(6001 * 6000)))
    assert read_image(path).shape == (6000, 6000)


KEEP_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
WHOLE_PNG = encoded(GRAY)
WHOLE_JPEG = encoded(GRAY, "JPEG")


@KEEP_FOLDER
@given(place=st.integers(0, len(WHOLE_PNG) - 1), mask=st.integers(1, 255))
def test_any_changed_byte_of_a_png_is_refused(tmp_path: Path, place: int, mask: int) -> None:
    changed = bytearray(WHOLE_PNG)
    changed[place] ^= mask
    with pytest.raises(ImageError):
        read_image(written(tmp_path, bytes(changed)))


@KEEP_FOLDER
@given(whole=st.sampled_from([WHOLE_PNG, WHOLE_JPEG]), data=st.data())
def test_any_truncation_is_refused(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    with pytest.raises(ImageError):
        read_image(written(tmp_path, whole[: data.draw(st.integers(0, len(whole) - 1))]))


@KEEP_FOLDER
@given(places=st.lists(st.tuples(st.integers(0, len(WHOLE_JPEG) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_jpeg_is_read_or_refused_but_never_crashes(tmp_path: Path, places: list[tuple[int, int]]) -> None:
    changed = bytearray(WHOLE_JPEG)
    for place, value in places:
        changed[place] = value
    try:
        gray = read_image(written(tmp_path, bytes(changed)))
    except ImageError:
        return
    assert gray.dtype == np.uint8
    assert gray.ndim == 2


@KEEP_FOLDER
@given(low=st.integers(0, 65534), data=st.data())
def test_16_bit_rule_in_plain_arithmetic(tmp_path: Path, low: int, data: st.DataObject) -> None:
    high = data.draw(st.integers(low + 1, 65535))
    middle = data.draw(st.integers(low, high))
    values = plain(low)
    values[0, :2] = [middle, high]
    gray = read_image(written(tmp_path, encoded(values)))
    exact = (middle - low) * 255 / (high - low)
    assert abs(int(gray[0, 0]) - exact) <= 0.5
    assert (int(gray[0, 1]), int(gray[1, 1])) == (255, 0)


def test_a_last_row_that_is_black_is_no_fault(tmp_path: Path) -> None:
    black = GRAY.copy()
    black[20:] = 0
    np.testing.assert_array_equal(read_image(written(tmp_path, encoded(black))), black)


def adam7(pixels: NDArray[np.uint8]) -> bytes:
    """The rows of an interlaced PNG; pass by pass, PNG specification section 8.2."""
    passes = [pixels[0::8, 0::8], pixels[0::8, 4::8], pixels[4::8, 0::4], pixels[0::4, 2::4]]
    passes += [pixels[2::4, 0::2], pixels[0::2, 1::2], pixels[1::2, :]]
    return b"".join(b"\0" + row.tobytes() for part in passes for row in part)


def interlaced_png(pixels: NDArray[np.uint8], missing: int) -> bytes:
    raw = adam7(pixels)
    content = bytearray(png(pixels.shape[1], pixels.shape[0], 8, 0, raw[: len(raw) - missing]))
    content[28] = 1  # interlace method, the last byte of IHDR
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize("height", [47, 48])
def test_interlaced_png(tmp_path: Path, height: int) -> None:
    # 33 columns: no pass is as wide as the next one halved.
    pixels = np.ascontiguousarray(GRAY[:height, :33])
    np.testing.assert_array_equal(read_image(written(tmp_path, interlaced_png(pixels, 0))), pixels)
    with pytest.raises(ImageError, match="bytes of pixel rows"):
        read_image(written(tmp_path, interlaced_png(pixels, 34)))  # without the last row of the last pass


def test_pillows_global_for_damaged_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="remove that setting"):
        read_image(written(tmp_path, WHOLE_JPEG[:-100]))


@pytest.mark.dataset
def test_real_rgba_files_are_read_as_gray(real_root: Path) -> None:
    rgba = [path for path in sorted((real_root / "images").iterdir()) if path.read_bytes()[25] == 6]  # IHDR colour type
    assert rgba, "NIH ships a few RGBA files; the copy here has three"
    for path in rgba:
        np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path))[..., 0])


@pytest.mark.dataset
def test_real_images_equal_pillow(real_root: Path) -> None:
    for path in sorted((real_root / "images").iterdir())[:40]:
        np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path).convert("L")))
