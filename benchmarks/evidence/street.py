"""Game frames to photo-like frames, SegFormer, DACS-style self-training: GTA to Cityscapes in small."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Callable, Dict, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from benchmarks.evidence.task import Host, HostLoss, Task, evaluating
from benchmarks.street.models import NARROW, STUDENT, TEACHER, Size, segmenter
from benchmarks.street.scenes import CLASSES, Frame, game_frame, photo_frame
from benchmarks.street.self_training import (
    HostEma,
    change_colours,
    class_mix,
    class_weights,
    segmentation_loss,
    upsample,
)
from clda_core.checkpoint import atomically

BATCH = 4
THRESHOLD = 0.9
EMA_DECAY = 0.99
VIEW_STRENGTH = 0.6  # of the second view's change of colours; the student is trained with half of it
SOURCE_FRAMES, TARGET_FRAMES, EVALUATION_FRAMES = 400, 400, 150


class StreetHost(Host):
    """DACS: supervised on the source, and on frames mixed of source and pseudo-labelled target."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.seed = model, seed
        self.host_ema = HostEma(model, EMA_DECAY)
        self.ema = self.host_ema.model
        self.source, self.labels = frames("source")
        self.target, _ = frames("target")
        self.of_classes = class_weights(self.labels, len(CLASSES))

    def loss(self, step: int, steps: int) -> HostLoss:
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.randint(len(self.source), (BATCH,), generator=rng)
        source, labels = self.source[chosen], self.labels[chosen]
        target = self.target[torch.randint(len(self.target), (BATCH,), generator=rng)]
        pseudo_labels, weight = self.host_ema.pseudo_labels(target, THRESHOLD)
        mixed, mixed_labels, weights = class_mix(source, labels, target, pseudo_labels, weight, rng)
        of_source, of_mixed = self.model(torch.cat([source, change_colours(mixed, rng)])).chunk(2)
        loss = self._loss(of_source, labels) + self._loss(of_mixed, mixed_labels, weights)
        return HostLoss(
            loss,
            output=lambda: self.model(change_colours(target, rng)),
            images=target,
            view=changed_view(target, self.seed * 1_000_003 + step),
            source=source,
            source_loss=lambda model: self._loss(model(source), labels),
        )

    def after_step(self) -> None:
        self.host_ema.update(self.model)

    def _loss(self, logits: Tensor, labels: Tensor, weight: Optional[Tensor] = None) -> Tensor:
        return segmentation_loss(logits, labels, weight, of_classes=self.of_classes)


def changed_view(images: Tensor, seed: int) -> Tensor:
    """Return the second view, drawn from a generator of its own: the host's draws do not depend on it."""
    return change_colours(images, torch.Generator().manual_seed(-1 - seed), VIEW_STRENGTH)


class Street(Task):
    name, metric = "street", "mIoU"
    steps, teacher_steps, learning_rate, dense = 400, 600, 2e-3, True
    student_size: Size = STUDENT

    def teacher(self, seed: int) -> nn.Module:
        return segmenter(TEACHER, 5 * seed + 1)

    def student(self, seed: int) -> nn.Module:
        return segmenter(self.student_size, 5 * seed + 3)

    def host(self, model: nn.Module, seed: int, stream: int) -> Host:
        return StreetHost(model, 5 * seed + stream)

    def evaluate(self, model: nn.Module) -> Dict[str, float]:
        images, labels = frames("evaluation")
        score = MulticlassJaccardIndex(len(CLASSES), average=None)
        with evaluating(model):
            for batch, truth in zip(images.split(25), labels.split(25)):
                score.update(upsample(model(batch), batch).argmax(dim=1), truth)
        each = 100.0 * score.compute()
        return {"mIoU": float(each.mean()), **{f"IoU {name}": float(value) for name, value in zip(CLASSES, each)}}


class StreetNarrow(Street):
    """The same with a student that is narrower than the teacher in every stage."""

    name = "street-narrow"
    student_size, related = NARROW, False

    def teacher_setting(self) -> str:
        return f"{Street.name}-{self.teacher_steps}-{self.steps}"


@lru_cache(maxsize=None)
def frames(split: str) -> Tuple[Tensor, Tensor]:
    """Return images ``(N, 3, H, W)`` and labels ``(N, H, W)`` of a split, drawn once and then read from a file."""
    draw, count, seed = _SPLITS[split]
    path = Path("runs/evidence/frames") / f"{split}-{count}.pt"
    if not path.exists():
        drawn = [draw(index, seed) for index in range(count)]
        images = torch.from_numpy(np.stack([frame.image for frame in drawn]))
        labels = torch.from_numpy(np.stack([frame.labels for frame in drawn]))
        with atomically(path) as unfinished:
            torch.save((images.mul(255).round().to(torch.uint8), labels), unfinished)
    stored, labels = torch.load(path)
    return stored.to(torch.float32).div(255), labels.to(torch.int64)


_SPLITS: Dict[str, Tuple[Callable[[int, int], Frame], int, int]] = {
    "source": (game_frame, SOURCE_FRAMES, 0),
    "target": (photo_frame, TARGET_FRAMES, 0),
    "evaluation": (photo_frame, EVALUATION_FRAMES, 1),
}
