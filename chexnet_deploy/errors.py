"""Every error this package raises on purpose.

    ChexnetError              a user can mend it; the command line prints one line and exits 2
    ├── BundleError           a bundle is damaged, edited, incomplete or can't be written
    ├── CalibrationError      a calibration set is too small, repeated, constant or overlaps the evaluation set
    ├── CheckpointError       weights can't be loaded, or don't fit the model
    ├── ClusterError          a Ray cluster can't be reached, differs from this machine, or its workers keep ending
    ├── DatasetError          a data set's tables or images contradict each other
    ├── DicomError            a DICOM result can't be made or kept without guessing
    ├── ExportError           an exported graph doesn't answer as the model it came from
    ├── GateError             a parity gate failed; the command line exits 1
    ├── ImageError            an image file can't be read without guessing
    │   └── ImageRefusedError it was read, and isn't what the network is for; `reason` says why in one word
    ├── MetricError           a statistic is undefined on this data
    ├── MissingPackageError   an optional package is needed; the message names the extra to install
    ├── NodeError             the DICOM node's configuration, folders or address are wrong
    │   └── AuditError        an audit log was changed, cut short, or can't be written
    ├── ServeError            the HTTP service's options or address are wrong, or it can't take another bundle
    ├── SessionError          a backend refused a model or its input
    ├── SpecError             an engine spec or a recipe is wrong
    ├── TableError            a table of findings is of another run, was changed, or can't be written
    ├── TrustError            a bundle isn't signed by a trusted key, is too old or has no PASS, or a key can't be used
    └── UnsupportedSystemError
                              this needs Linux, and the system is another

A message says what was found, what was needed, and the next step. Errors of other libraries are translated in
the module that uses them, `from err`. Anything else that escapes is a bug: the command line exits 70.

OnPhase is how long work reports progress: one signature for all, and no progress bar below the command line. OnStage tells whoever
measures that a stage of one image has ended.
require() wraps the import of an optional package; require_linux() says what rests on Linux.
"""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TypeAlias


class ChexnetError(Exception):
    """Something a user can mend."""


class BundleError(ChexnetError):
    """A bundle is damaged, edited, incomplete or can't be written."""


class CalibrationError(ChexnetError):
    """A calibration set is too small, repeated, constant or overlaps the evaluation set."""


class CheckpointError(ChexnetError):
    """Weights can't be loaded, or don't fit the model."""


class ClusterError(ChexnetError):
    """A Ray cluster can't be reached, differs from this machine, or its workers keep ending."""


class DatasetError(ChexnetError):
    """A data set's tables or images contradict each other."""


class DicomError(ChexnetError):
    """A DICOM result can't be made or kept without guessing."""


class ExportError(ChexnetError):
    """An exported graph doesn't answer as the model it came from."""


class GateError(ChexnetError):
    """A parity gate failed."""


class RefusalReason(str, Enum):
    """Why an image was refused, in one word that never changes: for audit logs, metrics and status codes."""

    UNREADABLE = "unreadable"  # no such file, a pipe, 0 bytes; and every refusal of a PNG or JPEG
    NOT_DICOM = "not-dicom"  # no preamble and DICM mark
    TRUNCATED = "truncated"  # something declares more bytes than there are
    TOO_LARGE = "too-large"  # the file, its matrix, one element, or the number or depth of its elements
    TOO_SMALL = "too-small"
    DAMAGED_HEADER = "damaged-header"
    TRANSFER_SYNTAX = "transfer-syntax"
    NO_PIXELS = "no-pixels"
    MULTI_FRAME = "multi-frame"
    COLOUR = "colour"
    BIT_DEPTH = "bit-depth"
    FOR_PROCESSING = "for-processing"
    GRAYSCALE = "grayscale"  # a look-up table, rescale or window that means nothing
    CONTRADICTION = "contradiction"  # two parts of the file say different things of the same pixels
    DECODE_FAILED = "decode-failed"
    DECODE_TIMEOUT = "decode-timeout"  # more of the processor's own time than an image may have
    BUSY = "busy"  # the machine: nothing is said of the image, which may be read later
    SPECIES = "species"
    MODALITY = "modality"
    BODY_PART = "body-part"
    VIEW = "view"
    AGE = "age"
    SOURCE_HEADER = "source-header"  # the picture is good, but a result could not be filed under its study or patient
    # Of the picture itself, by content_check.py; too small is above.
    EXTREME_ASPECT = "extreme-aspect"
    BLANK = "blank"
    TOO_FEW_GRAY_LEVELS = "too-few-gray-levels"
    MOSTLY_BLACK_OR_WHITE = "mostly-black-or-white"
    NOT_A_FRONTAL_CHEST = "not-a-frontal-chest"
    TURNED_CLOCKWISE = "turned-clockwise"
    UPSIDE_DOWN = "upside-down"
    TURNED_COUNTERCLOCKWISE = "turned-counterclockwise"
    INVERTED = "inverted"
    INVERTED_AND_TURNED_CLOCKWISE = "inverted-and-turned-clockwise"
    INVERTED_AND_UPSIDE_DOWN = "inverted-and-upside-down"
    INVERTED_AND_TURNED_COUNTERCLOCKWISE = "inverted-and-turned-counterclockwise"


class ImageError(ChexnetError):
    """An image file can't be read without guessing."""

    reason: RefusalReason = RefusalReason.UNREADABLE


class ImageRefusedError(ImageError):
    """An image can't be used, or isn't what the network is for.

    Args:
        reason: why, for logs and programs; holds nothing about a patient.
        message: why, for people.
    """

    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageRefusedError"], tuple[RefusalReason, str]]:
        return type(self), (self.reason, str(self))  # the default would pass the message alone


class MetricError(ChexnetError):
    """A statistic is undefined on this data."""


class MissingPackageError(ChexnetError):
    """An optional package is needed; the message names the extra to install."""


class NodeError(ChexnetError):
    """The DICOM node's configuration, folders or address are wrong."""


class AuditError(NodeError):
    """An audit log was changed, cut short, or can't be written."""


class ServeError(ChexnetError):
    """The HTTP service's options or address are wrong, or it can't take another bundle."""


class SessionError(ChexnetError):
    """A backend refused a model or its input."""


class SpecError(ChexnetError):
    """An engine spec or a recipe is wrong."""


class TableError(ChexnetError):
    """A table of findings is of another run, was changed, or can't be written."""


class TrustError(ChexnetError):
    """Nobody trusted has signed a bundle, it is too old or has no PASS here, or a key or trust file can't be used."""


class UnsupportedSystemError(ChexnetError):
    """This needs Linux, and the system is another."""


OnPhase: TypeAlias = Callable[[str, int, int], None]
"""Called with the phase's name, what is done and of how much; a phase begins when it is first named."""

OnStage: TypeAlias = Callable[[str], None]
"""Called with a stage's name as it ends, in the thread that works."""


@contextmanager
def require(extra: str, *, so: str = "", instead: str = "") -> Iterator[None]:
    """Import an optional package inside this block; where it is missing, the error says which extra to install.

    Args:
        extra: of chexnet-deploy.
        so: what can't be done without it, as a clause.
        instead: what else would help, as a clause.

    Raises:
        MissingPackageError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as err:
        consequence, way_out = f", so {so}" if so else "", f", or {instead}" if instead else ""
        raise MissingPackageError(
            f"{err.name} is not installed{consequence}. Run: pip install 'chexnet-deploy[{extra}]'{way_out}"
        ) from err


def require_linux(what: str) -> None:
    """Refuse what rests on means that Linux alone has; macOS and Windows have none of them.

    Raises:
        UnsupportedSystemError: this is not Linux.
    """
    if not hasattr(os, "memfd_create"):
        raise unsupported(what)


def unsupported(what: str) -> UnsupportedSystemError:
    """Return the error of what can't be done on this system."""
    return UnsupportedSystemError(
        f"{what} needs Linux, and this is {platform.system()}. Run it on Linux, in WSL 2 or in a container."
    )
