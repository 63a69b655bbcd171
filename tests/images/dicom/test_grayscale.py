"""From stored values to gray: every figure can be worked out on paper."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from benchmarks.rigs.synthetic_dicom import WORDS, make_dicom
from chexnet_deploy.errors import ImageRefusedError, RefusalReason
from chexnet_deploy.images.dicom.grayscale import Grayscale, Lut, Rescale, VoiFunction, Window
from chexnet_deploy.images.dicom.header import read_header


def grayscale(words: NDArray[Any] = WORDS, **edits: Any) -> Grayscale:
    return read_header("x", make_dicom(words, edits)).grayscale


def grays(words: list[int], dtype: type = np.uint16, **edits: Any) -> list[int]:
    picture = np.zeros((32, 32), dtype)
    picture[0, : len(words)] = words
    made = grayscale(picture, **edits)
    shown = made.apply(picture.view(f"u{picture.itemsize}"))
    assert (shown.dtype, shown.shape, shown.flags.c_contiguous, shown.flags.writeable) == (
        np.uint8,
        (32, 32),
        True,
        True,
    )
    return shown[0, : len(words)].tolist()  # type: ignore[no-any-return]


def lut(entries: list[int], first: int, bits: int, vr: str = "US", data_vr: str = "US") -> list[Dataset]:
    made = Dataset()
    made.add_new(0x00283002, vr, [len(entries) % 65536, first, bits])
    value: Any = entries if data_vr == "US" else np.array(entries, "<u2" if data_vr == "OW" else "u1").tobytes()
    made.add_new(0x00283006, "US" if data_vr == "US" else "OW", value)
    return [made]


def test_8_bits_without_a_window_are_kept() -> None:
    assert grays([0, 1, 127, 128, 254, 255], np.uint8) == [0, 1, 127, 128, 254, 255]


def test_12_bits_without_a_window_are_the_whole_range() -> None:
    # 4095 / 255 = 16.06 stored values a gray: 8 / 4095 * 255 = 0.498 -> 0, 9 -> 0.56 -> 1.
    assert grays([0, 8, 9, 2048, 4095]) == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(
    "edits",
    [
        {"BitsStored": 16, "HighBit": 15},
        {"BitsStored": 14, "HighBit": 13},
        {"BitsStored": 12, "HighBit": 11},
        {"BitsStored": 16, "HighBit": 15, "RescaleSlope": 3, "RescaleIntercept": -7},
        {"BitsStored": 16, "HighBit": 15, "PixelPaddingValue": 65535},
    ],
)
def test_without_a_window_darkest_to_brightest_whatever_bits_stored_says(edits: dict[str, Any]) -> None:
    # 0..1000 of 10 bits: 500 -> 127.5 -> 128, as a 16-bit PNG of the same values is read.
    assert grays([0, 2, 500, 1000], **edits) == [0, 1, 128, 255]


def test_signed_bits_that_are_not_used() -> None:
    # The rest of the picture is 0; -500 is darkest.
    assert grays([-500, 0, 500], np.int16, BitsStored=16, HighBit=15) == [0, 128, 255]


def test_padding_does_not_count_as_darkest_or_brightest() -> None:
    edits = {"BitsStored": 16, "HighBit": 15, "PixelPaddingValue": 65535}
    assert grays([0, 500, 1000, 65535], **edits) == [0, 128, 255, 0]


def test_monochrome1_is_inverted_once() -> None:
    assert grays([0, 1, 255], np.uint8, PhotometricInterpretation="MONOCHROME1") == [255, 254, 0]
    both = {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}
    assert grays([0, 1, 255], np.uint8, **both) == [255, 254, 0]
    assert grays([0, 1, 255], np.uint8, PresentationLUTShape="IDENTITY") == [0, 1, 255]


@pytest.mark.parametrize(
    ("photometric", "shape"), [("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE"), ("MONOCHROME2", "LIN OD")]
)
def test_a_presentation_that_contradicts_itself_is_refused(photometric: str, shape: str) -> None:
    with pytest.raises(ImageRefusedError, match="Presentation LUT Shape") as caught:
        grayscale(PhotometricInterpretation=photometric, PresentationLUTShape=shape)
    assert caught.value.reason is RefusalReason.CONTRADICTION


def test_what_stands_above_the_stored_bits_is_masked() -> None:
    assert grays([0xF000, 0xF008, 0x1800, 0xFFFF]) == grays([0, 8, 0x800, 0xFFF])


def test_a_shifted_high_bit() -> None:
    assert grays([0x0000, 0x0080, 0x8000, 0xFFF0], HighBit=15) == grays([0, 8, 0x800, 0xFFF])


def test_signed_values() -> None:
    # 12 bits: -2048..2047; garbage above the sign makes no difference.
    assert grays([-2048, 0, 2047], np.int16) == [0, 128, 255]
    assert grays([0x0800, 0x0000, 0x07FF - 0x1000], np.int16) == [0, 128, 255]


def test_linear_window() -> None:
    # PS3.3 C.11.2.1.2: c = 2048, w = 4096 shows 0..4095 as 0..255.
    assert grays([0, 8, 9, 2048, 4095], WindowCenter=2048, WindowWidth=4096) == [0, 0, 1, 128, 255]
    # c = 100, w = 11: (x - 99.5) / 10 + 0.5: 94 and below black, 105 and above white; 99 -> 0.45 * 255 = 114.75.
    edits = {"WindowCenter": 100, "WindowWidth": 11}
    assert grays([0, 94, 95, 99, 100, 104, 105, 4095], **edits) == [0, 0, 13, 115, 140, 242, 255, 255]


def test_linear_exact_window() -> None:
    # (x - 100) / 10 + 0.5: 95 -> 0, 100 -> 0.5, 105 -> 1.
    edits = {"WindowCenter": 100, "WindowWidth": 10, "VOILUTFunction": "LINEAR_EXACT"}
    assert grays([94, 95, 96, 100, 105, 106], **edits) == [0, 0, 26, 128, 255, 255]


def test_sigmoid_window() -> None:
    # 1 / (1 + exp(-4 (x - 100) / 10)): 100 -> 0.5; 105 -> 1 / (1 + e**-2) = 0.8808 -> 224.6.
    edits = {"WindowCenter": 100, "WindowWidth": 10, "VOILUTFunction": "SIGMOID"}
    assert grays([0, 95, 100, 105, 4095], **edits) == [0, 30, 128, 225, 255]


def test_a_window_of_width_1_is_a_threshold() -> None:
    assert grays([99, 100, 101], WindowCenter=100, WindowWidth=1) == [0, 255, 255]  # x > c - 0.5


def test_the_first_of_several_windows() -> None:
    several = grays([95, 100], WindowCenter=[100, 2000], WindowWidth=[11, 4000])
    assert several == grays([95, 100], WindowCenter=100, WindowWidth=11)


@pytest.mark.parametrize(
    "edits",
    [
        {"WindowCenter": 100, "WindowWidth": 0},
        {"WindowCenter": 100, "WindowWidth": -5},
        {"WindowCenter": 100, "WindowWidth": 0.5},
        {"WindowCenter": 100, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 100, "WindowWidth": -1, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 100},
        {"WindowWidth": 100},
        {"WindowCenter": 100, "WindowWidth": 10, "VOILUTFunction": "CUBIC"},
        {"RescaleSlope": 2},
        {"RescaleSlope": -1},
        {"RescaleIntercept": 1},
        {"RescaleSlope": 0, "RescaleIntercept": 1},
        {"RescaleSlope": "1e30", "RescaleIntercept": 1},
    ],
)
def test_windows_and_rescales_that_mean_nothing(edits: dict[str, Any]) -> None:
    with pytest.raises(ImageRefusedError) as caught:
        grayscale(**edits)
    assert caught.value.reason is RefusalReason.GRAYSCALE


@pytest.mark.parametrize(
    "edits",
    [
        {"RescaleSlope": 1},
        {"RescaleIntercept": 0},
        {"RescaleSlope": "1.000", "RescaleIntercept": ""},
        {"RescaleSlope": "", "RescaleIntercept": "-0"},
        {"RescaleSlope": "", "RescaleIntercept": ""},
    ],
)
def test_half_an_identity_is_the_identity(edits: dict[str, Any]) -> None:
    assert grayscale(**edits).modality is None
    assert grays([0, 500, 1000], **edits) == [0, 128, 255]


def test_rescale_comes_before_the_window() -> None:
    # 2 x - 1000: 500 -> 0, 1012 -> 1024. Window 512 / 1025 in these units: (v - 511.5) / 1024 + 0.5 = v / 1024.
    edits = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 512, "WindowWidth": 1025}
    assert grays([500, 756, 1012], **edits) == [0, 128, 255]


def test_a_negative_slope_turns_the_values_and_not_the_window() -> None:
    # v = 4095 - x, whole range shown: 0 is brightest. pydicom's apply_windowing would turn it round again.
    turned = {"RescaleSlope": -1, "RescaleIntercept": 4095}
    assert grays([0, 2047, 4095], **turned) == [255, 128, 0]
    assert grays([0, 2047, 4095], **turned, WindowCenter=2048, WindowWidth=4096) == [255, 128, 0]


def test_a_modality_lut_comes_before_the_window() -> None:
    # 10 -> 0, 11 -> 512, 12 -> 1023; below and above the ends. 10 bits out, whole range: 512 / 1023 * 255 = 127.6.
    table = {"ModalityLUTSequence": lut([0, 512, 1023], 10, 10)}
    assert grays([0, 10, 11, 12, 4095], **table) == [0, 0, 128, 255, 255]
    assert grays([10, 11, 12], **table, WindowCenter=513, WindowWidth=2) == [0, 0, 255]


def test_a_modality_lut_and_a_rescale_are_one_too_many() -> None:
    with pytest.raises(ImageRefusedError, match="one of them"):
        grayscale(ModalityLUTSequence=lut([0, 1], 0, 8), RescaleSlope=1, RescaleIntercept=0)


@pytest.mark.parametrize("data_vr", ["US", "OW", "OW 8 bit"])
def test_a_voi_lut_wins_over_a_window(data_vr: str) -> None:
    edits = {"VOILUTSequence": lut([0, 51, 102, 255], 100, 8, data_vr=data_vr), "WindowCenter": 1, "WindowWidth": 1}
    assert grays([0, 100, 101, 102, 103, 4095], **edits) == [0, 0, 51, 102, 255, 255]


def test_an_8_bit_voi_lut_of_more_than_256_entries_does_not_wrap() -> None:
    # Entry i is i // 4; pydicom's apply_voi gives 300 % 256 // 4 = 11 for 300.
    edits = {"VOILUTSequence": lut([i // 4 for i in range(1024)], 0, 8)}
    assert grays([0, 100, 300, 1000, 4095], **edits) == [0, 25, 75, 250, 255]


def test_a_lut_that_begins_below_zero() -> None:
    edits = {"VOILUTSequence": lut([0, 100, 255], -1, 8, vr="SS")}
    assert grays([-5, -1, 0, 1, 9], np.int16, **edits) == [0, 0, 100, 255, 255]


def test_a_lut_of_65536_entries() -> None:
    edits = {"VOILUTSequence": lut(list(range(65536)), 0, 16, data_vr="OW"), "BitsStored": 16, "HighBit": 15}
    assert grays([0, 257, 65535], **edits) == [0, 1, 255]


@pytest.mark.parametrize("declared", [16, 15, 12, 10, 8, 7, 0, 17, 65535])
def test_the_greatest_entry_decides_whatever_bits_are_declared(declared: int) -> None:
    # Entries to 4095 are of 12 bits: 2048 / 4095 * 255 = 127.5.
    edits = {"VOILUTSequence": lut([0, 1024, 2048, 4095], 10, declared)}
    assert grays([0, 10, 11, 12, 13], **edits) == [0, 0, 64, 128, 255]


@pytest.mark.parametrize(
    ("greatest", "shown"),
    [
        (255, 255),
        (100, 100),  # 8 bits at least
        (300, 150),  # of 511
        (1023, 255),
        (3000, 187),  # of 4095: a table needn't reach white
        (4096, 255),  # the end of 12 bits, by one too many
        (40000, 156),  # of 65535
        (65535, 255),
    ],
)
def test_the_bits_that_a_table_needs(greatest: int, shown: int) -> None:
    assert grays([10, 11], VOILUTSequence=lut([0, greatest], 10, 16)) == [0, shown]


def test_a_modality_lut_of_other_bits_than_it_declares() -> None:
    # Without a window, darkest to brightest.
    assert grays([0, 11, 12], ModalityLUTSequence=lut([0, 512, 1024], 10, 16)) == [0, 128, 255]


@pytest.mark.parametrize("which", ["LUTDescriptor", "LUTData"])
def test_half_a_lut(which: str) -> None:
    table = lut([0, 1], 0, 8)
    delattr(table[0], which)
    with pytest.raises(ImageRefusedError, match="without descriptor or data"):
        grayscale(VOILUTSequence=table)


def test_a_lut_shorter_than_it_says() -> None:
    table = lut([0, 1, 2, 3], 0, 8)
    table[0].LUTDescriptor = [1000, 0, 8]
    with pytest.raises(ImageRefusedError, match="1,000 entries in 8 bytes"):
        grayscale(VOILUTSequence=table)


def test_padding_is_black_and_leaves_the_rest() -> None:
    edits = {"PhotometricInterpretation": "MONOCHROME1"}
    assert grays([0, 1, 255], np.uint8, **edits, PixelPaddingValue=0) == [0, 254, 0]
    assert grays([0, 1, 2, 3], np.uint8, **edits, PixelPaddingValue=2, PixelPaddingRangeLimit=1) == [255, 0, 0, 252]


def test_padding_that_the_stored_bits_cannot_hold() -> None:
    assert grays([0xFFFF, 0x0FFF], PixelPaddingValue=65535) == [0, 255]
    assert grays([-32768, 2047], np.int16, PixelPaddingValue=-32768) == [0, 255]


def test_the_same_picture_with_other_bits() -> None:
    # A 10-bit ramp, then the same ramp as the upper bits of 12 with a window for it: metamorphic, no figure needed.
    ramp = np.arange(1024, dtype=np.uint16).reshape(32, 32)
    narrow = grayscale(ramp, BitsStored=10, HighBit=9).apply(ramp)
    shifted = grayscale(ramp << 6, BitsStored=10, HighBit=15).apply(ramp << 6)
    np.testing.assert_array_equal(narrow, shifted)
    assert len(np.unique(narrow)) == 256


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0}, RefusalReason.COLOUR),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, RefusalReason.COLOUR),
        ({"PhotometricInterpretation": None}, RefusalReason.COLOUR),
        ({"BitsStored": 17}, RefusalReason.BIT_DEPTH),
        ({"BitsStored": 7, "HighBit": 6}, RefusalReason.BIT_DEPTH),
        ({"HighBit": 10}, RefusalReason.BIT_DEPTH),
        ({"HighBit": 16}, RefusalReason.BIT_DEPTH),
        ({"BitsAllocated": 32}, RefusalReason.BIT_DEPTH),
        ({"PixelRepresentation": 2}, RefusalReason.DAMAGED_HEADER),
        ({"BitsStored": None}, RefusalReason.DAMAGED_HEADER),
    ],
)
def test_pixels_that_are_no_gray_radiograph(edits: dict[str, Any], reason: RefusalReason) -> None:
    with pytest.raises(ImageRefusedError) as caught:
        grayscale(**edits)
    assert caught.value.reason is reason


def test_a_presentation_lut_sequence_is_refused() -> None:
    with pytest.raises(ImageRefusedError, match="Presentation LUT Sequence"):
        grayscale(PresentationLUTSequence=lut([0, 1], 0, 8))


@pytest.mark.parametrize("keyword", ["PresentationLUTSequence", "ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize("items", [[], [Dataset()], [Dataset(), Dataset()]])
def test_an_empty_sequence_is_no_sequence(keyword: str, items: list[Dataset]) -> None:
    edits = {keyword: items, "WindowCenter": 2048, "WindowWidth": 4096}
    assert grays([0, 8, 9, 2048, 4095], **edits) == [0, 0, 1, 128, 255]


def test_the_header_names_the_pipeline() -> None:
    edits = {"RescaleSlope": 2, "RescaleIntercept": -1, "WindowCenter": 40, "WindowWidth": 80}
    made = grayscale(**edits)
    assert made.modality == Rescale(2.0, -1.0)
    assert made.voi == Window(40.0, 80.0, VoiFunction.LINEAR)
    assert isinstance(grayscale(VOILUTSequence=lut([0, 1], 0, 8)).voi, Lut)
