"""One decoding process: started, asked, ended. Knows nothing of DICOM headers; several of them make a Decoder."""

import json
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import RefusalReason, SessionError, require_linux

MAX_LINE_BYTES: Final = 4096
START_DEADLINE_S: Final = 60.0
"""Of a process that nobody could wait for before: a cold disk and a busy machine. A second is usual."""
_LOOK_S: Final = 0.05
"""At the least so long between two looks at a process's processor time."""
_STEP_BYTES: Final = 2**20
_KEPT_BYTES: Final = 2**28
_LARGEST_KEPT_BYTES: Final = 2**25  # glibc takes no higher threshold
_MOST_THREADS: Final = 4
"""Of one image. More are no quicker by much, and take address space."""


class DecodeError(Exception):
    """The process didn't decode; caught by Decoder, which knows the image's name."""

    def __init__(self, reason: RefusalReason, found: str, *, is_usable: bool) -> None:
        super().__init__(found)
        self.reason = reason
        self.is_usable = is_usable  # the process, for another image


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """What the process must know beside the bytes.

    Attributes:
        rows, columns: of the whole picture.
        halvings: of its sides; see decode.
    """

    transfer_syntax_uid: str
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    is_signed: bool
    halvings: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """What is decoded: rows and columns, halved and rounded up."""
        return -(-self.rows >> self.halvings), -(-self.columns >> self.halvings)


class DecodingProcess:
    """A child process with limits.

    It is a new program and no fork of this one, so it shares no memory, GPU or thread with it, and gets one socket and no
    other open file.

    Args:
        memory_mib: address space that it may have.
    """

    def __init__(self, *, memory_mib: int) -> None:
        require_linux("decoding of compressed DICOM")  # its memory can't be cut short, its processor time is seen
        try:
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as err:
            raise _not_started(err) from err
        self._started = monotonic()
        self._is_ready = False
        self._shared: mmap.mmap | None = None
        self.n_images = 0
        arguments = ["-B", "-m", "chexnet_deploy.images.dicom.child", str(theirs.fileno()), str(memory_mib)]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, *arguments],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",  # `-m` puts it on the import path: a file beside the images must not be imported
                    env=_environment(),
                )
            except OSError as err:
                self._channel.close()
                raise _not_started(err) from err

    def wait_ready(self, *, deadline_s: float = START_DEADLINE_S) -> bool:
        """Return whether it can be asked, as soon as it can, and at the deadline at the latest.

        Raises:
            SessionError: it ended, or has not got ready since START_DEADLINE_S.
        """
        if self._is_ready:
            return True
        self._channel.settimeout(max(deadline_s, 0.001))
        try:
            self._is_ready = self._channel.recv(MAX_LINE_BYTES) == b"ready"
        except TimeoutError:
            if monotonic() - self._started < START_DEADLINE_S:
                return False
        except OSError:
            pass
        if not self._is_ready:
            self.kill()
            status = self._process.returncode
            is_late = monotonic() - self._started >= START_DEADLINE_S
            raise _not_started(f"not ready after {START_DEADLINE_S:g} s" if is_late else f"exit status {status}")
        return True

    def decode(
        self, request: DecodeRequest, source: memoryview, *, processor_s: float, deadline_s: float
    ) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """Return the words of one image.

        Args:
            request: the image's facts.
            source: encapsulated pixel data.
            processor_s: the process's own time, of which a busy machine takes none.
            deadline_s: wall-clock time from now.

        Returns:
            [rows, columns] of request.shape, uint8 or uint16, in memory shared with the process and used again for its next
            image. Whatever a process does to it, every word stays one of 8 or 16 bits.

        Raises:
            DecodeError: DECODE_FAILED, DECODE_TIMEOUT where it takes more than processor_s, BUSY where it got less and wasn't
                done by the deadline.
        """
        end = monotonic() + deadline_s
        n_pixels, pixels_at = math.prod(request.shape), -(-len(source) // 8) * 8
        new_memory = self._reserve(pixels_at + 2 * n_pixels)
        assert self._shared is not None
        self._shared[: len(source)] = source
        question = {
            **asdict(request),
            "number": self.n_images,
            "source_bytes": len(source),
            "pixels_at": pixels_at,
            "deadline_s": math.ceil(processor_s),
        }
        try:
            answer = self._ask(json.dumps(question).encode(), new_memory, end, processor_s)
        except TimeoutError as err:
            found = "a machine too busy to decode the image in time"
            raise DecodeError(RefusalReason.BUSY, found, is_usable=False) from err
        except OSError as err:
            raise DecodeError(RefusalReason.DECODE_FAILED, self._end(), is_usable=False) from err
        self.n_images += 1
        bits = _read_answer(answer, self.n_images - 1)
        words = np.frombuffer(self._shared, f"u{bits // 8}", n_pixels, pixels_at)
        return words.reshape(request.shape)

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def disown(self) -> None:
        """Let go of it after a fork, in the process that didn't start it."""
        self._process.returncode = 0  # Popen neither waits for it nor kills it
        self._channel.close()

    def _reserve(self, n_bytes: int) -> list[int]:
        """Make the shared memory large enough; return its descriptor where the process doesn't have it yet.

        It is kept between images: fresh pages would cost 20 ms for each.
        """
        if self._shared is not None and len(self._shared) >= n_bytes:
            return []
        memory, self._shared = _new_shared_memory(-(-n_bytes // _STEP_BYTES) * _STEP_BYTES)
        return [memory]

    def _ask(self, question: bytes, new_memory: list[int], end: float, processor_s: float) -> bytes:
        """Return the answer; raise TimeoutError at the end, another OSError where the process ended."""
        try:
            last_s = self._used_s() + processor_s
            self._channel.settimeout(max(end - monotonic(), 0.001))
            socket.send_fds(self._channel, [question], new_memory)
        finally:
            for memory in new_memory:
                os.close(memory)
        line: bytes | None = None
        while line is None:
            # It can't have used more of the processor than has passed, so until then nobody needs to look.
            self._channel.settimeout(max(min(last_s - self._used_s(), end - monotonic()), _LOOK_S))
            try:
                line = self._channel.recv(MAX_LINE_BYTES)
            except TimeoutError:
                if self._used_s() >= last_s:
                    found = f"an image not decoded in {processor_s:.2g} s of processor time"
                    raise DecodeError(RefusalReason.DECODE_TIMEOUT, found, is_usable=False) from None
                if monotonic() >= end:
                    raise
        if not line:
            raise ConnectionResetError
        return line

    def _used_s(self) -> float:
        """Return the processor time of all its threads (clock_getcpuclockid(3), whose number Linux makes so)."""
        return time.clock_gettime(~self._process.pid << 3 | 2)

    def _end(self) -> str:
        """Return how the process ended, in words."""
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "pixel data on which the decoder stopped answering"
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"pixel data on which the decoder ended ({how})"


def _not_started(why: object) -> SessionError:
    return SessionError(
        f"the decoding process did not start ({why}). It needs the packages of chexnet-deploy[dicom], the memory it is "
        f"limited to and some time: raise memory_mib, free memory, lower the machine's load, or reinstall the extra."
    )


def _read_answer(line: bytes, number: int) -> int:
    """Return the bits of a word.

    The child may have been taken over, so its answer is read like a stranger's; one that is none ends it.
    """
    try:
        answer = json.loads(line)
        bits, error = (answer.get("bits"), answer.get("error")) if answer.get("number") == number else (None, None)
    except (ValueError, AttributeError, RecursionError):
        bits, error = None, None
    if bits in (8, 16):
        return int(bits)
    words = error if isinstance(error, str) and error.isprintable() and len(error) <= 60 else "no answer"
    found = f"pixel data that can't be decoded ({words})"
    raise DecodeError(RefusalReason.DECODE_FAILED, found, is_usable=words is error)


def _new_shared_memory(n_bytes: int) -> tuple[int, mmap.mmap]:
    """Return the descriptor and the view of anonymous memory whose size nobody can change any more.

    Without the seals a child could cut it short, and this process would end (SIGBUS) where it reads beyond.
    """
    import fcntl

    memory = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memory, n_bytes)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return memory, mmap.mmap(memory, 0)
    except OSError as err:
        os.close(memory)
        raise SessionError(
            f"no shared memory of {n_bytes:,} bytes ({err.strerror}). Free memory, then try again."
        ) from err


def _environment() -> dict[str, str]:
    """Return the child's environment: where this process finds its packages, and nothing that it may hold in secret."""
    return {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),  # noqa: PTH100  keeps zip files
        "PYTHONSAFEPATH": "1",
        "OPENBLAS_NUM_THREADS": "1",  # each thread's stack counts as address space
        "OMP_NUM_THREADS": "1",
        "OPJ_NUM_THREADS": str(
            min(len(os.sched_getaffinity(0)), _MOST_THREADS)
        ),  # of OpenJPEG, by which Pillow decodes
        "MALLOC_ARENA_MAX": "2",  # each thread's own would take 64 MiB of address space
        # Keep what is freed: fresh pages for each image's buffers would cost 20 ms.
        "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
        "MALLOC_MMAP_THRESHOLD_": str(_LARGEST_KEPT_BYTES),
    }
