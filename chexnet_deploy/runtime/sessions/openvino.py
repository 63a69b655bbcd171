"""A Session on OpenVINO, for CPUs: the fastest backend measured here for fp32 and for the `cpu` form of int8.

Only fixed batch sizes are compiled. With a batch dimension left open, OpenVINO (2025.0 to 2026.4) answers wrongly where a concat
joins quantised tensors of different scales; the known answers would refuse such a session.
"""

import os
from collections import Counter
from collections.abc import Mapping
from functools import cache
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
import openvino

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.errors import SessionError
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import MAX_BATCH, Logits, Maps, check_finite, check_pixels
from chexnet_deploy.runtime.sessions.known_answers import KnownAnswers

# Batches are cut into pieces that run side by side on one core each: what is left in a core's own cache isn't fetched from
# another's, and no core waits for another between layers. A piece of four images takes 0.9 of the time of four pieces of one,
# which take 0.8 of that of four images on all cores. A single image takes all cores, to be answered soonest.
PIECE = 4  # the known answers are whole pieces
_TYPE_NAMES = (("_i8", "int8"), ("_u8", "int8"), ("_f16", "float16"), ("_bf16", "bfloat16"), ("_f32", "float32"))

_CORES: list[Any] = []


class OpenvinoSession:
    """One ONNX model in OpenVINO. Safe to call from several threads.

    As many single images run at once as `threads` goes into the cores; batches take turns.

    Opening compiles what answers a single image. The pieces of batches are compiled when the first batch of their kind comes,
    which takes up to as long again, and about 100 MiB at 224 px: a scanner that asks image by image pays neither.

    Args:
        model: the ONNX file's bytes.
        resize_px: side S of the pixels it takes.
        threads: threads for one call; None takes all cores.
        known: what pieces must answer before they are used; None asks nothing. A single image's are the caller's to ask.

    Raises:
        SessionError: OpenVINO refuses the model, or there are fewer cores than threads.
    """

    def __init__(
        self, model: bytes, resize_px: int, *, threads: int | None = None, known: KnownAnswers | None = None
    ) -> None:
        cores = os.cpu_count() or 1
        if threads is not None and not 1 <= threads <= cores:
            raise SessionError(f"got {threads} threads, needed 1 to {cores}, the cores of this machine.")
        self.batch_range = (1, MAX_BATCH)
        self._resize_px = resize_px
        self._threads = threads or cores
        self._known = known
        self._lock = Lock()
        n_single = max(1, cores // self._threads)
        try:
            self._core = _core(os.getpid())
            self._model = self._core.read_model(model)
        except Exception as err:
            raise _refusal(err) from err
        self._single = self._compile(1, self._threads * n_single, streams=n_single)
        self._process = os.getpid()
        self._is_open = True
        self._singles: SimpleQueue[Any] = SimpleQueue()
        for _ in range(n_single):
            self._singles.put(self._single.create_infer_request())
        self._beside: dict[int, list[Any]] = {}

    @classmethod
    def open(
        cls, bundle: Bundle, *, threads: int | None = None, known: KnownAnswers | None = None
    ) -> "OpenvinoSession":
        """Load a bundle's model.

        Raises:
            SessionError: OpenVINO refuses the model.
        """
        return cls(bundle.read_model(), bundle.manifest.preprocessing.resize_px, threads=threads, known=known)

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Return logits and maps of uint8 pixels [N, 1, S, S]; see Session.run."""
        check_pixels(pixels, self._resize_px, self.batch_range)
        if not self._is_open:
            raise SessionError("this session is closed. Open the bundle again.")
        if self._process != os.getpid():  # its threads are not here: it would wait for them for ever
            raise SessionError("this session was opened before a fork. Open the bundle in each process.")
        try:
            logits, maps = self._answer(np.ascontiguousarray(pixels))
        except SessionError:
            raise
        except Exception as err:
            raise SessionError(f"OpenVINO failed on a batch of {pixels.shape[0]}: {err}") from err
        check_finite(logits, maps)
        return logits, maps

    def conv_types(self) -> Mapping[str, int]:
        """Return how many convolutions OpenVINO runs in each type, read from the graph it compiled."""
        counts: Counter[str] = Counter()
        for node in self._single.get_runtime_model().get_ops():
            info = node.get_rt_info()
            if str(info["layerType"].astype(str)) == "Convolution":
                kernel = str(info["primitiveType"].astype(str)).lower()
                counts[next((name for suffix, name in _TYPE_NAMES if kernel.endswith(suffix)), kernel)] += 1
        return dict(counts)

    def stage_times_ms(self, pixels: Pixels) -> Mapping[str, float]:
        """Return nothing: on a CPU there is no copying to tell apart."""
        return {}

    def close(self) -> None:
        """Free the model; no run may be under way."""
        self._is_open = False
        self._single = self._model = None
        self._singles, self._beside = SimpleQueue(), {}

    def _answer(self, pixels: Pixels) -> tuple[Logits, Maps]:
        n = len(pixels)
        n_in_fours = n - n % (PIECE * self._threads)  # no core is without a piece
        # The last one takes all cores where it would be on one, beside nothing.
        n_last = int(n == 1 or (self._threads > 1 and (n - n_in_fours) % self._threads == 1))
        parts: list[tuple[Logits, Maps]] = []
        if n > n_last:
            with self._lock:
                for part, size in ((pixels[:n_in_fours], PIECE), (pixels[n_in_fours : n - n_last], 1)):
                    if len(part):
                        parts += _run_beside(self._requests(size), part, size)
        if n_last:
            parts.append(self._answer_one(pixels[n - 1 :]))
        return _join(parts)

    def _answer_one(self, pixels: Pixels) -> tuple[Logits, Maps]:
        request = self._singles.get()
        try:
            request.infer({0: pixels}, share_inputs=True)
            return _outputs(request)
        finally:
            self._singles.put(request)

    def _requests(self, size: int) -> list[Any]:
        """Return what runs pieces of so many images, one on each thread; call it with the lock held."""
        if size not in self._beside:
            compiled = self._compile(size, self._threads, streams=self._threads)
            requests = [compiled.create_infer_request() for _ in range(self._threads)]
            if self._known is not None:
                self._known.check(lambda pixels: _join(_run_beside(requests, pixels, size)))
            self._beside[size] = requests
        return self._beside[size]

    def _compile(self, batch: int, threads: int, *, streams: int) -> Any:
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            # Where the CPU has bfloat16 OpenVINO takes it for floats unless told not to: 8 bits of mantissa, silently.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        try:
            self._model.reshape([batch, 1, self._resize_px, self._resize_px])
            return self._core.compile_model(self._model, "CPU", settings)
        except Exception as err:
            raise _refusal(err) from err


@cache
def _core(process: int) -> Any:
    """Return the one Core of a process.

    It is never freed. OpenVINO (to 2026.4) gives the thread that makes a Core a stack for signals, and frees that stack with the
    Core: where Cores come and go, the next signal, as Ctrl-C or SIGTERM, ends the process by a segmentation fault.
    """
    core = openvino.Core()
    _CORES.append(core)  # of two threads that come first, both keep theirs
    return core


def _refusal(err: Exception) -> SessionError:
    return SessionError(f"OpenVINO {openvino.get_version()} refuses this model: {err}")


def _run_beside(requests: list[Any], pixels: Pixels, size: int) -> list[tuple[Logits, Maps]]:
    """Run pieces of so many images, as many at once as there are requests."""
    parts = []
    for start in range(0, len(pixels), size * len(requests)):
        running = []
        for request, first in zip(requests, range(start, len(pixels), size), strict=False):
            request.start_async({0: pixels[first : first + size]}, share_inputs=True)
            running.append(request)
        for request in running:
            request.wait()
            parts.append(_outputs(request))
    return parts


def _join(parts: list[tuple[Logits, Maps]]) -> tuple[Logits, Maps]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([logits for logits, _ in parts]), np.concatenate([maps for _, maps in parts])


def _outputs(request: Any) -> tuple[Logits, Maps]:
    # Copies: the buffers belong to the next run.
    return request.get_tensor("logits").data.copy(), request.get_tensor("cam").data.copy()
