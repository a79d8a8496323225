"""The host of the classification benchmarks: the self-training of the examples."""

from __future__ import annotations

from abc import abstractmethod

import torch.nn.functional as F
from torch import nn

from benchmarks.evidence.task import Host, HostLoss
from examples.classification.self_training import Batch, HostEma, SelfTraining, forward, self_training_loss


class SelfTrainingHost(Host):
    """Trains one classifier on what :meth:`batch` gives."""

    def __init__(self, model: nn.Module, settings: SelfTraining) -> None:
        self.model, self.settings = model, settings
        self.host_ema = HostEma(model, settings.ema_decay)
        self.ema = self.host_ema.model

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """Return the images of a step, counted from 0."""

    def loss(self, step: int, steps: int) -> HostLoss:
        batch = self.batch(step)
        source_logits, target_logits = forward(self.model, batch)
        weight = self.settings.target_weight_at(step, steps)
        return HostLoss(
            self_training_loss(source_logits, target_logits, batch, self.host_ema, weight),
            output=lambda: target_logits,
            images=batch.target,
            view=batch.target_strong,
            source=batch.images,
            source_loss=lambda model: F.cross_entropy(model(batch.images), batch.labels),
        )

    def after_step(self) -> None:
        self.host_ema.update(self.model)
