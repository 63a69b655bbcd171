"""Change training images on the device they are trained on: flip, rotate, shift, scale, contrast.

What is drawn depends on the seed, the epoch and the step alone, never on how many processes or threads there are, nor on what
was drawn before: a resumed run draws what an uninterrupted one would have.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from training.recipe import Augmentation

N_DRAWS = 7  # columns of `draw`: flip, rotation, two shifts, scale, contrast, brightness


def draw(seed: int, epoch: int, step: int, n_images: int) -> NDArray[np.float32]:
    """Return float32 [n_images, N_DRAWS] in 0..1 for one step's whole batch (Philox: Salmon et al. 2011)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, step]))
    return generator.random((n_images, N_DRAWS), dtype=np.float32)


def augment(pixels: Tensor, draws: Tensor, how: Augmentation) -> Tensor:
    """Return changed pixels in 0..255: uint8 where only flipped, else float32.

    Args:
        pixels: uint8 [n, 1, S, S].
        draws: [n, N_DRAWS] in 0..1, on the same device.
        how: limits.
    """
    flip, rotation, shift_x, shift_y, scale, contrast, brightness = draws.unbind(dim=1)
    if how.flip_probability:
        pixels = torch.where((flip < how.flip_probability)[:, None, None, None], pixels.flip(3), pixels)
    if how.rotate_degrees or how.shift_share or how.scale_share:
        pixels = _move(pixels, how, rotation, torch.stack([shift_x, shift_y], dim=1), scale)
    if how.contrast_share:
        pixels = pixels.to(torch.float32)
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
        gain = 1.0 + how.contrast_share * _centred(contrast)[:, None, None, None]
        lift = 255.0 * how.contrast_share * _centred(brightness)[:, None, None, None]
        pixels = ((pixels - mean) * gain + mean + lift).clamp(0.0, 255.0)
    return pixels


def _move(pixels: Tensor, how: Augmentation, rotation: Tensor, shifts: Tensor, scale: Tensor) -> Tensor:
    angle = _centred(rotation) * math.radians(how.rotate_degrees)
    zoom = 1.0 + how.scale_share * _centred(scale)
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    # In units of half a side, as affine_grid has it.
    x, y = (2.0 * how.shift_share * _centred(shifts)).unbind(dim=1)
    theta = torch.stack([torch.stack([cosine, -sine, x], dim=1), torch.stack([sine, cosine, y], dim=1)], dim=1)
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved: Tensor = functional.grid_sample(pixels.to(torch.float32), grid, mode="bilinear", align_corners=False)
    return moved


def _centred(draws: Tensor) -> Tensor:
    return 2.0 * draws - 1.0
