"""Faults that have shipped, each made at any size: in the graph, in the pixels it is given, or in what becomes of its answers.

What a size means is in `Fault.unit`; size 0 is no fault. A fault that is there or not strikes a share of the images.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from chexnet_deploy.export.quantize.graph_edits import quantised_activations
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, sigmoid

InGraph = Callable[[onnx.ModelProto, float], None]
InPicture = Callable[[Gray, int, float], NDArray[np.uint8]]
InAnswers = Callable[[Logits, float], Logits]


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        name: in words.
        unit: what a size says.
        small: the size at which it must be found.
        form: of the bundle it is planted in.
        in_graph: changes the model.
        in_picture: gray [H, W], side S and size -> pixels uint8 [S, S].
        in_answers: changes the logits.
        is_whole: it is there or not; no other size exists.
        is_counted: sizes are whole numbers.
    """

    name: str
    unit: str
    small: float
    form: Literal["int8-cpu", "fp16"] = "int8-cpu"
    in_graph: InGraph | None = None
    in_picture: InPicture | None = None
    in_answers: InAnswers | None = None
    is_whole: bool = False
    is_counted: bool = False


# --- In the int8 parameters ------------------------------------------------------------------------------------------


def _quantised_ones(model: onnx.ModelProto) -> list[Any]:
    """Return the QuantizeLinear nodes of the activations."""
    activations = quantised_activations(model)
    return [node for node in model.graph.node if node.output[0] in activations]


def _quantised(model: onnx.ModelProto, depth: float) -> Any:
    """Return the QuantizeLinear that lies at a share of the way through the network."""
    nodes = _quantised_ones(model)
    return nodes[min(int(depth * len(nodes)), len(nodes) - 1)]


def _weights(model: onnx.ModelProto, depth: float) -> Any:
    """Return the DequantizeLinear of a convolution's weights."""
    stored = {tensor.name for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]
    return nodes[min(int(depth * len(nodes)), len(nodes) - 1)]


def _value(model: onnx.ModelProto, name: str) -> NDArray[Any]:
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


def _give(model: onnx.ModelProto, node: onnx.NodeProto, place: int, value: NDArray[Any]) -> None:
    """Give one node another constant; other nodes keep theirs."""
    copy = numpy_helper.from_array(value, f"{node.input[place]}_planted_{len(model.graph.initializer)}")
    model.graph.initializer.append(copy)
    node.input[place] = copy.name


def _reader(model: onnx.ModelProto, node: onnx.NodeProto) -> Any:
    return next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == node.output[0])


def wrong_scale(depth: float) -> InGraph:
    """Read one activation tensor back with its scale times 1 + size."""

    def plant(model: onnx.ModelProto, size: float) -> None:
        reader = _reader(model, _quantised(model, depth))
        scale = _value(model, reader.input[1])
        _give(model, reader, 1, (scale * (1 + size)).astype(scale.dtype))

    return plant


def wrong_zero_point(depth: float) -> InGraph:
    """Read one activation tensor back with its zero point moved by `size` steps, as far as its type goes."""

    def plant(model: onnx.ModelProto, size: float) -> None:
        _move_zero_point(model, _reader(model, _quantised(model, depth)), size)

    return plant


def _move_zero_point(model: onnx.ModelProto, reader: onnx.NodeProto, size: float) -> None:
    zero = _value(model, reader.input[2])
    limits = np.iinfo(zero.dtype)
    _give(model, reader, 2, np.clip(zero.astype(np.int64) + round(size), limits.min, limits.max).astype(zero.dtype))


def every_zero_point(model: onnx.ModelProto, size: float) -> None:
    """Read every activation tensor back with its zero point moved by `size` steps."""
    for writer in _quantised_ones(model):
        _move_zero_point(model, _reader(model, writer), size)


def clipped_range(depth: float) -> InGraph:
    """Quantise one activation tensor with its range shortened by a share: the strongest activations are cut."""

    def plant(model: onnx.ModelProto, size: float) -> None:
        writer = _quantised(model, depth)
        reader = _reader(model, writer)
        scale = _value(model, writer.input[1])
        for node in (writer, reader):
            _give(model, node, 1, (scale * (1 - size)).astype(scale.dtype))

    return plant


def wrong_weight_scale(depth: float) -> InGraph:
    """Read one convolution's weights back with all scales times 1 + size."""

    def plant(model: onnx.ModelProto, size: float) -> None:
        node = _weights(model, depth)
        scale = _value(model, node.input[1])
        _give(model, node, 1, (scale * (1 + size)).astype(scale.dtype))

    return plant


def dead_channels(depth: float) -> InGraph:
    """Set a share of one convolution's output channels, at least one, to zero."""

    def plant(model: onnx.ModelProto, size: float) -> None:
        node = _weights(model, depth)
        weights = _value(model, node.input[0]).copy()
        weights[: max(1, round(size * len(weights)))] = 0
        _give(model, node, 0, weights)

    return plant


def no_bias(model: onnx.ModelProto, size: float) -> None:
    """Scale one convolution's bias by 1 - size."""
    with_bias = [node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3]
    node = with_bias[len(with_bias) // 2]
    bias = _value(model, node.input[2])
    _give(model, node, 2, (bias * (1 - size)).astype(bias.dtype))


# --- Behind the head -------------------------------------------------------------------------------------------------
# What is done to every answer alike is done to the answers: the same numbers as by an operator in the graph.


def swapped(first: int, second: int) -> InAnswers:
    """Answer two findings' questions with each other's answers."""

    def plant(logits: Logits, size: float) -> Logits:
        order = np.arange(logits.shape[1])
        order[[first, second]] = order[[second, first]]
        return logits[:, order]

    return plant


def rotated(logits: Logits, size: float) -> Logits:
    """Answer each finding's question with the answer `size` places further on."""
    return np.roll(logits, -round(size), axis=1)


def sharpened(logits: Logits, size: float) -> Logits:
    """Multiply all logits by 1 + size: every rank stays."""
    answers: Logits = logits * np.float32(1 + size)
    return answers


def shifted(logits: Logits, size: float) -> Logits:
    """Add `size` to all logits: every rank stays."""
    answers: Logits = logits + np.float32(size)
    return answers


def one_sharpened(logits: Logits, size: float) -> Logits:
    """Multiply the logits of the third finding alone by 1 + size."""
    answers: Logits = logits.copy()
    answers[:, 2] *= np.float32(1 + size)
    return answers


def one_shifted(logits: Logits, size: float) -> Logits:
    """Add `size` to the logits of the third finding alone."""
    answers: Logits = logits.copy()
    answers[:, 2] += np.float32(size)
    return answers


def _struck(n: int, share: float) -> NDArray[np.bool_]:
    """Say which images a fault strikes: a share of them, spread evenly."""
    struck: NDArray[np.bool_] = np.floor(np.arange(1, n + 1) * share + 1e-9) > np.floor(np.arange(n) * share + 1e-9)
    return struck


def sigmoid_twice(logits: Logits, size: float) -> Logits:
    """Give probabilities where logits are wanted, so that the sigmoid is taken twice, for a share of the images."""
    return np.where(_struck(len(logits), size)[:, None], sigmoid(logits), logits)


def softmax(logits: Logits, size: float) -> Logits:
    """Normalise the answers over the findings as a softmax does, for a share of the images."""
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    normalised = np.log(shares / np.maximum(1 - shares, 1e-6))
    answers: Logits = np.where(_struck(len(logits), size)[:, None], normalised, logits).astype(np.float32)
    return answers


def clipped(logits: Logits, size: float) -> Logits:
    """Cut each finding's highest answers, a share of them, down to the next one below."""
    cut: Logits = np.minimum(logits, np.quantile(logits, 1 - size, axis=0, method="lower").astype(np.float32))
    return cut


def floored(logits: Logits, size: float) -> Logits:
    """Raise each finding's lowest answers, a share of them, up to the next one above."""
    raised: Logits = np.maximum(logits, np.quantile(logits, size, axis=0, method="higher").astype(np.float32))
    return raised


def one_constant(logits: Logits, size: float) -> Logits:
    """Answer a share of the images with the mean on the third finding."""
    answers: Logits = logits.copy()
    answers[_struck(len(logits), size), 2] = logits[:, 2].mean()
    return answers


def stale(logits: Logits, size: float) -> Logits:
    """Answer a share of the images with the answer of the image before."""
    answers: Logits = np.where(_struck(len(logits), size)[:, None], np.roll(logits, 1, axis=0), logits)
    return answers


# --- In the batch ----------------------------------------------------------------------------------------------------


def slot_noise(model: onnx.ModelProto, size: float) -> None:
    """Add `size` logits times the slot in the batch to every answer."""
    graph = model.graph
    constants: dict[str, NDArray[Any]] = {
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "step": np.array(size, np.float32),
        "as_rows": np.array([-1, 1], np.int64),
        "as_maps": np.array([-1, 1, 1, 1], np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(value, f"slot_{name}") for name, value in constants.items())
    graph.node.extend(
        [
            helper.make_node("Shape", ["pixels"], ["slot_shape"]),
            helper.make_node("Gather", ["slot_shape", "slot_zero"], ["slot_count"]),
            helper.make_node("Range", ["slot_zero", "slot_count", "slot_one"], ["slot_numbers"]),
            helper.make_node("Cast", ["slot_numbers"], ["slot_floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["slot_floats", "slot_step"], ["slot_noise"]),
        ]
    )
    for output, shape in (("logits", "as_rows"), ("cam", "as_maps")):
        _rename(model, output)
        graph.node.append(helper.make_node("Reshape", ["slot_noise", f"slot_{shape}"], [f"slot_{output}"]))
        graph.node.append(helper.make_node("Add", [f"{output}_before", f"slot_{output}"], [output]))


def _rename(model: onnx.ModelProto, output: str) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == output:
                    names[i] = f"{output}_before"


# --- In front of the graph -------------------------------------------------------------------------------------------


def normalised_by(which: Literal["mean", "std", "bgr"]) -> InGraph:
    """Normalise with other numbers: each mean moved by size, each deviation times 1 + size, or the channels in reverse."""

    def plant(model: onnx.ModelProto, size: float) -> None:
        constants = [n for n in model.graph.node if n.op_type == "Constant" and n.output[0].startswith("/normalise/")]
        scale_node, shift_node = constants  # x * 1/(255 std) - mean/std
        scale, shift = (numpy_helper.to_array(n.attribute[0].t).copy() for n in (scale_node, shift_node))
        std = 1 / (255 * scale)
        mean = shift * std
        if which == "mean":
            mean = mean + size
        elif which == "std":
            std = std * (1 + size)
        else:
            mean, std = (value[:, ::-1] for value in (mean, std))
        for node, value in ((scale_node, 1 / (255 * std)), (shift_node, mean / std)):
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value, np.float32)))

    return plant


def _resized(gray: Gray, side: int, how: Image.Resampling = Image.Resampling.BILINEAR) -> NDArray[np.uint8]:
    return np.array(Image.fromarray(gray).resize((side, side), how))


def filtered(how: Image.Resampling) -> InPicture:
    """Resize by another filter, blended with the right one by `size`."""

    def plant(gray: Gray, side: int, size: float) -> NDArray[np.uint8]:
        right, wrong = _resized(gray, side).astype(np.float64), _resized(gray, side, how)
        return np.rint(right + size * (wrong - right)).astype(np.uint8)

    return plant


def cropped(gray: Gray, side: int, size: float) -> NDArray[np.uint8]:
    """Cut a share of each side away, as a centre crop does."""
    height, width = gray.shape
    rows, columns = round(size * height / 2), round(size * width / 2)
    return _resized(gray[rows : height - rows, columns : width - columns], side)


def moved(gray: Gray, side: int, size: float) -> NDArray[np.uint8]:
    """Move the picture to the right by `size` pixels."""
    return np.roll(_resized(gray, side), round(size), axis=1)


def mirrored(gray: Gray, side: int, size: float) -> NDArray[np.uint8]:
    """Blend the picture with its mirror image."""
    right = _resized(gray, side).astype(np.float64)
    return np.rint((1 - size) * right + size * right[:, ::-1]).astype(np.uint8)


def gamma(gray: Gray, side: int, size: float) -> NDArray[np.uint8]:
    """Raise gray levels to the power of 1 + size, as a wrong display function does."""
    return _resized(np.rint(255 * (gray / 255) ** (1 + size)).astype(np.uint8), side)


def brighter(gray: Gray, side: int, size: float) -> NDArray[np.uint8]:
    """Add `size` gray levels."""
    return np.clip(_resized(gray, side).astype(np.int64) + round(size), 0, 255).astype(np.uint8)


def coarse(gray: Gray, side: int, size: float) -> NDArray[np.uint8]:
    """Lose the lowest `size` bits."""
    lost = 1 << round(size)
    return _resized(gray // lost * lost, side)


def jpeg(gray: Gray, side: int, size: float) -> NDArray[np.uint8]:
    """Pass through a JPEG file of quality 100 - size."""
    buffer = io.BytesIO()
    Image.fromarray(gray).save(buffer, "JPEG", quality=round(100 - size))
    return _resized(np.array(Image.open(buffer)), side)


def pixels_of(grays: Sequence[Gray], side: int, plant: InPicture, size: float) -> Pixels:
    """Return uint8 [N, 1, S, S] of pictures with a fault of a size."""
    return np.stack([plant(gray, side, size) for gray in grays])[:, None]


FAULTS: Final = (
    Fault("scale of an activation, early", "x (1 + size)", 0.25, in_graph=wrong_scale(0.1)),
    Fault("scale of an activation, middle", "x (1 + size)", 0.25, in_graph=wrong_scale(0.5)),
    Fault("scale of an activation, late", "x (1 + size)", 0.25, in_graph=wrong_scale(0.95)),
    Fault("zero point, early", "steps", 2.0, in_graph=wrong_zero_point(0.1), is_counted=True),
    Fault("zero point, middle", "steps", 2.0, in_graph=wrong_zero_point(0.5), is_counted=True),
    Fault("zero point, late", "steps", 2.0, in_graph=wrong_zero_point(0.95), is_counted=True),
    Fault("every zero point", "steps", 2.0, in_graph=every_zero_point, is_counted=True),
    Fault("range cut", "share of the range", 0.25, in_graph=clipped_range(0.3)),
    Fault("scale of a weight", "x (1 + size)", 0.25, in_graph=wrong_weight_scale(0.3)),
    Fault("dead channels", "share of a convolution's", 0.1, in_graph=dead_channels(0.3)),
    Fault("bias lost", "share of a convolution's", 1.0, in_graph=no_bias),
    Fault("two classes swapped", "Effusion and Consolidation", 1.0, in_answers=swapped(2, 8), is_whole=True),
    Fault("two rare classes swapped", "Emphysema and Fibrosis", 1.0, in_answers=swapped(10, 11), is_whole=True),
    Fault("classes rotated", "places", 1.0, in_answers=rotated, is_whole=True),
    Fault("logits sharpened", "x (1 + size)", 0.25, in_answers=sharpened),
    Fault("logits shifted", "logits", 0.25, in_answers=shifted),
    Fault("one finding sharpened", "x (1 + size)", 0.25, in_answers=one_sharpened),
    Fault("one finding shifted", "logits", 0.25, in_answers=one_shifted),
    Fault("answers depend on the slot", "logits a slot", 0.05, in_graph=slot_noise),
    Fault("sigmoid twice", "share of the images", 0.1, in_answers=sigmoid_twice),
    Fault("softmax for sigmoids", "share of the images", 0.1, in_answers=softmax),
    Fault("logits clipped from above", "share of the answers", 0.1, in_answers=clipped),
    Fault("logits clipped from below", "share of the answers", 0.25, in_answers=floored),
    Fault("one finding constant", "share of the images", 0.1, in_answers=one_constant),
    Fault("the answer of the image before", "share of the images", 0.02, in_answers=stale),
    Fault("normalisation, mean", "of 1", 0.02, "fp16", in_graph=normalised_by("mean")),
    Fault("normalisation, deviation", "x (1 + size)", 0.1, "fp16", in_graph=normalised_by("std")),
    Fault("BGR for RGB", "there or not", 1.0, "fp16", in_graph=normalised_by("bgr"), is_whole=True),
    Fault("resize filter, nearest", "blend", 1.0, in_picture=filtered(Image.Resampling.NEAREST)),
    Fault("resize filter, bicubic", "blend", 1.0, in_picture=filtered(Image.Resampling.BICUBIC)),
    Fault("resize filter, box", "blend", 1.0, in_picture=filtered(Image.Resampling.BOX)),
    Fault("centre crop", "share of a side", 0.125, in_picture=cropped),
    Fault("picture moved", "pixels", 1.0, in_picture=moved, is_counted=True),
    Fault("picture mirrored", "blend", 1.0, in_picture=mirrored),
    Fault("display function", "gamma - 1", 0.1, in_picture=gamma),
    Fault("brightness", "gray levels", 8.0, in_picture=brighter, is_counted=True),
    Fault("lowest bits lost", "bits", 3.0, in_picture=coarse, is_counted=True),
    Fault("JPEG in between", "100 - quality", 25.0, in_picture=jpeg, is_counted=True),
)
