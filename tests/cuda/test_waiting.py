"""Outside of rounds the host never waits for the device."""

from contextlib import nullcontext
from typing import Any, Callable, Dict

import pytest
import torch
from torch.nn import functional as F

from clda_core.distillation import (
    AttentionTransfer,
    ChannelWiseDistillation,
    DecoupledDistillation,
    DISTDistillation,
    FeatureDistillation,
    KLDistillation,
    WeightedSum,
)
from clda_core.lead import LinearTrust
from tests.cuda.hosts import both, images, labels, learner_of, no_wait, segmenters, supervised
from tests.cuda.test_training import optimizer_of


class Told:
    """A schedule that does what it was told last."""

    def __init__(self) -> None:
        self.round = False

    def due(self, step: int) -> bool:
        return self.round

    def observes(self, step: int) -> bool:
        return self.round

    def strength(self, step: int) -> float:
        return 1.0


LOSSES: Dict[str, Callable[[], Any]] = {
    "default": DISTDistillation,
    "kl": KLDistillation,
    "class map": lambda: KLDistillation(class_map=[0, 1, 2, 3, 4]),
    "channel-wise": ChannelWiseDistillation,
    "decoupled": DecoupledDistillation,
    "features": FeatureDistillation,
    "attention": AttentionTransfer,
    "sum": lambda: WeightedSum([(1.0, KLDistillation()), (0.5, FeatureDistillation())]),
}

MASKS = ("none", "bool", "weights", "labels", "per image", "coarse")


def mask_of(kind: str, grid: Any, device: torch.device) -> Any:
    made = labels(device, grid)
    if kind == "coarse":
        return (made != 255)[:, ::2, ::2]
    return {"none": None, "bool": made != 255, "weights": (made != 255) * 0.5, "labels": made}.get(kind, made[:, 0, 0])


def steps(
    device: torch.device,
    *,
    kind: str = "sgd",
    mask: str = "none",
    view: bool = False,
    own_inputs: bool = False,
    autocast: Any = None,
    scaled: bool = False,
    co_trained: bool = False,
    resized: bool = False,
    **options: Any,
) -> None:
    """Two steps that may wait, of which one ends with a round; then one that may not, another round, and one more."""
    teacher, student = segmenters(device)
    if co_trained:
        teacher.requires_grad_(True).train()
    schedule = Told()
    learner = learner_of((teacher, student), schedule=schedule, ignore_index=255, **options)
    optimizer = optimizer_of(kind, student, device)
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0) if scaled else None
    x, source = images(device), images(device, 1)
    small = x[:, :, ::2, ::2].contiguous() if resized else x
    more: Dict[str, Any] = {}
    if own_inputs or resized:
        more["student_inputs"] = small
    if view:
        more["view"] = x + 0.1
        if own_inputs or resized:
            more["student_view"] = small + 0.1
    grid = student(small)[0].shape[2:]
    more["mask"] = mask_of(mask, grid, device)
    targets = labels(device, (8, 8))
    for step in range(5):
        schedule.round = step in (1, 3)
        guarded = no_wait if step in (2, 4) else nullcontext
        forward = (lambda: nullcontext()) if autocast is None else (lambda: torch.autocast(device.type, autocast))
        optimizer.zero_grad()
        with guarded(device):
            with forward():
                loss = learner.distill(student(small), x, **more)
            if co_trained:
                loss = loss + F.cross_entropy(teacher(source)[0], targets, ignore_index=255)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                learner.step(optimizer)
            else:
                learner.observe()
        if scaler is not None:  # which waits itself, to see whether anything overflowed
            scaler.step(optimizer)
            scaler.update()
            with guarded(device):
                learner.after_step(optimizer=optimizer)
    assert learner.report().made == 2


def test_that_waiting_is_noticed(cuda: torch.device) -> None:
    x = torch.ones(1, device=cuda)
    with pytest.raises(RuntimeError, match="synchroniz"), no_wait(cuda):
        x.item()
    x.item()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mask", MASKS)
def test_no_loss_waits(device: torch.device, loss: str, mask: str) -> None:
    if mask == "per image":
        steps(device, distillation=LOSSES[loss](), mask=mask, trust=LinearTrust(), view=True)
    else:
        steps(device, distillation=LOSSES[loss](), mask=mask)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_on_grids_of_two_sizes_waits(device: torch.device, loss: str) -> None:
    steps(device, distillation=LOSSES[loss](), mask="labels", view=True, resized=True)


@pytest.mark.parametrize("own_inputs", [False, True])
@pytest.mark.parametrize("mask", ["none", "labels"])
def test_the_defaults_with_a_view_do_not_wait(device: torch.device, own_inputs: bool, mask: str) -> None:
    steps(device, trust=LinearTrust(), view=True, own_inputs=own_inputs, mask=mask)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "foreach", "fused", "capturable"])
def test_no_optimizer_waits(device: torch.device, kind: str) -> None:
    steps(device, kind=kind, trust=LinearTrust())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_mixed_precision_does_not_wait(device: torch.device, half: torch.dtype, scaled: bool) -> None:
    if device.type == "cpu" and half == torch.float16:
        pytest.skip("needs a CUDA GPU")
    steps(device, autocast=half, scaled=scaled, trust=LinearTrust(), view=True, mask="labels")


def test_a_teacher_that_is_trained_along_does_not_wait(device: torch.device) -> None:
    steps(device, co_trained=True)


def test_the_teachers_output_given_does_not_wait(device: torch.device) -> None:
    teacher, student = segmenters(device)
    schedule = Told()
    learner = learner_of((teacher, student), schedule=schedule)
    optimizer = optimizer_of("sgd", student, device)
    x = images(device)
    for step in range(3):
        with no_wait(device) if step == 2 else nullcontext():
            with torch.no_grad():
                given = both(teacher(x))
            learner.distill(student(x), x, teacher_output=given).backward()
            assert learner.observing is False
            learner.step(optimizer)
    supervised(student, x)
