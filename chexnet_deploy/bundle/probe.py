"""The known answer every bundle carries: 32 pixel arrays with the fp32 model's logits and maps for them.

The arrays are drawn here, not taken from patients, so a bundle holds nobody's image. They are drawn once, at export,
and copied from bundle to bundle; nobody needs to draw the same ones again.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chexnet_deploy.errors import BundleError
from chexnet_deploy.images.preprocessing import Pixels

N_PROBES = 32


@dataclass(frozen=True, slots=True)
class Probe:
    """Pixels with the fp32 model's answer.

    Attributes:
        pixels: uint8 [32, 1, S, S].
        logits: float32 [32, C].
        cam: float32 [32, C, S/32, S/32].
    """

    pixels: Pixels
    logits: NDArray[np.float32]
    cam: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """Return the probe as an .npz file."""
        buffer = io.BytesIO()
        # In C's order, as readers require: an engine may answer with a transposed view.
        pixels, logits, cam = (np.ascontiguousarray(each) for each in (self.pixels, self.logits, self.cam))
        np.savez_compressed(buffer, pixels=pixels, logits=logits, cam=cam)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Probe":
        """Read a probe; pickled arrays are refused.

        Raises:
            BundleError: not an .npz file of these three arrays, or an answer is not finite.
        """
        try:
            # zipfile looks for a ZIP between other bytes, and for arrays among other members; the C runtime does not.
            if content[:4] != b"PK\3\4" or content[-22:-18] != b"PK\5\6" or any(content[-2:]):
                raise ValueError("bytes before or behind a ZIP")
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                if sorted(arrays.zip.namelist()) != ["cam.npy", "logits.npy", "pixels.npy"]:
                    raise ValueError(f"members {arrays.zip.namelist()}")
                probe = cls(arrays["pixels"], arrays["logits"], arrays["cam"])
        except Exception as err:  # what NumPy, zipfile, zlib and lzma raise on such bytes has no class in common
            raise BundleError(f"probe.npz does not hold pixels, logits and cam arrays ({err}). Export again.") from err
        pixels, logits, cam = probe.pixels, probe.logits, probe.cam
        c, s = logits.shape[-1] if logits.ndim else 0, pixels.shape[-1] if pixels.ndim else 0
        shapes = (N_PROBES, 1, s, s), (N_PROBES, c), (N_PROBES, c, s // 32, s // 32)
        are_as_written = all(
            each.dtype.str == written and each.flags.c_contiguous
            for each, written in ((pixels, "|u1"), (logits, "<f4"), (cam, "<f4"))
        )
        if (pixels.shape, logits.shape, cam.shape) != shapes or not are_as_written:
            raise BundleError(
                f"probe.npz holds pixels {pixels.shape}, logits {logits.shape} and cam {cam.shape}, "
                f"which don't belong together. Export again."
            )
        if not (np.isfinite(logits).all() and np.isfinite(cam).all()):  # with NaN for an answer every other would pass
            raise BundleError("probe.npz holds answers that are not finite. Export again.")
        return probe


def draw_probe_pixels(resize_px: int) -> Pixels:
    """Return uint8 [32, 1, S, S]: chest-like patterns with lungs, ribs, a heart, opacities and noise, all different."""
    axis = np.linspace(-1.0, 1.0, resize_px, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    arrays = [_draw(np.random.default_rng([1711, 5225, index]), y, x) for index in range(N_PROBES)]
    return np.stack(arrays)[:, None]


def _draw(rng: "np.random.Generator", y: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.uint8]:
    tilt, width, apex = rng.uniform(-0.1, 0.1), rng.uniform(0.30, 0.40), rng.uniform(0.60, 0.80)
    x = x + tilt * y
    body = _soft_inside((np.abs(x) - 0.95) * 25)
    lungs = sum(
        _soft_inside((((x - side * 0.43) / width) ** 2 + ((y + 0.05) / apex) ** 2 - 1.0) * 8) for side in (-1.0, 1.0)
    )
    ribs = 0.12 * np.sin((y + rng.uniform(0.2, 0.4) * x**2) * rng.uniform(16, 24)) * lungs
    heart = 0.4 * np.exp(-(((x - 0.15) / rng.uniform(0.25, 0.45)) ** 2) - ((y - 0.35) / 0.35) ** 2)
    spine = 0.25 * np.exp(-((x / 0.08) ** 2))
    image = 0.75 * body - 0.55 * lungs + ribs + heart + spine
    for _ in range(rng.integers(0, 5)):
        cy, cx, radius = rng.uniform(-0.6, 0.6), rng.uniform(-0.7, 0.7), rng.uniform(0.03, 0.3)
        image = image + rng.uniform(0.1, 0.5) * np.exp(-((((x - cx) ** 2 + (y - cy) ** 2) / radius**2) ** 2))
    grain = rng.normal(0.0, 1.0, (y.shape[0] // 4, y.shape[1] // 4)).astype(np.float32)
    texture = np.asarray(Image.fromarray(grain).resize(y.shape[::-1], Image.Resampling.BICUBIC))
    noise = rng.normal(0.0, 0.02, y.shape)
    image = (image + 0.05 * texture + noise) * rng.uniform(0.7, 1.1) + rng.uniform(-0.05, 0.15)
    pixels: NDArray[np.uint8] = (np.clip(image, 0.0, 1.0) * 255.0).round().astype(np.uint8)
    return pixels


def _soft_inside(distance: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return 1 well inside (negative distance), 0 well outside, 0.5 on the edge."""
    inside: NDArray[np.floating] = 0.5 - 0.5 * np.tanh(0.5 * distance)
    return inside
