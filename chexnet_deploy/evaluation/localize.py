"""Run a model on the images that have boxes and score its activation maps against them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.evaluation.records import Localization, LocalizedImage
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.metrics.localization import TOLERANCE_PX, Box, MapScore, group_by_finding, score_map, summarise
from chexnet_deploy.runtime.predictor import Prediction, Predictor

NIH_SIDE_PX: Final = 1024
"""Of every ChestX-ray14 image as shipped; TOLERANCE_PX is stated for it and shrinks with smaller ones."""


@dataclass(frozen=True, slots=True, eq=False)
class BoxedMap:
    """One finding's map of one image, for a picture."""

    path: Path
    cam: NDArray[np.float32]
    boxes: tuple[Box, ...]
    scored: LocalizedImage


def localize(
    predictor: Predictor,
    images: LabelledImages,
    boxes: Mapping[str, tuple[Box, ...]],
    findings: Sequence[str],
    *,
    on_images: Callable[[int, int], None],
) -> tuple[Localization, tuple[BoxedMap, ...]]:
    """Return the figures, and every map that has a box.

    Args:
        predictor: open.
        images: of them, those with a box of one of `findings` are run.
        boxes: image -> its boxes, in pixels of the images as they were drawn on: the largest on disk. Images of another
            size are left out and counted, since nothing says how they were shrunk.
        findings: that the model names.
        on_images: called after each image with the images done and of how many.

    Raises:
        DatasetError: no image has a box, or a box reaches out of its image.
        ImageError, SessionError: an image or the session can't be used.
    """
    boxed = [
        (name, path)
        for name, path in zip(images.names, images.paths, strict=True)
        if any(box.finding in findings for box in boxes.get(name, ()))
    ]
    if not boxed:
        raise DatasetError(
            f"none of the {len(images.names):,} images has a box; needed at least one. Next: put BBox_List_2017.csv "
            f"beside the table, or evaluate images that it names."
        )
    seen = _predict(predictor, boxed, on_images)
    frame = max((shape for shape, _, _ in seen), key=lambda shape: shape[0] * shape[1])
    tolerance_px = TOLERANCE_PX * max(frame) / NIH_SIDE_PX
    maps: list[BoxedMap] = []
    scores: dict[str, list[MapScore]] = {}
    for shape, (name, path), prediction in seen:
        groups = group_by_finding([box for box in boxes[name] if box.finding in findings])
        for finding, group in groups.items() if shape == frame else ():
            each, score = _score(name, path, finding, group, prediction, frame, tolerance_px)
            scores.setdefault(finding, []).append(score)
            maps.append(each)
    n_images = sum(shape == frame for shape, _, _ in seen)
    record = Localization(
        n_images=n_images,
        n_left_out=len(boxed) - n_images,
        height_px=frame[0],
        width_px=frame[1],
        summary=summarise(scores, findings, tolerance_px=tolerance_px),
        images=tuple(each.scored for each in maps),
    )
    return record, tuple(maps)


def _predict(
    predictor: Predictor, images: Sequence[tuple[str, Path]], on_images: Callable[[int, int], None]
) -> list[tuple[tuple[int, int], tuple[str, Path], Prediction]]:
    """Return each image's height and width, its name and file, and what the model says of it."""
    seen = []
    for done, (name, path) in enumerate(images, start=1):
        gray = read_image(path)
        seen.append(((gray.shape[0], gray.shape[1]), (name, path), predictor.predict(gray)))
        on_images(done, len(images))
    return seen


def _score(
    image: str,
    path: Path,
    finding: str,
    boxes: tuple[Box, ...],
    prediction: Prediction,
    frame: tuple[int, int],
    tolerance_px: float,
) -> tuple[BoxedMap, MapScore]:
    height_px, width_px = frame
    _check_inside(image, boxes, height_px, width_px)
    cam = prediction.maps[finding]
    score = score_map(cam, boxes, height_px=height_px, width_px=width_px, tolerance_px=tolerance_px)
    scored = LocalizedImage(
        image=image,
        finding=finding,
        probability=prediction.probabilities[finding],
        pointing=score.pointing,
        iou=score.iou,
        iobb=score.iobb,
    )
    return BoxedMap(path, cam, boxes, scored), score


def choose_pictures(maps: Sequence[BoxedMap]) -> dict[str, list[BoxedMap]]:
    """Return for each finding the maps of the best, the median and the worst IoU, so that none is a lucky pick."""
    by_finding: dict[str, list[BoxedMap]] = {}
    for each in maps:
        by_finding.setdefault(each.scored.finding, []).append(each)
    chosen = {}
    for finding, group in by_finding.items():
        ranked = sorted(group, key=lambda each: (-max(each.scored.iou), each.scored.image))
        chosen[finding] = [ranked[i] for i in sorted({0, len(ranked) // 2, len(ranked) - 1})]
    return chosen


def _check_inside(image: str, boxes: Sequence[Box], height_px: int, width_px: int) -> None:
    # A little tolerance, as boxes are drawn by hand; boxes of an image that was shrunk reach far out.
    for box in boxes:
        if box.x_px + box.width_px > 1.01 * width_px or box.y_px + box.height_px > 1.01 * height_px:
            raise DatasetError(
                f"{image}: found a box to ({box.x_px + box.width_px:.0f}, {box.y_px + box.height_px:.0f}) px in an "
                f"image of {width_px} x {height_px} px; needed boxes inside. Next: take the images at the size that "
                f"the boxes were drawn on, 1024 x 1024 px as NIH ships them."
            )
