"""What every reader of radiographs agrees on: what a gray picture is, how large it may be, how its file is opened.

Knows no file format.
"""

import stat
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import ImageError

Gray: TypeAlias = NDArray[np.uint8]
"""[H, W] uint8, 0 = black, bone bright (DICOM calls it MONOCHROME2)."""

MAX_PIXELS: Final = 36_000_000
"""6000 x 6000. The largest flat-panel detectors give about 4300 x 4300."""
MIN_SIDE_PX: Final = 32
"""Below this there is no radiograph to read: CheXNet's own feature map has one cell per 32 px."""
MAX_FILE_MIB: Final = 160
"""MAX_PIXELS of uncompressed 8-bit RGBA, or of 16-bit gray twice over, with room to spare."""


def refusal(name: object, found: str, needed: str, next_step: str) -> str:
    """Return the one line that every refused image gets."""
    return f"{name}: found {found}; needed {needed}. Next: {next_step}."


def read_image_file(path: Path) -> bytes:
    """Return the bytes of a regular file of 1 byte to MAX_FILE_MIB.

    Raises:
        ImageError: it is absent, empty, too large, or no regular file.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(refusal(path, "a directory", "one image file", "give the path of a file in it"))
        if not stat.S_ISREG(status.st_mode):  # opening a pipe nobody writes to would wait for ever
            raise ImageError(refusal(path, "a pipe or device", "an image file", "give the path of a file"))
        if status.st_size > MAX_FILE_MIB * 2**20:
            found = f"{status.st_size:,} bytes"
            raise ImageError(refusal(path, found, f"at most {MAX_FILE_MIB} MiB", "check that this is one radiograph"))
        content = path.read_bytes()
    except FileNotFoundError as err:
        raise ImageError(refusal(path, "no such file", "a PNG, JPEG or DICOM file", "check the path")) from err
    except (OSError, ValueError) as err:  # ValueError: a null byte in the path
        raise ImageError(refusal(path, f"a file that can't be read ({err})", "a readable file", "check it")) from err
    if not content:
        raise ImageError(refusal(path, "0 bytes", "a PNG, JPEG or DICOM file", "copy the file again"))
    return content
