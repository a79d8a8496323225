"""Configs of the runs: the host's own recipe, made tiny, and what each run changes in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Mapping

from torch import nn

from clda_core import CollaborativeLearner, Schedule
from clda_core.lead import FixedTrust

from .data import HEIGHT, WIDTH

CROP = 128
ROUND_EVERY = 6

_NORMALISED = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}

_MIT_WIDTHS = {"mit_b0": [32, 64, 160, 256], "mit_b1": [64, 128, 320, 512]}
STUDENT, TEACHER = "mit_b0", "mit_b1"


def tiny(
    data: Path,
    *,
    iterations: int,
    recipe: Path,
    multi_resolution: bool,
    masking: bool,
    backbone: str,
    save_every: int,
) -> Dict[str, Any]:
    """Return what makes the host's recipe tiny; losses, mixing, sampling and optimizer stay the recipe's.

    Args:
        data: Folder that ``write_data`` made.
        iterations: How many to train.
        recipe: The host's config file that everything else comes from.
        multi_resolution: Whether its model is HRDA's.
        masking: Whether to train with MIC's masked images, as all of MIC's own recipes do.
        backbone: Of the model.
        save_every: Iterations between checkpoints; the last iteration is always saved.
    """
    config: Dict[str, Any] = {
        "_base_": [str(recipe)],
        "model": network(backbone, multi_resolution),
        "data": _data(data),
        # Untrained networks are sure of nothing; a low threshold gives the pseudo-labels weight all the same.
        "uda": {"pseudo_threshold": 0.08, "debug_img_interval": 10**6},
        "optimizer": {"lr": 3e-4},
        "lr_config": {"warmup_iters": 2},
        "runner": {"max_iters": iterations},
        "log_config": {"interval": 1, "img_interval": 10**6},
        "evaluation": {"interval": max(2, iterations // 2)},
        "checkpoint_config": {"interval": save_every, "max_keep_ckpts": -1},
        "cudnn_benchmark": False,
        "seed": 0,
        "deterministic": True,
    }
    if masking:
        block = {"type": "block", "mask_ratio": 0.7, "mask_block_size": CROP // 8, "_delete_": True}
        config["uda"].update(mask_mode="separatetrgaug", mask_lambda=1, mask_generator=block)
    if not multi_resolution:
        # The strips that the recipe leaves out, at this size.
        config["uda"].update(pseudo_weight_ignore_top=4, pseudo_weight_ignore_bottom=30)
    return config


def network(backbone: str, multi_resolution: bool) -> Dict[str, Any]:
    """Return the model part: a small MiT without downloaded weights, and a narrow decoder."""
    model: Dict[str, Any] = {
        "pretrained": None,
        "backbone": {"type": backbone},
        "decode_head": {"in_channels": _MIT_WIDTHS[backbone], "channels": 64, "decoder_params": {"embed_dims": 64}},
    }
    if multi_resolution:
        model["hr_crop_size"] = (CROP // 2, CROP // 2)
        model["test_cfg"] = {"stride": [CROP // 2, CROP // 2], "crop_size": [CROP, CROP]}
    return model


def with_clda(teacher_config: Path, teacher_checkpoint: Path, **clda: Any) -> Dict[str, Any]:
    """Return what a user adds to a config to plug CLDA in, with rounds as often as a short run allows."""
    return {
        "custom_imports": {"imports": ["examples.daformer.plugin"], "allow_failed_imports": False},
        "uda": {
            "type": "CLDADACS",
            "clda": {
                "teacher": {"config": str(teacher_config), "checkpoint": str(teacher_checkpoint)},
                "images": "target",
                **({} if "rounds" in clda else {"learner": f"{__name__}:eager_learner"}),
                **clda,
            },
        },
        "checkpoint_config": {"type": "CLDACheckpointHook"},
    }


def eager_learner(teacher: nn.Module, student: nn.Module) -> CollaborativeLearner:
    """Build a learner that changes the teacher whoever leads, as often as a short run allows."""
    return _trusting_learner(teacher, student, every=ROUND_EVERY)


def hasty_learner(teacher: nn.Module, student: nn.Module) -> CollaborativeLearner:
    """Build one that makes a round at every second step, for the shortest runs."""
    return _trusting_learner(teacher, student, every=2)


def _trusting_learner(teacher: nn.Module, student: nn.Module, every: int) -> CollaborativeLearner:
    schedule = Schedule(warmup=every, interval=every)
    return CollaborativeLearner(teacher, student, schedule=schedule, trust=FixedTrust())


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Dict[str, Any]:
    """Return a config with another's entries put in, dictionaries entry by entry."""
    result = dict(config)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    """Write a config as the Python file that mmcv reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in config.items()))
    return path


def _data(data: Path) -> Dict[str, Any]:
    source, target = str(data / "gta"), str(data / "cityscapes")
    validation = {"data_root": target, "pipeline": _test_pipeline()}
    return {
        "samples_per_gpu": 2,
        "workers_per_gpu": 0,
        "train": {
            "source": {"data_root": source, "pipeline": _train_pipeline(cat_max_ratio=0.75)},
            "target": {"data_root": target, "pipeline": _train_pipeline()},
            "rare_class_sampling": {"min_pixels": 30},
        },
        "val": validation,
        "test": validation,
    }


def _train_pipeline(**crop: Any) -> Any:
    return [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations"},
        {"type": "Resize", "img_scale": (WIDTH, HEIGHT)},
        {"type": "RandomCrop", "crop_size": (CROP, CROP), **crop},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "Normalize", **_NORMALISED},
        {"type": "Pad", "size": (CROP, CROP), "pad_val": 0, "seg_pad_val": 255},
        {"type": "DefaultFormatBundle"},
        {"type": "Collect", "keys": ["img", "gt_semantic_seg"]},
    ]


def _test_pipeline() -> Any:
    prepared = [
        {"type": "Resize", "keep_ratio": True},
        {"type": "RandomFlip"},
        {"type": "Normalize", **_NORMALISED},
        {"type": "ImageToTensor", "keys": ["img"]},
        {"type": "Collect", "keys": ["img"]},
    ]
    return [
        {"type": "LoadImageFromFile"},
        {"type": "MultiScaleFlipAug", "img_scale": (WIDTH, HEIGHT), "flip": False, "transforms": prepared},
    ]
