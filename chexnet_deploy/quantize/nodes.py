"""Small handles on ONNX graphs that the quantising rooms share."""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper


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
    return tuple(
        node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] not in weights
    )
