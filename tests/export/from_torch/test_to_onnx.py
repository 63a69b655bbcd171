import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import Precision
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.errors import BundleError, ExportError
from chexnet_deploy.export.from_torch import to_onnx
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.runtime.sessions.open import open_session

CHECKOUT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def fp32(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return to_onnx.export_onnx(checkpoint_path, tmp_path_factory.mktemp("export") / "fp32")


def test_checks_are_within_limits(fp32: Bundle) -> None:
    assert len(fp32.manifest.checks) == 3
    for check in fp32.manifest.checks:
        assert 0.0 <= check.value <= check.limit <= 1e-4, check


def test_manifest_says_where_it_came_from(fp32: Bundle, checkpoint_path: Path) -> None:
    manifest = fp32.manifest
    assert manifest.precision is Precision.FP32
    assert manifest.findings == FINDINGS
    assert manifest.checkpoint_sha256 == sha256_hex(checkpoint_path.read_bytes())
    assert manifest.ancestors == ()
    assert {"torch", "onnx", "onnxruntime", "chexnet-deploy"} <= set(manifest.tools)
    np.testing.assert_allclose(manifest.head_bias, np.linspace(-2.0, 1.0, 14), rtol=1e-6, atol=1e-7)


def test_graph_interface(fp32: Bundle) -> None:
    model = onnx.load_from_string(fp32.read_model())
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]

    def interface(values: object) -> list[tuple[str, int, list[str | int]]]:
        return [
            (
                v.name,
                v.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        ]

    assert interface(model.graph.input) == [("pixels", onnx.TensorProto.UINT8, ["N", 1, 32, 32])]
    logits, cam = interface(model.graph.output)
    assert logits == ("logits", onnx.TensorProto.FLOAT, ["N", 14])
    assert cam[:2] == ("cam", onnx.TensorProto.FLOAT)
    assert cam[2][:2] == ["N", 14]
    assert not [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert not [node.name for node in model.graph.node if node.op_type == "Identity"]


@pytest.mark.parametrize("n", [1, 5, 32])
def test_any_batch_size_gives_the_known_answers(fp32: Bundle, n: int) -> None:
    probe = fp32.read_probe()
    logits, cam = open_session(fp32, provider="cpu").run(probe.pixels[:n])
    np.testing.assert_allclose(logits, probe.logits[:n], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cam, probe.cam[:n], rtol=1e-3, atol=1e-3)


def test_existing_bundle_is_not_replaced(fp32: Bundle, checkpoint_path: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(fp32.path, tmp_path / "fp32"))
    with pytest.raises(BundleError, match="is there already"):
        to_onnx.export_onnx(checkpoint_path, path)
    assert Bundle.open(path).id == fp32.id


def test_graph_that_answers_otherwise_is_not_kept(
    checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace_wrong(checkpoint: to_onnx.Checkpoint) -> bytes:
        model = onnx.load_from_string(trace(checkpoint))
        for tensor in model.graph.initializer:
            if tensor.name == "model.classifier.bias":
                tensor.CopyFrom(
                    onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + np.float32(0.01), tensor.name)
                )
                return bytes(model.SerializeToString())
        pytest.fail("no classifier.bias in the graph")

    trace = to_onnx.trace
    monkeypatch.setattr(to_onnx, "trace", trace_wrong)
    with pytest.raises(ExportError, match=r"No bundle was kept"):
        to_onnx.export_onnx(checkpoint_path, tmp_path / "fp32")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.7, 2.5])  # while torch is imported; while it exports
def test_interrupted_export_leaves_nothing_behind(checkpoint_path: Path, tmp_path: Path, after_s: float) -> None:
    # SIGKILL at many moments: tests/benchmarks/test_soak.py.
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    program = "from chexnet_deploy.cli.main import main; print('ready', flush=True); main()"
    command = [sys.executable, "-c", program, "export", str(checkpoint_path), "--out", str(out)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    names = [entry.name for entry in out.glob("*")]
    # On a fast machine the bundle may be there already, and the signal then meets a Python that is ending.
    is_finished = names == ["fp32"]
    assert process.returncode in ((0, 130, -signal.SIGINT) if is_finished else (130,)), errors
    assert is_finished or names == []
    if is_finished:
        Bundle.open(out / "fp32")
    else:
        assert "Traceback" not in errors
    assert not list(temporary.iterdir())
