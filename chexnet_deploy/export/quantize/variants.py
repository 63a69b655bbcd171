"""The four int8 forms ("dialects") of one fp32 graph, from what was observed on the calibration images.

- `typed`: float16 around signed int8, opset 19, for TensorRT 10 and later. As in `mixed` and `trt8`, the last dense block and the
  transition before it stay in floating point. What a 1x1 convolution reads is lowered by 127 steps, which doubles its steps:
  such a convolution pads nothing, so its bias can take that back.
- `mixed`: the same with the 3x3 convolutions in float16, and one scale for each weight of the 1x1 ones. With that, TensorRT for
  RTX adds the bias and the ReLU inside the int8 kernel and writes float16, where it otherwise writes float32.
- `trt8`: float32 around signed int8, opset 17, for TensorRT 8.6.
- `cpu`: float32 around int8 for OpenVINO and ONNX Runtime on CPUs. Activations are unsigned, which doubles their steps, the
  concats before the last dense block are integers too, the first convolution reads the gray pixels, and weights are such
  that CPUs without VNNI don't saturate.

docs/quantisation.md holds what each step is worth.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from chexnet_deploy.bundle.manifest import FLOAT16_DIALECTS, Dialect
from chexnet_deploy.export.quantize.equalise import ConcatParts, equalise_inputs, equalise_outputs, normalise_parts
from chexnet_deploy.export.quantize.gptq import INT8_MAX, PAIR_MAX, largest_pairs, round_weights
from chexnet_deploy.export.quantize.graph_edits import (
    FIRST_PART,
    branch_first_part,
    integers,
    to_gray_stem,
    weights_of,
)
from chexnet_deploy.export.quantize.observe import Observed, observe
from chexnet_deploy.export.quantize.qdq import (
    Quantised,
    convolutions,
    fold_batch_norms,
    insert_qdq,
    round_up_to_half,
    to_float16,
)
from chexnet_deploy.images.preprocessing import Pixels

UINT8_MAX = 255
ESTIMATOR = (
    "largest value of each channel in three contrasts, 1.3 times it from the third block on, equalised; weights by GPTQ; "
    "head bias corrected"
)
# Brighter and darker, for the ranges: other sources differ most in contrast, and what a dark image does to a channel is beyond
# what any of thousands of ordinary ones does.
_GAMMAS = (0.8, 1.3)
# Of the ranges from the third block on. Rare findings go beyond what calibration images reach there, all channels together;
# up to there every picture has the same edges and gray levels.
_MARGIN = 1.3


@dataclass(frozen=True, slots=True)
class Prepared:
    """A float graph and all that makes it int8, so that single convolutions can be left in floating point.

    Attributes:
        graph: float32 or float16; computes what the fp32 graph does.
        convs: node names of the convolutions that can run in int8, in the graph's order, each with the name of its weight
            and the activation that is quantised for it alone, None where there is no such.
        activations: by tensor.
        weights: by weight.
    """

    dialect: Dialect
    graph: onnx.ModelProto
    convs: Mapping[str, tuple[str, str | None]]
    activations: Mapping[str, Quantised]
    weights: Mapping[str, Quantised]

    def build(self, float_convs: Collection[str] = ()) -> onnx.ModelProto:
        """Return the int8 graph, with these convolutions in floating point."""
        left = [self.convs[name] for name in float_convs]
        weights = {name: how for name, how in self.weights.items() if name not in {weight for weight, _ in left}}
        inputs = {tensor for _, tensor in left}
        activations = {name: how for name, how in self.activations.items() if name not in inputs}
        return insert_qdq(self.graph, activations, weights, holds_float_weights=self.dialect == "trt8")


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A float graph and what the calibration images did in it, before any scale is chosen.

    Attributes:
        graph: float32, BatchNorms folded.
        convs: outputs of the convolutions that become int8, in the graph's order.
        body: the same without the network's first, whose input is the pixels.
        parts: of the concats.
        seen: ranges and moments on the calibration images.
    """

    dialect: Dialect
    graph: onnx.ModelProto
    convs: tuple[str, ...]
    body: tuple[str, ...]
    parts: ConcatParts
    seen: Observed


def in_contrasts(pixels: Pixels) -> Pixels:
    """Return [2N, 1, S, S]: the images, then each once more, brighter and darker in turn."""
    copies = pixels.copy()
    for i, gamma in enumerate(_GAMMAS):
        table = np.rint(255.0 * (np.arange(256) / 255.0) ** gamma).astype(np.uint8)
        copies[i :: len(_GAMMAS)] = table[pixels[i :: len(_GAMMAS)]]
    return np.concatenate([pixels, copies])


def prepare(
    model: onnx.ModelProto, dialect: Dialect, pixels: Pixels, *, on_images: Callable[[int], None] | None = None
) -> Prepared:
    """Observe the calibration images and choose scales and integers.

    Args:
        model: fp32 graph as exported.
        dialect: see the module.
        pixels: uint8 [N, 1, S, S] of the calibration images.
        on_images: called with the images done.

    Raises:
        CalibrationError: a tensor has no range on these images.
        ExportError: a weight is beyond float16.
    """
    return choose_integers(calibrate(model, dialect, pixels, on_images=on_images))


def calibrate(
    model: onnx.ModelProto, dialect: Dialect, pixels: Pixels, *, on_images: Callable[[int], None] | None = None
) -> Calibrated:
    """Run the calibration images; arguments and errors as `prepare`."""
    is_for_cpu = dialect == "cpu"
    graph = fold_batch_norms(branch_first_part(to_gray_stem(model)) if is_for_cpu else model)
    convs = convolutions(graph)
    if not is_for_cpu:
        # TensorRT's forms leave the first convolution alone: its input is already an eighth of its output.
        last = _behind_pooling(graph, -1)
        convs = [conv for conv in convs[1:] if conv.output[0] not in last]
    if dialect == "mixed":
        convs = [conv for conv in convs if _is_pointwise(conv)]
    body = [conv for conv in convs if conv is not convolutions(graph)[0]]
    parts = ConcatParts.of(model)
    tensors = {node.output[0] for node in graph.graph.node if node.op_type == "Relu"}
    tensors |= {conv.input[0] for conv in body} | set(parts.others)
    done = None if on_images is None else lambda n_copies: on_images(n_copies // 2)
    seen = observe(graph, sorted(tensors), convs, in_contrasts(pixels), on_images=done)
    for name in sorted(tensors & _behind_pooling(graph, -2)):
        seen = seen.scaled(name, np.float64(_MARGIN))
    return Calibrated(dialect, graph, _outputs(convs), _outputs(body), parts, seen)


def choose_integers(calibrated: Calibrated) -> Prepared:
    """Equalise channels, then choose scales and round the weights.

    Raises:
        ExportError: a weight is beyond float16.
    """
    is_for_cpu = calibrated.dialect == "cpu"
    body = [conv for conv in convolutions(calibrated.graph) if conv.output[0] in calibrated.body]
    graph, seen = equalise_inputs(calibrated.graph, body, calibrated.seen)
    activations = {conv.input[0]: _of_input(seen, conv, calibrated.dialect) for conv in body}
    if is_for_cpu:
        graph = normalise_parts(graph, calibrated.parts, seen)
        last = _behind_pooling(graph, -1)
        activations |= _of_parts(name for name in calibrated.parts.others if name not in last)
    if calibrated.dialect == "mixed":
        graph = equalise_outputs(graph, body, calibrated.parts)
    convs = [node for node in convolutions(graph) if node.output[0] in calibrated.convs]
    arrays = weights_of(graph)
    weights = {
        name: _round(arrays[name].astype(np.float64), seen.moments[name], calibrated.dialect)
        for name in (conv.input[1] for conv in convs)
    }
    inputs = {conv.name: (conv.input[1], conv.input[0] if conv.input[0] in activations else None) for conv in convs}
    graph = to_float16(graph) if calibrated.dialect in FLOAT16_DIALECTS else graph
    return Prepared(calibrated.dialect, graph, inputs, activations, weights)


def _is_pointwise(conv: onnx.NodeProto) -> bool:
    return integers(conv, "kernel_shape", ()) == (1, 1)


def _outputs(nodes: Iterable[onnx.NodeProto]) -> tuple[str, ...]:
    return tuple(node.output[0] for node in nodes)


def _behind_pooling(graph: onnx.ModelProto, which: int) -> frozenset[str]:
    """Return what is computed from an average pooling on: -1 for the last transition and the last dense block.

    The last block's maps are the smallest, so that rounding is averaged over the fewest places, and its values reach furthest
    beyond the ordinary ones: most of what int8 does to the logits it does here, with a twentieth of the multiplications.
    """
    nodes = list(graph.graph.node)
    pools = [i for i, node in enumerate(nodes) if node.op_type == "AveragePool"]
    return (
        frozenset(name for node in nodes[pools[which] :] for name in node.output)
        if len(pools) >= -which
        else frozenset()
    )


def _of_input(seen: Observed, conv: onnx.NodeProto, dialect: Dialect) -> Quantised:
    tensor = conv.input[0]
    largest = float(np.maximum(seen.high[tensor], -seen.low[tensor]).max())
    is_unsigned = dialect == "cpu"
    is_centred = not is_unsigned and _is_pointwise(conv)
    n_steps = UINT8_MAX if is_unsigned else 2 * INT8_MAX if is_centred else INT8_MAX
    scale = np.float16(round_up_to_half(np.float64(largest / n_steps)))
    return Quantised(scale, is_unsigned=is_unsigned, is_centred=is_centred)


def _of_parts(others: Iterable[str]) -> dict[str, Quantised]:
    """Every part has been brought to -1..1, the first one to 0..1."""
    signed = Quantised(np.float16(round_up_to_half(np.float64(1.0 / INT8_MAX))))
    unsigned = Quantised(np.float16(round_up_to_half(np.float64(1.0 / UINT8_MAX))), is_unsigned=True)
    return {**dict.fromkeys(others, signed), FIRST_PART: unsigned}


def _round(weight: NDArray[np.float64], moments: NDArray[np.float64], dialect: Dialect) -> Quantised:
    fits_avx2 = dialect == "cpu"
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1) / INT8_MAX
    if fits_avx2:
        largest = np.maximum(largest, largest_pairs(weight) / PAIR_MAX)
    if dialect == "mixed":
        largest = np.full_like(largest, largest.max())
    scales = round_up_to_half(largest)
    steps = round_weights(weight, scales.astype(np.float64), moments, fits_avx2=fits_avx2)
    return Quantised(np.float16(scales[0]) if dialect == "mixed" else scales, steps)
