"""A smaller picture of a JPEG 2000 codestream stands for the whole one where its preprocessing says so, and nowhere else."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import encapsulate

from benchmarks.rigs.synthetic_dicom import make_dicom
from chexnet_deploy.images.dicom.decoder import Decoder
from chexnet_deploy.images.dicom.header import read_header
from chexnet_deploy.images.preprocessing import Reduction, Resizing
from chexnet_deploy.images.reader import ImageReader
from chexnet_deploy.runtime.loading import PixelLoader

J2K, JPEG_LS = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.80"
# 12 bits stored: 0 is black, 4095 white.
WINDOW: dict[str, Any] = {"WindowCenter": 2048, "WindowWidth": 4096}
SHOWN_PER_WORD = 255 / 4095


def resizing(halvings: int | None, resize_px: int = 8) -> Resizing:
    reduction = None if halvings is None else Reduction(halvings=halvings, max_gray_change=255)
    return Resizing(resize_px=resize_px, jpeg2000=reduction)


def ramp(rows: int, columns: int, step: int) -> NDArray[np.uint16]:
    return (step * (np.arange(columns)[np.newaxis, :] + np.arange(rows)[:, np.newaxis])).astype(np.uint16)


@pytest.mark.parametrize(("halvings", "shape"), [(1, (43, 61)), (2, (22, 31))])
def test_a_ramp_is_sampled_where_the_smaller_pixels_lie(
    decoder: Decoder, halvings: int, shape: tuple[int, int]
) -> None:
    # Sides of 4 n + 1 and of odd halves are rounded up.
    content = make_dicom(ramp(85, 121, 16), WINDOW, syntax=J2K)
    gray = decoder.decode(content, resizing=resizing(halvings)).gray
    assert gray.shape == shape
    # The middle of 2 x 2 pixels is (2 i + 0.5, 2 k + 0.5), that of 4 x 4 is (4 i + 1.5, 4 k + 1.5). The last has none.
    side = 2**halvings
    i, k = np.indices(shape)
    wanted = np.floor(16 * (side * (i + k) + side - 1) * SHOWN_PER_WORD + 0.5)
    assert np.abs(gray.astype(int) - wanted)[:-2, :-2].max() <= 1


def test_signed_and_8_bit_pictures(decoder: Decoder) -> None:
    words = ramp(64, 64, 2).astype(np.uint8)
    assert words.max() == 252
    gray = decoder.decode(make_dicom(words, syntax=J2K), resizing=resizing(1)).gray
    assert np.abs(gray.astype(int) - decoder.decode(make_dicom(words, syntax=J2K)).gray[::2, ::2]).max() <= 3
    signed = ramp(64, 64, 16).astype(np.int16) - 1000
    content = make_dicom(signed, {"WindowCenter": 0, "WindowWidth": 2048}, syntax=J2K)
    whole = decoder.decode(content).gray.astype(int)
    middles = (whole[::2, ::2] + whole[1::2, 1::2]) / 2
    assert np.abs(decoder.decode(content, resizing=resizing(1)).gray - middles)[:-1, :-1].max() <= 1


@pytest.mark.parametrize(
    ("what", "edits", "syntax"),
    [
        ("no window: its own darkest is black", {}, J2K),
        ("padding", {**WINDOW, "PixelPaddingValue": 0}, J2K),
        ("another codec", WINDOW, JPEG_LS),
        ("uncompressed", WINDOW, "1.2.840.10008.1.2.1"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_what_has_no_smaller_picture_that_may_stand_for_it_is_read_whole(
    decoder: Decoder, what: str, edits: dict[str, Any], syntax: str
) -> None:
    content = make_dicom(ramp(64, 64, 16), edits, syntax=syntax)
    np.testing.assert_array_equal(
        decoder.decode(content, resizing=resizing(2)).gray, decoder.decode(content).gray, err_msg=what
    )


@pytest.mark.parametrize(
    ("side", "resize_px", "most", "halved"),
    [(64, 8, 2, 2), (64, 8, 1, 1), (64, 9, 2, 1), (64, 16, 2, 1), (64, 17, 2, 0), (63, 16, 1, 0), (64, 8, None, 0)],
)
def test_a_halved_side_is_at_least_twice_the_models(
    decoder: Decoder, side: int, resize_px: int, most: int | None, halved: int
) -> None:
    content = make_dicom(ramp(side, 80, 16), WINDOW, syntax=J2K)
    gray = decoder.decode(content, resizing=resizing(most, resize_px)).gray
    assert gray.shape == (-(-side // 2**halved), 80 // 2**halved)


def test_no_more_halvings_than_the_codestream_has(decoder: Decoder) -> None:
    dataset = dcmread(
        io.BytesIO(
            make_dicom(
                ramp(64, 64, 16),
                {**WINDOW, "WindowCenter": 32768, "WindowWidth": 65536, "BitsStored": 16, "HighBit": 15},
                syntax=J2K,
            )
        )
    )
    for resolutions, halved in ((1, 0), (2, 1), (3, 2)):
        stream = io.BytesIO()
        Image.fromarray(ramp(64, 64, 500)).save(stream, "JPEG2000", no_jp2=True, num_resolutions=resolutions)
        dataset.PixelData = encapsulate([stream.getvalue()])
        content = io.BytesIO()
        dataset.save_as(content)
        assert decoder.decode(content.getvalue(), resizing=resizing(2)).gray.shape == (64 >> halved, 64 >> halved)


def test_beside_an_edge_no_value_is_beyond_bits_stored(decoder: Decoder) -> None:
    # gdcm writes 12 bits into a codestream of 16, which doesn't cut off what a smaller picture overshoots.
    words = np.zeros((64, 64), np.uint16)
    words[:, 31:] = 4095
    gray = decoder.decode(make_dicom(words, WINDOW, syntax=J2K), resizing=resizing(2)).gray
    assert (gray.shape, gray.min(), gray.max()) == ((16, 16), 0, 255)
    assert (gray[:, 10:] == 255).all()
    assert (gray[:, :6] == 0).all()


def test_a_loader_reads_as_its_model_declares(tmp_path: Path) -> None:
    content = make_dicom(ramp(64, 64, 16), WINDOW, syntax=J2K)
    path = tmp_path / "a.dcm"
    path.write_bytes(content)
    with ImageReader() as reader:
        for declared, side in ((resizing(None), 64), (resizing(2), 16)):
            loader = PixelLoader(declared, None, reader)
            assert loader.load(path).gray.shape == loader.load(content).gray.shape == (side, side)
        # Of all that was sent: two pictures that differ in detail alone are two.
        wanted = hashlib.sha256(read_header("a", content).pixel_data).hexdigest()
        assert loader.read_dicom(path).pixels_sha256 == wanted
