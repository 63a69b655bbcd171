"""Decode a DICOM file of any kind into its header and its gray image."""

import contextlib
import hashlib
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, LifoQueue
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import ImageRefusedError, RefusalReason, SessionError
from chexnet_deploy.images.dicom.header import DicomHeader, read_header
from chexnet_deploy.images.dicom.process import START_DEADLINE_S, DecodeError, DecodeRequest, DecodingProcess
from chexnet_deploy.images.gray import Gray, read_image_file, refusal
from chexnet_deploy.images.scope import ScopePolicy, check_scope


@dataclass(frozen=True, eq=False, slots=True)
class DicomImage:
    """One radiograph.

    Attributes:
        header: what is known of it; its pixel data are dropped.
        gray: [H, W] uint8, bone bright.
        pixels_sha256: of the stored values, whatever their transfer syntax; empty where it was not asked for.
    """

    header: DicomHeader
    gray: Gray
    pixels_sha256: str = ""


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What a decoding process may cost.

    Attributes:
        deadline_s: wall-clock time of one image, then the process is killed. It begins when a process is free; after
            `warm_up` the start of a process that replaces a lost one is in it too.
        memory_mib: address space of a process. 36 million pixels in JPEG 2000 take 700 MB of it.
        images_per_process: after as many it is replaced, so that a codec's leaks stay small.
    """

    deadline_s: float = 10.0
    memory_mib: int = 2048
    images_per_process: int = 1000

    def __post_init__(self) -> None:
        if not (0.0 < self.deadline_s <= 3600.0 and self.memory_mib >= 256 and self.images_per_process >= 1):
            raise ValueError(f"{self}: needed a deadline of 0 to 3600 s, at least 256 MiB and at least 1 image")


class Decoder:
    """Reads DICOM radiographs; compressed pixels are decoded in processes of their own, any number of threads may ask.

    A process is started when the first compressed image comes, or by `warm_up`, and kept. Uncompressed pixels need no codec
    and no process: they are read here. Use it as a context manager, or call `close`.

    Args:
        processes: how many images may be decoded at once; a thread beyond waits.
        limits: of each process.
    """

    def __init__(self, *, processes: int = 1, limits: DecodeLimits | None = None) -> None:
        if processes < 1:
            raise ValueError(f"got {processes} processes, needed at least 1")
        self._limits = limits or DecodeLimits()
        self._is_closed = False
        self._spare: DecodingProcess | None = None
        self._is_warm = False
        self._lock = threading.Lock()
        # One seat a process; an empty seat is a process to be started. Last in, first out keeps one warm.
        self._seats: LifoQueue[DecodingProcess | None] = LifoQueue()
        for _ in range(processes):
            self._seats.put(None)

    def decode(
        self,
        source: Path | str | bytes,
        *,
        scope: ScopePolicy | None = None,
        name: object = "the DICOM object",
        is_identified: bool = False,
    ) -> DicomImage:
        """Return one radiograph.

        Args:
            source: a file, or its bytes.
            scope: where given, what is out of it is refused before it is decoded.
            name: what messages call bytes; a file is called by its path.
            is_identified: give the pixels' hash too, which costs 1 to 3 ns a byte.

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
        if header.is_compressed:
            return self._decode(name, header, is_identified=is_identified)
        n_pixels = header.rows * header.columns
        words = np.frombuffer(header.pixel_data, f"<u{header.grayscale.bits_allocated // 8}", n_pixels)
        return _image(header, words.reshape(header.rows, header.columns), is_identified=is_identified)

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

    def _decode(self, name: object, header: DicomHeader, *, is_identified: bool) -> DicomImage:
        grayscale = header.grayscale
        request = DecodeRequest(
            header.transfer_syntax_uid,
            header.rows,
            header.columns,
            grayscale.bits_allocated,
            grayscale.bits_stored,
            grayscale.is_signed,
        )
        process = self._take()
        deadline_s, start = self._limits.deadline_s, monotonic()
        try:
            if not process.wait_ready(deadline_s=deadline_s if self._is_warm else START_DEADLINE_S):
                message = refusal(name, "no decoding process ready in time", "one", "send it again")
                raise ImageRefusedError(RefusalReason.DECODE_TIMEOUT, message)
            used_s = monotonic() - start if self._is_warm else 0.0
            words = process.decode(request, header.pixel_data, deadline_s=max(deadline_s - used_s, 0.0))
            # Before the memory is used again.
            image = _image(header, _as_allocated(name, header, words), is_identified=is_identified)
            if process.n_images >= self._limits.images_per_process:
                process = self._replace(process)
        except DecodeError as err:
            if not err.is_usable:
                process = self._replace(process)
            raise ImageRefusedError(
                err.reason, refusal(name, str(err), "whole pixel data", "send or export it again")
            ) from err
        except ImageRefusedError:
            raise
        except BaseException:
            # Its answer may still come, and must not be taken for the next image's.
            process = self._replace(process)
            raise
        finally:
            self._give_back(process)
        return image


def _image(header: DicomHeader, words: NDArray[np.uint8] | NDArray[np.uint16], *, is_identified: bool) -> DicomImage:
    grayscale = header.grayscale
    digest = ""
    if is_identified:
        # Beside the stored bits of uncompressed pixels there may be anything.
        lowest, mask = grayscale.high_bit + 1 - grayscale.bits_stored, (1 << grayscale.bits_stored) - 1
        digest = hashlib.sha256(((words >> lowest) & mask).astype("<u2", order="C").data).hexdigest()
    # Without its pixel data the header doesn't keep the whole file in memory.
    return DicomImage(replace(header, pixel_data=memoryview(b"")), grayscale.apply(words), digest)


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
