"""What a header says, and what no radiograph's header says."""

import struct
from typing import Any

import pytest
from pydicom.dataset import Dataset

from benchmarks.rigs.synthetic_dicom import COLUMNS, ROWS, make_dicom
from chexnet_deploy.errors import ImageRefusedError, RefusalReason
from chexnet_deploy.images.dicom.header import DicomHeader, read_header

DX, DX_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1.1"


def header(**edits: Any) -> DicomHeader:
    return read_header("x", make_dicom(edits=edits))


def coded(value: str, scheme: str = "SCT") -> list[Dataset]:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, "any"
    return [item]


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
def test_facts(syntax: str) -> None:
    read = read_header("x", make_dicom(syntax=syntax))
    assert (read.sop_class_uid, read.sop_instance_uid) == ("1.2.840.10008.5.1.4.1.1.1", "1.2.3.1")
    assert (read.study_instance_uid, read.series_instance_uid) == ("1.2.3.2", "1.2.3.3")
    assert (read.modality, read.body_part, read.view_position, read.patient_age_years) == ("CR", "CHEST", "PA", 60)
    assert (read.rows, read.columns, read.bits_stored, read.number_of_frames) == (ROWS, COLUMNS, 12, 1)
    assert (read.transfer_syntax_uid, read.is_compressed, read.is_lossy) == (syntax, False, False)
    assert read.photometric_interpretation == "MONOCHROME2"
    assert read.has_burned_in_annotation is None
    assert not read.patient_is_animal


def test_the_data_set_has_everything_but_the_pixels() -> None:
    dataset = header().read_dataset()
    assert dataset.PatientName == "CANARY^NAME"
    assert "PixelData" not in dataset


def test_nothing_of_the_patient_is_shown() -> None:
    shown = repr(header())
    assert "CANARY" not in shown
    assert "patient_age_years" not in shown


@pytest.mark.parametrize(
    ("age", "born", "studied", "years"),
    [
        ("045Y", None, None, 45),
        ("023M", None, None, 1),
        ("024M", None, None, 2),
        ("100W", None, None, 1),
        ("300D", None, None, 0),
        (None, "19600102", "20200101", 59),  # a day before the birthday
        (None, "19600102", "20200102", 60),
        (None, "20000229", "20180228", 17),
        (None, None, "20200101", None),
        (None, "19600102", None, None),
    ],
)
def test_age(age: str | None, born: str | None, studied: str | None, years: int | None) -> None:
    assert header(PatientAge=age, PatientBirthDate=born, StudyDate=studied).patient_age_years == years


def with_age(value: bytes, vr: bytes = b"AS") -> DicomHeader:
    """A file whose age is these bytes; its dates of birth and study would say 60 years."""
    content = make_dicom()
    assert content.count(b"AS\4\x00060Y") == 1
    return read_header("x", content.replace(b"AS\4\x00060Y", vr + struct.pack("<H", len(value)) + value))


@pytest.mark.parametrize(
    ("age", "years"),
    [
        (b"8Y", 8),
        (b"5 ", 5),
        (b"62  ", 62),
        (b"62Y ", 62),
        (b"018Y", 18),
        (b"18", 18),
        (b"017y", 17),
        (b" 8 Y", 8),
        (b"0060Y ", 60),
        (b"36M ", 3),
        (b"215M", 17),
        (b"12W ", 0),
        (b"4D", 0),
        (b"62.0", 62),
        (b"17.9Y ", 17),
        (b"0\0", 0),
        (b"150Y", 150),
        (b"    ", 60),  # empty: counted from the dates
        (b"", 60),
    ],
)
def test_an_age_of_one_meaning_is_read(age: bytes, years: int) -> None:
    read = with_age(age)
    assert (read.patient_age_years, read.has_unreadable_age) == (years, False)


@pytest.mark.parametrize(
    ("vr", "value", "years"),
    [
        (b"US", struct.pack("<H", 8), 8),
        (b"SL", struct.pack("<i", 61), 61),
        (b"FD", struct.pack("<d", 8.5), 8),
        (b"IS", b"17", 17),
        (b"DS", b"62.0", 62),
        (b"LO", b"008Y", 8),
    ],
)
def test_an_age_in_another_vr(vr: bytes, value: bytes, years: int) -> None:
    assert with_age(value, vr).patient_age_years == years


@pytest.mark.parametrize(
    "age",
    [b"0Y40", b"-62Y", b"-5", b"1000Y ", b"999Y", b"151Y", b"ABC ", b"Y ", b"60X ", b"6O", b"nan ", b"060Y\\005Y "],
)
def test_an_age_of_no_meaning_is_not_unknown(age: bytes) -> None:
    read = with_age(age)
    assert (read.patient_age_years, read.has_unreadable_age) == (None, True)


def test_a_number_of_no_age_is_not_unknown() -> None:
    assert with_age(struct.pack("<h", -5), b"SS").has_unreadable_age
    assert with_age(struct.pack("<HH", 8, 60), b"US").has_unreadable_age
    assert with_age(struct.pack("<d", float("nan")), b"FD").has_unreadable_age


@pytest.mark.parametrize(
    ("born", "studied"),
    [("19601302", "20200102"), ("1960", "20200102"), ("20210101", "20200101"), ("18600102", "20200102"), ("X", "X")],
)
def test_dates_of_no_age_are_not_unknown(born: str, studied: str) -> None:
    content = make_dicom(edits={"PatientAge": None})
    for old, new in ((b"19600102", born), (b"20200102", studied)):
        content = content.replace(b"DA\x08\0" + old, b"DA" + struct.pack("<H", 8) + new.ljust(8).encode())
    read = read_header("x", content)
    assert (read.patient_age_years, read.has_unreadable_age) == (None, True)


def test_dates_with_points_and_a_study_without_its_date() -> None:
    dates = {"PatientAge": None, "StudyDate": "", "AcquisitionDate": "20200101"}
    assert header(**dates).patient_age_years == 59
    content = make_dicom(edits=dates).replace(b"DA\x08\x0019600102", b"DA\x0a\x001960.01.02")
    assert read_header("x", content).patient_age_years == 59


@pytest.mark.parametrize(
    ("edits", "view"),
    [
        ({"ViewPosition": "AP"}, "AP"),
        ({"ViewPosition": ""}, None),
        ({"ViewPosition": None, "ViewCodeSequence": coded("272479007")}, "PA"),
        ({"ViewPosition": None, "ViewCodeSequence": coded("399348003")}, "AP"),
        ({"ViewPosition": None, "ViewCodeSequence": coded("R-10214", "SRT")}, "PA"),
        ({"ViewPosition": None, "ViewCodeSequence": coded("399173006")}, None),  # left lateral
        ({"ViewPosition": "PA", "ViewCodeSequence": coded("272479007")}, "PA"),
        ({"ViewPosition": "LL", "ViewCodeSequence": coded("399173006")}, "LL"),
    ],
)
def test_view(edits: dict[str, Any], view: str | None) -> None:
    assert header(**edits).view_position == view


@pytest.mark.parametrize(
    ("edits", "part"),
    [
        ({"BodyPartExamined": "HAND"}, "HAND"),
        ({"BodyPartExamined": None}, None),
        ({"BodyPartExamined": None, "AnatomicRegionSequence": coded("816094009")}, "CHEST"),
        ({"BodyPartExamined": None, "AnatomicRegionSequence": coded("T-D3000", "SRT")}, "CHEST"),
        ({"BodyPartExamined": None, "AnatomicRegionSequence": coded("85562004")}, None),  # hand
        ({"BodyPartExamined": "HAND", "AnatomicRegionSequence": coded("816094009")}, "HAND"),
    ],
)
def test_body_part(edits: dict[str, Any], part: str | None) -> None:
    assert header(**edits).body_part == part


@pytest.mark.parametrize(
    ("edits", "is_animal"),
    [
        ({"PatientSpeciesDescription": "Canine"}, True),
        ({"PatientSpeciesDescription": "Homo sapiens"}, False),
        ({"PatientSpeciesDescription": ""}, False),
        ({"PatientSpeciesCodeSequence": coded("448771007")}, True),  # dog
        ({"PatientSpeciesCodeSequence": coded("337915000")}, False),
        ({"PatientBreedDescription": "Beagle"}, True),
        ({"PatientBreedCodeSequence": coded("42252000")}, True),
        ({"AnatomicalOrientationType": "QUADRUPED", "PatientOrientation": ["LE", "CD"]}, True),
        ({"AnatomicalOrientationType": "BIPED"}, False),
        ({"PatientBreedCodeSequence": [Dataset()], "PatientSpeciesCodeSequence": [Dataset()]}, False),
        ({"PatientBreedCodeSequence": []}, False),
    ],
)
def test_species(edits: dict[str, Any], is_animal: bool) -> None:
    assert header(**edits).patient_is_animal is is_animal


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ({"PixelData": None}, RefusalReason.NO_PIXELS),
        ({"Rows": 31}, RefusalReason.TOO_SMALL),
        ({"Rows": 6001, "Columns": 6000}, RefusalReason.TOO_LARGE),
        ({"Rows": 65535, "Columns": 65535}, RefusalReason.TOO_LARGE),
        ({"Rows": 49}, RefusalReason.TRUNCATED),
        ({"Rows": 47}, RefusalReason.CONTRADICTION),
        ({"Rows": None}, RefusalReason.DAMAGED_HEADER),
        ({"NumberOfFrames": 2}, RefusalReason.MULTI_FRAME),
        ({"NumberOfFrames": 2**31 - 1}, RefusalReason.MULTI_FRAME),
        ({"NumberOfFrames": 0}, RefusalReason.MULTI_FRAME),
        ({"PresentationIntentType": "FOR PROCESSING"}, RefusalReason.FOR_PROCESSING),
        ({"SOPClassUID": DX_PROCESSING}, RefusalReason.FOR_PROCESSING),
        ({"SeriesInstanceUID": None}, RefusalReason.DAMAGED_HEADER),
        ({"StudyInstanceUID": ""}, RefusalReason.DAMAGED_HEADER),
        ({"ViewPosition": "AP", "ViewCodeSequence": coded("272479007")}, RefusalReason.CONTRADICTION),
    ],
)
def test_refused(edits: dict[str, Any], reason: RefusalReason) -> None:
    with pytest.raises(ImageRefusedError) as caught:
        header(**edits)
    assert caught.value.reason is reason
    message = str(caught.value)
    assert message.startswith("x: found ")
    assert "; needed " in message
    assert ". Next: " in message
    assert "CANARY" not in message
    assert "\n" not in message


def test_one_frame_and_presentation_said_aloud() -> None:
    edits = {"NumberOfFrames": 1, "PresentationIntentType": "FOR PRESENTATION", "BurnedInAnnotation": "YES"}
    read = header(SOPClassUID=DX, Modality="DX", **edits)
    assert (read.presentation_intent, read.has_burned_in_annotation) == ("FOR PRESENTATION", True)


def test_the_icon_is_not_taken_for_the_picture() -> None:
    icon = Dataset()
    icon.Rows = icon.Columns = 64
    icon.PixelData = bytes(64 * 64)
    icon["PixelData"].VR = "OB"
    assert header(IconImageSequence=[icon]).rows == ROWS
    with pytest.raises(ImageRefusedError, match="no pixel data"):
        header(IconImageSequence=[icon], PixelData=None)


def test_a_number_of_another_length_is_refused() -> None:
    wrong = make_dicom().replace(b"\x28\0\x10\0US\2\0\x30\0", b"\x28\0\x10\0US\4\0\x30\0\0\0")
    with pytest.raises(ImageRefusedError, match="Rows of 4 bytes"):
        read_header("x", wrong)


def test_an_error_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ImageRefusedError(RefusalReason.VIEW, "why")))
    assert (error.reason, str(error)) == (RefusalReason.VIEW, "why")
