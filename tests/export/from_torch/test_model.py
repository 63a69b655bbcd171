from pathlib import Path

import pytest
import torch

from chexnet_deploy.bundle.probe import draw_probe_pixels
from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint
from chexnet_deploy.export.from_torch.model import CheXNet, DeployGraph, Normalise
from chexnet_deploy.images.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing


@pytest.fixture(scope="module")
def chexnet() -> CheXNet:
    torch.manual_seed(0)
    return CheXNet(14).eval()


def test_counts_are_densenet_121s(chexnet: CheXNet) -> None:
    # 120 convolutions, 121 BatchNorms of five tensors, and the head's two.
    assert len(chexnet.state_dict()) == 120 + 5 * 121 + 2 == 364 * 2 - 1
    # torchvision's densenet121 has 7,978,856 with 1000 classes; the head of 14 is 986 x 1025 smaller.
    assert sum(parameter.numel() for parameter in chexnet.parameters()) == 7_978_856 - 986 * 1025 == 6_968_206


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("features.conv0.weight", [64, 3, 7, 7]),
        ("features.norm0.running_mean", [64]),
        ("features.denseblock1.denselayer1.norm1.weight", [64]),
        ("features.denseblock1.denselayer1.conv1.weight", [128, 64, 1, 1]),
        ("features.transition1.conv.weight", [128, 256, 1, 1]),
        ("features.transition3.norm.num_batches_tracked", []),
        ("features.denseblock3.denselayer24.conv1.weight", [128, 992, 1, 1]),
        ("features.denseblock4.denselayer16.conv2.weight", [32, 128, 3, 3]),
        ("features.norm5.weight", [1024]),
        ("classifier.weight", [14, 1024]),
        ("classifier.bias", [14]),
    ],
)
def test_names_are_torchvisions(chexnet: CheXNet, name: str, shape: list[int]) -> None:
    assert list(chexnet.state_dict()[name].shape) == shape


def test_normalise_is_torchvisions() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (pixels.double() / 255 - mean) / std
    torch.testing.assert_close(Normalise(Preprocessing())(pixels).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side_px", [32, 96])
def test_deploy_graph_is_the_model(checkpoint_path: Path, side_px: int) -> None:
    checkpoint = read_checkpoint(checkpoint_path)
    preprocessing = Preprocessing(resize_px=side_px)
    pixels = torch.from_numpy(draw_probe_pixels(side_px)[:6])
    with torch.inference_mode():
        logits, cam = DeployGraph(checkpoint.model, preprocessing).eval()(pixels)
        expected = checkpoint.model(Normalise(preprocessing)(pixels))
    assert logits.shape == (6, 14)
    assert cam.shape == (6, 14, side_px // 32, side_px // 32)
    assert expected.std(dim=0).min() > 1e-4  # the images get different answers
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cam.mean(dim=(2, 3)) + checkpoint.model.classifier.bias, logits, rtol=1e-5, atol=1e-5)


def test_head_of_another_size() -> None:
    assert CheXNet(3).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
