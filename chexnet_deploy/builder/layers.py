"""What an engine is really made of: TensorRT's own layer table, parsed; which convolutions run in which type.

A builder may drop a precision with a log line or none at all, so the table is read and never assumed. Measures nothing.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from chexnet_deploy.errors import ExportError

# One line a layer in the VERBOSE log of TensorRT for RTX 1.7 with ProfilingVerbosity.DETAILED; it has no inspector
# without a GPU.
_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[.*?\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?Metadata: (?P<origin>.*)$"
)
_TYPE = re.compile(r"Datatype: (\w+)")
_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\]")
_FUSED_CONVOLUTIONS = ("correlation", "gemm", "fusion")
_FULLY_CONNECTED = "_Fc"  # in the name of a fusion around a 1x1 convolution that runs as a matrix product
_WORDS = (("int8", "int8"), ("fp16", "float16"), ("half", "float16"), ("fp32", "float32"), ("float", "float32"))
_TYPES = {"Float": "float32", "Half": "float16", "Int8": "int8", "UInt8": "uint8"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One row of the table.

    Attributes:
        input_types: of its activations, e.g. ("int8",).
        origins: names of the ONNX nodes it was made from.
    """

    name: str
    kind: str
    input_types: tuple[str, ...]
    output_types: tuple[str, ...]
    origins: tuple[str, ...]


def layer_lines(lines: Iterable[str]) -> tuple[str, ...]:
    """Return those lines of a builder's log that are rows of its layer table."""
    return tuple(line for line in lines if _LINE.match(line))


def parse_log(lines: Iterable[str]) -> tuple[Layer, ...]:
    """Return the layer table that a builder logged.

    Raises:
        ExportError: there is none, so nothing is known of the engine.
    """
    layers = []
    for line in lines:
        match = _LINE.match(line)
        if match:
            layers.append(
                Layer(
                    match["name"],
                    match["kind"],
                    _types(match["inputs"]),
                    _types(match["outputs"]),
                    tuple(_ORIGIN.findall(match["origin"])),
                )
            )
    if not layers:
        raise ExportError("TensorRT logged no layer table, so what the engine runs in is unknown. Don't use it.")
    return tuple(layers)


def parse_inspector(text: str) -> tuple[Layer, ...]:
    """Return the layer table of the engine inspector's JSON, of an engine built with ProfilingVerbosity.DETAILED.

    Types stand in prose up to TensorRT 10 ("Channel major FP16 format where channel % 8 == 0") and for fused layers
    ("Half"). Written from published outputs of 8.4 to 10; not yet run on an engine of ours.

    Raises:
        ExportError: it holds no detailed layers.
    """
    layers = []
    for entry in json.loads(text)["Layers"]:
        if not isinstance(entry, dict):
            raise ExportError("TensorRT's layer table holds names alone, so what the engine runs in is unknown.")
        inputs, outputs = (
            tuple(_type_in(str(tensor.get("Datatype") or tensor.get("Format/Datatype", ""))) for tensor in entry[key])
            for key in ("Inputs", "Outputs")
        )
        origins = tuple(_ORIGIN.findall(entry.get("Metadata", ""))) or tuple(entry["Name"].split(" + "))
        layers.append(Layer(entry["Name"], entry["LayerType"], inputs, outputs, origins))
    if not layers:
        raise ExportError("TensorRT's layer table is empty, so what the engine runs in is unknown. Don't use it.")
    return tuple(layers)


def conv_types(layers: Sequence[Layer], conv_names: Sequence[str]) -> dict[str, str]:
    """Return the type that each ONNX convolution's activations come in, by its node's name.

    Raises:
        ExportError: no layer, or more than one, was made from a convolution.
    """
    made_from: dict[str, list[Layer]] = {name: [] for name in conv_names}
    for layer in layers:
        # Point-wise kernels and reformats next to a convolution carry its name too.
        is_product = layer.kind == "runtime_fusion" and _FULLY_CONNECTED in layer.name
        if "conv" in layer.kind.lower() or layer.kind in _FUSED_CONVOLUTIONS or is_product:
            for origin in layer.origins:
                if origin in made_from:
                    made_from[origin].append(layer)
    wrong = [name for name, found in made_from.items() if len(found) != 1]
    if wrong:
        raise ExportError(
            f"{len(wrong)} convolutions do not appear once in TensorRT's layer table, e.g. {wrong[0]}. "
            f"This TensorRT fuses them in a way this version does not know; don't trust its precision."
        )
    return {name: found[0].input_types[0] for name, found in made_from.items()}


def count_reformats(layers: Sequence[Layer]) -> int:
    """Return how many layers only change a tensor's type or layout: what is not fused costs a pass over memory."""
    return sum("reformat" in layer.kind.lower() or "reformat" in layer.name.lower() for layer in layers)


def _types(tensors: str) -> tuple[str, ...]:
    return tuple(_TYPES.get(name, name) for name in _TYPE.findall(tensors))


def _type_in(prose: str) -> str:
    lower = prose.lower()
    return next((kind for word, kind in _WORDS if word in lower), prose)
