"""Module trees in which repeated modules nest, as libraries write them. They have names and parameters, no forward."""

from typing import Dict, Optional, Sequence, Tuple

import torch
from torch import nn

from tests.models import Block


class Unit(nn.Module):
    """A convolution with its norm and activation: transformers' ``ResNetConvLayer``, mmcv's ``ConvModule``."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, groups: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
        self.normalization = nn.BatchNorm2d(outputs)
        self.activation = nn.ReLU()


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.Conv2d(width, 2, 1), nn.ReLU(), nn.Conv2d(2, width, 1), nn.Sigmoid())


class UnitBlock(nn.Module):
    """As transformers' ResNet and RegNet blocks: a ``Sequential`` of units, and one of squeeze and excitation."""

    def __init__(self, inputs: int, outputs: int, gated: bool) -> None:
        super().__init__()
        self.shortcut = nn.Identity() if inputs == outputs else Unit(inputs, outputs, 1)
        gate = [SqueezeExcite(outputs)] if gated else []
        self.layer = nn.Sequential(Unit(inputs, outputs), Unit(outputs, outputs), *gate, Unit(outputs, outputs, 1))
        self.activation = nn.ReLU()


class UnitStage(nn.Module):
    def __init__(self, inputs: int, outputs: int, depth: int, gated: bool) -> None:
        super().__init__()
        blocks = [UnitBlock(inputs if i == 0 else outputs, outputs, gated) for i in range(depth)]
        self.layers = nn.Sequential(*blocks)


class UnitResNet(nn.Module):
    """As transformers' ResNet: stages in a list, each a module that holds blocks, each a module that holds units."""

    def __init__(self, depths: Sequence[int], gated: bool = False, widths: Sequence[int] = (4, 8, 8)) -> None:
        super().__init__()
        self.embedder = Unit(3, widths[0])
        widths = (widths[0], *widths)
        self.stages = nn.ModuleList(
            [UnitStage(*pair, depth, gated) for *pair, depth in zip(widths[:-1], widths[1:], depths)]
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1], 3))


class InvertedResidual(nn.Module):
    """As mmseg's: two units where nothing is expanded, else three, and no other part."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        expand = [] if expansion == 1 else [Unit(width, hidden, 1)]
        self.conv = nn.Sequential(*expand, Unit(hidden, hidden, groups=hidden), Unit(hidden, width, 1))


class MobileNet(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(InvertedResidual(4, 1))
        self.layer2 = nn.Sequential(*[InvertedResidual(4, 2) for _ in range(depth)])


class MBConv(nn.Module):
    """As torchvision's, whose convolutions with a norm are a ``Sequential`` and whose gate is a module."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def unit(groups: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(width, width, 1, groups=groups), nn.BatchNorm2d(width), nn.SiLU())

        self.block = nn.Sequential(unit(), unit(width), SqueezeExcite(width), unit())


class SeparableUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_dw, self.bn_dw = nn.Conv2d(width, width, 3, groups=width), nn.BatchNorm2d(width)
        self.conv_pw, self.bn_pw = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)


class XceptionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stack = nn.Sequential(*[SeparableUnit(width) for _ in range(3)])


class SwinStage(nn.Module):
    """As timm's and transformers': blocks of a stage, and what merges patches before the next."""

    def __init__(self, width: int, depth: int, merges: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        if merges:
            self.downsample = nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width))


class PlainBlock(nn.Module):
    """A residual block without a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3), nn.Conv2d(width, width, 3)


class PlainStage(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*[PlainBlock(width) for _ in range(depth)])
        self.last = nn.Conv2d(width, 2 * width, 1)


class Branches(nn.Module):
    """As HRNet's module: branches of residual blocks, and the convolutions that exchange between them."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(*[Block(w) for _ in range(depth)]) for w in (4, 8)])
        self.fuse_layers = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)])


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, width // 2) for _ in range(3))


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class PartsBlock(nn.Module):
    """A transformer block that lists its heads of attention and its experts."""

    def __init__(self, width: int, experts: int = 3) -> None:
        super().__init__()
        self.norm1, self.heads = nn.LayerNorm(width), nn.ModuleList([Head(width) for _ in range(2)])
        self.proj = nn.Linear(width, width)
        self.norm2, self.experts = nn.LayerNorm(width), nn.ModuleList([Expert(width) for _ in range(experts)])


class SelfAttention(Head):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = nn.LayerNorm(width)


class FeedForward(Expert):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = nn.LayerNorm(width)


class SublayersBlock(nn.Module):
    """As T5's: a list of the attention and the feed-forward network, each with its norm and residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList([SelfAttention(width), FeedForward(width)])


class UNet(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Sequential(nn.MaxPool2d(2), InvertedResidual(4, 2)) for _ in range(depth)])
        self.up = nn.ModuleList()
        for _ in range(depth):
            self.up.extend([nn.ConvTranspose2d(4, 4, 2, 2), InvertedResidual(4, 2)])


def listed(kind: type, count: int, width: int = 4) -> nn.Module:
    model = nn.Module()
    model.stem = nn.Conv2d(3, width, 1)
    model.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    model.layers = nn.ModuleList([kind(width) for _ in range(count)])
    return model


def staged(model: Optional[nn.Module] = None, **stages: nn.Module) -> nn.Module:
    model = model or nn.Module()
    model.stages = nn.ModuleDict(stages)
    return model


def numbered(prefix: str, count: int) -> Tuple[str, ...]:
    return tuple(f"{prefix}.{index}" for index in range(count))


NESTED: Dict[str, Tuple[nn.Module, Tuple[str, ...]]] = {
    "blocks of units in stages": (
        UnitResNet((2, 3, 1)),
        ("stages.0.layers.0", "stages.0.layers.1", *numbered("stages.1.layers", 3), "stages.2.layers.0"),
    ),
    "one block of units in each stage": (UnitResNet((1, 1, 1)), tuple(f"stages.{i}.layers.0" for i in range(3))),
    "stages of one width": (
        UnitResNet((1, 2, 1), widths=(4, 4, 4)),
        ("stages.0.layers.0", "stages.1.layers.0", "stages.1.layers.1", "stages.2.layers.0"),
    ),
    "blocks of units and a gate": (
        UnitResNet((1, 2, 1), gated=True),
        ("stages.0.layers.0", "stages.1.layers.0", "stages.1.layers.1", "stages.2.layers.0"),
    ),
    "inverted residuals of two or three units": (MobileNet(2), ("layer1.0", "layer2.0", "layer2.1")),
    "blocks with a gate among containers": (listed(MBConv, 2), numbered("layers", 2)),
    "blocks of separable units": (listed(XceptionBlock, 2), numbered("layers", 2)),
    "transformer blocks in stages": (
        staged(a=SwinStage(4, 2), b=SwinStage(8, 1, merges=False)),
        ("stages.a.blocks.0", "stages.a.blocks.1", "stages.b.blocks.0"),
    ),
    "blocks without norms in stages": (
        staged(a=PlainStage(4, 2), b=PlainStage(8, 1)),
        ("stages.a.body.0", "stages.a.body.1", "stages.b.body.0"),
    ),
    "blocks in branches": (
        staged(a=Branches(2), b=Branches(1)),
        tuple(f"stages.a.branches.{b}.{i}" for b in range(2) for i in range(2))
        + ("stages.b.branches.0.0", "stages.b.branches.1.0"),
    ),
    "heads and experts": (listed(PartsBlock, 3), numbered("layers", 3)),
    "sub-layers": (listed(SublayersBlock, 3), numbered("layers", 3)),
    "blocks among other layers": (UNet(2), ("encoder.0.1", "encoder.1.1", "up.1", "up.3")),
}
"""By case: the model, and the names of its repeated blocks in its order."""
