"""DACS-style self-training, as DAFormer and MIC do it: what a host of this kind is made of; it knows nothing of CLDA.

The *host EMA* labels the clean target images; half of a source image's classes are pasted onto a target image
(ClassMix, Olsson et al., WACV 2021), the colours are changed, and the network learns the mixed labels, those of the
target weighted by the share of confident pixels (Tranheden et al., DACS, WACV 2021). Networks take images ``(N, 3, H,
W)`` in [0, 1] and return logits, on a coarser grid if they like.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any, Dict, Iterator, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = 255


class HostEma:
    """The host's exponential moving average of the network that it trains, paired by name.

    Args:
        model: To average.
        decay: Of the average.
        batch_statistics: Whether BatchNorm labels a target batch by its own statistics, as in DAFormer and MIC. The
            running ones are half of source images: with them the labels of a long training become worse and worse.
    """

    def __init__(self, model: nn.Module, decay: float, *, batch_statistics: bool = True) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.batch_statistics = batch_statistics
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards ``model``, faster at first; BatchNorm statistics are copied."""
        self.updates += 1
        weight = 1.0 - min(self.decay, 1.0 - 1.0 / (self.updates + 1))
        current = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                average.lerp_(current[name], weight if "running_" not in name else 1.0)

    @torch.no_grad()
    def pseudo_labels(self, images: Tensor, threshold: float) -> Tuple[Tensor, Tensor]:
        """Return labels ``(N, H, W)`` and one weight per image, the share of pixels above the threshold."""
        with by_batch_statistics(self.model) if self.batch_statistics else contextlib.nullcontext():
            logits = self.model(images)
        probability, labels = upsample(logits, images).softmax(dim=1).max(dim=1)
        return labels, (probability > threshold).float().mean(dim=(1, 2))

    def state_dict(self) -> Dict[str, Any]:
        """Return everything that :meth:`load_state_dict` needs to go on bit for bit."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


@contextlib.contextmanager
def by_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let every BatchNorm normalise by the batch at hand, and leave its running statistics alone."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracked) in zip(norms, before):
            norm.training, norm.track_running_stats = training, tracked


def upsample(logits: Tensor, images: Tensor) -> Tensor:
    """Return logits on the images' grid."""
    return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)


def segmentation_loss(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, *, of_classes: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy over pixels, weighted by ``weight`` ``(N, H, W)`` and by class ``(C,)``."""
    upsampled = upsample(logits, labels.unsqueeze(1))
    loss = F.cross_entropy(upsampled, labels, weight=of_classes, reduction="none", ignore_index=IGNORE)
    return (loss if weight is None else loss * weight).mean()


def class_mix(
    source: Tensor,
    source_labels: Tensor,
    target: Tensor,
    target_labels: Tensor,
    target_weight: Tensor,
    rng: torch.Generator,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Paste half of each source image's classes onto a target image; return images, labels and pixel weights."""
    images, labels = target.clone(), target_labels.clone()
    weights = target_weight[:, None, None].expand(labels.shape).clone()
    for index, of_source in enumerate(source_labels):
        present = torch.unique(of_source)
        order = torch.randperm(len(present), generator=rng).to(present.device)
        chosen = present[order[: (len(present) + 1) // 2]]
        pasted = torch.isin(of_source, chosen)
        images[index] = torch.where(pasted, source[index], images[index])
        labels[index] = torch.where(pasted, of_source, labels[index])
        weights[index] = torch.where(pasted, torch.ones_like(weights[index]), weights[index])
    return images, labels, weights


def change_colours(images: Tensor, rng: torch.Generator, strength: float = 0.3) -> Tensor:
    """Change lightness, contrast and colour balance of each image, and blur about half of them.

    The generator is on the CPU, so that the draws are the same on every device.
    """
    count = len(images)
    draw = (2 * torch.rand(count, 5, 1, 1, generator=rng) - 1).to(images.device)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (images - mean) * (1 + strength * draw[:, :1]) + mean * (1 + strength * draw[:, 1:2])
    images = images * (1 + 0.5 * strength * draw[:, 2:5])
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.where((torch.rand(count, 1, 1, 1, generator=rng) < 0.5).to(images.device), blurred, images)
    return images.clamp(0, 1)
