"""A Session on OpenVINO, for CPUs: the fastest backend measured here for fp32 and for the `cpu` form of int8.

Only fixed batch sizes are compiled. With a batch dimension left open, OpenVINO (2025.0 to 2026.4) answers wrongly where a concat
joins quantised tensors of different scales; the known answers would refuse such a session.
"""

import os
from collections import Counter
from collections.abc import Mapping
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
import openvino

from chexnet_deploy.bundle import Bundle
from chexnet_deploy.errors import SessionError
from chexnet_deploy.preprocessing import Pixels
from chexnet_deploy.sessions.base import MAX_BATCH, Logits, Maps, check_finite, check_pixels

# A batch is cut into pieces that run side by side on one core each: 1.1 to 1.2 times the images a second of one piece on
# all cores, whose activations leave the core's own cache. Single images take all cores.
PIECE = 4
_TYPE_NAMES = (("_i8", "int8"), ("_u8", "int8"), ("_f16", "float16"), ("_bf16", "bfloat16"), ("_f32", "float32"))


class OpenvinoSession:
    """One ONNX model in OpenVINO. Safe to call from several threads.

    As many single images run at once as `threads` goes into the cores; batches take turns.

    Args:
        model: the ONNX file's bytes.
        resize_px: side S of the pixels it takes.
        threads: threads for one call; None takes all cores.

    Raises:
        SessionError: OpenVINO refuses the model, or there are fewer cores than threads.
    """

    def __init__(self, model: bytes, resize_px: int, *, threads: int | None = None) -> None:
        cores = os.cpu_count() or 1
        if threads is not None and not 1 <= threads <= cores:
            raise SessionError(f"got {threads} threads, needed 1 to {cores}, the cores of this machine.")
        self.batch_range = (1, MAX_BATCH)
        self._resize_px = resize_px
        self._threads = threads or cores
        self._lock = Lock()
        n_single = max(1, cores // self._threads)
        try:
            core = openvino.Core()
            single = core.read_model(model)
            pieces = single.clone()
            self._single = _compile(core, single, 1, resize_px, self._threads * n_single, streams=n_single)
            self._pieces = _compile(core, pieces, PIECE, resize_px, self._threads, streams=self._threads)
        except Exception as err:
            raise SessionError(f"OpenVINO {openvino.get_version()} refuses this model: {err}") from err
        self._is_open = True
        self._singles: SimpleQueue[Any] = SimpleQueue()
        for _ in range(n_single):
            self._singles.put(self._single.create_infer_request())
        self._requests: list[Any] = [self._pieces.create_infer_request() for _ in range(self._threads)]

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int | None = None) -> "OpenvinoSession":
        """Load a bundle's model.

        Raises:
            SessionError: OpenVINO refuses the model.
        """
        return cls(bundle.read_model(), bundle.manifest.preprocessing.resize_px, threads=threads)

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Return logits and maps of uint8 pixels [N, 1, S, S]; see Session.run."""
        check_pixels(pixels, self._resize_px, self.batch_range)
        if not self._is_open:
            raise SessionError("this session is closed. Open the bundle again.")
        try:
            logits, maps = self._answer(np.ascontiguousarray(pixels))
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
        self._single = self._pieces = None
        self._singles, self._requests = SimpleQueue(), []

    def _answer(self, pixels: Pixels) -> tuple[Logits, Maps]:
        n_whole = len(pixels) // PIECE * PIECE
        parts = self._answer_pieces(pixels[:n_whole]) if n_whole else []
        parts += [self._answer_one(pixels[i : i + 1]) for i in range(n_whole, len(pixels))]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([logits for logits, _ in parts]), np.concatenate([maps for _, maps in parts])

    def _answer_pieces(self, pixels: Pixels) -> list[tuple[Logits, Maps]]:
        parts = []
        with self._lock:
            for start in range(0, len(pixels), PIECE * len(self._requests)):
                running = []
                for request, first in zip(self._requests, range(start, len(pixels), PIECE), strict=False):
                    request.start_async({0: pixels[first : first + PIECE]}, share_inputs=True)
                    running.append(request)
                for request in running:
                    request.wait()
                    parts.append(_outputs(request))
        return parts

    def _answer_one(self, pixels: Pixels) -> tuple[Logits, Maps]:
        request = self._singles.get()
        try:
            request.infer({0: pixels}, share_inputs=True)
            return _outputs(request)
        finally:
            self._singles.put(request)


def _compile(core: Any, model: Any, batch: int, resize_px: int, threads: int, *, streams: int) -> Any:
    model.reshape([batch, 1, resize_px, resize_px])
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": streams,
        # Where the CPU has bfloat16 OpenVINO takes it for floats unless told not to: 8 bits of mantissa, silently.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return core.compile_model(model, "CPU", settings)


def _outputs(request: Any) -> tuple[Logits, Maps]:
    # Copies: the buffers belong to the next run.
    return request.get_tensor("logits").data.copy(), request.get_tensor("cam").data.copy()
