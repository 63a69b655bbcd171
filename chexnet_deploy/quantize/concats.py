"""One concat of all its parts in place of a concat of a concat; the same numbers, for GPUs.

A dense block grows by one concat a layer, each of the one before and the new part. TensorRT for RTX writes every one of them to
memory once more before the BatchNorm that reads it; a concat of the parts themselves is read by the kernel of that BatchNorm.
CPU runtimes copy the parts anew for each concat instead, which costs int8 a factor of two to three there.
"""

import onnx

from chexnet_deploy.quantize.nodes import copy_of, producers_of, set_nodes


def flatten_concats(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with each Concat reading no other Concat; those that nothing reads any more are dropped."""
    flat = copy_of(model)
    graph, producers = flat.graph, producers_of(flat.graph)
    # In the graph's order, so what a concat reads is flat already.
    for node in graph.node:
        if node.op_type == "Concat":
            parts = [leaf for name in node.input for leaf in _parts(producers.get(name), name)]
            del node.input[:]
            node.input.extend(parts)
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    set_nodes(graph, [node for node in graph.node if node.op_type != "Concat" or node.output[0] in read])
    return flat


def _parts(producer: onnx.NodeProto | None, name: str) -> list[str]:
    return list(producer.input) if producer is not None and producer.op_type == "Concat" else [name]
