"""The worker's side: open the work, then answer one request after another on two pipes until the first one ends.

Requests come as lines of JSON on standard input. A reply is a line of JSON and the documents it announces. Standard output
carries replies alone: whatever a library prints goes nowhere, as it may quote an image's header.
"""

import ctypes
import json
import logging
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

from chexnet_deploy.errors import ChexnetError
from chexnet_deploy.node.work import Work

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
    _reply(replies, {"ready": dict(work.versions)})
    for line in requests:
        request = json.loads(line)
        try:
            if request["ask"] == "self-test":
                work.self_test()
                _reply(replies, {})
                continue
            answer = work.answer(Path(request["path"]))
        except Exception as err:  # noqa: BLE001 - after any error this process is replaced; its message may quote the image
            _reply(replies, {"failed": type(err).__name__})
            return
        sizes = [len(document) for document in answer.documents]
        _reply(replies, {"refusal": answer.refusal, "sizes": sizes}, *answer.documents)


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
