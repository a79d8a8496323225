"""What a KD loss owns is trained by the learner; what is the host's is refused."""

from typing import Any, List, Optional

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


def test_a_plain_function_owns_nothing() -> None:
    projectors = Projectors(kl_distillation)
    projectors.step()
    assert projectors.state_dict() == {"module": {}, "optimizer": None}
    assert torch.is_grad_enabled()
