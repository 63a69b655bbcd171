"""Refuse a picture that is not an upright, positive, frontal chest radiograph, as far as its pixels can tell.

A blank picture, of one gray or nearly, is always refused. A policy asks for two kinds of rule more. Certain ones: too small, too
long, too few grays, mostly black or white. And a statistical one: a linear score on the directions of the picture's edges, the
same for the picture as it is and as if it were turned or negative. It is accepted where upright and positive scores best of the
eight, and well enough.

What it can't tell: a mirrored picture (it scores the same, by construction), a child, a bad exposure, another patient. Whether
it refuses a lateral chest view is not known: there was none to measure on. It reads no file and no header.
"""

from enum import Enum
from functools import lru_cache
from importlib.resources import files
from math import ceil
from typing import Annotated, Final, Literal, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from chexnet_deploy.errors import ImageError, ImageRefusedError, RefusalReason
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.inputs import StrictRecord

Edges: TypeAlias = NDArray[np.float64]
"""[8, 8, 8]: direction, row and column of a cell. Direction d is where it gets brighter, d * 45 degrees from +x to +y (down)."""

WEIGHTS_FILE: Final = "content_check.json"
THUMBNAIL_PX: Final = 64
CELL_PX: Final = 8
N_CELLS: Final = THUMBNAIL_PX // CELL_PX
N_DIRECTIONS: Final = 8
FAINT_EDGE: Final = 0.1
"""Edges fainter than this share of the thumbnail's standard deviation, per pixel, count little: they are noise."""
BLANK_WITHIN: Final = ((0.8, 8), (0.9, 16))
"""A picture is blank where such a share of its thumbnail lies within so many grays of each other. Of 16,000 radiographs of
ChestX-ray14 (15,152 of them at 128 px) the flattest has 80 % within 19 grays and 90 % within 25."""
_SAMPLE_PX: Final = 512  # shorter side of the sample whose grays are counted

WeightsName: TypeAlias = Literal["edge-directions-1"]


class Turn(str, Enum):
    """A picture's orientation and polarity (eight cases, in the order of `score_turns`); the value is the reason of a refusal."""

    UPRIGHT = "upright"
    CLOCKWISE = "turned-clockwise"
    UPSIDE_DOWN = "upside-down"
    COUNTERCLOCKWISE = "turned-counterclockwise"
    INVERTED = "inverted"
    INVERTED_CLOCKWISE = "inverted-and-turned-clockwise"
    INVERTED_UPSIDE_DOWN = "inverted-and-upside-down"
    INVERTED_COUNTERCLOCKWISE = "inverted-and-turned-counterclockwise"


class ImageGuardPolicy(StrictRecord):
    """What a picture must be. The defaults are what ChestX-ray14's train_val part allows.

    Attributes:
        guard: "off" accepts every picture that isn't blank, as phantoms and test patterns need.
        weights: which weights the score is made with; new weights get a new name, so that an old policy never meets them.
        min_side_px: below CheXNet's own 224 px a picture would have to be enlarged.
        max_aspect: longer side over shorter. Of 44,176 originals in train_val one is longer than 1.6 (1.69).
        min_gray_levels: of 256; radiographs of train_val have 141 or more, a screenshot of text or a mask fewer.
        max_black_or_white_share: of the pixels, exactly 0 or 255; at most 0.50 in train_val.
        min_score: of the picture as it is. `python -m training.fit_content_check` prints the one that it chose.
    """

    guard: Literal["image", "off"] = "image"
    weights: WeightsName = "edge-directions-1"
    min_side_px: Annotated[int, Field(ge=32)] = 224
    max_aspect: Annotated[float, Field(ge=1)] = 1.6
    min_gray_levels: Annotated[int, Field(ge=2, le=256)] = 64
    max_black_or_white_share: Annotated[float, Field(ge=0, le=1)] = 0.75
    min_score: float = 0.39


class GuardWeights(StrictRecord):
    """The linear score, as `python -m training.fit_content_check` wrote it.

    Attributes:
        source: whose images it was fitted to.
        n_images: how many; n_patients likewise.
        images_sha256: of their names, one a line, in order.
        bias: added to the score.
        weights: [8][64], direction by cell, rows first.
    """

    name: WeightsName
    source: str
    n_images: int
    n_patients: int
    images_sha256: str
    bias: float
    weights: Annotated[
        tuple[Annotated[tuple[float, ...], Field(min_length=N_CELLS**2, max_length=N_CELLS**2)], ...],
        Field(min_length=N_DIRECTIONS, max_length=N_DIRECTIONS),
    ]

    def as_edges(self) -> Edges:
        """Return the weights as [8, 8, 8]."""
        return np.array(self.weights).reshape(N_DIRECTIONS, N_CELLS, N_CELLS)


def check_image(gray: Gray, policy: ImageGuardPolicy | None) -> None:
    """Return if the policy lets the picture pass.

    Args:
        gray: [H, W] uint8, 0 = black, bone bright.
        policy: what it must be; None asks for a gray array alone.

    Raises:
        ImageRefusedError: it is not; `reason` is one of "blank", "too-small", "extreme-aspect", "too-few-gray-levels",
            "mostly-black-or-white", a value of `Turn`, or "not-a-frontal-chest".
        ImageError: gray is not a uint8 array of two dimensions with at least one pixel.
    """
    if not isinstance(gray, np.ndarray) or gray.dtype != np.uint8 or gray.ndim != 2 or gray.size == 0:
        found = f"{gray.dtype} {list(gray.shape)}" if isinstance(gray, np.ndarray) else type(gray).__name__
        raise ImageError(f"Found {found}; needed a gray picture, uint8 [H, W]. Next: read it with read_image.")
    if policy is None:
        return
    is_guarded = policy.guard != "off"
    if is_guarded:
        _check_sides(gray, policy)
    _check_blank(gray)
    if is_guarded:
        _check_grays(gray, policy)
        _check_turn(gray, policy)


def score_turns(gray: Gray) -> dict[Turn, float]:
    """Return how much the picture looks like a frontal chest radiograph that lies in each of the eight ways.

    About +1 for a frontal chest lying that way, -1 for one lying otherwise and for what is no chest.

    Args:
        gray: [H, W] uint8.
    """
    bank, bias = _weight_bank()
    scores = bank @ edge_directions(thumbnail(gray)).ravel() + bias
    return dict(zip(Turn, map(float, scores), strict=True))


def thumbnail(gray: Gray) -> Gray:
    """Return the whole picture squashed to 64 x 64, as preprocessing squashes it; each pixel is a mean."""
    image = Image.fromarray(gray)
    # First by a whole factor, then the rest: several times faster on a large detector, and as exact for this purpose.
    small = image.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX, reducing_gap=1.0)
    return np.asarray(small)


def edge_directions(small: Gray) -> Edges:
    """Return the histograms of oriented gradients of a thumbnail (Dalal & Triggs 2005, CVPR; signed, cells as blocks).

    Scaling the contrast changes little, a negative adds 180 degrees to every direction, and a quarter turn moves cells and
    directions alone: so one set of weights scores all eight ways to lie.

    Args:
        small: [64, 64] uint8.
    """
    values = small.astype(np.float64)
    values /= values.std() or 1.0
    padded = np.pad(values, 1, mode="edge")
    right, down = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2, (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    strength = np.hypot(right, down)
    direction = np.arctan2(down, right) * (N_DIRECTIONS / (2 * np.pi))
    below = np.floor(direction)
    cells = np.arange(THUMBNAIL_PX) // CELL_PX
    cell = cells[:, np.newaxis] * N_CELLS + cells
    edges = np.zeros(N_DIRECTIONS * N_CELLS**2)
    # An edge between two directions counts for both, by how near it is to each.
    for nearest, share in ((below, 1 - (direction - below)), (below + 1, direction - below)):
        place = (nearest.astype(np.intp) % N_DIRECTIONS) * N_CELLS**2 + cell
        edges += np.bincount(place.ravel(), (strength * share).ravel(), edges.size)
    histograms = edges.reshape(N_DIRECTIONS, N_CELLS, N_CELLS) / CELL_PX**2
    normal: Edges = histograms / np.sqrt((histograms**2).sum(axis=0) + FAINT_EDGE**2)
    return normal


def turned_counterclockwise(edges: Edges) -> Edges:
    """Return the edges of the picture after a quarter turn counterclockwise."""
    return np.roll(np.rot90(edges, axes=(1, 2)), -N_DIRECTIONS // 4, axis=0)


def inverted(edges: Edges) -> Edges:
    """Return the edges of the picture's negative."""
    return np.roll(edges, N_DIRECTIONS // 2, axis=0)


def mirrored(edges: Edges) -> Edges:
    """Return the edges of the picture with left and right exchanged."""
    return edges[(N_DIRECTIONS // 2 - np.arange(N_DIRECTIONS)) % N_DIRECTIONS, :, ::-1]


def righted(edges: Edges) -> list[Edges]:
    """Return the edges of the picture put upright from each `Turn` that it may lie in; itself first."""
    ways = [edges]
    for _ in range(3):
        ways.append(turned_counterclockwise(ways[-1]))
    return ways + [inverted(way) for way in ways]


def read_weights() -> GuardWeights:
    """Return the weights in this package."""
    return GuardWeights.model_validate_json(files("chexnet_deploy.images").joinpath(WEIGHTS_FILE).read_bytes())


@lru_cache(maxsize=1)
def _weight_bank() -> tuple[NDArray[np.float64], float]:
    """Return [8, 512] and the bias: weights laid as the picture may lie, so that one product scores every turn."""
    stored = read_weights()
    # Where entry i of the edges goes when the picture is righted, its weight is fetched from.
    places = righted(np.arange(N_DIRECTIONS * N_CELLS**2, dtype=np.float64).reshape(N_DIRECTIONS, N_CELLS, N_CELLS))
    bank = np.empty((len(places), N_DIRECTIONS * N_CELLS**2))
    for row, place in zip(bank, places, strict=True):
        row[place.ravel().astype(np.intp)] = stored.as_edges().ravel()
    return bank, stored.bias


def _refuse(reason: str, found: str, needed: str, next_step: str) -> NoReturn:
    raise ImageRefusedError(RefusalReason(reason), f"Found {found}; needed {needed}. Next: {next_step}.")


def _check_blank(gray: Gray) -> None:
    """Look at the thumbnail, in which noise and small letters count as little as they do for the model."""
    values = np.sort(thumbnail(gray), axis=None).astype(int)
    for share, n_grays in BLANK_WITHIN:
        n_pixels = ceil(share * values.size)
        within = int((values[n_pixels - 1 :] - values[: values.size - n_pixels + 1]).min())
        if within <= n_grays:
            found = f"almost nothing in the picture, {share:.0%} of it within {within} of 255 grays"
            _refuse("blank", found, "a radiograph", "check the exposure, the gray window and the export")


def _check_sides(gray: Gray, policy: ImageGuardPolicy) -> None:
    height_px, width_px = gray.shape
    found = f"{width_px} x {height_px} px"
    if min(height_px, width_px) < policy.min_side_px:
        needed = f"sides of at least {policy.min_side_px} px"
        _refuse("too-small", found, needed, "export the radiograph at its full resolution")
    if max(height_px, width_px) > policy.max_aspect * min(height_px, width_px):
        needed = f"sides that differ by at most {policy.max_aspect:g} times"
        _refuse("extreme-aspect", found, needed, "check that this is one whole chest radiograph")


def _check_grays(gray: Gray, policy: ImageGuardPolicy) -> None:
    """Count the grays of every k-th pixel: what a picture mostly is, each part of it shows."""
    step = -(-min(gray.shape) // _SAMPLE_PX)
    counts = Image.fromarray(np.ascontiguousarray(gray[::step, ::step])).histogram()
    n_levels, n_pixels = sum(count > 0 for count in counts), sum(counts)
    if n_levels < policy.min_gray_levels:
        needed = f"at least {policy.min_gray_levels}"
        _refuse("too-few-gray-levels", f"{n_levels} grays", needed, "export the radiograph itself, not a screenshot")
    share = (counts[0] + counts[255]) / n_pixels
    if share > policy.max_black_or_white_share:
        needed = f"at most {policy.max_black_or_white_share:.0%}"
        _refuse("mostly-black-or-white", f"{share:.0%} black or white pixels", needed, "check the gray window")


def _check_turn(gray: Gray, policy: ImageGuardPolicy) -> None:
    scores = score_turns(gray)
    best = max(scores, key=scores.__getitem__)
    if scores[best] < policy.min_score:
        found = f"a picture that scores {scores[best]:.2f} at best"
        needed = f"{policy.min_score:g} or more, as frontal chest radiographs do"
        _refuse("not-a-frontal-chest", found, needed, "check the view and the body part")
    if best is not Turn.UPRIGHT:
        found = f"what looks like a chest radiograph that is {best.value.replace('-', ' ')}"
        needed = "it upright, with bone bright"
        _refuse(best.value, found, needed, "look at it, and export it again as it should be read")
