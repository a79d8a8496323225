"""Whether the host waits for the device in ``distill`` and ``step`` outside rounds."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator

import torch
from torch import nn

from benchmarks.cost.figures import Figure
from benchmarks.cost.settings import Forced
from clda_core import CollaborativeLearner
from clda_core.distillation import (
    ChannelWiseDistillation,
    DecoupledDistillation,
    DISTDistillation,
    Distillation,
    KLDistillation,
)

LOSSES: Dict[str, Callable[[], Distillation]] = {
    "KLDistillation": KLDistillation,
    "ChannelWiseDistillation": ChannelWiseDistillation,
    "DecoupledDistillation": DecoupledDistillation,
    "DISTDistillation": DISTDistillation,
}


def synchronisation(device: torch.device) -> Iterator[Figure]:
    """Count the losses with which a step outside rounds waits: on a CPU those that would, on a GPU those that do."""
    if device.type == "cuda":
        where, note = "on the GPU", 'torch.cuda.set_sync_debug_mode("error") around distill and step'
    else:
        where = "on the meta device"
        note = "tensors without values take the path of a GPU, and asking for a value is an error"
    waiting = [name for name, make in LOSSES.items() if waits(make(), device)]
    what = "KD losses with which distill or step waits for the device"
    yield Figure("synchronisation", what, where, float(len(waiting)), "", at_most=0.0, note=note)


def waits(loss: Distillation, device: torch.device, *, round_: bool = False, **options: Any) -> bool:
    """Return whether a step waits for the device.

    Args:
        loss: The KD loss.
        device: A GPU; for a CPU the ``meta`` device stands in, on which nothing has a value to wait for.
        round_: Whether the step ends with a round.
        options: For the learner.
    """
    device = device if device.type == "cuda" else torch.device("meta")
    schedule = Forced()
    teacher, student = (nn.Conv2d(3, 5, 3, padding=1).to(device) for _ in range(2))
    learner = CollaborativeLearner(teacher, student, distillation=loss, schedule=schedule, ignore_index=255, **options)
    # The first step rehearses a round, which waits as a round does; on the meta device it could not.
    learner._rounds.rehearsed = device.type == "meta"
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    images = torch.zeros(2, 3, 8, 8, device=device)
    mask = torch.zeros(2, 8, 8, dtype=torch.int64, device=device)
    for step in range(2):
        schedule.round = schedule.observed = bool(round_ and step)
        output = student(images)
        try:
            with _forbidden(device, when=bool(step)):  # the first step may allocate, and initialise libraries
                loss_ = learner.distill(output, images, mask=mask)
            loss_.backward()
            with _forbidden(device, when=bool(step)):
                learner.step(optimizer)
        except (RuntimeError, NotImplementedError) as error:
            if not any(text in str(error).lower() for text in ("synchroniz", "meta")):
                raise
            return True
    return False


class _forbidden:
    """Let CUDA raise at every wait of the host for the device; the meta device does so by itself."""

    def __init__(self, device: torch.device, when: bool) -> None:
        self.active = when and device.type == "cuda"

    def __enter__(self) -> None:
        if self.active:
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error: Any) -> None:
        if self.active:
            torch.cuda.set_sync_debug_mode("default")
