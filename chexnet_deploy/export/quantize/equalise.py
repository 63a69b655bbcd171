"""Give every channel of an activation or a weight the same range, without changing what the network computes.

One int8 scale serves a whole tensor, so a channel that stays small wastes most of its steps. Before a convolution stands
ReLU, and relu(x / d) = relu(x) / d for d > 0: the layer before is divided by d, the convolution's weights are multiplied by it
(Nagel et al. 2019, arXiv 1906.04721, section 4.1). In the cpu form the parts of each concat are also centred: what reads
them is a BatchNorm, which takes back both scale and shift. In the mixed form one scale serves a whole weight, so its output
channels are brought to the same size, and what reads them in float16 takes it back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from chexnet_deploy.errors import ExportError
from chexnet_deploy.export.quantize.graph_edits import consumers_of, copy_of, producers_of, set_weights, weights_of
from chexnet_deploy.export.quantize.observe import Observed

# A channel's range is not stretched more than this: where it is nearly always zero, chance decides what was seen, and where
# its weights are nearly zero, what it is stretched to must still fit into float16.
_LARGEST_STRETCH = 50.0
_CHANNELWISE = ("Relu", "MaxPool", "AveragePool", "Identity", "Concat")  # a channel times d > 0 comes out times d


def equalise_inputs(
    model: onnx.ModelProto, convs: Sequence[onnx.NodeProto], observed: Observed
) -> tuple[onnx.ModelProto, Observed]:
    """Return the graph with each of the convolutions' inputs reaching the same value in every channel.

    Args:
        model: float32, BatchNorms folded.
        convs: convolutions whose input is a ReLU, or an average pool of one.
        observed: ranges of these inputs and ReLUs, and moments of these convolutions.

    Returns:
        The graph, and what would have been observed on it.
    """
    equal = copy_of(model)
    graph, arrays, producers = equal.graph, weights_of(equal), producers_of(equal.graph)
    names = {conv.output[0] for conv in convs}
    for conv in [node for node in graph.node if node.output[0] in names]:
        tensor, weight = conv.input[0], conv.input[1]
        relu = producers[tensor] if producers[tensor].op_type == "Relu" else producers[producers[tensor].input[0]]
        high = observed.high[tensor]
        factors = np.maximum(high / high.max(), 1.0 / _LARGEST_STRETCH)
        _divide_producer(arrays, producers[relu.input[0]], factors)
        arrays[weight] = _times(arrays[weight], factors, axis=1)
        for name in {tensor, relu.output[0]}:
            observed = observed.scaled(name, 1.0 / factors)
        positions = len(observed.moments[weight]) // len(factors)
        observed = observed.reweighted(weight, np.repeat(1.0 / factors, positions))
    set_weights(equal, arrays)
    return equal, observed


@dataclass(frozen=True, slots=True)
class ConcatParts:
    """What the concats are made of.

    Attributes:
        first: the ReLU before the first pooling, never negative; everything pooled from it is concatenated.
        others: outputs of convolutions.
    """

    first: str
    others: tuple[str, ...]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> "ConcatParts":
        """Find them.

        Raises:
            ExportError: the network is no DenseNet.
        """
        producers = producers_of(model.graph)
        parts = []
        for node in model.graph.node:
            if node.op_type == "Concat":
                parts += [name for name in node.input if producers[name].op_type != "Concat" and name not in parts]
        pooled = [name for name in parts if producers[name].op_type == "MaxPool"]
        others = tuple(name for name in parts if name not in pooled)
        if len(pooled) != 1 or any(producers[name].op_type != "Conv" for name in others):
            raise ExportError(
                "found a network without DenseNet's concats, needed one with them, as int8 is made of DenseNets alone. "
                "Next: leave int8 out of --precision."
            )
        return cls(producers[pooled[0]].input[0], others)


def normalise_parts(model: onnx.ModelProto, parts: ConcatParts, observed: Observed) -> onnx.ModelProto:
    """Return the graph with every channel of every concat part filling -1..1, of the first one 0..1.

    Args:
        model: float32, BatchNorms folded; only BatchNorms read the concats.
        parts: of this graph.
        observed: ranges of the parts.
    """
    equal = copy_of(model)
    graph, arrays = equal.graph, weights_of(equal)
    producers, consumers = producers_of(graph), consumers_of(graph)
    # By tensor: value before = spread * value now + centre.
    spread: dict[str, NDArray[np.float64]] = {parts.first: _positive(observed.high[parts.first])}
    centre: dict[str, NDArray[np.float64]] = {parts.first: np.zeros_like(spread[parts.first])}
    _divide_producer(arrays, producers[producers[parts.first].input[0]], spread[parts.first])
    for name in parts.others:
        spread[name] = _positive((observed.high[name] - observed.low[name]) / 2.0)
        centre[name] = (observed.high[name] + observed.low[name]) / 2.0
        conv = producers[name]
        if len(conv.input) < 3:
            conv.input.append(f"{name}_bias")
            arrays[f"{name}_bias"] = np.zeros(len(spread[name]), np.float32)
        arrays[conv.input[2]] = (arrays[conv.input[2]].astype(np.float64) - centre[name]).astype(np.float32)
        _divide_producer(arrays, conv, spread[name])
    for node in graph.node:
        if node.op_type == "BatchNormalization" and node.input[0] in spread:
            scale, shift = (arrays[name].astype(np.float64) for name in node.input[1:3])
            arrays[node.input[2]] = (shift + scale * centre[node.input[0]]).astype(np.float32)
        elif node.op_type in _CHANNELWISE and all(name in spread for name in node.input):
            centre[node.output[0]] = np.concatenate([centre[name] for name in node.input])
        _take_back(arrays, node, spread)
    unread = [name for name in (parts.first, *parts.others) if not consumers.get(name)]
    assert not unread, unread
    set_weights(equal, arrays)
    return equal


def equalise_outputs(model: onnx.ModelProto, convs: Sequence[onnx.NodeProto], parts: ConcatParts) -> onnx.ModelProto:
    """Return the graph with every output channel of these convolutions having a largest weight of the same size.

    Args:
        model: float32, BatchNorms folded; what reads the convolutions is not quantised.
        convs: of this graph; BatchNorms read them through concats, and other convolutions through a ReLU.
        parts: of this graph.
    """
    equal = copy_of(model)
    graph, arrays = equal.graph, weights_of(equal)
    producers, names = producers_of(graph), {conv.output[0] for conv in convs}
    # By tensor: value before = spread * value now. Concats need it of all their parts.
    spread = {name: np.ones(len(arrays[producers[name].input[1]])) for name in parts.others}
    spread[parts.first] = np.ones(len(arrays[producers[producers[parts.first].input[0]].input[1]]))
    for node in graph.node:
        if node.output[0] in names:
            largest = np.abs(arrays[node.input[1]].astype(np.float64)).max(axis=(1, 2, 3))
            spread[node.output[0]] = np.maximum(largest / largest.max(), 1.0 / _LARGEST_STRETCH)
            _divide_producer(arrays, node, spread[node.output[0]])
        _take_back(arrays, node, spread)
    set_weights(equal, arrays)
    return equal


def _take_back(
    arrays: dict[str, NDArray[np.generic]], node: onnx.NodeProto, spread: dict[str, NDArray[np.float64]]
) -> None:
    """Multiply what a node reads by its spread, or note the spread of what it writes where it passes channels on."""
    if node.op_type in _CHANNELWISE and all(name in spread for name in node.input):
        spread[node.output[0]] = np.concatenate([spread[name] for name in node.input])
    elif node.op_type == "BatchNormalization" and node.input[0] in spread:
        arrays[node.input[1]] = _times(arrays[node.input[1]], spread[node.input[0]], axis=0)
    elif node.op_type == "Conv" and node.input[0] in spread:
        arrays[node.input[1]] = _times(arrays[node.input[1]], spread[node.input[0]], axis=1)


def _divide_producer(
    arrays: dict[str, NDArray[np.generic]], node: onnx.NodeProto, factors: NDArray[np.float64]
) -> None:
    """Divide each output channel of a convolution or a folded BatchNorm by its factor."""
    assert node.op_type in ("Conv", "BatchNormalization"), node.op_type
    for name in node.input[1:3]:  # weight and bias, or scale and shift
        arrays[name] = _times(arrays[name], 1.0 / factors, axis=0)


def _times(array: NDArray[np.generic], factors: NDArray[np.float64], *, axis: int) -> NDArray[np.generic]:
    shape = [1] * array.ndim
    shape[axis] = -1
    return (array.astype(np.float64) * factors.reshape(shape)).astype(np.float32)


def _positive(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values that can be divided by: a channel that never moves keeps its size."""
    return np.where(values > 0.0, values, 1.0)
