"""The rules of DICOM's value representations (PS3.5 section 6.2), applied to one text value at a time.

A value is kept as it is, rewritten where only its form was wrong, or given up. Nothing is guessed, and a fault's words
never repeat the value: they go to logs. Knows no tags and no data sets; see source_header.py for those.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from types import MappingProxyType
from typing import Final

MAX_CHARACTERS: Final = MappingProxyType({"SH": 16, "LO": 64, "ST": 1024, "LT": 10240})
"""Longest value of each text representation, in characters (PS3.5 table 6.2-1)."""
UNREADABLE: Final = "\N{REPLACEMENT CHARACTER}"
"""What a decoder leaves where bytes are no character of the declared set."""

_UID: Final = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))+", re.ASCII)
_CODE: Final = re.compile(r"[A-Z0-9_ ]{1,16}")
_DATE: Final = re.compile(r"(\d{4})(\d{2})(\d{2})", re.ASCII)
_OLD_DATE: Final = re.compile(r"(\d{4})\.(\d{2})\.(\d{2})", re.ASCII)
_TIME: Final = re.compile(r"([01]\d|2[0-3])(([0-5]\d)(([0-5]\d|60)(\.\d{1,6})?)?)?", re.ASCII)
_OLD_TIME: Final = re.compile(r"(\d{2}):(\d{2})(?::(\d{2}(?:\.\d{1,6})?))?", re.ASCII)
_AGE: Final = re.compile(r"(\d{1,3})([DWMY])", re.ASCII)
_DECIMAL: Final = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of one value.

    Attributes:
        text: the value to write; None where it can't be kept.
        fault: what was wrong with the one found, in words without it; None where nothing was.
    """

    text: str | None
    fault: str | None = None


def check_value(vr: str, text: str) -> Checked:
    """Return a value as PS3.5 allows it to be written.

    Args:
        vr: one of AS, CS, DA, DS, LO, LT, PN, SH, ST, TM, UI.
        text: one value, decoded; padding is no part of it and is dropped without a fault.
    """
    # NUL pads UIDs and, wrongly, much else. Spaces at the front of long texts are layout (PS3.5 table 6.2-1).
    bare = text.rstrip(" \0") if vr in ("LT", "ST") else text.strip(" \0")
    if not bare:
        return Checked("")
    if UNREADABLE in bare or any("\ud800" <= character <= "\udfff" for character in bare):
        return Checked(None, "bytes that are no text in its character set")
    return _RULES[vr](bare)


def is_uid(text: str) -> bool:
    """Whether this is a UID as PS3.5 section 9.1 has it: at most 64 digits and dots, no component with a leading zero."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def shortened(vr: str, text: str) -> str:
    """Return the beginning of a text that fits its representation; for descriptions, never for what identifies."""
    return text[: MAX_CHARACTERS[vr]].rstrip()


def _uid(text: str) -> Checked:
    return Checked(text) if is_uid(text) else Checked(None, "no valid UID")


def _code(text: str) -> Checked:
    if _CODE.fullmatch(text):
        return Checked(text)
    upper = text.upper()
    return Checked(upper, "lower case") if _CODE.fullmatch(upper) else Checked(None, "no code string")


def _date(text: str) -> Checked:
    for pattern, fault in ((_DATE, None), (_OLD_DATE, "the form of ACR-NEMA")):
        if match := pattern.fullmatch(text):
            try:
                date(*map(int, match.groups()))
            except ValueError:
                return Checked(None, "a day that no calendar has")
            return Checked("".join(match.groups()), fault)
    return Checked(None, "no date")


def _time(text: str) -> Checked:
    if _TIME.fullmatch(text):
        return Checked(text)
    if match := _OLD_TIME.fullmatch(text):
        plain = "".join(group or "" for group in match.groups())
        if _TIME.fullmatch(plain):
            return Checked(plain, "the form of ACR-NEMA")
    return Checked(None, "no time")


def _age(text: str) -> Checked:
    match = _AGE.fullmatch(text)
    if match is None:
        return Checked(None, "no age")
    padded = f"{int(match[1]):03d}{match[2]}"
    return Checked(padded, None if padded == text else "fewer than three digits")


def _decimal(text: str) -> Checked:
    if len(text) > 16:
        return Checked(None, "over 16 characters")
    return Checked(text) if _DECIMAL.fullmatch(text) else Checked(None, "no decimal number")


def _name(text: str) -> Checked:
    # Up to three groups, alphabetic, ideographic and phonetic, of up to five components each (PS3.5 section 6.2.1).
    text = text.rstrip("=")  # of groups that hold nothing
    groups = text.split("=")
    if any(map(_is_control, text)):
        return Checked(None, "control characters")
    if "\\" in text:
        return Checked(None, "several values")
    if len(groups) > 3 or any(group.count("^") > 4 for group in groups):
        return Checked(None, "more parts than a name has")
    if any(len(group) > 64 for group in groups):
        return Checked(None, "over 64 characters")
    return Checked(text)


def _short_text(vr: str) -> Callable[[str], Checked]:
    def rule(text: str) -> Checked:
        if any(map(_is_control, text)):
            return Checked(None, "control characters")
        if "\\" in text:
            return Checked(None, "several values")
        return _fitting(vr, text)

    return rule


def _long_text(vr: str) -> Callable[[str], Checked]:
    def rule(text: str) -> Checked:
        kept = "".join(character for character in text if character in "\t\n\f\r" or not _is_control(character))
        checked = _fitting(vr, kept)
        return checked if kept == text or checked.fault else Checked(checked.text, "control characters")

    return rule


def _fitting(vr: str, text: str) -> Checked:
    limit = MAX_CHARACTERS[vr]
    return Checked(text) if len(text) <= limit else Checked(None, f"over {limit} characters")


def _is_control(character: str) -> bool:
    # C0, DEL and C1 (PS3.5 section 6.1.3). The second are what Windows-1252 text read as Latin-1 becomes.
    return character < " " or "\x7f" <= character <= "\x9f"


_RULES: Final = MappingProxyType(
    {
        "AS": _age,
        "CS": _code,
        "DA": _date,
        "DS": _decimal,
        "LO": _short_text("LO"),
        "LT": _long_text("LT"),
        "PN": _name,
        "SH": _short_text("SH"),
        "ST": _long_text("ST"),
        "TM": _time,
        "UI": _uid,
    }
)
