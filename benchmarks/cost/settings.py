"""Teachers, students and the host whose training step is the unit of cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import benchmarks.cost.others  # noqa: F401  before transformers is imported
from benchmarks.street.models import MIT_B0, MIT_B3, MIT_B5, STUDENT, TEACHER, Size, segmenter
from clda_core import CollaborativeLearner
from examples.classification.digits_models import BIG, SMALL, residual_network
from examples.huggingface.dacs import HostEma, segmentation_loss


@dataclass(frozen=True)
class Setting:
    """A pair of networks and a batch.

    Attributes:
        name: For tables.
        teacher: Makes the big network.
        student: Makes the small one.
        images: Shape of a batch; the host trains on two of them a step.
        classes: Number of classes.
    """

    name: str
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    images: Tuple[int, int, int, int]
    classes: int


def settings(device: torch.device, crop: Optional[int] = None) -> Dict[str, Setting]:
    """Return all settings by name.

    Args:
        device: Decides on the size of the MiT pairs' images.
        crop: That size; 512 on a GPU and 128 on a CPU by default.
    """
    crop = crop or (512 if device.type == "cuda" else 128)
    pairs = [
        Setting(
            "digits",
            lambda: residual_network(BIG, seed=0),
            lambda: residual_network(SMALL, seed=1),
            (64, 1, 8, 8),
            10,
        ),
        _segformers("tiny", _TINY, _TINY, (2, 3, 32, 32), 5),
        _segformers("street", TEACHER, STUDENT, (4, 3, 64, 128), 10),
        _segformers("mit-b3-b0", MIT_B3, MIT_B0, (2, 3, crop, crop), 19),
        _segformers("mit-b5-b0", MIT_B5, MIT_B0, (2, 3, crop, crop), 19),
        _segformers("mit-b5-b3", MIT_B5, MIT_B3, (2, 3, crop, crop), 19),
        Setting("dinov2-l-s", lambda: vit(VIT_L), lambda: vit(VIT_S), (2, 3, crop, crop), 19),
    ]
    return {setting.name: setting for setting in pairs}


_TINY = Size((1, 1, 1, 1), (8, 16, 32, 32), 16)


def _segformers(name: str, big: Size, small: Size, images: Tuple[int, int, int, int], classes: int) -> Setting:
    return Setting(name, lambda: segmenter(big, 0, classes), lambda: segmenter(small, 1, classes), images, classes)


VIT_L, VIT_S = (24, 1024, 16), (12, 384, 6)
"""Blocks, width and heads of DINOv2's ViT-L and ViT-S (Oquab et al., TMLR 2024)."""


class VitSegmenter(nn.Module):
    """DINOv2 with a linear head, as VFM-UDA has it: logits of the images' size.

    Args:
        size: Blocks, width and heads.
        classes: Number of classes.
    """

    def __init__(self, size: Tuple[int, int, int], classes: int) -> None:
        from transformers import Dinov2Config, Dinov2Model

        super().__init__()
        blocks, width, heads = size
        config = Dinov2Config(hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, image_size=518)
        self.backbone = Dinov2Model(config)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone(images).last_hidden_state[:, 1:]
        rows, columns = (side // self.backbone.config.patch_size for side in images.shape[2:])
        logits = self.head(tokens.transpose(1, 2).unflatten(2, (rows, columns)))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)


def vit(size: Tuple[int, int, int], classes: int = 19) -> VitSegmenter:
    """Return a network with weights that are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VitSegmenter(size, classes)


class Host:
    """A self-training step as DAFormer makes it: source and mixed images through the student, a host EMA that labels.

    Its images are noise that is there already: no loading, no augmentation and no mixing, so that the step is as cheap
    as can be and everything else weighs more.

    Args:
        setting: The networks and the batch.
        device: Where to train.
    """

    def __init__(self, setting: Setting, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.teacher = setting.teacher().to(device).eval().requires_grad_(False)
        self.student = setting.student().to(device).train()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        self.ema = HostEma(self.student, 0.99)
        self.source = torch.rand(setting.images, generator=generator).to(device)
        self.mixed = torch.rand(setting.images, generator=generator).to(device)
        positions = setting.images[:1] + (setting.images[2:] if self._dense() else ())
        self.labels = torch.randint(setting.classes, positions, generator=generator).to(device)

    def alone(self) -> None:
        """Make one step of the host's."""
        loss, _ = self._forward()
        self._backward(loss)
        self.optimizer.step()
        self.ema.update(self.student)

    def with_plain_kd(self) -> None:
        """Make one step with knowledge distillation as one writes it by hand."""
        loss, output = self._forward()
        with torch.no_grad():
            target = self.teacher(self.mixed)
        self._backward(loss + plain_kl(output, target))
        self.optimizer.step()
        self.ema.update(self.student)

    def with_learner(self, learner: CollaborativeLearner) -> None:
        """Make one step with a learner of ``teacher`` and ``student``."""
        loss, output = self._forward()
        self._backward(loss + learner.distill(output, self.mixed))
        learner.step(self.optimizer)
        self.ema.update(self.student)

    def _dense(self) -> bool:
        with torch.no_grad():
            return self.teacher(self.source[:1]).dim() == 4

    def _forward(self) -> Tuple[Tensor, Tensor]:
        """Return the loss, and the student's output on the mixed images."""
        with torch.no_grad():
            guessed = self.ema.model(self.mixed)
            if guessed.dim() == 4:
                guessed = F.interpolate(guessed, size=self.mixed.shape[2:], mode="bilinear", align_corners=False)
            pseudo_labels = guessed.argmax(dim=1)
        of_source, of_mixed = self.student(torch.cat([self.source, self.mixed])).chunk(2)
        loss_of = segmentation_loss if of_mixed.dim() == 4 else F.cross_entropy
        return loss_of(of_source, self.labels) + loss_of(of_mixed, pseudo_labels), of_mixed

    def _backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()


def plain_kl(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Return the distillation loss as it is usually composed, with the same value as the package's."""
    q, p = F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(q, p, reduction="sum") / (student.numel() // student.shape[1])


class Forced:
    """A schedule that does what it was told last."""

    def __init__(self) -> None:
        self.round = self.observed = False

    def due(self, step: int) -> bool:
        return self.round

    def observes(self, step: int) -> bool:
        return self.observed

    def strength(self, step: int) -> float:
        return 1.0
