"""The picture: what it shows, that it hides nothing, and judges that did not write it."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset

from chexnet_deploy.dicom.results.identity import ImageIdentity
from chexnet_deploy.dicom.results.result import Device, Refusal, Result, encode
from chexnet_deploy.dicom.results.secondary_capture import (
    build_refusal,
    build_secondary_capture,
    caption,
    draw_capture,
)
from chexnet_deploy.dicom.results.source_header import read_source_image
from chexnet_deploy.errors import DicomError, RefusalReason
from chexnet_deploy.runtime.predictor import draw_cam
from tests.dicom.results.conftest import MADE_AT, Judge

HeaderOf = Callable[..., Dataset]
ResultFor = Callable[[Dataset], Result]


@pytest.fixture(scope="module")
def result(result_for: ResultFor, header_of: HeaderOf) -> Result:
    return result_for(header_of(PatientOrientation=b"L\\F", BodyPartExamined=b"CHEST", BurnedInAnnotation=b"NO"))


@pytest.fixture(scope="module")
def capture(result: Result, gray: np.ndarray) -> Dataset:
    """As another program reads it."""
    return pydicom.dcmread(BytesIO(encode(build_secondary_capture(result, gray, "Pneumonia"))))


def test_the_picture_stands_whole_between_the_words(capture: Dataset, result: Result, gray: np.ndarray) -> None:
    pixels = capture.pixel_array
    scaled = np.asarray(Image.fromarray(gray).resize((768, 1024), Image.Resampling.BILINEAR))  # 90 x 120 to 1024 high
    overlaid = draw_cam(scaled, result.prediction.maps["Pneumonia"])
    assert pixels.shape[1] == 768
    top = next(row for row in range(200) if (pixels[row : row + 1024] == overlaid).all())
    above, below = pixels[:top], pixels[top + 1024 :]
    assert ((above == (255, 191, 0)).all(axis=-1)).any()  # amber words
    assert ((below == 255).all(axis=-1)).any()  # white words
    for strip in (above, below):  # no word is cut off at an edge
        assert not strip[:, [0, -1]].any()
        assert not strip[[0, -1]].any()


def test_the_words(result: Result) -> None:
    assert caption(result, "Pneumonia") == [
        "Pneumonia: probability 0.4654, at or above the operating point 0.3000.",
        "Colour: evidence for this finding: none (weak), green (half), red (strongest in this picture).",
        "CheXNet fp32, bundle dddddddddddd.",
    ]
    assert caption(result, "Hernia")[0] == "Hernia: probability 0.9500, no operating point."
    result.prediction.maps["Mass"] = np.full((7, 7), -1.0, np.float32)
    assert "nothing is coloured" in caption(result, "Mass")[1]


@pytest.mark.parametrize("sides", [(40, 2000), (2000, 40), (32, 32), (1, 1)])
def test_words_fit_whatever_the_picture_s_shape(result: Result, sides: tuple[int, int]) -> None:
    drawn = draw_capture(result, np.full(sides, 7, np.uint8), "Pleural_Thickening")
    assert drawn.shape[1] >= 640
    assert not drawn[-5:].any()
    assert not drawn[-100:, -5:].any()


def test_it_says_what_it_is_made_of(capture: Dataset, result: Result) -> None:
    assert (capture.StudyInstanceUID, capture.PatientID, capture.PatientName) == (
        "1.2.3",
        "CANARY-4711",
        "Canary^Patient",
    )
    (source,) = capture.SourceImageSequence
    assert (source.ReferencedSOPInstanceUID, source.ReferencedSOPClassUID) == ("1.2.3.4.5", "1.2.840.10008.5.1.4.1.1.1")
    assert source.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
    assert result.bundle_id in capture.DerivationDescription
    assert list(capture.ImageType) == ["DERIVED", "SECONDARY", "OTHER"]
    assert list(capture.PatientOrientation) == ["L", "F"]
    assert (capture.BurnedInAnnotation, capture.PhotometricInterpretation, capture.ConversionType) == (
        "NO",
        "RGB",
        "WSD",
    )
    assert "PixelSpacing" not in capture  # nobody is to measure on it
    assert "not for diagnosis" in capture.SeriesDescription
    assert capture.InstanceNumber == 7


def test_lossy_compression_stays_declared(result_for: ResultFor, header_of: HeaderOf, gray: np.ndarray) -> None:
    lossy = result_for(header_of(LossyImageCompression=b"01", LossyImageCompressionMethod=b"ISO_10918_1"))
    built = build_secondary_capture(lossy, gray, "Mass")
    assert (built.LossyImageCompression, built.LossyImageCompressionMethod) == ("01", "ISO_10918_1")


def test_made_again_it_is_the_same_object(result: Result, gray: np.ndarray) -> None:
    first, again = (encode(build_secondary_capture(result, gray, "Nodule")) for _ in range(2))
    assert first == again
    one, other = (build_secondary_capture(result, gray, finding) for finding in ("Nodule", "Edema"))
    assert one.SOPInstanceUID != other.SOPInstanceUID
    assert one.SeriesInstanceUID == other.SeriesInstanceUID


def test_what_can_t_be_drawn_is_refused(result: Result, gray: np.ndarray) -> None:
    with pytest.raises(DicomError, match="no activation map"):
        build_secondary_capture(result, gray, "Fracture")
    for wrong in (gray.astype(np.uint16), gray[..., np.newaxis], gray[:0]):
        with pytest.raises(DicomError, match="needed uint8"):
            build_secondary_capture(result, wrong, "Mass")


@pytest.mark.slow
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_dciodvfy_finds_nothing_on_malformed_sources(
    tmp_path: Path,
    header_of: HeaderOf,
    malformed: st.SearchStrategy[dict[str, bytes | None]],
    result_for: ResultFor,
    gray: np.ndarray,
    dciodvfy: Judge,
    data: st.DataObject,
) -> None:
    path = tmp_path / "map.dcm"
    path.write_bytes(encode(build_secondary_capture(result_for(header_of(**data.draw(malformed))), gray, "Mass")))
    assert dciodvfy([path])[path] == []


def test_dciodvfy_finds_nothing_on_real_sources(
    tmp_path: Path, real_headers: list[Path], result_for: ResultFor, gray: np.ndarray, dciodvfy: Judge
) -> None:
    for source in real_headers:
        built = build_secondary_capture(result_for(pydicom.dcmread(source, stop_before_pixels=True)), gray, "Mass")
        (tmp_path / source.name).write_bytes(encode(built))
    assert set(map(str, dciodvfy(list(tmp_path.iterdir())).values())) == {"[]"}


def test_dcmtk_reads_it(tmp_path: Path, capture: Dataset, dcmtk: Callable[..., str]) -> None:
    path = tmp_path / "map.dcm"
    path.write_bytes(encode(capture))
    assert "AI result, not for diagnosis" in dcmtk("dcmdump", path)


@pytest.mark.parametrize(("evidence", "strongest"), [(0.05, None), (0.5, "green"), (1.0, "red")])
def test_the_legend_names_the_colours_that_are_drawn(evidence: float, strongest: str | None) -> None:
    # One cell has the strongest evidence of the picture, the other so much of it.
    cam = np.array([[1.0, evidence]], np.float32)
    red, green, blue = draw_cam(np.full((8, 64), 128, np.uint8), cam)[4, -1].astype(int)
    if strongest is None:  # by less than anybody sees
        assert max(red, green, blue) - min(red, green, blue) <= 8
    else:
        assert {"green": green - max(red, blue), "red": red - max(green, blue)}[strongest] >= 20


@pytest.mark.parametrize("reason", [RefusalReason.VIEW, RefusalReason.BODY_PART, RefusalReason.AGE])
def test_a_refusal_is_a_valid_object_in_the_source_s_study(
    header_of: Callable[..., Dataset],
    dciodvfy: Callable[[list[Path]], dict[Path, list[str]]],
    tmp_path: Path,
    reason: RefusalReason,
) -> None:
    words = "Found a; needed b. Next: c."
    image = ImageIdentity("e" * 64, "")
    source = read_source_image(header_of(LossyImageCompression=b"01", PatientOrientation=b"L\\F"))
    refusal = Refusal(source, image, "d" * 64, Device("SN-1"), MADE_AT, reason.value, words)
    path = tmp_path / "refusal.dcm"
    path.write_bytes(encode(build_refusal(refusal)))
    assert dciodvfy([path]) == {path: []}
    said = pydicom.dcmread(path)
    assert (said.StudyInstanceUID, said.PatientID, said.AccessionNumber) == ("1.2.3", "CANARY-4711", "A1")
    assert said.ImageComments == f"No AI result: {reason.value}"
    assert said.ReferencedImageSequence[0].ReferencedSOPInstanceUID == "1.2.3.4.5"
    assert (said.pixel_array == (255, 191, 0)).all(axis=-1).any()  # amber words
    assert not said.pixel_array[:, [0, -1]].any()  # none is cut off
    others = {build_refusal(replace(refusal, reason=other.value)).SOPInstanceUID for other in RefusalReason}
    assert len(others) == len(RefusalReason)  # one for each reason
    assert encode(build_refusal(refusal)) == path.read_bytes()
