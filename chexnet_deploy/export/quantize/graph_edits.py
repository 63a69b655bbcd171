"""Edits of ONNX graphs that the quantiser's modules share: reading and replacing nodes, the first layers of the cpu form.

The gray first convolution is for CPUs: exact, with a third of the arithmetic, from uint8 pixels. The graph repeats the gray
channel three times and normalises each with its own mean and deviation; the convolution sums them. That is one channel with
the weighted sum of the weights, plus a constant that holds inside the picture but not in the zeros around it: a second
channel, 255 inside and 0 around, carries it. Int8 kernels read channels in fours, so each of the two is followed by a
fifteenth of itself: its weights are 0 until gptq.py rounds, and then take up what the steps of the other are too coarse for.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


def weights_of(model: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    """Return the initialisers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def set_weights(model: onnx.ModelProto, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Replace all initialisers by those of `arrays` that a node still reads."""
    used = {name for node in model.graph.node for name in node.input}
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used
    )


def set_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Replace all nodes; they may be the graph's own."""
    copies = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


def producers_of(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Return the node that makes each tensor."""
    return {name: node for node in graph.node for name in node.output}


def consumers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Return the nodes that read each tensor."""
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    return consumers


def integers(node: onnx.NodeProto, name: str, default: Sequence[int]) -> tuple[int, ...]:
    """Return a list-valued attribute."""
    return next((tuple(a.ints) for a in node.attribute if a.name == name), tuple(default))


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model of its own that can be changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def quantised_activations(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the tensors that hold quantised activations, in the graph's order."""
    weights = {tensor.name for tensor in model.graph.initializer}
    read = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return tuple(
        node.output[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in weights and node.output[0] in read
    )


_INSIDE = 255
_FINE = 15  # odd, so that no gray level lies halfway between two steps; 255 is a multiple


def to_gray_stem(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its normalisation folded into the first convolution, which reads uint8 pixels by a DQ of scale 1.

    Args:
        model: float32, as exported: Cast, Mul, Sub, Conv with a bias.
    """
    gray = copy_of(model)
    graph, arrays, producers = gray.graph, weights_of(gray), producers_of(gray.graph)
    conv = next(node for node in graph.node if node.op_type == "Conv")
    subtract = producers[conv.input[0]]
    multiply = producers[subtract.input[0]]
    cast = producers[multiply.input[0]]
    assert [node.op_type for node in (subtract, multiply, cast)] == ["Sub", "Mul", "Cast"]
    factor, offset = (
        _constant(producers[node.input[1]]).astype(np.float64).reshape(1, -1, 1, 1) for node in (multiply, subtract)
    )
    weight = arrays[conv.input[1]].astype(np.float64)
    on_gray = (weight * factor).sum(axis=1, keepdims=True)
    on_inside = (-weight * offset).sum(axis=1, keepdims=True) / _INSIDE
    none = np.zeros_like(on_gray)
    arrays[conv.input[1]] = np.concatenate([on_gray, none, on_inside, none], axis=1).astype(np.float32)
    arrays["stem_pads"] = np.array([0, 0, 0, 0, 0, 1, 0, 0], np.int64)
    arrays["stem_inside"] = np.array(_INSIDE, np.uint8)
    arrays["stem_inside_fine"] = np.array(_INSIDE // _FINE, np.uint8)
    arrays["stem_scale"], arrays["stem_zero_point"] = np.array(1.0, np.float32), np.array(0, np.uint8)
    arrays["stem_fine_scale"] = np.array(_FINE, np.float32)
    stem = [
        helper.make_node("Cast", ["pixels"], ["stem_float"], "stem/Cast", to=TensorProto.FLOAT),
        helper.make_node(
            "QuantizeLinear", ["stem_float", "stem_fine_scale", "stem_zero_point"], ["stem_fine"], "stem/Fine"
        ),
        helper.make_node("Concat", ["pixels", "stem_fine"], ["stem_gray"], "stem/Concat", axis=1),
        helper.make_node("Pad", ["stem_gray", "stem_pads", "stem_inside"], ["stem_three"], "stem/Pad"),
        helper.make_node("Pad", ["stem_three", "stem_pads", "stem_inside_fine"], ["stem_channels"], "stem/PadFine"),
        helper.make_node(
            "DequantizeLinear", ["stem_channels", "stem_scale", "stem_zero_point"], ["stem_dq"], "stem/Dequantise"
        ),
    ]
    conv.input[0] = "stem_dq"
    dropped = {node.name for node in (cast, multiply, subtract)}
    constants = {multiply.input[1], subtract.input[1]}
    kept = [node for node in graph.node if node.name not in dropped and node.output[0] not in constants]
    set_nodes(graph, [*stem, *kept])
    set_weights(gray, arrays)
    return gray


FIRST_PART = "first_part"


def branch_first_part(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with a name of its own, FIRST_PART, for what the first concat reads of the first pooling.

    So it can be quantised for the concats alone. The first dense layer reads the same tensor and rounds it again; in flat
    areas, black or white, every place has the same value, so two roundings there add up over a third of the picture.
    """
    branched = copy_of(model)
    concat = next(node for node in branched.graph.node if node.op_type == "Concat" and node.input[0] != "pixels")
    pooled, concat.input[0] = concat.input[0], FIRST_PART
    nodes = list(branched.graph.node)
    at = next(i for i, node in enumerate(nodes) if node is concat)
    nodes.insert(at, helper.make_node("Identity", [pooled], [FIRST_PART], FIRST_PART))
    set_nodes(branched.graph, nodes)
    return branched


def _constant(node: onnx.NodeProto) -> np.ndarray:
    assert node.op_type == "Constant"
    return numpy_helper.to_array(node.attribute[0].t)
