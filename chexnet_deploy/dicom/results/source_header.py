"""What a result takes over from its source image's header, so that it lands in the same study of the same patient.

Real headers break the standard and a result must not, so each attribute of the Patient, Patient Study and General Study
modules (PS3.3 C.7.1.1, C.7.2.2, C.7.2.1) is carried over, repaired or left out, by these rules:

    StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID, SOPClassUID
        missing or invalid: refused. A result with a repaired one would belong to no study, or to another one.
    a non-human patient
        refused: CheXNet knows people's chests only.
    type 2 (name, id, birth date, sex, study date, time and id, accession number, referring physician)
        missing: added empty. Invalid or too long: emptied, never shortened, as half an identifier is someone else's.
    type 3 (weight, allergies, description ...)
        invalid: left out. A description that is too long is shortened.
    dates 1997.08.15, times 10:15:00, ages 45Y and codes in lower case
        rewritten as the standard has them: nothing is lost.
    text of an unknown character set
        kept where its bytes are ASCII, else invalid. Text keeps its character set if that has one byte a character; of any
        other it is written in UTF-8, which loses nothing.
    sequences and everything else of groups 0010 and 0012
        left out: optional in each module, and their items break rules of their own.

Whatever is not carried over unchanged is a Repair, which names the attribute and never its value, for the log.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from pydicom.charset import python_encoding
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag

from chexnet_deploy.dicom.results.attributes import PATIENT_STUDY, PICTURE, STUDY_LEFT_OUT, Attribute
from chexnet_deploy.dicom.results.representations import MAX_CHARACTERS, Checked, check_value, is_uid, shortened
from chexnet_deploy.dicom.results.texts import TextReader
from chexnet_deploy.errors import DicomError
from chexnet_deploy.images.dicom.header import HUMAN_CODES, HUMAN_NAMES

Deed: TypeAlias = Literal["added empty", "emptied", "left out", "rewritten", "shortened", "filled in"]

RADIOGRAPH_CLASSES: Final = MappingProxyType(
    {
        "1.2.840.10008.5.1.4.1.1.1": "Computed Radiography",
        "1.2.840.10008.5.1.4.1.1.1.1": "Digital X-Ray, for presentation",
        "1.2.840.10008.5.1.4.1.1.1.1.1": "Digital X-Ray, for processing",
        "1.2.840.10008.5.1.4.1.1.7": "Secondary Capture",
    }
)
"""The SOP classes in which single-frame chest radiographs come (PS3.4 table B.5-1)."""

_LOSSY_SYNTAXES: Final = frozenset(
    {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.203"}
)


@dataclass(frozen=True, slots=True)
class Repair:
    """One attribute that a result does not carry over as it was found.

    Attributes:
        keyword: its DICOM keyword, or its tag where the dictionary has none.
        deed: what was done.
        reason: what was wrong, in words without the value.
    """

    keyword: str
    deed: Deed
    reason: str

    def __str__(self) -> str:
        return f"{self.keyword} {self.deed}: {self.reason}"


@dataclass(frozen=True, slots=True)
class SourceImage:
    """The image a result is about, and what the result repeats of its header.

    Attributes:
        study_uid: of all four UIDs exactly as found.
        patient_study: valid attributes of patient and study, with the character set they need.
        picture: valid attributes that a picture derived from this image repeats (PS3.3 C.7.6.1).
        repairs: what was not carried over unchanged, in the order of the rules.
    """

    study_uid: str
    series_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    patient_study: Dataset = field(repr=False)  # a log that shows this object names nobody
    picture: Dataset = field(repr=False)
    repairs: tuple[Repair, ...]


_SPECIES: Final = (
    "PatientSpeciesDescription",
    "PatientBreedDescription",
    "PatientSpeciesCodeSequence",
    "PatientBreedCodeSequence",
)


def read_source_image(header: Dataset) -> SourceImage:
    """Return what a result repeats of its source image's header; see the rules above.

    Args:
        header: of the image, pixel data not needed; never changed.

    Raises:
        DicomError: a UID is missing or invalid, the SOP class is no radiograph's, or the patient is no person.
    """
    texts = TextReader(header)
    uids = {name: _required_uid(texts, name) for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")}
    sop_class = _required_uid(texts, "SOPClassUID")
    if sop_class not in RADIOGRAPH_CLASSES:
        raise DicomError(
            f"The source image's SOP class is {sop_class}; needed {', '.join(RADIOGRAPH_CLASSES.values())}. "
            "Send the radiograph itself."
        )
    _refuse_animals(header, texts)
    patient_study, repairs = _carried(texts, PATIENT_STUDY)
    repairs += _complete_deidentification(patient_study)
    repairs += [Repair(keyword, "left out", "not repeated in results") for keyword in _unknown(header)]
    picture, picture_repairs = _carried(texts, PICTURE)
    _complete_compression(header, picture)
    if texts.character_set_fault:
        repairs.insert(0, Repair("SpecificCharacterSet", "rewritten", texts.character_set_fault))
    return SourceImage(
        study_uid=uids["StudyInstanceUID"],
        series_uid=uids["SeriesInstanceUID"],
        sop_class_uid=sop_class,
        sop_instance_uid=uids["SOPInstanceUID"],
        patient_study=patient_study,
        picture=picture,
        repairs=(*repairs, *picture_repairs),
    )


def _required_uid(texts: TextReader, keyword: str) -> str:
    found = texts.read(keyword)
    if found is None or not found.strip(" \0"):
        state = "no"
    elif is_uid(uid := found.strip(" \0")):
        return uid
    else:
        state = "an invalid"
    raise DicomError(
        f"The source image has {state} {keyword}; needed a valid one, as a result that names another can't be attached to "
        "its study. Mend the image where it was made."
    )


def _refuse_animals(header: Dataset, texts: TextReader) -> None:
    """Refuse a patient who is said to be something else than a person (PS3.3 C.7.1.1, Patient Species)."""
    present = [keyword for keyword in _SPECIES if (texts.read(keyword) or "").strip(" \0")]
    if not present:
        return
    described = (texts.read("PatientSpeciesDescription") or "").strip(" \0").upper()
    coded = {
        (TextReader(item).read("CodeValue") or "").strip(" \0")
        for item in (header.get("PatientSpeciesCodeSequence") or ())
        if isinstance(item, Dataset)
    }
    if not (described in HUMAN_NAMES or (not described and coded and coded <= HUMAN_CODES)):
        raise DicomError(
            f"The source image's {present[0]} says that the patient is no person; needed a person's radiograph, as the model "
            "was trained on nothing else."
        )


def _carried(texts: TextReader, attributes: tuple[Attribute, ...]) -> tuple[Dataset, list[Repair]]:
    """Return the valid values of some attributes, and what was done to the others."""
    kept, repairs = Dataset(), []
    for attribute in attributes:
        found = texts.read(attribute.keyword)
        values, deed, reason = _checked(attribute, found)
        if values is None and attribute.type == 2:
            values = []
            deed = "added empty" if found is None else "emptied"
        if values is not None and (values or attribute.type == 2):
            _set(kept, attribute, values)
        if deed is not None:
            repairs.append(Repair(attribute.keyword, deed, reason))
    if not _fits(kept, "ascii"):
        plain = texts.character_set
        kept.SpecificCharacterSet = plain if plain and _fits(kept, python_encoding[plain]) else "ISO_IR 192"
    return kept, repairs


def _checked(attribute: Attribute, found: str | None) -> tuple[list[str] | None, Deed | None, str]:
    """Return an attribute's valid values, none for empty and None for not to be kept, with the deed and its reason."""
    if found is None:
        return None, ("added empty" if attribute.type == 2 else None), "absent"
    parts = found.split("\\") if attribute.n_values != 1 and attribute.vr not in ("LT", "ST") else [found]
    deed, reason, values = None, "", []
    for part in parts:
        checked, part_deed = _check_one(attribute, part)
        if checked.text is None:
            return None, "left out", checked.fault or ""
        if part_deed is not None:
            deed, reason = part_deed, checked.fault or ""
        values.append(checked.text)
    if not any(values):
        return ([], None, "") if deed is None else (None, "left out", reason)
    if attribute.n_values is not None and len(values) != attribute.n_values:
        return None, "left out", f"{len(values)} values where {attribute.n_values} are needed"
    return values, deed, reason


def _check_one(attribute: Attribute, part: str) -> tuple[Checked, Deed | None]:
    checked = check_value(attribute.vr, part)
    if checked.text is None and attribute.is_description and len(part.strip(" \0")) > MAX_CHARACTERS[attribute.vr]:
        again = check_value(attribute.vr, shortened(attribute.vr, part.lstrip(" ")))
        if again.text is not None:
            return Checked(again.text, checked.fault), "shortened"
    if checked.text and attribute.terms and checked.text not in attribute.terms:
        return Checked(None, "none of the values that it may have"), None
    return checked, ("rewritten" if checked.text is not None and checked.fault else None)


def _set(kept: Dataset, attribute: Attribute, values: list[str]) -> None:
    # The value is checked already; pydicom's own check would warn, with the value, of what it knows less well.
    value = (values if len(values) > 1 else values[0]) if values else ""
    kept.add(DataElement(BaseTag(tag_for_keyword(attribute.keyword) or 0), attribute.vr, value))


def _fits(kept: Dataset, codec: str) -> bool:
    try:
        for element in kept:
            for part in element.value if isinstance(element.value, MultiValue) else [element.value]:
                str(part).encode(codec)
    except UnicodeEncodeError:
        return False
    return True


def _complete_deidentification(patient_study: Dataset) -> list[Repair]:
    """Say how identity was removed where the source says only that it was (type 1C in PS3.3 C.7.1.1)."""
    if patient_study.get("PatientIdentityRemoved") != "YES" or patient_study.get("DeidentificationMethod"):
        return []
    patient_study.DeidentificationMethod = "See the source image"
    return [Repair("DeidentificationMethod", "filled in", "absent, and needed beside PatientIdentityRemoved")]


def _complete_compression(header: Dataset, picture: Dataset) -> None:
    """Say that the source was compressed with loss where its transfer syntax does (PS3.3 C.7.6.1.1.5)."""
    meta = getattr(header, "file_meta", None)
    if meta is not None and str(meta.get("TransferSyntaxUID", "")) in _LOSSY_SYNTAXES:
        picture.LossyImageCompression = "01"


def _unknown(header: Dataset) -> Iterator[str]:
    """Yield what a header says of patient and study beyond the carried attributes."""
    carried = {attribute.keyword for attribute in PATIENT_STUDY}
    for tag in header.keys():  # noqa: SIM118 - iterating a data set itself converts its values
        keyword = keyword_for_tag(tag)
        of_patient = tag.group in (0x0010, 0x0012) and tag.element != 0  # element 0 is the group's length
        if keyword in carried or not (of_patient or keyword in STUDY_LEFT_OUT):
            continue
        element = header.get_item(tag)
        if element is not None and element.value not in (None, b"", "", []):
            yield keyword or f"({tag.group:04x},{tag.element:04x})"
