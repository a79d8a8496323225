"""What the tests of the hosts on the digits share: a tiny training, and a learner whose rounds show."""

from __future__ import annotations

from typing import Any, Callable, List, Optional

import numpy as np
import torch

from clda_core import CollaborativeLearner, Schedule
from clda_core.lead import FixedTrust
from examples.classification.digits_data import TargetEvaluation, UnlabelledImages, source_digits, target_digits
from examples.classification.digits_models import residual_network
from examples.classification.digits_training import Stage, Task


def trained(train: Callable[..., Stage], host: Any, make_learner: Optional[Any] = None) -> Stage:
    """Train a tiny student for five steps, evaluated after each on a few images whose labels are all 0."""
    target, _ = target_digits()
    images = target.images[:30]
    task = Task(
        source_digits(0, 40),
        UnlabelledImages(images),
        TargetEvaluation(images, np.zeros(30)),
        host,
        steps=5,
        evaluate_every=1,
        progress=False,
    )
    teacher, student = (residual_network((1, 1, 1), seed=seed) for seed in (1, 2))
    given = {} if make_learner is None else {"teacher": teacher, "make_learner": make_learner}
    return train("student", student, task, seed=3, **given)


def with_rounds(teacher: torch.nn.Module, student: torch.nn.Module) -> CollaborativeLearner:
    # A student that is trusted whoever leads: untrained, it would teach nothing, and hide the round.
    return CollaborativeLearner(teacher, student, schedule=Schedule(warmup=2, interval=2), trust=FixedTrust())


def losses(stage: Stage) -> List[float]:
    return [point["loss"] for point in stage.curve[1:]]
