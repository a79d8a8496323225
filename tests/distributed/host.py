"""A host that trains a student with a learner: in one process, or as a rank of several on its part of the same data."""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from clda_core import CollaborativeLearner, Schedule
from clda_core.distillation import KLDistillation
from clda_core.lead import FixedTrust
from tests.helpers import bits, seeded

INPUTS, CLASSES, WIDTH, BATCH = 5, 3, 6, 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.fc(self.norm(x)))


class Net(nn.Module):
    """Blocks without BatchNorm, whose statistics depend on how a batch is divided; maybe a head that no loss uses."""

    def __init__(self, depth: int, spare: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, CLASSES)
        if spare:
            self.spare = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))))


@dataclass(frozen=True)
class Scenario:
    """One way to train.

    Attributes:
        options: Of the learner; a function, since strategies have state.
        student: Options of DistributedDataParallel for the student.
        teacher: The same for the teacher; ``None`` leaves it bare.
        spare: Whether the networks have a head that no loss uses.
        co_trained: Whether the host trains the teacher too.
        empty: Steps at which the last rank's target batch is empty.
        masked: Steps at which the last rank's mask leaves nothing.
        rate: The host's learning rate.
        view: Whether the learner gets a changed view of the target.
        steps: Optimizer steps, each with a round.
    """

    options: Callable[[], Dict[str, Any]] = dict
    student: Mapping[str, Any] = field(default_factory=dict)
    teacher: Optional[Mapping[str, Any]] = None
    spare: bool = False
    co_trained: bool = False
    empty: Any = ()
    masked: Any = ()
    rate: float = 0.1
    view: bool = False
    steps: int = 3


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed: int) -> Tensor:
    return torch.randint(0, CLASSES, (BATCH,), generator=torch.Generator().manual_seed(seed))


def networks(scenario: Scenario) -> List[nn.Module]:
    """Return a frozen teacher, or one to be co-trained, and a student, in float64."""
    built = [seeded(lambda: Net(3, scenario.spare), 0), seeded(lambda: Net(2, scenario.spare), 1)]
    return [model.double() for model in built]


def wrapped(model: nn.Module, options: Optional[Mapping[str, Any]], ranks: int) -> nn.Module:
    return model if options is None or ranks == 1 else DistributedDataParallel(model, **options)


def train(rank: int, ranks: int, scenario: Scenario) -> Dict[str, Any]:
    """Train on this rank's part of every global batch, and return what came of it."""
    teacher, student = networks(scenario)
    teacher.requires_grad_(scenario.co_trained or scenario.teacher is not None)
    models = wrapped(teacher, scenario.teacher, ranks), wrapped(student, scenario.student, ranks)
    return collaborate(*models, scenario, rank, ranks)


def collaborate(teacher: nn.Module, student: nn.Module, scenario: Scenario, rank: int, ranks: int) -> Dict[str, Any]:
    # A loss of single positions: what one rank computes does not depend on what the others have.
    ours = {"schedule": Schedule(interval=1), "trust": FixedTrust(), "distillation": KLDistillation()}
    options = {**ours, **scenario.options()}
    learner = CollaborativeLearner(teacher, student, **options)
    trained = [student, teacher] if scenario.co_trained else [student]
    optimizers = [torch.optim.SGD(model.parameters(), lr=scenario.rate, momentum=0.9) for model in trained]
    inner = [getattr(model, "module", model) for model in (teacher, student)]
    teachers = []
    for step in range(scenario.steps):
        source, classes = (part.chunk(ranks)[rank] for part in (drawn(100 + step, BATCH, INPUTS), labels(step)))
        target = drawn(step, BATCH, INPUTS)
        mask = None
        incomplete = step in scenario.empty or step in scenario.masked
        if incomplete and ranks == 1:
            target = target[: BATCH // 2]  # what the first of two ranks has
        elif step in scenario.empty and rank == ranks - 1:
            target = target[:0]
        else:
            target = target.chunk(ranks)[rank]
            if step in scenario.masked and rank == ranks - 1:
                mask = torch.zeros(len(target), dtype=torch.bool)
        for optimizer in optimizers:
            optimizer.zero_grad()
        # One forward pass, since DistributedDataParallel expects one before each backward pass.
        logits = student(torch.cat([source, target]))
        loss = F.cross_entropy(logits[: len(source)], classes)
        view = target + 0.5 * target.sin() if scenario.view else None
        loss = loss + learner.distill(logits[len(source) :], target, mask=mask, view=view)
        if scenario.co_trained:
            loss = loss + F.cross_entropy(teacher(source), classes)
        loss.backward()
        learner.step(step_fn=lambda: [optimizer.step() for optimizer in optimizers])
        teachers.append(bits(gathered(inner[0])))
    return {
        "rounds": learner.report().to_dict()["rounds"],
        "teachers": teachers,
        "teacher": {name: tensor.numpy() for name, tensor in gathered(inner[0]).items()},
        "student": {name: tensor.numpy() for name, tensor in gathered(inner[1]).items()},
    }


def gathered(model: nn.Module) -> Dict[str, Tensor]:
    """Return the whole tensors of a model, be it sharded or not."""
    state = model.state_dict()
    return {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in state.items()}
