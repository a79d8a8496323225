"""What the ranks of `test_faults.py` do."""

import pathlib
import time
import warnings
from typing import Any, Dict

import torch
from torch import Tensor
from torch.nn import functional as F

from clda_core import CollaborativeLearner, Outputs, Schedule
from clda_core.distillation import FeatureDistillation
from clda_core.lead import FixedTrust
from clda_core.relation import BySimilarity
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation, agreement
from tests.distributed.host import BATCH, INPUTS, Scenario, drawn, networks, train
from tests.helpers import values


def masked_distillation() -> Dict[str, Any]:
    return {"update": MaskedDistillation(learning_rate=1e-2, steps=2)}


def with_features(output: Tensor) -> Outputs:
    return Outputs(output, (output.pow(2),))


# The student does not learn, so that what differs from a run on the data that is there can only come from the rounds.
INCOMPLETE: Dict[str, Scenario] = {
    "masked distillation": Scenario(masked_distillation, empty=[1], rate=0.0),
    "masked distillation, from the start": Scenario(masked_distillation, empty=[0, 2], rate=0.0),
    "masked out": Scenario(masked_distillation, masked=[1], rate=0.0),
    "aligned average": Scenario(lambda: {"update": AlignedAverage(decay=0.9)}, empty=[0, 2], rate=0.0),
    "by similarity": Scenario(
        lambda: {"update": Average(decay=0.9), "relation": BySimilarity(minimum=0.0)}, empty=[0], rate=0.0
    ),
    "guarded": Scenario(
        lambda: {"update": Guard(MaskedDistillation(learning_rate=0.1), criterion=agreement)}, empty=[1], rate=0.0
    ),
    "projectors": Scenario(
        lambda: {**masked_distillation(), "distillation": FeatureDistillation(), "extract": with_features},
        empty=[0],
        rate=0.0,
    ),
}


def incomplete(rank: int, ranks: int) -> Dict[str, Any]:
    return {name: train(rank, ranks, scenario) for name, scenario in INCOMPLETE.items()}


def all_empty(rank: int, ranks: int) -> Dict[str, Any]:
    """Return what came of steps of which the first has data on no rank, and the second on the last one only."""
    teacher, student = networks(Scenario())
    learner = CollaborativeLearner(teacher, student, schedule=Schedule(interval=5, observations=5), trust=FixedTrust())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    said = []
    for step in range(6):
        target = drawn(step, BATCH, INPUTS)
        target = target[:0] if step == 4 or (step == 5 and rank < ranks - 1) else target
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = learner.distill(student(target), target)
            loss.backward()
            learner.step(optimizer)
        said += [str(warning.message) for warning in caught if "target data" in str(warning.message)]
    return {
        "last loss": loss.item(),
        "rounds": learner.report().to_dict()["rounds"],
        "teacher": values(teacher),
        "said": said,
    }


class Raising(MaskedDistillation):
    def apply(self, context: Any) -> Any:
        super().apply(context)
        raise ValueError("one rank's own")


def raising_probe(logits: Tensor, mask: Any = None) -> Tensor:
    raise ValueError("one rank's own")


def probe(logits: Tensor, mask: Any = None) -> Tensor:
    return F.cross_entropy(logits, logits.argmax(1))


def one_raises(rank: int, ranks: int, where: str, folder: str) -> Exception:
    """Let the last rank raise in user code and stay alive; return each rank's error, ``after`` how many seconds."""
    teacher, student = networks(Scenario())
    raises = rank == ranks - 1
    # A guard around the update has a collective to come, at which the others wait.
    update = Guard(Raising() if where == "update" and raises else MaskedDistillation(steps=3), criterion=agreement)
    learner = CollaborativeLearner(
        teacher,
        student,
        schedule=Schedule(interval=1),
        trust=FixedTrust(),
        update=update,
        probe=raising_probe if where == "probe" and raises else probe,
    )
    before = values(teacher)
    target = drawn(rank, BATCH, INPUTS)
    learner.distill(student(target), target).backward()
    began = time.monotonic()
    try:
        learner.step(torch.optim.SGD(student.parameters(), lr=0.1))
    except Exception as raised:
        error: Exception = RuntimeError(f"{type(raised).__name__}: {raised}")
    else:
        return RuntimeError("no error")
    error.args = (*error.args, time.monotonic() - began, values(teacher) == before)
    end = time.monotonic() + 60
    while raises and len(list(pathlib.Path(folder).glob("rank*"))) < ranks - 1 and time.monotonic() < end:
        time.sleep(0.1)
    return error
