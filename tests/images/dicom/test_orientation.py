r"""A picture that says how it lies is read upright: L\F as it is, the seven others turned or mirrored back."""

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.rigs.synthetic_dicom import WORDS, make_dicom
from chexnet_deploy.errors import ImageRefusedError, RefusalReason
from chexnet_deploy.images.dicom.decoder import Decoder, DicomImage
from chexnet_deploy.images.dicom.header import read_header


def read(words: NDArray[np.uint16], orientation: str, decoder: Decoder, view: str = "PA") -> DicomImage:
    edits = {"PatientOrientation": orientation.split("\\"), "ViewPosition": view}
    return decoder.decode(make_dicom(words, edits))


# Where the patient's upper right stands in the stored picture, how it gets there from the upright one.
LYING = {
    r"L\F": lambda upright: upright,
    r"R\F": np.fliplr,
    r"L\H": np.flipud,
    r"R\H": lambda upright: np.rot90(upright, 2),
    r"F\L": np.transpose,
    r"F\R": lambda upright: np.rot90(upright, 1),  # a quarter turn to the left: what was above stands on the left
    r"H\L": lambda upright: np.rot90(upright, -1),
    r"H\R": lambda upright: np.rot90(np.fliplr(upright), -1),
}


@pytest.mark.parametrize("said", LYING)
def test_all_eight_are_read_alike(said: str, decoder: Decoder) -> None:
    upright = read(WORDS, r"L\F", decoder).gray
    image = read(np.ascontiguousarray(LYING[said](WORDS)), said, decoder)
    np.testing.assert_array_equal(image.gray, upright)
    assert image.gray.flags.c_contiguous
    assert image.gray.flags.writeable
    # What is written about the picture that was read says how that one lies.
    assert list(image.header.read_dataset().PatientOrientation) == ["L", "F"]


@pytest.mark.parametrize("said", ["l\\f", "L \\F ", "LA\\F", "LP\\FA", "L\\FP", "LAH\\F", "\\", ""])
def test_what_lies_as_it_should(said: str, decoder: Decoder) -> None:
    if said == "LAH\\F":  # H is in the plane of the picture
        with pytest.raises(ImageRefusedError, match="tilted"):
            read(WORDS, said, decoder)
        return
    np.testing.assert_array_equal(read(WORDS, said, decoder).gray, read(WORDS, "", decoder).gray)


@pytest.mark.parametrize(
    "said",
    ["L", "F", "L\\", "\\F", "L\\L", "L\\R", "H\\F", "X\\F", "LR\\F", "LL\\F", "L\\F\\H", "CANARY", "LEFT\\FOOT"],
)
def test_what_is_no_orientation(said: str) -> None:
    content = make_dicom(edits={"PatientOrientation": said.split("\\")})
    with pytest.raises(ImageRefusedError, match="a Patient Orientation that is none") as caught:
        read_header("x", content)
    assert caught.value.reason is RefusalReason.DAMAGED_HEADER
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("said", ["LH\\FL", "L\\FR", "FL\\RF", "RF\\F", "L\\A", "A\\R"])
def test_what_no_quarter_turn_makes_upright(said: str) -> None:
    with pytest.raises(ImageRefusedError) as caught:
        read_header("x", make_dicom(edits={"PatientOrientation": said.split("\\")}))
    assert caught.value.reason is RefusalReason.VIEW
    assert said in str(caught.value)


@pytest.mark.parametrize("said", ["A\\F", "P\\F", "F\\A", "AL\\F"])
def test_a_lateral_that_calls_itself_frontal(said: str) -> None:
    for view in ("PA", "AP"):
        with pytest.raises(ImageRefusedError, match=f"view {view} with the Patient Orientation of a lateral") as caught:
            read_header("x", make_dicom(edits={"PatientOrientation": said.split("\\"), "ViewPosition": view}))
        assert caught.value.reason is RefusalReason.CONTRADICTION
    edits = {"PatientOrientation": said.split("\\"), "ViewPosition": ""}
    assert read_header("x", make_dicom(edits=edits)).view_position == "LATERAL"


@pytest.mark.parametrize(
    ("said", "turns", "upright"),
    [
        ("A\\F", 0, "A\\F"),
        ("P\\F", 0, "P\\F"),
        ("A\\H", 2, "P\\F"),
        ("F\\A", 1, "P\\F"),
        ("H\\A", -1, "A\\F"),
        ("F\\P", 1, "A\\F"),
    ],
)
def test_a_lateral_is_turned_and_never_mirrored(said: str, turns: int, upright: str, decoder: Decoder) -> None:
    lying = read(WORDS, said, decoder, "LL")
    np.testing.assert_array_equal(lying.gray, np.rot90(read(WORDS, "", decoder, "LL").gray, -turns))
    assert "\\".join(lying.header.read_dataset().PatientOrientation) == upright


def test_a_square_compressed_picture_is_turned_too(decoder: Decoder) -> None:
    words = WORDS[:40]
    turned = make_dicom(np.rot90(words).copy(), {"PatientOrientation": ["F", "R"]}, syntax="1.2.840.10008.1.2.4.70")
    np.testing.assert_array_equal(decoder.decode(turned).gray, decoder.decode(make_dicom(words)).gray)
