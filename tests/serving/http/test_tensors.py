"""The protocol's bytes: what is taken, and that everything else is a 400 which repeats nothing of it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexnet_deploy.serving.http.refusals import RequestError
from chexnet_deploy.serving.http.tensors import parse_inference, render_inference

SIDE_PX, MAX_BATCH = 32, 4
PIXELS = np.arange(2 * SIDE_PX**2, dtype=np.uint32).astype(np.uint8).reshape(2, 1, SIDE_PX, SIDE_PX)
SHAPE = list(PIXELS.shape)


def request(**changes: object) -> dict[str, object]:
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": SHAPE, "data": PIXELS.ravel().tolist(), **changes}
    return {"inputs": [{name: value for name, value in tensor.items() if value is not None}]}


def parse(found: object, *, length: str | None = None, after: bytes = b""):
    body = found if isinstance(found, bytes) else json.dumps(found).encode()
    return parse_inference(body + after, str(len(body)) if length == "right" else length, SIDE_PX, MAX_BATCH)


@pytest.mark.parametrize("data", [PIXELS.ravel().tolist(), PIXELS.tolist()], ids=["flat", "nested"])
def test_json_gives_the_same_pixels_flat_and_nested(data: list) -> None:
    asked = parse(request(data=data))
    assert np.array_equal(asked.pixels, PIXELS)
    assert asked.outputs == {"logits": False, "cam": False}


def test_binary_gives_the_same_pixels() -> None:
    header = request(data=None, parameters={"binary_data_size": PIXELS.size})
    header |= {
        "id": "7",
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        "parameters": {"timeout": 1500},
    }
    asked = parse(header, length="right", after=PIXELS.tobytes())
    assert np.array_equal(asked.pixels, PIXELS)
    assert (asked.id, asked.outputs, asked.timeout_s) == ("7", {"logits": True}, 0.0015)


BAD = {
    "no JSON": b"\xff\xfe secret",
    "NaN": json.dumps(request(data=[float("nan")] * PIXELS.size)).encode(),
    "a key twice": b'{"inputs": [], "inputs": []}',
    "deep": b"[" * 50_000,
    "long number": b'{"inputs": ' + b"9" * 10_000 + b"}",
    "no list": {"inputs": {}},
    "no input": {"inputs": []},
    "two inputs": {"inputs": request()["inputs"] * 2},  # type: ignore[operator]
    "name": request(name="secret"),
    "type": request(datatype="FP32"),
    "rank": request(shape=[2, SIDE_PX, SIDE_PX]),
    "side": request(shape=[2, 1, SIDE_PX, SIDE_PX + 1]),
    "no image": request(shape=[0, 1, SIDE_PX, SIDE_PX]),
    "negative": request(shape=[-2, 1, SIDE_PX, SIDE_PX]),
    "too many": request(shape=[MAX_BATCH + 1, 1, SIDE_PX, SIDE_PX]),
    "huge": request(shape=[2**63, 1, SIDE_PX, SIDE_PX]),
    "too few numbers": request(data=[0] * (PIXELS.size - 1)),
    "256": request(data=[256] * PIXELS.size),
    "-1": request(data=[-1] * PIXELS.size),
    "fractions": request(data=[0.5] * PIXELS.size),
    "whole fractions": request(data=[1.0] * PIXELS.size),
    "true": request(data=[True] * PIXELS.size),
    "text": request(data=["secret"] * PIXELS.size),
    "ragged": request(data=[[[[0] * SIDE_PX] * (SIDE_PX - 1)]] * 2),
    "no data": request(data=None),
    "null data": {"inputs": [{**request()["inputs"][0], "data": None}]},  # type: ignore[index]
    "shared memory": request(data=None, parameters={"shared_memory_region": "secret", "shared_memory_byte_size": 9}),
    "unknown key": {**request(), "secret": 1},
    "unknown parameter": {**request(), "parameters": {"sequence_id": 4}},
    "timeout 0": {**request(), "parameters": {"timeout": 0}},
    "unknown output": {**request(), "outputs": [{"name": "secret"}]},
    "output twice": {**request(), "outputs": [{"name": "cam"}, {"name": "cam"}]},
    "classification": {**request(), "outputs": [{"name": "logits", "parameters": {"classification": 3}}]},
    "long id": {**request(), "id": "s" * 257},
}


@pytest.mark.parametrize("found", BAD.values(), ids=BAD.keys())
def test_what_is_wrong_is_a_400_that_repeats_nothing(found: object) -> None:
    with pytest.raises(RequestError) as caught:
        parse(found)
    assert caught.value.status == 400
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "n_after", "length"),
    [
        (PIXELS.size, PIXELS.size - 1, "right"),
        (PIXELS.size, PIXELS.size + 1, "right"),
        (PIXELS.size - 1, PIXELS.size, "right"),
        (2**62, PIXELS.size, "right"),
        (PIXELS.size, PIXELS.size, "0"),
        (PIXELS.size, PIXELS.size, "99999999"),
        (PIXELS.size, PIXELS.size, "-1"),
        (PIXELS.size, PIXELS.size, "1e2"),
        (PIXELS.size, PIXELS.size, "²"),
    ],
)
def test_a_wrong_byte_count_is_a_400(size: int, n_after: int, length: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(request(data=None, parameters={"binary_data_size": size}), length=length, after=bytes(n_after))
    assert caught.value.status == 400


@given(st.binary(max_size=300), st.none() | st.text(max_size=5))
def test_no_bytes_make_it_fail_otherwise(body: bytes, length: str | None) -> None:
    with pytest.raises(RequestError):
        parse_inference(body, length, SIDE_PX, MAX_BATCH)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_text_and_bytes_carry_every_float_to_the_bit(values: list[float]) -> None:
    logits = np.array([values], np.float32)
    for is_binary in (False, True):
        asked = parse({**request(), "outputs": [{"name": "logits", "parameters": {"binary_data": is_binary}}]})
        content, length = render_inference(asked, {"logits": logits}, {})
        header = json.loads(content[:length])
        found = (
            np.frombuffer(content[length:], np.float32)
            if is_binary
            else np.array(header["outputs"][0]["data"], np.float64).astype(np.float32)
        )
        assert found.tobytes() == logits.tobytes()
