from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clda_core.distillation import kl_distillation
from clda_core.errors import CldaError
from clda_core.layers import canonical_parameters
from clda_core.update import MaskedDistillation, RoundContext
from clda_core.update.masked_distillation import all_finite
from tests.helpers import no_traces
from tests.models import ResNet, mlp
from tests.reference_update import Adam, float64
from tests.update.rounds import changed, images, randomise, round_context, same_bits, values


def vectors(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def pair(dtype: torch.dtype = torch.float32) -> Any:
    return randomise(mlp(hidden=6), 1).to(dtype), randomise(mlp(hidden=4), 2).to(dtype)


def kl_to_student(teacher: nn.Module, student: nn.Module, inputs: Tensor) -> Tensor:
    return kl_distillation(teacher(inputs), student(inputs).detach(), temperature=1.0)


def gradients(teacher: nn.Module, student: nn.Module, inputs: Tensor) -> Dict[str, np.ndarray]:
    parameters = dict(teacher.named_parameters())
    found = torch.autograd.grad(kl_to_student(teacher, student, inputs), list(parameters.values()))
    return {name: float64(gradient) for name, gradient in zip(parameters, found)}


@pytest.mark.parametrize("frozen", [False, True])
def test_only_the_selected_layers_change_and_nothing_else_is_touched(frozen: bool) -> None:
    teacher, student = randomise(ResNet((2, 1)), 1), randomise(ResNet((1, 1), width=2), 2)
    for index, parameter in enumerate(teacher.parameters()):
        parameter.requires_grad_(not frozen and index != 3)
        parameter.grad = torch.full_like(parameter, 2.0) if index % 2 else None
    student.fc.weight.grad = torch.ones_like(student.fc.weight)
    of_teacher, of_student = values(teacher), values(student)
    context = round_context(teacher, student, ["layer1.1", "fc"], inputs=images())
    with no_traces(teacher, student):
        result = MaskedDistillation(steps=2).apply(context)
    assert result.updated == ("layer1.1", "fc")
    assert not result.skipped
    assert changed(teacher, of_teacher) == [name for layer in context.layers for name in layer.parameters]
    assert not changed(student, of_student)


@pytest.mark.parametrize("selected", [["0"], ["5"], ["0", "2", "5"]])
def test_it_brings_the_teacher_closer_to_the_student_on_the_batch(selected: List[str]) -> None:
    teacher, student = pair()
    update = MaskedDistillation(learning_rate=1e-3)
    distances = [kl_to_student(teacher, student, vectors()).item()]
    for _ in range(10):
        update.apply(round_context(teacher, student, selected, inputs=vectors()))
        distances.append(kl_to_student(teacher, student, vectors()).item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.98 * distances[0]


def test_equals_adam_on_the_masked_gradient_over_rounds_that_select_differently() -> None:
    """Rounds differ in layers and strength; a layer moves only in rounds that select it."""
    teacher, student = pair(torch.float64)
    update, oracle, rate = MaskedDistillation(learning_rate=0.01), Adam(), 0.01
    for number, (selected, strength) in enumerate([(["0", "2"], 1.0), (["2", "5"], 0.5), (["0", "2"], 0.25)]):
        batch = vectors(number, torch.float64)
        context = round_context(teacher, student, selected, inputs=batch, strength=strength)
        names = [name for layer in context.layers for name in layer.parameters]
        before = values(teacher)
        expected = {name: float64(tensor) for name, tensor in before.items()}
        found = {name: gradient for name, gradient in gradients(teacher, student, batch).items() if name in names}
        oracle.step(expected, found, rate * strength)
        update.apply(context)
        for name, now in values(teacher).items():
            assert np.allclose(float64(now), expected[name], rtol=1e-9, atol=1e-12), (number, name)
            assert name in names or same_bits(now, before[name]), (number, name)


@pytest.mark.parametrize(
    "factory",
    [
        lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
    ],
)
def test_neither_momentum_nor_weight_decay_moves_what_is_not_selected(factory: Any) -> None:
    teacher, student = pair()
    update = MaskedDistillation(optimizer=factory)
    update.apply(round_context(teacher, student, inputs=vectors()))
    before = values(teacher)
    assert len(update.state_dict()["optimizer"]["state"]) == len(before)
    update.apply(round_context(teacher, student, ["2"], inputs=vectors()))
    assert changed(teacher, before) == ["2.weight", "2.bias", "3.weight", "3.bias"]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_own_optimizer_factory_and_strength(strength: float) -> None:
    teacher, student = pair(torch.float64)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    seen: List[bool] = []

    def factory(parameters: Any) -> torch.optim.Optimizer:
        seen.extend(parameter.requires_grad for parameter in parameters)
        return sgd(parameters)

    update = MaskedDistillation(optimizer=factory, learning_rate=7.0)
    for number in range(2):
        before = values(teacher)
        for parameter in teacher.parameters():
            parameter.requires_grad_(True)
        found = gradients(teacher, student, vectors(number, torch.float64))
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
        batch = vectors(number, torch.float64)
        update.apply(round_context(teacher, student, ["5"], inputs=batch, strength=strength))
        for name in ("5.weight", "5.bias"):
            expected = float64(before[name]) - 0.1 * strength * found[name]
            assert np.allclose(float64(values(teacher)[name]), expected, rtol=1e-12, atol=1e-14)
        assert changed(teacher, before) == (["5.weight", "5.bias"] if strength else [])
    # Built once, with parameters that look trainable to a factory that sorts by that.
    assert seen == [True] * len(list(teacher.parameters()))


def test_saved_and_loaded_makes_the_same_next_steps_bit_for_bit(tmp_path: Any) -> None:
    def rounds(update: MaskedDistillation, teacher: nn.Module, numbers: Any) -> None:
        for number in numbers:
            selected = ["0", "2"] if number % 2 else ["2", "5"]
            context = round_context(teacher, student, selected, inputs=vectors(number), strength=1 / (1 + number))
            update.apply(context)

    teacher, student = pair()
    update = MaskedDistillation(learning_rate=0.01, steps=2)
    rounds(update, teacher, range(3))
    torch.save([update.state_dict(), teacher.state_dict()], tmp_path / "state.pt")
    rounds(update, teacher, range(3, 6))

    state, of_teacher = torch.load(tmp_path / "state.pt")
    resumed, other = MaskedDistillation(learning_rate=0.01, steps=2), pair()[0]
    other.load_state_dict(of_teacher)
    resumed.load_state_dict(state)
    assert str(resumed.state_dict()) == str(state)  # before the first round too
    rounds(resumed, other, range(3, 6))
    assert not changed(other, values(teacher))


def test_a_fresh_update_has_no_state() -> None:
    update = MaskedDistillation()
    assert update.state_dict() == {}
    update.load_state_dict({})
    assert update.state_dict() == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_student_predictions_write_nothing(value: float) -> None:
    teacher, student = pair()
    with torch.no_grad():
        student[5].bias[1] = value
    before = values(teacher)
    result = MaskedDistillation(learning_rate=0.1).apply(round_context(teacher, student, ["0", "5"], inputs=vectors()))
    assert not changed(teacher, before)
    assert result.updated == ()
    assert result.skipped == dict.fromkeys(["0", "5"], "a gradient of the round is not finite")


def test_what_was_written_before_a_non_finite_gradient_is_reported() -> None:
    teacher, student = pair()
    calls: List[int] = []

    def overflowing(student_logits: Tensor, teacher_logits: Tensor, mask: Any) -> Tensor:
        calls.append(1)
        return (student_logits - teacher_logits).pow(2).mean() * (1.0 if len(calls) == 1 else float("nan"))

    before = values(teacher)
    update = MaskedDistillation(steps=3, distillation=overflowing)
    result = update.apply(round_context(teacher, student, ["5"], inputs=vectors()))
    assert len(calls) == 2
    assert changed(teacher, before) == ["5.weight", "5.bias"]
    assert result.updated == ("5",)


class Branches(nn.Module):
    """Two heads, of which the forward pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.spare = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


@pytest.mark.parametrize("selected", [["spare"], ["body", "spare"]])
def test_layers_that_the_loss_does_not_reach_are_reported(selected: List[str]) -> None:
    teacher, student = randomise(Branches()), pair()[1]
    before = values(teacher)
    result = MaskedDistillation().apply(round_context(teacher, student, selected, inputs=vectors()))
    assert result.skipped == {"spare": "no gradient reaches it"}
    assert result.updated == tuple(name for name in selected if name != "spare")
    assert {name.partition(".")[0] for name in changed(teacher, before)} == set(result.updated)


class Sum(nn.Module):
    """Its parameters get one and the same gradient tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a + self.b


def test_gradients_that_share_memory_move_their_parameters_one_by_one() -> None:
    teacher, student = Sum(), Sum()
    student.a.data.fill_(1.0)
    update = MaskedDistillation(distillation=lambda s, t, mask: (s - t).sum(), optimizer=sgd)
    update.apply(round_context(teacher, student, inputs=vectors()))
    assert same_bits(teacher.a.detach(), teacher.b.detach())
    assert bool((teacher.a < 0).all())


def test_the_loss_gets_teacher_student_and_mask() -> None:
    teacher, student = pair()
    got: List[Any] = []

    def distillation(of_teacher: Tensor, of_student: Tensor, mask: Any) -> Tensor:
        got.append((of_teacher, of_student, mask))
        return (of_teacher - of_student).pow(2).mean()

    mask = torch.tensor([True] * 5 + [False])
    MaskedDistillation(distillation=distillation).apply(
        round_context(teacher, student, inputs=vectors(), mask=mask, forward=eval_forward(teacher, student))
    )
    of_teacher, of_student, given = got[0]
    assert of_teacher.requires_grad
    assert torch.equal(of_student, student(vectors()))
    assert not of_student.requires_grad
    assert given is mask


def eval_forward(*models: nn.Module) -> Callable[[nn.Module, Any], Any]:
    from tests.update.rounds import forward

    def checked(model: nn.Module, inputs: Any) -> Any:
        assert model in models
        assert not any(module.training for module in model.modules())
        return forward(model, inputs)

    return checked


def test_an_error_leaves_no_traces() -> None:
    teacher, student = pair()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
        parameter.grad = torch.ones_like(parameter)

    def failing(model: nn.Module, inputs: Any) -> Any:
        if model is teacher:
            raise ValueError("out of memory")
        return eval_forward(student)(model, inputs)

    with no_traces(teacher, student, values_too=True), pytest.raises(ValueError, match="out of memory"):
        MaskedDistillation().apply(round_context(teacher, student, inputs=vectors(), forward=failing))

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ValueError("no step")

    update = MaskedDistillation(optimizer=lambda parameters: Failing(parameters, lr=0.1))
    with no_traces(teacher, student, values_too=True), pytest.raises(ValueError, match="no step"):
        update.apply(round_context(teacher, student, inputs=vectors()))


def test_no_inputs() -> None:
    teacher, student = pair()
    with pytest.raises(CldaError, match="needs this step's target batch.*received distill.. without inputs.*Fix:"):
        MaskedDistillation().apply(round_context(teacher, student))


@pytest.mark.parametrize(
    "factory",
    [
        lambda parameters: sgd(list(parameters)[1:]),
        lambda parameters: sgd(pair()[1].parameters()),
        lambda parameters: None,
    ],
)
def test_an_optimizer_of_other_parameters(factory: Any) -> None:
    teacher, student = pair()
    with pytest.raises(CldaError, match="does not hold the teacher's parameters: expected an optimizer of these 8"):
        MaskedDistillation(optimizer=factory).apply(round_context(teacher, student, inputs=vectors()))


def test_one_update_cannot_serve_two_teachers() -> None:
    update, student = MaskedDistillation(), pair()[1]
    update.apply(round_context(pair()[0], student, inputs=vectors()))
    with pytest.raises(CldaError, match="give every learner an update of its own"):
        update.apply(round_context(pair()[0], student, inputs=vectors()))


def test_class_counts_that_differ() -> None:
    teacher, student = mlp(classes=4), mlp(classes=3)
    with pytest.raises(CldaError, match="class counts differ"):
        MaskedDistillation().apply(round_context(teacher, student, inputs=vectors()))


def test_tied_weights_are_stepped_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).tanh()).tanh())

    teacher, student = randomise(Tied(), 1).double(), pair(torch.float64)[1]
    expected = float64(teacher.first.weight)
    found = gradients(teacher, student, vectors(0, torch.float64))
    MaskedDistillation(optimizer=sgd).apply(
        round_context(teacher, student, ["first"], inputs=vectors(0, torch.float64))
    )
    assert teacher.second.weight is teacher.first.weight
    assert list(canonical_parameters(teacher)) == list(found)
    assert np.allclose(float64(teacher.first.weight), expected - 0.1 * found["first.weight"], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is out of range.*>= 1, received 0"),
        ({"steps": 1.5}, "steps is not an integer"),
        ({"learning_rate": 0.0}, "learning_rate is out of range.*> 0"),
        ({"learning_rate": float("inf")}, "learning_rate is not a finite number"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(CldaError, match=message):
        MaskedDistillation(**options)


def test_the_context_runs_the_student_once() -> None:
    teacher, student = pair()
    runs: List[nn.Module] = []
    context: RoundContext = round_context(
        teacher, student, inputs=vectors(), forward=lambda model, x: runs.append(model) or eval_forward(model)(model, x)
    )
    assert context.student_outputs() is context.student_outputs()
    assert runs == [student]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_element_that_is_not_finite_is_found(value: float) -> None:
    tensors = [torch.ones(3), torch.full((4, 4), torch.finfo(torch.float32).max), torch.ones(2, dtype=torch.half)]
    assert all_finite(tensors)
    tensors[1][2, 3] = value
    assert not all_finite(tensors)
    assert not all_finite([torch.tensor([float("inf"), -float("inf")])])
    assert all_finite([torch.zeros(0), torch.zeros(2, 0)])


def test_a_state_saved_where_adam_is_fused_is_continued_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    (teacher, student), update = pair(), MaskedDistillation()
    update.apply(round_context(teacher, student, inputs=vectors()))
    state = update.state_dict()
    state["optimizer"]["param_groups"][0]["fused"] = True
    monkeypatch.setattr("clda_core._host.compat._has_fused_adam", lambda: False)
    resumed = MaskedDistillation()
    resumed.load_state_dict(state)
    assert resumed.apply(round_context(teacher, student, inputs=vectors())).updated
    assert not resumed.state_dict()["optimizer"]["param_groups"][0].get("fused")


def test_a_state_saved_with_the_plain_adam_is_continued_alike() -> None:
    student = pair()[1]
    teachers: List[nn.Module] = []
    for optimizer in (None, lambda parameters: torch.optim.Adam(parameters, lr=1e-4)):
        teacher, first, then = pair()[0], MaskedDistillation(optimizer=optimizer), MaskedDistillation()
        first.apply(round_context(teacher, student, inputs=vectors(1)))
        then.load_state_dict(first.state_dict())
        then.apply(round_context(teacher, student, inputs=vectors(2)))
        teachers.append(teacher)
    assert not changed(teachers[0], values(teachers[1]))
