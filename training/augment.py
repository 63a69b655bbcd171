"""Change training images on the device they are trained on: flip, rotate, shift, scale, contrast, mixup.

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

N_DRAWS = 8  # columns of `draw`: flip, rotation, two shifts, scale, contrast, brightness, mixup


def draw(seed: int, epoch: int, step: int, n_images: int) -> NDArray[np.float32]:
    """Return float32 [n_images, N_DRAWS] in 0..1 for one step's whole batch (Philox: Salmon et al. 2011)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, step]))
    # Mixup's apart, so that recipes without it draw what they drew before there was one.
    return np.hstack([generator.random((n_images, n), dtype=np.float32) for n in (N_DRAWS - 1, 1)])


def augment(pixels: Tensor, truth: Tensor, draws: Tensor, how: Augmentation) -> tuple[Tensor, Tensor]:
    """Return changed pixels in 0..255, uint8 where only flipped, else float32; and their labels.

    Args:
        pixels: uint8 [n, 1, S, S].
        truth: float32 [n, C].
        draws: [n, N_DRAWS] in 0..1, on the same device.
        how: limits.
    """
    flip, rotation, shift_x, shift_y, scale, contrast, brightness, mixup = draws.unbind(dim=1)
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
    if how.mixup_share:
        weight = (how.mixup_share * mixup)[:, None]
        # The batch is in random order already, so a neighbour is a random image.
        truth = torch.lerp(truth, truth.roll(1, 0), weight)
        pixels = pixels.to(torch.float32)
        pixels = torch.lerp(pixels, pixels.roll(1, 0), weight[:, :, None, None])
    return pixels, truth


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
