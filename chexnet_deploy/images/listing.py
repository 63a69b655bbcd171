"""The images a user names, by file, folder or list, as names in one order on every machine.

Reads no image: what a file is, its contents say when it is read (reader.py). A name is kept as text, relative to what was
given, so that a hundred thousand of them take a few megabytes.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from chexnet_deploy.errors import ImageError
from chexnet_deploy.inputs import IMAGE_SUFFIXES, name_some, read_text

DICOM_DIRECTORY: Final = "DICOMDIR"
LIST_SUFFIX: Final = ".txt"


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Image files in order.

    Attributes:
        root: what the names are relative to.
        names: of the files; no two are the same.
        others: entries of the folders that were left out, being no image by name nor DICOM.
        is_one_file: one file was named itself, and nothing else.
    """

    root: Path
    names: tuple[str, ...]
    others: tuple[str, ...]
    is_one_file: bool

    def paths(self, start: int = 0) -> Iterator[Path]:
        """Yield the files' paths, from the one at place `start` on."""
        return (self.root / name for name in islice(self.names, start, None))

    @property
    def sha256(self) -> str:
        """SHA-256 of the names in order, each as UTF-8 with a line feed."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{one_line(name)}\n".encode())
        return digest.hexdigest()


def find_images(arguments: Sequence[Path | str]) -> ImageFiles:
    """Return the images of files, folders and lists, in the order given.

    A folder gives the files below it that are called .png, .jpg, .jpeg or .dcm, and those of any other name that begin as DICOM
    files do (PS3.10 section 7.1) and are no DICOMDIR; sorted by name, its own before those of its folders.

    Names with a leading dot are left out, and links to folders are not followed: loops end, and nothing is found
    twice. A .txt file is a list of paths relative to its own folder, one a line. Where one folder or list is all that is
    given, names are relative to it.

    Raises:
        ImageError: a folder or list can't be read, there is no image, or one would be read twice.
    """
    paths = [*map(Path, arguments)]
    _refuse_overlaps(paths)
    is_alone = len(paths) == 1
    root, names, others, is_one_file = Path(), list[str](), list[str](), False
    for argument in paths:
        if argument.is_dir():
            base, (found, left_out) = argument, _walk(argument)
            others += left_out
        elif argument.suffix.lower() == LIST_SUFFIX:
            base, found = argument.parent, _read_list(argument)
        else:
            names.append(str(argument))
            is_one_file = is_alone
            continue
        root = base if is_alone else root
        names += found if is_alone else [str(base / name) for name in found]
    if not names:
        raise ImageError(
            f"{name_some(paths)}: found no file called {', '.join(IMAGE_SUFFIXES)} and no DICOM file; needed at least one "
            f"image. Next: check the path, or name the files themselves."
        )
    twice = [name for name, count in Counter(map(one_line, names)).items() if count > 1]
    if twice:
        raise ImageError(f"{name_some(twice)}: found more than once; needed each image once. Next: name it once.")
    return ImageFiles(root, tuple(names), tuple(others), is_one_file)


def one_line(name: str) -> str:
    """Return a name as one line of UTF-8 text: what is neither is written with Python's escapes."""
    return "".join(
        c if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") else c.encode("unicode_escape").decode()
        for c in name
    )


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the images below a folder, relative to it, and those of its other entries."""

    def refuse(err: OSError) -> None:
        raise ImageError(
            f"{err.filename}: found a folder that can't be read ({err.strerror}); needed all images of {folder}. "
            f"Next: check its permissions."
        ) from err

    names, others = list[str](), list[str]()
    for place, folders, files in os.walk(folder, onerror=refuse):
        entered = sorted(name for name in folders if not name.startswith(".") and not Path(place, name).is_symlink())
        left_out = set(folders) - set(entered)
        folders[:] = entered  # what os.walk goes on with, in this order
        below = os.path.relpath(place, folder)
        for name in sorted([*files, *left_out]):
            is_image = name not in left_out and _is_image(place, name)
            (names if is_image else others).append(name if below == os.curdir else f"{below}/{name}")
    return names, others


def _is_image(place: str, name: str) -> bool:
    if name.startswith(".") or name.upper() == DICOM_DIRECTORY:
        return False
    return name.lower().endswith(IMAGE_SUFFIXES) or _is_dicom(Path(place, name))


def _is_dicom(path: Path) -> bool:
    """Say so by its first bytes: on a CD a name has eight characters and no suffix (PS3.10 section 8), elsewhere it is a UID."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _read_list(path: Path) -> list[str]:
    return [name for line in read_text(path).splitlines() if (name := line.strip())]


def _refuse_overlaps(arguments: Sequence[Path]) -> None:
    """Refuse a file or folder that is named twice, or lies in a folder that is named too."""
    places = [argument.absolute() for argument in arguments]
    counts = Counter(places)
    for argument, place in zip(arguments, places, strict=True):
        around = next((parent for parent in place.parents if parent in counts), None)
        if counts[place] > 1 or around is not None:
            raise ImageError(
                f"{argument}: found {'in ' + str(around) if around else 'twice'}; needed each image once. "
                f"Next: name it once."
            )
