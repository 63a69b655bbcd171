"""The image guard: certain rules by hand, turns by symmetry, and real radiographs where there are any."""

import hashlib
import pickle
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.errors import ChexnetError, ImageError, ImageRefusedError
from chexnet_deploy.images.content_check import (
    FAINT_EDGE,
    WEIGHTS_FILE,
    ImageGuardPolicy,
    Turn,
    check_image,
    edge_directions,
    inverted,
    mirrored,
    read_weights,
    righted,
    score_turns,
    thumbnail,
    turned_counterclockwise,
)
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.images.reader import read_image
from training.fit_content_check import draw_clouds, is_adult
from training.phantoms.draw import PhantomSpec, draw_radiograph, plan_studies

POLICY = ImageGuardPolicy()
LAID: dict[Turn, Callable[[Gray], Gray]] = {
    Turn.UPRIGHT: lambda gray: gray,
    Turn.CLOCKWISE: lambda gray: np.rot90(gray, -1),
    Turn.UPSIDE_DOWN: lambda gray: np.rot90(gray, 2),
    Turn.COUNTERCLOCKWISE: np.rot90,
    Turn.INVERTED: lambda gray: 255 - gray,
    Turn.INVERTED_CLOCKWISE: lambda gray: 255 - np.rot90(gray, -1),
    Turn.INVERTED_UPSIDE_DOWN: lambda gray: 255 - np.rot90(gray, 2),
    Turn.INVERTED_COUNTERCLOCKWISE: lambda gray: 255 - np.rot90(gray),
}


def reason(gray: Gray, policy: ImageGuardPolicy = POLICY) -> str:
    """Return why it is refused, or "accepted"."""
    try:
        check_image(gray, policy)
    except ImageRefusedError as err:
        return err.reason
    return "accepted"


@pytest.fixture(scope="module")
def phantoms() -> list[Gray]:
    spec = PhantomSpec(patients=12, test_patients=0, side_px=256, seed=2)
    return [draw_radiograph(study, seed=spec.seed, side_px=256) for study in plan_studies(spec)[:12]]


def ramp(height_px: int, width_px: int) -> Gray:
    """Return a picture with all 256 grays, brighter to the right."""
    return np.tile((np.arange(width_px) * 256 // width_px).astype(np.uint8), (height_px, 1))


OFF = ImageGuardPolicy(guard="off")


def test_blank() -> None:
    for value in (0, 7, 128, 255):
        for policy in (POLICY, OFF):
            assert reason(np.full((256, 256), value, np.uint8), policy) == "blank"


def dark(value: int = 0) -> Gray:
    return np.full((512, 512), value, np.uint8)


def noise() -> Gray:
    return np.random.default_rng(1).integers(0, 256, (1024, 1024)).astype(np.uint8)


def lit(share: float) -> Gray:
    """Return a black picture whose lowest rows are a ramp."""
    gray = dark()
    rows = round(512 * share)
    gray[512 - rows :] = ramp(rows, 512)
    return gray


@pytest.mark.parametrize(
    ("gray", "expected"),
    [
        (np.where(np.indices((512, 512)).sum(axis=0) < 100, 255, 0).astype(np.uint8), "blank"),  # a lit corner, 2 %
        (lit(0.08), "blank"),
        (lit(0.25), "accepted"),  # as far as this rule goes
        (255 - lit(0.08), "blank"),
        (noise(), "blank"),  # no structure at the model's own scale
        (noise() // 64, "blank"),
        (ramp(512, 512) // 16, "blank"),  # 0 to 15
        (128 + ramp(512, 512) // 16, "blank"),
        (ramp(512, 512) // 4, "accepted"),  # 0 to 63
        (ramp(32, 32), "accepted"),
        (np.where(ramp(256, 256) < 100, 0, 255).astype(np.uint8), "accepted"),  # two grays, half and half
    ],
)
def test_almost_blank(gray: Gray, expected: str) -> None:
    assert reason(gray, OFF) == expected


def test_phantoms_are_far_from_blank(phantoms: list[Gray]) -> None:
    for gray in phantoms:
        check_image(gray // 4 + 90, OFF)


def test_no_policy_asks_for_an_array_alone() -> None:
    check_image(dark(), None)


@pytest.mark.parametrize(
    ("height_px", "width_px", "expected"),
    [
        (223, 256, "too-small"),
        (256, 223, "too-small"),
        (1, 1, "too-small"),
        (1, 5000, "too-small"),
        (224, 224, "not-a-frontal-chest"),  # large enough: refused for what it shows
        (300, 480, "not-a-frontal-chest"),  # 1.6 exactly
        (300, 481, "extreme-aspect"),
        (481, 300, "extreme-aspect"),
    ],
)
def test_sides(height_px: int, width_px: int, expected: str) -> None:
    assert reason(ramp(height_px, width_px)) == expected


def test_gray_levels() -> None:
    """63 grays are a screenshot, 64 are not yet."""
    assert reason(ramp(256, 256) // 4) == "not-a-frontal-chest"
    few = np.minimum(ramp(256, 256) // 4, 62)
    assert len(np.unique(few)) == 63
    assert reason(few) == "too-few-gray-levels"
    assert reason(np.where(ramp(256, 256) < 100, 0, 255).astype(np.uint8)) == "too-few-gray-levels"  # a mask


@pytest.mark.parametrize("value", [0, 255])
def test_mostly_black_or_white(value: int) -> None:
    """Of 256 rows, 192 are three quarters, which is allowed; one more is not."""
    gray = np.clip(ramp(256, 256), 1, 254)
    gray[:192] = value
    assert reason(gray) == "not-a-frontal-chest"
    gray[192] = value
    assert reason(gray) == "mostly-black-or-white"


def test_grays_of_a_large_picture_are_counted_on_every_kth_pixel() -> None:
    gray = np.zeros((2048, 2048), np.uint8)  # every fourth pixel is looked at
    gray[1::4, 1::4] = 9
    assert reason(gray) == "blank"


def test_an_edge_by_hand() -> None:
    """Dark left, bright right: one edge, direction 0, in the two middle columns of cells and nowhere else."""
    halves = np.zeros((640, 640), np.uint8)
    halves[:, 320:] = 200
    small = thumbnail(halves)
    assert small.shape == (64, 64)
    assert (small[:, :32] == 0).all()
    assert (small[:, 32:] == 200).all()
    # Standardised, the sides are 2 apart and the pixels beside the edge have slope 1: 8 of a cell's 64.
    strength = 8 / 64
    expected = np.zeros((8, 8, 8))
    expected[0, :, 3:5] = strength / np.sqrt(strength**2 + FAINT_EDGE**2)
    np.testing.assert_allclose(edge_directions(small), expected, atol=1e-12)
    # Bright left is 180 degrees, direction 4; bright below 90 degrees, direction 2.
    np.testing.assert_allclose(edge_directions(255 - small), np.roll(expected, 4, axis=0), atol=1e-12)
    np.testing.assert_allclose(edge_directions(small.T), np.roll(expected, 2, axis=0).transpose(0, 2, 1), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_edges_turn_with_the_picture(seed: int) -> None:
    small = np.random.default_rng(seed).integers(0, 256, (64, 64), np.uint8)
    edges = edge_directions(small)
    for changed, expected in (
        (np.rot90(small), turned_counterclockwise(edges)),
        (small[:, ::-1], mirrored(edges)),
        (255 - small, inverted(edges)),
    ):
        np.testing.assert_allclose(edge_directions(changed), expected, atol=1e-9)


def test_contrast_does_not_matter(rng: np.random.Generator) -> None:
    small = rng.integers(0, 64, (64, 64), np.uint8)
    np.testing.assert_allclose(edge_directions(3 * small + 10), edge_directions(small), atol=1e-12)


def test_eight_turns_are_eight_pictures(rng: np.random.Generator) -> None:
    ways = righted(edge_directions(rng.integers(0, 256, (64, 64), np.uint8)))
    assert len(ways) == len(Turn) == 8
    for i, one in enumerate(ways):
        assert [np.allclose(one, other) for other in ways] == [i == j for j in range(8)]


def test_one_set_of_weights_scores_every_turn(phantoms: list[Gray]) -> None:
    """The score of a turn is that of the picture put upright from it, with the weights taken plainly."""
    stored = read_weights()
    for gray in phantoms[:4]:
        ways = righted(edge_directions(thumbnail(gray)))
        plain = [float((stored.as_edges() * way).sum()) + stored.bias for way in ways]
        np.testing.assert_allclose(list(score_turns(gray).values()), plain, atol=1e-9)


@pytest.mark.parametrize("turn", list(Turn))
def test_phantoms_are_accepted_upright_and_named_otherwise(phantoms: list[Gray], turn: Turn) -> None:
    expected = "accepted" if turn is Turn.UPRIGHT else turn.value
    assert {reason(LAID[turn](gray)) for gray in phantoms} == {expected}


def test_a_mirrored_picture_is_not_told(phantoms: list[Gray]) -> None:
    """A limit, stated: the score can't see left from right."""
    for gray in phantoms:
        mirror = score_turns(gray[:, ::-1])[Turn.UPRIGHT]
        assert mirror == pytest.approx(score_turns(gray)[Turn.UPRIGHT], abs=0.01)
        assert reason(gray[:, ::-1]) == "accepted"


def test_what_is_no_chest_is_refused(rng: np.random.Generator) -> None:
    noise = rng.integers(0, 256, (256, 256), np.uint8)
    clouds = [
        np.kron(draw_clouds(rng, smooth), np.ones((2, 2), np.uint8)) for smooth in (1, 1.5, 2, 3) for _ in range(5)
    ]
    y, x = np.mgrid[:256, :256] - 127.5
    disc = (255 * np.exp(-(x**2 + y**2) / 80**2)).astype(np.uint8)
    for gray in (noise, disc, 255 - disc, *clouds, *(np.rot90(ramp(256, 256), k) for k in range(4))):
        assert reason(np.ascontiguousarray(gray)) == "not-a-frontal-chest"


def test_off_accepts_every_picture_that_is_not_blank(rng: np.random.Generator) -> None:
    for gray in (ramp(32, 900), ramp(900, 32), rng.integers(0, 256, (9, 9), np.uint8)):
        check_image(gray, OFF)


def test_limits_come_from_the_policy(phantoms: list[Gray]) -> None:
    score = score_turns(phantoms[0])[Turn.UPRIGHT]
    assert reason(phantoms[0], ImageGuardPolicy(min_score=score + 0.001)) == "not-a-frontal-chest"
    assert reason(phantoms[0], ImageGuardPolicy(min_score=score - 0.001)) == "accepted"
    assert reason(phantoms[0], ImageGuardPolicy(min_side_px=257)) == "too-small"
    assert reason(phantoms[0][:200], ImageGuardPolicy(min_side_px=32, max_aspect=1.2)) == "extreme-aspect"
    n_levels = len(np.unique(phantoms[0]))
    if n_levels < 256:
        assert reason(phantoms[0], ImageGuardPolicy(min_gray_levels=n_levels + 1)) == "too-few-gray-levels"


@pytest.mark.parametrize(
    "wrong", [np.zeros((256, 256)), np.zeros((256, 256, 3), np.uint8), np.zeros((0, 256), np.uint8), [[0]]]
)
@pytest.mark.parametrize("guard", ["image", "off"])
def test_what_is_not_a_gray_picture_is_no_verdict(wrong: NDArray[np.uint8], guard: str) -> None:
    with pytest.raises(ImageError, match=r"needed a gray picture, uint8 \[H, W\]") as caught:
        check_image(wrong, ImageGuardPolicy.model_validate({"guard": guard}))
    assert not isinstance(caught.value, ImageRefusedError)


def test_the_picture_is_left_alone_however_it_is_stored(phantoms: list[Gray]) -> None:
    gray = phantoms[0].copy()
    gray.flags.writeable = False
    scores = score_turns(gray)
    check_image(gray, POLICY)
    view = np.asfortranarray(np.pad(gray, 5))[5:-5, 5:-5]
    assert not view.flags.c_contiguous
    check_image(view, POLICY)
    assert score_turns(view) == scores
    np.testing.assert_array_equal(gray, phantoms[0])


def test_a_refusal_says_what_was_found_and_survives_a_process(phantoms: list[Gray]) -> None:
    with pytest.raises(ImageRefusedError) as caught:
        check_image(np.rot90(phantoms[0], 2), POLICY)
    assert str(caught.value) == (
        "Found what looks like a chest radiograph that is upside down; needed it upright, with bone bright. "
        "Next: look at it, and export it again as it should be read."
    )
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), copy.reason, str(copy)) == (ImageRefusedError, "upside-down", str(caught.value))
    assert isinstance(copy, ImageError)
    assert isinstance(copy, ChexnetError)


@pytest.mark.parametrize(
    "text",
    [
        '{"guard": "on"}',
        '{"weights": "edge-directions-2"}',
        '{"min_side_px": 31}',
        '{"min_side_px": 224.0}',
        '{"max_aspect": 0.9}',
        '{"min_gray_levels": 257}',
        '{"max_black_or_white_share": 1.1}',
        '{"min_score": NaN}',
        '{"min_score": "0.4"}',
        '{"threshold": 0.4}',
    ],
)
def test_wrong_policies_are_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        ImageGuardPolicy.model_validate_json(text)


def test_a_policy_is_frozen_and_survives_json() -> None:
    policy = ImageGuardPolicy(guard="off", min_side_px=64, min_score=0.1)
    assert ImageGuardPolicy.model_validate_json(policy.model_dump_json()) == policy
    with pytest.raises(ValidationError):
        policy.guard = "image"


def test_the_weights_are_those_the_name_stands_for() -> None:
    """A policy names them, so others need another name: change both, never one."""
    stored = read_weights()
    assert stored.name == POLICY.weights == "edge-directions-1"
    content = files("chexnet_deploy.images").joinpath(WEIGHTS_FILE).read_bytes()
    assert hashlib.sha256(content).hexdigest() == "a6263bf3658075f92cb3ded0411fc1b38c3cdd82744efdfdc5604fd2b1aff9eb"
    assert (stored.n_images, stored.n_patients) == (363, 346)
    np.testing.assert_allclose(
        mirrored(stored.as_edges()), stored.as_edges(), atol=2e-4
    )  # they can't tell left from right


@pytest.mark.dataset
def test_train_val_radiographs(real_root: Path) -> None:
    """The same images the score was fitted to, so this guards the code, and proves nothing of others."""
    dataset = ChestXray14.open(real_root)
    adults = [radiograph for radiograph in (*dataset.split("train"), *dataset.split("val")) if is_adult(radiograph)][
        ::4
    ]
    refused = dict.fromkeys(Turn, 0)
    for radiograph in adults:
        assert radiograph.path is not None
        gray = read_image(radiograph.path)
        for turn, lay in LAID.items():
            refused[turn] += reason(np.ascontiguousarray(lay(gray))) != "accepted"
    assert refused == {turn: 0 if turn is Turn.UPRIGHT else len(adults) for turn in Turn}


@pytest.mark.dataset
def test_dicom_files_of_other_things(real_root: Path) -> None:
    folder = real_root.parent / "dicom"
    if not folder.is_dir():
        pytest.skip("NOT RUN on DICOM files: there are none beside ChestX-ray14")
    pytest.importorskip("pydicom", reason="NOT RUN on DICOM files: pydicom is not installed")
    from benchmarks.statistics.not_chests import read_dicom_files

    reasons = {name: reason(gray) for name, gray in read_dicom_files(folder).items()}
    chests = {name for name in reasons if name.startswith(("RG1_", "RSNA_CR_chestPA"))}
    assert len(chests) >= 1
    assert {name for name, why in reasons.items() if why == "accepted"} == chests
