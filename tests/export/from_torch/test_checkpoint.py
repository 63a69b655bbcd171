import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import torch as safetensors_torch

from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.errors import CheckpointError
from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint, write_checkpoint
from chexnet_deploy.files import sha256_hex

KEY = "chexnet_deploy"
Weights = dict[str, torch.Tensor]


class Evil:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.sentinel),)


@pytest.fixture(scope="module")
def original(checkpoint_path: Path) -> tuple[bytes, Weights, str]:
    content = checkpoint_path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return content, safetensors_torch.load(content), header["__metadata__"][KEY]


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def save(path: Path, weights: Weights, manifest: str | None) -> Path:
    path.write_bytes(safetensors_torch.save(weights, metadata=None if manifest is None else {KEY: manifest}))
    return path


def test_round_trip(checkpoint_path: Path, tmp_path: Path) -> None:
    first = read_checkpoint(checkpoint_path)
    assert first.sha256 == sha256_hex(checkpoint_path.read_bytes())
    assert first.manifest.findings == FINDINGS
    assert not first.model.training
    write_checkpoint(tmp_path / "again.safetensors", first.model, first.manifest)
    second = read_checkpoint(tmp_path / "again.safetensors")
    assert second.manifest == first.manifest
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name


def rename(weights: Weights) -> None:
    weights["module.features.conv0.weight"] = weights.pop("features.conv0.weight")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("classifier.bias"), ["missing classifier.bias", "not expected nothing"]),
        (lambda w: w.update(surprise=torch.zeros(1)), ["missing nothing", "not expected surprise"]),
        (rename, ["missing features.conv0.weight", "not expected module.features.conv0.weight", "Rename"]),
        (lambda w: w.clear(), ["and 723 more"]),
        (
            lambda w: w.update({"classifier.weight": torch.zeros(15, 1024)}),
            ["classifier.weight", "[15, 1024]", "[14, 1024]"],
        ),
        (lambda w: w.update({"classifier.bias": w["classifier.bias"].half()}), ["classifier.bias", "torch.float16"]),
        (lambda w: w["features.norm5.weight"].__setitem__(7, float("nan")), ["features.norm5.weight", "NaN"]),
        (
            lambda w: w["features.denseblock2.denselayer3.conv2.weight"].__setitem__(0, float("-inf")),
            ["features.denseblock2.denselayer3.conv2.weight", "infinity"],
        ),
        (lambda w: w["features.norm0.running_var"].__setitem__(0, float("nan")), ["features.norm0.running_var"]),
    ],
    ids=["missing", "extra", "renamed", "empty", "wrong shape", "wrong type", "nan", "inf", "nan buffer"],
)
def test_weights_that_do_not_fit_are_named(
    original: tuple[bytes, Weights, str], tmp_path: Path, change: Callable[[Weights], object], named: list[str]
) -> None:
    weights = {name: tensor.clone() for name, tensor in original[1].items()}
    change(weights)
    message = refusal(save(tmp_path / "x.safetensors", weights, original[2]))
    for part in named:
        assert part in message


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_pickle_is_refused_unopened(tmp_path: Path, legacy: bool) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "evil.safetensors"
    torch.save(Evil(sentinel), path, _use_new_zipfile_serialization=not legacy)
    message = refusal(path)
    assert "pickled" in message
    assert "python -m training" in message
    assert not sentinel.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_bare_pickle_is_refused_unopened(tmp_path: Path, protocol: int) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "evil.safetensors"
    path.write_bytes(pickle.dumps(Evil(sentinel), protocol))
    refusal(path)
    assert not sentinel.exists()
    pickle.loads(path.read_bytes())
    assert sentinel.exists()  # so it would have


def test_files_of_other_kinds_are_refused(original: tuple[bytes, Weights, str], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    content = original[0]
    not_json = (4).to_bytes(8, "little") + b"nope"
    for wrong in (b"", b"just some text\n" * 20, content[:-1], content[:1000], content[:5], b"\xff" * 64, not_json):
        path.write_bytes(wrong)
        assert "not a safetensors file" in refusal(path)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.safetensors")
    assert "directory" in refusal(tmp_path)


def test_missing_manifest_is_refused(original: tuple[bytes, Weights, str], tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", {"features.conv0.weight": original[1]["features.conv0.weight"]}, None)
    assert "carries no chexnet-deploy manifest" in refusal(path)
    assert "made of this one by chexnet-deploy import" in refusal(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"surprise": 1}, "surprise"),
        ({"schema_version": 2}, "schema_version"),
        ({"findings": []}, "findings"),
        ({"findings": "Mass"}, "findings"),
        ({"split_sha256": "0"}, "split_sha256"),
        ({"operating_points": {"Mass": 2.0}}, "operating_points.Mass"),
        ({"operating_points": {"Mass": float("nan")}}, "operating_points.Mass"),
    ],
)
def test_wrong_manifest_is_refused(
    original: tuple[bytes, Weights, str], tmp_path: Path, change: dict[str, object], named: str
) -> None:
    manifest = json.dumps({**json.loads(original[2]), **change})
    assert f"manifest: {named}: " in refusal(save(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, manifest))


def test_manifest_that_is_not_json_is_refused(tmp_path: Path) -> None:
    assert "manifest" in refusal(save(tmp_path / "x.safetensors", {}, "{"))


def test_unwritable_place_is_refused(checkpoint_path: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(checkpoint_path)
    with pytest.raises(CheckpointError, match="could not be written"):
        write_checkpoint(tmp_path / "none" / "x.safetensors", checkpoint.model, checkpoint.manifest)


def test_every_header_length_is_read(checkpoint_path: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(checkpoint_path)
    path = tmp_path / "x.safetensors"
    for padding in range(0, 264, 8):  # safetensors pads its header to 8 bytes, so these are all last bytes there are
        manifest = checkpoint.manifest.model_copy(update={"recipe": {"padding": "x" * padding}})
        write_checkpoint(path, checkpoint.model, manifest)
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert read_checkpoint(path).manifest == manifest
