"""Peak memory of training, beyond that of frozen-teacher KD."""

from __future__ import annotations

from typing import Callable, Dict, Iterator, Optional

import torch

from benchmarks.cost.figures import Figure
from benchmarks.cost.peak import peak
from benchmarks.cost.settings import Forced, Host, Setting, settings
from clda_core import CollaborativeLearner
from clda_core.saliency import PseudoLabelCrossEntropy
from clda_core.update import Average, Update

_BARE = "frozen-teacher KD, and a forward and backward pass of the teacher by hand"
_UPDATES: Dict[str, Optional[Callable[[], Update]]] = {"CLDA, Average": Average, "CLDA, defaults": lambda: None}


def memory(setting: Setting, device: torch.device, crop: Optional[int]) -> Iterator[Figure]:
    """Train a few steps, the last with a round and an observation, in a process each."""
    frozen = peak(training, setting.name, "frozen", crop, device=device)
    yield Figure("memory", "peak, frozen-teacher KD", setting.name, frozen / 2**20, "MiB", note=_FROM)
    for kind in (_BARE, *_UPDATES):
        beyond = (peak(training, setting.name, kind, crop, device=device) - frozen) / 2**20
        yield Figure("memory", f"beyond it, {kind}", setting.name, beyond, "MiB")
    count = sum(parameter.numel() * parameter.element_size() for parameter in setting.teacher().parameters())
    yield Figure("memory", "for scale: the teacher's parameters", setting.name, count / 2**20, "MiB")


_FROM = "training steps alone: the models are there before; with a CPU's allocator, correct to some MiB"


def training(name: str, kind: str, crop: Optional[int], device: torch.device) -> Callable[[], None]:
    """Return three steps of a host that was just built, the last with what ``kind`` says."""
    host, schedule = Host(settings(device, crop)[name], device), Forced()
    make = _UPDATES.get(kind)
    update = None if make is None else make()
    learner = CollaborativeLearner(host.teacher, host.student, update=update, schedule=schedule)

    def run() -> None:
        host.with_learner(learner)
        host.with_learner(learner)
        schedule.round = schedule.observed = kind in _UPDATES
        host.with_learner(learner)
        if kind == _BARE:
            host.teacher.requires_grad_(True)
            loss = PseudoLabelCrossEntropy()(host.teacher(host.mixed), None)
            torch.autograd.grad(loss, list(host.teacher.parameters()))

    return run
