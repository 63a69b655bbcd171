"""Read a header's text values as their bytes say, without pydicom's conversion.

pydicom checks and converts a value when it is first asked for, and its warnings repeat the value: a patient's, here. So the
bytes are taken as they lie in the file and decoded by the declared character set, strictly: where they are no text in it,
the result holds U+FFFD and representations.py gives it up. Nothing here warns, logs or changes the header.
"""

import re
from types import MappingProxyType
from typing import Final

from pydicom.charset import python_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.valuerep import PersonName

from chexnet_deploy.dicom.results.representations import UNREADABLE

_MISSPELT: Final = re.compile(r"ISO[ _-]?(?:2022)?[ _-]?IR[ _-]?(\d{1,3})", re.ASCII | re.IGNORECASE)
_ONE_BYTE: Final = ("100", "101", "109", "110", "126", "127", "138", "144", "148", "166")  # PS3.3 table C.12-2

_DELIMITED: Final = re.compile(rb"([^\\^=\r\n]*)([\\^=\r\n]?)(.*)", re.DOTALL)

# Escape sequences that designate a character set and the codec that reads what follows (PS3.3 tables C.12-3
# and C.12-4); none is the beginning of another.
_DESIGNATED: Final = MappingProxyType(
    {
        b"(B": "ascii",
        b"-A": "latin_1",
        b"-B": "iso8859_2",
        b"-C": "iso8859_3",
        b"-D": "iso8859_4",
        b"-L": "iso8859_5",
        b"-G": "iso8859_6",
        b"-F": "iso8859_7",
        b"-H": "iso8859_8",
        b"-M": "iso8859_9",
        b"-T": "tis_620",
        b")I": "shift_jis",
        b"(J": "shift_jis",
        b"$B": "iso2022_jp",
        b"$(D": "iso2022_jp_2",
        b"$)C": "euc_kr",
        b"$)A": "gb2312",
    }
)


class TextReader:
    """The text values of one header.

    Args:
        header: a data set as pydicom read it, values converted or not.

    Attributes:
        character_set: the defined term of a set of one byte a character, None where it is another or unknown.
        character_set_fault: what is wrong with Specific Character Set, in words without it; None where nothing is.
    """

    def __init__(self, header: Dataset) -> None:
        self._header = header
        self._codec: str | None = "ascii"  # until the character set is known; it is a CS itself
        term, self.character_set_fault = _defined_term(self.read_tag(BaseTag(0x00080005)) or "")
        self.character_set = f"ISO_IR {term[-3:]}" if term and term[-3:] in _ONE_BYTE else None
        self._codec = None if term is None else _codec(term)

    def read(self, keyword: str) -> str | None:
        """Return an attribute's text with its padding, several values parted by backslashes; None where it is absent."""
        tag = tag_for_keyword(keyword)
        return None if tag is None else self.read_tag(BaseTag(tag))

    def read_tag(self, tag: BaseTag) -> str | None:
        """Return the same of a tag. What is no text, a sequence for one, reads as U+FFFD."""
        if tag not in self._header:
            return None
        element = self._header.get_item(tag)
        if element is None:
            return None
        value = element.value
        if value is None:
            return UNREADABLE if isinstance(element, RawDataElement) and element.length else ""
        return self._text(value)

    def _text(self, value: object) -> str:
        if isinstance(value, bytes):
            return self._decode(value)
        if isinstance(value, PersonName):
            original = value.original_string
            return self._decode(original) if isinstance(original, bytes) else str(original)
        if isinstance(value, MultiValue | list | tuple):
            return "\\".join(self._text(part) for part in value)
        if isinstance(value, str | int | float):  # DS, IS, DA and TM are subclasses that print what they were read from
            return str(value)
        return UNREADABLE

    def _decode(self, content: bytes) -> str:
        try:
            if b"\x1b" in content:
                return _decode_extended(content, self._codec)
            return content.decode(self._codec or "ascii")
        except (UnicodeError, LookupError):
            return UNREADABLE


def _defined_term(declared: str) -> tuple[str | None, str | None]:
    """Return the defined term of a Specific Character Set's first value, None for none known, and the fault found."""
    # Further values only allow escape sequences, which name their set themselves.
    first = declared.split("\\")[0].strip(" \0")
    if first in python_encoding:
        return first, None
    if match := _MISSPELT.fullmatch(first):
        spelt = f"ISO 2022 IR {match[1]}" if "2022" in first else f"ISO_IR {match[1]}"
        if spelt in python_encoding:
            return spelt, "misspelt"
    return None, "no defined term"


def _codec(term: str) -> str:
    # pydicom reads the default repertoire as Latin-1, which turns a missing declaration into wrong letters.
    return "ascii" if term in ("", "ISO_IR 6", "ISO 2022 IR 6") else python_encoding[term]


def _decode_extended(content: bytes, first: str | None) -> str:
    """Decode text with code extensions (PS3.5 section 6.1.2.5).

    An escape sequence holds up to the next one; a single-byte or G1 set also ends at a delimiter. In the two-byte G0 sets of
    Japanese a delimiter's byte may be half a character, so there only an escape sequence ends it.
    """
    head, *escaped = content.split(b"\x1b")
    pieces = [head.decode(first or "ascii")]
    for piece in escaped:
        escape = next((known for known in _DESIGNATED if piece.startswith(known)), None)
        if escape is None:
            return UNREADABLE
        codec = _DESIGNATED[escape]
        if codec.startswith("iso2022"):  # Python's own codec wants the escape sequence
            pieces.append((b"\x1b" + piece).decode(codec))
            continue
        inside, delimiter, after = _DELIMITED.fullmatch(piece[len(escape) :]).groups()  # type: ignore[union-attr]
        pieces += [inside.decode(codec), delimiter.decode("ascii"), after.decode(first or "ascii")]
    return "".join(pieces)
