"""One run: a seed and a variant, from the teacher of that seed to a record."""

from __future__ import annotations

import platform
import resource
import subprocess
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn

import clda_core
from benchmarks.evidence.records import Record
from benchmarks.evidence.task import Host, Task
from benchmarks.evidence.training import Cotraining, train
from benchmarks.evidence.variants import FROZEN, VARIANTS, Variant, frozen
from clda_core import CollaborativeLearner, init_student
from clda_core.checkpoint import atomically
from clda_core.errors import problem

WORK = Path("runs/evidence")
TEACHER_RATE = 0.1  # peak learning rate of a teacher that is trained on, in units of the student's
SAME_TEACHER = 0.005  # points by which the evaluation of one network may differ from machine to machine

TEACHING_ROUNDS = 40  # in a turn; the teacher is at the student's level after ten or twenty


def run(task: Task, seed: int, name: str, beside: Sequence[Record] = ()) -> Record:
    """Train as the variant says and return the record.

    Args:
        task: The benchmark.
        seed: Of everything random.
        name: Of the variant.
        beside: What is recorded already.

    Raises:
        CldaError: If runs of this seed are recorded that started from another teacher.
    """
    began = time.time()
    _commit()
    with torch.random.fork_rng(devices=[]):
        teacher = trained_teacher(task, seed)
        before = task.evaluate(teacher)
        check_teacher(task, seed, before[task.metric], beside)
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
        "device": next(teacher.parameters()).device.type,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def trained_teacher(task: Task, seed: int) -> nn.Module:
    """Return the teacher of a seed, trained by the host once and then read from a file."""
    teacher = task.teacher(seed)
    path = WORK / task.teacher_setting() / f"teacher-{seed}.pt"
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            _train(task, task.host(teacher, seed, stream=0), seed, steps=task.teacher_steps)
        with atomically(path) as unfinished:
            torch.save(teacher.state_dict(), unfinished)
    teacher.load_state_dict(torch.load(path, map_location="cpu"))
    return teacher.eval().requires_grad_(False)


def check_teacher(task: Task, seed: int, figure: float, beside: Sequence[Record]) -> None:
    """Raise unless a teacher of this figure is the one that the recorded runs of its seed started from.

    Trained on another kind of processor it is another, and differences to those runs would not be paired.

    Raises:
        CldaError: If it is another.
    """
    of_seed = [record for record in beside if (record["setting"], record["seed"]) == (task.setting(), seed)]
    recorded = [record["teacher_before"][task.metric] for record in of_seed]
    other = [there for there in recorded if abs(there - figure) > SAME_TEACHER]
    if other:
        raise problem(
            f"the teacher of seed {seed} is another one than in the records",
            expected=f"{task.metric} {other[0]:.3f} as there",
            received=f"{figure:.3f}, trained on this machine",
            fix=f"put the recorded runs' teacher into {WORK / task.teacher_setting()}, or compare in a folder of your "
            "own: --records FOLDER, with the variants to compare with",
        )


def _train(task: Task, host: Host, seed: int, **options: Any) -> Dict[str, Any]:
    """Train with dropout drawn from ``seed``, whatever was trained before: an uncached teacher, an earlier turn."""
    torch.manual_seed(seed)
    return train(task, host, **options)


def _trained(task: Task, seed: int, name: str, teacher: nn.Module) -> Dict[str, Any]:
    variant = VARIANTS[name]
    if name == FROZEN:
        return first_student(task, seed, teacher)[1]
    if variant.after_turn is not None:
        return _in_turns(task, seed, variant, teacher)
    if variant.kind in ("teacher", "after-teacher"):
        host = task.host(teacher.requires_grad_(True), seed, stream=2)
        of_teacher = _train(task, host, seed, steps=task.steps, learning_rate=TEACHER_RATE * task.learning_rate)
        teacher.eval().requires_grad_(False)
        if variant.kind == "teacher":
            return {**of_teacher, "teacher": of_teacher["student"], "student": None, "student_ema": None}
        of_student = train_student(task, seed, variant, teacher)
        both = of_teacher["processor_seconds"] + of_student["processor_seconds"]
        return {**of_student, "processor_seconds": both}
    return train_student(task, seed, variant, teacher)


def train_student(
    task: Task,
    seed: int,
    variant: Variant,
    teacher: nn.Module,
    *,
    look: Optional[Callable[[nn.Module, int], None]] = None,
    looks: int = 0,
) -> Dict[str, Any]:
    """Train the seed's student as the variant says and return its figures.

    Args:
        task: The benchmark.
        seed: Of everything random.
        variant: Without turns.
        teacher: Of the seed.
        look: Called with the student and the number of steps made, ``looks`` times; it may only read.
        looks: How often.
    """
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
    return _train(
        task,
        task.host(student, seed, stream=1),
        seed,
        steps=variant.length * task.steps,
        learner=learner,
        cotraining=cotraining,
        view=variant.view,
        look=None if look is None else partial(look, student),
        looks=looks,
    )


def _in_turns(task: Task, seed: int, variant: Variant, teacher: nn.Module) -> Dict[str, Any]:
    """Train one student after another, each from the same start, and let each change the next one's teacher."""
    assert variant.after_turn is not None
    big = teacher
    turns: List[Dict[str, Any]] = []
    seconds: List[float] = []
    for turn in range(variant.turns):
        student, figures = (first_student if turn == 0 else _of_still_teacher)(task, seed, teacher)
        student.eval()
        host = task.host(student, seed, stream=3 + turn)
        batches = [host.loss(step, TEACHING_ROUNDS).images for step in range(TEACHING_ROUNDS)]
        began = time.process_time()
        teacher = variant.after_turn(teacher, student, batches, seed)
        seconds += [figures["processor_seconds"], time.process_time() - began]
        turns.append({"student": figures["student"], "teacher": task.evaluate(big)})
    return {
        **figures,
        "teacher": turns[-1]["teacher"],
        "turns": turns,
        "processor_seconds": sum(seconds),
        "overhead": sum(seconds) / seconds[0],  # the first turn is frozen-teacher KD
    }


def first_student(task: Task, seed: int, teacher: nn.Module) -> Tuple[nn.Module, Dict[str, Any]]:
    """Return the student of the seed's frozen teacher, trained once and then read from a file, and its figures."""
    path = WORK / task.setting() / f"student-{seed}.pt"
    if not path.exists():
        student, figures = _of_still_teacher(task, seed, teacher)
        with atomically(path) as unfinished:
            torch.save({"weights": student.state_dict(), "figures": figures}, unfinished)
    stored, student = torch.load(path, map_location="cpu"), task.student(seed)
    student.load_state_dict(stored["weights"])
    return student, stored["figures"]


def _of_still_teacher(task: Task, seed: int, teacher: nn.Module) -> Tuple[nn.Module, Dict[str, Any]]:
    """Train the seed's student by KD from a teacher that does not change; return it and its figures."""
    student = task.student(seed)
    learner = CollaborativeLearner(teacher, student, **frozen(task, seed))
    return student, _train(task, task.host(student, seed, stream=1), seed, steps=task.steps, learner=learner)


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
