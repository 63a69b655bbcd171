"""How large each tensor gets on the calibration images, and the int8 range that loses least.

Reads the fp32 graph through ONNX Runtime; changes nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from chexnet_deploy.errors import CalibrationError
from chexnet_deploy.preprocessing import Pixels
from chexnet_deploy.scoring import iter_batches
from chexnet_deploy.sessions.ort import load_onnx

INT8_MAX = 127  # symmetric: -128 is left out, so that negation stays exact and TensorRT takes it
ESTIMATOR = "least squared error over 2048 bins"
_BINS = 2048
_CANDIDATES = np.linspace(0.25, 1.0, 76)  # shares of the largest magnitude; 1.0 is min-max
_BATCH_SIZE = 8  # all 121 tensors of 8 images at 224 px take about 0.8 GB


def activation_ranges(
    model: onnx.ModelProto, tensors: Sequence[str], pixels: Pixels, *, on_images: Callable[[int], None] | None = None
) -> dict[str, float]:
    """Return for each tensor the magnitude that int8's 127 should stand for.

    Two passes over the images: the first finds each tensor's largest magnitude, the second its histogram.

    Args:
        model: fp32 graph.
        tensors: names of activations.
        pixels: uint8 [N, 1, S, S].
        on_images: called after each batch with the images done, of 2 N.

    Raises:
        CalibrationError: a tensor is zero on every image, or not finite on one.
    """
    session = _open_with_outputs(model, tensors)
    done = 0
    largest = dict.fromkeys(tensors, 0.0)
    for values in _run(session, tensors, pixels):
        for name, value in zip(tensors, values, strict=True):
            largest[name] = max(largest[name], float(np.abs(value).max()))
        done += len(values[0])
        if on_images is not None:
            on_images(done)
    for name, magnitude in largest.items():
        if not 0.0 < magnitude < np.inf:
            raise CalibrationError(
                f"tensor {name} has magnitude {magnitude} on the calibration images. Check the weights."
            )
    counts = {name: np.zeros(_BINS, np.int64) for name in tensors}
    for values in _run(session, tensors, pixels):
        for name, value in zip(tensors, values, strict=True):
            bins = np.minimum((np.abs(value).ravel() * (_BINS / largest[name])).astype(np.int64), _BINS - 1)
            counts[name] += np.bincount(bins, minlength=_BINS)
        done += len(values[0])
        if on_images is not None:
            on_images(done)
    return {name: best_range(counts[name], largest[name]) for name in tensors}


def best_range(counts: NDArray[np.int64], largest: float) -> float:
    """Return the clipping magnitude with the least squared rounding and clipping error.

    Args:
        counts: [B] values in each of B equal bins of magnitude between 0 and `largest`.
        largest: magnitude of the last bin's end.
    """
    centres = (np.arange(counts.size) + 0.5) * (largest / counts.size)
    # Bin 0 is mostly ReLU's exact zeros, which int8 keeps without error.
    centres[0] = 0.0
    errors = []
    for magnitude in _CANDIDATES * largest:
        step = magnitude / INT8_MAX
        rounded = np.minimum(np.round(centres / step), INT8_MAX) * step
        errors.append(float((counts * (rounded - centres) ** 2).sum()))
    return float(_CANDIDATES[int(np.argmin(errors))] * largest)


def _open_with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> Any:
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    observed.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in tensors)
    return load_onnx(observed.SerializeToString())


def _run(session: Any, tensors: Sequence[str], pixels: Pixels) -> Iterator[list[NDArray[np.float32]]]:
    for batch in iter_batches((pixels[i : i + 1] for i in range(len(pixels))), _BATCH_SIZE):
        yield session.run(list(tensors), {"pixels": batch})
