"""The big and the small residual network: the same widths and stages, a different number of blocks."""

from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .digits_data import CLASSES

BIG = (4, 6, 4)
SMALL = (1, 2, 1)
CHANNELS = (16, 32, 64)

# Mean and deviation of the target's pixels, without which BatchNorm's first statistics are far off.
_MEAN, _DEVIATION = 0.305, 0.376


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """A residual network of three stages for 8x8 images, with blocks ``layer1.0``, ``layer1.1``, ... ``layer3.n``."""

    def __init__(self, blocks: Sequence[int], channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.layer1 = _stage(blocks[0], channels[0], channels[0], stride=1)
        self.layer2 = _stage(blocks[1], channels[0], channels[1], stride=2)
        self.layer3 = _stage(blocks[2], channels[1], channels[2], stride=2)
        self.fc = nn.Linear(channels[2], CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Map images ``(N, 1, 8, 8)`` in [0, 1] to what the classifier ``fc`` sees, ``(N, channels[2])``."""
        x = F.relu(self.bn1(self.conv1((images - _MEAN) / _DEVIATION)))
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, 1, 8, 8)`` in [0, 1] to logits ``(N, 10)``."""
        return self.fc(self.features(images))


def residual_network(blocks: Sequence[int], *, seed: int) -> ResidualNetwork:
    """Build a network whose initial weights depend on ``seed`` only; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResidualNetwork(blocks)


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))
