import enum
import functools
import json
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
import torch

from clda_core.distillation import KLDistillation, WeightedSum
from clda_core.strategy import Strategy, describe
from clda_core.update import Guard, MaskedDistillation, mutual_information
from tests.helpers import batch, loaded, make_learner, networks, saved


class Sample(Strategy):
    def __init__(self, number: float, *, names: Optional[List[str]] = None, inner: Any = None) -> None:
        self.number = number
        self.names = names
        self.inner = inner
        self._state = torch.zeros(3)


class Bare(Strategy):
    pass


HERE = f"{Sample.__module__}.Sample"


def test_a_strategy_is_described_by_its_arguments() -> None:
    assert describe(Sample(0.5, names=["a"], inner=Bare())) == {
        "class": HERE,
        "number": 0.5,
        "names": ["a"],
        "inner": {"class": f"{Bare.__module__}.Bare"},
    }


def test_plain_values_stay_and_containers_become_plain() -> None:
    assert describe([None, True, 2, 0.5, "x", (1, 2), {3: (4,)}]) == [None, True, 2, 0.5, "x", [1, 2], {"3": [4]}]


def test_functions_are_described_by_name_and_bound_arguments() -> None:
    name = "mutual_information"
    assert describe(mutual_information) == name
    assert describe(batch) == f"{batch.__module__}.batch", "a user's"
    assert describe(functools.partial(mutual_information, 1, student_logits=2)) == {
        "partial": name,
        "args": [1],
        "keywords": {"student_logits": 2},
    }
    assert describe(Sample) == HERE


def test_what_is_of_the_package_goes_by_its_bare_name() -> None:
    described = describe(Guard(MaskedDistillation()))
    assert described["class"] == "Guard"
    assert described["update"]["class"] == "MaskedDistillation"
    assert described["criterion"] == "consensus"
    assert describe(Guard) == "Guard"


def test_numpy_numbers_become_plain() -> None:
    numpy = pytest.importorskip("numpy")
    described = describe([numpy.float64(0.5), numpy.float32(0.25), numpy.int64(3)])
    assert described == [0.5, 0.25, 3]
    assert [type(value) for value in described] == [float, float, int]


def test_equal_configurations_are_described_alike_and_others_not() -> None:
    def made(**options: Any) -> Any:
        return describe(Guard(MaskedDistillation(**options)))

    assert made() == made()
    assert made(steps=2) != made()
    assert made(optimizer=functools.partial(torch.optim.SGD, lr=0.1)) != made(
        optimizer=functools.partial(torch.optim.SGD, lr=0.2)
    )
    json.dumps(made())


def test_repr_is_the_constructor_call() -> None:
    assert repr(Sample(0.5, inner=Bare())) == "Sample(number=0.5, names=None, inner=Bare())"


class Trainer:
    """The host, as a user's strategy refers to it: it changes, and knows the learner, which knows the strategy."""

    def __init__(self, epoch: int = 0, learner: Any = None) -> None:
        self.epoch = epoch
        self.learner = learner


class OfTrainer(Strategy):
    def __init__(self, trainer: Any, every: int = 1, inner: Any = None) -> None:
        self.trainer, self.every, self.inner = trainer, every, inner

    def due(self, step: int) -> bool:
        return step % self.every == 0

    observes = due

    def strength(self, step: int) -> float:
        return 1.0


class Foreign:
    """A schedule by what it can do."""

    def __init__(self, every: int) -> None:
        self.every = every

    due = observes = strength = OfTrainer.due


class FeatureLoss(torch.nn.Module):
    def __init__(self, host: Any, weight: float = 1.0) -> None:
        super().__init__()
        self.__dict__["host"] = host
        self.weight = weight

    def forward(self, student: Any, teacher: Any, mask: Any = None) -> Any:
        return self.weight * (student - teacher).pow(2).mean()


def test_what_a_strategy_holds_of_the_host_is_described_by_its_class() -> None:
    trainer = Trainer()
    schedule = OfTrainer(trainer, inner=Foreign(3))
    described = describe(schedule)
    here = Trainer.__module__
    assert described == {
        "class": f"{here}.OfTrainer",
        "trainer": {"class": f"{here}.Trainer"},
        "every": 1,
        "inner": {"class": f"{here}.Foreign", "every": 3},
    }
    trainer.epoch = 7
    assert describe(schedule) == described
    inside = describe(WeightedSum([(1.0, KLDistillation()), (0.5, FeatureLoss(torch.nn.Linear(2, 2), weight=4.0))]))
    assert inside["terms"][1][1] == {
        "class": f"{here}.FeatureLoss",
        "host": {"class": "torch.nn.modules.linear.Linear"},
        "weight": 4.0,
    }


@pytest.mark.parametrize("role", ["schedule", "distillation"])
def test_a_strategy_that_refers_to_its_learners_host_can_be_saved(role: str) -> None:
    def built() -> Any:
        trainer = Trainer()
        options: Dict[str, Any] = {role: OfTrainer(trainer) if role == "schedule" else FeatureLoss(trainer)}
        trainer.learner = make_learner(*networks(), **options)
        return trainer.learner

    learner, other = built(), built()
    optimizer = torch.optim.SGD(learner.student.parameters(), lr=0.1)
    learner.distill(learner.student(batch()), batch()).backward()
    learner.step(optimizer)
    other.load_state_dict(loaded(saved(learner.state_dict())))
    assert other.report().steps == 1


def test_a_strategy_that_refers_to_itself() -> None:
    trainer = Trainer()
    trainer.__class__ = type("Speaking", (Trainer,), {"__repr__": lambda self: f"<{self.learner!r}>"})
    trainer.learner = schedule = OfTrainer(trainer)
    schedule.inner = [schedule]
    assert repr(schedule) == "OfTrainer(trainer=<...>, every=1, inner=[...])"
    assert describe(schedule)["inner"] == ["..."]


def test_options_of_any_plain_kind() -> None:
    class Level(enum.Enum):
        HIGH = 3

    described = describe([Path("a") / "b", {"c", "b", "a"}, Level.HIGH, torch.float16, torch.device("cpu")])
    level = f"{Level.__module__}.{Level.__qualname__}.HIGH"
    assert described == [str(Path("a") / "b"), ["a", "b", "c"], level, "torch.float16", "cpu"]
    assert describe(float("nan")) == describe(float("nan")), "else no run could be resumed"
    json.dumps(described)


def test_a_property_that_raises_is_left_out() -> None:
    class Odd(Strategy):
        def __init__(self, size: int = 1) -> None:
            pass

        @property
        def size(self) -> int:
            raise RuntimeError("not yet")

    assert describe(Odd()) == {"class": f"{Odd.__module__}.{Odd.__qualname__}"}
    assert repr(Odd()) == "Odd()"
