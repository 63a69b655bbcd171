"""A Session on ONNX Runtime, CPU or CUDA: the fp32 reference everywhere, and a backend for boxes without a GPU.

The only module that imports onnxruntime, because of what must happen before that import.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# From 1.29 on ONNX Runtime reports models and machines to its maker, unless told not to before it is first imported
# (microsoft/onnxruntime#27379). A scanner does not call home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import FLOAT16_DIALECTS
from chexnet_deploy.errors import SessionError
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import MAX_BATCH, Logits, Maps, Provider, check_finite, check_pixels
from chexnet_deploy.runtime.sessions.known_answers import KnownAnswers

# TF32 would round the fp32 reference to ten bits of mantissa, silently; ONNX Runtime has it on.
_PROVIDERS: Mapping[Provider, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
}
_LOG_ERRORS_ONLY = 3
_TYPE_NAMES = {"float": "float32", "float16": "float16", "int8": "int8", "uint8": "int8"}


class OrtSession:
    """One ONNX model in ONNX Runtime. Safe to call from several threads at once (InferenceSession.run is).

    Args:
        model: the ONNX file's bytes.
        resize_px: side S of the pixels it takes.
        threads: threads for one call; None lets ONNX Runtime take all cores.
        provider: what it runs on.
        known: what a batch must answer before the first one is; None asks nothing. A single image's are the caller's to ask.

    Raises:
        SessionError: ONNX Runtime refuses the model or has no such provider, or there are fewer cores than threads.
    """

    def __init__(
        self,
        model: bytes,
        resize_px: int,
        *,
        threads: int | None = None,
        provider: Provider = "cpu",
        known: KnownAnswers | None = None,
    ) -> None:
        self.batch_range = (1, MAX_BATCH)
        self._read_model: Callable[[], bytes] = lambda: model
        self._resize_px = resize_px
        self._provider: Provider = provider
        self._unasked = known
        self._session: Any = load_onnx(model, session_options(threads), provider)

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        threads: int | None = None,
        provider: Provider = "cpu",
        known: KnownAnswers | None = None,
    ) -> "OrtSession":
        """Load a bundle's model.

        Raises:
            SessionError: ONNX Runtime refuses the model, or is known to run this dialect wrongly.
        """
        if bundle.manifest.dialect in FLOAT16_DIALECTS:
            require_float16_rounding()
        side = bundle.manifest.preprocessing.resize_px
        session = cls(bundle.read_model(), side, threads=threads, provider=provider, known=known)
        session._read_model = bundle.read_model  # for conv_types alone 8 to 28 MB need not be kept
        return session

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Return logits and maps of uint8 pixels [N, 1, S, S]; see Session.run."""
        if self._session is None:
            raise SessionError("this session is closed. Open the bundle again.")
        check_pixels(pixels, self._resize_px, self.batch_range)
        known = self._unasked
        if known is not None and len(pixels) > 1:
            known.check(self._answer)
            self._unasked = None
        return self._answer(pixels)

    def conv_types(self) -> Mapping[str, int]:
        """Return how many convolutions ONNX Runtime runs in each type, read from its own profile of one run."""
        pixels = np.zeros((1, 1, self._resize_px, self._resize_px), np.uint8)
        return count_conv_types(self._read_model(), self._provider, {"pixels": pixels})

    def stage_times_ms(self, pixels: Pixels) -> Mapping[str, float]:
        """Return nothing: ONNX Runtime does not tell its stages apart."""
        return {}

    def close(self) -> None:
        """Free the model."""
        self._session = None
        self._read_model = lambda: b""

    def _answer(self, pixels: Pixels) -> tuple[Logits, Maps]:
        try:
            logits, maps = self._session.run(["logits", "cam"], {"pixels": pixels})
        except Exception as err:
            raise SessionError(f"ONNX Runtime failed on a batch of {pixels.shape[0]}: {err}") from err
        check_finite(logits, maps)
        return logits, maps


def count_conv_types(model: bytes, provider: Provider, feed: Mapping[str, NDArray[np.generic]]) -> dict[str, int]:
    """Return how many convolutions of a model ONNX Runtime runs in each type, read from its own profile of one run.

    Args:
        model: the ONNX file's bytes.
        provider: what it runs on.
        feed: its inputs.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(1)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = load_onnx(model, options, provider)
        session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    counts: Counter[str] = Counter()
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and "Conv" in arguments.get("op_name", ""):
            (input_type, _shape), *_ = arguments["input_type_shape"][0].items()
            counts[_TYPE_NAMES.get(input_type, input_type)] += 1
    return dict(counts)


def session_options(threads: int | None) -> Any:
    """Return onnxruntime.SessionOptions as all sessions here have them.

    Args:
        threads: for one call; None lets ONNX Runtime take all cores.

    Raises:
        SessionError: there are fewer cores.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_ERRORS_ONLY
    options.enable_mem_pattern = False  # a second plan of the memory: 9 MiB more at 224 px, and no faster
    if threads is not None:
        cores = os.cpu_count() or 1
        if not 1 <= threads <= cores:
            raise SessionError(f"got {threads} threads, needed 1 to {cores}, the cores of this machine.")
        options.intra_op_num_threads = threads
    return options


def require_float16_rounding() -> None:
    """Refuse an ONNX Runtime whose QuantizeLinear truncates float16 where ONNX rounds half to even: all before 1.30.

    Raises:
        SessionError: this is one. Measured on 1.22 to 1.29; a trained network's logits move by 1.
    """
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < (1, 30):
        raise SessionError(
            f"ONNX Runtime {ort.__version__} truncates where typed int8 must round, and answers wrongly. "
            f"Install onnxruntime 1.30 or later (Python 3.11 or later), or use fp32, fp16 or an int8 of the trt8 dialect."
        )


def load_onnx(model: bytes, options: Any = None, provider: Provider = "cpu") -> Any:
    """Return a bare onnxruntime.InferenceSession on exactly the provider asked for.

    Args:
        model: the ONNX file's bytes.
        options: onnxruntime.SessionOptions; None for this project's own.
        provider: what it runs on.

    Raises:
        SessionError: ONNX Runtime refuses the model, or would run it on another provider.
    """
    if provider not in _PROVIDERS:
        raise SessionError(f"ONNX Runtime has no provider named {provider!r} here. Needed: {' or '.join(_PROVIDERS)}.")
    name, settings = _PROVIDERS[provider]
    if name not in ort.get_available_providers():
        raise SessionError(
            f"this ONNX Runtime {ort.__version__} has no {name}. Install onnxruntime-gpu in place of onnxruntime, or use cpu."
        )
    try:
        session = ort.InferenceSession(model, options or session_options(None), providers=[(name, settings)])
    except Exception as err:
        raise SessionError(f"ONNX Runtime {ort.__version__} refuses this model: {err}") from err
    # Where a provider does not start, a missing cuDNN say, ONNX Runtime goes on with the CPU and a line in its log.
    if session.get_providers()[0] != name:
        raise SessionError(
            f"ONNX Runtime {ort.__version__} fell back from {name} to {session.get_providers()[0]}. "
            f"Check the CUDA and cuDNN versions that it needs, or use cpu."
        )
    return session
