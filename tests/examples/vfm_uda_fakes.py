"""Classes shaped like VFM-UDA's and VFM-UDA++'s, small enough for a test; ``verify`` shows that the real ones are.

Who calls whom, what is saved and how often ``backward()`` is called follow the hosts; networks do not.
"""

from __future__ import annotations

import copy
import types
from typing import Any, Dict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

lightning = pytest.importorskip("lightning", reason="VFM-UDA trains by Lightning; doctests import this module too")

CLASSES, SIZE, IGNORED = 5, 32, 255


def normalize(images: Any) -> Any:
    return (images - 0.45) / 0.22


class FakeNetwork(nn.Module):
    """Images to logits of their size; ``mask_ratio`` counts in training mode only."""

    def __init__(
        self, img_size: int, width: int = 4, num_classes: int = CLASSES, dropout: float = 0.1, norm: bool = False
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=4, padding=1),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Dropout2d(dropout),
        )
        self.out = nn.Conv2d(width, num_classes, 1)

    def forward(self, img: Any, mask_ratio: float = 0.0, return_features: bool = False) -> Any:
        if mask_ratio > 0 and self.training:
            img = img * (torch.rand_like(img[:, :1]) >= mask_ratio)
        features = self.encoder(img)
        logits = F.interpolate(self.out(features), img.shape[2:], mode="bilinear", align_corners=False)
        return (logits, features) if return_features else logits


class FakeUDAVITGeneric(lightning.LightningModule):
    def __init__(
        self,
        batch_size: int,
        img_size: int,
        network: nn.Module,
        lr: float = 0.01,
        ignore_index: int = IGNORED,
        token_mask_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        self.batch_size, self.img_size, self.lr = batch_size, img_size, lr
        self.ignore_index, self.token_mask_ratio = ignore_index, token_mask_ratio
        self.num_classes = network.num_classes
        self.save_hyperparameters()
        self.network = network
        self.network_ema = copy.deepcopy(network)
        for parameter in self.network_ema.parameters():
            parameter.requires_grad = False
        self.automatic_optimization = False

    def random_aug_uda(self, images: Any) -> Any:
        return images * (0.8 + 0.4 * torch.rand(images.shape[0], 3, 1, 1))

    @torch.no_grad()
    def train_dataprep(self, batch: Any) -> Any:
        source, labels, ignored_s, target, labels_t, ignored = batch
        self.network_ema.train()
        for module in self.network_ema.modules():
            if isinstance(module, nn.Dropout2d):
                module.training = False
        pseudo = self.network_ema(normalize(target)).argmax(1)
        mixed = torch.rand(target.shape[0], 1, *target.shape[2:]) < 0.5
        images = self.random_aug_uda(torch.where(mixed, source, target))
        weight = (ignored != 255).float()
        return (
            self.sources(source, self.random_aug_uda(source), labels, ignored_s),
            (target, labels_t, ignored),
            (images, torch.where(mixed, labels.unsqueeze(1), pseudo.unsqueeze(1)), weight),
            (pseudo, weight, weight),
        )

    def sources(self, image: Any, augmented: Any, labels: Any, ignored: Any) -> Any:
        return augmented, labels, ignored

    def get_optimizers(self) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        return optimizer

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.get_optimizers()
        sources, (target, *_), (mixed, mixed_labels, mixed_weight), (pseudo, weight, _) = self.train_dataprep(batch)
        augmented, labels = sources[-3:-1]
        loss = F.cross_entropy(self.network(normalize(augmented)), labels, ignore_index=self.ignore_index)
        self.manual_backward(loss)
        loss_mix = F.cross_entropy(
            self.network(normalize(mixed)), mixed_labels[:, 0], ignore_index=self.ignore_index, reduction="none"
        )
        self.manual_backward((loss_mix * mixed_weight).mean())
        masked = self.network(normalize(self.random_aug_uda(target)), mask_ratio=self.token_mask_ratio)
        self.manual_backward((F.cross_entropy(masked, pseudo, reduction="none") * weight).mean())
        optimizer.step()
        self.lr_schedulers().step()
        self.log("train_loss_source", loss.detach())
        self.average()

    @torch.no_grad()
    def average(self) -> None:
        alpha = min(1 - 1 / (self.global_step + 1), 0.999)
        for averaged, value in zip(self.network_ema.parameters(), self.network.parameters()):
            averaged.data.mul_(alpha).add_((1 - alpha) * value.detach().data)

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(part.parameters())} for part in (self.network.out, self.network.encoder)]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"},
        }


class FakeUDAVITGenericFeatureDistance(FakeUDAVITGeneric):
    pass


class FakeUDA(FakeUDAVITGeneric):
    """Of VFM-UDA++, whose source has the plain images too."""

    def sources(self, image: Any, augmented: Any, labels: Any, ignored: Any) -> Any:
        return image, augmented, labels, ignored


def host_modules(**changed: Any) -> Dict[str, types.ModuleType]:
    """Return the modules of both hosts by name, for ``sys.modules``."""
    contents: Dict[str, Dict[str, Any]] = {
        "datasets": {},
        "datasets.utils": {},
        "datasets.utils.util": {"normalize": normalize},
        "training": {},
        "training.uda_vit": {},
        "training.uda_vit.uda_vit_generic": {"UDAVITGeneric": FakeUDAVITGeneric},
        "training.uda_vit.uda_vit_generic_feature_distance": {
            "UDAVITGenericFeatureDistance": FakeUDAVITGenericFeatureDistance
        },
        "training.uda": {},
        "training.uda.uda": {"UDA": FakeUDA},
        "fake_networks": {"FakeNetwork": FakeNetwork},
    }
    modules = {}
    for name, content in contents.items():
        modules[name] = types.ModuleType(name)
        modules[name].__dict__.update({key: changed.get(key, value) for key, value in content.items()})
    return modules


class Batches(torch.utils.data.Dataset):
    """Source and target images of stripes, in the hosts' order: image, labels, ignored, twice."""

    def __init__(self, count: int = 12) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.rand(count, *shape, generator=generator)  # noqa: E731
        labels = (draw(2, SIZE, SIZE) * CLASSES).long()
        labels[:, 0, :2] = IGNORED
        ignored = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
        ignored[:, -4:] = 255
        self.items = (draw(3, SIZE, SIZE), labels[:, 0], ignored, draw(3, SIZE, SIZE), labels[:, 1], ignored)

    def __len__(self) -> int:
        return len(self.items[0])

    def __getitem__(self, index: int) -> Any:
        return tuple(item[index] for item in self.items)
