from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import ONNX_MODEL, PROBE, hash_files
from chexnet_deploy.bundle.probe import Probe
from chexnet_deploy.errors import SessionError
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.score import score_files
from chexnet_deploy.runtime.sessions.base import MAX_BATCH, Logits, Maps, check_finite, check_pixels
from chexnet_deploy.runtime.sessions.known_answers import KnownAnswers
from chexnet_deploy.runtime.sessions.open import check_known_answers, open_session
from chexnet_deploy.runtime.sessions.openvino import PIECE, OpenvinoSession
from chexnet_deploy.runtime.sessions.ort import OrtSession

PRECISIONS = ["fp32", "fp16", "int8"]


def rewrite(bundle: Bundle, path: Path, probe: Probe, **changes: object) -> Bundle:
    model, content = bundle.read_model(), probe.to_bytes()
    files = hash_files({ONNX_MODEL: model, PROBE: content})
    return Bundle.write(path, bundle.manifest.model_copy(update={"files": files, **changes}), model, content)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_session_gives_the_known_answers(bundles: dict[str, Bundle], precision: str) -> None:
    bundle = bundles[precision]
    session = OrtSession.open(bundle, threads=1)  # the runtime that the manifest's figure was measured with
    error = check_known_answers(session, bundle, n_probes=32)
    assert error == pytest.approx(bundle.manifest.probe_max_abs_logit_error, abs=2e-3)
    logits, maps = session.run(bundle.read_probe().pixels[:3])
    assert (logits.shape, maps.shape) == ((3, 14), (3, 14, 1, 1))
    assert (logits.dtype, maps.dtype) == (np.float32, np.float32)
    session.close()


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((1, 1, 32, 32), np.float32),
        np.zeros((1, 1, 32, 32), np.int8),
        np.zeros((1, 32, 32), np.uint8),
        np.zeros((1, 3, 32, 32), np.uint8),
        np.zeros((1, 1, 32, 64), np.uint8),
        np.zeros((1, 1, 64, 64), np.uint8),
        np.zeros((0, 1, 32, 32), np.uint8),
        np.zeros((MAX_BATCH + 1, 1, 32, 32), np.uint8),
    ],
    ids=lambda pixels: f"{pixels.dtype}{list(pixels.shape)}",
)
def test_pixels_of_another_kind_are_refused(bundles: dict[str, Bundle], pixels: NDArray[np.generic]) -> None:
    session = OrtSession.open(bundles["fp32"])
    with pytest.raises(SessionError, match=r"^got"):
        session.run(pixels)  # type: ignore[arg-type]


def test_a_closed_session_refuses(bundles: dict[str, Bundle]) -> None:
    session = OrtSession.open(bundles["fp32"])
    session.close()
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.run(bundles["fp32"].read_probe().pixels[:1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_image_gets_the_same_answer_in_each_slot(bundles: dict[str, Bundle], precision: str) -> None:
    session = OrtSession.open(bundles[precision])
    pixels = bundles[precision].read_probe().pixels
    alone, _ = session.run(pixels[5:6])
    for slot in range(4):
        batch = pixels[10:14].copy()
        batch[slot] = pixels[5]
        np.testing.assert_allclose(session.run(batch)[0][slot], alone[0], atol=1e-5, rtol=0)


def test_threads_do_not_mix_answers(bundles: dict[str, Bundle]) -> None:
    session = OrtSession.open(bundles["fp32"], threads=1)
    pixels = bundles["fp32"].read_probe().pixels
    expected = np.concatenate([session.run(pixels[i : i + 1])[0] for i in range(32)])
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: session.run(pixels[i : i + 1])[0][0], list(range(32)) * 3))
    np.testing.assert_allclose(np.stack(answers), np.tile(expected, (3, 1)), atol=1e-5, rtol=0)


def test_other_known_answers_are_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    probe = bundles["fp32"].read_probe()
    logits = probe.logits.copy()
    logits[1, 2] += 0.5
    wrong = rewrite(bundles["fp32"], tmp_path / "wrong", replace(probe, logits=logits))
    with pytest.raises(SessionError, match=r"known answers differ by 0\.[45]\d* logits"):
        open_session(wrong)


@pytest.mark.parametrize("kind", [OrtSession, OpenvinoSession])
def test_a_batch_gives_the_known_answers_before_its_first(
    bundles: dict[str, Bundle], kind: type[OrtSession | OpenvinoSession]
) -> None:
    bundle = bundles["fp32"]
    pixels, known = bundle.read_probe().pixels, KnownAnswers.of(bundle)
    known.probe.logits[3, 2] += 0.5  # the fourth alone
    session = kind.open(bundle, threads=1, known=known)
    assert session.run(pixels[:1])[0].shape == (1, 14)
    for n in (2, 2, PIECE):  # asked anew, not once and for all
        with pytest.raises(SessionError, match=r"^.*: known answers differ by 0\.[45]\d* logits"):
            session.run(pixels[:n])
    known.probe.logits[3, 2] -= 0.5
    assert session.run(pixels[:6])[0].shape == (6, 14)
    session.close()


def test_a_wrong_head_bias_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["fp32"]
    bias = (bundle.manifest.head_bias[0] + 0.1, *bundle.manifest.head_bias[1:])
    wrong = rewrite(bundle, tmp_path / "wrong", bundle.read_probe(), head_bias=bias)
    with pytest.raises(SessionError, match="maps and logits disagree"):
        open_session(wrong)


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(SessionError, match="refuses this model"):
        OrtSession(b"no model", 32)


@pytest.mark.parametrize("name", ["gpu", "CUDA", "CPUExecutionProvider", "tensorrt", "", None, ["cuda", "cpu"]])
def test_a_provider_of_another_name_is_refused_with_those_there_are(bundles: dict[str, Bundle], name: object) -> None:
    with pytest.raises(SessionError, match=r"no provider is named .*\. Needed: one of auto, openvino, cpu, cuda\."):
        Predictor.open(bundles["fp32"].path, provider=name)  # type: ignore[arg-type]
    with pytest.raises(SessionError, match=r"no provider is named"):
        open_session(bundles["fp32"], provider=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-cpu"])
def test_cuda_is_never_the_cpu(bundles: dict[str, Bundle], precision: str) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("NOT RUN without CUDA: this ONNX Runtime has it")
    with pytest.raises(SessionError, match=r"has no CUDAExecutionProvider\. Install onnxruntime-gpu"):
        Predictor.open(bundles[precision].path, provider="cuda")


def test_onnx_runtime_takes_its_own_providers_alone(bundles: dict[str, Bundle]) -> None:
    for name in ("openvino", "auto", "gpu"):
        with pytest.raises(SessionError, match=r"no provider named .* here\. Needed: cpu or cuda\."):
            OrtSession.open(bundles["fp32"], provider=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_finite_is_refused(bad: float) -> None:
    good, broken = np.zeros((1, 2), np.float32), np.full((1, 2, 1, 1), bad, np.float32)
    check_finite(good, good)
    for answer in ((good, broken), (broken, good)):
        with pytest.raises(SessionError, match="NaN or infinity"):
            check_finite(*answer)


def test_all_convolutions_of_fp32_run_in_float32(bundles: dict[str, Bundle]) -> None:
    types = OrtSession.open(bundles["fp32"]).conv_types()
    # 121 convolutions; ONNX Runtime runs some of the 62 BatchNorms as convolutions too.
    assert set(types) == {"float32"}
    assert 121 <= types["float32"] <= 183


@pytest.mark.parametrize(("version", "is_refused"), [("1.23.2", True), ("1.29.0", True), ("1.30.0", False)])
def test_typed_int8_needs_an_onnx_runtime_that_rounds(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, version: str, is_refused: bool
) -> None:
    monkeypatch.setattr("chexnet_deploy.runtime.sessions.ort.ort.__version__", version)
    OrtSession.open(bundles["fp16"]).close()
    if is_refused:
        with pytest.raises(SessionError, match=r"onnxruntime 1\.30 or later"):
            OrtSession.open(bundles["int8"])
    else:
        OrtSession.open(bundles["int8"]).close()


@pytest.mark.parametrize("threads", [0, 100_000])
def test_more_threads_than_cores_are_refused(bundles: dict[str, Bundle], threads: int) -> None:
    with pytest.raises(SessionError, match="cores of this machine"):
        OrtSession.open(bundles["fp32"], threads=threads)


def test_a_provider_that_is_not_there_is_refused(bundles: dict[str, Bundle]) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("NOT RUN: this ONNX Runtime has CUDA")
    with pytest.raises(SessionError, match=r"no CUDAExecutionProvider\. Install onnxruntime-gpu"):
        open_session(bundles["fp32"], provider="cuda")


def test_a_silent_fall_back_to_the_cpu_is_refused(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    # What ONNX Runtime does where its CUDA provider is listed but cuDNN is missing.
    real = ort.InferenceSession
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda model, options, providers: real(model, options))
    with pytest.raises(SessionError, match="fell back from CUDAExecutionProvider to CPUExecutionProvider"):
        OrtSession.open(bundles["fp32"], provider="cuda")


class SmallBatches:
    """A session that takes at most 4 images, as a plan for a scanner does."""

    batch_range = (1, 4)

    def __init__(self, bundle: Bundle) -> None:
        self.inner = OrtSession.open(bundle)
        self.sizes: list[int] = []

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        check_pixels(pixels, 32, self.batch_range)
        self.sizes.append(len(pixels))
        return self.inner.run(pixels)

    def conv_types(self) -> Mapping[str, int]:
        return self.inner.conv_types()

    def stage_times_ms(self, pixels: Pixels) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        self.inner.close()


def test_a_session_of_small_batches_gives_all_known_answers(bundles: dict[str, Bundle], phantom_root: Path) -> None:
    session = SmallBatches(bundles["fp32"])
    assert check_known_answers(session, bundles["fp32"], n_probes=32) < 1e-4
    assert session.sizes == [4] * 8
    paths = sorted((phantom_root / "images").iterdir())[:6]
    scores = score_files({"small": session}, paths, bundles["fp32"].manifest.preprocessing)
    assert scores["small"].shape == (6, 14)
    assert session.sizes[8:] == [4, 2]


def test_a_model_that_names_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A session is made of bytes, never of a path: ONNX Runtime then has no folder to look for external data in.
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "outside.bin"), ("offset", "0"), ("length", "8")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("pixels", "logits")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["pixels", "weight"], ["logits"])], "g", *[[e] for e in ends], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "outside.bin").write_bytes(bytes(8))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SessionError, match="refuses this model"):
        OrtSession(model.SerializeToString(), 32)
