"""What every backend offers: pixels in, logits and activation maps out."""

from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import SessionError
from chexnet_deploy.images.preprocessing import Pixels

Logits = NDArray[np.float32]  # [N, C], C in manifest order; no sigmoid in any graph
# What runs an ONNX bundle: "auto" is OpenVINO where it is installed and else ONNX Runtime on the CPU, "cpu" and "cuda" are ONNX
# Runtime's. Plans know their GPU.
Provider: TypeAlias = Literal["auto", "openvino", "cpu", "cuda"]
Maps = NDArray[np.float32]  # [N, C, S/32, S/32], class activation maps; mean over space + bias = logits

# What an ONNX bundle takes at once: 256 x 224 x 224 takes about 3 GB of activations; nobody gains from more on a CPU.
MAX_BATCH = 256
BATCH_SIZE = 32  # fewer than a session may take, so that activations stay small


class Session(Protocol):
    """One loaded model on one backend; `run` may be called from several threads at once."""

    batch_range: tuple[int, int]

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Return logits and maps of uint8 pixels [N, 1, S, S].

        Raises:
            SessionError: wrong type or shape, N outside batch_range, or an answer that is not finite.
        """
        ...

    def conv_types(self) -> Mapping[str, int]:
        """Return how many convolutions really run in each type, read from the backend, e.g. {"float32": 121}.

        A backend may run a BatchNorm as a convolution of its own; it is counted then.
        """
        ...

    def stage_times_ms(self, pixels: Pixels) -> Mapping[str, float]:
        """Return how long one run spends in each stage, e.g. {"upload": 0.02, …}; empty where a backend can't tell."""
        ...

    def close(self) -> None:
        """Free the model; a closed session refuses to run."""
        ...


def run_in_batches(session: Session, pixels: Pixels, *, at_once: int = BATCH_SIZE) -> tuple[Logits, Maps]:
    """Return logits and maps of any number of pixels, in batches of `at_once` or what the session takes.

    Raises:
        SessionError: as Session.run.
    """
    step = max(session.batch_range[0], min(at_once, session.batch_range[1]))
    parts = [run_padded(session, pixels[i : i + step]) for i in range(0, len(pixels), step)]
    return np.concatenate([logits for logits, _ in parts]), np.concatenate([maps for _, maps in parts])


def run_padded(session: Session, pixels: Pixels) -> tuple[Logits, Maps]:
    """Run one batch; where the session takes no so small one, copies of its last image fill it up and their answers are dropped.

    Raises:
        SessionError: as Session.run.
    """
    n_missing = session.batch_range[0] - len(pixels)
    if n_missing <= 0:
        return session.run(pixels)
    logits, maps = session.run(np.concatenate([pixels, np.repeat(pixels[-1:], n_missing, axis=0)]))
    return logits[: len(pixels)], maps[: len(pixels)]


def check_pixels(pixels: Pixels, resize_px: int, batch_range: tuple[int, int]) -> None:
    """Refuse what the graph can't take, before a backend sees it.

    Raises:
        SessionError: says what was given and what is needed.
    """
    low, high = batch_range
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (1, resize_px, resize_px):
        raise SessionError(
            f"got {pixels.dtype} {list(pixels.shape)}, needed uint8 [N, 1, {resize_px}, {resize_px}]. "
            f"Make pixels with the manifest's Preprocessing."
        )
    if not low <= pixels.shape[0] <= high:
        raise SessionError(f"got a batch of {pixels.shape[0]}, this session takes {low} to {high}. Split the batch.")


def check_finite(logits: Logits, maps: Maps) -> None:
    """Refuse an answer that holds NaN or infinity: it would compare as "absent" with every threshold.

    Raises:
        SessionError: an answer is not finite.
    """
    if not (np.isfinite(logits).all() and np.isfinite(maps).all()):
        raise SessionError("the model answered with NaN or infinity. Don't use this bundle; build it again.")


def sigmoid(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return float32 probabilities; computed in float32 here, never in a graph's FP16 or INT8."""
    # exp(-|x|) never overflows.
    small = np.exp(-np.abs(logits.astype(np.float32)))
    return np.where(logits >= 0, 1.0 / (1.0 + small), small / (1.0 + small)).astype(np.float32)
