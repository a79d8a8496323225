"""Fonts to handwriting: a labelled source rendered from fonts, and an unlabelled target of real handwritten digits.

Both are 8x8 images with values in [0, 1], made the same way: a 32x32 bitmap is counted in blocks of 4x4 pixels (so the
target was made by NIST and UCI, and so the source is made here).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Optional, Tuple, Union

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from torch import Tensor, nn

CLASSES = 10
SIZE = 8
SOURCE_IMAGES = 6000

# Deviation of the smooth displacement that makes printed strokes uneven, in half image widths.
WOBBLE = 0.1

# Named one by one: matplotlib ships symbol fonts too, some without digits and some (cmsy10, cmex10) with other signs in
# their places, which no character map reveals. These are in every matplotlib since 3.1, so the source stays the same.
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmmi10", "cmr10", "cmss10", "cmtt10"),
)

_CANVAS = 64  # glyphs are drawn at twice the bitmap's resolution, so that turning them leaves smooth edges
_BITMAP = 32
_GLYPH_HEIGHT = 56


@dataclass(frozen=True)
class LabelledImages:
    """The source: images ``(N, 1, 8, 8)`` in [0, 1] and their labels ``(N,)``."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class UnlabelledImages:
    """The target as training sees it: images ``(N, 1, 8, 8)`` in [0, 1], and nothing else."""

    images: Tensor


class TargetEvaluation:
    """Holds the target's labels, and answers one question only; no label leaves this object."""

    def __init__(self, images: Tensor, labels: np.ndarray) -> None:
        self.__images = images
        self.__labels = labels

    def accuracy(self, model: nn.Module) -> float:
        """Return a model's accuracy on all target images in percent; the model's modes are restored."""
        training = [module for module in model.modules() if module.training]
        model.eval()
        with torch.no_grad():
            predictions = torch.cat([model(images).argmax(dim=1) for images in self.__images.split(600)])
        for module in training:
            module.training = True
        return 100.0 * float(accuracy_score(self.__labels, predictions.cpu().numpy()))


@lru_cache(maxsize=1)
def glyphs() -> Tensor:
    """Draw each font's ten digits, upright, centred and equally tall: ``(fonts, 10, 64, 64)`` in [0, 1]."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return torch.stack([torch.stack([_glyph(folder / f"{font}.ttf", digit) for digit in range(10)]) for font in FONTS])


def source_digits(seed: int, count: int = SOURCE_IMAGES) -> LabelledImages:
    """Render ``count`` digits in random fonts, stroke widths and poses; equal seeds give equal images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    fonts = torch.randint(len(FONTS), (count,), generator=generator)
    drawn = _restroke(glyphs()[fonts, labels].unsqueeze(1), torch.randint(3, (count,), generator=generator))
    pose = _poses(count, generator, turn=12.0, shear=0.25, low=0.9, high=1.15, shift=0.08)
    wobble = F.interpolate(
        WOBBLE * torch.randn(count, 2, 4, 4, generator=generator),
        [_BITMAP, _BITMAP],
        mode="bicubic",
        align_corners=True,
    )
    bitmaps = _move(drawn, pose, _BITMAP, wobble).gt(0.5).to(torch.float32)
    return LabelledImages(F.avg_pool2d(bitmaps, _BITMAP // SIZE), labels)


def target_digits(device: Union[str, torch.device] = "cpu") -> Tuple[UnlabelledImages, TargetEvaluation]:
    """Load scikit-learn's 1,797 real handwritten digits: the images to adapt to, and the evaluation with the labels."""
    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.float32).div(16.0).unsqueeze(1).to(device)
    return UnlabelledImages(images), TargetEvaluation(images, data.target)


def strong_view(images: Tensor, generator: torch.Generator, *, masked: float = 0.3) -> Tensor:
    """Return another view: moved at random, contrast and noise changed, and a share of the 2x2 patches masked out.

    Args:
        images: Shape ``(N, 1, 8, 8)``.
        generator: On the CPU, so that the views are the same on every device.
        masked: Share of patches set to zero, in [0, 1].
    """
    count = images.shape[0]
    pose = _poses(count, generator, turn=10.0, shear=0.15, low=0.9, high=1.1, shift=0.1)
    contrast = 0.7 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = 0.05 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    kept = torch.rand(count, 1, SIZE // 2, SIZE // 2, generator=generator).ge(masked).to(torch.float32)
    kept = kept.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    moved = _move(images, pose.to(images.device), SIZE)
    return (moved * contrast.to(images.device) + noise.to(images.device)).clamp(0.0, 1.0) * kept.to(images.device)


def _glyph(path: Path, digit: int) -> Tensor:
    font = ImageFont.truetype(str(path), _CANVAS)
    sheet = Image.new("L", (3 * _CANVAS, 3 * _CANVAS), 0)
    ImageDraw.Draw(sheet).text((_CANVAS, _CANVAS), str(digit), fill=255, font=font)
    drawn = sheet.crop(sheet.getbbox())
    width = min(_GLYPH_HEIGHT, round(drawn.width * _GLYPH_HEIGHT / drawn.height))
    canvas = Image.new("L", (_CANVAS, _CANVAS), 0)
    canvas.paste(
        drawn.resize((width, _GLYPH_HEIGHT), Image.BILINEAR), ((_CANVAS - width) // 2, (_CANVAS - _GLYPH_HEIGHT) // 2)
    )
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255.0)


def _restroke(images: Tensor, extra: Tensor) -> Tensor:
    """Thicken each image's strokes by ``extra`` (0, 1 or 2) pixels on either side."""
    out = images.clone()
    for pixels in (1, 2):
        chosen = extra == pixels
        out[chosen] = F.max_pool2d(images[chosen], 2 * pixels + 1, stride=1, padding=pixels)
    return out


def _poses(
    count: int, generator: torch.Generator, *, turn: float, shear: float, low: float, high: float, shift: float
) -> Tensor:
    """Draw affine maps ``(count, 2, 3)`` from output to input coordinates in [-1, 1]; ``turn`` in degrees."""

    def uniform(bottom: float, top: float) -> Tensor:
        return bottom + (top - bottom) * torch.rand(count, generator=generator)

    angle = uniform(-turn, turn) * (math.pi / 180.0)
    slant = uniform(-shear, shear)
    wide, tall = 1.0 / uniform(low, high), 1.0 / uniform(low, high)
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([wide * cos, wide * (slant * cos - sin), uniform(-shift, shift)], dim=1)
    second = torch.stack([tall * sin, tall * (slant * sin + cos), uniform(-shift, shift)], dim=1)
    return torch.stack([first, second], dim=1)


def _move(images: Tensor, poses: Tensor, size: int, wobble: Optional[Tensor] = None) -> Tensor:
    grid = F.affine_grid(poses, [images.shape[0], 1, size, size], align_corners=False)
    if wobble is not None:
        grid = grid + wobble.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, align_corners=False)
