"""ONNX graph to ONNX graph: BatchNorm as scale and shift, fp32 -> typed fp16, and explicit Q/DQ.

Pure functions of a graph and numbers. Which numbers, and whether the result is good enough, is decided elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, version_converter

from chexnet_deploy.errors import ExportError
from chexnet_deploy.export.quantize.graph_edits import copy_of, set_nodes, set_weights, weights_of

TYPED_OPSET = 19  # the first whose QuantizeLinear takes float16
_FLOAT16_MAX = 65504.0
# To -127, not to -128: values at an end of their range are watched, and zeros are no sign of one too narrow.
_STEPS_LOWERED = 127
_SMALLEST_SCALE = 2.0**-24  # float16's smallest positive number


@dataclass(frozen=True, slots=True)
class Quantised:
    """How one tensor becomes integers; zero points are 0.

    Attributes:
        scale: what one step is worth: a number for an activation, [O] or one number for a convolution's weights.
        steps: the weights as integers; None for an activation, which is rounded as it runs.
        is_unsigned: uint8 in place of int8, for activations that are never negative.
        is_centred: an activation that is never negative is lowered by 127 steps first, which gives int8 twice the steps; the
            convolution that reads it takes it back in its bias, so it must not pad.
    """

    scale: NDArray[np.float16] | np.float16
    steps: NDArray[np.int8] | None = None
    is_unsigned: bool = False
    is_centred: bool = False


def convolutions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return all but the head, whose output is the answer itself and stays in floating point."""
    return [node for node in model.graph.node if node.op_type == "Conv" and node.output[0] != "cam"]


def fold_batch_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with every BatchNormalization as a scale and a shift, folded in float64.

    A small running variance would be lost in float16, and scale and shift are what equalising changes.
    """
    folded = copy_of(model)
    weights = weights_of(folded)
    for node in folded.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        gamma, beta, mean, variance = (weights[name].astype(np.float64) for name in node.input[1:5])
        scale = gamma / np.sqrt(variance + epsilon)
        arrays = (scale, beta - mean * scale, np.zeros_like(scale), np.ones_like(scale))
        for i, (suffix, array) in enumerate(zip(("scale", "shift", "zero", "one"), arrays, strict=True), start=1):
            # New names: two layers may share one weight.
            name = f"{node.output[0]}_{suffix}"
            weights[name] = array.astype(np.float32)
            node.input[i] = name
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("epsilon", 0.0))
    set_weights(folded, weights)
    return folded


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with float16 between the normalisation and the head; both of these, and both outputs, stay float32.

    Raises:
        ExportError: a weight is beyond float16.
    """
    typed = fold_batch_norms(model)
    graph = typed.graph
    weights = weights_of(typed)
    first_conv = next(node for node in graph.node if node.op_type == "Conv")
    head = next(node for node in graph.node if node.output[0] == "cam")
    half_names = {name for node in _nodes_between(graph, first_conv, head) for name in node.input if name in weights}
    for name in half_names:
        magnitude = float(np.abs(weights[name]).max())
        if not magnitude <= _FLOAT16_MAX:
            raise ExportError(
                f"weight {name} has magnitude {magnitude:.3g}, beyond float16. This model can't run in fp16."
            )
        weights[name] = weights[name].astype(np.float16)
    set_weights(typed, weights)
    _insert_cast(graph, first_conv, "normalised_half", TensorProto.FLOAT16)
    _insert_cast(graph, head, "features_single", TensorProto.FLOAT)
    del graph.value_info[:]
    return typed


def insert_qdq(
    model: onnx.ModelProto,
    activations: Mapping[str, Quantised],
    weights: Mapping[str, Quantised],
    *,
    holds_float_weights: bool = False,
) -> onnx.ModelProto:
    """Return the graph with Q/DQ behind activations and DQ behind int8 weights; scales have the graph's own type.

    Args:
        model: float16 or float32 graph.
        activations: by the tensor's name; all that read it read the DQ.
        weights: by the weight's name.
        holds_float_weights: write weights as floats with Q and DQ, because TensorRT 8 reads no int8 weights.
    """
    is_half = TensorProto.FLOAT16 in {tensor.data_type for tensor in model.graph.initializer}
    quantised = version_converter.convert_version(model, TYPED_OPSET) if is_half else copy_of(model)
    arrays = weights_of(quantised)
    float_type = np.dtype(np.float16 if is_half else np.float32)
    nodes: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for node in quantised.graph.node:
        read = activations.get(node.input[0]) if node.op_type == "Conv" else None
        raised = []
        if read is not None and read.is_centred:
            raised = _raise_bias(arrays, node, weights[node.input[1]], read, float_type)
        for i, name in enumerate(node.input):
            if name in weights and name not in renamed:
                nodes += _quantise_weight(arrays, name, weights[name], float_type, is_float=holds_float_weights)
                renamed[name] = f"{name}_dq"
            node.input[i] = renamed.get(name, name)
        nodes += [node, *raised]
        for name in nodes[-1].output:
            if name in activations:
                nodes += _quantise_activation(arrays, name, activations[name], float_type)
                renamed[name] = f"{name}_dq"
    set_nodes(quantised.graph, nodes)
    set_weights(quantised, arrays)
    onnx.checker.check_model(quantised, full_check=True)
    return quantised


def round_up_to_half(scale: NDArray[np.float64] | np.float64) -> NDArray[np.float16]:
    """Return float16 scales no smaller than given, so that all forms use the same ones and none clips more."""
    half = np.asarray(scale).astype(np.float16)
    half = np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half)
    floored: NDArray[np.float16] = np.maximum(half, np.float16(_SMALLEST_SCALE)).astype(np.float16)
    return floored


def _quantise_weight(
    arrays: dict[str, NDArray[np.generic]], name: str, how: Quantised, float_type: np.dtype[Any], *, is_float: bool
) -> list[onnx.NodeProto]:
    assert how.steps is not None  # weights are rounded beforehand
    _add_scale(arrays, name, how, float_type)
    axis = 0 if np.ndim(how.scale) else None
    if is_float:
        shape = (-1,) + (1,) * (how.steps.ndim - 1)
        arrays[name] = (how.steps * how.scale.astype(np.float64).reshape(shape)).astype(float_type)
        return [_node("QuantizeLinear", name, name, axis), _node("DequantizeLinear", name, f"{name}_q", axis)]
    arrays[f"{name}_q"] = how.steps
    return [_node("DequantizeLinear", name, f"{name}_q", axis)]


def _quantise_activation(
    arrays: dict[str, NDArray[np.generic]], name: str, how: Quantised, float_type: np.dtype[Any]
) -> list[onnx.NodeProto]:
    _add_scale(arrays, name, how, float_type)
    quantise, dequantise = _node("QuantizeLinear", name, name), _node("DequantizeLinear", name, f"{name}_q")
    if not how.is_centred:
        return [quantise, dequantise]
    lowered, offset = f"{name}_lowered", f"{name}_offset"
    arrays[offset] = np.asarray(_offset(how)).astype(float_type)
    quantise.input[0] = lowered
    return [helper.make_node("Sub", [name, offset], [lowered], lowered), quantise, dequantise]


def _raise_bias(
    arrays: dict[str, NDArray[np.generic]],
    conv: onnx.NodeProto,
    weight: Quantised,
    activation: Quantised,
    float_type: np.dtype[Any],
) -> list[onnx.NodeProto]:
    """Add to a convolution's bias what its integers make of the offset, so that zeros stay exactly zeros.

    A float16 bias becomes a node of its own behind the convolution, which is returned. ONNX Runtime (1.32) quantises the bias of
    a convolution that Q follows, by the product of two scales, and in float16 that product underflows.
    """
    assert weight.steps is not None  # weights are rounded beforehand
    sums = weight.steps.reshape(len(weight.steps), -1).sum(axis=1, dtype=np.int64)
    bias = sums * weight.scale.astype(np.float64) * _offset(activation)
    if len(conv.input) > 2:
        bias += arrays[conv.input[2]].astype(np.float64)
    # A new name: two layers may share one bias.
    name = f"{conv.output[0]}_raised_bias"
    arrays[name] = bias.astype(float_type)
    if float_type != np.float16:
        conv.input[:] = [*conv.input[:2], name]
        return []
    arrays[name] = arrays[name].reshape(-1, 1, 1)
    output, lowered = conv.output[0], f"{conv.output[0]}_lowered"
    conv.input[:], conv.output[:] = conv.input[:2], [lowered]
    return [helper.make_node("Add", [lowered, name], [output], f"{conv.name}_raise")]


def _offset(how: Quantised) -> float:
    return float(how.scale) * _STEPS_LOWERED


def _node(kind: str, tensor: str, source: str, axis: int | None = None) -> onnx.NodeProto:
    output = f"{tensor}_{'q' if kind == 'QuantizeLinear' else 'dq'}"
    node = helper.make_node(kind, [source, f"{tensor}_scale", f"{tensor}_zero_point"], [output], output)
    if axis is not None:
        node.attribute.append(helper.make_attribute("axis", axis))
    return node


def _add_scale(arrays: dict[str, NDArray[np.generic]], name: str, how: Quantised, float_type: np.dtype[Any]) -> None:
    arrays[f"{name}_scale"] = np.asarray(how.scale).astype(float_type)
    arrays[f"{name}_zero_point"] = np.zeros(np.shape(how.scale), np.uint8 if how.is_unsigned else np.int8)


def _nodes_between(graph: onnx.GraphProto, first: onnx.NodeProto, last: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
    """Return the nodes from the first convolution up to but without the head; nodes are in topological order."""
    nodes = list(graph.node)
    outputs = [node.output[0] for node in nodes]
    return nodes[outputs.index(first.output[0]) : outputs.index(last.output[0])]


def _insert_cast(graph: onnx.GraphProto, consumer: onnx.NodeProto, name: str, to: int) -> None:
    cast = helper.make_node("Cast", [consumer.input[0]], [name], name, to=to)
    position = [node.output[0] for node in graph.node].index(consumer.output[0])
    consumer.input[0] = name
    graph.node.insert(position, cast)
