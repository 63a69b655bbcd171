"""docs/reading-files.md says what is read, turned and refused; what it says is tried here."""

import re
import struct
from pathlib import Path

import highdicom  # noqa: F401 - adds newer syntaxes to pydicom's list, so the page must name them too
import numpy as np
import pytest
from pydicom._uid_dict import UID_dictionary

from benchmarks.rigs.synthetic_dicom import COMPRESSED, WORDS, make_dicom
from chexnet_deploy.errors import ImageError, ImageRefusedError, RefusalReason
from chexnet_deploy.images.dicom.decoder import Decoder
from chexnet_deploy.images.dicom.header import TRANSFER_SYNTAXES, read_header
from chexnet_deploy.images.reader import ImageReader
from chexnet_deploy.images.scope import ScopePolicy

PAGE = (Path(__file__).parents[3] / "docs" / "reading-files.md").read_text()
PREFIX = "1.2.840.10008.1.2"


def rows(title: str) -> list[list[str]]:
    """The cells of the table below a heading, without its own heading."""
    table = PAGE.split(f"## DICOM: {title}\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table.split("\n") if line.startswith("| `")
    ]


def syntaxes() -> dict[str, tuple[str, str]]:
    """UID -> (read or refused, the cell about why)."""
    found = {}
    for uids, _, what, *why in rows("transfer syntaxes"):
        named: list[str] = []
        for first, last in re.findall(r"`([\d.]+)`(?: to `([\d.]+)`)?", uids):
            stem, _, number = (first if first.startswith("1") else f"{PREFIX}.4{first}").rpartition(".")
            named += [f"{stem}.{n}" for n in range(int(number), int(last[1:] if last else number) + 1)]
        found.update(dict.fromkeys(named, (what, " ".join(why))))
    return found


def test_every_transfer_syntax_for_pictures_has_its_row() -> None:
    known = {uid for uid, (_, kind, *_) in UID_dictionary.items() if kind == "Transfer Syntax"}
    # Papyrus, MIME, XML, and streams in real time (PS3.22) hold no file's pixels.
    known = {
        uid
        for uid in known
        if uid.startswith(PREFIX) and not uid.startswith((f"{PREFIX}.6", f"{PREFIX}.7", f"{PREFIX}0"))
    }
    listed = syntaxes()
    assert {uid.removesuffix(".1") if uid.count(".") == 8 else uid for uid in known} <= set(
        listed
    )  # fragmentable: as the whole
    assert {uid for uid, (what, _) in listed.items() if what == "read"} == TRANSFER_SYNTAXES


@pytest.mark.parametrize("uid", syntaxes())
def test_it_is_read_or_refused_as_its_row_says(uid: str, decoder: Decoder) -> None:
    what, why = syntaxes()[uid]
    if what == "read":
        if uid == f"{PREFIX}.4.51":
            return  # test_decoder.py reads it, packed by DCMTK
        words = (WORDS >> 4).astype("u1") if uid.endswith(".50") else WORDS
        assert decoder.decode(make_dicom(words, syntax=uid)).header.is_compressed is (uid in COMPRESSED)
        return
    value = uid.encode() + b"\0" * (len(uid) % 2)
    meta = struct.pack("<HH2sH", 2, 0x10, b"UI", len(value)) + value
    with pytest.raises(ImageRefusedError, match=f"transfer syntax {uid};") as caught:
        read_header("x", bytes(128) + b"DICM" + meta + b"\x08\0\x60\0CS\2\0CR")
    assert caught.value.reason is RefusalReason.TRANSFER_SYNTAX
    assert ("dcmconv +te" in why) is ("dcmconv +te" in str(caught.value))


def test_orientations_lie_as_their_rows_say(decoder: Decoder) -> None:
    upright = decoder.decode(make_dicom()).gray
    read = {"read as it lies": 1, "mirrored or flipped back": 4, "turned back": 3}
    for cell, what, *_ in rows("which way it lies"):
        said = re.findall(r"`([A-Z]+\\[A-Z]+)`", cell)
        for value in said:
            content = make_dicom(edits={"PatientOrientation": value.split("\\"), "ViewPosition": ""})
            if what in read or what.startswith("by their first letters"):
                gray = decoder.decode(content).gray
                assert np.array_equal(gray, upright) is (value[0] == "L" and "F" in value), value
            else:
                with pytest.raises(ImageRefusedError) as caught:
                    decoder.decode(content, scope=ScopePolicy(accepts_unknown_view=True))
                assert caught.value.reason is RefusalReason.VIEW, value
        assert len(said) == read.get(what, len(said))


def test_ages_are_read_as_their_rows_say() -> None:
    (first, _), (second, _) = rows("age")
    in_years = {
        age: read_header("x", make_dicom(edits={"PatientAge": age})).patient_age_years
        for age in re.findall("`(.*?)`", first)
    }
    assert in_years == {"060Y": 60, "8Y": 8, "36M": 3, "12W": 0, "4D": 0, "62.0": 62}
    assert second.startswith("`62`")
    assert read_header("x", make_dicom(edits={"PatientAge": "62"})).patient_age_years == 62


def test_the_reasons_that_it_names_are_reasons() -> None:
    named = set(re.findall(r"(?:refused|scope|a|as),? `([a-z-]+)`", PAGE))
    assert named == {
        "transfer-syntax",
        "contradiction",
        "truncated",
        "damaged-header",
        "too-large",
        "not-dicom",
        "grayscale",
        "view",
        "age",
        "blank",
        "decode-timeout",
    }
    assert named <= {reason.value for reason in RefusalReason}


WHOLE = make_dicom()
DATA_SET = WHOLE[WHOLE.index(b"\x08\0\x16\0") :]


@pytest.mark.parametrize(
    "content",
    [
        DATA_SET,
        struct.pack("<HHI", 8, 0x16, 4) + b"1.2\0",  # implicit VR
        WHOLE[132:],  # the meta header leads
        WHOLE[128:],  # the mark leads
        bytes(128) + WHOLE[132:],  # the mark is missing
        bytes(128) + DATA_SET,
        struct.pack(">HH2sH", 8, 0x16, b"UI", 4) + b"1.2\0",  # big endian
    ],
)
def test_a_data_set_without_preamble_is_called_one(content: bytes) -> None:
    with ImageReader() as reader, pytest.raises(ImageRefusedError) as caught:
        reader.decode(content, name="x")
    assert caught.value.reason is RefusalReason.NOT_DICOM
    assert str(caught.value) == (
        "x: found a DICOM data set without preamble or its DICM mark; needed a DICOM file (PS3.10). "
        "Next: write it as a DICOM file (with preamble and meta header)."
    )


@pytest.mark.parametrize(
    "content", [b"\x08\0\x16\0\xff\xff\xff\xff", b"\x08\0", b"II*\0", b"Image Index\n", bytes(200), b"\2\0\0\0"]
)
def test_what_is_no_data_set_is_not_called_one(content: bytes) -> None:
    with ImageReader() as reader, pytest.raises(ImageError, match="neither a PNG nor a JPEG nor a DICOM file"):
        reader.decode(content, name="x")
