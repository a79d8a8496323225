"""One run: a seed and a variant, from the teacher of that seed to a record."""

from __future__ import annotations

import platform
import resource
import subprocess
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from torch import nn

import clda_core
from benchmarks.evidence.records import Record
from benchmarks.evidence.task import Task
from benchmarks.evidence.training import Cotraining, train
from benchmarks.evidence.variants import VARIANTS, frozen
from clda_core import CollaborativeLearner, init_student
from clda_core.checkpoint import atomically

WORK = Path("runs/evidence")
TEACHER_RATE = 0.1  # peak learning rate of a teacher that is trained on, in units of the student's


def run(task: Task, seed: int, name: str) -> Record:
    """Train as the variant says and return the record.

    Args:
        task: The benchmark.
        seed: Of everything random.
        name: Of the variant.
    """
    began = time.time()
    _commit()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = trained_teacher(task, seed)
        before = task.evaluate(teacher)
        figures = _trained(task, seed, name, teacher)
    return {
        "setting": task.setting(),
        "seed": seed,
        "variant": name,
        "metric": task.metric,
        "teacher_before": before,
        **figures,
        "total_seconds": round(time.time() - began, 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def trained_teacher(task: Task, seed: int) -> nn.Module:
    """Return the teacher of a seed, trained by the host once and then read from a file."""
    teacher = task.teacher(seed)
    path = WORK / task.setting() / f"teacher-{seed}.pt"
    if not path.exists():
        host = task.host(teacher, seed, stream=0)
        train(task, host, steps=task.teacher_steps)
        with atomically(path) as unfinished:
            torch.save(teacher.state_dict(), unfinished)
    teacher.load_state_dict(torch.load(path, map_location="cpu"))
    return teacher.eval().requires_grad_(False)


def _trained(task: Task, seed: int, name: str, teacher: nn.Module) -> Dict[str, Any]:
    variant = VARIANTS[name]
    if variant.kind == "teacher":
        teacher.requires_grad_(True)
        host = task.host(teacher, seed, stream=2)
        figures = train(task, host, steps=task.steps, learning_rate=TEACHER_RATE * task.learning_rate)
        return {**figures, "teacher": figures["student"], "student": None, "student_ema": None}
    student = task.student(seed)
    if variant.start == "teacher":
        init_student(student, teacher)
    learner = variant.learner(task, teacher, student, seed)
    cotraining: Optional[Cotraining] = None
    if variant.kind == "duda":
        # The big network goes on by UDA; its slowly moving average, not itself, teaches the small one.
        auxiliary = task.host(teacher.requires_grad_(True), seed, stream=2)
        learner = CollaborativeLearner(auxiliary.ema, student, **frozen(task, seed))
        cotraining = Cotraining(auxiliary, TEACHER_RATE * task.learning_rate)
    elif variant.cotrained:
        auxiliary = task.host(teacher.requires_grad_(True), seed, stream=2)
        cotraining = Cotraining(auxiliary, TEACHER_RATE * task.learning_rate)
    return train(
        task,
        task.host(student, seed, stream=1),
        steps=task.steps,
        learner=learner,
        cotraining=cotraining,
    )


def versions() -> Dict[str, str]:
    """Return what ran: the commit and the versions that figures may depend on."""
    return {
        "commit": _commit(),
        "clda_core": clda_core.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@lru_cache(maxsize=1)
def _commit() -> str:
    """Return the commit of the first run of a process: the checkout may move on under it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"
