"""From stored pixel values to gray, in the order of the grayscale pipeline (PS3.4 annex N.2, PS3.3 section C.11).

    stored value -> modality LUT or rescale -> VOI LUT or window -> presentation (MONOCHROME1 inverted, once) -> 8 bits

Without a VOI transformation 8-bit values are shown as stored, and others from the picture's own darkest to its brightest, as
reader.py shows a 16-bit PNG: detectors fill 10 to 14 of the 16 bits that many headers name.

A stored value has at most 16 bits, so the whole pipeline is one table, computed in float64 over every word there can be
and applied by looking up: exact, and whatever a decoder returns has an entry. pydicom's `apply_voi` keeps an index in the
look-up table's own type, so that 8-bit tables of more than 256 entries wrap, and its `apply_windowing` turns the picture
round where the rescale slope is negative; hence these lines. A header that asks for a pipeline without meaning is refused.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import ImageRefusedError, RefusalReason
from chexnet_deploy.images.dicom.elements import Values
from chexnet_deploy.images.gray import Gray

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
    entries: NDArray[np.uint16]

    def __call__(self, values: _Levels) -> _Levels:
        """Return the entries' values; after a fractional rescale the nearest entry."""
        index = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1).astype(np.int64)
        return np.asarray(self.entries[index], np.float64)

    @property
    def white(self) -> float:
        """The output that is shown white: all bits that the entries need, 8 at least.

        The descriptor's bits are not asked: tables of 12 bits that declare 16 would come out almost black. An entry of
        exactly 2**n is taken for the end of a table of n bits.
        """
        return float(2 ** max(8, (int(self.entries.max()) - 1).bit_length()) - 1)


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
        voi: second step; None: 8-bit values as stored, others from the picture's darkest to its brightest.
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
        is_present = np.ones(1 << self.bits_allocated, np.bool_)
        if self._shows_own_range:
            is_present[:] = False
            is_present[words] = True
        gray: Gray = self._table(is_present)[words]
        return gray

    @property
    def is_smooth(self) -> bool:
        """Whether a pixel's gray follows from its own value, and from a value between two others a gray between theirs."""
        has_table = isinstance(self.modality, Lut) or isinstance(self.voi, Lut)
        return self.padding is None and not has_table and not self._shows_own_range

    @property
    def _shows_own_range(self) -> bool:
        return self.voi is None and (self.bits_stored > 8 or isinstance(self.modality, Lut))

    def _table(self, is_present: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Return the gray value of each of the 2**bits_allocated words; those present span the range of a picture."""
        words = np.arange(1 << self.bits_allocated, dtype=np.int64)
        stored = self.stored_values(words)
        is_padding = self._is_padding(words, stored)
        levels = stored.astype(np.float64)
        if self.modality is not None:
            levels = self.modality(levels)
        if self.voi is None:
            shown = _full_range(levels, levels[is_present & ~is_padding] if self._shows_own_range else levels)
        elif isinstance(self.voi, Lut):
            shown = np.minimum(self.voi(levels) / self.voi.white, 1.0)
        else:
            shown = self.voi(levels)
        if self.is_inverted:
            shown = 1.0 - shown
        # Half up, as reader.py rounds 16-bit PNGs; the last term lets an exact half that float64 just misses be one.
        table = np.floor(shown * 255.0 + 0.5 + 1e-9).astype(np.uint8)
        table[is_padding] = 0
        return table

    def stored_values(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the values in the words (PS3.5 section 8.1.1)."""
        return _signed(
            (words >> (self.high_bit + 1 - self.bits_stored)) & ((1 << self.bits_stored) - 1), self._sign_bit
        )

    @property
    def _sign_bit(self) -> int | None:
        return self.bits_stored - 1 if self.is_signed else None

    def _is_padding(self, words: NDArray[np.int64], stored: NDArray[np.int64]) -> NDArray[np.bool_]:
        if self.padding is None:
            return np.zeros(words.shape, np.bool_)
        low, high = self.padding
        # Some modalities pad with a value that the stored bits can't hold, e.g. 65535 beside 12 bits.
        whole = _signed(words, self.bits_allocated - 1 if self.is_signed else None)
        return ((stored >= low) & (stored <= high)) | ((whole >= low) & (whole <= high))


def _full_range(levels: _Levels, spanning: _Levels) -> _Levels:
    """Return 0..1 where `spanning` has its lowest and highest; all 0 where it has one value or none."""
    low, high = (float(spanning.min()), float(spanning.max())) if spanning.size else (0.0, 0.0)
    return np.asarray(np.clip((levels - low) / (high - low), 0.0, 1.0)) if high > low else np.zeros_like(levels)


def _signed(values: NDArray[np.int64], sign_bit: int | None) -> NDArray[np.int64]:
    return values if sign_bit is None else values - ((values >> sign_bit) << (sign_bit + 1))


MIN_BITS_STORED: Final = 8
"""CheXNet reads 8-bit gray; fewer bits stored are no diagnostic radiograph."""


def read_grayscale(header: Values) -> Grayscale:
    """Return the pipeline that a header asks for.

    Raises:
        ImageRefusedError: COLOUR, BIT_DEPTH, GRAYSCALE, CONTRADICTION or DAMAGED_HEADER.
    """
    photometric = header.code(0x00280004)
    if header.required_uint16(0x00280002, "Samples per Pixel") != 1 or photometric not in (
        "MONOCHROME1",
        "MONOCHROME2",
    ):
        needed = "one sample a pixel, MONOCHROME1 or MONOCHROME2"
        raise header.refuse(RefusalReason.COLOUR, "colour or a palette", needed, "send the radiograph itself")
    allocated = header.required_uint16(0x00280100, "Bits Allocated")
    stored = header.required_uint16(0x00280101, "Bits Stored")
    high_bit = header.required_uint16(0x00280102, "High Bit")
    if allocated not in (8, 16) or not MIN_BITS_STORED <= stored <= allocated or not stored - 1 <= high_bit < allocated:
        found = f"{stored} bits stored of {allocated} allocated, high bit {high_bit}"
        needed = f"{MIN_BITS_STORED} to 16 bits stored of 8 or 16 allocated"
        raise header.refuse(RefusalReason.BIT_DEPTH, found, needed, "check that this is a radiograph")
    representation = header.required_uint16(0x00280103, "Pixel Representation")
    if representation not in (0, 1):
        raise header.damaged(f"Pixel Representation {representation}", "0 or 1")
    modality = _read_modality(header, is_signed=representation == 1)
    lowest = -(2.0 ** (stored - 1)) if representation == 1 else 0.0
    if isinstance(modality, Rescale):
        lowest = min(modality.slope * lowest, modality.slope * (lowest + 2.0**stored - 1.0)) + modality.intercept
    elif modality is not None:
        lowest = 0.0  # a modality LUT gives unsigned values (PS3.3 section C.11.1.1.1)
    return Grayscale(
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high_bit,
        is_signed=representation == 1,
        padding=_read_padding(header, is_signed=representation == 1),
        modality=modality,
        voi=_read_voi(header, is_signed=lowest < 0.0),
        is_inverted=_read_is_inverted(header, photometric),
    )


def _refused(header: Values, found: str, needed: str) -> ImageRefusedError:
    return header.refuse(RefusalReason.GRAYSCALE, found, needed, "send or export it again with a valid one")


def _read_modality(header: Values, *, is_signed: bool) -> Rescale | Lut | None:
    slope, intercept = header.decimal(0x00281053, "Rescale Slope"), header.decimal(0x00281052, "Rescale Intercept")
    items = header.items(0x00283000)
    if items:
        if slope is not None or intercept is not None:
            raise _refused(header, "a Modality LUT and a rescale", "one of them (PS3.3 section C.11.1)")
        return _read_lut(items[0], "Modality LUT", is_signed=is_signed)
    if (slope, intercept) in ((None, None), (1.0, None), (None, 0.0)):  # half an identity says as much as a whole one
        return None
    if slope is None or intercept is None or slope == 0.0:
        raise _refused(header, "half a rescale, or a slope of 0", "Rescale Slope and Intercept, slope not 0")
    if max(abs(slope), 1.0 / abs(slope), abs(intercept)) > 1e9:  # so that float64 keeps every step
        raise _refused(header, "a rescale beyond 1e9", "a rescale of a radiograph")
    return Rescale(slope, intercept)


def _read_voi(header: Values, *, is_signed: bool) -> Window | Lut | None:
    """Return the first VOI transformation; where there are tables and windows, the first table."""
    items = header.items(0x00283010)
    if items:
        return _read_lut(items[0], "VOI LUT", is_signed=is_signed)
    center, width = header.decimal(0x00281050, "Window Center"), header.decimal(0x00281051, "Window Width")
    if center is None and width is None:
        return None
    named = header.code(0x00281056) or "LINEAR"
    if named not in VoiFunction.__members__:
        raise _refused(header, "an unknown VOI LUT Function", "LINEAR, LINEAR_EXACT or SIGMOID")
    narrowest = 1.0 if named == "LINEAR" else np.nextafter(0.0, 1.0)
    if center is None or width is None or not narrowest <= width <= 1e9 or abs(center) > 1e9:
        raise _refused(
            header, "half a window, or a Window Width too small", "a width of 1 or more (above 0 if not LINEAR)"
        )
    return Window(center, width, VoiFunction(named))


def _read_lut(item: Values, kind: str, *, is_signed: bool) -> Lut:
    """Return a look-up table (PS3.3 section C.11.1.1.1: number of entries, first value mapped, bits an entry).

    Entries have 2 bytes, or 1 where there is room for no more.
    """
    descriptor, data = item.element(0x00283002), item.element(0x00283006)
    if descriptor is None or data is None or len(descriptor.value) != 6:
        raise _refused(item, f"a {kind} without descriptor or data", "both")
    n_stated, first = (int.from_bytes(descriptor.value[at : at + 2], "little") for at in (0, 2))
    n_entries = n_stated or 65536  # 0 stands for 2**16
    if first >= 32768 and (descriptor.vr == "SS" or (descriptor.vr != "US" and is_signed)):
        first -= 65536
    if len(data.value) == 2 * n_entries:
        entries = np.frombuffer(data.value, "<u2")
    elif len(data.value) == n_entries + n_entries % 2:
        entries = np.frombuffer(data.value, np.uint8)[:n_entries].astype(np.uint16)
    else:
        raise _refused(item, f"a {kind} of {n_entries:,} entries in {len(data.value):,} bytes", "2 bytes an entry")
    return Lut(first, entries.astype(np.uint16))


def _read_padding(header: Values, *, is_signed: bool) -> tuple[int, int] | None:
    """Return the stored values outside the picture (PS3.3 section C.7.5.1.1.2)."""
    first = header.uint16(0x00280120, "Pixel Padding Value")
    if first is None:
        return None
    last = header.uint16(0x00280121, "Pixel Padding Range Limit")
    ends = [
        value - 65536 if is_signed and value >= 32768 else value for value in (first, first if last is None else last)
    ]
    return min(ends), max(ends)


def _read_is_inverted(header: Values, photometric: str) -> bool:
    """Return whether the lowest value is shown white; said twice in a DX image, it must be said alike (PS3.3 table C.8-71)."""
    if header.items(0x20500010):
        raise _refused(header, "a Presentation LUT Sequence", "Presentation LUT Shape or none")
    shape = header.text(0x20500020)
    if shape is not None and shape.upper() != {"MONOCHROME1": "INVERSE", "MONOCHROME2": "IDENTITY"}[photometric]:
        said = shape.upper() if shape.upper() in ("INVERSE", "IDENTITY") else "unknown"
        raise header.refuse(
            RefusalReason.CONTRADICTION,
            f"{photometric} with Presentation LUT Shape {said}",
            "MONOCHROME1 with INVERSE or MONOCHROME2 with IDENTITY",
            "ask the maker of the modality which of them holds",
        )
    return photometric == "MONOCHROME1"
