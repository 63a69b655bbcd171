"""Read a PNG, JPEG or DICOM file as one gray picture, uint8 [H, W], 0 = black, bone bright.

Never guesses: what would need a guess (true colour, translucent pixels, a rotation tag, several frames, a damaged file)
is refused with an ImageError. Never looks at what the picture shows, never resizes (preprocessing.py does), and can't
tell a negative from a positive: a PNG doesn't say whether bone is bright. DICOM does.
"""

import contextlib
import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from PIL import Image, ImageFile
from PIL.ExifTags import Base as ExifTag
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from chexnet_deploy.errors import ImageError, ImageRefusedError, RefusalReason, require
from chexnet_deploy.images.gray import MAX_FILE_MIB, MAX_PIXELS, MIN_SIDE_PX, Gray, read_image_file, refusal

if TYPE_CHECKING:
    from chexnet_deploy.images.dicom.decoder import Decoder
    from chexnet_deploy.images.preprocessing import Resizing
    from chexnet_deploy.images.scope import ScopePolicy


_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE: Final = b"\xff\xd8\xff"
_PNG_GRAY: Final = 0
_PNG_CHANNELS: Final = MappingProxyType(
    {_PNG_GRAY: 1, 2: 3, 3: 1, 4: 2, 6: 4}
)  # by colour type (PNG specification, table 11.1)
_ADAM7: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


_NEEDED_ANCILLARY: Final = (b"tRNS", b"eXIf")
_ANCILLARY_BIT: Final = 0x20  # of the first letter of a chunk's type: a decoder may pass such a chunk over
_ORIENTATION_TEXTS: Final = MappingProxyType(
    {b"XML:com.adobe.xmp": "xmp", b"Raw profile type exif": "Raw profile type exif"}
)
"""Texts of a PNG that may turn it, by keyword, with what Pillow calls them."""


class _Png(NamedTuple):
    width_px: int
    height_px: int
    bits: int  # per channel
    colour_type: int
    interlaced: int
    packed: list[memoryview]  # the IDAT chunks, one zlib stream
    needed: bytes  # the file without the chunks that the picture doesn't depend on
    texts: dict[str, bytes]  # those of _ORIENTATION_TEXTS


class ImageReader:
    """Reads image files one after another, or from several threads at once.

    Keeps the decoder that DICOM files need, which is opened by the first of them. Use it as a context manager, or call
    `close`.

    Args:
        processes: how many compressed DICOM files may be decoded at once.
    """

    def __init__(self, *, processes: int = 1) -> None:
        self._processes = processes
        self._opened: dict[str, Decoder] = {}

    def read(self, path: Path | str, *, scope: "ScopePolicy | None" = None, resizing: "Resizing | None" = None) -> Gray:
        """Return the gray picture in a PNG, JPEG or DICOM file.

        Of PNG and JPEG, 8-bit values are returned as stored: gamma, ICC profiles and palettes' order change nothing.
        16-bit gray is scaled from its own darkest..brightest value to 0..255, rounded half up, because detectors fill 10 to
        14 of the 16 bits and Pillow's `convert` would saturate them. RGB counts as gray where the three channels are equal
        everywhere, an alpha channel where it is opaque everywhere (NIH ships a few such RGBA files). DICOM goes through its
        own grayscale pipeline, see dicom/grayscale.py.

        Args:
            path: a regular file; its contents, not its name, decide how it is read.
            scope: where given, a DICOM file that says it is out of it is refused. PNG and JPEG don't say.
            resizing: what it is read for; a JPEG 2000 picture may be a smaller one then, see Reduction.

        Returns:
            [H, W] uint8, writable and C-contiguous.

        Raises:
            ImageError: the file is absent, damaged, too large or small, out of scope, or can't be read without guessing;
                its `reason` says which.
            MissingPackageError: it is a DICOM file, and pydicom is not installed.
        """
        return self.decode(read_image_file(Path(path)), scope=scope, name=path, resizing=resizing)

    def decode(
        self,
        content: bytes,
        *,
        scope: "ScopePolicy | None" = None,
        name: object = "the image",
        resizing: "Resizing | None" = None,
    ) -> Gray:
        """Return the gray picture in the bytes of a PNG, JPEG or DICOM file, as `read` does.

        Args:
            content: the whole file, 1 byte to MAX_FILE_MIB.
            scope: see read.
            name: what messages call it.
            resizing: see read.

        Raises:
            ImageError, MissingPackageError: see read.
        """
        if content.startswith(_PNG_SIGNATURE):
            return _read_png(name, content)
        if content.startswith(_JPEG_SIGNATURE):
            return _gray(name, _decode(name, content, JpegImageFile))
        if content[128:132] == b"DICM":
            return self.decoder.decode(content, scope=scope, name=name, resizing=resizing).gray
        if content.startswith(b"DICM") or any(map(_begins_data_set, (content, content[128:]))):
            found, needed = "a DICOM data set without preamble or its DICM mark", "a DICOM file (PS3.10)"
            next_step = "write it as a DICOM file (with preamble and meta header)"
            raise ImageRefusedError(RefusalReason.NOT_DICOM, refusal(name, found, needed, next_step))
        raise ImageError(_unknown_format(name, content))

    def close(self) -> None:
        """End the decoder, if there is one."""
        for decoder in self._opened.values():
            decoder.close()

    def __enter__(self) -> "ImageReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def decoder(self) -> "Decoder":
        """The DICOM decoder, opened on first use.

        Raises:
            MissingPackageError: pydicom is not installed.
        """
        if "decoder" not in self._opened:
            with require("dicom", so="DICOM can't be read"):
                from chexnet_deploy.images.dicom.decoder import Decoder
            # In one call, so that of several threads all get the first one's; a lock might be held in a fork for ever.
            self._opened.setdefault("decoder", Decoder(processes=self._processes))
        return self._opened["decoder"]


def read_image(path: Path | str) -> Gray:
    """Return the gray picture in one PNG, JPEG or DICOM file; see ImageReader.read, and use that for many DICOM files.

    Raises:
        ImageError, MissingPackageError: see ImageReader.read.
    """
    with ImageReader() as reader:
        return reader.read(path)


def _read_png(name: object, content: bytes) -> Gray:
    png = _check_png(name, content)
    image = _decode(name, png.needed, PngImageFile, png.texts)
    _check_all_rows(name, png, image)
    if png.bits != 16:
        return _gray(name, image)
    if png.colour_type != _PNG_GRAY:
        # Pillow keeps only the high byte of these, which is nearly all of a 12-bit radiograph lost.
        raise ImageError(refusal(name, "16-bit colour or alpha", "16-bit gray", "save it as plain 16-bit gray"))
    return _scale_16_bit(name, image)


def _begins_data_set(content: bytes) -> bool:
    """Return whether the bytes begin as DICOM's elements do, of group 2 or 8, in whatever transfer syntax."""
    if len(content) < 8:
        return False
    is_little = content[0] in (2, 8) and content[1] == content[3] == 0
    is_big = content[0] == 0 and content[1] in (2, 8) and content[2] == 0
    has_vr = content[4:6].isalpha() and content[4:6].isupper()
    return (has_vr and (is_little or is_big)) or (
        is_little and int.from_bytes(content[4:8], "little") <= len(content) - 8
    )


def _unknown_format(name: object, content: bytes) -> str:
    """Return the refusal of an unknown format, with the file's first bytes."""
    return refusal(
        name,
        f"neither a PNG nor a JPEG nor a DICOM file (it begins with {content[:8]!r})",
        "PNG, JPEG or DICOM contents, whatever the file is called",
        "export the radiograph as PNG",
    )


def _check_png(name: object, content: bytes) -> _Png:
    """Check every chunk of a PNG up to IEND, and return what its header says and what the picture needs.

    Pillow decodes a PNG whose pixel data fails its checksum or whose end is missing; a radiograph must be whole. Pillow's
    `verify` in this place was tried on hostile_images.py's PNG files: no faster, it takes a file whose end is cut off or damaged
    inside IEND, and can't pass over metadata, for 1 MB of which Pillow refuses a whole file.
    """
    view, offset, kind = memoryview(content), len(_PNG_SIGNATURE), b""
    header: tuple[int, int, int, int, int] | None = None
    packed, needed, texts = [], [view[:offset]], dict[str, bytes]()
    while kind != b"IEND":
        if offset + 12 > len(content):
            raise ImageError(refusal(name, "a truncated PNG (no IEND chunk)", "the whole file", "copy it again"))
        length, kind = struct.unpack_from(">I4s", content, offset)
        start, end = offset + 8, offset + 12 + length
        if end > len(content):
            raise ImageError(refusal(name, f"a PNG truncated in {kind!r}", "the whole file", "copy it again"))
        if zlib.crc32(view[offset + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ImageError(refusal(name, f"a bad checksum in PNG chunk {kind!r}", "a whole file", "copy it again"))
        if header is None:
            if kind != b"IHDR" or length != 13:
                raise ImageError(refusal(name, f"a PNG starting with {kind!r}", "IHDR first", "export it again"))
            header = struct.unpack_from(">IIBBxxB", content, start)
            _check_sides(name, *header[:2])
        elif kind == b"IDAT":
            packed.append(view[start : end - 4])
        elif kind == b"acTL":
            raise ImageError(refusal(name, "an animated PNG", "one frame", "save the frame to be read on its own"))
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = bytes(view[start : min(start + 80, end - 4)]).partition(b"\0")[0]
            if keyword in _ORIENTATION_TEXTS:
                texts[_ORIENTATION_TEXTS[keyword]] = content[start - 4 : end - 4]
        if not kind[0] & _ANCILLARY_BIT or kind in _NEEDED_ANCILLARY:
            needed.append(view[offset:end])
        offset = end
    assert header is not None  # IEND can't come first
    png = _Png(*header, packed, b"".join(needed), {key: _unpack_text(chunk) for key, chunk in texts.items()})
    if png.bits not in (8, 16) or png.colour_type not in _PNG_CHANNELS:
        found = f"{png.bits} bits a channel, colour type {png.colour_type}"
        raise ImageError(refusal(name, found, "8 or 16-bit gray", "export it again without reducing grays"))
    return png


def _unpack_text(chunk: bytes) -> bytes:
    """Return the text of a PNG's text chunk that begins with its type; what can't be unpacked says nothing."""
    kind, (_, _, rest) = chunk[:4], chunk[4:].partition(b"\0")
    if kind == b"tEXt":
        return rest
    is_packed = kind == b"zTXt" or rest[:1] == b"\1"
    text = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]  # iTXt: flag, method, language, translation
    try:
        return zlib.decompressobj().decompress(text, MAX_FILE_MIB * 2**20) if is_packed else text
    except zlib.error:
        return b""


def _check_all_rows(name: object, png: _Png, image: Image.Image) -> None:
    """Refuse a PNG whose compressed data ends early: Pillow leaves the rows that are missing black and says nothing.

    Unpacking twice costs a third of reading, so it is done only where the last row is black, as a missing one would be.
    """
    last_row = image.crop((0, png.height_px - 1, png.width_px, png.height_px))
    if not png.interlaced and np.asarray(last_row).any():
        return
    needed = 0
    for x, y, step_x, step_y in _ADAM7 if png.interlaced else ((0, 0, 1, 1),):
        columns, rows = -((x - png.width_px) // step_x), -((y - png.height_px) // step_y)
        row_bytes = columns * _PNG_CHANNELS[png.colour_type] * png.bits // 8
        needed += rows * (1 + row_bytes)  # a filter byte leads each row
    try:
        found = len(zlib.decompressobj().decompress(b"".join(png.packed), needed))
    except zlib.error as err:
        raise ImageError(refusal(name, f"damaged data ({err})", "a whole PNG", "copy it again")) from err
    if found < needed:
        raise ImageError(refusal(name, f"{found:,} bytes of pixel rows", f"{needed:,}", "export it again"))


def _check_sides(name: object, width_px: int, height_px: int) -> None:
    found = f"{width_px} x {height_px} px"
    if min(width_px, height_px) < MIN_SIDE_PX:
        raise ImageError(refusal(name, found, f"sides of at least {MIN_SIDE_PX} px", "check that it is a radiograph"))
    if width_px * height_px > MAX_PIXELS:
        raise ImageError(refusal(name, found, f"at most {MAX_PIXELS:,} pixels", "export it at a lower resolution"))


def _decode(
    name: object,
    content: bytes,
    decoder: type[PngImageFile] | type[JpegImageFile],
    texts: Mapping[str, bytes] = MappingProxyType({}),
) -> Image.Image:
    """Return the decoded picture, of admissible size, one frame and upright.

    Args:
        name: what messages call it.
        content: of the file.
        decoder: of its format.
        texts: of the file, where the content is without them.

    The decoders are called by class and not through `Image.open`, whose bomb warning depends on a global that any other
    library may change; the size is checked here instead, between header and pixels.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:  # training scripts set it, and half a JPEG then reads as a whole one
        raise ImageError(
            refusal(name, "PIL.ImageFile.LOAD_TRUNCATED_IMAGES set", "Pillow's default", "remove that setting")
        )
    try:
        image = decoder(io.BytesIO(content))
        _check_sides(name, *image.size)
        if "mp" in image.info:  # Multi-Picture Format (CIPA DC-007): a JPEG followed by others
            raise ImageError(refusal(name, "a multi-picture JPEG", "one frame", "save the picture wanted on its own"))
        image.load()
    except ImageError:
        raise
    except Exception as err:  # a decoder fed with damaged bytes raises whatever it likes
        raise ImageError(refusal(name, f"damaged data ({err})", "a whole PNG or JPEG", "copy it again")) from err
    orientation = _orientation({**image.info, **texts})
    if orientation != 1:
        # Programs that rotate the pixels often leave the tag behind, so applying it is a guess too.
        raise ImageError(
            refusal(name, f"EXIF orientation {orientation}", "an upright picture", "save it upright without the tag")
        )
    return image


def _orientation(info: Mapping[Any, Any]) -> int:
    """Return what EXIF says, or else XMP; what can't be read, or is none of 1 to 8 (EXIF 2.3, tag 274), says nothing."""
    for key in ("exif", "Raw profile type exif", "xmp"):
        said = Image.Image()
        if key in info:
            said.info = {key: info[key].decode("latin-1") if key.startswith("Raw") else info[key]}
        with contextlib.suppress(Exception):  # junk makes Pillow raise whatever it likes
            orientation = said.getexif().get(ExifTag.Orientation)
            if orientation is not None and orientation in range(1, 9):
                return int(orientation)
    return 1


def _scale_16_bit(name: object, image: Image.Image) -> Gray:
    """Map darkest..brightest to 0..255, rounded half up, in integers."""
    if "transparency" in image.info:
        raise ImageError(refusal(name, "16-bit gray with a transparent value", "opaque gray", "save it without alpha"))
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low == high:
        raise ImageRefusedError(
            RefusalReason.BLANK, refusal(name, f"16-bit pixels all equal to {low}", "a picture", "export it again")
        )
    table = np.zeros(65536, np.uint8)
    span = high - low
    table[low : high + 1] = (np.arange(span + 1, dtype=np.int64) * 510 + span) // (2 * span)
    gray: Gray = table[values]
    return gray


def _gray(name: object, image: Image.Image) -> Gray:
    """Return an 8-bit picture's gray values, where it has only one value a pixel."""
    if "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    pixels = np.array(image)
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise ImageError(refusal(name, f"Pillow mode {image.mode}", "gray", "save it as 8 or 16-bit gray"))
    if image.mode in ("LA", "RGBA"):
        if int(pixels[..., -1].min()) < 255:
            raise ImageError(refusal(name, "pixels that are not opaque", "alpha 255", "save it without alpha"))
        pixels = pixels[..., :-1]
    if image.mode in ("RGB", "RGBA") and not (
        np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2])
    ):
        raise ImageError(
            refusal(name, "true colour", "equal red, green and blue", "export the radiograph itself as gray")
        )
    gray: Gray = pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., 0])
    return gray
