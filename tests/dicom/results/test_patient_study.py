"""Headers as they come: carried over, repaired by the rules, or refused; never lost without a word."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from chexnet_deploy.dicom.results.attributes import PATIENT_STUDY, PICTURE
from chexnet_deploy.dicom.results.source_header import RADIOGRAPH_CLASSES, Repair, SourceImage, read_source_image
from chexnet_deploy.dicom.results.texts import TextReader
from chexnet_deploy.errors import DicomError

HeaderOf = Callable[..., Dataset]
ESCAPES = b"\\ISO 2022 IR 87"


def test_a_sound_header_is_carried_over_whole(header_of: HeaderOf) -> None:
    source = read_source_image(header_of())
    assert source.repairs == ()
    assert (source.study_uid, source.series_uid, source.sop_instance_uid) == ("1.2.3", "1.2.3.4", "1.2.3.4.5")
    assert source.patient_study.PatientName == "Canary^Patient"
    assert source.patient_study.PatientID == "CANARY-4711"
    assert "SpecificCharacterSet" not in source.patient_study  # ASCII needs none


@pytest.mark.parametrize(
    ("keyword", "found", "kept", "repair"),
    [
        ("PatientID", None, "", "PatientID added empty: absent"),
        ("PatientID", b"", "", None),
        ("PatientID", b"x" * 65, "", "PatientID emptied: over 64 characters"),  # half an identifier is another one's
        ("PatientID", b"a\\b", "", "PatientID emptied: several values"),
        ("PatientBirthDate", b"1940.03.05", "19400305", "PatientBirthDate rewritten: the form of ACR-NEMA"),
        ("PatientBirthDate", b"05/03/1940", "", "PatientBirthDate emptied: no date"),
        ("PatientSex", b"f", "F", "PatientSex rewritten: lower case"),
        ("PatientSex", b"W", "", "PatientSex emptied: none of the values that it may have"),
        ("StudyTime", b"10:15:00", "101500", "StudyTime rewritten: the form of ACR-NEMA"),
        ("StudyID", b"x" * 17, "", "StudyID emptied: over 16 characters"),
        ("PatientName", b"a=b=c=d", "", "PatientName emptied: more parts than a name has"),
        ("PatientAge", b"45Y", "045Y", "PatientAge rewritten: fewer than three digits"),
        ("PatientAge", b"45", None, "PatientAge left out: no age"),
        ("PatientWeight", b"70,5", None, "PatientWeight left out: no decimal number"),
        ("StudyDescription", b"x" * 70, "x" * 64, "StudyDescription shortened: over 64 characters"),
        ("IssuerOfPatientID", b"x" * 70, None, "IssuerOfPatientID left out: over 64 characters"),
        ("Allergies", b"latex\\penicillin", ["latex", "penicillin"], None),
        ("Allergies", b"latex\\\a", None, "Allergies left out: control characters"),  # half a list would mislead
        ("TimezoneOffsetFromUTC", b"+0530", "+0530", None),
        ("TimezoneOffsetFromUTC", b"UTC", None, "TimezoneOffsetFromUTC left out: none of the values that it may have"),
        ("OtherPatientIDs", b"4712", None, "OtherPatientIDs left out: not repeated in results"),
        ("ClinicalTrialSiteID", b"4712", None, "ClinicalTrialSiteID left out: not repeated in results"),
    ],
)
def test_each_repair_is_done_and_named(
    header_of: HeaderOf, keyword: str, found: bytes | None, kept: str | list[str] | None, repair: str | None
) -> None:
    source = read_source_image(header_of(**{keyword: found}))
    assert source.patient_study.get(keyword) == kept
    assert [str(done) for done in source.repairs] == ([] if repair is None else [repair])


def test_removed_identity_stays_declared(header_of: HeaderOf) -> None:
    source = read_source_image(header_of(PatientIdentityRemoved=b"YES"))
    assert source.patient_study.PatientIdentityRemoved == "YES"
    assert source.patient_study.DeidentificationMethod == "See the source image"
    assert [repair.deed for repair in source.repairs] == ["filled in"]
    stated = read_source_image(header_of(PatientIdentityRemoved=b"YES", DeidentificationMethod=b"by hand"))
    assert (stated.patient_study.DeidentificationMethod, stated.repairs) == ("by hand", ())


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
@pytest.mark.parametrize(
    ("found", "words"), [(None, "no"), (b"", "no"), (b"1.02.3", "an invalid"), (b"1.2\\3", "an invalid")]
)
def test_an_image_that_nothing_can_be_attached_to_is_refused(
    header_of: HeaderOf, keyword: str, found: bytes | None, words: str
) -> None:
    with pytest.raises(DicomError, match=f"has {words} {keyword}"):
        read_source_image(header_of(**{keyword: found}))


def test_only_radiographs_are_taken(header_of: HeaderOf) -> None:
    for uid in RADIOGRAPH_CLASSES:
        assert read_source_image(header_of(SOPClassUID=uid.encode())).sop_class_uid == uid
    with pytest.raises(DicomError, match="SOP class"):
        read_source_image(header_of(SOPClassUID=b"1.2.840.10008.5.1.4.1.1.2"))  # CT


def test_only_people_are_taken(header_of: HeaderOf) -> None:
    human, animal = header_of(PatientSpeciesDescription=b"Homo sapiens"), header_of(PatientBreedDescription=b"Beagle")
    assert [repair.keyword for repair in read_source_image(human).repairs] == ["PatientSpeciesDescription"]
    with pytest.raises(DicomError, match="no person"):
        read_source_image(animal)
    for code, is_human in (("337915000", True), ("448771007", False)):
        coded = header_of()
        coded.PatientSpeciesCodeSequence = [Dataset()]
        coded.PatientSpeciesCodeSequence[0].CodeValue = code
        if is_human:
            assert read_source_image(coded).repairs
        else:
            with pytest.raises(DicomError, match="no person"):
                read_source_image(coded)


@pytest.mark.parametrize(
    ("character_set", "found", "kept", "written_in"),
    [
        (b"ISO_IR 100", b"M\xfcller^J\xf6rg", "Müller^Jörg", "ISO_IR 100"),
        (b"ISO IR 100", b"M\xfcller^J\xf6rg", "Müller^Jörg", "ISO_IR 100"),
        (b"ISO_IR 144", b"\xbb\xee", "\N{CYRILLIC CAPITAL LETTER EL}\N{CYRILLIC SMALL LETTER YU}", "ISO_IR 144"),
        (b"ISO_IR 192", "Müller^Jörg".encode(), "Müller^Jörg", "ISO_IR 192"),
        (None, b"M\xfcller^J\xf6rg", "", None),  # undeclared: Latin-1 is only the likeliest guess
        (b"utf8", b"M\xc3\xbcller", "", None),
        (b"utf8", b"Mueller", "Mueller", None),
        (b"ISO_IR 192", b"M\xfcller", "", None),
        (
            ESCAPES,  # PS3.5 section H.3, example 1
            b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
            "Yamada^Tarou=山田^太郎=やまだ^たろう",
            "ISO_IR 192",
        ),
        (
            b"\\ISO 2022 IR 149",  # PS3.5 section I.2
            b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
            "Hong^Gildong=洪^吉洞=홍^길동",
            "ISO_IR 192",
        ),
        (ESCAPES, b"\x1b[31mred", "", None),  # a terminal's escape sequence
    ],
)
def test_names_are_read_by_their_character_set(
    header_of: HeaderOf, character_set: bytes | None, found: bytes, kept: str, written_in: str | None
) -> None:
    header = header_of(SpecificCharacterSet=character_set, PatientName=found)
    study = read_source_image(header).patient_study
    assert str(study.PatientName) == kept
    assert study.get("SpecificCharacterSet") == written_in


def test_a_header_that_pydicom_has_converted_reads_the_same(header_of: HeaderOf) -> None:
    values = {
        "SpecificCharacterSet": b"ISO_IR 100",
        "PatientName": b"M\xfcller^J",
        "PatientWeight": b"70.50",
        "Allergies": b"a\\b",
    }
    fresh, converted = header_of(**values), header_of(**values)
    for element in converted:
        assert element.value is not None
    assert read_source_image(converted) == read_source_image(fresh)


def test_lossy_compression_is_read_from_the_transfer_syntax_too(header_of: HeaderOf) -> None:
    header = header_of()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    assert read_source_image(header).picture.LossyImageCompression == "01"


def _text(found: object) -> str:
    parts = found if isinstance(found, list | pydicom.multival.MultiValue) else [found]
    return "\\".join(str(part) for part in parts)


def _is_accounted_for(source: SourceImage, header: Dataset, keyword: str) -> bool:
    found = TextReader(header).read(keyword)
    if found is None or not found.strip(" \0\\="):
        return True
    kept = source.picture if keyword in {attribute.keyword for attribute in PICTURE} else source.patient_study
    is_name = keyword in kept and kept[keyword].VR == "PN"  # empty groups at a name's end are padding too
    stripped = "\\".join(part.strip(" \0").rstrip("=" if is_name else " ") for part in found.split("\\"))
    unchanged = keyword in kept and _text(kept[keyword].value) in (stripped, found.strip(" \0"), found.rstrip(" \0"))
    return unchanged or keyword in {repair.keyword for repair in source.repairs}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_nothing_is_lost_without_a_word(
    header_of: HeaderOf, malformed: st.SearchStrategy[dict[str, bytes | None]], data: st.DataObject
) -> None:
    drawn = data.draw(malformed)
    header, twin = header_of(**drawn), header_of(**drawn)
    source = read_source_image(header)  # and silently: a warning is an error here
    for attribute in PATIENT_STUDY + PICTURE:
        assert _is_accounted_for(source, header, attribute.keyword), attribute.keyword
        assert attribute.type == 3 or attribute.keyword in source.patient_study
    for tag in twin.keys():  # noqa: SIM118 - iterating converts
        assert header.get_item(tag) == twin.get_item(tag)


def test_neither_warnings_nor_logs_nor_repairs_repeat_a_value(
    header_of: HeaderOf, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    everywhere = {attribute.keyword: b"CANARY\x07\x1b" + b"x" * 70 for attribute in PATIENT_STUDY + PICTURE}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = read_source_image(header_of(**everywhere))
    assert not caught
    assert "CANARY" not in caplog.text + "".join(map(str, source.repairs))
    assert {repair.keyword for repair in source.repairs} == set(everywhere)
    with pytest.raises(DicomError) as refused:
        read_source_image(header_of(StudyInstanceUID=b"CANARY"))
    assert "CANARY" not in str(refused.value)


def test_real_headers_are_taken(real_headers: list[Path]) -> None:
    for path in real_headers:
        source = read_source_image(pydicom.dcmread(path, stop_before_pixels=True))
        assert all(repair.deed in ("left out", "added empty") for repair in source.repairs), path.name
        assert all(isinstance(repair, Repair) and ":" in str(repair) for repair in source.repairs)
