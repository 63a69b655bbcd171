"""Does a class activation map point at the finding? Pointing game, IoU and IoBB against a radiologist's boxes.

A map is scored against the boxes of its own finding, whatever the probability: this asks where, not whether. Points
in an image are continuous, (0, 0) at the outer corner of the first pixel, so pixel i covers [i, i + 1) and a box
[x, x + width) x [y, y + height).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from chexnet_deploy.errors import MetricError


@dataclass(frozen=True, slots=True)
class Box:
    """Where a radiologist saw one finding; pixels of the 1024 x 1024 image, origin at the top left."""

    finding: str
    x_px: float
    y_px: float
    width_px: float
    height_px: float


MAP_THRESHOLD: Final = 180 / 255
"""Share of a map's range, from its least to its largest value, at and above which a pixel is detected.

Wang et al. 2017 stretch each map over 0..255 and cut at 60 and at 180. The upper cut is taken alone, so that a map has
one set of boxes. Fixed here before any result was seen: a cut chosen on the boxes would flatter the model.
"""
TOLERANCE_PX: Final = 15.0
"""How far from a box the pointing game still counts a hit (Zhang et al. 2018): 15 pixels of the annotated image.

Of ChestX-ray14's 1024 px that is 1.5 % of the side; the protocol's photographs have about 500, so ours is stricter.
"""
IOU_THRESHOLDS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
IOBB_THRESHOLDS: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
"""T(IoU) and T(IoBB) of Wang et al. 2017 (CVPR)."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class MapScore:
    """One map against the boxes of one finding in one image.

    Attributes:
        pointing: 1 where the map's largest value lies in a box or within the tolerance of one, else 0; of several
            equally large cells the share that does.
        iou: for each box the best intersection over union with a detected box; 0 where nothing is detected.
        iobb: for each box the best intersection over the detected box's own area.
        n_detected: boxes detected.
    """

    pointing: float
    iou: tuple[float, ...]
    iobb: tuple[float, ...]
    n_detected: int


class ShareAt(_Record):
    """Share of a finding's boxes that reach a threshold."""

    threshold: float
    share: float


class FindingLocalization(_Record):
    """One finding over all of its boxed images.

    Attributes:
        n_images, n_boxes: what the figures rest on; most findings have few.
        pointing_accuracy: mean over images.
        mean_iou, mean_iobb: over boxes.
        iou, iobb: shares of the boxes whose IoU or IoBB is at least each threshold.
        detected_per_image: mean number of detected boxes; many of them make a good match likelier.
    """

    finding: str
    n_images: int
    n_boxes: int
    pointing_accuracy: float
    mean_iou: float
    mean_iobb: float
    iou: tuple[ShareAt, ...]
    iobb: tuple[ShareAt, ...]
    detected_per_image: float


class LocalizationReport(_Record):
    """Localisation by finding, with what was fixed beforehand.

    Attributes:
        findings: those with boxes, in the order asked for.
        without_boxes: the others; nothing is known of them, and no mean is taken over findings.
    """

    map_threshold: float
    tolerance_px: float
    findings: tuple[FindingLocalization, ...]
    without_boxes: tuple[str, ...]


def upsample(cam: NDArray[np.floating], *, height_px: int, width_px: int) -> NDArray[np.float64]:
    """Return a map stretched bilinearly over an image, float64 [H, W].

    Pixel centres are aligned: cell i of h covers the rows from i * H / h to (i + 1) * H / h and has its value at their
    middle; beyond the outermost centres values stay as they are. Equals Pillow's BILINEAR where it enlarges.

    Args:
        cam: [h, w].
        height_px: H, of the image that the boxes were drawn on.
        width_px: W.

    Raises:
        MetricError: the map is empty or not finite, or the image has no pixel.
    """
    if cam.ndim != 2 or not cam.size or not np.isfinite(cam).all() or height_px < 1 or width_px < 1:
        raise MetricError(
            f"Found a map {list(cam.shape)} for an image of {width_px} x {height_px} px; needed finite values [h, w] "
            f"and at least one pixel. Next: check the model's output."
        )
    rows, columns = _interpolation(cam.shape[0], height_px), _interpolation(cam.shape[1], width_px)
    stretched: NDArray[np.float64] = rows @ cam.astype(np.float64) @ columns.T
    return stretched


def detect_boxes(
    cam: NDArray[np.floating], *, height_px: int, width_px: int, map_threshold: float = MAP_THRESHOLD
) -> NDArray[np.float64]:
    """Return the bounding boxes of a map's bright regions, [D, 4] as x, y, width, height in pixels of the image.

    A region is a set of pixels at and above the threshold that touch by a side or a corner (Wang et al. 2017 draw a box
    round each isolated one). A flat map has none.

    Args:
        cam: [h, w].
        height_px: H, of the image.
        width_px: W.
        map_threshold: share of the map's own range, above 0 and at most 1.

    Raises:
        MetricError: as upsample; or the threshold is out of range.
    """
    if not 0.0 < map_threshold <= 1.0:
        raise MetricError(f"Found the map threshold {map_threshold}; needed above 0 and at most 1. Next: choose one.")
    stretched = upsample(cam, height_px=height_px, width_px=width_px)
    least, range_ = stretched.min(), np.ptp(stretched)
    # Of the cells, not of the pixels: interpolating a flat map may differ in the last digit.
    if cam.min() == cam.max() or range_ == 0.0:
        return np.empty((0, 4))
    return _bound_regions((stretched - least) / range_ >= map_threshold)


def score_map(
    cam: NDArray[np.floating],
    boxes: Sequence[Box],
    *,
    height_px: int,
    width_px: int,
    map_threshold: float = MAP_THRESHOLD,
    tolerance_px: float = TOLERANCE_PX,
) -> MapScore:
    """Score one finding's map against that finding's boxes in the image.

    Args:
        cam: [h, w]; higher means more evidence.
        boxes: at least one.
        height_px: H, of the image that the boxes were drawn on; 1024 for ChestX-ray14.
        width_px: W.
        map_threshold: see MAP_THRESHOLD.
        tolerance_px: see TOLERANCE_PX.

    Raises:
        MetricError: there is no box, they are of several findings, or as detect_boxes.
    """
    if len({box.finding for box in boxes}) != 1 or not tolerance_px >= 0.0:
        raise MetricError(
            f"Found boxes of {sorted({box.finding for box in boxes})} and a tolerance of {tolerance_px} px; needed "
            f"boxes of one finding and at least 0 px. Next: group the boxes by finding."
        )
    detected = detect_boxes(cam, height_px=height_px, width_px=width_px, map_threshold=map_threshold)
    truth = np.array([[box.x_px, box.y_px, box.width_px, box.height_px] for box in boxes], np.float64)
    iou, iobb = _overlaps(truth, detected)
    # The largest value of the stretched map is at a cell's centre. Its first pixel would not do: past the outermost
    # centres the map is level, and the first of those pixels lies at the image's edge.
    rows, columns = np.nonzero(cam == cam.max())
    x_px, y_px = (columns + 0.5) * width_px / cam.shape[1], (rows + 0.5) * height_px / cam.shape[0]
    is_hit = (_distance_px(truth, x_px, y_px) <= tolerance_px).any(axis=0)
    return MapScore(float(is_hit.mean()), tuple(iou.tolist()), tuple(iobb.tolist()), len(detected))


def group_by_finding(boxes: Sequence[Box]) -> dict[str, tuple[Box, ...]]:
    """Return one image's boxes by finding, in their order."""
    return {
        finding: tuple(box for box in boxes if box.finding == finding)
        for finding in dict.fromkeys(box.finding for box in boxes)
    }


def summarise(
    scores: Mapping[str, Sequence[MapScore]],
    findings: Sequence[str],
    *,
    map_threshold: float = MAP_THRESHOLD,
    tolerance_px: float = TOLERANCE_PX,
) -> LocalizationReport:
    """Sum up by finding; a finding without boxes is named, not scored.

    Args:
        scores: finding -> its images' scores.
        findings: all that the model has.
        map_threshold: that the scores were made with.
        tolerance_px: likewise.
    """
    return LocalizationReport(
        map_threshold=map_threshold,
        tolerance_px=tolerance_px,
        findings=tuple(_summarise_finding(finding, scores[finding]) for finding in findings if scores.get(finding)),
        without_boxes=tuple(finding for finding in findings if not scores.get(finding)),
    )


def _summarise_finding(finding: str, images: Sequence[MapScore]) -> FindingLocalization:
    iou = [value for image in images for value in image.iou]
    iobb = [value for image in images for value in image.iobb]
    return FindingLocalization(
        finding=finding,
        n_images=len(images),
        n_boxes=len(iou),
        pointing_accuracy=math.fsum(image.pointing for image in images) / len(images),
        mean_iou=math.fsum(iou) / len(iou),
        mean_iobb=math.fsum(iobb) / len(iobb),
        iou=tuple(_share_at(iou, threshold) for threshold in IOU_THRESHOLDS),
        iobb=tuple(_share_at(iobb, threshold) for threshold in IOBB_THRESHOLDS),
        detected_per_image=sum(image.n_detected for image in images) / len(images),
    )


def _share_at(values: Sequence[float], threshold: float) -> ShareAt:
    return ShareAt(threshold=threshold, share=sum(value >= threshold for value in values) / len(values))


def _interpolation(n_cells: int, n_pixels: int) -> NDArray[np.float64]:
    """Return the weights [n_pixels, n_cells] of cell values in pixel values."""
    place = np.clip((np.arange(n_pixels) + 0.5) * n_cells / n_pixels - 0.5, 0, n_cells - 1)
    below = np.minimum(place.astype(np.int64), max(n_cells - 2, 0))
    weights = np.zeros((n_pixels, n_cells))
    pixels = np.arange(n_pixels)
    weights[pixels, np.minimum(below + 1, n_cells - 1)] = place - below
    weights[pixels, below] = 1.0 - (place - below)
    return weights


def _bound_regions(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return x, y, width, height of each 8-connected region, [D, 4], by their first run in reading order."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row_of_run, start_of_run = np.nonzero(edges == 1)
    first_of_row = np.searchsorted(row_of_run, np.arange(mask.shape[0] + 1)).tolist()
    rows, starts, ends = row_of_run.tolist(), start_of_run.tolist(), np.nonzero(edges == -1)[1].tolist()
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    for run, row in enumerate(rows):
        for above in range(first_of_row[row - 1], first_of_row[row]) if row else ():
            # Runs are [start, end); a corner is enough to touch.
            if starts[above] <= ends[run] and starts[run] <= ends[above]:
                first, second = sorted((root(above), root(run)))
                parent[second] = first
    regions: dict[int, list[int]] = {}
    for run in range(len(rows)):
        regions.setdefault(root(run), []).append(run)
    boxes = []
    for runs in regions.values():
        x, y = min(starts[run] for run in runs), rows[runs[0]]
        boxes.append((x, y, max(ends[run] for run in runs) - x, rows[runs[-1]] + 1 - y))
    return np.array(boxes, np.float64).reshape(len(boxes), 4)


def _overlaps(
    truth: NDArray[np.float64], detected: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each true box's best IoU and best IoBB, [B] each, over the detected boxes; both lists are [., 4]."""
    if not len(detected):
        return np.zeros(len(truth)), np.zeros(len(truth))
    low = np.maximum(truth[:, None, :2], detected[None, :, :2])
    high = np.minimum((truth[:, :2] + truth[:, 2:])[:, None], (detected[:, :2] + detected[:, 2:])[None])
    shared = np.prod(np.maximum(high - low, 0.0), axis=2)
    true_area, detected_area = np.prod(truth[:, 2:], axis=1)[:, None], np.prod(detected[:, 2:], axis=1)[None]
    iou, iobb = shared / (true_area + detected_area - shared), shared / detected_area
    return iou.max(axis=1), iobb.max(axis=1)


def _distance_px(
    boxes: NDArray[np.float64], x_px: NDArray[np.float64], y_px: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the distance of each point to each box, [B, P]; 0 inside."""
    left, top, width, height = (column[:, None] for column in boxes.T)
    dx = np.maximum(np.maximum(left - x_px, x_px - left - width), 0.0)
    dy = np.maximum(np.maximum(top - y_px, y_px - top - height), 0.0)
    distance: NDArray[np.float64] = np.hypot(dx, dy)
    return distance
