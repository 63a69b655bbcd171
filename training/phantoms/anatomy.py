"""Draw the healthy chest of a phantom radiograph as a map of X-ray path lengths, in unit coordinates.

Knows geometry and attenuation only: no findings (findings.py), no exposure, tables or files (draw.py).

Anatomical coordinates: x is 0 on the midline and grows to the right of the picture, which is the patient's left; y is
0 at the top edge and 1 at the bottom. A path length is in nominal attenuation units; the beam is exp(-path).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Map: TypeAlias = NDArray[np.floating[Any]]
"""[side_px, side_px], float32 wherever speed matters"""
Point: TypeAlias = tuple[float, float]
"""Anatomical x, y."""
Points: TypeAlias = NDArray[np.float64]
"""[N, 2] anatomical points, or [N] of one of their coordinates."""
Stroke: TypeAlias = tuple[Points, float, float]
"""Anatomical points [N, 2], width in image sides, brightness 0..1."""

LINE_CANVAS_PX = 256  # thin lines are drawn at this side or more and averaged down, or they would be aliased
HILUM: Point = (0.085, 0.43)


@dataclass(frozen=True)
class Anatomy:
    """One patient's chest as it was on one day; lengths in image sides.

    Args:
        chest_half: inner half width of the thorax at its widest.
        apex_y: top of the lungs.
        diaphragm_y: height of the right and the left dome.
        dome: how far the domes rise above the costophrenic angles.
        heart_ratio: cardiothoracic ratio, the heart's width over the thorax's inner width.
        heart_y: height of the heart's centre.
        mediastinum_half: half width of the upper mediastinum.
        knob_y: height of the aortic knob.
        midline_shift: how far the mediastinum lies off the midline.
        rib_spacing: distance between posterior ribs at the spine.
        rib_phase: where the first rib lies, 0..1.
        rib_density: attenuation of a rib.
        clavicle_y: height of the clavicles' medial ends.
        soft_depth: attenuation of the trunk without its lungs.
        lung_depth: attenuation taken away where there is lung.
        breast: attenuation of the breast shadows, 0 for none.
        breast_y: height of the breasts' centre.
        vessels: share of the lung vessels seen.
        upper_vessels: width of upper-lobe vessels over lower-lobe vessels.
        arm_angle: how far the arms stand off, radians.
    """

    chest_half: float
    apex_y: float
    diaphragm_y: tuple[float, float]
    dome: float
    heart_ratio: float
    heart_y: float
    mediastinum_half: float
    knob_y: float
    midline_shift: float
    rib_spacing: float
    rib_phase: float
    rib_density: float
    clavicle_y: float
    soft_depth: float
    lung_depth: float
    breast: float
    breast_y: float
    vessels: float
    upper_vessels: float
    arm_angle: float

    @staticmethod
    def sample(rng: np.random.Generator, *, woman: bool) -> Anatomy:
        """Return a healthy adult's chest, upright and inspired (PA)."""
        dome_y = rng.uniform(0.69, 0.82)
        return Anatomy(
            chest_half=rng.uniform(0.31, 0.40) - 0.015 * woman,
            apex_y=rng.uniform(0.09, 0.14),
            diaphragm_y=(dome_y, dome_y + rng.uniform(-0.005, 0.035)),
            dome=rng.uniform(0.06, 0.14),
            heart_ratio=rng.uniform(0.41, 0.49),
            heart_y=dome_y - rng.uniform(0.10, 0.14),
            mediastinum_half=rng.uniform(0.045, 0.06),
            knob_y=rng.uniform(0.27, 0.31),
            midline_shift=rng.uniform(-0.008, 0.008),
            rib_spacing=rng.uniform(0.062, 0.074),
            rib_phase=rng.uniform(0.0, 1.0),
            rib_density=rng.uniform(0.14, 0.28),
            clavicle_y=rng.uniform(0.15, 0.19),
            soft_depth=rng.uniform(2.6, 3.6),
            lung_depth=rng.uniform(0.62, 0.70),
            breast=float(woman and rng.random() < 0.75) * rng.uniform(0.15, 0.7),
            breast_y=rng.uniform(0.64, 0.78),
            vessels=rng.uniform(0.75, 1.0),
            upper_vessels=rng.uniform(0.6, 0.8),
            arm_angle=rng.uniform(0.1, 0.5),
        )

    def lung_edges(self, y: Map) -> tuple[Map, Map]:
        """Return the distances from the midline of a lung's medial and lateral edges at the heights y."""
        t = np.clip((y - self.apex_y) / (0.88 - self.apex_y), 0.0, 1.0)
        top = 0.115
        lateral = top + (self.chest_half - top) * np.sqrt(1.0 - (1.0 - t) ** 3)
        medial = self.mediastinum_half - 0.012 + (top - self.mediastinum_half) * np.exp(-t / 0.045)
        return medial, lateral

    def lung_points(self, down: Points, across: Points, *, left: bool) -> Points:
        """Return points [N, 2] of one lung: down 0 (apex) to 1 (diaphragm), across 0 (medial) to 1 (lateral)."""
        y = self.apex_y + 0.02 + down * (self.diaphragm_y[int(left)] - self.apex_y - 0.03)
        medial, lateral = self.lung_edges(y)
        x = medial + across * (lateral - medial)
        return np.stack([x if left else -x, y], axis=-1)

    def lung_point(self, down: float, across: float, *, left: bool) -> Point:
        """Return one of `lung_points`."""
        x, y = self.lung_points(np.float64(down), np.float64(across), left=left)
        return float(x), float(y)


@dataclass(frozen=True)
class Pose:
    """How the patient stood before the detector: anatomical -> picture coordinates.

    Args:
        angle_rad: rotation in the picture's plane.
        zoom: picture over anatomical lengths.
        shift: of the picture's centre, in image sides.
    """

    angle_rad: float
    zoom: float
    shift: Point

    def to_picture(self, points: Points) -> Points:
        """Return picture coordinates [N, 2] in 0..1 of anatomical points [N, 2]."""
        cos, sin = math.cos(self.angle_rad) * self.zoom, math.sin(self.angle_rad) * self.zoom
        x, y = points[:, 0], points[:, 1] - 0.5
        return np.stack([cos * x - sin * y + self.shift[0] + 0.5, sin * x + cos * y + self.shift[1] + 0.5], axis=1)

    def anatomical_grid(self, side_px: int) -> tuple[Map, Map]:
        """Return anatomical x and y of every pixel's centre, each [side_px, side_px]."""
        at = (np.arange(side_px, dtype=np.float32) + 0.5) / side_px - 0.5
        u, v = (at - self.shift[0])[None, :], (at - self.shift[1])[:, None]
        cos, sin = math.cos(self.angle_rad) / self.zoom, math.sin(self.angle_rad) / self.zoom
        return (cos * u + sin * v).astype(np.float32), (cos * v - sin * u + 0.5).astype(np.float32)


class Chest:
    """The maps that anatomy and findings are painted on.

    Args:
        anatomy: what to draw.
        pose: where to draw it.
        side_px: side of every map.
        rng: draws the small irregularities of the outlines.
    """

    def __init__(self, anatomy: Anatomy, pose: Pose, side_px: int, rng: np.random.Generator) -> None:
        self.anatomy, self.pose, self.side_px = anatomy, pose, side_px
        x, y = pose.anatomical_grid(side_px)
        # Real outlines wander by a few millimetres.
        wander = 0.006 * smooth_noise(rng, 7, side_px)
        x += wander
        y += wander.T
        self.x, self.y = x, y
        self.is_left = x > 0.0
        self.x_abs = np.abs(x)
        self.medial, self.lateral = anatomy.lung_edges(y)
        self.across = self.x_abs / self.lateral  # 0 on the midline, 1 on the inner chest wall
        self.floor = self._diaphragm()
        self.wall_gap = self.lateral - self.x_abs  # depth below the chest wall
        self.inside = np.minimum(self.wall_gap, self.x_abs - self.medial)
        self.apex_gap = y - anatomy.apex_y
        self.below = step(y - self.floor, 0.008)
        self.lung = step(self.inside, 0.006) * step(self.floor - y, 0.008) * step(self.apex_gap, 0.008)
        self.path: Map = np.zeros_like(x)
        self.heart = heart_shadow(self)
        self.clear = self.lung * (1.0 - 0.85 * self.heart)  # lung not hidden behind the heart
        self.air_path: Map = np.zeros_like(x)  # what the lungs' air takes away from path
        self.vessel_path: Map = np.zeros_like(x)  # the vessels' share of path: what covers a vessel takes it away

    def _diaphragm(self) -> Map:
        a = self.anatomy
        right_y, left_y = a.diaphragm_y
        q = self.across - np.float32(0.48)
        q2 = q * q
        fall = np.where(q > 0.0, 3.3 * q2 + 6.0 * q2 * q2, 1.1 * q2)
        floor: Map = right_y + (left_y - right_y) * self.is_left.astype(np.float32) + a.dome * fall
        return floor

    def window(self, low: Point, high: Point) -> tuple[slice, slice]:
        """Return rows and columns that show an anatomical rectangle; what is small needn't be computed elsewhere."""
        pose, margin = self.pose, 0.03  # more than the outlines wander
        cos, sin = math.cos(pose.angle_rad) * pose.zoom, math.sin(pose.angle_rad) * pose.zoom
        corners = [(x, y - 0.5) for x in (low[0], high[0]) for y in (low[1], high[1])]
        columns = [cos * x - sin * y + pose.shift[0] + 0.5 for x, y in corners]
        rows = [sin * x + cos * y + pose.shift[1] + 0.5 for x, y in corners]

        def span(at: list[float]) -> slice:
            first, last = int((min(at) - margin) * self.side_px), int((max(at) + margin) * self.side_px) + 1
            return slice(max(first, 0), max(last, 0))

        return span(rows), span(columns)

    def lines(self, strokes: list[Stroke], blur: float = 0.0) -> Map:
        """Return a map 0..1 of smooth lines, blurred by `blur` image sides; a later stroke covers an earlier one."""
        canvas_px = max(LINE_CANVAS_PX, self.side_px)
        canvas = Image.new("L", (canvas_px, canvas_px))
        pen = ImageDraw.Draw(canvas)
        at = self.pose.to_picture(np.concatenate([points for points, _, _ in strokes])) * canvas_px
        flat: list[float] = at.ravel().tolist()
        start = 0
        for points, width, brightness in strokes:
            end = start + 2 * len(points)
            width_px = width * canvas_px * self.pose.zoom
            # A line thinner than a pixel is one pixel of less brightness.
            fill = round(255 * brightness * min(1.0, max(width_px, 0.3)))
            pen.line(flat[start:end], fill=fill, width=max(1, round(width_px)))
            start = end
        radius_px = max(blur, 0.0007 * (canvas_px == self.side_px)) * canvas_px
        if radius_px > 0.5:  # averaging down to a small image blurs enough
            canvas = canvas.filter(ImageFilter.GaussianBlur(radius_px))
        if canvas_px != self.side_px:
            canvas = canvas.resize((self.side_px, self.side_px), Image.Resampling.BOX)
        drawn: Map = np.asarray(canvas, dtype=np.float32) / np.float32(255)
        return drawn


def step(distance: Map, width: float) -> Map:
    """Return a 0..1 ramp where `distance` passes 0, 2 * width wide."""
    t: Map = distance * np.float32(0.5 / width)
    t += np.float32(0.5)
    return np.clip(t, 0.0, 1.0, out=t)


def smooth_step(distance: Map, width: float) -> Map:
    """Return `step` without its corners, for ramps wide enough to show them."""
    t = step(distance, width)
    smooth: Map = np.float32(3) - 2 * t
    smooth *= t
    smooth *= t
    return smooth


def bell(distance: Map, width: float) -> Map:
    """Return exp(-(distance / width)^2)."""
    t: Map = distance * np.float32(1.0 / width)
    t *= t
    np.negative(t, out=t)
    np.exp(t, out=t)
    return t


def dome(r2: Map) -> Map:
    """Return the thickness of a unit ball at squared radius r2, 0 outside."""
    thickness: Map = np.sqrt(np.maximum(1.0 - r2, 0.0))
    return thickness


def smooth_noise(rng: np.random.Generator, cells: int, side_px: int) -> Map:
    """Return noise of unit variance per cell, smooth between cells x cells random values."""
    # Not a matrix product: BLAS would start threads in every worker, four times slower than this.
    grid = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize((side_px, side_px), Image.Resampling.BICUBIC))


def draw_healthy(chest: Chest, rng: np.random.Generator) -> None:
    """Add trunk, lungs, heart, bones and vessels to the chest's path map."""
    _trunk(chest)
    _mediastinum(chest)
    _spine(chest)
    _ribs(chest)
    _shoulder_girdle(chest)
    _vessels(chest, rng)
    _abdomen(chest, rng)


def _trunk(c: Chest) -> None:
    a = c.anatomy
    # Neck, shoulders, trunk: half width of the outline at each height.
    neck = 0.085 + 0.45 * smooth_step(c.y - 0.075, 0.09)
    outline = np.minimum(neck, np.float32(0.5)) - (0.445 - a.chest_half) * smooth_step(c.y - 0.36, 0.17)
    trunk = dome((c.x / outline) ** 2) * (0.72 + 0.28 * step(c.y - 0.15, 0.15))
    # Arms hang beside the chest.
    arm_x = 0.44 + math.tan(a.arm_angle) * (c.y - 0.22)
    arm_gap = c.x_abs - arm_x
    below_shoulder = step(c.y - 0.17, 0.06)
    arm = 0.55 * dome((arm_gap / 0.075) ** 2) * below_shoulder
    humerus = 0.3 * dome((arm_gap / 0.024) ** 2) * below_shoulder
    # Liver, spleen and stomach fill the trunk more than muscle does.
    c.path += a.soft_depth * np.maximum(trunk * (1.0 + 0.15 * c.below), arm) + humerus
    # Lung takes soft tissue away: less close to its rim, where the beam crosses more chest wall.
    c.air_path = a.soft_depth * a.lung_depth * c.lung * (0.5 + 0.5 * np.clip(c.wall_gap * 11.0, 0.0, 1.0))
    w = c.window((-0.5, 0.0), (0.5, a.apex_y + 0.25))
    c.air_path[w] *= 1.0 - 0.35 * np.exp(np.maximum(c.apex_gap[w], 0.0) * np.float32(-1 / 0.08))
    c.path -= c.air_path
    # The lung's posterior recess reaches behind the dome of the diaphragm.
    w = c.window((-0.5, min(a.diaphragm_y) - 0.02), (0.5, 1.3))
    below_dome = np.maximum(c.y[w] - c.floor[w], 0.0) * np.float32(-1 / 0.04)
    c.path[w] -= 0.25 * np.exp(below_dome) * c.below[w] * step(c.inside[w], 0.01)
    if a.breast > 0.0:
        w = c.window((-0.4, a.breast_y - 0.14), (0.4, a.breast_y + 0.14))
        r2 = ((c.x_abs[w] - 0.21) / 0.17) ** 2 + ((c.y[w] - a.breast_y) / 0.13) ** 2
        shade = 0.55 + 0.45 * step(c.y[w] - a.breast_y, 0.03)
        c.path[w] += a.breast * np.minimum(1.6 * dome(r2), 1.0) * shade


def heart_edges(a: Anatomy) -> tuple[float, float]:
    """Return how far the heart reaches to the patient's right and left of the midline, in image sides."""
    width = a.heart_ratio * 2.0 * a.chest_half
    return 0.32 * width, 0.68 * width


def heart_shadow(c: Chest) -> Map:
    """Return the heart's thickness, 0..1: its apex points down and left, the right atrium is rounder."""
    a = c.anatomy
    right, left = heart_edges(a)
    x = c.x - a.midline_shift
    slope = c.y - a.heart_y - 0.3 * np.maximum(x, 0.0)
    reach = right + (left - right) * (x > 0.0).astype(np.float32)
    height = np.where(slope > 0.0, np.float32(0.20), np.float32(0.22))
    r2 = (x / reach) ** 2 + (slope / height) ** 2
    shadow: Map = np.minimum(1.7 * dome(r2), 1.0)
    return shadow


def _mediastinum(c: Chest) -> None:
    """Add heart, great vessels, trachea and main bronchi."""
    a = c.anatomy
    water = 0.54 * c.heart
    w = c.window((-0.16, 0.0), (0.16, 0.85))
    x, y = c.x[w] - a.midline_shift, c.y[w]
    # Vena cava on the right, aortic knob and pulmonary trunk on the left, widening into the heart.
    half = a.mediastinum_half + 0.001 + 0.035 * smooth_step(y - 0.40, 0.08)
    trunk = step(half - np.abs(x - 0.003), 0.009) * step(y - 0.06, 0.08) * step(a.heart_y - y, 0.10)
    knob = dome(((x - a.mediastinum_half + 0.012) / 0.040) ** 2 + ((y - a.knob_y) / 0.042) ** 2)
    water[w] = np.maximum(np.maximum(water[w], 0.32 * trunk), 0.36 * knob)
    c.path += a.soft_depth * water * (0.15 + 0.85 * c.lung)
    descending = bell(x - a.mediastinum_half - 0.006, 0.006) * step(y - a.knob_y, 0.03) * c.heart[w]
    fork = a.knob_y + 0.07
    above = step(fork - y, 0.015)
    tube = dome(((x - 0.004) / 0.020) ** 2) * above
    cartilage = bell(np.abs(x - 0.004) - 0.023, 0.004) * above
    gap = np.abs(x) - 0.95 * np.maximum(y - fork + 0.01, 0.0)
    bronchi = dome((gap / 0.014) ** 2) * step(y - fork, 0.015) * step(fork + 0.09 - y, 0.02)
    c.path[w] += 0.07 * a.soft_depth * trunk + 0.06 * descending - 0.42 * tube + 0.10 * cartilage - 0.28 * bronchi


def _spine(c: Chest) -> None:
    """Add the vertebrae: bodies between darker discs, spinous processes and pedicles."""
    w = c.window((-0.06, -0.3), (0.06, 1.3))
    phase = c.y[w] * np.float32(1 / 0.052) + c.anatomy.rib_phase
    phase -= np.floor(phase)
    near = c.x_abs[w]
    bodies = step(0.036 - near, 0.005) * (0.34 - 0.2 * bell(phase - 0.5, 0.1))
    pedicles = bell(near - 0.023, 0.006) * bell(phase - 0.1, 0.16)
    processes = bell(near, 0.006) * bell(phase - 0.8, 0.2)
    c.path[w] += bodies + 0.16 * pedicles + 0.1 * processes


def _ribs(c: Chest) -> None:
    a = c.anatomy
    q = np.minimum(c.across, np.float32(1.15))
    cage = step(1.06 - c.across, 0.03) * step(c.y - a.apex_y + 0.03, 0.02)
    cage *= (1.0 - 0.65 * c.below) * (1.0 - 0.5 * c.heart)  # thick tissue leaves them little contrast
    q2 = q * q
    # Posterior ribs leave the spine nearly level and drop at the side; anterior ribs rise towards the side.
    posterior = (c.y - a.apex_y - 0.02 + 0.005 * q - 0.055 * q2 - 0.10 * q2 * q2) / a.rib_spacing + a.rib_phase
    anterior = (c.y - a.apex_y + 0.27 * q - 0.10 * q2) / (1.18 * a.rib_spacing) + a.rib_phase * 0.6
    back = _rib_profile(posterior, 0.22) * step(c.x_abs - 0.03, 0.01) * (0.8 + 0.45 * q2)
    front = _rib_profile(anterior, 0.25) * step(q - 0.45, 0.08)
    c.path += a.rib_density * cage * (back + 0.55 * front)
    # The inner margin of the cage, where ribs are seen end on.
    c.path += 0.8 * a.rib_density * bell(c.across - 1.02, 0.025) * step(c.y - a.apex_y, 0.05)


def _rib_profile(v: Map, half: float) -> Map:
    """Return the brightness across ribs centred on whole v: a tube with dense cortex, brighter rims."""
    d = np.abs(v - np.rint(v)) * (1.0 / half)
    return step(1.0 - d, 0.2) * (0.65 + 0.6 * bell(d - 0.8, 0.22))


def _shoulder_girdle(c: Chest) -> None:
    a = c.anatomy
    w = c.window((-0.8, 0.0), (0.8, 0.28))
    x_abs, y = c.x_abs[w], c.y[w]
    s = np.clip((x_abs - 0.03) * (1 / 0.36), 0.0, 1.0)
    center = a.clavicle_y - 0.055 * s - 0.014 * np.sin(2 * math.pi * s)
    d = np.abs(y - center) / (0.020 - 0.006 * s)
    along = step(x_abs - 0.032, 0.006) * step(0.40 - x_abs, 0.01)
    clavicle = along * step(1.0 - d, 0.12) * (0.65 + 0.55 * bell(d - 0.8, 0.25))
    humeral_head = dome(((x_abs - 0.43) / 0.05) ** 2 + ((y - 0.18) / 0.05) ** 2)
    c.path[w] += 0.55 * clavicle + 0.4 * humeral_head
    # Scapula: a blade beside and over the outer lung, its medial border bright.
    w = c.window((-0.8, 0.07), (0.8, 0.54))
    x_abs, y = c.x_abs[w], c.y[w]
    gap = x_abs - (0.285 + 0.10 * (y - 0.15) + 0.5 * np.maximum(y - 0.38, 0.0))
    blade = step(gap, 0.008) * step(0.47 - x_abs, 0.03) * step(0.2 - np.abs(y - 0.31), 0.03)
    c.path[w] += 0.12 * blade * (1.0 + 1.2 * bell(gap - 0.008, 0.006))


def _vessels(c: Chest, rng: np.random.Generator) -> None:
    a = c.anatomy
    tree = c.lines(_vessel_tree(a, rng.spawn(1)[0], finest=0.5 / max(c.side_px, 96))[::-1])  # thick over thin
    # What is too fine to be drawn as a vessel still gives the lung its grain.
    grain = 0.03 * smooth_noise(rng, 56, c.side_px)
    c.vessel_path = (0.25 * c.lung + 0.75 * c.clear) * a.vessels * (0.45 * tree + grain)
    w = c.window((-0.2, 0.25), (0.2, 0.6))
    hila = bell(c.x_abs[w] - HILUM[0], 0.035) * bell(c.y[w] - HILUM[1], 0.06)
    c.vessel_path[w] += 0.35 * a.vessels * hila * c.lung[w]
    c.path += c.vessel_path


def _vessel_tree(a: Anatomy, rng: np.random.Generator, *, finest: float) -> list[Stroke]:
    """Return the vessels of both lungs, thick ones first, down to the width `finest`: less shows nothing."""
    side = np.repeat((-1.0, 1.0), 6)
    angle = np.tile(np.linspace(-1.3, 1.45, 6), 2) + rng.normal(0.0, 0.1, 12)
    width = 0.0135 * np.where(angle < 0.0, a.upper_vessels, 1.0)
    at = np.stack([side * (HILUM[0] + 0.01), HILUM[1] - 0.01 * side], axis=1)
    strokes: list[Stroke] = []
    for length, brightness, share in ((0.13, 0.95, 1.2), (0.10, 0.75, 1.0), (0.075, 0.55, 0.95), (0.05, 0.4, 0.6)):
        bends = angle[:, None] + np.cumsum(rng.normal(0.0, 0.12, (len(angle), 3)), axis=1)
        steps = np.stack([side[:, None] * np.cos(bends), np.sin(bends)], axis=2)
        steps *= length / 3 * rng.uniform(0.7, 1.2, (len(angle), 1, 1))
        points = np.concatenate([at[:, None], at[:, None] + np.cumsum(steps, axis=1)], axis=1)  # [vessels, 4, 2]
        seen = (rng.random(len(angle)) < share * a.vessels) & (width > finest)
        strokes += [(points[i], float(width[i]), brightness) for i in np.flatnonzero(seen)]
        if not np.any(width * 0.64 > finest):
            break
        turn = 0.38 * rng.uniform(0.4, 1.3, (len(angle), 2)) * (-1.0, 1.0)
        at, side = np.repeat(points[:, -1], 2, axis=0), np.repeat(side, 2)
        angle, width = (bends[:, -1:] + turn).ravel(), np.repeat(width, 2) * 0.64
    return strokes


def _abdomen(c: Chest, rng: np.random.Generator) -> None:
    """Add the stomach bubble and bowel gas below the left dome, seen in most pictures."""
    if rng.random() < 0.7:
        x, y = rng.uniform(0.12, 0.22), c.anatomy.diaphragm_y[1] + rng.uniform(0.05, 0.09)
        r2 = ((c.x - x) / rng.uniform(0.04, 0.08)) ** 2 + ((c.y - y) / rng.uniform(0.02, 0.035)) ** 2
        c.path -= 0.45 * np.minimum(2.0 * dome(r2), 1.0) * step(c.y - c.floor, 0.01)
    c.path += 0.10 * smooth_noise(rng, 9, c.side_px) * c.below
