"""The Open Inference Protocol's tensors (KServe v2, with its binary extension): bytes to pixels, logits and maps to bytes.

One input, `pixels` UINT8 [N, 1, S, S]; two outputs, `logits` FP32 [N, C] and `cam` FP32 [N, C, S/32, S/32]. Anything else is
refused with what was needed; nothing a client sent is repeated.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.serving.http.refusals import bad_request

INPUT: Final = "pixels"
OUTPUTS: Final = ("logits", "cam")
MAX_JSON_BYTES: Final = 65_536  # beside the tensor itself
JSON_BYTES_PER_PIXEL: Final = 8  # "255" with a comma, indented a little

_Text = Annotated[str, StringConstraints(max_length=256)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _InputParameters(_Record):
    binary_data_size: Annotated[int, Field(ge=0)] | None = None


class _Input(_Record):
    name: Literal["pixels"]
    datatype: Literal["UINT8"]
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=4, max_length=4)]
    parameters: _InputParameters = _InputParameters()
    data: Any = None


class _OutputParameters(_Record):
    binary_data: bool | None = None


class _Output(_Record):
    name: Literal["logits", "cam"]
    parameters: _OutputParameters = _OutputParameters()


class _Parameters(_Record):
    binary_data_output: bool = False
    timeout: Annotated[int, Field(ge=1)] | None = None  # microseconds, as Triton has it


class _Request(_Record):
    id: _Text | None = None
    parameters: _Parameters = _Parameters()
    inputs: Annotated[list[_Input], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[_Output], Field(min_length=1, max_length=2)] | None = None


class Inference(NamedTuple):
    """What a client asks.

    Attributes:
        pixels: uint8 [N, 1, S, S].
        id: the client's, to be given back; None where it gave none.
        outputs: name to True where it is to be binary.
        timeout_s: how long the client waits; None where it doesn't say.
    """

    pixels: Pixels
    id: str | None
    outputs: Mapping[str, bool]
    timeout_s: float | None


def max_request_bytes(resize_px: int, max_batch: int) -> int:
    """Return the size of the largest request worth reading: its tensor as JSON, and some more."""
    return JSON_BYTES_PER_PIXEL * max_batch * resize_px**2 + MAX_JSON_BYTES


def parse_inference(body: bytes, header_length: str | None, resize_px: int, max_batch: int) -> Inference:
    """Return what a request asks.

    Args:
        body: inflated.
        header_length: the Inference-Header-Content-Length header; None where the whole body is JSON.
        resize_px: side S of the pixels.
        max_batch: images at most.

    Raises:
        RequestError: 400 with what was needed.
    """
    header, binary = _split(body, header_length)
    request = _parse_json(header)
    tensor = request.inputs[0]
    shape = tuple(tensor.shape)
    if shape[1:] != (1, resize_px, resize_px) or shape[0] > max_batch:
        raise bad_request(f"The shape of pixels must be [N, 1, {resize_px}, {resize_px}] with N of 1 to {max_batch}.")
    size = tensor.parameters.binary_data_size
    n_bytes = int(np.prod(shape))
    if size is not None:
        if "data" in tensor.model_fields_set:
            raise bad_request("pixels must come as data or as binary_data_size, not both.")
        if size != n_bytes or len(binary) != n_bytes:
            raise bad_request(f"binary_data_size and the bytes that follow must be {n_bytes:,}, as the shape says.")
        pixels = np.frombuffer(binary, np.uint8).reshape(shape)
    else:
        if len(binary):
            raise bad_request("Bytes follow the JSON, but pixels has no binary_data_size.")
        pixels = _from_json(tensor.data, shape)
    wanted = request.outputs or [_Output(name="logits"), _Output(name="cam")]
    outputs: dict[str, bool] = {
        output.name: request.parameters.binary_data_output
        if output.parameters.binary_data is None
        else output.parameters.binary_data
        for output in wanted
    }
    if len(outputs) != len(wanted):
        raise bad_request("An output is named twice.")
    timeout_us = request.parameters.timeout
    return Inference(pixels, request.id, outputs, None if timeout_us is None else timeout_us / 1e6)


def render_inference(
    asked: Inference, arrays: Mapping[str, NDArray[np.float32]], facts: Mapping[str, object]
) -> tuple[bytes, int | None]:
    """Return an answer's body, and the length of its JSON where bytes follow it, else None.

    Args:
        asked: which outputs, and how.
        arrays: logits and cam, float32.
        facts: what goes before the outputs, e.g. the model's name.
    """
    described, binary = list[dict[str, object]](), list[bytes]()
    for name, is_binary in asked.outputs.items():
        array = arrays[name]
        entry: dict[str, object] = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
        if is_binary:
            binary.append(array.astype("<f4").tobytes())
            entry["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            # As Python's doubles, which hold every float32 exactly: no bit is lost on the way through text.
            entry["data"] = array.ravel().tolist()
        described.append(entry)
    named = {} if asked.id is None else {"id": asked.id}
    header = json.dumps({**facts, **named, "outputs": described}).encode()
    return b"".join([header, *binary]), len(header) if binary else None


def _split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    if header_length is None:
        return body, memoryview(b"")
    is_number = header_length.isascii() and header_length.isdigit() and len(header_length) < 12
    length = int(header_length) if is_number else -1
    if not 1 <= length <= min(len(body), MAX_JSON_BYTES):
        raise bad_request(
            f"Inference-Header-Content-Length must be the bytes of the JSON in front, at most {MAX_JSON_BYTES:,} and the body."
        )
    return body[:length], memoryview(body)[length:]


def _parse_json(header: bytes) -> _Request:
    try:
        # json first: pydantic's own parser takes NaN, and lets the last of two equal keys win.
        found = json.loads(header, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated_keys)
        return _Request.model_validate(found)
    except ValidationError as err:
        first = err.errors(include_url=False, include_input=False, include_context=False)[0]
        # Names of ours alone: a key that we don't know is the client's text.
        ours = {"inputs", "outputs", "parameters", "id", "name", "datatype", "shape", *_Parameters.model_fields}
        ours |= {*_InputParameters.model_fields, *_OutputParameters.model_fields}
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in ours) or "the request"
        raise bad_request(f"{where}: {first['msg']}. See /openapi.json.") from err
    except (ValueError, RecursionError) as err:
        raise bad_request("The request must be JSON as RFC 8259 has it: UTF-8, no NaN, no key twice.") from err


def _from_json(data: object, shape: tuple[int, ...]) -> Pixels:
    numbers = data if isinstance(data, list) and data and not isinstance(data[0], list) else list(_flatten(data, shape))
    n = int(np.prod(shape))
    # Types by name: True is an int to Python, and no number in JSON.
    if len(numbers) != n or set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) > 255:
        raise bad_request(f"data must be {n:,} integers of 0 to 255, row by row, flat or nested as the shape says.")
    return np.array(numbers, np.uint8).reshape(shape)


def _flatten(data: object, shape: tuple[int, ...]) -> Iterator[object]:
    if not shape:
        yield data
        return
    if not isinstance(data, list) or len(data) != shape[0]:
        raise bad_request("data must be one list of integers, or lists nested as the shape says.")
    if len(shape) == 1:
        yield from data
        return
    for part in data:
        yield from _flatten(part, shape[1:])


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _refuse_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key appears twice")
    return record
