"""A short training whose checkpoint is kept for each version of the format of a learner's state.

Run in a checkout of the version in question, this writes the file, and what the training came to afterwards:

    git worktree add ../former COMMIT
    PYTHONPATH=../former python tests/states/training.py tests/states/version-N.pt
    PYTHONPATH=../former python tests/states/training.py tests/states/version-N-defaults.pt defaults

By the oldest supported torch, so that every version of torch can read it. version-2-defaults.pt was written at commit
ffd5f54, before the package's files were moved.
"""

import inspect
import sys
from typing import Any, Dict, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core import CollaborativeLearner, Outputs, Schedule
from clda_core.distillation import FeatureDistillation
from clda_core.selection import LowestFraction
from clda_core.update import Guard, MaskedDistillation, agreement

SAVED, LAST = 6, 12
"""The step after which the training is saved, between two observations of a round, and its last step."""

INPUTS, CLASSES, WIDTH = 5, 3, 6


class Net(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth)])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Outputs:
        features = self.blocks(torch.tanh(self.stem(x)))
        return Outputs(self.head(features), (features,))


def drawn(seed: int) -> Tensor:
    return torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(defaults: bool = False, distillation: Any = None) -> Tuple[CollaborativeLearner, Any]:
    """Return a learner, with default strategies or another KD loss if told so, and its student's optimizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher, student = Net(3).double(), Net(2).double()
    schedule: Dict[str, Any] = {"warmup": 1, "interval": 3, "observations": 3}
    if "observe_every" in inspect.signature(Schedule.__init__).parameters:
        schedule["observe_every"] = 1
    strategies: Dict[str, Any] = {}
    if "trust" in inspect.signature(CollaborativeLearner.__init__).parameters:
        # What the defaults were before, and still are where a version's own are not in question.
        from clda_core.lead import FixedTrust

        strategies = {"trust": FixedTrust(), "selection": LowestFraction()}
        strategies["update"] = Guard(MaskedDistillation(learning_rate=1e-4))
    if not defaults:
        strategies["update"] = Guard(MaskedDistillation(learning_rate=1e-2), criterion=agreement, tolerance=1.0)
        strategies["distillation"] = FeatureDistillation() if distillation is None else distillation
    learner = CollaborativeLearner(teacher, student, schedule=Schedule(**schedule), **strategies)
    return learner, torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)


def train(learner: CollaborativeLearner, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        target = drawn(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(learner.student(drawn(100 + step)).logits, torch.arange(8) % CLASSES)
        (loss + learner.distill(learner.student(target), target)).backward()
        learner.step(optimizer)


def state(learner: CollaborativeLearner, optimizer: Any) -> Dict[str, Any]:
    parts = {"learner": learner, "teacher": learner.teacher, "student": learner.student, "optimizer": optimizer}
    return {name: part.state_dict() for name, part in parts.items()}


def outcome(learner: CollaborativeLearner) -> Dict[str, Any]:
    return {"teacher": learner.teacher.state_dict(), "rounds": learner.report().to_dict()["rounds"]}


def main(path: str, strategies: str = "") -> None:
    learner, optimizer = build(defaults=strategies == "defaults")
    train(learner, optimizer, 0, SAVED)
    saved = state(learner, optimizer)
    torch.save(saved, path)  # at once, since the tensors of the models are not copied
    saved = torch.load(path)
    train(learner, optimizer, SAVED, LAST)
    torch.save({**saved, "afterwards": outcome(learner)}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
