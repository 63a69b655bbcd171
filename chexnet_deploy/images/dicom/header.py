"""Read what the header of a DICOM radiograph says, and refuse what no radiograph's header says.

The pixels are not touched: nothing here runs a codec. Whether the radiograph is one the model is meant for is
scope.py's business.
"""

import io
import math
import re
import struct
from dataclasses import dataclass, field
from datetime import date
from typing import Final

import pydicom

from chexnet_deploy.errors import RefusalReason
from chexnet_deploy.images.dicom.codestreams import (
    JPEG_2000,
    JPEG_BASELINE,
    JPEG_EXTENDED,
    JPEG_LOSSLESS,
    JPEG_LS,
    RLE,
    check_pixel_data,
)
from chexnet_deploy.images.dicom.elements import IMPLICIT_LITTLE_ENDIAN, PIXEL_DATA, Element, Values, read_structure
from chexnet_deploy.images.dicom.grayscale import Grayscale, read_grayscale
from chexnet_deploy.images.dicom.orientation import Orientation, read_orientation
from chexnet_deploy.images.gray import MAX_FILE_MIB, MAX_PIXELS, MIN_SIDE_PX
from chexnet_deploy.images.preprocessing import Resizing

UNCOMPRESSED: Final = frozenset({IMPLICIT_LITTLE_ENDIAN, "1.2.840.10008.1.2.1"})
TRANSFER_SYNTAXES: Final = UNCOMPRESSED | JPEG_LOSSLESS | JPEG_LS | JPEG_2000 | {JPEG_BASELINE, JPEG_EXTENDED, RLE}
"""Not big endian (retired), not deflated (no modality sends it, and it can unpack a thousandfold); docs/reading-files.md has
the others."""

# Digital X-ray, mammography and intra-oral images For Processing (PS3.4 table B.5-1).
_FOR_PROCESSING: Final = frozenset(f"1.2.840.10008.5.1.4.1.1.1.{which}.1" for which in (1, 2, 3))
_AGE: Final = re.compile(r"(\d{1,5}(?:\.\d*)?) *([DWMY]?)")
_UNITS_IN_A_YEAR: Final = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0, "": 1.0}
_OLDEST_YEARS: Final = 150
_DATE: Final = re.compile(r"([0-9]{4})([.-]?)([0-9]{2})\2([0-9]{2})")
_NUMBERS: Final = {"US": "<H", "SS": "<h", "UL": "<I", "SL": "<i", "FL": "<f", "FD": "<d"}  # PS3.5 table 6.2-1
# Code value -> what View Position (0018,5101) says of the same view (PS3.16 CID 4010; SNOMED CT, then SNOMED RT).
_VIEW_CODES: Final = {"399348003": "AP", "R-10206": "AP", "272479007": "PA", "R-10214": "PA"}
# Chest and thorax (PS3.16 CID 4009), in the editions' codes.
_CHEST_CODES: Final = frozenset({"816094009", "51185008", "T-D3000"})
HUMAN_CODES: Final = frozenset({"337915000", "30996001", "L-85B00"})
HUMAN_NAMES: Final = frozenset({"HUMAN", "HOMO SAPIENS", "MAN"})


@dataclass(frozen=True, eq=False, slots=True)
class DicomHeader:
    """What is known of a radiograph before its pixels are decoded.

    Strings are as stored, without padding; where a type 2 or 3 attribute is empty or not valid, None.

    Attributes:
        sop_class_uid: (0008,0016).
        sop_instance_uid: (0008,0018); names this very image.
        study_instance_uid: (0020,000D).
        series_instance_uid: (0020,000E).
        modality: (0008,0060), e.g. "DX".
        body_part: (0018,0015); where it is absent, "CHEST" if the Anatomic Region Sequence says chest or thorax.
        view_position: (0018,5101), e.g. "PA"; where it is absent, "AP" or "PA" if the View Code Sequence says so, or
            "LATERAL" if Patient Orientation does.
        orientation: (0020,0020), which way the stored picture lies; None where it is empty.
        patient_age_years: completed years at the study: (0010,1010), or from the dates of birth and study.
        has_unreadable_age: there is one, but it says nothing.
        patient_is_animal: a species other than man, or a breed, is named.
        presentation_intent: (0008,0068); "FOR PRESENTATION" or None.
        photometric_interpretation: "MONOCHROME1" or "MONOCHROME2".
        transfer_syntax_uid: (0002,0010).
        rows: H.
        columns: W.
        bits_stored: of each pixel.
        number_of_frames: 1.
        has_burned_in_annotation: (0028,0301).
        is_lossy: (0028,2110): lossy compression took place some time, or the transfer syntax is a lossy one.
        grayscale: how stored values become gray.
        n_smaller: how many smaller pictures of it a JPEG 2000 codestream holds, each of half the sides of the one before, that
            may stand for it.
        raw: the file up to its pixel data.
        pixel_data: (7FE0,0010); of compressed pixels with their item tags.
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    modality: str | None
    body_part: str | None
    view_position: str | None
    orientation: Orientation | None
    patient_age_years: int | None = field(repr=False)
    has_unreadable_age: bool
    patient_is_animal: bool
    presentation_intent: str | None
    photometric_interpretation: str
    transfer_syntax_uid: str
    rows: int
    columns: int
    bits_stored: int
    number_of_frames: int
    has_burned_in_annotation: bool | None
    is_lossy: bool
    grayscale: Grayscale
    n_smaller: int
    raw: bytes = field(repr=False)
    pixel_data: memoryview = field(repr=False)

    @property
    def is_compressed(self) -> bool:
        """Whether a codec is needed."""
        return self.transfer_syntax_uid not in UNCOMPRESSED

    def halvings(self, resizing: Resizing | None) -> int:
        """Return how often the sides are halved in decoding, for what the picture is read for."""
        return 0 if resizing is None else min(resizing.halvings(self.rows, self.columns), self.n_smaller)

    def read_dataset(self) -> pydicom.FileDataset:
        """Return the data set without pixel data, e.g. for what is written about this image; holds the patient's name.

        Patient Orientation is that of the picture as it is read, upright.
        """
        dataset = pydicom.dcmread(io.BytesIO(self.raw))
        if self.orientation is not None and not self.orientation.is_upright:
            upright = self.orientation.upright()
            dataset.PatientOrientation = [upright.rows, upright.columns]
        return dataset


def read_header(name: object, content: bytes) -> DicomHeader:
    """Return the header of one radiograph, having compared it with the pixel data's own headers.

    Args:
        name: what messages call it: a path, or "the DICOM object".
        content: the whole file.

    Raises:
        ImageRefusedError: for any reason but DECODE_FAILED, DECODE_TIMEOUT and those of scope.
    """
    if len(content) > MAX_FILE_MIB * 2**20:
        found = f"{len(content):,} bytes"
        raise Values(name, {}).refuse(RefusalReason.TOO_LARGE, found, f"at most {MAX_FILE_MIB} MiB", "check the sender")
    structure = read_structure(name, content, TRANSFER_SYNTAXES)
    values = Values(name, structure.elements)
    _check_intent(values)
    rows, columns, pixel_data = _read_matrix(values)
    grayscale = read_grayscale(values)
    n_smaller = check_pixel_data(values, structure.transfer_syntax_uid, pixel_data, rows, columns, grayscale)
    is_animal = _is_animal(values)
    orientation = None if is_animal else read_orientation(values)  # a quadruped's has other letters
    age_years, has_unreadable_age = _read_age_years(values)
    return DicomHeader(
        sop_class_uid=values.uid(0x00080016, "SOP Class UID"),
        sop_instance_uid=values.uid(0x00080018, "SOP Instance UID"),
        study_instance_uid=values.uid(0x0020000D, "Study Instance UID"),
        series_instance_uid=values.uid(0x0020000E, "Series Instance UID"),
        modality=values.code(0x00080060),
        body_part=_read_body_part(values),
        view_position=_read_view(values, orientation),
        orientation=orientation,
        patient_age_years=age_years,
        has_unreadable_age=has_unreadable_age,
        patient_is_animal=is_animal,
        presentation_intent=values.code(0x00080068),
        photometric_interpretation="MONOCHROME1" if grayscale.is_inverted else "MONOCHROME2",
        transfer_syntax_uid=structure.transfer_syntax_uid,
        rows=rows,
        columns=columns,
        bits_stored=grayscale.bits_stored,
        number_of_frames=1,
        has_burned_in_annotation={"YES": True, "NO": False}.get(values.code(0x00280301) or ""),
        is_lossy=values.text(0x00282110) == "01" or structure.transfer_syntax_uid in (JPEG_BASELINE, JPEG_EXTENDED),
        grayscale=grayscale,
        n_smaller=n_smaller if grayscale.is_smooth else 0,
        raw=structure.header,
        pixel_data=pixel_data.value,
    )


def _check_intent(values: Values) -> None:
    if values.code(0x00080068) == "FOR PROCESSING" or values.text(0x00080016) in _FOR_PROCESSING:
        needed, next_step = "an image For Presentation", "have the modality send its processed image"
        raise values.refuse(RefusalReason.FOR_PROCESSING, "raw detector data (For Processing)", needed, next_step)


def _read_matrix(values: Values) -> tuple[int, int, Element]:
    """Return rows, columns and the pixel data of the one frame."""
    pixel_data = values.element(PIXEL_DATA)
    if pixel_data is None:
        needed = "Pixel Data (7FE0,0010) of integers"
        raise values.refuse(RefusalReason.NO_PIXELS, "no pixel data", needed, "send the image itself")
    rows = values.required_uint16(0x00280010, "Rows")
    columns = values.required_uint16(0x00280011, "Columns")
    found = f"{columns} x {rows} px"
    if min(rows, columns) < MIN_SIDE_PX:
        needed = f"sides of at least {MIN_SIDE_PX} px"
        raise values.refuse(RefusalReason.TOO_SMALL, found, needed, "check that it is a radiograph")
    if rows * columns > MAX_PIXELS:
        needed = f"at most {MAX_PIXELS:,} pixels"
        raise values.refuse(RefusalReason.TOO_LARGE, found, needed, "send it at a lower resolution")
    if values.text(0x00280008) not in (None, "1"):
        needed, next_step = "one frame", "send the radiograph on its own"
        raise values.refuse(RefusalReason.MULTI_FRAME, "another number of frames than 1", needed, next_step)
    return rows, columns, pixel_data


def _read_body_part(values: Values) -> str | None:
    stated = values.code(0x00180015)
    if stated is None and any(item.text(0x00080100) in _CHEST_CODES for item in values.items(0x00082218)):
        return "CHEST"
    return stated


def _read_view(values: Values, orientation: Orientation | None) -> str | None:
    stated = values.code(0x00185101)
    coded = next((_VIEW_CODES.get(item.text(0x00080100) or "") for item in values.items(0x00540220)), None)
    if stated is not None and coded is not None and stated != coded:
        needed = "one view (PS3.3 section C.8.11.5)"
        next_step = "have the examination corrected at the modality"
        raise values.refuse(RefusalReason.CONTRADICTION, "View Position and View Code of two views", needed, next_step)
    view = stated or coded
    if orientation is None or not orientation.is_lateral:
        return view
    if view in ("AP", "PA"):
        found, needed = f"view {view} with the Patient Orientation of a lateral", "one view"
        next_step = "have the examination corrected at the modality"
        raise values.refuse(RefusalReason.CONTRADICTION, found, needed, next_step)
    return view or "LATERAL"


def _read_age_years(values: Values) -> tuple[int | None, bool]:
    """Return completed years, or None; and whether an age is there that can't be read.

    An age string (PS3.5 table 6.2-1) may lack its leading zeros or be written as a number; a number alone is in years, as
    RSNA's collections write it.
    """
    stated = _age_texts(values)
    if any(stated):
        match = _AGE.fullmatch(stated[0].upper()) if len(stated) == 1 else None
        years = float(match[1]) / _UNITS_IN_A_YEAR[match[2]] if match else math.inf
        return (None, True) if years >= _OLDEST_YEARS + 1 else (int(years), False)
    try:
        born = _read_date(values, 0x00100030)
        # Of the study, series, acquisition or content: the first that is given.
        dates = (_read_date(values, tag) for tag in (0x00080020, 0x00080021, 0x00080022, 0x00080023))
        studied = next(filter(None, dates), None)
    except ValueError:
        return None, True
    if born is None or studied is None:
        return None, False
    years = studied.year - born.year - ((studied.month, studied.day) < (born.month, born.day))
    return (years, False) if 0 <= years <= _OLDEST_YEARS else (None, True)


def _age_texts(values: Values) -> tuple[str, ...]:
    element = values.element(0x00101010)
    form = None if element is None else _NUMBERS.get(element.vr)
    if element is None or form is None:
        return values.texts(0x00101010)
    is_one = len(element.value) == struct.calcsize(form)
    return (str(struct.unpack(form, element.value)[0]) if is_one else "no number",)


def _read_date(values: Values, tag: int) -> date | None:
    """Return a date, or None where there is none; raise ValueError for what isn't one. Points were allowed until 1993."""
    text = values.text(tag)
    if text is None:
        return None
    match = _DATE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return date(int(match[1]), int(match[3]), int(match[4]))


def _is_animal(values: Values) -> bool:
    """Return whether the veterinary attributes (PS3.3 table C.7-1) name an animal; most files leave them out."""
    species = (values.text(0x00102201) or "").upper()
    codes = [item.text(0x00080100) for item in values.items(0x00102202)]
    if values.code(0x00102210) == "QUADRUPED":
        return True
    has_breed = values.text(0x00102292) is not None or bool(values.items(0x00102293))
    return (species != "" and species not in HUMAN_NAMES) or any(c not in HUMAN_CODES for c in codes) or has_breed
