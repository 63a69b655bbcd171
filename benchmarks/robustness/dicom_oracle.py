"""What a DICOM file's picture, orientation and age are by others: DCMTK's rendering, and two tables worked out by hand.

Imports nothing of chexnet_deploy: what judges the reader must not be the reader.
"""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset

TOOLS = ("dcmj2pnm", "dciodvfy")
UNKNOWN, NONSENSE = -1, -2
AGES: Mapping[str, int] = {
    "060Y": 60,
    "018Y": 18,
    "099Y": 99,
    "017Y": 17,
    "8Y": 8,
    "008Y": 8,
    "5": 5,
    "62": 62,
    "62 ": 62,
    "62.0": 62,
    "45y": 45,
    "036M": 3,
    "36M": 3,
    "216M": 18,
    "215M": 17,
    "012W": 0,
    "004D": 0,
    "4D": 0,
    "000Y": 0,
    "0060Y": 60,
    "": UNKNOWN,
    "-5": NONSENSE,
    "-62Y": NONSENSE,
    "1000Y": NONSENSE,
    "999Y": NONSENSE,
    "6OY": NONSENSE,
    "Y060": NONSENSE,
    "UNKNOWN": NONSENSE,
    "N/A": NONSENSE,
    "60 to 65": NONSENSE,
}
"""Patient's Age -> completed years."""
_OPPOSITE = dict(zip("LRHFAP", "RLFHPA", strict=True))
_LESS_THAN_A_RIGHT_ANGLE = {"LH\\FL", "RF\\FL", "FL\\RF", "LF\\F", "L\\FR", "HR\\RF"}
FRONTAL = tuple(f"{a}\\{b}" for pair in (("LR", "HF"), ("HF", "LR")) for a in pair[0] for b in pair[1])
LEANING = ("LA\\F", "L\\FP", "RP\\F", "FA\\R", "L\\HA", "LP\\FA")
NOT_FRONTAL = ("A\\F", "P\\F", "F\\A", "P\\H", "AL\\F", "L\\P", "A\\R", *sorted(_LESS_THAN_A_RIGHT_ANGLE))
NO_ORIENTATION = ("L", "\\F", "L\\L", "H\\F", "X\\F", "LR\\F", "L\\F\\H", "LEFT\\FEET", "1\\0")


def can_upright(orientation: str) -> bool:
    """Return whether a Patient Orientation of the tables above is unknown, or that of a frontal view in quarter turns."""
    said = orientation.upper().replace(" ", "")
    return said in ("", "\\", *FRONTAL, *LEANING)


def turn_upright(picture: NDArray[Any], orientation: str) -> NDArray[Any]:
    """Return the picture as somebody would turn it who reads the letters at its edges: L to the right, F below."""
    letters = [each[:1] for each in orientation.upper().replace(" ", "").split("\\") if each]
    if not letters:
        return picture
    right, below = letters
    edges = np.array([["", _OPPOSITE[below], ""], [_OPPOSITE[right], "", right], ["", below, ""]])
    for n_turns in range(4):
        for is_mirrored in (False, True):
            turned, shown = np.rot90(edges, n_turns), np.rot90(picture, n_turns)
            if is_mirrored:
                turned, shown = np.fliplr(turned), np.fliplr(shown)
            if turned[1, 2] == "L" and turned[2, 1] == "F":
                return shown
    raise AssertionError(f"no turn makes {orientation} upright")


def render(path: Path, dataset: Dataset) -> NDArray[np.int64] | None:
    """Return DCMTK's picture of the file, [H, W] of 0..255, or None where it can't make one, or not the standard's.

    It leaves the brightest value undefined after a fractional slope, and takes a SIGMOID narrower than 1 for no window.

    Args:
        path: of the file.
        dataset: its header, for what is to be asked of DCMTK: a VOI LUT goes before a window, and without either more than 8
            bits are shown from the darkest to the brightest. Of a look-up table's bits it is told to ask the entries.
    """
    is_narrow = dataset.get("VOILUTFunction") == "SIGMOID" and _first(dataset, "WindowWidth", 1.0) < 1.0
    if is_narrow or _first(dataset, "RescaleSlope", 1.0) % 1.0:
        return None
    options = ["+Mm", "+Mv"]
    if _has_items(dataset, "VOILUTSequence"):
        options += ["+Wl", "1"]
    elif dataset.get("WindowCenter") not in (None, ""):
        options += _window(dataset)
    elif dataset.BitsStored > 8 or _has_items(dataset, "ModalityLUTSequence"):
        options += ["+Wm", "+Wfl"]
    shown = path.with_suffix(".pgm")
    shown.unlink(missing_ok=True)
    subprocess.run(["dcmj2pnm", *options, str(path), str(shown)], capture_output=True, check=False)
    return np.asarray(Image.open(shown)).astype(np.int64) if shown.exists() else None


def _window(dataset: Dataset) -> list[str]:
    if dataset.get("VOILUTFunction") != "LINEAR_EXACT":
        return ["+Wi", "1"]
    # DCMTK takes it for LINEAR (PS3.3 section C.11.2.1.2), which subtracts a half and 1.
    return ["+Ww", str(_first(dataset, "WindowCenter", 0.0) + 0.5), str(_first(dataset, "WindowWidth", 0.0) + 1.0)]


def _first(dataset: Dataset, keyword: str, default: float) -> float:
    value = dataset.get(keyword)
    return default if value in (None, "") else float(np.atleast_1d(value)[0])


def errors_of(path: Path) -> set[str]:
    """Return what dciodvfy calls an error in the file."""
    said = subprocess.run(["dciodvfy", str(path)], capture_output=True, check=False).stderr.decode("latin-1")
    return {line for line in said.splitlines() if line.startswith("Error")}


def missing_tools() -> list[str]:
    """Return what this machine lacks: Debian has the packages dcmtk and dicom3tools."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def _has_items(dataset: Dataset, keyword: str) -> bool:
    return any(len(item) for item in dataset.get(keyword) or [])
