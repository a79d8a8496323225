"""Capital letters: clean and mostly in sans-serif fonts (source), worn and in other fonts (target)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Tuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIZE = 24
_GLYPH = 48

# All in every matplotlib since 3.1.
SOURCE_FONTS = (
    *(
        f"{family}{style}"
        for family in ("DejaVuSans", "DejaVuSansMono")
        for style in ("", "-Bold", "-Oblique", "-BoldOblique")
    ),
    *("cmss10", "DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneral"),
)
TARGET_FONTS = (
    *("DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmb10", "cmmi10", "cmr10", "cmtt10"),
)


def source_letters(seed: int, count: int) -> Tuple[Tensor, Tensor]:
    """Return clean images ``(N, 1, 24, 24)`` in [0, 1] and labels ``(N,)``."""
    rng = Generator().manual_seed(2 * seed)
    labels = torch.arange(count) % len(LETTERS)
    return _posed(_glyphs(SOURCE_FONTS), labels, rng, turn=6.0, scale=(0.85, 1.1), shift=0.05), labels


def target_letters(seed: int, count: int) -> Tuple[Tensor, Tensor]:
    """Return worn images ``(N, 1, 24, 24)`` in [0, 1] and labels ``(N,)``: stained paper, faded ink, blur and noise."""
    rng = Generator().manual_seed(2 * seed + 1)
    labels = torch.arange(count) % len(LETTERS)
    ink = _posed(_glyphs(TARGET_FONTS), labels, rng, turn=8.0, scale=(0.8, 1.05), shift=0.06)
    fading = F.interpolate(torch.rand(count, 1, 4, 4, generator=rng), SIZE, mode="bicubic", align_corners=True)
    paper = F.interpolate(torch.rand(count, 1, 3, 3, generator=rng), SIZE, mode="bicubic", align_corners=True)
    contrast = 0.7 + 0.3 * torch.rand(count, 1, 1, 1, generator=rng)
    images = contrast * ink * (0.7 + 0.3 * fading.clamp(0, 1)) + 0.15 * paper.clamp(0, 1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.where(torch.rand(count, 1, 1, 1, generator=rng) < 0.5, blurred, images)
    return (images + 0.04 * torch.randn(images.shape, generator=rng)).clamp(0, 1), labels


def strong_view(images: Tensor, rng: Generator, *, masked: float) -> Tensor:
    """Return images moved at random, with other contrast and noise, and a share of their 4x4 patches masked out."""
    count = len(images)
    moved = _moved(images, _poses(count, rng, turn=10.0, scale=(0.9, 1.1), shift=0.08))
    contrast = 0.7 + 0.6 * torch.rand(count, 1, 1, 1, generator=rng)
    kept = torch.rand(count, 1, SIZE // 4, SIZE // 4, generator=rng).ge(masked).float()
    noise = 0.05 * torch.randn(images.shape, generator=rng)
    return (moved * contrast + noise).clamp(0, 1) * F.interpolate(kept, SIZE, mode="nearest")


@lru_cache(maxsize=2)
def _glyphs(fonts: Tuple[str, ...]) -> Tensor:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return torch.stack([torch.stack([_glyph(folder / f"{font}.ttf", letter) for letter in LETTERS]) for font in fonts])


def _glyph(path: Path, letter: str) -> Tensor:
    sheet = Image.new("L", (3 * _GLYPH, 3 * _GLYPH), 0)
    ImageDraw.Draw(sheet).text((_GLYPH, _GLYPH), letter, fill=255, font=ImageFont.truetype(str(path), _GLYPH))
    drawn = sheet.crop(sheet.getbbox())
    side = max(drawn.size)
    canvas = Image.new("L", (side, side), 0)
    canvas.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return torch.from_numpy(np.asarray(canvas.resize((_GLYPH, _GLYPH)), dtype=np.float32) / 255.0)


def _posed(
    glyphs: Tensor, labels: Tensor, rng: Generator, *, turn: float, scale: Tuple[float, float], shift: float
) -> Tensor:
    fonts = torch.randint(len(glyphs), labels.shape, generator=rng)
    return _moved(glyphs[fonts, labels].unsqueeze(1), _poses(len(labels), rng, turn=turn, scale=scale, shift=shift))


def _poses(count: int, rng: Generator, *, turn: float, scale: Tuple[float, float], shift: float) -> Tensor:
    """Return affine maps ``(N, 2, 3)`` from output to input, with angles in degrees and shifts in half widths."""
    angle = torch.deg2rad(turn * (2 * torch.rand(count, generator=rng) - 1))
    zoom = 1.0 / (scale[0] + (scale[1] - scale[0]) * torch.rand(count, generator=rng))
    by = shift * (2 * torch.rand(count, 2, generator=rng) - 1)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    return torch.cat([1.2 * zoom[:, None, None] * rotation, by[:, :, None]], dim=2)


def _moved(images: Tensor, poses: Tensor) -> Tensor:
    grid = F.affine_grid(poses, [len(images), 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
