"""The first convolution on the gray picture itself, for CPUs: exact, with a third of the arithmetic, from uint8 pixels.

The graph repeats the gray channel three times and normalises each with its own mean and deviation; the convolution
sums them. That is one channel with the weighted sum of the weights, plus a constant that holds inside the picture but not
in the zeros around it: a second channel, 255 inside and 0 around, carries it. Both are written twice, each with half the
weight, so that the products of two neighbours fit into 16 bits (rounding.py); int8 kernels read channels in fours anyway.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from chexnet_deploy.quantize.nodes import copy_of, producers_of, set_nodes, set_weights, weights_of

_INSIDE = 255


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
    arrays[conv.input[1]] = np.concatenate([on_gray, on_gray, on_inside, on_inside], axis=1).astype(np.float32) / 2
    arrays["stem_pads"] = np.array([0, 0, 0, 0, 0, 2, 0, 0], np.int64)
    arrays["stem_inside"] = np.array(_INSIDE, np.uint8)
    arrays["stem_scale"], arrays["stem_zero_point"] = np.array(1.0, np.float32), np.array(0, np.uint8)
    stem = [
        helper.make_node("Concat", ["pixels", "pixels"], ["stem_twice"], "stem/Concat", axis=1),
        helper.make_node("Pad", ["stem_twice", "stem_pads", "stem_inside"], ["stem_channels"], "stem/Pad"),
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


def _constant(node: onnx.NodeProto) -> np.ndarray:
    assert node.op_type == "Constant"
    return numpy_helper.to_array(node.attribute[0].t)
