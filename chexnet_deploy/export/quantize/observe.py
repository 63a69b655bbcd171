"""What activations do on the calibration images: the range of each channel, and how a convolution's inputs move together.

Runs the float graph through ONNX Runtime once; changes nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from chexnet_deploy.errors import CalibrationError
from chexnet_deploy.export.quantize.graph_edits import integers, weights_of
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.score import iter_batches
from chexnet_deploy.runtime.sessions.ort import load_onnx

_BATCH_SIZE = 8  # all observed tensors of 8 images at 224 px take about 1.2 GB
_PATCHES = 4096  # of all images together; the longest patch has 1,152 numbers


@dataclass(frozen=True, slots=True)
class Observed:
    """What was seen on the calibration images.

    Attributes:
        low: [C] smallest value of each channel, by tensor.
        high: [C] largest value of each channel, by tensor.
        moments: [K, K] mean of p pT over patches p that a convolution reads, by the name of its weight; K is
            C * height * width of its kernel, in the weight's order.
    """

    low: Mapping[str, NDArray[np.float64]]
    high: Mapping[str, NDArray[np.float64]]
    moments: Mapping[str, NDArray[np.float64]]

    def scaled(self, tensor: str, factors: NDArray[np.float64]) -> "Observed":
        """Return what would have been seen had each channel of a tensor been multiplied by its factor, all positive."""
        low, high = dict(self.low), dict(self.high)
        low[tensor], high[tensor] = low[tensor] * factors, high[tensor] * factors
        return replace(self, low=low, high=high)

    def reweighted(self, weight: str, factors: NDArray[np.float64]) -> "Observed":
        """Return the same for the patches of one convolution; factors [K]."""
        moments = dict(self.moments)
        moments[weight] = moments[weight] * factors[:, None] * factors[None, :]
        return replace(self, moments=moments)


def observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    convs: Sequence[onnx.NodeProto],
    pixels: Pixels,
    *,
    on_images: Callable[[int], None] | None = None,
) -> Observed:
    """Run the images and return what was seen.

    Patches are drawn with a fixed seed, the same number from each image, so the same images give the same moments.

    Args:
        model: float32 graph.
        tensors: names of activations whose ranges are wanted.
        convs: convolutions whose patches are wanted.
        pixels: uint8 [N, 1, S, S].
        on_images: called after each batch with the images done.

    Raises:
        CalibrationError: a tensor is zero on every image, or not finite on one.
    """
    wanted = sorted({*tensors, *(conv.input[0] for conv in convs)})
    session = _open_with_outputs(model, wanted)
    shapes = {name: array.shape for name, array in weights_of(model).items()}
    low: dict[str, NDArray[np.float64]] = {}
    high: dict[str, NDArray[np.float64]] = {}
    sums: dict[str, NDArray[np.float32]] = {}
    rng = np.random.default_rng(0)
    patches_each = max(2, _PATCHES // len(pixels))
    done = 0
    for values in _run(session, wanted, pixels):
        for name in tensors:
            value = values[name]
            # np.minimum, not min: it keeps a NaN.
            low[name] = np.minimum(low.get(name, np.inf), value.min(axis=(0, 2, 3)).astype(np.float64))
            high[name] = np.maximum(high.get(name, -np.inf), value.max(axis=(0, 2, 3)).astype(np.float64))
        for conv in convs:
            patches = _draw_patches(values[conv.input[0]], conv, shapes[conv.input[1]], patches_each, rng)
            product = patches.T @ patches
            sums[conv.input[1]] = product if conv.input[1] not in sums else np.add(sums[conv.input[1]], product)
        done += len(values[wanted[0]])
        if on_images is not None:
            on_images(done)
    for name in tensors:
        largest = float(np.maximum(-low[name], high[name]).max())
        if not 0.0 < largest < np.inf:
            raise CalibrationError(
                f"tensor {name} has magnitude {largest} on the calibration images. Check the weights."
            )
    n_patches = patches_each * len(pixels)
    return Observed(low, high, {name: total.astype(np.float64) / n_patches for name, total in sums.items()})


def _draw_patches(
    value: NDArray[np.float32], conv: onnx.NodeProto, shape: tuple[int, ...], n_each: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return [N * n_each, K] patches at places drawn for each image, zeros beyond its border."""
    kernel = shape[2]
    padding, stride = integers(conv, "pads", (0, 0, 0, 0))[0], integers(conv, "strides", (1, 1))[0]
    padded = np.pad(value, ((0, 0), (0, 0), (padding, padding), (padding, padding))) if padding else value
    windows = sliding_window_view(padded, (kernel, kernel), axis=(2, 3))[:, :, ::stride, ::stride]
    n_images, _, height, width = windows.shape[:4]
    rows, columns = rng.integers(0, height, (n_images, n_each)), rng.integers(0, width, (n_images, n_each))
    drawn = windows[np.arange(n_images)[:, None], :, rows, columns]
    return np.ascontiguousarray(drawn.reshape(n_images * n_each, -1), np.float32)


def _open_with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> Any:
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    observed.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in tensors)
    return load_onnx(observed.SerializeToString())


def _run(session: Any, tensors: Sequence[str], pixels: Pixels) -> Iterator[Mapping[str, NDArray[np.float32]]]:
    for batch in iter_batches((pixels[i : i + 1] for i in range(len(pixels))), _BATCH_SIZE):
        yield dict(zip(tensors, session.run(list(tensors), {"pixels": batch}), strict=True))
