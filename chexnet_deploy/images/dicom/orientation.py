r"""Which way a picture lies, as Patient Orientation (0020,0020) says, and how it is turned upright (PS3.3 section C.7.6.1.1.1).

Upright is L\F: rows run to the patient's left, columns to the feet. A lateral is upright with its columns to the feet.
"""

import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from chexnet_deploy.errors import RefusalReason
from chexnet_deploy.images.dicom.elements import Values
from chexnet_deploy.images.gray import Gray

_DIRECTION: Final = re.compile(r"(?!.*([AP].*[AP]|[LR].*[LR]|[HF].*[HF]))[APLRHF]{1,3}")
_AXES: Final = {letter: axis for axis in ("AP", "LR", "HF") for letter in axis}


@dataclass(frozen=True, slots=True)
class Orientation:
    """Where the rows and the columns of a stored picture run.

    Attributes:
        rows: primary direction of the rows, left to right: A, P, L, R, H or F.
        columns: the same of the columns, top to bottom; one of the two is H or F.
    """

    rows: str
    columns: str

    @property
    def is_lateral(self) -> bool:
        """Whether the picture shows the patient from one side."""
        return not {self.rows, self.columns}.isdisjoint("AP")

    @property
    def is_upright(self) -> bool:
        """Whether nothing is to be turned."""
        return self.columns == "F" and self.rows != "R"

    def upright(self) -> "Orientation":
        """Return where rows and columns run after `turn`."""
        is_transposed, _, flips_rows = self._steps()
        rows = self.columns if is_transposed else self.rows
        return Orientation({"L": "R", "R": "L", "A": "P", "P": "A"}[rows] if flips_rows else rows, "F")

    def turn(self, gray: Gray) -> Gray:
        """Return the picture upright, [H, W] or [W, H] uint8, writable and C-contiguous.

        A frontal view is turned or mirrored, a lateral one is turned alone: no letter says from which side it is seen.
        """
        is_transposed, flips_columns, flips_rows = self._steps()
        turned = gray.T if is_transposed else gray
        turned = turned[:: -1 if flips_columns else 1, :: -1 if flips_rows else 1]
        return np.ascontiguousarray(turned)

    def _steps(self) -> tuple[bool, bool, bool]:
        """Return whether to swap rows with columns, then to flip top and bottom, and left and right."""
        is_transposed = self.rows in "HF"
        across, down = (self.columns, self.rows) if is_transposed else (self.rows, self.columns)
        flips_columns = down == "H"
        return is_transposed, flips_columns, is_transposed != flips_columns if self.is_lateral else across == "R"


def read_orientation(values: Values) -> Orientation | None:
    """Return how the picture lies, or None where Patient Orientation is empty.

    Raises:
        ImageRefusedError: DAMAGED_HEADER or VIEW.
    """
    directions = [text.upper() for text in values.texts(0x00200020)]
    if not any(directions):
        return None
    next_step = "have it corrected at the modality, or left empty"
    primary = [_AXES.get(direction[:1]) for direction in directions]
    if len(directions) != 2 or primary[0] == primary[1] or not all(map(_DIRECTION.fullmatch, directions)):
        needed = r"two directions of a biped, e.g. L\F (PS3.3 section C.7.6.1.1.1)"
        raise values.refuse(RefusalReason.DAMAGED_HEADER, "a Patient Orientation that is none", needed, next_step)
    said = "\\".join(directions)
    if "HF" not in primary:
        found, needed = f"Patient Orientation {said}: neither head nor feet", "a frontal or lateral view"
        raise values.refuse(RefusalReason.VIEW, found, needed, next_step)
    if any(_AXES[letter] in primary for direction in directions for letter in direction[1:]):
        found, needed = f"Patient Orientation {said}: tilted in its own plane", "a multiple of 90 degrees"
        raise values.refuse(RefusalReason.VIEW, found, needed, next_step)
    return Orientation(directions[0][0], directions[1][0])
