"""ONNX graph to ONNX graph: fp32 -> typed fp16, and explicit Q/DQ around the convolutions.

Pure functions of a graph and numbers. Which ranges, and whether the result is good enough, is decided elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, version_converter

from chexnet_deploy.errors import ExportError
from chexnet_deploy.quantize.ranges import INT8_MAX

TYPED_OPSET = 19  # the first whose QuantizeLinear takes float16
_FLOAT16_MAX = 65504.0
_SMALLEST_SCALE = 2.0**-24  # float16's smallest positive number


def quantizable_convs(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the convolutions that run in int8: all but the first and the head.

    The first one's weights lose most: on one network at 224 px, leaving it out raises the logits' signal to quantisation
    noise from 34 to 41 dB, for 4 % of the arithmetic. The head's output is the answer itself.
    """
    return [node for node in model.graph.node if node.op_type == "Conv" and node.output[0] != "cam"][1:]


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with float16 between the normalisation and the head; both of these, and both outputs, stay float32.

    BatchNormalization keeps its place, but its parameters are first folded to a scale and a shift in float64: a small
    running variance would be lost in float16.

    Raises:
        ExportError: a weight is beyond float16.
    """
    typed = onnx.ModelProto()
    typed.CopyFrom(model)
    graph = typed.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    first_conv = next(node for node in graph.node if node.op_type == "Conv")
    head = next(node for node in graph.node if node.output[0] == "cam")
    body = _nodes_between(graph, first_conv, head)
    for node in body:
        if node.op_type == "BatchNormalization":
            _fold_batch_norm(node, weights)
    half_names = {name for node in body for name in node.input if name in weights}
    for name in half_names:
        magnitude = float(np.abs(weights[name]).max())
        if not magnitude <= _FLOAT16_MAX:
            raise ExportError(
                f"weight {name} has magnitude {magnitude:.3g}, beyond float16. This model can't run in fp16."
            )
        weights[name] = weights[name].astype(np.float16)
    used = {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items() if name in used)
    _insert_cast(graph, first_conv, "normalised_half", TensorProto.FLOAT16)
    _insert_cast(graph, head, "features_single", TensorProto.FLOAT)
    del graph.value_info[:]
    return typed


def insert_qdq(
    model: onnx.ModelProto,
    ranges: Mapping[str, float],
    conv_names: Sequence[str],
    single_weights: Mapping[str, NDArray[np.float32]],
) -> onnx.ModelProto:
    """Return the graph with Q/DQ on the input and the weights of the named convolutions.

    Symmetric int8, zero points 0, one scale per activation tensor and per output channel of a weight. No Q/DQ on
    outputs: BatchNorm and ReLU follow in floating point and the next Q fuses into them. Scales have the graph's own type.
    A float16 graph ("typed") holds int8 weights and only DQ; a float32 graph ("trt8") holds float weights with Q and DQ,
    because TensorRT 8 reads no int8 weights.

    Args:
        model: float16 or float32 graph.
        ranges: magnitude of 127 for each activation tensor, by the tensor's name.
        conv_names: output names of the convolutions.
        single_weights: the convolutions' weights before any rounding to float16, by name; both dialects quantise these.
    """
    is_half = TensorProto.FLOAT16 in {tensor.data_type for tensor in model.graph.initializer}
    quantised = onnx.ModelProto()
    quantised.CopyFrom(version_converter.convert_version(model, TYPED_OPSET) if is_half else model)
    graph = quantised.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    activations: dict[str, str] = {}
    for node in graph.node:
        if node.output[0] in conv_names:
            source, weight_name = node.input[0], node.input[1]
            weight = numpy_helper.to_array(weights[weight_name])
            if source not in activations:
                scale = round_up_to_half(np.float64(ranges[source]) / INT8_MAX)
                nodes += _qdq(graph, source, scale.astype(weight.dtype), axis=None)
                activations[source] = f"{source}_dq"
            node.input[0] = activations[source]
            nodes += _quantise_weight(graph, weight_name, single_weights[weight_name], weight.dtype)
            node.input[1] = f"{weight_name}_dq"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused_initializers(graph)
    onnx.checker.check_model(quantised, full_check=True)
    return quantised


def round_up_to_half(scale: NDArray[np.float64] | np.float64) -> NDArray[np.float16]:
    """Return float16 scales no smaller than given, so that both dialects use the same ones and none clips more."""
    half = np.asarray(scale).astype(np.float16)
    half = np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half)
    floored: NDArray[np.float16] = np.maximum(half, np.float16(_SMALLEST_SCALE)).astype(np.float16)
    return floored


def _quantise_weight(
    graph: onnx.GraphProto, name: str, weight: NDArray[np.float32], scale_type: np.dtype[Any]
) -> list[onnx.NodeProto]:
    magnitudes = np.abs(weight.astype(np.float64)).reshape(weight.shape[0], -1).max(axis=1)
    scales = round_up_to_half(magnitudes / INT8_MAX).astype(scale_type)
    if scale_type == np.float32:
        return _qdq(graph, name, scales, axis=0)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    steps = np.round(weight.astype(np.float64) / scales.astype(np.float64).reshape(shape))
    steps = np.clip(steps, -INT8_MAX, INT8_MAX).astype(np.int8)
    _add_scale(graph, name, scales)
    graph.initializer.append(numpy_helper.from_array(steps, f"{name}_int8"))
    return [_dequantise(name, f"{name}_int8", axis=0)]


def _qdq(graph: onnx.GraphProto, name: str, scales: NDArray[np.floating], *, axis: int | None) -> list[onnx.NodeProto]:
    _add_scale(graph, name, scales)
    inputs = [name, f"{name}_scale", f"{name}_zero_point"]
    quantise = helper.make_node("QuantizeLinear", inputs, [f"{name}_q"], f"{name}_q")
    if axis is not None:
        quantise.attribute.append(helper.make_attribute("axis", axis))
    return [quantise, _dequantise(name, f"{name}_q", axis=axis)]


def _dequantise(name: str, source: str, *, axis: int | None) -> onnx.NodeProto:
    inputs = [source, f"{name}_scale", f"{name}_zero_point"]
    node = helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], f"{name}_dq")
    if axis is not None:
        node.attribute.append(helper.make_attribute("axis", axis))
    return node


def _add_scale(graph: onnx.GraphProto, name: str, scales: NDArray[np.floating]) -> None:
    graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scale"))
    graph.initializer.append(numpy_helper.from_array(np.zeros(scales.shape, np.int8), f"{name}_zero_point"))


def _nodes_between(graph: onnx.GraphProto, first: onnx.NodeProto, last: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return the nodes from the first convolution up to but without the head; nodes are in topological order."""
    nodes = list(graph.node)
    outputs = [node.output[0] for node in nodes]
    return nodes[outputs.index(first.output[0]) : outputs.index(last.output[0])]


def _fold_batch_norm(node: onnx.NodeProto, weights: dict[str, NDArray[np.generic]]) -> None:
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    gamma, beta, mean, variance = (weights[name].astype(np.float64) for name in node.input[1:5])
    scale = gamma / np.sqrt(variance + epsilon)
    folded = (scale, beta - mean * scale, np.zeros_like(scale), np.ones_like(scale))
    for i, (suffix, array) in enumerate(zip(("scale", "shift", "zero", "one"), folded, strict=True), start=1):
        # New names: two layers may share one weight.
        name = f"{node.output[0]}_{suffix}"
        weights[name] = array.astype(np.float32)
        node.input[i] = name
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("epsilon", 0.0))


def _insert_cast(graph: onnx.GraphProto, consumer: onnx.NodeProto, name: str, to: int) -> None:
    cast = helper.make_node("Cast", [consumer.input[0]], [name], name, to=to)
    position = [node.output[0] for node in graph.node].index(consumer.output[0])
    consumer.input[0] = name
    graph.node.insert(position, cast)


def _drop_unused_initializers(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
