"""The rules of PS3.5 section 6.2, each by an answer that can be read there."""

import pytest

from chexnet_deploy.dicom.results.representations import check_value, is_uid, shortened

GIVEN_UP = None


@pytest.mark.parametrize(
    ("vr", "found", "kept", "fault"),
    [
        ("DA", "20240229", "20240229", None),
        ("DA", "20230229", GIVEN_UP, "a day that no calendar has"),
        ("DA", "1997.08.15", "19970815", "the form of ACR-NEMA"),
        ("DA", "15/08/1997", GIVEN_UP, "no date"),
        ("DA", "", "", None),
        ("TM", "235960.123456", "235960.123456", None),  # a leap second
        ("TM", "07", "07", None),
        ("TM", "10:15:30", "101530", "the form of ACR-NEMA"),
        ("TM", "2515", GIVEN_UP, "no time"),
        ("TM", "101530.1234567", GIVEN_UP, "no time"),
        ("AS", "045Y", "045Y", None),
        ("AS", "45Y", "045Y", "fewer than three digits"),
        ("AS", "45", GIVEN_UP, "no age"),
        ("CS", "CHEST", "CHEST", None),
        ("CS", "chest", "CHEST", "lower case"),
        ("CS", "TWO-WORDS", GIVEN_UP, "no code string"),
        ("DS", "-1.5e-3", "-1.5e-3", None),
        ("DS", "1,5", GIVEN_UP, "no decimal number"),
        ("DS", "1.000000000000000", GIVEN_UP, "over 16 characters"),
        ("UI", "1.2.840\0", "1.2.840", None),
        ("UI", "1.02.3", GIVEN_UP, "no valid UID"),
        ("SH", "  padded ", "padded", None),
        ("SH", "x" * 17, GIVEN_UP, "over 16 characters"),
        (
            "LO",
            "\N{CJK UNIFIED IDEOGRAPH-5C71}" * 64,
            "\N{CJK UNIFIED IDEOGRAPH-5C71}" * 64,
            None,
        ),  # characters, not bytes
        ("LO", "two\\values", GIVEN_UP, "several values"),
        ("LO", "bell\a", GIVEN_UP, "control characters"),
        ("LO", "quote\x93", GIVEN_UP, "control characters"),  # Windows-1252 read as Latin-1
        ("LT", "  two\r\nlines  ", "  two\r\nlines", None),
        ("LT", "bell\a", "bell", "control characters"),
        ("PN", "Doe", "Doe", None),
        ("PN", "a^b^c^d^e", "a^b^c^d^e", None),
        ("PN", "a^b^c^d^e^f", GIVEN_UP, "more parts than a name has"),
        ("PN", "Doe^J==", "Doe^J", None),
        ("PN", "a=b=c=d", GIVEN_UP, "more parts than a name has"),
        ("PN", "x" * 65, GIVEN_UP, "over 64 characters"),
        ("PN", "x" * 64 + "=" + "y" * 64, "x" * 64 + "=" + "y" * 64, None),
        ("LO", "lost \N{REPLACEMENT CHARACTER}", GIVEN_UP, "bytes that are no text in its character set"),
        ("LO", "\udcfc", GIVEN_UP, "bytes that are no text in its character set"),
    ],
)
def test_a_value_is_kept_rewritten_or_given_up(vr: str, found: str, kept: str | None, fault: str | None) -> None:
    checked = check_value(vr, found)
    assert (checked.text, checked.fault) == (kept, fault)


@pytest.mark.parametrize(("uid", "valid"), [("1.2.3", True), ("2.25." + "9" * 59, True), ("2.25." + "9" * 60, False)])
def test_a_uid_has_64_characters_at_most(uid: str, valid: bool) -> None:
    assert is_uid(uid) is valid


@pytest.mark.parametrize("uid", ["", "1", "1.", ".1", "1..2", "1.2a", "1.-2", "1.\N{ARABIC-INDIC DIGIT ONE}", "00.1"])
def test_what_is_no_uid(uid: str) -> None:
    assert not is_uid(uid)


def test_a_description_is_shortened_to_what_fits() -> None:
    assert shortened("SH", "fifteen letters and more") == "fifteen letters"
