"""What a KD loss owns is trained by the learner; what is the host's is refused."""

import copy
from typing import Any, Dict, List, Optional

import pytest
import torch
from torch import Tensor, nn

from clda_core import CldaError
from clda_core.distillation import WeightedSum, kl_distillation
from clda_core.distillation.projectors import Projectors
from clda_core.update import Guard, MaskedDistillation
from tests.helpers import WithParameter, batch, bits, make_learner, networks, no_traces, sgd, values


class Holding(nn.Module):
    """A KD loss that keeps a model, as one does to hook its features."""

    def __init__(self, model: Optional[nn.Module]) -> None:
        super().__init__()
        self.model = model

    def forward(self, student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        return kl_distillation(student, teacher, mask=mask)


class HoldingCriterion(Holding):
    def forward(self, *logits: Tensor) -> Tensor:  # type: ignore[override]
        return logits[0].sum()


@pytest.mark.parametrize("whose", ["teacher", "student"])
@pytest.mark.parametrize("where", ["loss", "term", "part", "frozen", "probe", "update's loss", "criterion"])
def test_a_strategy_that_holds_a_model_is_refused_at_construction(where: str, whose: str) -> None:
    teacher, student = networks()
    model: Any = teacher if whose == "teacher" else student
    if where == "frozen":
        model.requires_grad_(False)
    options = {
        "loss": lambda: {"distillation": Holding(model)},
        "frozen": lambda: {"distillation": Holding(model)},
        "term": lambda: {"distillation": WeightedSum([(1.0, Holding(model))])},
        "part": lambda: {"distillation": Holding(model.head)},
        "probe": lambda: {"probe": Holding(model)},
        "update's loss": lambda: {"update": Guard(MaskedDistillation(distillation=Holding(model)))},
        "criterion": lambda: {"update": Guard(MaskedDistillation(), criterion=HoldingCriterion(model))},
    }[where]()
    with no_traces(teacher, student, values_too=True), pytest.raises(CldaError, match=f"holds the {whose}'s param"):
        make_learner(teacher, student, **options)


@pytest.mark.parametrize("way", ["step", "halves"])
def test_a_loss_that_gets_the_student_later_is_refused_before_the_hosts_step(way: str) -> None:
    teacher, student = networks()
    loss, optimizer = Holding(None), sgd(student)
    learner = make_learner(teacher, student, distillation=loss)
    learner.distill(student(batch()), batch()).backward()
    loss.model = student
    before, state = values(student), bits(optimizer.state_dict())
    gradients = [parameter.grad for parameter in student.parameters()]
    with pytest.raises(CldaError, match="holds the student's param"):
        learner.step(optimizer) if way == "step" else learner.observe()
    assert values(student) == before
    assert bits(optimizer.state_dict()) == state
    assert all(parameter.grad is gradient for parameter, gradient in zip(student.parameters(), gradients))


def test_a_loss_may_refer_to_a_model_without_owning_it() -> None:
    teacher, student = networks()
    loss = WithParameter()
    loss.models = [student]  # a list hides it from parameters()
    learner = make_learner(teacher, student, distillation=loss)
    before = values(student)
    factor = float(loss.factor.detach())
    learner.distill(student.eval()(batch()), batch()).backward()
    gradients: List[Any] = [parameter.grad for parameter in student.parameters()]
    learner.step(step_fn=lambda: None)
    assert values(student) == before
    assert all(parameter.grad is gradient for parameter, gradient in zip(student.parameters(), gradients))
    assert float(loss.factor.detach()) != factor
    assert list(learner.state_dict()["projectors"]["module"]) == ["factor"]


class Growing(nn.Module):
    """Makes a scale for each layer when it first sees it, and the bias of the first is frozen."""

    reads = "features"

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterDict({"bias": nn.Parameter(torch.ones(1), requires_grad=False)})

    def forward(self, student: Any, teacher: Any, mask: Optional[Tensor] = None) -> Tensor:
        for index in range(len(student)):
            if f"layer{index}" not in self.scales:
                self.scales[f"layer{index}"] = nn.Parameter(torch.ones(1))
        pairs = enumerate(zip(student, teacher))
        return sum((self.scales[f"layer{index}"] * s - t).pow(2).mean() for index, (s, t) in pairs)


def step(projectors: Projectors, layers: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = ([torch.randn(4, 3, generator=generator) for _ in range(layers)] for _ in range(2))
    projectors.module(student, teacher).backward()
    projectors.step()
    projectors.drop_gradients()


def test_parameters_that_appear_after_the_first_step_are_trained_too() -> None:
    loss = Growing()
    projectors = Projectors(loss)
    for seed in range(3):
        step(projectors, 1, seed)
    step(projectors, 2, seed=3)
    assert float(loss.scales["layer1"].detach()) != 1.0
    state = projectors.state_dict()["optimizer"]
    counts = {name: float(moments["step"]) for name, moments in state["optimizer"]["state"].items()}
    assert counts == {"scales.layer0": 4.0, "scales.layer1": 1.0}, "moments stay with their parameters"
    assert loss.scales["bias"].item() == 1.0


def test_moments_are_saved_by_name_and_follow_it() -> None:
    loss = Growing()
    projectors = Projectors(loss)
    step(projectors, 2)
    state = copy.deepcopy(projectors.state_dict())
    other = Growing()
    for name in ("layer1", "layer0"):  # in another order
        other.scales[name] = nn.Parameter(torch.zeros(1))
    again = Projectors(other)
    again.load_state_dict(state)
    for seed in (1, 2):
        step(projectors, 2, seed)
        step(again, 2, seed)
    assert {name: bits(value.detach()) for name, value in loss.named_parameters()} == {
        name: bits(value.detach()) for name, value in other.named_parameters()
    }


def by_position(projectors: Projectors, trained: List[nn.Parameter]) -> Dict[str, Any]:
    """Return the state as it was saved up to version 2: the optimizer's own, of what was not frozen."""
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    of = projectors.state_dict()
    for parameter, moments in zip(trained, of["optimizer"]["optimizer"]["state"].values()):
        optimizer.state[parameter] = moments
    return copy.deepcopy({**of, "optimizer": optimizer.state_dict()})


def test_the_former_state_by_position_still_loads() -> None:
    loss = Growing()
    projectors = Projectors(loss)
    step(projectors, 2)
    trained = [value for value in loss.parameters() if value.requires_grad]
    former = by_position(projectors, trained)
    assert set(former["optimizer"]["state"]) == {0, 1}
    other = Growing()
    other.scales.update({name: nn.Parameter(torch.zeros(1)) for name in ("layer0", "layer1")})
    again = Projectors(other)
    again.load_state_dict(former)
    step(projectors, 2, 1)
    step(again, 2, 1)
    assert bits(again.state_dict()["module"]) == bits(projectors.state_dict()["module"])
    moments = [of.state_dict()["optimizer"]["optimizer"]["state"] for of in (again, projectors)]
    assert bits(moments[0]) == bits(moments[1])


def test_a_former_state_of_other_parameters_is_refused_and_changes_nothing() -> None:
    loss = Growing()
    projectors = Projectors(loss)
    step(projectors, 2)
    former = by_position(projectors, [loss.scales["layer0"]])
    before = bits(projectors.state_dict())
    with pytest.raises(CldaError, match="optimizer is of other parameters.*moments of 1"):
        projectors.load_state_dict(former)
    assert bits(projectors.state_dict()) == before


def test_a_plain_function_owns_nothing() -> None:
    projectors = Projectors(kl_distillation)
    projectors.step()
    assert projectors.state_dict() == {"module": {}, "optimizer": {}}
    assert torch.is_grad_enabled()
