"""Small module trees with the structure and the names of the architectures users bring."""

from typing import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """As torchvision's."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """As torchvision's, with ``layer1`` ... of the given depths."""

    def __init__(self, depths: Sequence[int] = (2, 1), width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.stages = len(depths)
        for stage, depth in enumerate(depths):
            inputs, outputs = width * 2 ** max(stage - 1, 0), width * 2**stage
            blocks = [
                BasicBlock(inputs if i == 0 else outputs, outputs, 2 if stage and i == 0 else 1) for i in range(depth)
            ]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(outputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v)


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, inputs: int, dim: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, dim, stride, stride)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class ViT(nn.Module):
    """As timm's, images of 8 x 8."""

    def __init__(self, depth: int = 3, dim: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(3, dim, 4, norm=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, dim))
        self.blocks = nn.Sequential(*[Block(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class MiT(nn.Module):
    """As DAFormer's MixVisionTransformer: numbered attributes, a ``ModuleList`` of blocks for each stage."""

    def __init__(self, depths: Sequence[int] = (1, 2), dim: int = 4) -> None:
        super().__init__()
        self.stages = len(depths)
        dims = [dim * 2**stage for stage in range(self.stages)]
        for stage in range(self.stages):
            inputs = 3 if stage == 0 else dims[stage - 1]
            setattr(self, f"patch_embed{stage + 1}", PatchEmbed(inputs, dims[stage], 2, norm=True))
        for stage, depth in enumerate(depths):
            setattr(self, f"block{stage + 1}", nn.ModuleList([Block(dims[stage]) for _ in range(depth)]))
            setattr(self, f"norm{stage + 1}", nn.LayerNorm(dims[stage]))

    def forward(self, x: Tensor) -> "list[Tensor]":
        features = []
        for stage in range(1, self.stages + 1):
            height, width = x.shape[2] // 2, x.shape[3] // 2
            x = getattr(self, f"patch_embed{stage}")(x)
            for block in getattr(self, f"block{stage}"):
                x = block(x)
            x = getattr(self, f"norm{stage}")(x)
            x = x.transpose(1, 2).reshape(x.shape[0], -1, height, width)
            features.append(x)
        return features


class SegFormerHead(nn.Module):
    def __init__(self, dims: Sequence[int], classes: int) -> None:
        super().__init__()
        self.linear_c = nn.ModuleList([nn.Conv2d(dim, 4, 1) for dim in dims])
        self.linear_fuse = nn.Sequential(nn.Conv2d(4 * len(dims), 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.linear_pred = nn.Conv2d(4, classes, 1)

    def forward(self, features: "list[Tensor]") -> Tensor:
        size = features[0].shape[2:]
        mixed = [F.interpolate(linear(x), size=size) for linear, x in zip(self.linear_c, features)]
        return self.linear_pred(self.linear_fuse(torch.cat(mixed, dim=1)))


class SegFormer(nn.Module):
    """A segmenter in mmseg's shape: ``backbone`` and ``decode_head``."""

    def __init__(self, depths: Sequence[int] = (1, 2), classes: int = 3) -> None:
        super().__init__()
        self.backbone = MiT(depths)
        self.decode_head = SegFormerHead([4 * 2**stage for stage in range(len(depths))], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(self.backbone(x))


class CNN(nn.Module):
    """Convolutions, norms and activations side by side in one ``Sequential``, as in VGG."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.PReLU(),
        )
        self.classifier = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def mlp(inputs: int = 5, hidden: int = 6, classes: int = 3) -> nn.Sequential:
    """Three linear layers, the second with a norm."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.LayerNorm(hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


class Wrapped(nn.Module):
    """What ``torch.compile`` returns, seen from its names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)
