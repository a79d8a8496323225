"""Images with blocks blanked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
"""Pixels of a blanked block, as the host's own block masking has them."""


def blanked(images: Tensor, ratio: float) -> Tensor:
    """Return normalised images with ``ratio`` of their blocks set to the mean colour; every pixel keeps its place."""
    grid = [max(1, round(side / BLOCK)) for side in images.shape[2:]]
    kept = torch.rand(images.shape[0], 1, *grid, device=images.device) >= ratio
    return images * F.interpolate(kept.to(images.dtype), size=images.shape[2:], mode="nearest")
