"""Networks by name or folder as they are on the Hugging Face hub: images in [0, 1] to logits of the 19 classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoModelForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.image_processing_base import ImageProcessingMixin

from clda_core.errors import problem

from .segmentation_data import CLASSES

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


class Segmenter(nn.Module):
    """A segmentation network of transformers with its normalisation.

    Args:
        model: Returns an output with ``logits``, on any grid.
        processor: The settings of its image processor, of which mean and standard deviation are used.
    """

    def __init__(self, model: nn.Module, processor: Dict[str, Any]) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(processor[name]).view(3, 1, 1), persistent=False)
        patch = getattr(getattr(model.config, "backbone_config", None) or model.config, "patch_size", 1)
        self.patch = patch if isinstance(patch, int) else 1

    def forward(self, images: Tensor) -> Tensor:
        size = [max(1, round(length / self.patch)) * self.patch for length in images.shape[2:]]
        if size != list(images.shape[2:]):  # of patches of 14 pixels, those cut off at the edge would be left out
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        return self.model(pixel_values=(images - self.image_mean) / self.image_std).logits

    def save(self, folder: Path) -> None:
        """Write a folder from which :func:`load` and ``AutoModelForSemanticSegmentation`` read the network."""
        self.model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(self.processor, indent=2), encoding="utf-8")


def load(name: str, role: str, *, trained: bool) -> Segmenter:
    """Return a network in float32, with a new head where it has none for our classes.

    A segmentation network (SegFormer, UPerNet, DPT, BEiT) is taken as it is, a backbone (DINOv2, ConvNeXt, Swin) gets
    the head of UPerNet on four of its stages.

    Args:
        name: On the hub, or a folder that ``save_pretrained`` wrote.
        role: For messages: "teacher" or "student".
        trained: Whether the head must be there and trained, as a teacher's must.

    Raises:
        CldaError: If it cannot be read, gives no segmentation, or has other classes or an untrained head where it must
            be trained.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise problem(
            f"the {role} {name} cannot be read",
            expected="a name on the Hugging Face hub, or a folder with config.json and the weights",
            received=str(error).strip().partition("\n")[0],
            fix="check the name, or pass a folder that save_pretrained() wrote",
        ) from error
    segments, is_backbone = (
        type(config) in mapping for mapping in (MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING, MODEL_FOR_BACKBONE_MAPPING)
    )
    if not (segments or is_backbone):
        raise problem(
            f"the {role} {name} gives no logits per pixel",
            expected="a network of AutoModelForSemanticSegmentation, or a backbone of AutoBackbone",
            received=f"a {config.model_type}",
            fix="pass a SegFormer, UPerNet, DPT or BEiT, or a backbone like DINOv2, ConvNeXt or Swin",
        )
    if trained and (not segments or config.num_labels != len(CLASSES)):
        raise problem(
            f"the {role} {name} is not trained on our classes",
            expected=f"a segmentation network with {len(CLASSES)} classes, as the student gets: {', '.join(CLASSES)}",
            received=f"a {config.model_type} with {config.num_labels} labels" if segments else "a backbone, no head",
            fix="train it first: --teacher-only",
        )
    model, new = _segmentation_network(name, config) if segments else (_with_head(name, config), set())
    if trained and new:
        raise problem(
            f"the {role} {name} is not trained",
            expected="the weights of the whole network",
            received=f"none, or of another shape, for {', '.join(sorted(new)[:4])}",
            fix="train it first: --teacher-only, and pass the folder that it wrote",
        )
    return Segmenter(model.float(), _processor(name))


def _segmentation_network(name: str, config: Any) -> Tuple[nn.Module, set]:
    _set_classes(config)
    model, info = AutoModelForSemanticSegmentation.from_pretrained(
        name, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    mismatched = {each if isinstance(each, str) else each[0] for each in info["mismatched_keys"]}
    return model, mismatched | set(info["missing_keys"])


def _with_head(name: str, config: Any) -> nn.Module:
    stages = config.stage_names[1:]
    chosen = [stages[round(len(stages) * quarter / 4) - 1] for quarter in (1, 2, 3, 4)]
    config = AutoConfig.from_pretrained(name, out_features=chosen)
    backbone = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(name, config=config)
    whole = UperNetConfig(backbone_config=config)
    _set_classes(whole)
    model = UperNetForSemanticSegmentation(whole)
    model.backbone = backbone
    return model


def _set_classes(config: Any) -> None:
    config.id2label = dict(enumerate(CLASSES))
    config.label2id = {label: number for number, label in enumerate(CLASSES)}
    if hasattr(config, "use_auxiliary_head"):
        config.use_auxiliary_head = False  # its logits are of no use here, and DDP waits for its gradients


def _processor(name: str) -> Dict[str, Any]:
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        settings = {}
    return {"image_processor_type": "SegformerImageProcessor", **_IMAGENET, **settings}


def check(network: Segmenter, role: str, crop: int, *, trains: bool) -> None:
    """Run the network once in eval mode, and freeze what its logits do not depend on, for which DDP would wait.

    Raises:
        CldaError: If it cannot be run on crops of this size, or returns something else than logits of our classes.
    """
    was_training, images = network.training, next(network.parameters()).new_zeros(1, 3, crop, crop)
    network.eval()
    try:
        with torch.set_grad_enabled(trains):
            logits = network(images)
    except Exception as error:
        raise problem(
            f"the {role} cannot be run",
            expected=f"logits of images of {crop}x{crop}",
            received=f"{type(error).__name__}: {error}",
            fix="pass a --crop that the network takes, or another network",
        ) from error
    finally:
        network.train(was_training)
    if not isinstance(logits, Tensor) or logits.dim() != 4 or logits.shape[1] != len(CLASSES):
        raise problem(
            f"the {role} returns no logits of our classes",
            expected=f"a tensor (N, {len(CLASSES)}, H, W) as the output's logits",
            received=str(list(logits.shape)) if isinstance(logits, Tensor) else type(logits).__name__,
            fix="pass a semantic segmentation network with one logit per class and pixel",
        )
    if trains:
        logits.sum().backward()
        for parameter in network.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
            parameter.grad = None
