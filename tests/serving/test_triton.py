"""A model repository for Triton, read as Triton reads it: by its own protobuf schema."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from benchmarks.rigs.plan_card import CARD, TARGET
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import hash_files
from chexnet_deploy.bundle.signing.releases import Release
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.errors import BundleError
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.serving.triton import check_repository, write_repository
from tests.conftest import SIDE_PX


def read_config(folder: Path) -> ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def as_plan(
    bundle: Bundle, path: Path, *, backend: str = "tensorrt", batch: tuple[int, int, int] = (1, 8, 16)
) -> Bundle:
    """A plan's bundle as the builder writes it, but for the plan, which no test here runs."""
    probe = bundle.read_probe_bytes()
    manifest = bundle.manifest.model_copy(
        update={
            "files": hash_files({"model.plan": b"plan", "probe.npz": probe}),
            "ancestors": (*bundle.manifest.ancestors, bundle.id),
            "target": TARGET.model_copy(update={"backend": backend, "tensorrt": "10.9.0.34"}),
            "engine": CARD.model_copy(update={"batch": batch}),
        }
    )
    return Bundle.write(path, manifest, b"plan", probe)


def as_release(bundle: Bundle, path: Path, number: int) -> Bundle:
    manifest = bundle.manifest.model_copy(update={"release": Release(line="chexnet-adult", number=number)})
    return Bundle.write(path, manifest, bundle.read_model(), bundle.read_probe_bytes())


def test_an_onnx_bundle_becomes_a_model_as_tritons_schema_has_it(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    write_repository(tmp_path / "models", [bundles["fp32"], bundles["int8-cpu"]])
    assert sorted(place.name for place in (tmp_path / "models").iterdir()) == ["chexnet_fp32", "chexnet_int8_cpu"]
    folder = tmp_path / "models" / "chexnet_int8_cpu"
    config = read_config(folder)
    assert (config.name, config.platform, config.max_batch_size) == ("chexnet_int8_cpu", "onnxruntime_onnx", 256)
    (pixels,), (logits, cam) = config.input, config.output
    assert (pixels.name, pixels.data_type, list(pixels.dims)) == ("pixels", 2, [1, SIDE_PX, SIDE_PX])  # TYPE_UINT8
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", 11, [14])  # TYPE_FP32
    assert (cam.name, list(cam.dims)) == ("cam", [14, 1, 1])
    assert (folder / logits.label_filename).read_text().split("\n") == [*FINDINGS, ""]
    (group,) = config.instance_group
    assert (group.kind, group.count) == (ModelInstanceGroup.KIND_CPU, 1)
    batching = config.dynamic_batching
    assert (list(batching.preferred_batch_size), batching.max_queue_delay_microseconds) == ([4, 8, 16], 0)
    assert (batching.default_queue_policy.max_queue_size, batching.default_queue_policy.timeout_action) == (
        64,
        0,
    )  # REJECT
    assert not config.optimization.HasField("execution_accelerators")
    assert list(config.version_policy.specific.versions) == [1]


def test_the_tensors_are_those_that_the_model_itself_has(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    import onnxruntime as ort

    write_repository(tmp_path / "models", [bundles["fp32"]])
    folder = tmp_path / "models" / "chexnet_fp32"
    config, session = read_config(folder), ort.InferenceSession(folder / "1" / "model.onnx")
    for told, real in zip(
        [*config.input, *config.output], [*session.get_inputs(), *session.get_outputs()], strict=True
    ):
        assert (told.name, list(told.dims)) == (real.name, real.shape[1:])
        assert not isinstance(real.shape[0], int)  # any batch


def test_warm_up_runs_every_batch_that_is_formed_on_the_first_probe_image(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    write_repository(tmp_path / "models", [bundles["fp32"]])
    folder = tmp_path / "models" / "chexnet_fp32"
    warmups = read_config(folder).model_warmup
    assert [warmup.batch_size for warmup in warmups] == [1, 4, 8, 16]
    for warmup in warmups:
        tensor = warmup.inputs["pixels"]
        raw = (folder / "warmup" / tensor.input_data_file).read_bytes()
        pixels = np.frombuffer(raw, np.uint8).reshape(tuple(tensor.dims))
        np.testing.assert_array_equal(pixels, bundles["fp32"].read_probe().pixels[0])


def test_a_version_is_the_bundle_itself(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    write_repository(tmp_path / "models", [bundles["int8"]])
    version = tmp_path / "models" / "chexnet_int8" / "1"
    assert Bundle.open(version).id == bundles["int8"].id
    Predictor.open(version, provider="cpu").close()  # its known answers hold
    parameters = read_config(version.parent).parameters
    assert parameters["1.bundle"].string_value == bundles["int8"].id
    assert parameters["1.ancestors"].string_value == bundles["fp32"].id
    assert parameters["1.precision"].string_value == "int8"
    assert parameters["1.onnxruntime_at_least"].string_value == "1.30"
    assert json.loads(parameters["1.operating_points"].string_value) == bundles["int8"].manifest.operating_points


def test_onnx_on_a_gpu_keeps_float32_whole(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    write_repository(tmp_path / "models", [bundles["fp32"]], device="gpu")
    config = read_config(tmp_path / "models" / "chexnet_fp32")
    assert config.instance_group[0].kind == ModelInstanceGroup.KIND_GPU
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})


def test_a_plan_takes_the_batches_of_its_profile(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    plan = as_plan(bundles["int8"], tmp_path / "plan", batch=(1, 8, 128))
    write_repository(tmp_path / "models", [plan])
    folder = tmp_path / "models" / "chexnet_int8_plan"
    config = read_config(folder)
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 128)
    assert config.instance_group[0].kind == ModelInstanceGroup.KIND_GPU
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 128]
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 256
    assert json.loads(config.parameters["1.target"].string_value)["tensorrt"] == "10.9.0.34"
    assert (folder / "1" / "model.plan").read_bytes() == b"plan"


def test_releases_are_versions_of_one_model(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    releases = [as_release(bundles["fp32"], tmp_path / str(number), number) for number in (12, 7)]
    (model,) = write_repository(tmp_path / "models", releases)
    assert list(model.versions) == [7, 12]
    config = read_config(tmp_path / "models" / "chexnet-adult_fp32")
    assert list(config.version_policy.specific.versions) == [7, 12]
    assert config.parameters["12.bundle"].string_value == releases[0].id


def test_what_triton_can_not_serve_rightly_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    others = {
        "no backend": (as_plan(bundles["fp32"], tmp_path / "rtx", backend="tensorrt_rtx"), None),
        "single images": (as_plan(bundles["fp32"], tmp_path / "large", batch=(4, 8, 16)), None),
        "needs a GPU": (as_plan(bundles["fp32"], tmp_path / "plan"), "cpu"),
        "for CPUs": (bundles["int8-cpu"], "gpu"),
    }
    for reason, (bundle, device) in others.items():
        with pytest.raises(BundleError, match=reason):
            write_repository(tmp_path / "models", [bundle], device=device)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="both be version 1"):
        write_repository(tmp_path / "models", [bundles["fp32"], bundles["fp32"]])
    assert not (tmp_path / "models").exists()


def test_versions_with_other_tensors_are_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    releases = [as_release(bundles["fp32"], tmp_path / "1", 1)]
    manifest = releases[0].manifest.model_copy(
        update={"findings": tuple(reversed(FINDINGS)), "release": Release(line="chexnet-adult", number=2)}
    )
    model, probe = bundles["fp32"].read_model(), bundles["fp32"].read_probe_bytes()
    releases.append(Bundle.write(tmp_path / "2", manifest, model, probe))
    with pytest.raises(BundleError, match="other tensors"):
        write_repository(tmp_path / "models", releases)


def test_a_place_that_is_taken_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(BundleError, match="is there already"):
        write_repository(tmp_path / "models", [bundles["fp32"]])


def swap_labels(folder: Path) -> None:
    labels = (folder / "labels.txt").read_text().split("\n")
    labels[0], labels[1] = labels[1], labels[0]
    (folder / "labels.txt").write_text("\n".join(labels))


def more_instances(folder: Path) -> None:
    (folder / "config.pbtxt").write_text((folder / "config.pbtxt").read_text().replace("count: 1", "count: 2"))


def flip_model(folder: Path) -> None:
    model = bytearray((folder / "1" / "model.onnx").read_bytes())
    model[1000] ^= 1
    (folder / "1" / "model.onnx").write_bytes(model)


def add_version(folder: Path) -> None:
    (folder / "2").mkdir()
    (folder / "2" / "model.onnx").write_bytes((folder / "1" / "model.onnx").read_bytes())


def drop_warmup(folder: Path) -> None:
    (folder / "warmup" / "pixels").unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_labels, "labels.txt was changed"),
        (more_instances, "config.pbtxt is not the one"),
        (flip_model, "model.onnx does not match"),
        (add_version, r"'2/model.onnx'"),
        (drop_warmup, r"'warmup/pixels'"),
    ],
)
def test_a_changed_repository_is_refused(
    bundles: dict[str, Bundle], tmp_path: Path, change: Callable[[Path], None], reason: str
) -> None:
    write_repository(tmp_path / "models", [bundles["fp32"]])
    check_repository(tmp_path / "models")
    change(tmp_path / "models" / "chexnet_fp32")
    with pytest.raises(BundleError, match=reason):
        check_repository(tmp_path / "models")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "chexnet_deploy", *words], capture_output=True, text=True, timeout=120)


def test_the_command_makes_a_repository_of_bundles_and_inspects_it(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    place = str(tmp_path / "models")
    done = run("export", str(bundles["fp32"].path), str(bundles["int8"].path), "--triton", place)
    assert done.returncode == 0, done.stderr
    assert "answers wrongly in a Triton with an ONNX Runtime before 1.30" in done.stderr
    assert json.loads(run("inspect", place).stdout)["chexnet_int8"] == {
        "device": "cpu",
        "versions": {"1": bundles["int8"].id},
    }
    shutil.copy(tmp_path / "models" / "chexnet_fp32" / "config.pbtxt", tmp_path / "models" / "chexnet_int8")
    assert run("inspect", place).returncode == 2


def test_the_command_makes_bundles_and_a_repository_of_a_checkpoint(checkpoint_path: Path, tmp_path: Path) -> None:
    done = run("export", str(checkpoint_path), "--out", str(tmp_path / "out"), "--triton", str(tmp_path / "models"))
    assert done.returncode == 0, done.stderr
    assert Bundle.open(tmp_path / "models" / "chexnet_fp32" / "1").id == Bundle.open(tmp_path / "out" / "fp32").id


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("BUNDLE",), "Give a .safetensors file"),
        (("BUNDLE", "--triton", "models", "--out", "out"), "--out: for a checkpoint"),
        (("CHECKPOINT", "--triton", "models"), "found no --out"),
        (("CHECKPOINT", "BUNDLE", "--triton", "models"), "needed one checkpoint"),
        (("CHECKPOINT", "--out", "out", "--triton-device", "gpu"), "--triton-device is for a model repository"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_any_work(
    bundles: dict[str, Bundle], checkpoint_path: Path, words: tuple[str, ...], reason: str
) -> None:
    places = {"BUNDLE": str(bundles["fp32"].path), "CHECKPOINT": str(checkpoint_path)}
    done = run("export", *(places.get(word, word) for word in words))
    assert (done.returncode, reason in done.stderr) == (2, True), done.stderr
