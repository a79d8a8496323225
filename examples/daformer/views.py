"""What a round has besides the images that are distilled: a second view of them, and the host's supervised loss."""

from __future__ import annotations

from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .random_state import RandomStream


def changed_colours(images: Tensor, metas: Any, transforms: Any, *, strength: Any, seed: int) -> Tensor:
    """Return the same images with other colours and blurred, position for position, by the host's own functions.

    The host applies them to images that it has mixed with the source; here nothing is mixed. They draw from a random
    stream that starts anew at ``seed``, so that the host's is not touched and a resumed training draws the same.

    Args:
        images: Shape ``(N, 3, H, W)``, normalised as ``metas`` say; not written to.
        metas: The host's, of each image.
        transforms: The host's module ``mmseg.models.utils.dacs_transforms``.
        strength: The host's ``color_jitter_strength``.
        seed: Of what is drawn.
    """
    mean, std = transforms.get_mean_std(metas, images.device)
    parameters = {
        "mix": None,
        "color_jitter": 1.0,  # the host compares it with the probability of leaving the colours alone
        "color_jitter_p": 0.0,
        "color_jitter_s": strength,
        "blur": 1.0,
        "mean": mean[0].unsqueeze(0),
        "std": std[0].unsqueeze(0),
    }
    with torch.no_grad(), RandomStream(seed).active(images.device):
        changed, _ = transforms.strong_transform(parameters, data=images.clone())
    return changed


def source_loss(images: Tensor, labels: Tensor) -> Callable[[nn.Module], Tensor]:
    """Return the host's supervised loss, cross-entropy averaged over all positions, as a function of the network."""

    def loss(network: nn.Module) -> Tensor:
        logits = F.interpolate(network(images), labels.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, labels.squeeze(1), ignore_index=255, reduction="none").mean()

    return loss
