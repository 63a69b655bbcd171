"""Compare the pixel data with the header before a codec sees it: lengths, and the codestream's own header.

A codec trusts the codestream: one that says 65535 x 65535 gets its memory, whatever Rows and Columns say.
"""

import contextlib
import struct
from typing import Final, NamedTuple

import numpy as np

from chexnet_deploy.errors import ImageRefusedError, RefusalReason
from chexnet_deploy.images.dicom.elements import Element, Values
from chexnet_deploy.images.dicom.grayscale import Grayscale

JPEG_BASELINE: Final = "1.2.840.10008.1.2.4.50"
JPEG_EXTENDED: Final = "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS: Final = frozenset({"1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"})
JPEG_LS: Final = frozenset({"1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"})
JPEG_2000: Final = frozenset({"1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"})
RLE: Final = "1.2.840.10008.1.2.5"

# Start-of-frame markers of each process (ITU-T T.81 table B.1; ITU-T T.87 section C.1.1); what is baseline is extended too.
_FRAME_MARKERS: Final = (
    {JPEG_BASELINE: (0xC0,), JPEG_EXTENDED: (0xC0, 0xC1)}
    | dict.fromkeys(JPEG_LOSSLESS, (0xC3,))
    | dict.fromkeys(JPEG_LS, (0xF7,))
)
_KINDS: Final = {
    0xC0: "8-bit JPEG",
    0xC1: "extended JPEG",
    0xC2: "progressive JPEG",
    0xC3: "lossless JPEG",
    0xF7: "JPEG-LS",
}
_WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD9)})  # TEM, RSTn, SOI
_END_OF_IMAGE: Final = b"\xff\xd9"  # JPEG and JPEG-LS: EOI; JPEG 2000: EOC, the same bytes
_RLE_HEADER_BYTES: Final = 64
_RLE_MOST_PIXELS_A_BYTE: Final = 64  # a run of 128 equal bytes takes two (PS3.5 annex G.3.1)


class _Frame(NamedTuple):
    columns: int
    rows: int
    components: int
    bits: int
    is_signed: bool
    n_smaller: int = 0


def check_pixel_data(
    values: Values, transfer_syntax_uid: str, pixel_data: Element, rows: int, columns: int, grayscale: Grayscale
) -> int:
    """Refuse pixel data that can't hold the picture that the header describes; return how many smaller ones of it they hold.

    Args:
        values: the header's, for messages.
        transfer_syntax_uid: an accepted one.
        pixel_data: as in the file.
        rows: H.
        columns: W.
        grayscale: for the bits of a pixel.

    Raises:
        ImageRefusedError: TRUNCATED, MULTI_FRAME, COLOUR, BIT_DEPTH or CONTRADICTION.
    """
    pixel_bytes = grayscale.bits_allocated // 8
    if transfer_syntax_uid in _FRAME_MARKERS or transfer_syntax_uid in JPEG_2000 or transfer_syntax_uid == RLE:
        if not pixel_data.fragments:
            found = f"pixel data without fragments, where the header names transfer syntax {transfer_syntax_uid}"
            raise _contradiction(values, found, "fragments, or the header's naming an uncompressed one")
        if grayscale.high_bit != grayscale.bits_stored - 1:
            raise _contradiction(values, "compressed pixels with a shifted High Bit", "High Bit = Bits Stored - 1")
        if transfer_syntax_uid == RLE:
            _check_rle(values, pixel_data.fragments, rows * columns, pixel_bytes)
            return 0
        return _check_codestream(values, transfer_syntax_uid, pixel_data.fragments, rows, columns, grayscale)
    if pixel_data.fragments is not None:
        kind = _kind_of(b"".join(pixel_data.fragments))
        packed = f"{kind} in fragments, where the header names an uncompressed transfer syntax"
        raise _contradiction(values, packed, "plain pixel data, or the header's naming a compressed one")
    needed = rows * columns * pixel_bytes
    n_bytes = len(pixel_data.value)
    if n_bytes < needed:
        raise values.refuse(RefusalReason.TRUNCATED, f"{n_bytes:,} bytes of pixels", f"{needed:,}", "send it again")
    if not _is_padded(pixel_data.value, rows, columns, pixel_bytes):
        raise _contradiction(values, f"{n_bytes:,} bytes of pixels", f"{needed:,}, or padding behind them")
    return 0


def _contradiction(values: Values, found: str, needed: str) -> ImageRefusedError:
    return values.refuse(RefusalReason.CONTRADICTION, found, needed, "send or export it again")


def _is_padded(pixel_data: memoryview, rows: int, columns: int, pixel_bytes: int) -> bool:
    """Return whether what follows the picture is padding (PS3.5 section 8.1.1), and no sign of other Rows or Columns.

    Values of a picture would be left over in whole rows, or in whole columns where the rows are longer than the header says.
    """
    needed = rows * columns * pixel_bytes
    behind = bytes(pixel_data[needed:])
    n_left, part = divmod(len(behind), pixel_bytes)
    if len(behind) <= 1 or part or (n_left % rows and n_left % columns):
        return True
    if behind.strip(behind[:1]):
        return False
    if n_left % rows:
        return True
    # A black border looks like padding. With the right width a row resembles the next one best.
    wide = columns + n_left // rows
    pixels = np.frombuffer(pixel_data, f"<u{pixel_bytes}", rows * columns + n_left).astype(np.int32)
    as_stated, as_wide = (float(np.abs(pixels[width:] - pixels[:-width]).mean()) for width in (columns, wide))
    return as_stated <= as_wide


def _kind_of(stream: bytes) -> str:
    """Return what compressed pixels are, in words."""
    if stream.startswith(b"\xff\x4f\xff\x51"):
        return "JPEG 2000"
    if stream.startswith(b"\xff\xd8"):
        return next((name for code, name in _KINDS.items() if _frame_of(stream, (code,))), "another JPEG")
    return "RLE or an unknown codestream"


def _check_rle(values: Values, fragments: tuple[memoryview, ...], n_pixels: int, pixel_bytes: int) -> None:
    """Check the segment offsets (PS3.5 annex G.5), one segment for each byte of a pixel, and their least lengths."""
    if len(fragments) != 1:
        raise values.refuse(RefusalReason.MULTI_FRAME, f"{len(fragments)} RLE fragments", "one", "send one frame")
    stream = fragments[0]
    if len(stream) < _RLE_HEADER_BYTES:
        raise values.refuse(RefusalReason.TRUNCATED, f"{len(stream)} bytes of RLE", "its header of 64", "send it again")
    n_segments, *offsets = struct.unpack_from("<16I", stream)
    if n_segments != pixel_bytes:
        raise _contradiction(values, f"{n_segments} RLE segments", f"{pixel_bytes}, one for each byte of a pixel")
    ends = [*offsets[1:n_segments], len(stream)]
    for start, end in zip(offsets[:n_segments], ends, strict=True):
        if not _RLE_HEADER_BYTES <= start <= end <= len(stream):
            raise values.refuse(RefusalReason.TRUNCATED, "RLE segments beyond the data", "all of it", "send it again")
        if (end - start) * _RLE_MOST_PIXELS_A_BYTE < n_pixels:
            found, needed = f"an RLE segment of {end - start:,} bytes", f"enough for {n_pixels:,} pixels"
            raise values.refuse(RefusalReason.TRUNCATED, found, needed, "send it again")


def _check_codestream(
    values: Values,
    transfer_syntax_uid: str,
    fragments: tuple[memoryview, ...],
    rows: int,
    columns: int,
    grayscale: Grayscale,
) -> int:
    stream = bytes(fragments[0]) if len(fragments) == 1 else b"".join(fragments)
    frame = _frame_of(stream, _FRAME_MARKERS.get(transfer_syntax_uid))
    if frame is None:
        found = f"no codestream of the kind the transfer syntax names, but {_kind_of(stream)}"
        raise _contradiction(values, found, f"one of {transfer_syntax_uid}")
    # A fragment is padded to an even length: with one byte, which need not be 0, or by some writers with many zeros.
    if not (stream.rstrip(b"\0").endswith(_END_OF_IMAGE) or stream[-3:-1] == _END_OF_IMAGE):
        raise values.refuse(RefusalReason.TRUNCATED, "a codestream without its end mark", "all of it", "send it again")
    if frame.components != 1:
        raise values.refuse(RefusalReason.COLOUR, f"{frame.components} components", "1", "send the radiograph itself")
    if (frame.columns, frame.rows) != (columns, rows):
        found, needed = f"a codestream of {frame.columns} x {frame.rows} px", f"{columns} x {rows} as the header says"
        raise _contradiction(values, found, needed)
    if not grayscale.bits_stored <= frame.bits <= grayscale.bits_allocated:
        needed = f"{grayscale.bits_stored} to {grayscale.bits_allocated} as the header says"
        raise _contradiction(values, f"a codestream of {frame.bits} bits a pixel", needed)
    if transfer_syntax_uid in JPEG_2000 and frame.is_signed != grayscale.is_signed:
        raise _contradiction(values, "signed values in one of header and codestream", "both or none")
    return frame.n_smaller


def _frame_of(stream: bytes, markers: tuple[int, ...] | None) -> _Frame | None:
    """Return what the codestream's header says, where it is a JPEG with one of these markers; None: JPEG 2000."""
    try:
        return _read_jpeg_2000(stream) if markers is None else _read_jpeg(stream, markers)
    except (struct.error, IndexError):
        return None


def _read_jpeg(stream: bytes, markers: tuple[int, ...]) -> _Frame | None:
    """Return what the first frame header says (ITU-T T.81 section B.2.2), where it is of the process asked for."""
    if stream[:2] != b"\xff\xd8":
        return None
    at = 2
    while stream[at] == 0xFF:
        kind = stream[at + 1]
        if kind == 0xFF:  # fill byte
            at += 1
        elif kind in _WITHOUT_LENGTH:
            at += 2
        elif kind in markers:
            bits, rows, columns, components = struct.unpack_from(">BHHB", stream, at + 4)
            return _Frame(columns, rows, components, bits, is_signed=False)
        elif kind in (0xDA, 0xD9):  # the scan, before any frame header
            return None
        else:
            at += 2 + struct.unpack_from(">H", stream, at + 2)[0]
    return None


def _read_jpeg_2000(stream: bytes) -> _Frame | None:
    """Return what the SIZ marker says (ISO/IEC 15444-1 section A.5.1); DICOM holds the bare codestream, no JP2 file."""
    if stream[:4] != b"\xff\x4f\xff\x51":
        return None
    right, bottom, left, top = struct.unpack_from(">4I", stream, 8)
    components, precision, step_x, step_y = struct.unpack_from(">H3B", stream, 40)
    if (step_x, step_y) != (1, 1):
        return None
    return _Frame(
        right - left,
        bottom - top,
        components,
        (precision & 0x7F) + 1,
        is_signed=precision >= 0x80,
        # From elsewhere than the origin a smaller picture's pixels lie elsewhere on the whole one.
        n_smaller=0 if left or top else _count_levels(stream),
    )


def _count_levels(stream: bytes) -> int:
    """Return the least number of decompositions that the main header names (COD and COC; ISO/IEC 15444-1 section A.6.1)."""
    counts, at = [], 4 + struct.unpack_from(">H", stream, 4)[0]
    with contextlib.suppress(struct.error, IndexError):  # cut short: others say so
        while stream[at] == 0xFF and stream[at + 1] != 0x90:  # SOT: the first tile
            if stream[at + 1] in (0x52, 0x53):
                counts.append(stream[at + (9 if stream[at + 1] == 0x52 else 6)])
            at += 2 + struct.unpack_from(">H", stream, at + 2)[0]
    return min(counts, default=0)
