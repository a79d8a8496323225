"""The big teacher: the host's own classifier with the host's own weights, frozen."""

from __future__ import annotations

import contextlib
import random
import re
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from clda_core.errors import problem

_BLOCKS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def load_checkpoint(path: Path) -> Any:
    """Read a file of the host's or of ours on the CPU.

    Raises:
        CldaError: If it is missing or no checkpoint.
    """
    if not path.is_file():
        raise problem(
            "the checkpoint is not there",
            expected="a file that the host saved, LOG/checkpoints/best.pth, or ours beside it",
            received=str(path),
            fix="train the teacher with the host first, or correct the path",
        )
    try:
        return torch.load(str(path), map_location="cpu")
    except Exception as error:
        raise problem(
            "the checkpoint cannot be read",
            expected="a file of torch.save",
            received=f"{path}: {error}",
            fix="renew it",
        ) from error


def teacher_weights(path: Path) -> Dict[str, Tensor]:
    """Return the teacher's weights from the host's ``best.pth`` or from our ``best.clda.pt``.

    Raises:
        CldaError: If the file holds something else.
    """
    found = load_checkpoint(path)
    if isinstance(found, Mapping) and isinstance(found.get("teacher"), Mapping):
        found = found["teacher"]
    if isinstance(found, Mapping) and all(key in found for key in ("head.weight", "bottleneck.0.weight")):
        return dict(found)
    raise problem(
        "the teacher's checkpoint is not one of the host's",
        expected="the state_dict of its ImageClassifier: backbone.*, bottleneck.*, head.*",
        received=f"{path} with {sorted(map(str, found))[:3]}..."
        if isinstance(found, Mapping)
        else type(found).__name__,
        fix="pass the checkpoints/best.pth of the host's cdan_mcc_sdat_masking.py",
    )


def build_teacher(
    path: Path, arch: str, student: nn.Module, *, utils: Any, classifier_class: Any, pool: bool = True
) -> nn.Module:
    """Build the host's classifier of architecture ``arch`` with the weights in ``path``: frozen, in eval mode.

    It is placed where the student is, and draws from no random generator of the host.

    Raises:
        CldaError: If the weights are of another architecture or class count.
    """
    weights = teacher_weights(path)
    classes = weights["head.weight"].shape[0]
    if classes != student.num_classes:
        raise problem(
            "teacher and student have different classes",
            expected=f"{student.num_classes}, the student's number of classes",
            received=f"{classes} in {path}",
            fix="train the teacher on the same data set as the student",
        )
    device = next(student.parameters()).device
    with keeping_random_state(device):
        try:
            backbone = utils.get_model(arch, pretrain=False)
        except RuntimeError as error:
            raise problem(
                "the teacher's architecture is unknown to the host",
                expected="a name that the host's -a accepts",
                received=f"{arch!r} ({error})",
                fix="pass for example --clda-teacher-arch resnet101",
            ) from error
        teacher = classifier_class(
            backbone,
            classes,
            bottleneck_dim=weights["bottleneck.0.weight"].shape[0],
            pool_layer=None if pool else nn.Identity(),
        )
    _check_fit(teacher.state_dict(), weights, arch, path)
    teacher.load_state_dict(weights)
    return teacher.to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def keeping_random_state(device: torch.device) -> Iterator[None]:
    """Give back the state of every global random generator: Python's, numpy's, torch's on the CPU and on ``device``."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _check_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], arch: str, path: Path) -> None:
    wrong = [f"{name} missing" for name in own if name not in weights]
    wrong += [f"{name} unexpected" for name in weights if name not in own]
    wrong += [
        f"{name} of shape {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        found = architecture_of(weights)
        raise problem(
            "the teacher's checkpoint is of another architecture",
            expected=arch,
            received=f"{found or 'something else'} in {path} ({len(wrong)} entries differ, first: {wrong[0]})",
            fix=f"pass --clda-teacher-arch {found}" if found else "pass the architecture it was trained with",
        )


def architecture_of(weights: Mapping[str, Tensor]) -> str:
    """Return the name of the ResNet that the weights are of, or an empty string."""
    found = [re.match(r"backbone\.layer(\d)\.\d+\.conv1\.weight$", name) for name in weights]
    blocks = [sum(match is not None and match[1] == stage for match in found) for stage in "1234"]
    bottlenecks = "backbone.layer1.0.conv3.weight" in weights
    return _BLOCKS.get((tuple(blocks), bottlenecks), "")  # type: ignore[call-overload]
