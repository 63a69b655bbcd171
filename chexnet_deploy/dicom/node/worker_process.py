"""The node's side of a worker: a process that is started, asked with a deadline, and killed when it doesn't answer.

Executed, never forked: a fork would copy the threads' locks and a GPU's context in whatever state they are.
"""

import json
import os
import select
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, Final

from chexnet_deploy.dicom.node.worker import MAX_DOCUMENTS, Answer

MAX_ANSWER_BYTES: Final = 128 * 1024 * 1024
"""All documents of an answer. A full-size colour secondary capture takes about 50 MB."""
_MAX_HEAD_BYTES: Final = 65_536
_EXIT_S: Final = 2.0


class WorkerFault(Exception):
    """A worker died, hung, failed or said what can't be understood; it has been killed.

    Attributes:
        reason: a code for logs.
        message: why it could not be opened, from our own errors; empty once it has seen images.
    """

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(reason)
        self.reason, self.message = reason, message


class Worker:
    """One worker process at a time.

    Start it from a thread that lives as long as it: the system kills it when that thread ends.

    Args:
        command: a program that calls worker.serve.
        start_deadline_s: to load the model and check its known answers.
        answer_deadline_s: for one image, or one self-test.
    """

    def __init__(self, command: Sequence[str], *, start_deadline_s: float, answer_deadline_s: float) -> None:
        self._command = list(command)
        self._start_deadline_s, self._answer_deadline_s = start_deadline_s, answer_deadline_s
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = bytearray()
        self.versions: Mapping[str, str] = {}

    @property
    def is_running(self) -> bool:
        """Whether it was started and not ended since, by us."""
        return self._process is not None

    def start(self) -> None:
        """Start a process and wait until it has given the known answers.

        Raises:
            WorkerFault: it did not.
        """
        self.stop()
        self._unread.clear()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        head, _ = self._hear(monotonic() + self._start_deadline_s)
        if not isinstance(head.get("ready"), dict):
            raise self._fault("worker-nonsense")
        self.versions = head["ready"]

    def answer(self, path: Path) -> Answer:
        """Return the worker's answer for an image.

        Raises:
            WorkerFault: there is none.
        """
        return self._answer({"ask": "answer", "path": str(path)})

    def explain(self, path: Path, reason: str) -> Answer:
        """Return what is to be said of an image that a worker was lost over.

        Raises:
            WorkerFault: nothing can be.
        """
        return self._answer({"ask": "explain", "path": str(path), "reason": reason})

    def _answer(self, request: Mapping[str, str]) -> Answer:
        head, documents = self._ask(request)
        try:
            return Answer(documents, head["refusal"], head["header"], head["pixels"])
        except (KeyError, TypeError, ValueError) as err:
            raise self._fault("worker-nonsense") from err

    def self_test(self) -> None:
        """Return once the worker has given the known answers again.

        Raises:
            WorkerFault: it did not.
        """
        self._ask({"ask": "self-test"})

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None  # opened as pipes
        assert process.stdout is not None
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def _ask(self, request: Mapping[str, str]) -> tuple[dict[str, Any], tuple[bytes, ...]]:
        if self._process is None:
            raise WorkerFault("worker-not-running")
        assert self._process.stdin is not None
        deadline_s = monotonic() + self._answer_deadline_s
        try:
            # A request is far smaller than a pipe's buffer, so this doesn't block.
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as err:
            raise self._fault("worker-died") from err
        return self._hear(deadline_s)

    def _hear(self, deadline_s: float) -> tuple[dict[str, Any], tuple[bytes, ...]]:
        while b"\n" not in self._unread:
            if len(self._unread) > _MAX_HEAD_BYTES:
                raise self._fault("worker-nonsense")
            self._read_some(deadline_s)
        line, _, rest = bytes(self._unread).partition(b"\n")
        self._unread = bytearray(rest)
        try:
            head = json.loads(line)
            sizes = [int(size) for size in head.get("sizes", ())]
        except (ValueError, TypeError, AttributeError) as err:
            raise self._fault("worker-nonsense") from err
        if "failed" in head:
            raise self._fault(f"worker-failed-{head['failed']}", str(head.get("message", "")))
        if len(sizes) > MAX_DOCUMENTS or any(size < 0 for size in sizes) or sum(sizes) > MAX_ANSWER_BYTES:
            raise self._fault("worker-nonsense")
        while len(self._unread) < sum(sizes):
            self._read_some(deadline_s)
        documents = []
        for size in sizes:
            documents.append(bytes(self._unread[:size]))
            del self._unread[:size]
        return head, tuple(documents)

    def _read_some(self, deadline_s: float) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        if not poller.poll(max(0.0, deadline_s - monotonic()) * 1000.0):
            raise self._fault("worker-deadline")
        piece = os.read(handle, 1 << 16)
        if not piece:
            raise self._fault("worker-died")
        self._unread += piece

    def _fault(self, reason: str, message: str = "") -> WorkerFault:
        """Kill the process, whatever state it is in, and return the error to raise."""
        if reason == "worker-died" and self._process is not None:
            try:
                code = self._process.wait(_EXIT_S)
                reason = f"worker-died-signal-{-code}" if code < 0 else f"worker-died-exit-{code}"
            except subprocess.TimeoutExpired:
                pass  # it closed its output and lives on
        self.stop()
        return WorkerFault(reason, message)
