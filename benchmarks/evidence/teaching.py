"""One direction alone: a trained student teaches the teacher, and which layers may move varies. Nothing else trains."""

from __future__ import annotations

import copy
import time
from typing import Any, Dict

import torch
from torch import nn

import clda_core
from benchmarks.evidence.records import Record
from benchmarks.evidence.runs import first_student, trained_teacher, versions
from benchmarks.evidence.task import Host, Task
from clda_core.distillation import kl_distillation
from clda_core.layers import group_layers
from clda_core.selection import AllLayers, HighestFraction, LowestFraction, RandomFraction, Selection

ROUNDS, BATCHES = 40, 10


def teach(task: Task, seed: int) -> Record:
    """Train a student with KD from the frozen teacher, let it teach copies of that, and return the record.

    Args:
        task: The benchmark.
        seed: Of everything random.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = trained_teacher(task, seed)
        student, _ = first_student(task, seed, teacher)
        student.eval()
        host = task.host(student, seed, stream=3)
        selections: Dict[str, Selection] = {
            "lowest": LowestFraction(),
            "random": RandomFraction(seed=seed),
            "highest": HighestFraction(),
            "all": AllLayers(),
        }
        return {
            "setting": task.setting(),
            "seed": seed,
            "variant": "teaching",
            "metric": task.metric,
            "student": task.evaluate(student),
            "before": _described(task, teacher, student, host),
            "after": {name: _taught(task, teacher, student, host, choice) for name, choice in selections.items()},
            "versions": versions(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def _taught(task: Task, original: nn.Module, student: nn.Module, host: Host, selection: Selection) -> Dict[str, Any]:
    teacher = copy.deepcopy(original)
    images = [host.loss(step, ROUNDS).images for step in range(ROUNDS)]
    rounds = clda_core.teach(teacher, student, images, selection=selection).rounds
    sizes = {layer.name: layer.numel for layer in group_layers(teacher)}
    chosen = sum(sizes[name] for record in rounds for name in record.selected)
    return {
        **_described(task, teacher, student, host),
        "share_of_parameters": chosen / len(rounds) / sum(sizes.values()),
        "accepted": sum(bool(record.updated) for record in rounds),
    }


@torch.no_grad()
def _described(task: Task, teacher: nn.Module, student: nn.Module, host: Host) -> Dict[str, Any]:
    """Return the teacher's figures, and how far it is from the student on images that it was not taught on."""
    divergence, agreement = [], []
    for step in range(ROUNDS, ROUNDS + BATCHES):
        images = host.loss(step, ROUNDS + BATCHES).images
        ours, theirs = teacher(images), student(images)
        divergence.append(float(kl_distillation(ours, theirs, temperature=1.0)))
        agreement.append(float((ours.argmax(dim=1) == theirs.argmax(dim=1)).float().mean()))
    return {
        "teacher": task.evaluate(teacher),
        "divergence": sum(divergence) / BATCHES,
        "agreement": sum(agreement) / BATCHES,
    }
