"""A served model answers as the file behind it; a server that is slow, dies or lies is an error, never an answer."""

import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chexnet_deploy.bundle.probe import draw_probe_pixels
from chexnet_deploy.errors import SessionError, SpecError
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.runtime.contract import Contract, read_contract
from chexnet_deploy.runtime.engine import ForeignModel, find_engine, open_engine
from chexnet_deploy.runtime.score import score_files
from chexnet_deploy.runtime.sessions.endpoint import split_url
from chexnet_deploy.runtime.sessions.ort import load_onnx
from tests.foreign import Server, serving, write_contract, write_onnx

FINDINGS = ("Mass", "Edema", "Hernia")
PIXELS = draw_probe_pixels(32)[:5]
Answer = dict[str, Any]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("model") / "net.onnx", len(FINDINGS))


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Contract:
    return read_contract(write_contract(tmp_path_factory.mktemp("contract") / "net.toml", FINDINGS))


@pytest.fixture
def server(file: Path) -> Iterator[Server]:
    session = load_onnx(file.read_bytes())
    with serving(lambda x: session.run(None, {"x": x})[0], [-1, 1, 32, 32], len(FINDINGS)) as server:
        yield server


def ask(server: Server, contract: Contract) -> np.ndarray:
    session = open_engine(find_engine(server.url, contract))
    return session.run(PIXELS)[0]


def test_the_same_numbers_as_the_file_behind_it(server: Server, file: Path, contract: Contract) -> None:
    logits, maps = open_engine(find_engine(file, contract), threads=1).run(PIXELS)
    np.testing.assert_array_equal(ask(server, contract), logits)
    assert (logits.shape, maps.shape) == ((5, 3), (5, 3, 0, 0))
    assert np.ptp(logits, axis=0).min() > 0.01  # it answers by the picture


def test_more_images_than_a_request_may_hold_go_in_several(server: Server, contract: Contract) -> None:
    few = contract.model_copy(update={"endpoint": contract.endpoint.model_copy(update={"batch": 2})})
    session = open_engine(find_engine(server.url, few))
    server.asked = 0
    np.testing.assert_array_equal(session.run(PIXELS)[0], ask(server, contract))
    assert server.asked == 3 + 3  # 2 + 2 + 1; and opening asks twice, before the answer


def output(answer: Answer) -> Answer:
    (first,) = answer["outputs"]
    return first


def changed(**changes: Any) -> Any:
    return lambda answer, number, handler: {**answer, **changes}


def output_changed(**changes: Any) -> Any:
    return lambda answer, number, handler: {**answer, "outputs": [{**output(answer), **changes}]}


def lose_an_image(answer: Answer, number: int, handler: BaseHTTPRequestHandler) -> Answer:
    n, k = output(answer)["shape"]
    return {**answer, "outputs": [{**output(answer), "shape": [n - 1, k], "data": output(answer)["data"][k:]}]}


def drift(answer: Answer, number: int, handler: BaseHTTPRequestHandler) -> Answer:
    data = [value + 0.01 * number for value in output(answer)["data"]]
    return {**answer, "outputs": [{**output(answer), "data": data}]}


def raw(status: int, body: bytes, *headers: tuple[str, str], length: int | None = None) -> Any:
    def send(answer: Answer, number: int, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in (("Content-Length", str(len(body) if length is None else length)), *headers):
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


def endless(answer: Answer, number: int, handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)  # HTTP/1.0 without a length: until it closes
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" " * 65536)
    except OSError:
        return


def hang_up(answer: Answer, number: int, handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def wait(answer: Answer, number: int, handler: BaseHTTPRequestHandler) -> Answer:
    time.sleep(2.5)
    return answer


def trickle(answer: Answer, number: int, handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    try:
        for _ in range(100):  # a byte in time for every timeout of a socket
            handler.wfile.write(b" ")
            time.sleep(0.1)
    except OSError:
        return


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        pytest.param(output_changed(shape=[4, 2]), "as many as the shape says", id="wrong shape"),
        pytest.param(output_changed(shape=[2, 6]), r"floats \[4, 3\]", id="reshaped"),
        pytest.param(output_changed(shape="4,3"), "no list of numbers", id="shape as text"),
        pytest.param(output_changed(data=[[1.0, 2.0], [3.0]]), "not all numbers", id="ragged"),
        pytest.param(output_changed(data=["1"] * 12), "not all numbers", id="text"),
        pytest.param(output_changed(data=[None] * 12), "not all numbers", id="null"),
        pytest.param(output_changed(data=[float("nan")] * 12), "NaN or infinity", id="NaN"),
        pytest.param(output_changed(data=[1e999] * 12), "NaN or infinity", id="infinity"),
        pytest.param(output_changed(name="z"), "needed 'y' once", id="other output"),
        pytest.param(output_changed(datatype="BYTES"), "an output of 'BYTES'", id="bytes"),
        pytest.param(changed(outputs=[]), "outputs none", id="no output"),
        pytest.param(changed(outputs=None), "outputs none", id="null outputs"),
        pytest.param(lose_an_image, r"\[3, 3\], needed floats \[4, 3\]", id="wrong count"),
        pytest.param(changed(model_name="other"), "found the model 'other'; needed 'net'", id="other model"),
        pytest.param(changed(id="0"), "the answer to another request", id="answer of another request"),
        pytest.param(lambda a, n, h: {**a, "model_version": str(n)}, "needed one model", id="other version"),
        pytest.param(drift, "it answers otherwise, by 0.01 logits", id="changing answers"),
        pytest.param(raw(500, b"out of memory"), "found status 500 b'out of memory'", id="500"),
        pytest.param(raw(503, b""), "status 503", id="503"),
        pytest.param(raw(204, b""), "status 204", id="204"),
        pytest.param(raw(302, b"", ("Location", "http://x/")), "status 302 to 'http://x/'", id="redirect"),
        pytest.param(raw(200, b'{"outputs":', length=100), "an answer cut short", id="truncated"),
        pytest.param(raw(200, b'{"outputs":'), "a JSON object", id="half a JSON"),
        pytest.param(raw(200, b"[1]"), "a JSON object", id="a list"),
        pytest.param(raw(200, b"{}", ("Content-Encoding", "gzip")), "encoded as 'gzip'", id="gzip"),
        pytest.param(raw(200, b"{}", ("Inference-Header-Content-Length", "9")), "a number within them", id="header"),
        pytest.param(raw(200, b"", length=1 << 40), "1,099,511,627,776 bytes", id="huge body"),
        pytest.param(endless, "an answer without end", id="endless body"),
        pytest.param(hang_up, "RemoteDisconnected", id="dies"),
        pytest.param(wait, "no whole answer", id="slow"),
        pytest.param(trickle, "no whole answer", id="slow to the byte"),
    ],
)
def test_a_server_that_lies_or_dies_is_an_error(fault: Any, found: str, server: Server, contract: Contract) -> None:
    server.spoil = fault
    began_s = time.monotonic()
    with pytest.raises(SessionError, match=found) as caught:
        ask(server, contract)
    assert time.monotonic() - began_s < 10
    assert str(caught.value).startswith(server.url)


@pytest.mark.parametrize(
    ("kind", "changes", "found"),
    [
        ("name", "other", "found the model 'other'"),
        (
            "inputs",
            [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 32, 32]}],
            r"found an input of \[\?, 3, 32, 32\]",
        ),
        ("inputs", [{"name": "x", "datatype": "FP32", "shape": "any"}], r"found an input of \[\]"),
        ("inputs", [{"name": "x", "datatype": "BYTES", "shape": [-1]}], "found an input of 'BYTES'"),
        ("inputs", [{"name": name} for name in "ab"], "found inputs 'a', 'b'; needed one named in the contract"),
        ("inputs", 3, "found inputs none"),
        ("outputs", [], "found outputs none"),
    ],
)
def test_a_server_that_describes_another_model(
    kind: str, changes: object, found: str, server: Server, contract: Contract
) -> None:
    server.described = {**server.described, kind: changes}
    with pytest.raises(SessionError, match=found):
        ask(server, contract)


def test_nobody_there(contract: Contract) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SessionError, match="ConnectionRefusedError"):
        open_engine(find_engine(f"http://127.0.0.1:{port}/v2/models/net", contract))


@pytest.mark.parametrize("at", [4, 5, 6, 9])
def test_a_model_that_is_changed_while_it_is_measured_is_an_error(
    at: int, server: Server, contract: Contract, phantom_root: Path
) -> None:
    # Requests 1 and 2 open it; two for each of two batches; 7 asks for the first batch once more.
    def change(answer: Answer, number: int, handler: BaseHTTPRequestHandler) -> Answer:
        data = [value + (number >= at) for value in output(answer)["data"]]
        return {**answer, "outputs": [{**output(answer), "data": data}]}

    server.spoil = change
    session = open_engine(find_engine(server.url, contract))
    paths = sorted((phantom_root / "images").glob("*.png"))[:20]
    if at == 9:
        assert score_files({"net": session}, paths, Preprocessing(resize_px=32))["net"].shape == (20, 3)
        assert server.asked == 7
        return
    with pytest.raises(SessionError, match="by 1 logits"):
        score_files({"net": session}, paths, Preprocessing(resize_px=32))


@pytest.mark.parametrize("first", range(3, 8))
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_model_that_is_another_for_a_while_is_an_error(
    first: int, n: int, server: Server, contract: Contract, phantom_root: Path
) -> None:
    """Two batches take requests 3 to 7. Were a batch asked for twice in a row, both answers could be the other model's."""

    def change(answer: Answer, number: int, handler: BaseHTTPRequestHandler) -> Answer:
        data = [value + (first <= number < first + n) for value in output(answer)["data"]]
        return {**answer, "outputs": [{**output(answer), "data": data}]}

    server.spoil = change
    session = open_engine(find_engine(server.url, contract))
    paths = sorted((phantom_root / "images").glob("*.png"))[:20]
    with pytest.raises(SessionError, match="by 1 logits"):
        score_files({"net": session}, paths, Preprocessing(resize_px=32))


@pytest.mark.parametrize(
    "url",
    [
        "http://host/",
        "http://host/v2/models/",
        "http://host/models/net",
        "http://host/v2/models/net/infer",
        "http://me:secret@host/v2/models/net",
        "http://host/v2/models/net?x=1",
        "http://host:port/v2/models/net",
        "http:///v2/models/net",
        "http://host/v2/models/n t",
    ],
)
def test_what_is_no_url_of_a_model(url: str, contract: Contract) -> None:
    with pytest.raises(SpecError, match="needed http://HOST:PORT/v2/models/NAME"):
        find_engine(url, contract)


def test_a_url_may_be_below_a_path_and_name_a_version(contract: Contract) -> None:
    assert split_url("https://host:8443/gate/v2/models/net/versions/3") == (
        "host:8443",
        "/gate/v2/models/net/versions/3",
        "net",
    )
    model = find_engine("http://host/v2/models/net", contract)
    assert isinstance(model, ForeignModel)
    assert (model.name, model.model_sha256) == ("net", None)
    assert model.id != ForeignModel("http://host/v2/models/other", contract, None).id
