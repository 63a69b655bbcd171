"""Which images set the int8 ranges: chosen by list, checked, hashed.

Calibration images come from training patients only. Images of validation or test patients would make the gate that
follows a test on its own training data.
"""

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.findings import FINDINGS, NO_FINDING
from chexnet_deploy.datasets.nih_tables import Radiograph
from chexnet_deploy.errors import CalibrationError
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.images.preprocessing import Pixels, Preprocessing
from chexnet_deploy.runtime.score import iter_pixels

MIN_IMAGES = 64  # measured down to this: benchmarks/int8/quantisers.py
_NAMED_IN_ERRORS = 4


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Checked calibration images.

    Attributes:
        images: file names, in the order of the list.
        pixels: uint8 [N, 1, S, S], in the same order.
        sha256: of the names, each with the SHA-256 of its pixels.
    """

    images: tuple[str, ...]
    pixels: Pixels
    sha256: str

    @classmethod
    def read(
        cls,
        dataset: ChestXray14,
        names: Sequence[str],
        preprocessing: Preprocessing,
        *,
        on_images: Callable[[int], None] | None = None,
    ) -> "CalibrationSet":
        """Read the images of a list and check them.

        Args:
            dataset: the data set they are in.
            names: file names, in the order they will be used.
            preprocessing: of the bundle to be quantised.
            on_images: called after each image with the images read.

        Raises:
            CalibrationError: too few, repeated or constant images, or images of patients that are kept for evaluation.
            DatasetError: a name is not in the data set.
            ImageError: an image can't be read.
        """
        radiographs = check_names(dataset, names)
        arrays = []
        for radiograph, pixels in zip(
            radiographs, iter_pixels([r.path for r in radiographs if r.path is not None], preprocessing), strict=True
        ):
            if pixels.min() == pixels.max():
                raise CalibrationError(f"{radiograph.image} has one gray value everywhere. Take it off the list.")
            arrays.append(pixels)
            if on_images is not None:
                on_images(len(arrays))
        hashes = [sha256_hex(pixels.tobytes()) for pixels in arrays]
        _refuse_repeated(hashes, "two images have the same pixels, sha256 {}. Keep one of them.")
        listing = "".join(f"{name} {digest}\n" for name, digest in zip(names, hashes, strict=True))
        return cls(tuple(names), np.concatenate(arrays), sha256_hex(listing.encode()))


def check_names(dataset: ChestXray14, names: Sequence[str]) -> tuple[Radiograph, ...]:
    """Return the named images, as far as they can be judged without reading one.

    Raises:
        CalibrationError: too few, one twice, or a patient kept for validation or test.
        DatasetError: a name is not in the data set, or its image is not on disk.
    """
    radiographs = dataset.select(names)
    if len(names) < MIN_IMAGES:
        raise CalibrationError(
            f"got {len(names)} calibration images, needed at least {MIN_IMAGES}. Add images or build fp16."
        )
    _refuse_repeated(names, "the list names {} twice. Remove the repeats.")
    _refuse_evaluation_patients(dataset, radiographs)
    return radiographs


def choose_calibration(dataset: ChestXray14, n_images: int) -> tuple[str, ...]:
    """Return the names of training images that cover the findings, both sexes and both views; the same ones every time.

    Every finding gets its share of the training images, and no less than a 28th of the set while there are enough. Within a
    finding the four groups of sex and view take turns. Order within a group is by hash of the name, so adding images
    to the data set changes little of the choice.

    Raises:
        CalibrationError: n_images is below the minimum, or the training split holds fewer.
    """
    train = dataset.require("train")
    if not MIN_IMAGES <= n_images <= len(train):
        raise CalibrationError(
            f"asked for {n_images} calibration images; at least {MIN_IMAGES} are needed and the training split holds "
            f"{len(train)} on disk. Give --calibration-images with a number between, or use fp16 where there is none."
        )
    counts = Counter(finding for radiograph in train for finding in _groups(radiograph))
    chosen: dict[str, None] = {}
    # Rarest first: images of common findings also show rare ones, not the other way round.
    for finding in sorted(counts, key=lambda name: (counts[name], name)):
        share = max(round(n_images * counts[finding] / len(train)), n_images // (2 * len(FINDINGS)))
        candidates = _take_turns([r for r in train if finding in _groups(r)])
        have = sum(r.image in chosen for r in candidates)
        for radiograph in candidates:
            if have >= share or len(chosen) == n_images:
                break
            if radiograph.image not in chosen:
                chosen[radiograph.image] = None
                have += 1
    for radiograph in _take_turns(train):
        if len(chosen) == n_images:
            break
        chosen.setdefault(radiograph.image)
    return tuple(sorted(chosen))


def coverage(radiographs: Sequence[Radiograph]) -> Mapping[str, int]:
    """Return how many images show each finding, sex and view."""
    counts: Counter[str] = Counter()
    for radiograph in radiographs:
        counts.update((*_groups(radiograph), radiograph.sex, radiograph.view))
    return dict(counts)


def _groups(radiograph: Radiograph) -> tuple[str, ...]:
    return tuple(radiograph.findings) or (NO_FINDING,)


def _take_turns(radiographs: Sequence[Radiograph]) -> list[Radiograph]:
    """Return all of them, the groups of sex and view in turn, each in the order of its names' hashes."""
    groups: dict[tuple[str, str], deque[Radiograph]] = defaultdict(deque)
    for radiograph in sorted(radiographs, key=lambda r: hashlib.sha256(r.image.encode()).digest()):
        groups[radiograph.sex, radiograph.view].append(radiograph)
    queues = deque(groups[key] for key in sorted(groups))
    ordered = []
    while queues:
        queue = queues.popleft()
        ordered.append(queue.popleft())
        if queue:
            queues.append(queue)
    return ordered


def _refuse_repeated(values: Sequence[str], message: str) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise CalibrationError(message.format(", ".join(repeated[:_NAMED_IN_ERRORS])))


def _refuse_evaluation_patients(dataset: ChestXray14, radiographs: Sequence[Radiograph]) -> None:
    allowed = {radiograph.patient for radiograph in dataset.split("train")}
    kept = sorted({radiograph.patient for radiograph in radiographs} - allowed)
    if kept:
        named = ", ".join(map(str, kept[:_NAMED_IN_ERRORS])) + (" …" if len(kept) > _NAMED_IN_ERRORS else "")
        raise CalibrationError(
            f"{len(kept)} patients of the calibration list are kept for validation or test: {named}. "
            f"Calibrate on images of training patients only."
        )
