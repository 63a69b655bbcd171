"""Models that are no bundles, and a server of another framework: the smallest that answer by the picture."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CONTRACT = """
[input]
layout = "NCHW"
channels = "gray"
size = 32
range = [0, 1]
interpolation = "bilinear"
[output]
findings = [{findings}]
values = "logits"
score = "logit"
[endpoint]
deadline_s = 2.0
"""


def write_contract(path: Path, findings: Sequence[str], **replaced: str) -> Path:
    """`replaced`: of a line's key, the line's value."""
    text = CONTRACT.format(findings=", ".join(f'"{finding}"' for finding in findings))
    for key, value in replaced.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{key} =")]
        text = text.replace(line, f"{key} = {value}")
    path.write_text(text)
    return path


def write_onnx(
    path: Path,
    n_outputs: int,
    *,
    channels: int = 1,
    batch: int | str = "N",
    layout: str = "NCHW",
    weight: float = 40.0,
    tail: str | None = None,
    seed: int = 0,
) -> Path:
    """A linear model of 8 x 8 patches' means; each output weighs them by numbers drawn from `seed`."""
    rng = np.random.default_rng(seed)
    constants = {
        "w": rng.normal(0.0, weight / 64, (channels * 64, n_outputs)).astype(np.float32),
        "b": rng.normal(0.0, 0.3, n_outputs).astype(np.float32),
    }
    side = 32
    shape = [batch, channels, side, side] if layout == "NCHW" else [batch, side, side, channels]
    turn = [] if layout == "NCHW" else [helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 3, 1, 2])]
    nodes = [
        *turn,
        helper.make_node("AveragePool", ["turned" if turn else "x"], ["means"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["y" if tail is None else "z"]),
        *([] if tail is None else [helper.make_node(tail, ["z"], ["y"])]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, n_outputs])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return path


class Server(ThreadingHTTPServer):
    """Serves `model` (float32 [N, ...] to float32 [N, K]) by the Open Inference Protocol, in JSON alone.

    Attributes:
        spoil: gets each answer to an inference, and the number of the request, and may change it or act instead.
        described: what the model says of itself.
    """

    daemon_threads = True

    def __init__(self, model: Callable[[Any], Any], shape: list[int], n_outputs: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.asked = model, 0
        self.spoil: Callable[[dict[str, Any], int, BaseHTTPRequestHandler], dict[str, Any] | None] = (
            lambda answer, number, handler: answer
        )
        self.described = {
            "name": "net",
            "versions": ["1"],
            "inputs": [{"name": "x", "datatype": "FP32", "shape": shape}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, n_outputs]}],
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v2/models/net"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        pages = {"/v2": {"name": "another framework"}, "/v2/models/net": self.server.described}
        self.send(pages.get(self.path))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (tensor,) = asked["inputs"]
        values = self.server.model(np.array(tensor["data"], np.float32).reshape(tensor["shape"]))
        output = {"name": "y", "datatype": "FP32", "shape": list(values.shape), "data": values.ravel().tolist()}
        self.server.asked += 1
        answer = {"model_name": "net", "model_version": "1", "id": asked["id"], "outputs": [output]}
        spoilt = self.server.spoil(answer, self.server.asked, self)
        if spoilt is not None:
            self.send(spoilt)

    def send(self, answer: object) -> None:
        content = json.dumps(answer).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(model: Callable[[Any], Any], shape: list[int], n_outputs: int) -> Iterator[Server]:
    server = Server(model, shape, n_outputs)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
