"""Make a phantom ChestX-ray14: synthetic chest radiographs in the real data set's layout on disk.

Phantoms let the whole chain run, and be tested, where the real images can't go. They prove that the machinery works and
nothing about patients: no number measured on them says how well a network reads a real radiograph.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from chexnet_deploy.datasets.findings import FINDINGS, NO_FINDING
from training.phantoms.anatomy import Anatomy, Chest, Map, Pose, Stroke, draw_healthy, smooth_noise
from training.phantoms.findings import paint_finding, with_finding

Gray: TypeAlias = NDArray[np.uint8]
Box: TypeAlias = tuple[float, float, float, float]
"""x, y, width, height in pixels of the image."""

TABLE_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
# The official boxes cover eight findings, and call one of them by another name.
BOX_NAMES = {
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Effusion": "Effusion",
    "Infiltration": "Infiltrate",
    "Mass": "Mass",
    "Nodule": "Nodule",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
}
MAX_FOLLOW_UPS = 4
MIN_SIDE_PX = 32
DETECTORS = ("2500,2048,0.168,0.168", "2048,2500,0.171,0.171", "2992,2991,0.143,0.143", "3056,2544,0.139,0.139")

# One stream of random numbers for each purpose, so that a finding never moves the noise or the patient's ribs.
_PATIENT, _VISIT, _OUTLINE, _EXPOSURE, _LABEL_NOISE, _SPLIT, _FINDING = range(7)


@dataclass(frozen=True)
class PhantomSpec:
    """What to make.

    Args:
        patients: number of patients, 1 to 4 images each.
        test_patients: how many of them go to test_list.txt.
        side_px: side of the square images; the real set has 1024.
        seed: everything follows from it.
        prevalence: share of images that show a finding, the same for each of the 14.
        label_noise: share of the labels in the table that are wrong; images and boxes stay right.
    """

    patients: int
    test_patients: int
    side_px: int = 1024
    seed: int = 0
    prevalence: float = 0.13
    label_noise: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.patients <= 99_999_999:  # patient IDs have eight digits
            raise ValueError(f"patients is {self.patients}; it must be 1 to 99999999.")
        if not 0 <= self.test_patients <= self.patients:
            raise ValueError(f"test_patients is {self.test_patients}; it must be 0 to patients ({self.patients}).")
        if self.side_px < MIN_SIDE_PX:
            raise ValueError(f"side_px is {self.side_px}; below {MIN_SIDE_PX} no finding can be seen.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative.")
        if not 0.0 < self.prevalence < 0.5:
            raise ValueError(f"prevalence is {self.prevalence}; it must lie between 0 and 0.5.")
        if not 0.0 <= self.label_noise < 0.5:
            raise ValueError(f"label_noise is {self.label_noise}; it must be 0 or more and below 0.5.")


@dataclass(frozen=True)
class Study:
    """One image's row of the table, with the findings that are really drawn."""

    patient: int
    follow_up: int
    age_years: int
    sex: Literal["F", "M"]
    view: Literal["AP", "PA"]
    findings: tuple[str, ...]

    @property
    def image_name(self) -> str:
        """The file's name in the official form."""
        return f"{self.patient:08d}_{self.follow_up:03d}.png"


@dataclass(frozen=True)
class Radiograph:
    """One drawn image and what is known of it.

    Args:
        pixels: uint8 [side_px, side_px], bone bright.
        boxes: smallest box around each finding drawn; a finding that covers no pixel has none.
        heart_ratio: the cardiothoracic ratio it was drawn with.
    """

    pixels: Gray
    boxes: dict[str, Box]
    heart_ratio: float


def plan_studies(spec: PhantomSpec) -> list[Study]:
    """Return every image of the data set in the table's order; needs no drawing."""
    return [study for patient in range(1, spec.patients + 1) for study in _patient_studies(spec, patient)]


def _patient_studies(spec: PhantomSpec, patient: int) -> list[Study]:
    rng = _stream(spec.seed, _PATIENT, patient)
    sex: Literal["F", "M"] = "F" if rng.random() < 0.44 else "M"
    frailty = rng.standard_normal()  # makes findings come together, as in the sick
    constitution = rng.standard_normal(len(FINDINGS))
    age = int(np.clip(50 + 7 * frailty + rng.normal(0, 13), 18, 94))
    threshold = NormalDist().inv_cdf(1.0 - spec.prevalence)
    studies = []
    for follow_up in range(int(rng.choice(MAX_FOLLOW_UPS, p=(0.62, 0.22, 0.1, 0.06))) + 1):
        # A Gaussian copula: each liability is standard normal, so that each finding keeps its prevalence.
        today = rng.standard_normal(len(FINDINGS))
        liability = math.sqrt(0.09) * frailty + math.sqrt(0.75) * constitution + math.sqrt(0.16) * today
        findings = tuple(f for f, value in zip(FINDINGS, liability, strict=True) if value > threshold)
        view: Literal["AP", "PA"] = "AP" if rng.random() < 0.38 + 0.04 * np.clip(frailty, -2, 2) else "PA"
        studies.append(Study(patient, follow_up, min(age + follow_up // 2, 95), sex, view, findings))
    return studies


def _stream(seed: int, purpose: int, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, *key])


def draw_radiograph(study: Study, *, seed: int, side_px: int) -> Gray:
    """Return one image, uint8 [side_px, side_px]; the same for the same arguments on every run."""
    return draw_with_regions(study, seed=seed, side_px=side_px).pixels


def draw_with_regions(study: Study, *, seed: int, side_px: int) -> Radiograph:
    """Return one image with the boxes of its findings."""
    key = (study.patient, study.follow_up)
    anatomy = Anatomy.sample(_stream(seed, _PATIENT, study.patient, 1), woman=study.sex == "F")
    visit = _stream(seed, _VISIT, *key)
    anatomy, pose = _stand(anatomy, study.view, visit)
    # A finding keeps its place and shape between follow-ups: its stream doesn't know the visit.
    streams = {f: (_FINDING, study.patient, FINDINGS.index(f)) for f in study.findings}
    for finding, stream in streams.items():
        anatomy = with_finding(anatomy, finding, _stream(seed, *stream))
    chest = Chest(anatomy, pose, side_px, _stream(seed, _OUTLINE, study.patient))
    draw_healthy(chest, _stream(seed, _OUTLINE, study.patient, 1))
    boxes = {}
    for finding, stream in streams.items():
        box = _box(paint_finding(chest, finding, _stream(seed, *stream)))
        if box is not None:
            boxes[finding] = box
    if study.view == "AP" and visit.random() < 0.4:
        _leads(chest, visit)
    return Radiograph(_expose(chest.path, _stream(seed, _EXPOSURE, *key)), boxes, anatomy.heart_ratio)


def _stand(anatomy: Anatomy, view: str, rng: np.random.Generator) -> tuple[Anatomy, Pose]:
    """Return the anatomy and pose on the day: AP magnifies the heart, and the patient lies and breathes in less."""
    breath = rng.uniform(-0.02, 0.03)
    zoom, lean = rng.uniform(0.85, 1.12), 0.035
    a = anatomy
    if view == "AP":
        breath += rng.uniform(0.02, 0.06)
        lean = 0.06
        a = replace(a, heart_ratio=a.heart_ratio * rng.uniform(1.04, 1.12), clavicle_y=a.clavicle_y - 0.035)
        a = replace(a, upper_vessels=1.0, arm_angle=a.arm_angle * 0.5)
    a = replace(a, diaphragm_y=(a.diaphragm_y[0] - breath, a.diaphragm_y[1] - breath), heart_y=a.heart_y - breath)
    shift = (rng.normal(0.0, 0.035), rng.normal(0.0, 0.035))
    return a, Pose(angle_rad=rng.normal(0.0, lean), zoom=zoom, shift=shift)


def _box(region: Map) -> Box | None:
    mask = region > 0.4
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if len(columns) == 0:
        return None
    x, y = int(columns[0]), int(rows[0])
    return float(x), float(y), float(columns[-1] + 1 - x), float(rows[-1] + 1 - y)


def _leads(chest: Chest, rng: np.random.Generator) -> None:
    """Lay ECG cables over the chest."""
    strokes: list[Stroke] = []
    for _ in range(int(rng.integers(2, 4))):
        x, y = rng.uniform(-0.28, 0.28), rng.uniform(0.2, 0.7)
        s = np.linspace(0.0, 1.0, 14)
        end = rng.uniform(-0.6, 0.6)
        path = np.stack([x + (end - x) * s + 0.05 * np.sin(4 * s + x * 9) * s, y + (1.1 - y) * s**1.4], axis=1)
        strokes.append((path, 0.004, 1.0))
        ring = np.linspace(0.0, 2 * math.pi, 12)
        strokes.append((np.stack([x + 0.011 * np.cos(ring), y + 0.011 * np.sin(ring)], axis=1), 0.007, 1.0))
    chest.path += 0.9 * chest.lines(strokes)


def _expose(path: Map, rng: np.random.Generator) -> Gray:
    """Return the picture that a digital detector makes of a map of path lengths."""
    side_px = len(path)
    beam = np.exp(-path)
    small = Image.fromarray(beam).resize((32, 32), Image.Resampling.BOX).resize((8, 8), Image.Resampling.BICUBIC)
    scatter = np.array(small.resize((side_px, side_px), Image.Resampling.BICUBIC))
    share = rng.uniform(0.05, 0.22)
    beam = (1.0 - share) * beam + share * np.maximum(scatter, 0.0)
    # Pixels that average more of the detector carry less quantum noise.
    sigma = rng.uniform(0.02, 0.06) * math.sqrt(max(side_px, 128) / 1024)
    beam += sigma * np.sqrt(0.1 * beam) * rng.standard_normal(beam.shape, dtype=np.float32)
    film = -np.log(np.maximum(beam, 0.004))
    # Uneven sensitivity, grids out of focus, folds of skin.
    film += rng.uniform(0.12, 0.38) * smooth_noise(rng, 4, side_px)
    film += rng.uniform(0.08, 0.18) * smooth_noise(rng, 7, side_px)
    # Exposure control looks at the middle of the field, then the reader's window is a matter of taste.
    middle = film[side_px // 5 : side_px * 4 // 5 : side_px // 32, side_px // 6 : side_px * 5 // 6 : side_px // 32]
    dark, bright = np.quantile(middle, (0.05, 0.85))
    low, high = rng.uniform(0.10, 0.32), rng.uniform(0.72, 0.96)
    gray = low + (film - dark) * ((high - low) / (bright - dark))
    np.clip(gray, 0.0, 1.0, out=gray)
    gray += rng.uniform(-0.22, 0.15) * gray * (1.0 - gray)  # the display's curve
    return _label((gray * 255.0).astype(np.uint8), rng)


def _label(pixels: Gray, rng: np.random.Generator) -> Gray:
    """Return the image with its side marker and, in some, the collimator's black border."""
    side_px = len(pixels)
    if rng.random() < 0.25:
        margin_px = (rng.uniform(0.0, 0.05, 4) * side_px).astype(int)
        field = np.zeros_like(pixels)
        inner = np.s_[margin_px[0] : side_px - margin_px[1], margin_px[2] : side_px - margin_px[3]]
        field[inner] = pixels[inner]
        pixels = field
    image = Image.fromarray(pixels)
    left = rng.random() < 0.75
    letter = ((0, 0), (0, 2), (1, 2)) if left else ((0, 2), (0, 0), (1, 0), (1, 1), (0, 1), (1, 2))
    scale = 0.016 * side_px
    x = (rng.uniform(0.88, 0.94) if left else rng.uniform(0.04, 0.1)) * side_px
    y = rng.uniform(0.04, 0.2) * side_px
    line = [(x + scale * dx, y + scale * dy) for dx, dy in letter]
    ImageDraw.Draw(image).line(line, fill=int(rng.integers(200, 256)), width=max(1, side_px // 250))
    return np.array(image)


def write_phantom(
    root: Path,
    spec: PhantomSpec,
    *,
    workers: int | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> None:
    """Write the data set; `root` appears complete or not at all.

    Args:
        root: must not exist yet.
        spec: what to make.
        workers: processes; None is one for each core. The files don't depend on it. With 2 or more, a script that
            calls this needs the usual `if __name__ == "__main__":`, as workers are spawned.
        on_image: called with the number of images written and the total.
    """
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} exists; a phantom is never written over anything. Remove it or name another.")
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        (partial / "images").mkdir()
        studies = plan_studies(spec)
        boxes = _write_images(partial / "images", spec, studies, workers, on_image)
        _write_tables(partial, spec, studies, boxes)
        partial.chmod(0o755)  # mkdtemp's 0700 would keep other users out
        partial.rename(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_images(
    folder: Path,
    spec: PhantomSpec,
    studies: Sequence[Study],
    workers: int | None,
    on_image: Callable[[int, int], None] | None,
) -> list[dict[str, Box]]:
    jobs = [(folder, study, spec.seed, spec.side_px) for study in studies]
    boxes = []
    count = workers or os.cpu_count() or 1
    if count == 1:
        for done, job in enumerate(jobs, start=1):
            boxes.append(_write_image(job))
            if on_image:
                on_image(done, len(jobs))
        return boxes
    # A fork would copy torch's threads half alive, so the workers start afresh.
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        for done, result in enumerate(pool.map(_write_image, jobs, chunksize=8), start=1):
            boxes.append(result)
            if on_image:
                on_image(done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)
    return boxes


def _write_image(job: tuple[Path, Study, int, int]) -> dict[str, Box]:
    folder, study, seed, side_px = job
    radiograph = draw_with_regions(study, seed=seed, side_px=side_px)
    Image.fromarray(radiograph.pixels).save(folder / study.image_name, compress_level=3)
    return radiograph.boxes


def _table_labels(study: Study, spec: PhantomSpec) -> str:
    flips = _stream(spec.seed, _LABEL_NOISE, study.patient, study.follow_up).random(len(FINDINGS)) < spec.label_noise
    written = [f for f, flip in zip(FINDINGS, flips, strict=True) if (f in study.findings) != flip]
    return "|".join(sorted(written)) or NO_FINDING  # the official table sorts by name


def _write_tables(root: Path, spec: PhantomSpec, studies: Sequence[Study], boxes: Sequence[dict[str, Box]]) -> None:
    rows, box_rows = [TABLE_HEADER], [BOX_HEADER]
    for study, found in zip(studies, boxes, strict=True):
        detector = DETECTORS[study.patient % len(DETECTORS)]
        rows.append(
            f"{study.image_name},{_table_labels(study, spec)},{study.follow_up},{study.patient},{study.age_years},"
            f"{study.sex},{study.view},{detector}"
        )
        for finding, name in BOX_NAMES.items():
            if finding in found:
                x, y, width, height = found[finding]
                box_rows.append(f"{study.image_name},{name},{x},{y},{width},{height},,,")
    order = _stream(spec.seed, _SPLIT).permutation(np.arange(1, spec.patients + 1))
    test = set(order[: spec.test_patients].tolist())
    lists = {
        "train_val_list.txt": [s.image_name for s in studies if s.patient not in test],
        "test_list.txt": [s.image_name for s in studies if s.patient in test],
        "Data_Entry_2017_v2020.csv": rows,
        "BBox_List_2017.csv": box_rows,
    }
    for name, lines in lists.items():
        (root / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a phantom data set from the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.phantoms.draw", description=__doc__)
    parser.add_argument("root", type=Path, help="directory to make; must not exist")
    parser.add_argument("--patients", type=int, required=True)
    parser.add_argument("--test-patients", type=int, help="default: a fifth of the patients")
    parser.add_argument("--side-px", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prevalence", type=float, default=0.13)
    parser.add_argument("--label-noise", type=float, default=0.0)
    parser.add_argument("--workers", type=int, help="default: one process for each core")
    given = parser.parse_args(arguments)
    test_patients = given.patients // 5 if given.test_patients is None else given.test_patients
    try:
        spec = PhantomSpec(
            given.patients, test_patients, given.side_px, given.seed, given.prevalence, given.label_noise
        )
        write_phantom(given.root, spec, workers=given.workers)
    except (ValueError, OSError) as err:
        parser.error(str(err))


if __name__ == "__main__":
    main()
