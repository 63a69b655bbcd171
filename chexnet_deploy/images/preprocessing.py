"""Turn one gray picture into the pixels every graph and every engine takes: the only definition of it.

Never reads files (reader.py does) and never normalises: casting, gray to three channels and mean/std are the first
nodes of the exported graph. They are recorded here because a bundle's manifest embeds this model.
"""

import hashlib
import json
from typing import Annotated, Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from chexnet_deploy.errors import ImageError
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.inputs import StrictRecord

Pixels: TypeAlias = NDArray[np.uint8]
"""[N, 1, S, S] uint8; what every graph and every engine takes."""

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)

Resample: TypeAlias = Literal[
    "pillow-nearest-8bit",
    "pillow-box-8bit",
    "pillow-bilinear-8bit",
    "pillow-hamming-8bit",
    "pillow-bicubic-8bit",
    "pillow-lanczos-8bit",
]
_FILTERS: Final = {name: Image.Resampling[name.split("-")[1].upper()] for name in get_args(Resample)}

_Mean: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Std: TypeAlias = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


LEAST_SIDES: Final = 2
"""So many times S has a halved picture's shorter side at the least: below that a filter would have little to average."""


class Reduction(StrictRecord):
    """A JPEG 2000 image is decoded as one of the smaller pictures that its codestream holds (ISO/IEC 15444-1 annex F).

    Other images are read whole, and so are those whose gray values depend on the whole picture or leap from one stored value to
    the next: without a window, with padding, by a look-up table.

    Attributes:
        halvings: of its sides, at the most; fewer where the codestream has fewer or the picture would get too small.
        max_gray_change: of a pixel of the model, in gray levels of 255, by ramps and one-pixel lines, when this was chosen.
    """

    halvings: Annotated[int, Field(ge=1, le=2)]
    max_gray_change: Annotated[int, Field(ge=0, le=255)]


class Resizing(StrictRecord):
    """How a gray picture becomes the pixels of a model, anyone's.

    Attributes:
        resize_px: S, the side of the square.
        resample: one of Pillow's filters on 8-bit data. All but nearest have a support that grows with the reduction, so they
            average (antialias), and sum in 22-bit fixed point, so their result is bit-equal on every machine.
        geometry: "squash" takes the whole picture to S x S, whatever its sides; "crop" its middle square.
        jpeg2000: how JPEG 2000 is decoded; None: every pixel of it.
    """

    resize_px: int = Field(default=224, ge=8, le=2048)
    resample: Resample = "pillow-bilinear-8bit"
    geometry: Literal["squash", "crop"] = "squash"
    jpeg2000: Reduction | None = None

    def __call__(self, gray: Gray) -> Pixels:
        """Return the pixels of one picture.

        Args:
            gray: [H, W] uint8, as `read_image` gives it.

        Returns:
            [1, 1, S, S] uint8.

        Raises:
            ImageError: gray is not a uint8 array of two dimensions with at least one pixel.
        """
        if not isinstance(gray, np.ndarray) or gray.dtype != np.uint8 or gray.ndim != 2 or gray.size == 0:
            found = f"{gray.dtype} {list(gray.shape)}" if isinstance(gray, np.ndarray) else type(gray).__name__
            raise ImageError(f"Found {found}; needed a gray picture, uint8 [H, W]. Next: read it with read_image.")
        if self.geometry == "crop":
            side = min(gray.shape)
            top, left = ((length - side) // 2 for length in gray.shape)
            gray = gray[top : top + side, left : left + side]
        resized = Image.fromarray(gray).resize((self.resize_px, self.resize_px), _FILTERS[self.resample])
        return np.array(resized)[np.newaxis, np.newaxis]

    def halvings(self, height: int, width: int) -> int:
        """Return how often the sides of a JPEG 2000 picture are halved when it is decoded, if its codestream has as many."""
        most = 0 if self.jpeg2000 is None else self.jpeg2000.halvings
        return max(
            (n for n in range(1, most + 1) if min(height, width) >> n >= LEAST_SIDES * self.resize_px), default=0
        )

    @property
    def sha256(self) -> str:
        """SHA-256 of the settings as JSON with sorted keys and no spaces; caches of pixels are keyed on it."""
        settings = self.model_dump(mode="json", exclude_none=True)
        canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()


class Preprocessing(Resizing):
    """That of a bundle (Rajpurkar et al. 2017, section 3.1: 224 x 224, ImageNet mean and deviation).

    Attributes:
        resize_px: a multiple of 32, DenseNet's stride.
        geometry: the whole picture, as the paper does; activation maps are drawn over it.
        mean: per channel of pixel / 255, applied inside the exported graph.
        std: per channel of pixel / 255, applied inside the exported graph.
    """

    resize_px: int = Field(default=224, ge=32, le=1024, multiple_of=32)
    resample: Literal["pillow-bilinear-8bit"] = "pillow-bilinear-8bit"
    geometry: Literal["squash"] = "squash"
    mean: tuple[_Mean, _Mean, _Mean] = IMAGENET_MEAN
    std: tuple[_Std, _Std, _Std] = IMAGENET_STD
