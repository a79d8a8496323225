"""Which validator tells the better of two networks? Scores without labels beside the figures that need them."""

from __future__ import annotations

import math
import time
from typing import Any, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

from benchmarks.evidence.records import Record
from benchmarks.evidence.runs import train_student, trained_teacher, versions
from benchmarks.evidence.task import Task, evaluating
from benchmarks.evidence.variants import FROZEN_DIST, UDA, VARIANTS
from clda_core import validation
from clda_core.validation import ByClass, MakesView, Validator

TASKS = ("digits", "street", "street-narrow", "letters", "vowels")
KINDS = (UDA, FROZEN_DIST, "frozen-dist-init")  # of students; narrow ones are a task of their own
LOOKS = 8
POSITIONED, WHOLE = 100, 256  # images that a network is scored on: with positions, and without


class Images(NamedTuple):
    """Batches of target images of the training, and another view of each."""

    clean: List[Tensor]
    view: List[Tensor]


def all_validators() -> Dict[str, Validator]:
    """Return every validator of the library with its default options, by name."""
    found = {name: getattr(validation, name) for name in validation.__all__}
    return {
        name: each()
        for name, each in found.items()
        if isinstance(each, type) and hasattr(each, "statistics") and not getattr(each, "_is_protocol", False)
    }


def kinds(task: Task) -> List[str]:
    """Return the ways in which a task's students are trained."""
    return [kind for kind in KINDS if task.related or VARIANTS[kind].start == "own"]


def scored(task: Task, seed: int, kind: str, *, looks: int = LOOKS) -> Record:
    """Train one student and return the record of both networks' scores and figures over the training.

    The teacher stays as it is, so it is scored once.

    Args:
        task: The benchmark.
        seed: Of everything random.
        kind: Name of the student's variant.
        looks: How often the student is scored, at equal distances, the last time at the end.
    """
    validators = all_validators()
    seen: List[Dict[str, Any]] = []

    def look(student: nn.Module, step: int) -> None:
        seen.append({"step": step, "figures": task.evaluate(student), **scores(student, images, validators, classes)})

    with torch.random.fork_rng(devices=[]):
        teacher = trained_teacher(task, seed)
        figures = task.evaluate(teacher)
        classes = [name for name in figures if name.startswith("IoU ")]
        images = target_images(task, seed)
        of_teacher = {"figures": figures, **scores(teacher, images, validators, classes)}
        train_student(task, seed, VARIANTS[kind], teacher, look=look, looks=looks)
    return {
        "setting": task.setting(),
        "seed": seed,
        "variant": kind,
        "metric": task.metric,
        "steps": task.steps,
        "teacher": of_teacher,
        "looks": seen,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def target_images(task: Task, seed: int) -> Images:
    """Return the images that both networks of a seed are scored on, in the host's batches and with the host's view."""
    host = task.host(task.student(seed).eval(), seed, stream=4)
    images = Images([], [])
    with torch.no_grad():
        while sum(map(len, images.clean)) < (POSITIONED if task.dense else WHOLE):
            batch = host.loss(len(images.clean), 1000)
            images.clean.append(batch.images)
            images.view.append(batch.view)
    return images


def scores(
    model: nn.Module, images: Images, validators: Dict[str, Validator], classes: List[str]
) -> Dict[str, Dict[str, Any]]:
    """Return a network's score by every validator, and by class where there are names for them; ``None`` for NaN."""
    sums: Dict[str, Tensor] = {}
    with evaluating(model):
        for clean, view in zip(images.clean, images.view):
            logits, changed = model(clean), model(view)
            for name, validator in validators.items():
                second: Optional[Tensor] = changed if validator.needs_view else None
                if isinstance(validator, MakesView):
                    second = model(validator.view(clean))
                found = validator.statistics(logits, second)
                sums[name] = sums[name] + found if name in sums else found
    by_class = {
        name: dict(zip(classes, map(_number, validator.score_by_class(sums[name]))))
        for name, validator in validators.items()
        if classes and isinstance(validator, ByClass)
    }
    return {
        "scores": {name: _number(validator.score(sums[name])) for name, validator in validators.items()},
        "by_class": by_class,
    }


def _number(score: Tensor) -> Optional[float]:
    value = float(score)
    return round(value, 6) if math.isfinite(value) else None
