"""CheXNet in torch: DenseNet-121 with one logit and one activation map per finding.

Module names give torchvision's `densenet121` state-dict keys, so ImageNet weights in that format load unchanged.
No sigmoid, no loss, no training code here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from chexnet_deploy.images.preprocessing import Preprocessing

GROWTH_RATE = 32
BLOCK_LAYERS = (6, 12, 24, 16)  # DenseNet-121: Huang et al. 2017, table 1
BOTTLENECK_FACTOR = 4  # the 1x1 convolution makes 4 x growth rate channels
INIT_CHANNELS = 64
FEATURE_CHANNELS = 1024
STRIDE = 32  # pixels of the input for each cell of the activation map


class _DenseLayer(nn.Module):
    """BN-ReLU-conv1x1, BN-ReLU-conv3x3; its output is appended to its input."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        bottleneck = BOTTLENECK_FACTOR * GROWTH_RATE
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, bottleneck, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck, GROWTH_RATE, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.norm2(new)))], 1)


class _Transition(nn.Sequential):
    """BN-ReLU, 2x2 average pooling, then the conv1x1 that halves the channels.

    The paper pools after the convolution. Both are linear and each pixel's channels are mixed alike, so they commute; this
    order has a quarter of the convolution's work, 8 % of the whole network's.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)
        self.conv = nn.Conv2d(in_channels, in_channels // 2, kernel_size=1, bias=False)


class CheXNet(nn.Module):
    """DenseNet-121 with a linear head (Rajpurkar et al. 2017, arXiv 1711.05225).

    Args:
        n_findings: number of logits, in the order of the checkpoint's manifest.
    """

    def __init__(self, n_findings: int) -> None:
        super().__init__()
        features = nn.Sequential()
        features.add_module("conv0", nn.Conv2d(3, INIT_CHANNELS, kernel_size=7, stride=2, padding=3, bias=False))
        features.add_module("norm0", nn.BatchNorm2d(INIT_CHANNELS))
        features.add_module("relu0", nn.ReLU(inplace=True))
        features.add_module("pool0", nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
        channels = INIT_CHANNELS
        for index, n_layers in enumerate(BLOCK_LAYERS, start=1):
            block = nn.Sequential()
            for layer in range(1, n_layers + 1):
                block.add_module(f"denselayer{layer}", _DenseLayer(channels))
                channels += GROWTH_RATE
            features.add_module(f"denseblock{index}", block)
            if index < len(BLOCK_LAYERS):
                features.add_module(f"transition{index}", _Transition(channels))
                channels //= 2
        features.add_module("norm5", nn.BatchNorm2d(channels))
        self.features = features
        self.classifier = nn.Linear(channels, n_findings)
        # torchvision's initialisation; a trainer that starts from scratch depends on it.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def feature_maps(self, images: Tensor) -> Tensor:
        """Return the last feature maps, ReLU applied: [N, 3, S, S] normalised -> [N, 1024, S/32, S/32]."""
        features: Tensor = self.features(images)
        return functional.relu(features, inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, C] of normalised images [N, 3, S, S]."""
        pooled = self.feature_maps(images).mean(dim=(2, 3))
        logits: Tensor = self.classifier(pooled)
        return logits


class Normalise(nn.Module):
    """Gray uint8 pixels -> normalised RGB, as one multiply and one subtraction a channel.

    The exported graph and the trainer both use this one, so they can't differ.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", (1.0 / (255.0 * std)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (mean / std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return float32 [N, 3, S, S] of pixels [N, 1, S, S] in 0..255."""
        normalised: Tensor = pixels.to(torch.float32) * self.scale - self.shift
        return normalised


class DeployGraph(nn.Module):
    """What is exported: uint8 pixels in; float32 logits and class activation maps out.

    Global average pooling and a linear head commute, so the head runs as a 1x1 convolution before the mean and its
    output is the class activation map of the paper (section 5: M_c = sum_k w_ck f_k). The bias stays out of the map:
    mean over space of `cam` + bias = `logits`.
    """

    def __init__(self, model: CheXNet, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.normalise = Normalise(preprocessing)
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [N, C] and cam [N, C, S/32, S/32] of uint8 pixels [N, 1, S, S]."""
        head = self.model.classifier
        cam = functional.conv2d(self.model.feature_maps(self.normalise(pixels)), head.weight[:, :, None, None])
        return cam.mean(dim=(2, 3)) + head.bias, cam
