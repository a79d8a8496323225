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
from benchmarks.street.models import MIT_B0, MIT_B3, NARROW, STUDENT, TEACHER, Size, segmenter
from benchmarks.street.pretrained import pretrained_segmenter
from benchmarks.street.scenes import CLASSES, LARGE, SMALL, Frame, Resolution, game_frame, photo_frame
from clda_core.checkpoint import atomically
from examples.huggingface.dacs import HostEma, change_colours, class_mix, segmentation_loss, upsample

BATCH = 4
THRESHOLD = 0.9
EMA_DECAY = 0.99
VIEW_STRENGTH = 0.6  # of the second view's change of colours; the student is trained with half of it
SOURCE_FRAMES, TARGET_FRAMES, EVALUATION_FRAMES = 400, 400, 150


class StreetHost(Host):
    """DACS: supervised on the source, and on frames mixed of source and pseudo-labelled target.

    Args:
        model: To train, on the device on which everything then is.
        seed: Of the batches; the draws are made on the CPU.
        batch: Frames of each domain in a step.
        resolution: Of the frames.
        batch_statistics: Whether BatchNorm labels target frames by their own statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        seed: int,
        *,
        batch: int = BATCH,
        resolution: Resolution = SMALL,
        batch_statistics: bool = True,
    ) -> None:
        self.model, self.seed, self.batch = model, seed, batch
        self.device = next(model.parameters()).device
        self.host_ema = HostEma(model, EMA_DECAY, batch_statistics=batch_statistics)
        self.ema = self.host_ema.model
        self.source, self.labels = frames("source", resolution)
        self.target, _ = frames("target", resolution)
        self.of_classes = class_weights(self.labels, len(CLASSES)).to(self.device)

    def loss(self, step: int, steps: int) -> HostLoss:
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.randint(len(self.source), (self.batch,), generator=rng)
        source, labels = self.source[chosen].to(self.device), self.labels[chosen].to(self.device)
        target = self.target[torch.randint(len(self.target), (self.batch,), generator=rng)].to(self.device)
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


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return weights ``(classes,)`` that grow with a class's rarity as ``share ** -0.5``, 1 on average over pixels."""
    share = torch.bincount(labels.flatten(), minlength=classes).float().clamp(min=1) / labels.numel()
    return share**-0.5 / (share**0.5).sum()


def changed_view(images: Tensor, seed: int) -> Tensor:
    """Return the second view, drawn from a generator of its own: the host's draws do not depend on it."""
    return change_colours(images, torch.Generator().manual_seed(-1 - seed), VIEW_STRENGTH)


class Street(Task):
    name, metric = "street", "mIoU"
    steps, teacher_steps, learning_rate, dense = 400, 600, 2e-3, True
    teacher_size: Size = TEACHER
    student_size: Size = STUDENT
    batch, resolution = BATCH, SMALL
    batch_statistics = True

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def teacher(self, seed: int) -> nn.Module:
        return segmenter(self.teacher_size, 5 * seed + 1).to(self.device)

    def student(self, seed: int) -> nn.Module:
        return segmenter(self.student_size, 5 * seed + 3).to(self.device)

    def host(self, model: nn.Module, seed: int, stream: int) -> Host:
        return StreetHost(
            model,
            5 * seed + stream,
            batch=self.batch,
            resolution=self.resolution,
            batch_statistics=self.batch_statistics,
        )

    def evaluate(self, model: nn.Module) -> Dict[str, float]:
        images, labels = frames("evaluation", self.resolution)
        score = MulticlassJaccardIndex(len(CLASSES), average=None).to(self.device)
        with evaluating(model):
            for batch, truth in zip(images.split(25), labels.split(25)):
                on_device = batch.to(self.device)
                score.update(upsample(model(on_device), on_device).argmax(dim=1), truth.to(self.device))
        each = 100.0 * score.compute()
        return {"mIoU": float(each.mean()), **{f"IoU {name}": float(value) for name, value in zip(CLASSES, each)}}


class StreetNarrow(Street):
    """The same with a student that is narrower than the teacher in every stage."""

    name = "street-narrow"
    student_size, related = NARROW, False

    def teacher_setting(self) -> str:
        return self.setting().replace("-narrow", "")


class StreetLong(Street):
    """The same, trained until the teacher's curve is flat: further training gives a published teacher nothing."""

    name = "street-long"
    steps, teacher_steps, learning_rate = 1000, 2000, 5e-4


class StreetLongNarrow(StreetNarrow, StreetLong):
    """The same with the narrow student."""

    name = "street-long-narrow"


class Pretrained(Street):
    """The same frames and host, with encoders that start from ImageNet: EfficientNet-Lite2 and Lite0."""

    name = "pretrained"
    learning_rate, related = 5e-4, False

    def teacher(self, seed: int) -> nn.Module:
        return pretrained_segmenter("efficientnet-lite2", 5 * seed + 1).to(self.device)

    def student(self, seed: int) -> nn.Module:
        return pretrained_segmenter("efficientnet-lite0", 5 * seed + 3).to(self.device)


class StreetRunning(Street):
    """The street with a host that labels target frames by BatchNorm's running statistics, half of source frames.

    Its labels are poorer, and in a long training they become worse and worse until the teacher collapses.
    """

    name = "street-running"
    batch_statistics = False


class StreetRunningNarrow(StreetNarrow, StreetRunning):
    """The same with the narrow student."""

    name = "street-running-narrow"


class PretrainedRunning(Pretrained, StreetRunning):
    """The same with the pretrained encoders."""

    name = "pretrained-running"


class StreetLarge(Street):
    """The published sizes, MiT-B3 and B0, on 256x512: for a GPU, and slow on a CPU.

    On an H100 whose processor was busy a step of the teacher took 0.44 s and one of the student 0.25 s, so that a run
    stays below ten minutes.
    """

    name = "street-large"
    steps, teacher_steps, learning_rate = 1500, 1200, 5e-4
    teacher_size, student_size, related = MIT_B3, MIT_B0, False
    batch, resolution = 8, LARGE


@lru_cache(maxsize=None)
def frames(split: str, resolution: Resolution = SMALL) -> Tuple[Tensor, Tensor]:
    """Return images ``(N, 3, H, W)`` and labels ``(N, H, W)`` of a split, drawn once and then read from a file."""
    draw, count, seed = _SPLITS[split]
    of_size = "" if resolution == SMALL else f"-{resolution.height}x{resolution.width}"
    path = Path("runs/evidence/frames") / f"{split}-{count}{of_size}.pt"
    if not path.exists():
        drawn = [draw(index, seed, resolution) for index in range(count)]
        images = torch.from_numpy(np.stack([frame.image for frame in drawn]))
        labels = torch.from_numpy(np.stack([frame.labels for frame in drawn]))
        with atomically(path) as unfinished:
            torch.save((images.mul(255).round().to(torch.uint8), labels), unfinished)
    stored, labels = torch.load(path)
    return stored.to(torch.float32).div(255), labels.to(torch.int64)


_SPLITS: Dict[str, Tuple[Callable[[int, int, Resolution], Frame], int, int]] = {
    "source": (game_frame, SOURCE_FRAMES, 0),
    "target": (photo_frame, TARGET_FRAMES, 0),
    "evaluation": (photo_frame, EVALUATION_FRAMES, 1),
}
