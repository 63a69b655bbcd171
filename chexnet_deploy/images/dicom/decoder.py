"""Decode a DICOM file of any kind into its header and its gray image."""

import contextlib
import hashlib
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, LifoQueue
from time import monotonic
from typing import Final
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import ImageRefusedError, OnStage, RefusalReason, SessionError, UnsupportedSystemError
from chexnet_deploy.images.dicom.header import DicomHeader, read_header
from chexnet_deploy.images.dicom.process import START_DEADLINE_S, DecodeError, DecodeRequest, DecodingProcess
from chexnet_deploy.images.gray import Gray, read_image_file, refusal
from chexnet_deploy.images.preprocessing import Resizing
from chexnet_deploy.images.scope import ScopePolicy, check_scope

LEAST_GRAY_RANGE: Final = 64
"""From the darkest to the brightest gray of a picture: a quarter of 0..255."""


@dataclass(frozen=True, eq=False, slots=True)
class DicomImage:
    """One radiograph.

    Attributes:
        header: what is known of it; its pixel data are dropped.
        gray: uint8, bone bright, upright where the header says how it lies: [H, W], or [W, H] after a quarter turn; of halved
            sides where a smaller picture was decoded.
        pixels_sha256: of the stored values, whatever their transfer syntax; of the codestream where a smaller picture was decoded;
            empty where it was not asked for.
    """

    header: DicomHeader
    gray: Gray
    pixels_sha256: str = ""


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What a decoding process may cost.

    Attributes:
        processor_s: the process's own time for one image, then it is killed. JPEG 2000 takes 0.5 s for a chest.
        deadline_s: wall-clock time of one image, then the process is killed and the machine called busy. It begins when a
            process is free; after `warm_up` the start of a process that replaces a lost one is in it too.
        memory_mib: address space of a process. 36 million pixels in JPEG 2000 take 700 MB of it.
        images_per_process: after as many it is replaced, so that a codec's leaks stay small.
    """

    processor_s: float = 10.0
    deadline_s: float = 15.0
    memory_mib: int = 2048
    images_per_process: int = 1000

    def __post_init__(self) -> None:
        are_times = all(0.0 < seconds <= 3600.0 for seconds in (self.processor_s, self.deadline_s))
        if not (are_times and self.memory_mib >= 256 and self.images_per_process >= 1):
            raise ValueError(f"{self}: needed times of 0 to 3600 s, at least 256 MiB and at least 1 image")


class Decoder:
    """Reads DICOM radiographs; compressed pixels are decoded in processes of their own, any number of threads may ask.

    A process is started when the first compressed image comes, or by `warm_up`, and kept. Uncompressed pixels need no codec
    and no process: they are read here. Use it as a context manager, or call `close`. A forked process has none of its parent's
    processes: they would answer either, with the other's pixels. It starts its own.

    Args:
        processes: how many images may be decoded at once; a thread beyond waits.
        limits: of each process.
    """

    def __init__(self, *, processes: int = 1, limits: DecodeLimits | None = None) -> None:
        if processes < 1:
            raise ValueError(f"got {processes} processes, needed at least 1")
        self._limits = limits or DecodeLimits()
        self._is_closed = False
        self._n_processes = processes
        self._begin()
        _DECODERS.add(self)

    def _begin(self) -> None:
        """Have no process yet, and no lock that anybody holds."""
        self._spare: DecodingProcess | None = None
        self._is_warm = False
        self._lock = threading.Lock()
        # One seat a process; an empty seat is a process to be started. Last in, first out keeps one warm.
        self._seats: LifoQueue[DecodingProcess | None] = LifoQueue()
        for _ in range(self._n_processes):
            self._seats.put(None)

    def _begin_in_fork(self) -> None:
        parents = [*self._seats.queue, self._spare]
        self._begin()
        for process in parents:
            if process is not None:
                process.disown()

    def decode(
        self,
        source: Path | str | bytes,
        *,
        scope: ScopePolicy | None = None,
        name: object = "the DICOM object",
        is_identified: bool = False,
        resizing: Resizing | None = None,
        on_stage: OnStage | None = None,
    ) -> DicomImage:
        """Return one radiograph.

        Args:
            source: a file, or its bytes.
            scope: where given, what is out of it is refused before it is decoded.
            name: what messages call bytes; a file is called by its path.
            is_identified: give the pixels' hash too, which costs 1 to 3 ns a byte.
            resizing: what the picture is read for, which may ask for a smaller one; None: for any use.
            on_stage: called when the "header" is read and found good; what follows is decoding.

        Raises:
            ImageRefusedError: the file can't be used; its `reason` says why.
            ImageError: there is no such file, or it is no regular one.
            SessionError: this decoder is closed, or its process doesn't start.
        """
        if isinstance(source, bytes):
            content = source
        else:
            name, content = source, read_image_file(Path(source))
        header = read_header(name, content)
        if scope is not None:
            check_scope(name, header, scope)
        if on_stage is not None:
            on_stage("header")
        if header.is_compressed:
            return self._decode(name, header, header.halvings(resizing), is_identified=is_identified)
        n_pixels = header.rows * header.columns
        words = np.frombuffer(header.pixel_data, f"<u{header.grayscale.bits_allocated // 8}", n_pixels)
        return _image(name, header, words.reshape(header.rows, header.columns), is_identified=is_identified)

    def warm_up(self) -> None:
        """Start every process and return when all can decode, so that the first image doesn't wait for one.

        One more is started, to step in for one that is lost: a service's next image doesn't wait for a start either.

        Raises:
            SessionError: this decoder is closed, or a process doesn't start.
        """
        processes = [self._take() for _ in range(self._seats.qsize())]
        try:
            are_ready = [process.wait_ready() for process in processes]
        finally:
            for process in processes:
                self._give_back(process)
        if not all(are_ready):
            raise SessionError("the decoding processes are still starting. Give the machine time, then warm up again.")
        with self._lock:
            self._is_warm = True
            if self._spare is None and not self._is_closed:
                self._spare = self._start()

    def close(self) -> None:
        """End the processes; those at work end with their image."""
        with self._lock:
            self._is_closed = True
            spare, self._spare = self._spare, None
        free = [spare]
        with contextlib.suppress(Empty):
            while True:
                free.append(self._seats.get_nowait())
        for process in free:
            if process is not None:
                process.kill()
        for _ in free[1:]:
            self._seats.put(None)  # wakes a thread that waits for a seat, which then sees that all is closed

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> DecodingProcess:
        process = self._seats.get()
        try:
            with self._lock:
                if self._is_closed:
                    raise SessionError("the decoder is closed. Open another one.")
                return process or self._start()
        except BaseException:
            self._seats.put(process)
            raise

    def _give_back(self, process: DecodingProcess) -> None:
        with self._lock:  # so that `close` either finds it in its seat, or leaves it to this thread
            if not self._is_closed:
                self._seats.put(process)
                return
        process.kill()
        self._seats.put(None)

    def _replace(self, process: DecodingProcess) -> DecodingProcess:
        """End a process and return the spare one, or one that gets ready while nobody waits for it."""
        process.kill()
        with self._lock:
            spare, self._spare = self._spare, None
            if spare is not None and not self._is_closed:
                self._spare = self._start()
        return spare or self._start()

    def _start(self) -> DecodingProcess:
        return DecodingProcess(memory_mib=self._limits.memory_mib)

    def _decode(self, name: object, header: DicomHeader, halvings: int, *, is_identified: bool) -> DicomImage:
        grayscale = header.grayscale
        request = DecodeRequest(
            header.transfer_syntax_uid,
            header.rows,
            header.columns,
            grayscale.bits_allocated,
            grayscale.bits_stored,
            grayscale.is_signed,
            halvings,
        )
        try:
            process = self._take()
        except UnsupportedSystemError as err:  # no reason to stop at this file
            needed, next_step = "uncompressed ones, or Linux, which decodes them apart", "export it uncompressed"
            message = refusal(name, "compressed pixel data", needed, next_step)
            raise ImageRefusedError(RefusalReason.TRANSFER_SYNTAX, message) from err
        deadline_s, start = self._limits.deadline_s, monotonic()
        try:
            if not process.wait_ready(deadline_s=deadline_s if self._is_warm else START_DEADLINE_S):
                raise DecodeError(RefusalReason.BUSY, "no decoding process ready in time", is_usable=True)
            used_s = monotonic() - start if self._is_warm else 0.0
            words = process.decode(
                request,
                header.pixel_data,
                processor_s=self._limits.processor_s,
                deadline_s=max(deadline_s - used_s, 0.0),
            )
            # Before the memory is used again.
            image = _image(
                name, header, _as_allocated(name, header, words), is_identified=is_identified and not halvings
            )
            if is_identified and halvings:
                image = replace(image, pixels_sha256=hashlib.sha256(header.pixel_data).hexdigest())
            if process.n_images >= self._limits.images_per_process:
                process = self._replace(process)
        except DecodeError as err:
            if not err.is_usable:
                process = self._replace(process)
            needed, next_step = "whole pixel data", "send or export it again"
            if err.reason is RefusalReason.BUSY:
                needed, next_step = "one with time for it", "lower the machine's load, then try again"
            elif err.reason is RefusalReason.DECODE_TIMEOUT:
                needed, next_step = "one that takes less", "export it uncompressed, or at a lower resolution"
            raise ImageRefusedError(err.reason, refusal(name, str(err), needed, next_step)) from err
        except ImageRefusedError:
            raise
        except BaseException:
            # Its answer may still come, and must not be taken for the next image's.
            process = self._replace(process)
            raise
        finally:
            self._give_back(process)
        return image


def _image(
    name: object, header: DicomHeader, words: NDArray[np.uint8] | NDArray[np.uint16], *, is_identified: bool
) -> DicomImage:
    grayscale = header.grayscale
    gray = grayscale.apply(words)
    darkest, brightest = int(gray.min()), int(gray.max())
    if 0 < brightest - darkest < LEAST_GRAY_RANGE:  # one gray is content_check.py's to refuse
        found = f"a picture in gray {darkest} to {brightest} of 255"
        next_step = "have its window, look-up table or bits corrected at the modality"
        needed = f"a range of at least {LEAST_GRAY_RANGE}"
        raise ImageRefusedError(RefusalReason.GRAYSCALE, refusal(name, found, needed, next_step))
    if header.orientation is not None and not header.orientation.is_upright:
        gray = header.orientation.turn(gray)
    digest = ""
    if is_identified:
        # Beside the stored bits of uncompressed pixels there may be anything.
        lowest, mask = grayscale.high_bit + 1 - grayscale.bits_stored, (1 << grayscale.bits_stored) - 1
        digest = hashlib.sha256(((words >> lowest) & mask).astype("<u2", order="C").data).hexdigest()
    # Without its pixel data the header doesn't keep the whole file in memory.
    return DicomImage(replace(header, pixel_data=memoryview(b"")), gray, digest)


_DECODERS: WeakSet[Decoder] = WeakSet()


def _begin_in_fork() -> None:
    for decoder in _DECODERS:
        decoder._begin_in_fork()


if hasattr(os, "register_at_fork"):  # Windows forks no process
    os.register_at_fork(after_in_child=_begin_in_fork)


def _as_allocated(
    name: object, header: DicomHeader, words: NDArray[np.uint8] | NDArray[np.uint16]
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return decoded words in the header's width, and refuse values that its Bits Stored can't hold.

    Above the stored bits of *uncompressed* pixels there may be anything, so it is masked; a codec's value is a value.
    """
    grayscale = header.grayscale
    kind, n_bits = ("i", grayscale.bits_stored - 1) if grayscale.is_signed else ("u", grayscale.bits_stored)
    values = words.view(f"{kind}{words.dtype.itemsize}")
    low, high = -(1 << n_bits) if grayscale.is_signed else 0, (1 << n_bits) - 1
    if int(values.min()) < low or int(values.max()) > high:
        found, needed = "decoded values beyond Bits Stored", f"{low} to {high}"
        message = refusal(name, found, needed, "send or export it again")
        raise ImageRefusedError(RefusalReason.CONTRADICTION, message)
    n_bytes = grayscale.bits_allocated // 8
    return values.astype(f"{kind}{n_bytes}", copy=False).view(f"u{n_bytes}")
