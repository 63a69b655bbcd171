"""Pictures that are no upright frontal chest radiograph: DICOM files of other things, photographs, and drawings.

The fit saw drawings of the kinds "clouds" and "shapes", from other random numbers; nothing else here.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from chexnet_deploy.images.gray import Gray
from training.fit_content_check import draw_clouds, draw_shapes

SEED = 41
SIDE_PX = 256


def read_dicom_files(folder: Path) -> dict[str, Gray]:
    """Return file name -> first frame, bone bright, darkest..brightest (or the file's window) as 0..255.

    Short where chexnet_deploy's reader is strict: it must read what that one refuses, so that the pixels alone are judged.
    """
    import pydicom
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    pictures = {}
    for path in sorted(folder.glob("*.dcm")):
        file = pydicom.dcmread(path)
        values = np.asarray(apply_voi_lut(apply_modality_lut(file.pixel_array, file), file), np.float64)
        low, high = values.min(), values.max()
        gray = ((values - low) / (high - low) * 255).round().astype(np.uint8)
        pictures[path.name] = 255 - gray if file.PhotometricInterpretation == "MONOCHROME1" else gray
    return pictures


def photographs() -> list[Gray]:
    """Return the two photographs that come with scikit-learn: a temple and a flower."""
    from sklearn.datasets import load_sample_images

    return [np.asarray(Image.fromarray(image).convert("L")) for image in load_sample_images().images]


def drawings() -> dict[str, list[Gray]]:
    """Return kind -> pictures, 256 x 256 but for the text page."""
    rng = np.random.default_rng(SEED)
    clouds = {
        f"clouds, 1/f^{smooth:g}": [_enlarge(draw_clouds(rng, smooth)) for _ in range(200)] for smooth in (1, 1.5, 2, 3)
    }
    return clouds | {
        "shapes": [_enlarge(draw_shapes(rng)) for _ in range(200)],
        "white noise": [rng.integers(0, 256, (SIDE_PX, SIDE_PX), np.uint8) for _ in range(50)],
        "gradients": [_gradient(2 * math.pi * i / 32) for i in range(32)],
        "rings": [_rings(centre, period) for centre in (0.3, 0.5) for period in (40, 130, 400)],
        "checkerboards": [_checkerboard(cell) for cell in (8, 16, 32, 64)],
        "text pages": [_text_page(negative) for negative in (False, True)],
    }


def _enlarge(small: Gray) -> Gray:
    return np.asarray(Image.fromarray(small).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR))


def _gradient(angle_rad: float) -> Gray:
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    ramp = math.cos(angle_rad) * x + math.sin(angle_rad) * y
    return _stretch(ramp)


def _rings(centre: float, period_px: float) -> Gray:
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX] - centre * SIDE_PX
    return _stretch(np.cos(2 * math.pi * np.hypot(x, y) / period_px))


def _stretch(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Gray:
    low, high = values.min(), values.max()
    gray: Gray = ((values - low) / (high - low) * 255).round().astype(np.uint8)
    return gray


def _checkerboard(cell_px: int) -> Gray:
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX] // cell_px
    board: Gray = ((x + y) % 2 * 255).astype(np.uint8)
    return board


def _text_page(negative: bool) -> Gray:
    image = Image.new("L", (850, 1100), 255)
    draw = ImageDraw.Draw(image)
    for y in range(60, 1040, 18):
        draw.text(
            (60, y), "The heart is of normal size and the lungs are clear. No effusion, no pneumothorax. " * 2, fill=0
        )
    page = np.array(image)
    return 255 - page if negative else page
