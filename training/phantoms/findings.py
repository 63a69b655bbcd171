"""Draw the 14 findings of ChestX-ray14 into a phantom chest, each where radiologists look for it.

A finding acts twice: `with_finding` changes the anatomy before anything is drawn (heart size, volume loss), and
`paint_finding` adds to the path map afterwards. Never touches exposure, tables or files: see draw.py for those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from training.phantoms.anatomy import (
    Anatomy,
    Chest,
    Map,
    Point,
    Points,
    Stroke,
    bell,
    dome,
    heart_edges,
    smooth_noise,
    smooth_step,
    step,
)


def with_finding(anatomy: Anatomy, finding: str, rng: np.random.Generator) -> Anatomy:
    """Return the anatomy as the finding deforms it; most findings don't.

    Args:
        anatomy: the chest without it.
        finding: one of the 14.
        rng: in the same state as the one that `paint_finding` will get.
    """
    a = anatomy
    if finding == "Cardiomegaly":
        return replace(a, heart_ratio=rng.uniform(0.56, 0.62), heart_y=a.heart_y - 0.01)
    if finding == "Emphysema":
        low = rng.uniform(0.01, 0.03)
        return replace(
            a,
            diaphragm_y=(a.diaphragm_y[0] + low, a.diaphragm_y[1] + low),
            dome=a.dome * rng.uniform(0.25, 0.4),
            vessels=a.vessels * 0.8,
        )
    if finding == "Atelectasis":
        # Lung that lost its air pulls up the diaphragm on its side; `_atelectasis` draws the side first, too.
        right_y, left_y = a.diaphragm_y
        loss = 0.03
        return replace(a, diaphragm_y=(right_y, left_y - loss) if _side(rng) else (right_y - loss, left_y))
    if finding == "Edema":
        return replace(a, upper_vessels=1.25, vessels=1.0)
    return a


def paint_finding(chest: Chest, finding: str, rng: np.random.Generator) -> Map:
    """Add one finding to the chest's path map.

    Returns:
        Its region, 0..1 [side_px, side_px]: what a radiologist would box.
    """
    return _PAINTERS[finding](chest, rng)


def _opacify(c: Chest, region: Map, share: float) -> None:
    """Replace the air of a region by tissue; its vessels vanish in it."""
    c.path += share * region * (c.air_path - c.vessel_path)


def _ellipse(c: Chest, center: Point, half_x: float, half_y: float) -> Map:
    """Return the squared radius of an ellipse, 1 on its rim."""
    return ((c.x - center[0]) / half_x) ** 2 + ((c.y - center[1]) / half_y) ** 2


def _side(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


def _only(c: Chest, *, left: bool) -> Map:
    """Return the lung mask of one side, without what the heart hides."""
    return c.clear * (c.is_left if left else ~c.is_left)


def _atelectasis(c: Chest, rng: np.random.Generator) -> Map:
    left = _side(rng)
    region = np.zeros_like(c.path)
    for _ in range(int(rng.integers(2, 4))):
        x, y = c.anatomy.lung_point(rng.uniform(0.5, 0.92), rng.uniform(0.4, 0.7), left=left)
        # Plates rise towards the hilum, against the run of the anterior ribs.
        tilt = rng.uniform(0.05, 0.5) * (-1 if left else 1)
        u = (c.x - x) * math.cos(tilt) + (c.y - y) * math.sin(tilt)
        v = (c.y - y) * math.cos(tilt) - (c.x - x) * math.sin(tilt) + 1.2 * u * u
        half = rng.uniform(0.008, 0.012)
        plate = step(rng.uniform(0.07, 0.11) - np.abs(u), 0.012) * step(half - np.abs(v), 0.004)
        region = np.maximum(region, plate * _only(c, left=left))
    _opacify(c, region, 0.85)
    return region


def _cardiomegaly(c: Chest, _: np.random.Generator) -> Map:
    right, left = heart_edges(c.anatomy)
    x = c.x - c.anatomy.midline_shift
    return step(np.where(x > 0, left - x, right + x), 0.002) * step(0.17 - np.abs(c.y - c.anatomy.heart_y), 0.002)


def _effusion(c: Chest, rng: np.random.Generator) -> Map:
    a = c.anatomy
    both = rng.random() < 0.25
    left = _side(rng)
    depth = rng.uniform(0.13, 0.21)
    angle_y = a.diaphragm_y[int(left)] + 1.1 * a.dome
    # The meniscus: fluid climbs along the chest wall.
    climb = depth * (0.30 + 0.7 * np.clip(c.across, 0.0, 1.0) ** 3)
    climb += 0.09 * np.exp(np.maximum(c.wall_gap, 0.0) * np.float32(-1 / 0.018))
    mask = c.clear if both else _only(c, left=left)
    region = step(c.y - angle_y + climb, 0.006) * mask
    _opacify(c, region, 1.1)
    return region


def _patch(c: Chest, rng: np.random.Generator, low: float, high: float) -> tuple[Map, Point]:
    """Return an ill-defined patch of lung and its centre."""
    left = _side(rng)
    x, y = c.anatomy.lung_point(rng.uniform(low, high), rng.uniform(0.45, 0.7), left=left)
    r2 = _ellipse(c, (x, y), rng.uniform(0.11, 0.14), rng.uniform(0.11, 0.14))
    wobble = 1.0 + 0.25 * smooth_noise(rng, 8, c.side_px)
    return smooth_step(1.0 - r2 * wobble, 0.35) * _only(c, left=left), (x, y)


def _bronchogram(c: Chest, rng: np.random.Generator, center: Point, reach: float, width: float) -> Map:
    """Return air-filled bronchi that fork and taper from the hilar side of a region outwards."""
    side = 1.0 if center[0] > 0.0 else -1.0
    root = np.array([center[0] - side * 0.7 * reach, center[1] - 0.25 * reach])
    strokes: list[Stroke] = []
    for angle in np.linspace(-0.7, 1.1, 4) + rng.normal(0.0, 0.12, 4):
        trunk = _twig(rng, root, angle, 0.8 * reach, side)
        strokes.append((trunk, width, 1.0))
        for turn in (-0.4, 0.4):
            fork = _twig(rng, trunk[-1], angle + turn * rng.uniform(0.5, 1.2), 0.8 * reach, side)
            strokes += [(fork, width * 0.5, 1.0), (fork[:3], width * 0.8, 1.0)]
    return c.lines(strokes, blur=0.001)


def _twig(rng: np.random.Generator, start: Points, angle: float, length: float, side: float) -> Points:
    """Return 5 points of a gently winding line."""
    bends = angle + np.cumsum(rng.normal(0.0, 0.16, 4))
    steps = np.stack([side * np.cos(bends), np.sin(bends)], axis=1) * (length / 4)
    return np.concatenate([start[None], start + np.cumsum(steps, axis=0)])


def _infiltration(c: Chest, rng: np.random.Generator) -> Map:
    region, _ = _patch(c, rng, 0.25, 0.8)
    # Fine, ill-defined mottling with next to no border.
    mottle = smooth_noise(rng, 34, c.side_px)
    c.path += region * (0.02 + 0.8 * mottle)
    return region


def _pneumonia(c: Chest, rng: np.random.Generator) -> Map:
    region, center = _patch(c, rng, 0.35, 0.8)
    clumps = smooth_step(smooth_noise(rng, 17, c.side_px), 0.6)
    air = _bronchogram(c, rng, center, 0.10, 0.009)
    _opacify(c, region * clumps, 0.85)
    # Air shows only where the lung round it does not.
    c.path -= region * (0.6 * air * clumps + 0.22)
    return region


def _consolidation(c: Chest, rng: np.random.Generator) -> Map:
    left = _side(rng)
    upper = rng.random() < 0.5
    x, y = c.anatomy.lung_point(rng.uniform(0.28, 0.40) if upper else rng.uniform(0.6, 0.75), 0.6, left=left)
    # A lobe ends at its fissure in a straight line: an upper lobe below, a lower lobe above.
    tilt = rng.uniform(-0.3, 0.3)
    fissure = ((c.y - y) + tilt * (c.x - x)) * (1.0 if upper else -1.0)
    rough = 1.0 + 0.22 * smooth_noise(rng, 7, c.side_px) + 0.10 * smooth_noise(rng, 20, c.side_px)
    r2 = _ellipse(c, (x, y), rng.uniform(0.11, 0.14), rng.uniform(0.12, 0.15)) * rough
    region = step(0.055 - fissure, 0.007) * smooth_step(1.0 - r2, 0.45) * _only(c, left=left)
    # Some acini still hold air: the opacity is uneven.
    _opacify(c, region * (0.8 + 0.08 * smooth_noise(rng, 40, c.side_px)), 0.85)
    air = _bronchogram(c, rng, (x, y - 0.04 if upper else y + 0.04), 0.10, 0.010)
    c.path -= region * (0.65 * air + 0.10)
    return region


def _mass(c: Chest, rng: np.random.Generator) -> Map:
    radius = rng.uniform(0.05, 0.075)
    region, center = _ball(c, rng, radius, 1.8, roughness=0.22)
    # Spicules: fine strands that a malignant mass pulls out of the lung.
    strokes: list[Stroke] = []
    for turn in rng.uniform(0.0, 2 * math.pi, 16):
        bend = turn + np.cumsum(rng.normal(0.0, 0.3, 3))
        ray = (
            np.stack([np.cos(bend), np.sin(bend)], axis=1)
            * (np.array([0.7, 1.0, rng.uniform(1.1, 1.6)]) * radius)[:, None]
        )
        strokes += [(center + ray, 0.002, 0.5), (center + ray[:2], 0.005, 0.8)]
    c.path += 0.5 * c.lines(strokes, blur=0.003) * c.clear * (1.0 - region)
    return region


def _nodule(c: Chest, rng: np.random.Generator) -> Map:
    region, _ = _ball(c, rng, rng.uniform(0.024, 0.033), 1.8, roughness=0.08)
    for _ in range(int(rng.integers(1, 4))):
        region = np.maximum(region, _ball(c, rng, rng.uniform(0.021, 0.032), 1.8, roughness=0.08)[0])
    return region


def _ball(c: Chest, rng: np.random.Generator, radius: float, density: float, *, roughness: float) -> tuple[Map, Point]:
    """Add a roughly round lesion of `density` at a random place; return its region and centre.

    `roughness` is how far its outline wanders, as a share of the squared radius.
    """
    left = _side(rng)
    center = c.anatomy.lung_point(rng.uniform(0.12, 0.88), rng.uniform(0.4, 0.8), left=left)
    r2 = _ellipse(c, center, radius * rng.uniform(0.9, 1.1), radius * rng.uniform(0.9, 1.1))
    region = np.minimum(1.6 * dome(r2 * (1.0 + roughness * smooth_noise(rng, 12, c.side_px))), 1.0)
    c.path += density * region
    outline: Map = np.minimum(region * 2.0, 1.0)
    return outline, center


def _pneumothorax(c: Chest, rng: np.random.Generator) -> Map:
    left = _side(rng)
    gap = rng.uniform(0.055, 0.09)
    # The lung falls away from the apex and the side.
    inner = np.minimum(c.wall_gap, 1.0 * c.apex_gap) - gap * (1.15 - 0.6 * np.clip((c.y - 0.2) / 0.6, 0.0, 1.0))
    side = _only(c, left=left)
    beyond = step(-inner, 0.004) * side
    c.path -= beyond * c.vessel_path
    c.path -= 0.25 * beyond
    c.path += 0.12 * step(inner, 0.004) * side
    c.path += 1.0 * bell(inner, 0.008) * side
    return beyond


def _edema(c: Chest, rng: np.random.Generator) -> Map:
    # Bat wings: both hila, clear periphery.
    r2 = ((c.x_abs - 0.13) / 0.13) ** 2 + ((c.y - 0.45) / 0.17) ** 2
    wings = smooth_step(1.0 - r2, 0.5) * c.lung
    c.path += wings * (0.09 + 0.30 * smooth_noise(rng, 22, c.side_px))
    strokes: list[Stroke] = []
    for left in (False, True):
        down = np.arange(0.5, 0.97, 0.055) + rng.normal(0.0, 0.012, 9)
        for outer in c.anatomy.lung_points(down, np.full(9, 0.99), left=left):
            inner = outer + np.array([rng.uniform(0.025, 0.075) * (-1 if left else 1), rng.normal(0.0, 0.010)])
            strokes.append((np.array([outer, inner]), rng.uniform(0.005, 0.009), rng.uniform(0.4, 1.0)))
    kerley = c.lines(strokes, blur=0.001) * c.lung
    c.path += 1.0 * kerley
    return np.maximum(wings, kerley)


def _emphysema(c: Chest, rng: np.random.Generator) -> Map:
    region = np.zeros_like(c.path)
    for _ in range(int(rng.integers(3, 6))):
        left = _side(rng)
        center = c.anatomy.lung_point(rng.uniform(0.08, 0.5), rng.uniform(0.35, 0.8), left=left)
        radius = rng.uniform(0.035, 0.06)
        r = np.sqrt(_ellipse(c, center, radius, radius * rng.uniform(0.9, 1.25)))
        inner = step(1.0 - r, 0.08) * c.clear
        c.path -= inner * (0.26 + 0.9 * c.vessel_path)
        c.path += 0.34 * bell(r - 1.0, 0.12) * c.clear
        region = np.maximum(region, inner)
    return region


def _fibrosis(c: Chest, rng: np.random.Generator) -> Map:
    basal = rng.random() < 0.65
    edge = c.y - c.anatomy.diaphragm_y[0] + 0.25 if basal else c.anatomy.apex_y + 0.26 - c.y
    zone = step(edge + 0.04 * smooth_noise(rng, 8, c.side_px), 0.04) * c.clear
    # Reticulation: the level lines of a random field are a net of curved walls round unequal cells.
    net = 0.65 * bell(smooth_noise(rng, 30, c.side_px), 0.28) + 0.45 * bell(smooth_noise(rng, 58, c.side_px), 0.4)
    # Fibrous lung holds less blood between its walls: the zone is coarser, hardly denser.
    c.path += zone * (1.0 * net - 0.40 - 0.5 * c.vessel_path)
    return step(edge, 0.01) * c.lung


def _pleural_thickening(c: Chest, rng: np.random.Generator) -> Map:
    left = _side(rng)
    thick = rng.uniform(0.038, 0.054) * (1.0 + 0.3 * smooth_noise(rng, 14, c.side_px))
    side = step(c.wall_gap + 0.012, 0.004) * (c.is_left if left else ~c.is_left)
    if rng.random() < 0.5:
        extent = step(0.19 - np.abs(c.y - rng.uniform(0.45, 0.62)), 0.02)
        region = step(thick - c.wall_gap, 0.005) * extent * side
    else:
        cap = np.minimum(c.apex_gap, c.wall_gap)
        region = step(1.3 * thick - cap, 0.005) * step(0.16 - c.apex_gap, 0.02) * step(c.apex_gap + 0.01, 0.006) * side
    region = region * step(c.inside + 0.012, 0.006)
    # Old plaques calcify in patches.
    chalk = step(smooth_noise(rng, 28, c.side_px), 0.3)
    c.path += region * (0.6 + 1.4 * chalk)
    return region


def _hernia(c: Chest, rng: np.random.Generator) -> Map:
    radius = rng.uniform(0.05, 0.078)
    strength = rng.uniform(0.5, 1.0)  # most lie behind the heart and are hard to see
    x, y = rng.uniform(-0.01, 0.06), c.anatomy.diaphragm_y[1] - rng.uniform(0.03, 0.07)
    r2 = _ellipse(c, (x, y), radius * rng.uniform(1.0, 1.25), radius)
    wall = bell(np.sqrt(r2) - 0.95, 0.12)
    level = y + rng.uniform(-0.1, 0.5) * radius
    gas = step(1.0 - r2, 0.1) * step(level - c.y, 0.004)
    c.path += strength * (0.7 * wall + 0.4 * step(1.0 - r2, 0.1) * step(c.y - level, 0.004) - 1.0 * gas)
    return step(1.1 - r2, 0.05)


_PAINTERS: dict[str, Callable[[Chest, np.random.Generator], Map]] = {
    "Atelectasis": _atelectasis,
    "Cardiomegaly": _cardiomegaly,
    "Effusion": _effusion,
    "Infiltration": _infiltration,
    "Mass": _mass,
    "Nodule": _nodule,
    "Pneumonia": _pneumonia,
    "Pneumothorax": _pneumothorax,
    "Consolidation": _consolidation,
    "Edema": _edema,
    "Emphysema": _emphysema,
    "Fibrosis": _fibrosis,
    "Pleural_Thickening": _pleural_thickening,
    "Hernia": _hernia,
}
