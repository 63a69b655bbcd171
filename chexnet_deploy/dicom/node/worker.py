"""The worker process: requests and replies on two pipes, and what answers behind them.

The node knows nothing of pixels or models; what answers knows nothing of networks, queues or logs. Requests come as lines of
JSON on standard input. A reply is a line of JSON and the documents it announces. Standard output carries replies alone:
whatever a library prints goes nowhere, as it may quote an image's header.
"""

import ctypes
import gc
import json
import logging
import os
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

from chexnet_deploy.errors import ChexnetError

REASON: Final = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_DIGEST: Final = re.compile(r"(?:[0-9a-f]{64})?")
MAX_REASON_CHARACTERS: Final = 64
MAX_DOCUMENTS: Final = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """What is to be sent about one image.

    Attributes:
        documents: DICOM files (PS3.10), in the order to send them. The same image gives the same SOP Instance UIDs, so that
            a document sent twice is one document.
        refusal: a code such as "view" where there is no result, and the documents, if any, say only that; never anything from
            the image's header.
        header: SHA-256 of the image's header whatever its encoding, 64 hexadecimal digits; empty where it is not known.
        pixels: likewise of its pixels.
    """

    documents: tuple[bytes, ...] = ()
    refusal: str = ""
    header: str = ""
    pixels: str = ""

    def __post_init__(self) -> None:
        if not (self.documents or self.refusal):
            raise ValueError("an answer has documents or a refusal")
        if not (_DIGEST.fullmatch(self.header) and _DIGEST.fullmatch(self.pixels)):
            raise ValueError("a hash is 64 hexadecimal digits, or empty")
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

    def explain(self, path: Path, reason: str) -> Answer:
        """Return the answer for an image that `answer` was lost over, having looked at its header alone.

        Raises:
            Exception: as `answer`.
        """
        ...

    def self_test(self) -> None:
        """Answer the embedded known images again.

        Raises:
            Exception: as `answer`.
        """
        ...


_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def serve(open_work: Callable[[], Work]) -> None:
    """Answer until standard input ends; the node starts the program that calls this.

    Args:
        open_work: loads the model and checks its known answers; called once standard output is safe.
    """
    requests, replies = sys.stdin.buffer, _seal_output()
    _die_with_the_node()
    try:
        work = open_work()
        work.self_test()
    except ChexnetError as err:  # no image was seen yet, so the message can't hold anything of one
        _reply(replies, {"failed": type(err).__name__, "message": str(err)})
        return
    # What is loaded is not looked at again: a full collection of 340,000 objects takes 100 ms, once in about 30 reports.
    gc.collect()
    gc.freeze()
    _reply(replies, {"ready": dict(work.versions)})
    for line in requests:
        request = json.loads(line)
        try:
            if request["ask"] == "self-test":
                work.self_test()
                _reply(replies, {})
                continue
            path = Path(request["path"])
            answer = work.answer(path) if request["ask"] == "answer" else work.explain(path, request["reason"])
        except Exception as err:  # noqa: BLE001 - after any error this process is replaced; its message may quote the image
            _reply(replies, {"failed": type(err).__name__})
            return
        sizes = [len(document) for document in answer.documents]
        head = {"refusal": answer.refusal, "header": answer.header, "pixels": answer.pixels, "sizes": sizes}
        _reply(replies, head, *answer.documents)


def _seal_output() -> IO[bytes]:
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    return replies


def _die_with_the_node() -> None:
    # A worker that hangs wouldn't see its input end when the node is killed, and would keep the GPU. A core dump would hold
    # the image.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A terminal's Ctrl-C reaches every process in front of it; when to stop is the node's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _reply(replies: IO[bytes], head: dict[str, Any], *documents: bytes) -> None:
    replies.write(json.dumps(head).encode() + b"\n")
    for document in documents:
        replies.write(document)
    replies.flush()
