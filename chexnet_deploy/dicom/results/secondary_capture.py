"""Pictures with words burned in, as DICOM Secondary Captures (PS3.3 A.8.1): an activation map, or why there is no result.

For display only. A finding's map over the radiograph is scaled to LONG_SIDE_PX, without pixel spacing, so that nobody measures
on it. The words stand in strips above and below the picture and hide none of it; they name no patient.
"""

from typing import Final

import numpy as np
from highdicom.sc import SCImage
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset

from chexnet_deploy.dicom.results.result import ALGORITHM, DISCLAIMER, Refusal, Result, Statement, finish
from chexnet_deploy.errors import DicomError
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.runtime.predictor import draw_cam

SERIES_NUMBER: Final = 9102
REFUSAL_SERIES_NUMBER: Final = 9103
LONG_SIDE_PX: Final = 1024
"""Of the picture. An activation map has 7 x 7 cells; a radiologist reads the radiograph itself, not this."""
MIN_WIDTH_PX: Final = 640  # of the whole, so that a line of words fits beside a narrow picture

_FONT_PX: Final = 22
_MARGIN_PX: Final = 10
_AMBER: Final = (255, 191, 0)
_WHITE: Final = (255, 255, 255)


def build_secondary_capture(result: Result, gray: Gray, finding: str) -> Dataset:
    """Return the picture of one finding, RGB, uncompressed, with file meta information; `encode` makes its bytes.

    Args:
        result: whose prediction holds the finding's map.
        gray: the source's picture, uint8 [H, W], bone bright, as it was predicted.
        finding: one of the manifest's.

    Raises:
        DicomError: there is no map of this finding, or gray is no picture.
    """
    if finding not in result.prediction.maps:
        raise DicomError(
            f"There is no activation map of {finding!r}; needed one of {', '.join(result.prediction.maps)}. Name one of them."
        )
    if gray.dtype != np.uint8 or gray.ndim != 2 or gray.size == 0:
        raise DicomError(f"Found {gray.dtype} {list(gray.shape)}; needed uint8 [H, W]. Read it with read_image.")
    built = _build(
        result,
        draw_capture(result, gray, finding),
        role=f"secondary capture of {finding}",
        series_role="secondary capture series",
        series_number=SERIES_NUMBER,
        instance_number=result.manifest.findings.index(finding) + 1,
        series_description=f"{ALGORITHM} maps: {DISCLAIMER}",
        picture=result.source.picture,
    )
    _refer(built, result, finding)
    return built


def build_refusal(refusal: Refusal) -> Dataset:
    """Return a picture of nothing but words that says in the study why an image has no result; as build_secondary_capture."""
    above = _strip([f"No AI result: {refusal.reason.replace('-', ' ')}."], MIN_WIDTH_PX, _AMBER)
    below = _strip(
        [refusal.words, f"This says nothing about the patient. {ALGORITHM} bundle {refusal.bundle_id[:12]}."],
        MIN_WIDTH_PX,
        _WHITE,
    )
    canvas = Image.new("RGB", (MIN_WIDTH_PX, above.height + below.height))
    canvas.paste(above, (0, 0))
    canvas.paste(below, (0, above.height))
    built = _build(
        refusal,
        np.asarray(canvas),
        role=f"no result: {refusal.reason}",
        series_role="no result series",
        series_number=REFUSAL_SERIES_NUMBER,
        instance_number=1,
        series_description=f"{ALGORITHM}: no AI result",
        picture=Dataset(),
    )
    built.ImageComments = f"No AI result: {refusal.reason}"
    origin = Dataset()
    origin.ReferencedSOPClassUID = refusal.source.sop_class_uid
    origin.ReferencedSOPInstanceUID = refusal.source.sop_instance_uid
    built.ReferencedImageSequence = [origin]
    return built


def _build(
    said: Statement,
    pixels: NDArray[np.uint8],
    *,
    role: str,
    series_role: str,
    series_number: int,
    instance_number: int,
    series_description: str,
    picture: Dataset,
) -> Dataset:
    device = said.device
    built = SCImage(
        pixel_array=pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),  # required here, replaced by the source's below
        study_instance_uid=said.source.study_uid,
        series_instance_uid=said.uid(series_role),
        series_number=series_number,
        sop_instance_uid=said.uid(role),
        instance_number=instance_number,
        manufacturer=device.manufacturer,
        manufacturer_model_name=device.model_name,
        device_serial_number=device.serial_number,
        software_versions=device.software_version,
        series_description=series_description,
    )
    built.PatientOrientation = []
    built.update(picture)
    if picture.get("BodyPartExamined") != "CHEST":
        built.Laterality = ""  # unknown: what may be one of a pair must say so (PS3.3 C.7.3.1, type 2C)
    built.ConversionType = "WSD"  # made on a workstation (PS3.3 C.8.6.1)
    finish(built, said)
    built.DateOfSecondaryCapture, built.TimeOfSecondaryCapture = built.ContentDate, built.ContentTime
    return built


def draw_capture(result: Result, gray: Gray, finding: str) -> NDArray[np.uint8]:
    """Return the picture and its words, RGB uint8 [H, W, 3]."""
    height, width = gray.shape
    scale = LONG_SIDE_PX / max(height, width)
    sides = (max(1, round(width * scale)), max(1, round(height * scale)))
    scaled = np.asarray(Image.fromarray(gray).resize(sides, Image.Resampling.BILINEAR))
    overlaid = Image.fromarray(draw_cam(scaled, result.prediction.maps[finding]))
    canvas_width = max(sides[0], MIN_WIDTH_PX)
    above = _strip([f"{DISCLAIMER}. Read the radiograph itself."], canvas_width, _AMBER)
    below = _strip(caption(result, finding), canvas_width, _WHITE)
    canvas = Image.new("RGB", (canvas_width, above.height + overlaid.height + below.height))
    canvas.paste(above, (0, 0))
    canvas.paste(overlaid, ((canvas_width - sides[0]) // 2, above.height))
    canvas.paste(below, (0, above.height + overlaid.height))
    return np.asarray(canvas)


def caption(result: Result, finding: str) -> list[str]:
    """Return the lines below the picture."""
    # draw_cam's blue end is transparent, so nobody sees blue.
    evidence = "Colour: evidence for this finding: none (weak), green (half), red (strongest in this picture)."
    if float(result.prediction.maps[finding].max()) <= 0.0:
        evidence = "No place in this picture speaks for this finding, so nothing is coloured."
    return [
        f"{finding.replace('_', ' ')}: probability {result.prediction.probabilities[finding]:.4f}, {result.decision(finding)}.",
        evidence,
        f"{ALGORITHM} {result.manifest.precision.value}, bundle {result.bundle_id[:12]}"
        f"{'' if result.points.site is None else f', operating points of site {result.points.site[:12]}'}.",
    ]


def _strip(lines: list[str], width_px: int, colour: tuple[int, int, int]) -> Image.Image:
    """Return lines of words on black, broken where they would not fit."""
    font = ImageFont.load_default(_FONT_PX)
    room_px = width_px - 2 * _MARGIN_PX
    broken: list[str] = []
    for line in lines:
        current = ""
        for word in line.split(" "):
            longer = f"{current} {word}".strip()
            if current and font.getlength(longer) > room_px:
                broken.append(current)
                longer = word
            current = longer
        broken.append(current)
    line_px = round(_FONT_PX * 1.3)
    strip = Image.new("RGB", (width_px, 2 * _MARGIN_PX + line_px * len(broken)))
    draw = ImageDraw.Draw(strip)
    for row, line in enumerate(broken):
        draw.text((_MARGIN_PX, _MARGIN_PX + row * line_px), line, fill=colour, font=font)
    return strip


def _refer(built: Dataset, result: Result, finding: str) -> None:
    """Say what the picture was made of and how (PS3.3 C.7.6.1 and C.12.4)."""
    origin = Dataset()
    origin.ReferencedSOPClassUID = result.source.sop_class_uid
    origin.ReferencedSOPInstanceUID = result.source.sop_instance_uid
    origin.PurposeOfReferenceCodeSequence = [CodedConcept("121322", "DCM", "Source of Image Processing Operation")]
    built.SourceImageSequence = [origin]
    built.DerivationCodeSequence = [CodedConcept("130402", "DCM", "Class activation")]
    built.DerivationDescription = (
        f"Class activation map of {finding} over the source image, scaled, with words added. "
        f"{ALGORITHM} bundle {result.bundle_id}."
    )
