"""Ask a running node by a socket in its folder: `node status` and `node resend`.

The folder is its owner's alone, so whoever can connect may ask. A question and its answer are one line of JSON each.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from chexnet_deploy.errors import NodeError

CONTROL: Final = "control"
_DEADLINE_S: Final = 10.0
_MAX_LINE_BYTES: Final = 1_048_576

Handler = Callable[[str], Mapping[str, Any]]
"""Called with a question's argument; returns the answer."""


class Control:
    """Answers in a thread of its own, one question at a time.

    Args:
        handlers: by question.
    """

    def __init__(self, folder: Path, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers
        (folder / CONTROL).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        with _short(folder) as path:
            self._socket.bind(path)
        self._socket.listen()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _run(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_DEADLINE_S)
                connection.sendall(json.dumps(self._answer(_read_line(connection))).encode() + b"\n")

    def _answer(self, line: bytes) -> Mapping[str, Any]:
        try:
            asked = json.loads(line)
            return {"answer": self._handlers[asked["ask"]](str(asked["about"]))}
        except Exception as err:  # noqa: BLE001 - a question must not end the node; its message could hold a UID
            return {"failed": type(err).__name__}


def ask(folder: Path, question: str, about: str = "") -> dict[str, Any]:
    """Ask the node that runs on a folder.

    Raises:
        NodeError: none does, or it can't answer.
    """
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    channel.settimeout(_DEADLINE_S)
    try:
        with channel, _short(folder) as path:
            channel.connect(path)
            channel.sendall(json.dumps({"ask": question, "about": about}).encode() + b"\n")
            reply = json.loads(_read_line(channel))
    except (OSError, ValueError) as err:
        why = getattr(err, "strerror", None) or "no answer"
        raise NodeError(
            f"no running node can be asked on {folder} ({why}). Start it, and ask as its user or root."
        ) from err
    if "answer" not in reply:
        raise NodeError(
            f"the node on {folder} can't answer now ({reply.get('failed')}). Look at its log, and ask again."
        )
    answer: dict[str, Any] = reply["answer"]
    return answer


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < _MAX_LINE_BYTES:
        piece = connection.recv(65_536)
        if not piece:
            break
        line += piece
    return line


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """Yield a path of the socket that is short whatever the folder's: a socket's has 107 bytes at most (unix(7))."""
    handle = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{handle}/{CONTROL}"
    finally:
        os.close(handle)
