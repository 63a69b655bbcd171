"""What an engine is really made of: TensorRT's own layer table, parsed; which types its convolutions run in, what it moves.

A builder may drop a precision with a log line or none at all, so the table is read and never assumed. What the table does not
say stays unknown: no type and no number is guessed. Measures nothing.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chexnet_deploy.bundle.manifest import UNKNOWN

# One line a layer in the VERBOSE log of TensorRT for RTX 1.7 with ProfilingVerbosity.DETAILED; it has no inspector
# without a GPU.
_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[.*?\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?Metadata: (?P<origin>.*)$"
)
_TENSOR = re.compile(r"\{ Name: .*?(?:Dimensions: \[(?P<shape>[-\d, ]*)\].*?)?Datatype: (?P<type>\w+)")
_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\]")
_FUSED_CONVOLUTIONS = ("correlation", "gemm", "fusion")
_FULLY_CONNECTED = "_Fc"  # in the name of a fusion around a 1x1 convolution that runs as a matrix product
_HELPERS = frozenset({"shape_call", "wait", "signal", "noop", "constant"})  # rows that launch nothing
_BLOCK = "myelin"  # one row for many kernels, where TensorRT does not show them
# The first that is found in TensorRT's prose counts, so uint8 stands before int8.
_WORDS = (
    ("uint8", "uint8"),
    ("int8", "int8"),
    ("bfloat16", "bfloat16"),
    ("bf16", "bfloat16"),
    ("fp16", "float16"),
    ("half", "float16"),
    ("fp32", "float32"),
    ("float", "float32"),
    ("int32", "int32"),
    ("int64", "int64"),
    ("bool", "bool"),
)
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int32": 4, "int64": 8, "bool": 1}


@dataclass(frozen=True, slots=True)
class Tensor:
    """An activation that a layer reads or writes.

    Attributes:
        type: as numpy names it, e.g. "int8"; TensorRT's own word where it is none of those known here.
        shape: with the batch first, which is negative where the plan leaves it open; None where the table holds none.
    """

    type: str
    shape: tuple[int, ...] | None = None

    @property
    def bytes_per_image(self) -> int | None:
        """What one image's part takes; None where shape or type is not known."""
        if self.shape is None or self.type not in _BYTES or any(side < 0 for side in self.shape[1:]):
            return None
        return math.prod(self.shape[1:]) * _BYTES[self.type]


@dataclass(frozen=True, slots=True)
class Layer:
    """One row of the table.

    Attributes:
        kind: TensorRT's word for it, e.g. "correlation"; empty where the table holds the name alone.
        inputs: activations only; weights are constants.
        origins: names of the ONNX nodes it was made from.
        weights: the type of its weights; "unknown" where the table names none.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    origins: tuple[str, ...]
    weights: str = UNKNOWN

    @property
    def is_kernel(self) -> bool:
        """Whether it runs something on the GPU."""
        return self.kind.lower() not in _HELPERS


def layer_lines(lines: Iterable[str]) -> tuple[str, ...]:
    """Return those lines of a builder's log that are rows of its layer table."""
    return tuple(line for line in lines if _LINE.match(line))


def parse_log(lines: Iterable[str]) -> tuple[Layer, ...]:
    """Return the layer table that a builder logged; empty where it logged none."""
    layers = []
    for line in lines:
        match = _LINE.match(line)
        if match:
            inputs, outputs = (_logged_tensors(match[key]) for key in ("inputs", "outputs"))
            origins = tuple(_ORIGIN.findall(match["origin"]))
            layers.append(Layer(match["name"], match["kind"], inputs, outputs, origins))
    return tuple(layers)


def parse_inspector(text: str) -> tuple[Layer, ...]:
    """Return the layer table of the engine inspector's JSON, of an engine built with ProfilingVerbosity.DETAILED.

    Types stand in prose up to TensorRT 10 ("Channel major FP16 format where channel % 8 == 0") and for fused layers
    ("Half"). Where the batch is open 8.6 says "N/A due to dynamic shapes", even for a context's shapes: weights' types alone
    tell. A row may be a name alone, or lack any of its parts; what is no JSON has no rows. Read from engines of 8.6 and
    published outputs of 8.4 to 10.
    """
    layers = []
    try:
        rows = json.loads(text, strict=False).get("Layers", ())  # 8.6 puts U+001E between the names of fused layers
    except ValueError:
        return ()
    for row in rows:
        entry: Mapping[str, Any] = row if isinstance(row, dict) else {"Name": str(row)}
        name = str(entry.get("Name", ""))
        inputs, outputs = (tuple(map(_inspected_tensor, entry.get(key) or ())) for key in ("Inputs", "Outputs"))
        origins = tuple(_ORIGIN.findall(entry.get("Metadata", ""))) or tuple(name.split(" + "))
        weights = _type_in(str((entry.get("Weights") or {}).get("Type", "")))
        layers.append(Layer(name, str(entry.get("LayerType", "")), inputs, outputs, origins, weights))
    return tuple(layers)


def conv_types(layers: Sequence[Layer], conv_names: Sequence[str]) -> dict[str, str]:
    """Return the type that each ONNX convolution's activations come in, or else its weights, by its node's name.

    "unknown" stands where the table does not say: the convolution is hidden in a block of layers, is found in layers of different
    types, or reads the pixels themselves because their cast is fused into it.
    """
    made_from: dict[str, set[str]] = {name: set() for name in conv_names}
    for layer in layers:
        # Point-wise kernels and reformats next to a convolution carry its name too.
        is_product = layer.kind == "runtime_fusion" and _FULLY_CONNECTED in layer.name
        if "conv" in layer.kind.lower() or layer.kind in _FUSED_CONVOLUTIONS or is_product:
            for origin in layer.origins:
                if origin in made_from:
                    made_from[origin].add(_input_type(layer))
    return {name: found.pop() if len(found) == 1 else UNKNOWN for name, found in made_from.items()}


def bytes_per_image(layers: Sequence[Layer]) -> int | None:
    """Return what all kernels together read and write of activations for one image; None where the table does not say.

    What caches save is not in it, so it compares forms of one network on one GPU and predicts no time.
    """
    total = 0
    for layer in layers:
        tensors = [tensor.bytes_per_image for tensor in (*layer.inputs, *layer.outputs)]
        if not layer.is_kernel:
            continue
        if not layer.outputs or None in tensors or layer.kind.lower() == _BLOCK:
            return None
        total += sum(size for size in tensors if size is not None)
    return total or None


def count_kernels(layers: Sequence[Layer]) -> int:
    """Return how many layers run something on the GPU."""
    return sum(layer.is_kernel for layer in layers)


def count_reformats(layers: Sequence[Layer]) -> int:
    """Return how many layers only change a tensor's type or layout: what is not fused costs a pass over memory."""
    return sum(layer.is_kernel and "reformat" in f"{layer.kind} {layer.name}".lower() for layer in layers)


def _input_type(layer: Layer) -> str:
    said = layer.inputs[0].type if layer.inputs else UNKNOWN
    return layer.weights if said in (UNKNOWN, "uint8") else said


def _logged_tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(Tensor(_type_in(match["type"]), _shape_in(match["shape"])) for match in _TENSOR.finditer(text))


def _shape_in(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else tuple(int(side) for side in text.split(",") if side.strip())


def _inspected_tensor(entry: Mapping[str, Any]) -> Tensor:
    shape = entry.get("Dimensions")
    kind = _type_in(str(entry.get("Datatype") or entry.get("Format/Datatype", "")))
    return Tensor(kind, None if shape is None else tuple(map(int, shape)))


def _type_in(prose: str) -> str:
    lower = prose.lower()
    if lower.startswith("n/a"):
        return UNKNOWN
    return next((kind for word, kind in _WORDS if word in lower), prose or UNKNOWN)
