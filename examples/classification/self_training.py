"""The host: self-training with masked consistency, as a codebase that knows nothing of CLDA would have it.

The *host EMA*, an exponential moving average of the model that is being trained, labels the clean target images; the
model learns the source's labels, and these pseudo-labels on a strongly changed and masked view of the target, each
weighted by the host EMA's confidence (Hoyer et al., MIC, CVPR 2023; the EMA is called teacher there).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .digits_data import LabelledImages, UnlabelledImages, strong_view


@dataclass(frozen=True)
class SelfTraining:
    """How the host trains.

    Attributes:
        batch: Images per domain and step.
        learning_rate: Of AdamW, at its peak.
        weight_decay: Of AdamW.
        target_weight: Weight of the target's loss once it has risen.
        target_start: Share of the steps left to the source alone; an untrained host EMA's labels are noise.
        target_rise: Share of the steps over which the target's weight then rises.
        ema_decay: Of the host EMA.
        masked: Share of the strong view's patches that are masked out.
    """

    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    target_weight: float = 1.0
    target_start: float = 0.25
    target_rise: float = 0.25
    ema_decay: float = 0.99
    masked: float = 0.3

    def target_weight_at(self, step: int, steps: int) -> float:
        """Return the weight of the target's loss at a step, counted from 0."""
        risen = (step - self.target_start * steps) / max(1.0, self.target_rise * steps)
        return self.target_weight * min(1.0, max(0.0, risen))


@dataclass(frozen=True)
class Batch:
    """One step's data: labelled source, and the same target images clean and strongly changed."""

    images: Tensor
    labels: Tensor
    target: Tensor
    target_strong: Tensor


class Batches:
    """Batch number ``step`` depends on the seed and the step only, so that a resumed run needs no loader state."""

    def __init__(self, source: LabelledImages, target: UnlabelledImages, host: SelfTraining, seed: int) -> None:
        self.source, self.target, self.host, self.seed = source, target, host, seed

    def __getitem__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        size, device = self.host.batch, self.source.images.device
        chosen = torch.randint(len(self.source.images), (size,), generator=generator).to(device)
        target = self.target.images[torch.randint(len(self.target.images), (size,), generator=generator).to(device)]
        strong = strong_view(target, generator, masked=self.host.masked)
        return Batch(self.source.images[chosen], self.source.labels[chosen], target, strong)


class HostEma:
    """The host's exponential moving average of the model's weights, paired by name.

    It stays in training mode, as in MIC: BatchNorm then uses the statistics of the target batch at hand, not running
    ones that are half the source's, which on another domain makes the difference between good and bad labels.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).train().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    def pseudo_labels(self, images: Tensor) -> Tuple[Tensor, Tensor]:
        """Return a class and its probability for each image."""
        with torch.no_grad():
            confidence, labels = self.model(images).softmax(dim=1).max(dim=1)
        return labels, confidence

    def update(self, model: nn.Module) -> None:
        """Move towards ``model``, faster at first, so that the random start is soon forgotten."""
        self.updates += 1
        decay = min(self.decay, 1.0 - 1.0 / (self.updates + 1))
        current = dict(model.named_parameters())
        with torch.no_grad():
            for name, average in self.model.named_parameters():
                average.lerp_(current[name], 1.0 - decay)

    def state_dict(self) -> Dict[str, Any]:
        """Return everything :meth:`load_state_dict` needs to go on bit for bit."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


def forward(model: nn.Module, batch: Batch) -> Tuple[Tensor, Tensor]:
    """Return the logits of the source and of the strong target view, from one pass so that BatchNorm sees both."""
    logits = model(torch.cat([batch.images, batch.target_strong]))
    return logits[: len(batch.images)], logits[len(batch.images) :]


def source_loss(batch: Batch, network: nn.Module) -> Tensor:
    """Return any network's cross-entropy on the source."""
    return F.cross_entropy(network(batch.images), batch.labels)


def self_training_loss(
    source_logits: Tensor, target_logits: Tensor, batch: Batch, host_ema: HostEma, target_weight: float
) -> Tensor:
    """Return cross-entropy on the source plus confidence-weighted cross-entropy against the host EMA's labels."""
    labels, confidence = host_ema.pseudo_labels(batch.target)
    on_target = (confidence * F.cross_entropy(target_logits, labels, reduction="none")).mean()
    return F.cross_entropy(source_logits, batch.labels) + target_weight * on_target


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Warm up over 5% of the steps, then decay to zero by a cosine; it has no state that a resumed run would need."""
    rising = min(1.0, (step + 1) / max(1.0, 0.05 * steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * rising * 0.5 * (1.0 + math.cos(math.pi * step / steps))
