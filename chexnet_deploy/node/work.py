"""The seam between the node and what answers: an image's file in, DICOM files or a reason out.

The node knows nothing of pixels or models; what answers knows nothing of networks, queues or logs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

REASON: Final = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
MAX_REASON_CHARACTERS: Final = 64
MAX_DOCUMENTS: Final = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """What is to be sent about one image, or why nothing is.

    Attributes:
        documents: DICOM files (PS3.10), in the order to send them. The same image gives the same SOP Instance UIDs, so that
            a document sent twice is one document.
        refusal: a code such as "not-a-chest" where there are no documents; never anything from the image's header.
    """

    documents: tuple[bytes, ...] = ()
    refusal: str = ""

    def __post_init__(self) -> None:
        if bool(self.documents) == bool(self.refusal):
            raise ValueError("an answer has documents or a refusal, and not both")
        if len(self.documents) > MAX_DOCUMENTS:
            raise ValueError(f"an answer has {len(self.documents)} documents, {MAX_DOCUMENTS} is the most")
        if self.refusal and (not REASON.fullmatch(self.refusal) or len(self.refusal) > MAX_REASON_CHARACTERS):
            raise ValueError("a refusal is a code of lower-case words joined by hyphens")


class Work(Protocol):
    """What answers, in a process of its own that may be killed at any moment.

    Opening one loads the model and checks its known answers.

    Attributes:
        versions: what an audit line needs to lead back to what answered: the bundle's id, packages and their versions.
    """

    versions: Mapping[str, str]

    def answer(self, path: Path) -> Answer:
        """Return the answer for a DICOM file. Whatever is wrong with the image is a refusal, not an exception.

        Raises:
            Exception: any means that this process can't be relied on any more; it is replaced.
        """
        ...

    def self_test(self) -> None:
        """Answer the embedded known images again.

        Raises:
            Exception: as `answer`.
        """
        ...
