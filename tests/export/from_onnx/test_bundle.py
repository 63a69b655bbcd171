"""A ResNet that was never ours becomes a bundle by a contract: it answers as its file, and all that runs bundles runs it."""

import json
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.probe import draw_probe_pixels
from chexnet_deploy.errors import ExportError, SpecError
from chexnet_deploy.export.from_onnx.bundle import export_foreign
from chexnet_deploy.runtime.contract import Contract, read_contract
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions.ort import OrtSession, load_onnx
from tests.command_line import assert_one_line_error, chexnet
from tests.foreign import write_contract, write_onnx

FINDINGS = ("Effusion", "", "Mass", "Lung Lesion")


class Block(nn.Module):
    """He et al. 2016, figure 2, with a projection."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(before, after, 3, 2, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.beside = nn.Conv2d(before, after, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.beside(x))


class ResNet(nn.Sequential):
    """Five halvings, a mean over space, a linear layer."""

    def __init__(self, channels: int, n_outputs: int, *tail: nn.Module) -> None:
        stem = nn.Conv2d(channels, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        widths = (8, 16, 16, 32, 32)
        blocks = [Block(*pair) for pair in pairwise(widths)]
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, n_outputs), *tail)


def resnet(path: Path, *tail: nn.Module, channels: int = 3) -> Path:
    torch.manual_seed(3)
    model = ResNet(channels, len(FINDINGS), *tail).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.zeros(2, channels, 32, 32),), str(path), dynamo=False, opset_version=17,
            input_names=["image"], output_names=["out"], dynamic_axes={"image": {0: "N"}, "out": {0: "N"}},
        )  # fmt: skip
    return path


def contract(path: Path, **replaced: str) -> Contract:
    colour = {"channels": '"bgr"', "range": "[0, 1]\nmean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]"}
    return read_contract(write_contract(path, FINDINGS, **{**colour, **replaced}))


def test_the_bundle_answers_as_the_file(tmp_path: Path) -> None:
    file = resnet(tmp_path / "net.onnx")
    bundle = export_foreign(file, contract(tmp_path / "c.toml"), tmp_path / "fp32")
    assert bundle.manifest.findings == ("Effusion", "Mass", "Lung Lesion")
    pixels = draw_probe_pixels(32)
    by_hand = (pixels / 255 - np.array([0.406, 0.456, 0.485])[:, None, None]) / np.array([0.225, 0.224, 0.229])[
        :, None, None
    ]
    (wanted,) = load_onnx(file.read_bytes()).run(None, {"image": by_hand.astype(np.float32)})
    logits, cam = OrtSession.open(bundle).run(pixels)
    np.testing.assert_allclose(logits, wanted[:, [0, 2, 3]], atol=1e-5)
    assert np.ptp(logits, axis=0).min() > 1e-3  # it answers by the picture
    np.testing.assert_allclose(cam.mean(axis=(2, 3)) + np.array(bundle.manifest.head_bias), logits, atol=1e-5)
    with Predictor.open(bundle.path, provider="cpu") as predictor:
        assert set(predictor.predict(pixels[0, 0]).probabilities) == {"Effusion", "Mass", "Lung Lesion"}


def test_a_sigmoid_is_taken_off_and_gray_and_xrvs_range_are_folded_in(tmp_path: Path) -> None:
    file = resnet(tmp_path / "net.onnx", nn.Sigmoid(), channels=1)
    write_contract(tmp_path / "c.toml", FINDINGS, values='"sigmoids"', range="[-1024, 1024]\nstd = [1024]")
    (tmp_path / "c.toml").write_text((tmp_path / "c.toml").read_text().replace('score = "logit"\n', ""))
    bundle = export_foreign(file, read_contract(tmp_path / "c.toml"), tmp_path / "fp32")
    pixels = draw_probe_pixels(32)
    (wanted,) = load_onnx(file.read_bytes()).run(None, {"image": (pixels / 127.5 - 1).astype(np.float32)})
    logits, _ = OrtSession.open(bundle).run(pixels)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), wanted[:, [0, 2, 3]], atol=1e-5)


@pytest.mark.slow
def test_commands_end_to_end(phantom_root: Path, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    file = resnet(tmp_path / "net.onnx")
    contract(tmp_path / "c.toml")
    done = chexnet(
        "export", file, "--contract", tmp_path / "c.toml", "--out", tmp_path / "made", "--precision", "fp16,int8",
        "--data", phantom_root, "--calibration-images", 100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, engine, words in (
        ("int8", tmp_path / "made" / "int8", ()),
        ("file", tmp_path / "made" / "fp32", ("--reference", file, "--contract", tmp_path / "c.toml")),
    ):
        done = chexnet(
            "bench", "--engine", engine, "--data", phantom_root, "--out", tmp_path / name,
            "--min-runs", 1, "--min-duration-s", 0, *words,
        )  # fmt: skip
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert (done.returncode, report["findings"]) == (3, ["Effusion", "Mass"]), done.stdout
    evaluated = json.loads(chexnet("evaluate", tmp_path / "made" / "int8", "--data", phantom_root, "--json").stdout)
    assert [each["finding"] for each in evaluated["findings"]] == ["Effusion", "Mass"]


@pytest.mark.parametrize(
    ("tail", "replaced", "found"),
    [
        ((nn.ReLU(),), {}, "Relu at the network's end; needed a mean over space, a linear layer"),
        ((), {"score": '"softmax"'}, "found a softmax, needed one sigmoid a finding"),
        ((), {"interpolation": '"lanczos"'}, "found lanczos, squash, 32 px"),
        ((), {"range": "[1, 0]"}, "black to white 1 to 0"),
    ],
)
def test_what_can_not_be_a_bundle(
    tail: tuple[nn.Module, ...], replaced: dict[str, str], found: str, tmp_path: Path
) -> None:
    file = resnet(tmp_path / "net.onnx", *tail)
    with pytest.raises(ExportError) as caught:
        export_foreign(file, contract(tmp_path / "c.toml", **replaced), tmp_path / "fp32")
    assert found in str(caught.value)
    assert "bench and evaluate measure the file as it is" in str(caught.value)
    assert not (tmp_path / "fp32").exists()


def test_a_network_without_a_mean_and_a_file_without_a_contract(tmp_path: Path) -> None:
    file = write_onnx(tmp_path / "net.onnx", len(FINDINGS))
    with pytest.raises(ExportError, match="found AveragePool, Flatten, Gemm at the network's end"):
        export_foreign(file, read_contract(write_contract(tmp_path / "c.toml", FINDINGS)), tmp_path / "fp32")
    with pytest.raises(SpecError, match="no contract"):
        export_foreign(file, None, tmp_path / "fp32")
    assert_one_line_error(chexnet("export", file, "--out", tmp_path / "made"), 2, "Give it by --contract")
