"""Which image an answer is about: a header and pixels, whatever their encoding.

The same image in another transfer syntax, or with other padding, is the same image; one other value in its header or one
other pixel makes it another, under the same SOP Instance UID too: a corrected view, patient or accession number.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag

_PIXEL_GROUP: Final = 0x7FE0
_OF_TRANSPORT: Final = frozenset(
    {
        0x00080054,  # Retrieve AE Title
        0x00080056,  # Instance Availability
        0x00082111,  # Derivation Description, which DCMTK writes when it compresses without loss
        0x00089215,  # Derivation Code Sequence
        0x00282110,  # Lossy Image Compression, its ratio and its method: the pixels tell
        0x00282112,
        0x00282114,
        0xFFFCFFFC,  # Data Set Trailing Padding (PS3.10 section 7.2)
    }
)


class ImageIdentity(NamedTuple):
    """One image.

    Attributes:
        header: SHA-256 of what its header says, see `header_sha256`; empty where that is not known.
        pixels: SHA-256 of its stored values; likewise.
    """

    header: str = ""
    pixels: str = ""


def header_sha256(header: Dataset) -> str:
    """Return a hash of every value that the standard defines, as 64 hexadecimal digits.

    Left out is what changes on the way and means nothing: group lengths and padding, how the pixel data are encoded and
    compressed, where the image can be retrieved, and private elements (PS3.5 section 7.8), which an archive adds for itself.

    Args:
        header: as pydicom read it, from a file whose elements were checked; never changed but for sequences, which it
            converts.
    """
    digest = hashlib.sha256()
    for piece in _pieces(header):
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()


def _pieces(header: Dataset) -> Iterator[bytes]:
    for tag in sorted(header.keys()):
        if tag.group % 2 or tag.element == 0 or tag.group == _PIXEL_GROUP or tag in _OF_TRANSPORT:
            continue
        yield int(tag).to_bytes(4, "little")
        element = header.get_item(tag)
        if isinstance(element, RawDataElement) and _is_sequence(tag, element.VR):
            # Where it is none after all, its bytes are compared, which stay as they are.
            with contextlib.suppress(Exception):
                element = header[tag]
        value = None if element is None else element.value
        if isinstance(value, Sequence):
            for item in value:
                yield b"item"
                yield from _pieces(item)
            yield b"end"
        elif isinstance(element, RawDataElement):
            yield (value or b"").rstrip(b" \0")
        else:  # the character set, which pydicom converts while it reads
            yield str(value or "").encode("utf-8", "surrogateescape").rstrip(b" \0")


def _is_sequence(tag: BaseTag, vr: str | None) -> bool:
    # Only these are converted: the values of others are a patient's, and the library's warnings repeat them.
    return vr in (None, "UN", "SQ") and dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ"
