"""Read an element's bytes as the value its VR says, or refuse (PS3.5 section 6.2).

pydicom converts too, but warns with the patient's value in the warning, and by a setting of the whole process.
"""

import math
import re
from collections.abc import Mapping
from typing import Final

from chexnet_deploy.dicom.structure import Element
from chexnet_deploy.errors import ImageRefusedError, RefusalReason
from chexnet_deploy.gray import refusal

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
        """Return a sequence's items; none where it is absent."""
        element = self._elements.get(tag)
        return () if element is None else tuple(Values(self.name, item) for item in element.items)

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
