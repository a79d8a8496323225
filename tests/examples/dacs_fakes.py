"""Classes shaped like DAFormer's and MIC's, small enough to train in a test; ``verify`` shows that the real ones are.

Signatures, who calls whom, what is saved and how often ``backward()`` is called follow the hosts; networks do not.
"""

from __future__ import annotations

import copy
import logging
import os
import types
from typing import Any, Dict, List, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 5


def resize(images: Any, size: Any) -> Any:
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False)


class FakeHead(nn.Module):
    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)

    def forward(self, inputs: Any) -> Any:
        return self.conv_seg(self.dropout(F.relu(self.norm(inputs))))

    def forward_test(self, inputs: Any, img_metas: Any, test_cfg: Any) -> Any:
        return self.forward(inputs)


class FakeEncoderDecoder(nn.Module):
    """Called by its methods, never as a module, like mmseg's."""

    def __init__(self, *, width: int, blocks: int, num_classes: int) -> None:
        super().__init__()
        layers: List[nn.Module] = [nn.Conv2d(3, width, 3, stride=4, padding=1)]
        for _ in range(blocks):
            layers.append(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()))
        self.backbone = nn.Sequential(*layers)
        self.decode_head = FakeHead(width, num_classes)
        self.test_cfg: Dict[str, Any] = {}

    def extract_feat(self, img: Any) -> Any:
        return self.backbone(img)

    def _decode_head_forward_test(self, x: Any, img_metas: Any) -> Any:
        return self.decode_head.forward_test(x, img_metas, self.test_cfg)

    def encode_decode(self, img: Any, img_metas: Any) -> Any:
        out = self._decode_head_forward_test(self.extract_feat(img), img_metas)
        return resize(out, img.shape[2:])

    def forward_train(
        self, img: Any, img_metas: Any, gt_semantic_seg: Any, seg_weight: Any = None, return_feat: bool = False
    ) -> Dict[str, Any]:
        features = self.extract_feat(img)
        losses: Dict[str, Any] = {"features": features} if return_feat else {}
        logits = resize(self.decode_head.forward(features), img.shape[2:])
        loss = F.cross_entropy(logits, gt_semantic_seg.squeeze(1), reduction="none", ignore_index=255)
        losses["decode.loss_seg"] = (loss if seg_weight is None else loss * seg_weight).mean()
        return losses


class FakeHRDAHead(FakeHead):
    """Fuses a context view with a detail crop, whose place it is told before each training forward pass."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, num_classes)
        self.hr_crop_box: Any = None

    def set_hr_crop_box(self, boxes: Any) -> None:
        self.hr_crop_box = boxes

    def reset_crop(self) -> None:
        del self.hr_crop_box
        self.hr_crop_box = None

    def forward(self, inputs: Any) -> Any:
        context, detail = (super(FakeHRDAHead, self).forward(features) for features in inputs)
        context = resize(context, [2 * side for side in context.shape[2:]])
        fused = context.clone()
        if self.hr_crop_box is None:
            fused = fused + detail
        else:
            top, bottom, left, right = (edge // 4 for edge in self.hr_crop_box)
            fused[:, :, top:bottom, left:right] += detail
        return fused, context, detail

    def forward_test(self, inputs: Any, img_metas: Any, test_cfg: Any) -> Any:
        return self.forward(inputs)[0]


class FakeHRDAEncoderDecoder(FakeEncoderDecoder):
    last_train_crop_box: Dict[int, Any] = {}

    def __init__(self, *, width: int, blocks: int, num_classes: int) -> None:
        super().__init__(width=width, blocks=blocks, num_classes=num_classes)
        self.decode_head = FakeHRDAHead(width, num_classes)
        self.seen_crops: List[Any] = []

    def encode_decode(self, img: Any, img_metas: Any, upscale_pred: bool = True) -> Any:
        half = resize(img, [side // 2 for side in img.shape[2:]])
        out = self._decode_head_forward_test([self.backbone(half), self.backbone(img)], img_metas)
        return resize(out, img.shape[2:]) if upscale_pred else out

    def _forward_train_features(self, img: Any) -> Any:
        half = resize(img, [side // 2 for side in img.shape[2:]])
        height, width = img.shape[-2] // 2, img.shape[-1] // 2
        top, left = 4 * np.random.randint(height // 4 + 1), 4 * np.random.randint(width // 4 + 1)
        box = (top, top + height, left, left + width)
        FakeHRDAEncoderDecoder.last_train_crop_box[1] = box
        self.decode_head.set_hr_crop_box(box)
        self.seen_crops.append(box)
        return [self.backbone(half), self.backbone(img[:, :, box[0] : box[1], box[2] : box[3]])], None

    def forward_train(
        self,
        img: Any,
        img_metas: Any,
        gt_semantic_seg: Any,
        seg_weight: Any = None,
        return_feat: bool = False,
        return_logits: bool = False,
    ) -> Dict[str, Any]:
        features, _ = self._forward_train_features(img)
        logits = resize(self.decode_head.forward(features)[0], img.shape[2:])
        self.decode_head.reset_crop()
        loss = F.cross_entropy(logits, gt_semantic_seg.squeeze(1), reduction="none", ignore_index=255)
        losses: Dict[str, Any] = {"features": features} if return_feat else {}
        losses["decode.loss_seg"] = (loss if seg_weight is None else loss * seg_weight).mean()
        return losses


def build_segmentor(config: Any) -> nn.Module:
    kinds = {"EncoderDecoder": FakeEncoderDecoder, "HRDAEncoderDecoder": FakeHRDAEncoderDecoder}
    assert config["pretrained"] is None or not config["pretrained"].startswith("http")
    head = config["decode_head"]
    return kinds[config["type"]](num_classes=head["num_classes"], **config["backbone"])


def model_config(*, width: int = 4, blocks: int = 1, num_classes: int = CLASSES, kind: str = "EncoderDecoder") -> Any:
    head = {"type": "HRDAHead" if kind.startswith("HRDA") else "DAFormerHead", "num_classes": num_classes}
    return {
        "type": kind,
        "pretrained": None,
        "backbone": {"width": width, "blocks": blocks},
        "decode_head": head,
        "train_cfg": {},
    }


def get_module(module: Any) -> Any:
    return getattr(module, "module", module)


class FakeUDADecorator(nn.Module):
    def __init__(self, **cfg: Any) -> None:
        super().__init__()
        self.model = build_segmentor(copy.deepcopy(cfg["model"]))
        self.train_cfg = cfg["model"]["train_cfg"]
        self.num_classes = cfg["model"]["decode_head"]["num_classes"]

    def get_model(self) -> Any:
        return get_module(self.model)

    def forward(self, img: Any, img_metas: Any, return_loss: bool = True, **kwargs: Any) -> Any:
        return self.forward_train(img, img_metas, **kwargs)

    @staticmethod
    def _parse_losses(losses: Dict[str, Any]) -> Any:
        loss = sum(value for key, value in losses.items() if "loss" in key)
        return loss, {**{key: value.item() for key, value in losses.items()}, "loss": loss.item()}


class FakeDACS(FakeUDADecorator):
    """DAFormer's: source, feature distance against an ImageNet model, mixed images with the host EMA's labels."""

    def __init__(self, **cfg: Any) -> None:
        super().__init__(**cfg)
        self.local_iter = 0
        self.alpha = cfg["alpha"]
        self.color_jitter_s = cfg["color_jitter_strength"]
        self.psweight_ignore_top = cfg["pseudo_weight_ignore_top"]
        self.psweight_ignore_bottom = cfg["pseudo_weight_ignore_bottom"]
        self.ema_model = build_segmentor(copy.deepcopy(cfg["model"]))
        self.imnet_model = build_segmentor(copy.deepcopy(cfg["model"]))

    def train_step(self, data_batch: Any, optimizer: Any, **kwargs: Any) -> Dict[str, Any]:
        optimizer.zero_grad()
        log_vars = self(**data_batch)
        optimizer.step()
        log_vars.pop("loss", None)
        return {"log_vars": log_vars, "num_samples": len(data_batch["img_metas"])}

    def forward_train(
        self, img: Any, img_metas: Any, gt_semantic_seg: Any, target_img: Any, target_img_metas: Any
    ) -> Dict[str, Any]:
        return self._train(img, img_metas, gt_semantic_seg, target_img, target_img_metas)

    def _train(self, img: Any, img_metas: Any, gt: Any, target_img: Any, target_img_metas: Any) -> Dict[str, Any]:
        self._update_ema(self.local_iter)
        clean = self.get_model().forward_train(img, img_metas, gt, return_feat=True)
        features = clean.pop("features")
        loss, log_vars = self._parse_losses(clean)
        loss.backward(retain_graph=True)
        with torch.no_grad():
            of_imagenet = self._features(get_module(self.imnet_model).eval(), img)
        (0.005 * (self._first(features) - of_imagenet).norm(dim=1).mean()).backward()
        logits = get_module(self.ema_model).encode_decode(target_img, target_img_metas)
        confidence, labels = torch.softmax(logits.detach(), dim=1).max(dim=1)
        weight = torch.ones_like(confidence) * float((confidence > 0.3).float().mean())
        weight[:, : self.psweight_ignore_top] = 0
        use_source = torch.rand(len(img), 1, *img.shape[2:]) > 0.5
        mixed = torch.where(use_source, img, target_img)
        mixed_labels = torch.where(use_source, gt, labels.unsqueeze(1))
        losses = self.get_model().forward_train(mixed, img_metas, mixed_labels, weight, return_feat=False)
        loss, mixed_log = self._parse_losses({f"mix.{key}": value for key, value in losses.items()})
        log_vars.update(mixed_log)
        loss.backward()
        self.mixed_for_tests = mixed
        self.local_iter += 1
        return log_vars

    def _features(self, model: Any, img: Any) -> Any:
        multi_resolution = hasattr(model, "_forward_train_features")
        return self._first(model._forward_train_features(img)[0] if multi_resolution else model.extract_feat(img))

    @staticmethod
    def _first(features: Any) -> Any:
        return features[0] if isinstance(features, list) else features

    def _update_ema(self, iteration: int) -> None:
        decay = 0.0 if iteration == 0 else min(1 - 1 / (iteration + 1), self.alpha)
        for average, parameter in zip(get_module(self.ema_model).parameters(), self.get_model().parameters()):
            average.detach_()
            average.data[:] = decay * average.data + (1 - decay) * parameter.data


class FakeMICDACS(FakeDACS):
    """MIC's: as DAFormer's, with masked target images, rare classes and a mask of valid pseudo-labels."""

    def __init__(self, **cfg: Any) -> None:
        super().__init__(**cfg)
        self.source_only = cfg.get("source_only", False)
        self.mask_mode = cfg.get("mask_mode", "separatetrgaug")

    def forward_train(
        self,
        img: Any,
        img_metas: Any,
        gt_semantic_seg: Any,
        target_img: Any,
        target_img_metas: Any,
        rare_class: Any = None,
        valid_pseudo_mask: Any = None,
    ) -> Dict[str, Any]:
        log_vars = self._train(img, img_metas, gt_semantic_seg, target_img, target_img_metas)
        labels = get_module(self.ema_model).encode_decode(target_img, target_img_metas).argmax(dim=1, keepdim=True)
        masked = target_img * (torch.rand(len(target_img), 1, *target_img.shape[2:]) > 0.5)
        self.masked_for_tests = masked
        weight = None if valid_pseudo_mask is None else valid_pseudo_mask.squeeze(1).float()
        losses = self.get_model().forward_train(masked, img_metas, labels.detach(), seg_weight=weight)
        loss, masked_log = self._parse_losses({f"masked.{key}": value for key, value in losses.items()})
        loss.backward()
        return {**log_vars, **masked_log}


class FakeCheckpointHook:
    """mmcv's, by iterations only."""

    def __init__(self, interval: int = -1, by_epoch: bool = True, max_keep_ckpts: int = -1, **kwargs: Any) -> None:
        self.interval, self.max_keep_ckpts, self.args = interval, max_keep_ckpts, kwargs
        self.out_dir: Optional[str] = None

    def before_run(self, runner: Any) -> None:
        self.out_dir = self.out_dir or runner.work_dir

    def after_train_iter(self, runner: Any) -> None:
        if (runner.iter + 1) % self.interval == 0:
            self._save_checkpoint(runner)

    def _save_checkpoint(self, runner: Any) -> None:
        runner.save_checkpoint(self.out_dir)
        step = runner.iter + 1 - self.max_keep_ckpts * self.interval
        if self.max_keep_ckpts > 0 and step > 0:
            os.remove(os.path.join(self.out_dir, f"iter_{step}.pth"))


class FakeDataParallel(nn.Module):
    """mmcv's wrapper for one device."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def train_step(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module.train_step(*inputs, **kwargs)


class FakeRunner:
    """mmcv's ``IterBasedRunner``: trains, calls hooks, saves and resumes; resuming forgets ``local_iter``."""

    rank = 0

    def __init__(self, dacs: nn.Module, hooks: List[Any], work_dir: str, *, lr: float = 0.05) -> None:
        # As in the host, the optimizer holds every parameter of the decorator.
        self.optimizer = torch.optim.AdamW(dacs.parameters(), lr=lr)
        self.model = FakeDataParallel(dacs)
        self.hooks, self.work_dir, self.iter = hooks, work_dir, 0
        self.logger = logging.getLogger("fake-host")
        self.logs: List[Dict[str, float]] = []

    def run(self, batches: List[Dict[str, Any]]) -> List[Dict[str, float]]:
        for hook in self.hooks:
            hook.before_run(self)
        return self.go_on(batches)

    def go_on(self, batches: List[Dict[str, Any]]) -> List[Dict[str, float]]:
        for batch in batches:
            self.model.train()
            self.logs.append(self.model.train_step(batch, self.optimizer)["log_vars"])
            for hook in self.hooks:
                hook.after_train_iter(self)
            self.iter += 1
        return self.logs

    def save_checkpoint(self, out_dir: str) -> None:
        checkpoint = {
            "meta": {"iter": self.iter + 1},
            "state_dict": self.model.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(checkpoint, os.path.join(out_dir, f"iter_{self.iter + 1}.pth"))

    def resume(self, path: str) -> None:
        checkpoint = torch.load(path)
        self.model.module.load_state_dict(checkpoint["state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.iter = checkpoint["meta"]["iter"]


def batches(count: int, *, size: int = 32, seed: int = 0, mic: bool = False) -> List[Dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    result: List[Dict[str, Any]] = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (2, 1, size // 8, size // 8), generator=generator)
        labels = labels.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        metas = [{"img_norm_cfg": {"mean": [120.0, 110.0, 100.0], "std": [60.0, 50.0, 40.0]}}] * 2
        images = labels.float() - 2 + 0.3 * torch.randn(2, 3, size, size, generator=generator)
        batch: Dict[str, Any] = {
            "img": images,
            "img_metas": metas,
            "gt_semantic_seg": labels,
            "target_img": images.flip(0) + 0.5,
            "target_img_metas": metas,
        }
        if mic:
            batch["rare_class"] = [0, 1]
            batch["valid_pseudo_mask"] = torch.ones(2, 1, size, size, dtype=torch.long)
        result.append(batch)
    return result


def get_mean_std(img_metas: Any, dev: Any) -> Any:
    norms = [meta["img_norm_cfg"] for meta in img_metas]
    mean, std = (torch.stack([torch.as_tensor(norm[key], device=dev) for norm in norms]) for key in ("mean", "std"))
    return mean.view(-1, 3, 1, 1), std.view(-1, 3, 1, 1)


def strong_transform(param: Dict[str, Any], data: Any = None, target: Any = None) -> Any:
    """The host's without its mixing: it writes to ``data``, and draws from torch for colours, from NumPy for blur."""
    assert param["mix"] is None
    if param["color_jitter"] > param["color_jitter_p"]:
        data.mul_(param["std"]).add_(param["mean"]).div_(255.0)
        strength = param["color_jitter_s"]
        data = data * (1 + strength * (2 * torch.rand(len(data), 3, 1, 1) - 1))
        data.mul_(255.0).sub_(param["mean"]).div_(param["std"])
    if param["blur"] > 0.5:
        data = torch.lerp(data, F.avg_pool2d(data, 3, 1, 1), np.random.uniform(0.15, 0.9))
    return data, target


class Registry:
    """mmcv's, as far as a class is registered under its name."""

    def __init__(self) -> None:
        self.classes: Dict[str, Any] = {}

    def register_module(self) -> Any:
        def register(cls: Any) -> Any:
            self.classes[cls.__name__] = cls
            return cls

        return register


def host_modules(dacs: Any, configs: Dict[str, Any]) -> Dict[str, Any]:
    """Return modules by the names under which a host has them, for ``sys.modules``."""
    names = [
        "mmcv",
        "mmcv.runner",
        "mmcv.runner.hooks",
        "mmseg",
        "mmseg.models",
        "mmseg.models.uda",
        "mmseg.models.uda.dacs",
        "mmseg.models.utils",
        "mmseg.models.utils.dacs_transforms",
    ]
    modules: Dict[str, Any] = {name: types.ModuleType(name) for name in names}
    modules["mmcv"].Config = types.SimpleNamespace(fromfile=lambda path: copy.deepcopy(configs[path]))
    modules["mmcv.runner.hooks"].HOOKS = Registry()
    modules["mmcv.runner.hooks"].CheckpointHook = FakeCheckpointHook
    modules["mmseg.models"].UDA = Registry()
    modules["mmseg.models"].build_segmentor = build_segmentor
    modules["mmseg.models.uda.dacs"].DACS = dacs
    transforms = modules["mmseg.models.utils"].dacs_transforms = modules["mmseg.models.utils.dacs_transforms"]
    transforms.get_mean_std, transforms.strong_transform = get_mean_std, strong_transform
    return modules
