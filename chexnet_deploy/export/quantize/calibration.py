"""Which images set the int8 ranges: chosen by list, checked, hashed.

Calibration images come from training patients only. Images of validation or test patients would make the gate that
follows a test on its own training data.
"""

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chexnet_deploy.datasets.data_set import DataSet
from chexnet_deploy.datasets.findings import NO_FINDING
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.datasets.patients import MAX_FILES, FileSet, encode_files
from chexnet_deploy.errors import CalibrationError
from chexnet_deploy.files import sha256_hex, sha256_of_file
from chexnet_deploy.images.preprocessing import Pixels, Preprocessing
from chexnet_deploy.inputs import quote_some
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
        files: which they are, for the leak guard.
    """

    images: tuple[str, ...]
    pixels: Pixels
    sha256: str
    files: FileSet

    @classmethod
    def read(
        cls,
        dataset: DataSet,
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
            CalibrationError: too few, too many, repeated or constant images, or images of patients that are kept for evaluation.
            DatasetError: a name is not in the data set.
            ImageError: an image can't be read.
        """
        chosen = check_names(dataset, names)
        arrays = []
        for name, pixels in zip(chosen.names, iter_pixels(chosen.paths, preprocessing), strict=True):
            if pixels.min() == pixels.max():
                raise CalibrationError(f"{name} has one gray value everywhere. Take it off the list.")
            arrays.append(pixels)
            if on_images is not None:
                on_images(len(arrays))
        hashes = [sha256_hex(pixels.tobytes()) for pixels in arrays]
        _refuse_repeated(hashes, "two images have the same pixels, sha256 {}. Keep one of them.")
        listing = "".join(f"{name} {digest}\n" for name, digest in zip(names, hashes, strict=True))
        files = encode_files(map(sha256_of_file, chosen.paths))
        return cls(tuple(names), np.concatenate(arrays), sha256_hex(listing.encode()), files)


def check_names(dataset: DataSet, names: Sequence[str]) -> LabelledImages:
    """Return the named images, as far as they can be judged without reading one.

    Raises:
        CalibrationError: too few, too many, one twice, or a patient kept for validation or test.
        DatasetError: a name is not in the data set, or its image is not on disk.
    """
    chosen = dataset.select(names)
    if not MIN_IMAGES <= len(names) <= MAX_FILES:
        raise CalibrationError(
            f"got {len(names):,} calibration images, needed {MIN_IMAGES} to {MAX_FILES:,}. Correct the list or build fp16."
        )
    _refuse_repeated(names, "the list names {} twice. Remove the repeats.")
    _refuse_evaluation_patients(dataset, chosen)
    return chosen


def choose_calibration(dataset: DataSet, n_images: int) -> tuple[str, ...]:
    """Return the names of training images that cover the findings, both sexes and both views; the same ones every time.

    Every finding gets its share of the training images, and no less than half of an equal share of the set while there are
    enough. Within a finding the groups of sex and view take turns. Order within a group is by hash of the name, so adding
    images to the data set changes little of the choice.

    Raises:
        CalibrationError: n_images is too few or too many, or the training split holds fewer.
    """
    train = dataset.require("train")
    if not MIN_IMAGES <= n_images <= min(MAX_FILES, len(train.names)):
        raise CalibrationError(
            f"asked for {n_images} calibration images; {MIN_IMAGES} to {MAX_FILES:,} are needed and the training split holds "
            f"{len(train.names)} on disk. Give --calibration-images with a number between, or use fp16 where there is none."
        )
    groups = _groups(train)
    counts = Counter(finding for each in groups for finding in each)
    by_hash = sorted(range(len(groups)), key=lambda row: hashlib.sha256(train.names[row].encode()).digest())
    chosen: dict[int, None] = {}
    # Rarest first: images of common findings also show rare ones, not the other way round.
    for finding in sorted(counts, key=lambda name: (counts[name], name)):
        share = max(round(n_images * counts[finding] / len(groups)), n_images // (2 * len(train.findings)))
        candidates = _take_turns(train, [row for row in by_hash if finding in groups[row]])
        have = sum(row in chosen for row in candidates)
        for row in candidates:
            if have >= share or len(chosen) == n_images:
                break
            if row not in chosen:
                chosen[row] = None
                have += 1
    for row in _take_turns(train, by_hash):
        if len(chosen) == n_images:
            break
        chosen.setdefault(row)
    return tuple(sorted(train.names[row] for row in chosen))


def coverage(images: LabelledImages) -> Mapping[str, int]:
    """Return how many images show each finding, sex and view."""
    counts: Counter[str] = Counter()
    for groups, sex, view in zip(_groups(images), images.sex, images.view, strict=True):
        counts.update((*groups, sex, view))
    return dict(counts)


def _groups(images: LabelledImages) -> list[tuple[str, ...]]:
    """Return what each image shows."""
    names = np.array(images.findings, object)
    return [tuple(names[present]) or (NO_FINDING,) for present in images.truth]


def _take_turns(images: LabelledImages, rows: Sequence[int]) -> list[int]:
    """Return all of the rows, the groups of sex and view in turn, each in the order it has."""
    groups: dict[tuple[str, str], deque[int]] = defaultdict(deque)
    for row in rows:
        groups[images.sex[row], images.view[row]].append(row)
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


def _refuse_evaluation_patients(dataset: DataSet, chosen: LabelledImages) -> None:
    kept = sorted(set(chosen.patients.tolist()) - set(dataset.require("train").patients.tolist()))
    if kept:
        named = quote_some(
            [name for name, patient in zip(chosen.names, chosen.patients, strict=True) if patient in kept]
        )
        raise CalibrationError(
            f"{len(kept)} patients of the calibration list are kept for validation or test: {named}. "
            f"Calibrate on images of training patients only."
        )
