"""From stored pixel values to gray, in the order of the grayscale pipeline (PS3.4 annex N.2, PS3.3 section C.11).

    stored value -> modality LUT or rescale -> VOI LUT or window -> presentation (MONOCHROME1 inverted, once) -> 8 bits

A stored value has at most 16 bits, so the whole pipeline is one table, computed in float64 over every word there can be
and applied by looking up: exact, and whatever a decoder returns has an entry. pydicom's `apply_voi` keeps an index in the
look-up table's own type, so that 8-bit tables of more than 256 entries wrap, and its `apply_windowing` turns the picture
round where the rescale slope is negative; hence these lines. grayscale_header.py reads
the pipeline out of a header.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.gray import Gray

_Levels = NDArray[np.float64]


class VoiFunction(str, Enum):
    """How a window maps its values (PS3.3 section C.11.2.1.3)."""

    LINEAR = "LINEAR"
    LINEAR_EXACT = "LINEAR_EXACT"
    SIGMOID = "SIGMOID"


@dataclass(frozen=True, slots=True)
class Window:
    """Window centre and width (PS3.3 section C.11.2.1.2)."""

    center: float
    width: float
    function: VoiFunction

    def __call__(self, values: _Levels) -> _Levels:
        """Return 0..1."""
        center, width = self.center, self.width
        if self.function is VoiFunction.SIGMOID:
            # Beyond 700 exp overflows; at 50 the result is 0 or 1 to 20 digits already.
            slope = np.clip(-4.0 * (values - center) / width, -50.0, 50.0)
            shown: _Levels = 1.0 / (1.0 + np.exp(slope))
            return shown
        if self.function is VoiFunction.LINEAR:
            center, width = center - 0.5, width - 1.0
        if width == 0.0:  # C.11.2.1.2.1, note 2: a threshold
            return np.where(values > center, 1.0, 0.0)
        return np.asarray(np.clip((values - center) / width + 0.5, 0.0, 1.0))


@dataclass(frozen=True, eq=False, slots=True)
class Lut:
    """A look-up table (PS3.3 section C.11.1.1): entries for first, first + 1, ...; values beyond take the end entries."""

    first: int
    bits: int
    entries: NDArray[np.uint16]

    def __call__(self, values: _Levels) -> _Levels:
        """Return the entries' values; after a fractional rescale the nearest entry."""
        index = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1).astype(np.int64)
        return np.asarray(self.entries[index], np.float64)


@dataclass(frozen=True, slots=True)
class Rescale:
    """Slope and intercept (PS3.3 section C.11.1)."""

    slope: float
    intercept: float

    def __call__(self, values: _Levels) -> _Levels:
        """Return the modality's values."""
        shown: _Levels = values * self.slope + self.intercept
        return shown


@dataclass(frozen=True, eq=False, slots=True)
class Grayscale:
    """The pipeline of one image.

    Attributes:
        bits_allocated: 8 or 16.
        bits_stored: of them, how many carry the value; what stands in the others is masked.
        high_bit: the value's highest bit.
        is_signed: two's complement.
        padding: stored values, first to last, outside the picture; they become black. None: there is none.
        modality: first step; None: the stored value itself.
        voi: second step; None: the whole range of the first one's output.
        is_inverted: the lowest value is shown white.
    """

    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool
    padding: tuple[int, int] | None
    modality: Rescale | Lut | None
    voi: Window | Lut | None
    is_inverted: bool

    def apply(self, words: NDArray[np.uint8] | NDArray[np.uint16]) -> Gray:
        """Return the picture.

        Args:
            words: [H, W] as allocated: with whatever stands above and below the stored bits.

        Returns:
            [H, W] uint8, bone bright, writable and C-contiguous.
        """
        gray: Gray = self.table()[words]
        return gray

    def table(self) -> NDArray[np.uint8]:
        """Return the gray value of each of the 2**bits_allocated words."""
        words = np.arange(1 << self.bits_allocated, dtype=np.int64)
        stored = self.stored_values(words)
        levels = stored.astype(np.float64)
        if self.modality is not None:
            levels = self.modality(levels)
        shown = self._full_range(levels) if self.voi is None else self.voi(levels)
        if isinstance(self.voi, Lut):
            shown = shown / (2.0**self.voi.bits - 1.0)
        if self.is_inverted:
            shown = 1.0 - shown
        # Half up, as images.py rounds 16-bit PNGs; the last term lets an exact half that float64 just misses be one.
        table = np.floor(shown * 255.0 + 0.5 + 1e-9).astype(np.uint8)
        if self.padding is not None:
            table[self._is_padding(words, stored)] = 0
        return table

    def stored_values(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the values in the words (PS3.5 section 8.1.1)."""
        return _signed(
            (words >> (self.high_bit + 1 - self.bits_stored)) & ((1 << self.bits_stored) - 1), self._sign_bit
        )

    @property
    def _sign_bit(self) -> int | None:
        return self.bits_stored - 1 if self.is_signed else None

    def _full_range(self, levels: _Levels) -> _Levels:
        # Without a VOI transformation the modality's whole range is shown (PS3.3 section C.11.2.1).
        if isinstance(self.modality, Lut):
            return levels / (2.0**self.modality.bits - 1.0)
        low, high = float(levels.min()), float(levels.max())
        return (levels - low) / (high - low)

    def _is_padding(self, words: NDArray[np.int64], stored: NDArray[np.int64]) -> NDArray[np.bool_]:
        assert self.padding is not None
        low, high = self.padding
        # Some modalities pad with a value that the stored bits can't hold, e.g. 65535 beside 12 bits.
        whole = _signed(words, self.bits_allocated - 1 if self.is_signed else None)
        return ((stored >= low) & (stored <= high)) | ((whole >= low) & (whole <= high))


def _signed(values: NDArray[np.int64], sign_bit: int | None) -> NDArray[np.int64]:
    return values if sign_bit is None else values - ((values >> sign_bit) << (sign_bit + 1))
