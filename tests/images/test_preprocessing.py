"""Preprocessing: bit-exact pixels, pinned by golden arrays and by arithmetic that can be done by hand."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from chexnet_deploy.errors import ImageError
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.images.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, Reduction
from chexnet_deploy.images.reader import read_image

GOLDEN = Path(__file__).parents[1] / "golden"


def synthetic(height: int, width: int) -> Gray:
    """Integer arithmetic alone, so that the golden arrays' source is the same on every machine."""
    y, x = np.arange(height)[:, np.newaxis], np.arange(width)[np.newaxis, :]
    gray: Gray = ((3 * x * x + 5 * y * y + x * y) // 7 % 256).astype(np.uint8)
    return gray


def test_golden_array() -> None:
    """300 x 200 squashed to 64 x 64: down by 4.7 one way and 3.1 the other."""
    np.testing.assert_array_equal(
        Preprocessing(resize_px=64)(synthetic(300, 200)), np.load(GOLDEN / "synthetic_64.npy")
    )


@pytest.mark.parametrize(
    ("height", "width", "sha256"),
    [
        (1024, 1024, "57fd741c1f867a9547840a8e30176896fcdb7d7238e350cb7a71b3f6152fda21"),
        (100, 150, "f24852a53b57a2ffe739115fd1b06fdb5e204af4c662423a162e6b80e273e3ba"),  # enlarged
    ],
)
def test_golden_hash_at_the_default_size(height: int, width: int, sha256: str) -> None:
    assert hashlib.sha256(Preprocessing()(synthetic(height, width)).tobytes()).hexdigest() == sha256


def test_golden_16_bit_png() -> None:
    """tests/golden/gray16.png holds 17 * (x + y) + 100 at 48 x 40; its scaled values and its pixels are both pinned."""
    gray = read_image(GOLDEN / "gray16.png")
    assert gray.shape == (40, 48)
    # Darkest 100, brightest 100 + 17 * 86: value = (x + y) * 255 / 86, rounded half up.
    expected = [[((x + y) * 510 + 86) // 172 for x in range(48)] for y in range(40)]
    assert gray.tolist() == expected
    np.testing.assert_array_equal(Preprocessing(resize_px=32)(gray), np.load(GOLDEN / "gray16_32.npy"))


def test_halving_an_edge_by_hand() -> None:
    """Halving, a pixel weighs its four nearest columns 1 3 3 1 eighths; one eighth of 240 is 30."""
    edge = np.zeros((64, 64), np.uint8)
    edge[:, 32:] = 240
    row = Preprocessing(resize_px=32)(edge)[0, 0, 0]
    assert row.tolist() == [0] * 15 + [30, 210] + [240] * 15


def test_squash_not_letterbox() -> None:
    halves = np.zeros((64, 256), np.uint8)
    halves[:, 128:] = 200
    pixels = Preprocessing(resize_px=64)(halves)[0, 0]
    assert (pixels[:, :31] == 0).all()
    assert (pixels[:, 33:] == 200).all()


grays = st.builds(
    lambda height, width, seed, low, high: (
        np.random.default_rng(seed).integers(min(low, high), max(low, high) + 1, (height, width)).astype(np.uint8)
    ),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(0, 2**32),
    st.integers(0, 255),
    st.integers(0, 255),
)


@settings(max_examples=100, deadline=None)
@given(gray=grays, side=st.sampled_from([32, 64, 224]))
def test_any_picture(gray: Gray, side: int) -> None:
    before = gray.copy()
    pixels = Preprocessing(resize_px=side)(gray)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 1, side, side)
    assert pixels.flags.c_contiguous
    assert gray.min() <= pixels.min()
    assert pixels.max() <= gray.max()
    np.testing.assert_array_equal(gray, before)
    np.testing.assert_array_equal(Preprocessing(resize_px=side)(pixels[0, 0]), pixels)  # already S x S: unchanged


@settings(max_examples=50, deadline=None)
@given(value=st.integers(0, 255), height=st.integers(1, 300), width=st.integers(1, 300))
def test_constant_stays_constant(value: int, height: int, width: int) -> None:
    assert (Preprocessing(resize_px=32)(np.full((height, width), value, np.uint8)) == value).all()


def test_strided_views_are_read_in_their_own_order() -> None:
    gray = synthetic(128, 96)
    view = gray[::-2, ::3]
    preprocessing = Preprocessing(resize_px=32)
    np.testing.assert_array_equal(preprocessing(view), preprocessing(view.copy()))
    np.testing.assert_array_equal(preprocessing(gray.T), preprocessing(np.ascontiguousarray(gray.T)))


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (np.zeros((32, 32), np.float32), "float32 [32, 32]"),
        (np.zeros((32, 32), np.uint16), "uint16 [32, 32]"),
        (np.zeros((32, 32, 3), np.uint8), "uint8 [32, 32, 3]"),
        (np.zeros((1, 1, 32, 32), np.uint8), "uint8 [1, 1, 32, 32]"),
        (np.zeros((0, 32), np.uint8), "uint8 [0, 32]"),
        ([[0]], "list"),
    ],
)
def test_what_is_not_a_gray_picture_is_refused(wrong: NDArray[np.uint8], found: str) -> None:
    with pytest.raises(ImageError) as caught:
        Preprocessing()(wrong)
    assert str(caught.value).startswith(f"Found {found}; needed a gray picture, uint8 [H, W].")


def test_defaults_are_the_papers() -> None:
    assert Preprocessing().model_dump() == {
        "resize_px": 224,
        "resample": "pillow-bilinear-8bit",
        "geometry": "squash",
        "jpeg2000": None,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }


finite = st.floats(2.0**-20, 1)


@given(
    side=st.integers(1, 32).map(lambda n: 32 * n),
    mean=st.tuples(finite, finite, finite),
    std=st.tuples(finite, finite, finite),
)
def test_json_round_trip_keeps_every_bit(
    side: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    before = Preprocessing(resize_px=side, mean=mean, std=std)
    after = Preprocessing.model_validate_json(before.model_dump_json())
    assert after == before
    assert (after.mean, after.std, after.sha256) == (mean, std, before.sha256)


def test_sha256_is_stable_and_tells_settings_apart() -> None:
    canonical = (
        '{"geometry":"squash","mean":[0.485,0.456,0.406],"resample":"pillow-bilinear-8bit","resize_px":224,'
        '"std":[0.229,0.224,0.225]}'
    )
    assert Preprocessing().sha256 == hashlib.sha256(canonical.encode()).hexdigest()
    others = [Preprocessing(resize_px=256), Preprocessing(mean=(0.5, 0.5, 0.5)), Preprocessing(std=(0.5, 0.5, 0.5))]
    others += [Preprocessing(jpeg2000=Reduction(halvings=n, max_gray_change=9)) for n in (1, 2)]
    assert len({settings.sha256 for settings in [Preprocessing(), *others]}) == 6


@pytest.mark.parametrize(
    "text",
    [
        '{"resize_px": 225}',
        '{"resize_px": 0}',
        '{"resize_px": 1056}',
        '{"resize_px": 224.0}',
        '{"resize_px": "224"}',
        '{"resize_px": true}',
        '{"resample": "bicubic"}',
        '{"geometry": "letterbox"}',
        '{"mean": [0.5, 0.5]}',
        '{"mean": [0.5, 0.5, 0.5, 0.5]}',
        '{"mean": [123.7, 116.3, 103.5]}',
        '{"mean": [NaN, 0.5, 0.5]}',
        '{"std": [0, 0.5, 0.5]}',
        '{"std": [Infinity, 0.5, 0.5]}',
        '{"crop_px": 224}',
    ],
)
def test_wrong_settings_are_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Preprocessing.model_validate_json(text)


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        Preprocessing().resize_px = 256
