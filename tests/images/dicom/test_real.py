"""Files of real modalities and of NEMA's compression samples, none of them made here."""

from pathlib import Path

import numpy as np
import pydicom
import pytest

from chexnet_deploy.errors import ImageRefusedError, RefusalReason
from chexnet_deploy.images.dicom.decoder import Decoder
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.images.scope import ScopePolicy

pytestmark = pytest.mark.dicom_samples


def gray(decoder: Decoder, folder: Path, name: str) -> Gray:
    return decoder.decode(folder / f"{name}.dcm").gray


def test_the_chest_is_the_same_uncompressed_and_in_jpeg_2000(decoder: Decoder, real_dicom: Path) -> None:
    plain = gray(decoder, real_dicom, "RG1_UNCR")
    assert plain.shape == (1955, 1841)
    np.testing.assert_array_equal(gray(decoder, real_dicom, "RG1_J2KR"), plain)


def test_the_chest_in_near_lossless_jpeg_ls(decoder: Decoder, real_dicom: Path) -> None:
    # Off by at most 4 of 32768 stored values: less than one gray in 117, so rounding can differ by 1.
    difference = gray(decoder, real_dicom, "RG1_JLSN").astype(int) - gray(decoder, real_dicom, "RG1_UNCR")
    assert np.abs(difference).max() == 1
    assert (difference != 0).mean() < 0.05


@pytest.mark.parametrize("syntax", ["JLSL", "JPLL", "RLE"])
def test_the_hip_is_the_same_in_four_lossless_syntaxes(decoder: Decoder, real_dicom: Path, syntax: str) -> None:
    np.testing.assert_array_equal(
        gray(decoder, real_dicom, f"RG2_hip_{syntax}"), gray(decoder, real_dicom, "RG2_hip_J2KR")
    )


def test_monochrome1_comes_out_with_bone_bright(decoder: Decoder, real_dicom: Path) -> None:
    shown = gray(decoder, real_dicom, "RG1_UNCR")
    stored = pydicom.dcmread(real_dicom / "RG1_UNCR.dcm").pixel_array.astype(np.float64)
    # By hand: window 15000 / 30000 (LINEAR), then the lowest value white.
    by_hand = np.floor((1.0 - np.clip((stored - 14999.5) / 29999 + 0.5, 0.0, 1.0)) * 255 + 0.5)
    np.testing.assert_array_equal(shown, by_hand)
    spine, lung = shown[800:1100, 880:960], shown[500:700, 450:600]
    assert spine.mean() > lung.mean() + 40


def test_baseline_jpeg_as_stored(decoder: Decoder, real_dicom: Path) -> None:
    name = "RSNA_CR_chestPA_JPEGbaseline_8bit"
    image = decoder.decode(real_dicom / f"{name}.dcm", scope=ScopePolicy())
    np.testing.assert_array_equal(image.gray, pydicom.dcmread(real_dicom / f"{name}.dcm").pixel_array)
    assert image.header.is_lossy
    assert image.header.patient_age_years == 62  # written as "62"


@pytest.mark.parametrize("name", ["offis_mlut_18_ModalityLUT", "offis_vlut_04_VOILUT"])
def test_test_patterns_with_look_up_tables(decoder: Decoder, real_dicom: Path, name: str) -> None:
    made = gray(decoder, real_dicom, name)
    dataset = pydicom.dcmread(real_dicom / f"{name}.dcm")
    sequence = dataset.get("ModalityLUTSequence") or dataset.VOILUTSequence
    n_entries, first, bits = sequence[0].LUTDescriptor
    raw = sequence[0]["LUTData"]
    entries = np.frombuffer(raw.value, "<u2") if isinstance(raw.value, bytes) else np.array(raw.value)
    index = np.clip(dataset.pixel_array.astype(int) - first, 0, (n_entries or 65536) - 1)
    np.testing.assert_array_equal(made, np.floor(entries[index] / (2**bits - 1) * 255 + 0.5))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RG2_hip_RLE", RefusalReason.BODY_PART),
        ("highdicom_DX_thorax_dog_MONO1", RefusalReason.VIEW),
        ("offis_vlut_04_VOILUT", RefusalReason.MODALITY),
    ],
)
def test_out_of_scope(decoder: Decoder, real_dicom: Path, name: str, reason: RefusalReason) -> None:
    with pytest.raises(ImageRefusedError) as caught:
        decoder.decode(real_dicom / f"{name}.dcm", scope=ScopePolicy())
    assert caught.value.reason is reason


def test_the_dog_is_refused_by_its_age_where_any_view_is_accepted(decoder: Decoder, real_dicom: Path) -> None:
    # No species is named; it is five years old, and no dog reaches eighteen often.
    with pytest.raises(ImageRefusedError) as caught:
        decoder.decode(real_dicom / "highdicom_DX_thorax_dog_MONO1.dcm", scope=ScopePolicy(accepts_unknown_view=True))
    assert caught.value.reason is RefusalReason.AGE


def test_chests_are_in_scope(decoder: Decoder, real_dicom: Path) -> None:
    for name in ("RG1_UNCR", "RG1_J2KR", "RG1_JLSN", "RSNA_CR_chestPA_JPEGbaseline_8bit"):
        assert decoder.decode(real_dicom / f"{name}.dcm", scope=ScopePolicy()).header.view_position == "PA"
