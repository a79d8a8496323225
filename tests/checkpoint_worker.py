"""A training that goes on from its checkpoint, and kills itself where it is told: ``WHERE STEP PATH``.

WHERE is ``during`` saving that step, ``after`` it, or ``never``.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from clda_core import CollaborativeLearner, Schedule, checkpoint
from clda_core.lead import FixedTrust
from tests.helpers import networks, sgd, train_step

STEPS = 6


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(state: Any, path: str) -> None:
    """What ``torch.save`` has done when it is killed half-way."""
    real_save(state, path)
    os.truncate(path, os.path.getsize(path) // 2)
    kill()


def main(where: str, at: int, path: Path) -> None:
    torch.manual_seed(0)
    teacher, student = networks()
    optimizer = sgd(student)
    schedule = Schedule(warmup=1, interval=2, observations=2)
    learner = CollaborativeLearner(teacher, student, schedule=schedule, trust=FixedTrust())
    first = 0
    if path.exists():
        rest = checkpoint.load(path, learner, optimizer=optimizer)
        torch.set_rng_state(rest["rng"])
        first = rest["steps"]
    for step in range(first, STEPS):
        train_step(learner, optimizer, step)
        if step == at and where == "during":
            torch.save = half_written
        checkpoint.save(path, learner, optimizer=optimizer, rng=torch.get_rng_state(), steps=step + 1)
        if step == at and where == "after":
            kill()


real_save = torch.save

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
