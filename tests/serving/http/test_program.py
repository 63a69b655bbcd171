"""The service as clients meet it: a process, a port, real clients and bad ones."""

import base64
import contextlib
import gzip
import http.client
import io
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import monotonic, sleep

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image

from benchmarks.rigs.node_rig import write_radiograph
from chexnet_deploy import Predictor
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.runtime.sessions.base import Session
from tests.serving.running import Running, Start

MIB = 2**20


@pytest.fixture(scope="module")
def predictor(served: Bundle) -> Iterator[Predictor]:
    """Opened as the service opens the bundle."""
    with Predictor.of(served) as opened:
        yield opened


@pytest.fixture(scope="module")
def session(predictor: Predictor) -> Session:
    return predictor._session


def triton_infer(port: int, pixels: np.ndarray, *, binary: bool, compression: str | None = None) -> triton.InferResult:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        tensor = triton.InferInput("pixels", list(pixels.shape), "UINT8")
        tensor.set_data_from_numpy(pixels, binary_data=binary)
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("logits", "cam")]
        return client.infer("chexnet", [tensor], outputs=outputs, request_compression_algorithm=compression)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclient_gets_the_sessions_answers_to_the_bit(
    service: Running, served: Bundle, session: Session, binary: bool, compression: str | None
) -> None:
    pixels = served.read_probe().pixels[:5]
    logits, maps = session.run(pixels)
    result = triton_infer(service.port, pixels, binary=binary, compression=compression)
    assert result.as_numpy("logits").tobytes() == logits.tobytes()
    assert result.as_numpy("cam").tobytes() == maps.tobytes()
    assert result.get_response()["parameters"]["bundle"] == served.id


def test_tritonclient_finds_everything_it_asks_for(service: Running, served: Bundle) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{service.port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("chexnet", served.id[:12])
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "model_configuration"]
        assert client.get_model_metadata("chexnet")["versions"] == [served.id[:12]]
        side_px, n_findings = served.manifest.preprocessing.resize_px, len(served.manifest.findings)
        for version in ("", served.id[:12]):
            config = client.get_model_config("chexnet", version)
            assert config["max_batch_size"] == 16
            assert config["input"] == [{"name": "pixels", "data_type": "TYPE_UINT8", "dims": [1, side_px, side_px]}]
            assert [output["name"] for output in config["output"]] == ["logits", "cam"]
            assert config["output"][0]["dims"] == [n_findings]
        assert not client.is_model_ready("chexnet", "1")
        for call in (
            client.get_model_repository_index,
            lambda: client.load_model("chexnet"),
            lambda: client.unload_model("chexnet"),
            client.get_system_shared_memory_status,
            lambda: client.register_system_shared_memory("a", "/a", 10),
            client.get_cuda_shared_memory_status,
            client.get_log_settings,
            lambda: client.get_trace_settings("chexnet"),
            lambda: client.get_model_config("chexnet", "1"),
            client.get_inference_statistics,
            lambda: client.get_inference_statistics("chexnet"),
            lambda: client.get_inference_statistics("chexnet", served.id[:12]),
            lambda: client.get_model_metadata("other"),
            lambda: client.get_model_metadata("chexnet", "1"),
        ):
            with pytest.raises(triton.InferenceServerException, match=r"\[40[045]\]|not offered|There is"):
                call()
        with pytest.raises(triton.InferenceServerException, match="/metrics has every count and time"):
            client.get_inference_statistics("chexnet")


def test_an_answer_on_a_kept_connection_waits_for_no_acknowledgement(service: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    times_s = []
    for _ in range(20):
        began_s = monotonic()
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().read() is not None
        times_s.append(monotonic() - began_s)
    connection.close()
    assert median(times_s[1:]) < 0.03  # Linux acknowledges after 40 ms


def test_joined_requests_get_the_bits_they_get_alone(service: Running, served: Bundle, session: Session) -> None:
    pixels = served.read_probe().pixels
    alone = np.concatenate([session.run(pixels[i : i + 1])[0] for i in range(len(pixels))])
    before = service.metric("chexnet_batch_images_count")
    with ThreadPoolExecutor(16) as pool:
        results = list(
            pool.map(lambda i: triton_infer(service.port, pixels[i : i + 1], binary=True), list(range(32)) * 3)
        )
    found = np.concatenate([result.as_numpy("logits") for result in results])
    assert found.tobytes() == np.concatenate([alone] * 3).tobytes()
    assert service.metric("chexnet_batch_images_count") > before


def test_a_dicom_file_comes_back_as_the_picture_that_was_read(service: Running, tmp_path: Path) -> None:
    write_radiograph(tmp_path / "a.dcm", seed=3)
    answer = service.json("POST", "/predict?radiograph=png", (tmp_path / "a.dcm").read_bytes())
    picture = Image.open(io.BytesIO(base64.b64decode(answer["radiograph"]["png_base64"])))
    assert np.array_equal(np.asarray(picture), read_image(tmp_path / "a.dcm"))
    assert "cam" not in answer


def test_predict_says_what_the_predictor_says(
    service: Running, served: Bundle, predictor: Predictor, radiograph: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(radiograph)
    expected = predictor.predict(tmp_path / "a.png")
    answer = service.json("POST", "/predict?cam=Hernia", radiograph)
    assert answer["probabilities"] == expected.probabilities
    assert answer["present"] == expected.present
    assert (answer["bundle"], answer["precision"]) == (served.id, "int8")
    assert answer["cam"]["png_base64"].startswith("iVBORw0KGgo")
    form = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="DOE^JANE.png"\r\n\r\n'
        + radiograph
        + b"\r\n--x--\r\n"
    )
    by_form = service.json("POST", "/predict", form, {"Content-Type": "multipart/form-data; boundary=x"})
    assert by_form["probabilities"] == expected.probabilities
    packed = service.json("POST", "/predict", gzip.compress(radiograph), {"Content-Encoding": "gzip"})
    assert packed["probabilities"] == expected.probabilities


def test_predict_reads_dicom_as_the_predictor_does(service: Running, predictor: Predictor, tmp_path: Path) -> None:
    write_radiograph(tmp_path / "chest.dcm", seed=3, name="DOE^JANE")
    expected = predictor.predict(tmp_path / "chest.dcm")
    answer = service.json("POST", "/predict", (tmp_path / "chest.dcm").read_bytes())
    assert answer["probabilities"] == expected.probabilities
    write_radiograph(tmp_path / "hip.dcm", seed=4, name="DOE^JANE", body_part="HIP")
    refused = service.json("POST", "/predict", (tmp_path / "hip.dcm").read_bytes())
    assert (refused["status"], refused["reason"]) == (422, "body-part")
    for said in (json.dumps([answer, refused]), service.log(), service.ask("GET", "/metrics")[2].decode()):
        assert "DOE" not in said


def test_a_peer_that_never_reads_its_answers_is_ended(service: Running) -> None:
    before = service.metric("chexnet_connections_ended_total")
    with _connect(service.port, b"") as peer:
        peer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(100_000):
                peer.send(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n")
        end_s = monotonic() + 10.0
        while service.metric("chexnet_connections_ended_total") == before:
            assert monotonic() < end_s
            sleep(0.1)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "reason"),
    [
        ("/predict", b"DOE^JANE", {}, 422, "unreadable"),
        ("/predict", b"", {}, 400, "bad-request"),
        ("/predict", bytes(128) + b"DICM" + b"DOE^JANE" * 9, {}, 422, "transfer-syntax"),
        ("/predict?cam=DOE", b"x", {}, 400, "bad-request"),
        ("/predict?radiograph=tiff", b"x", {}, 400, "bad-request"),
        ("/predict?cam=Hernia&cam=Mass", b"x", {}, 400, "bad-request"),
        ("/predict?name=DOE", b"x", {}, 400, "bad-request"),
        ("/predict", b"x", {"Content-Encoding": "br"}, 415, "encoding"),
        ("/predict", b"DOE", {"Content-Type": "multipart/form-data"}, 400, "bad-request"),
        ("/predict", b"--x\r\n\r\nDOE", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "bad-request"),
        ("/v2/models/chexnet/infer", b"DOE", {}, 400, "bad-request"),
        ("/v2/models/DOE/infer", b"{}", {}, 404, "not-found"),
        ("/v2/models/chexnet/versions/9/infer", b"{}", {}, 404, "not-found"),
        ("/v2/repository/models/chexnet/load", b"{}", {}, 400, "not-offered"),
        ("/v2/health/live", b"", {}, 405, "method"),
        ("/DOE", b"", {}, 404, "not-found"),
    ],
)
def test_bad_input_is_refused_with_a_reason_and_no_echo(
    service: Running, path: str, body: bytes, headers: dict[str, str], status: int, reason: str
) -> None:
    answer = service.json("POST", path, body, headers)
    assert (answer["status"], answer["reason"]) == (status, reason)
    assert "DOE" not in answer["error"]
    assert "DOE" not in service.log()
    assert b"DOE" not in service.ask("GET", "/metrics")[2]


def test_the_size_limit_is_exact_plain_and_inflated(service: Running) -> None:
    for pack, headers in ((bytes, {}), (gzip.compress, {"Content-Encoding": "gzip"})):
        assert service.ask("POST", "/predict", pack(bytes(MIB)), headers)[0] == 422  # zeros: read whole, and no image
        assert service.ask("POST", "/predict", pack(bytes(MIB + 1)), headers)[0] == 413
    assert service.ask("POST", "/predict", None, {"Content-Length": str(10**15)})[0] == 413
    assert service.ask("POST", "/predict", None, {"Content-Length": "9" * 300})[0] in (400, 413)


def _connect(port: int, sent: bytes) -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", port), timeout=30)
    peer.sendall(sent)
    return peer


def _is_closed(peer: socket.socket, *, within_s: float) -> bool:
    peer.settimeout(within_s)
    try:
        while peer.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /v2 HTTP/1.1\r\nHost: a\r\nX-Slow: ",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nx",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
    ],
    ids=["silent", "header", "body", "chunk"],
)
def test_slow_peers_are_closed_in_time_and_keep_nobody_out(service: Running, sent: bytes, radiograph: bytes) -> None:
    peers = [_connect(service.port, sent) for _ in range(100)]  # more than the 64 places
    assert service.json("POST", "/predict", radiograph)["status"] == 200
    end_s = monotonic() + 6.0  # the deadline is 2 s here
    for peer in peers[-30:]:
        if sent:
            with contextlib.suppress(OSError):
                peer.send(b"x")  # a byte now and then is no progress
    assert all(_is_closed(peer, within_s=max(0.01, end_s - monotonic())) for peer in peers)
    for peer in peers:
        peer.close()
    assert service.metric("chexnet_connections_ended_total") >= 60


def test_raw_bytes_of_all_kinds_kill_nothing(service: Running) -> None:
    rng = random.Random(1711)
    seeds = [
        b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /v2/models/chexnet/infer HTTP/1.1\r\nHost: a\r\nInference-Header-Content-Length: 2\r\nContent-Length: 4\r\n\r\n{}ab",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ]
    for _ in range(400):
        sent = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(0, 4)):
            place = rng.randrange(len(sent))
            sent[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 4))
        with _connect(service.port, bytes(sent)) as peer:
            peer.shutdown(socket.SHUT_WR)
            peer.settimeout(10)
            try:
                answer = peer.recv(65536)
            except OSError:
                continue
        assert not answer.startswith((b"HTTP/1.1 5", b"HTTP/1.0 5")), (bytes(sent), answer)
    assert service.process.poll() is None
    assert service.ask("GET", "/v2/health/ready")[0] == 200


def test_a_full_queue_is_503_with_retry_after(start: Start, served: Bundle) -> None:
    small = start(served.path, "--provider", "cpu", "--queue", "1", "--max-batch", "1")
    pixels = served.read_probe().pixels[:1]
    header = {
        "inputs": [
            {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
        ]
    }
    body = json.dumps(header).encode()
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: small.ask("POST", "/v2/models/chexnet/infer", body), range(240)))
    assert {status for status, _, _ in answers} == {200, 503}
    assert all(headers["retry-after"] == "1" for status, headers, _ in answers if status == 503)
    assert small.stop() == 0


def test_sigterm_answers_what_was_sent_and_ends_with_0(start: Start, served: Bundle, radiograph: bytes) -> None:
    ending = start(served.path, "--provider", "cpu")
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(radiograph)
    peers = [_connect(ending.port, head + radiograph[:-1]) for _ in range(8)]
    sleep(0.3)
    ending.process.send_signal(signal.SIGTERM)
    ending.wait_for_log("draining")
    for peer in peers:
        peer.sendall(radiograph[-1:])
    assert all(peer.recv(15) == b"HTTP/1.1 200 OK" for peer in peers)
    for peer in peers:
        peer.close()
    assert ending.process.wait(30) == 0
    with pytest.raises(ConnectionRefusedError):
        ending.ask("GET", "/v2")


def test_a_damaged_bundle_never_gets_ready(start: Start, served: Bundle, tmp_path: Path) -> None:
    copy = _copy(served, tmp_path / "damaged")
    model = copy / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\0\0")
    failing = start(copy, wait=False)
    assert failing.process.wait(60) == 2
    assert "does not match its manifest" in failing.log()


def test_an_address_in_use_is_one_line(start: Start, served: Bundle, service: Running) -> None:
    command = [sys.executable, "-m", "chexnet_deploy", "serve", str(served.path), "--port", str(service.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "can't listen" in done.stderr


def _copy(bundle: Bundle, path: Path) -> Path:
    shutil.copytree(bundle.path, path)
    return path
