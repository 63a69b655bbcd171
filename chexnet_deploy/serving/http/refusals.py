"""Why a request is not answered: a status, a reason in one word that never changes, and a sentence.

Nothing a client sent is repeated in either: not a file name, not a header, not a value of a DICOM file.
"""

from enum import Enum
from typing import Final

from chexnet_deploy.errors import RefusalReason


class Fault(str, Enum):
    """Why a request was refused, for clients and metrics; the reasons for refusing an image are RefusalReason's."""

    BAD_REQUEST = "bad-request"
    NOT_FOUND = "not-found"
    METHOD = "method"
    TOO_LARGE = "body-too-large"
    ENCODING = "encoding"
    NOT_OFFERED = "not-offered"  # of the protocol, but not of this service: shared memory, model control
    BUSY = "busy"
    DEADLINE = "deadline"
    NOT_READY = "not-ready"
    GONE = "client-gone"
    ENGINE = "engine"
    INTERNAL = "internal"


class RequestError(Exception):
    """A request that gets an error for an answer.

    Args:
        status: HTTP status code.
        reason: one word, for programs and metrics.
        message: for people: found, needed, next step.
    """

    def __init__(self, status: int, reason: Fault | RefusalReason, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


RETRY_AFTER_S: Final = 1


def bad_request(message: str) -> RequestError:
    """Return a 400 that says what was found and needed."""
    return RequestError(400, Fault.BAD_REQUEST, message)


def busy(fault: Fault, message: str) -> RequestError:
    """Return a 503 that a client may try again after."""
    return RequestError(503, fault, message)


# What a client is told of an image that was refused. Fixed text: the package's own messages quote what they found, and what
# is found in a DICOM file belongs to a patient.
IMAGE_REFUSALS: Final = {
    RefusalReason.UNREADABLE: "This is no whole, upright, gray PNG or JPEG of one frame, and no DICOM file.",
    RefusalReason.NOT_DICOM: "This is no DICOM file: the preamble and its mark are missing.",
    RefusalReason.TRUNCATED: "The file ends before its contents do. Copy it again.",
    RefusalReason.TOO_LARGE: "The file, its picture or one of its elements is too large to be a radiograph.",
    RefusalReason.TOO_SMALL: "The picture is too small to be a radiograph.",
    RefusalReason.DAMAGED_HEADER: "The DICOM header is damaged. Copy the file again.",
    RefusalReason.TRANSFER_SYNTAX: "The transfer syntax can't be decoded. Send it uncompressed.",
    RefusalReason.NO_PIXELS: "The DICOM object holds no picture.",
    RefusalReason.MULTI_FRAME: "The DICOM object holds several frames; needed one.",
    RefusalReason.COLOUR: "The picture is in colour; needed gray.",
    RefusalReason.BIT_DEPTH: "The bits stored contradict each other or are too many.",
    RefusalReason.FOR_PROCESSING: "The picture is raw (for processing); needed one for presentation.",
    RefusalReason.GRAYSCALE: "A look-up table, rescale or window means nothing, or leaves few grays.",
    RefusalReason.CONTRADICTION: "Two parts of the file say different things of the same pixels.",
    RefusalReason.DECODE_FAILED: "The compressed pixels could not be decoded.",
    RefusalReason.DECODE_TIMEOUT: "The compressed pixels take more processor time than an image may have.",
    RefusalReason.BUSY: "The machine is too busy to decode compressed pixels. Send the image again.",
    RefusalReason.SPECIES: "The model is for people.",
    RefusalReason.MODALITY: "The modality is outside the model's scope.",
    RefusalReason.BODY_PART: "The body part is outside the model's scope.",
    RefusalReason.VIEW: "The view is outside the model's scope, or tilted.",
    RefusalReason.AGE: "The age is outside the model's scope, or can't be read.",
    RefusalReason.SOURCE_HEADER: "The header can't be carried over to a result.",
    RefusalReason.EXTREME_ASPECT: "The picture is too long to be a chest radiograph.",
    RefusalReason.BLANK: "The picture is blank.",
    RefusalReason.TOO_FEW_GRAY_LEVELS: "The picture has too few gray levels to be a radiograph.",
    RefusalReason.MOSTLY_BLACK_OR_WHITE: "The picture is mostly black or white.",
    RefusalReason.NOT_A_FRONTAL_CHEST: "The picture doesn't look like a frontal chest radiograph.",
    RefusalReason.TURNED_CLOCKWISE: "The picture looks turned clockwise.",
    RefusalReason.UPSIDE_DOWN: "The picture looks upside down.",
    RefusalReason.TURNED_COUNTERCLOCKWISE: "The picture looks turned counterclockwise.",
    RefusalReason.INVERTED: "The picture looks inverted.",
    RefusalReason.INVERTED_AND_TURNED_CLOCKWISE: "The picture looks inverted and turned clockwise.",
    RefusalReason.INVERTED_AND_UPSIDE_DOWN: "The picture looks inverted and upside down.",
    RefusalReason.INVERTED_AND_TURNED_COUNTERCLOCKWISE: "The picture looks inverted and turned counterclockwise.",
}
