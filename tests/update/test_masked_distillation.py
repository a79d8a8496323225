import math
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clda_core import Schedule
from clda_core.distillation import kl_distillation
from clda_core.errors import CldaError
from clda_core.layers import canonical_parameters
from clda_core.lead import FixedTrust
from clda_core.selection import AllLayers
from clda_core.update import MaskedDistillation, RoundContext
from clda_core.update.masked_distillation import all_finite
from tests import helpers
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


def test_an_optimizer_that_needs_a_closure_is_refused_at_the_first_step() -> None:
    teacher, student = pair()
    update = MaskedDistillation(optimizer=torch.optim.LBFGS)
    learner = helpers.make_learner(teacher, student, update=update, schedule=Schedule())
    learner.distill(student(vectors()), vectors()).backward()
    with pytest.raises(CldaError, match=r"cannot step by gradients alone.*no closure, received LBFGS\.step\(closure\)"):
        learner.observe()


def test_one_update_cannot_serve_two_teachers() -> None:
    update, student = MaskedDistillation(), pair()[1]
    update.apply(round_context(pair()[0], student, inputs=vectors()))
    with pytest.raises(CldaError, match="of another teacher.*give every learner an update of its own"):
        update.apply(round_context(pair()[0], student, inputs=vectors()))


def test_an_update_of_another_teachers_rounds_is_refused_in_the_first_step() -> None:
    update = MaskedDistillation()
    update.apply(round_context(*pair(), inputs=vectors()))
    learner = helpers.make_learner(*helpers.networks(), update=update, schedule=Schedule(warmup=20, interval=5))
    learner.distill(learner.student(helpers.batch()), helpers.batch()).backward()
    with helpers.nothing_changed(learner), pytest.raises(CldaError, match="optimizer of another teacher"):
        learner.step(step_fn=lambda: pytest.fail("the optimizer was stepped"))


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
        ({"learns_on": "views"}, "learns_on is unknown: expected 'inputs' or 'view'"),
        ({"relative_rate": 0.0}, "relative_rate is out of range"),
        ({"source_weight": -1.0}, "source_weight is out of range"),
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


# ----------------------------------------------------------------------------- the whole equation, and its step size


def changed_view(inputs: Tensor) -> Tensor:
    return inputs + 0.5 * inputs.cos()


def supervised(network: nn.Module) -> Tensor:
    inputs = vectors(5, torch.float64)
    return nn.functional.cross_entropy(network(inputs), inputs.argmax(1) % 3)


def divergence(prediction: Tensor, target: Tensor) -> Tensor:
    """KL by its definition, averaged over the batch."""
    p, q = target.softmax(1), prediction.softmax(1)
    return (p * (p.log() - q.log())).sum(1).mean()


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("trust", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("learns_on", ["inputs", "view"])
def test_the_whole_loss_by_an_independent_composition(
    learns_on: Any, trust: float, view: bool, source: bool, weight: float
) -> None:
    teacher, student = pair(torch.float64)
    teacher.eval(), student.eval()
    x = vectors(dtype=torch.float64)
    seen = changed_view(x) if view else x
    own, its = teacher(x).detach(), student(x).detach()
    loss = trust * divergence(teacher(seen if learns_on == "view" else x), its)
    if view:
        loss = loss + (1 - trust) * divergence(teacher(seen), own)
    if source:
        loss = loss + weight * supervised(teacher)
    parameters = dict(teacher.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    expected = {name: value.detach() - 0.1 * by for (name, value), by in zip(parameters.items(), gradients)}
    before = values(teacher)
    update = MaskedDistillation(optimizer=sgd, learns_on=learns_on, own_targets=True, source_weight=weight)
    context = round_context(
        teacher,
        student,
        inputs=x,
        view=seen if view else None,
        source_loss=supervised if source else None,
        trust=trust,
    )
    result = update.apply(context)
    if not trust and not view and not (source and weight):
        assert not result.updated
        assert set(result.skipped.values()) == {
            "the student is not trusted, and there is neither a view nor a source loss to learn from"
        }
        assert not changed(teacher, before)
        assert not update.state_dict()["optimizer"]["state"]
        return
    assert result.updated == tuple(layer.name for layer in context.layers)
    for name, value in teacher.named_parameters():
        assert torch.allclose(value.detach(), expected[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("learns_on", ["inputs", "view"])
def test_by_default_the_student_alone_teaches_whatever_the_trust(learns_on: Any, source: bool) -> None:
    """The trust is a factor on the strength of such an update, which is not its own business."""
    teacher, student = pair(torch.float64)
    teacher.eval(), student.eval()
    x = vectors(dtype=torch.float64)
    loss = divergence(teacher(x if learns_on == "inputs" else changed_view(x)), student(x).detach())
    if source:
        loss = loss + supervised(teacher)
    parameters = dict(teacher.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    expected = {name: value.detach() - 0.1 * by for (name, value), by in zip(parameters.items(), gradients)}
    given = {"view": changed_view(x), "source_loss": supervised if source else None, "trust": 0.3}
    update = MaskedDistillation(optimizer=sgd, learns_on=learns_on, source_weight=1.0)
    assert not update.weighs_trust
    update.apply(round_context(teacher, student, inputs=x, **given))
    for name, value in teacher.named_parameters():
        assert torch.allclose(value.detach(), expected[name], rtol=1e-9, atol=1e-12), name


def test_a_view_teaches_where_the_students_view_is_not_known() -> None:
    """The teacher learns on its own view; the student is asked for its prediction on the clean images alone."""
    moved = []
    for options in ({}, {"student_inputs": vectors(dtype=torch.float64)}):
        teacher, student = pair(torch.float64)
        x = vectors(dtype=torch.float64)
        context = round_context(teacher, student, inputs=x, view=changed_view(x), trust=0.0, **options)
        update = MaskedDistillation(optimizer=sgd, learns_on="view", own_targets=True)
        assert update.apply(context).updated
        moved.append(values(teacher))
    assert all(same_bits(moved[0][name], moved[1][name]) for name in moved[0])


def largest_step(update: MaskedDistillation, **options: Any) -> float:
    """Return how far Adam's first step moves the element that moves most: its learning rate."""
    teacher, student = pair(torch.float64)
    before = values(teacher)
    update.apply(round_context(teacher, student, inputs=vectors(dtype=torch.float64), **options))
    return max(float((value.detach() - before[name]).abs().max()) for name, value in teacher.named_parameters())


def test_the_rate_follows_the_hosts_up_to_a_limit_unless_it_is_given() -> None:
    relative = MaskedDistillation().relative_rate
    assert largest_step(MaskedDistillation()) == pytest.approx(1e-4, rel=1e-3)
    assert largest_step(MaskedDistillation(), strength=0.25) == pytest.approx(0.25e-4, rel=1e-3)
    assert largest_step(MaskedDistillation(), learning_rate=6e-5) == pytest.approx(relative * 6e-5, rel=1e-3)
    doubled = MaskedDistillation(relative_rate=2 * relative)
    assert largest_step(doubled, learning_rate=6e-5, strength=0.5) == pytest.approx(relative * 6e-5, rel=1e-3)
    assert largest_step(MaskedDistillation(), learning_rate=1e-2) == pytest.approx(1e-4, rel=1e-3)
    assert largest_step(MaskedDistillation(), learning_rate=1e-2, strength=0.5) == pytest.approx(0.5e-4, rel=1e-3)
    assert largest_step(MaskedDistillation(learning_rate=3e-3), learning_rate=1e-2) == pytest.approx(3e-3, rel=1e-3)


@pytest.mark.parametrize("own_targets", [False, True])
def test_adams_step_shrinks_with_trust_unless_the_trust_is_a_weight(own_targets: bool) -> None:
    teacher, student, _ = host("none")
    update = MaskedDistillation(own_targets=own_targets)
    learner = helpers.make_learner(teacher, student, update=update, selection=AllLayers(), trust=FixedTrust(0.25))
    expected = 1e-4 if own_targets else 0.25e-4
    assert teach_once(teacher, student, learner, None) == pytest.approx(expected, rel=0.05)


def host(kind: str) -> Any:
    teacher, student = helpers.networks()
    optimizers: Dict[str, Callable[[], Any]] = {
        "Adam": lambda: torch.optim.Adam(student.parameters(), lr=6e-5),
        "AdamW, two groups": lambda: torch.optim.AdamW(
            [
                {"params": list(student.stem.parameters()), "lr": 6e-5},
                {"params": list(student.head.parameters()), "lr": 6e-4},
                {"params": list(student.blocks.parameters()), "lr": 0.0},
            ]
        ),
        "SGD": lambda: helpers.sgd(student),
        "none": lambda: None,
    }
    return teacher, student, optimizers[kind]()


def teach_once(teacher: nn.Module, student: nn.Module, learner: Any, optimizer: Any) -> float:
    """Make a step with a round and return how far the teacher moved at most."""
    before = values(teacher)
    learner.distill(student(helpers.batch()), helpers.batch()).backward()
    if optimizer is None:
        learner.step(step_fn=lambda: None)
    else:
        learner.step(optimizer)
    return max(float((value.detach() - before[name]).abs().max()) for name, value in teacher.named_parameters())


@pytest.mark.parametrize(("kind", "rate"), [("Adam", 6e-5), ("AdamW, two groups", 6e-5), ("SGD", None), ("none", None)])
def test_the_hosts_optimizer_gives_the_rate_where_it_is_of_adams_kind(kind: str, rate: Any) -> None:
    teacher, student, optimizer = host(kind)
    update = MaskedDistillation()
    learner = helpers.make_learner(teacher, student, update=update, selection=AllLayers())
    expected = 1e-4 if rate is None else update.relative_rate * rate
    assert teach_once(teacher, student, learner, optimizer) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_highest_rate_of_the_host_counts(as_tensor: bool) -> None:
    teacher, student, optimizer = host("Adam")
    update = MaskedDistillation()
    learner = helpers.make_learner(teacher, student, update=update, selection=AllLayers())
    if as_tensor:  # as torch.compile wants it
        optimizer = type("Host", (), {"param_groups": [{"lr": torch.tensor(0.0), "betas": (0, 0)}], "step": none})()
    peaks = []
    for lr in (0.0, 1e-3, 4e-3, 2e-3, 0.0):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(lr) if as_tensor else lr
        moved = teach_once(teacher, student, learner, optimizer)
        peaks.append(learner.state_dict()["peak"])
        assert (moved > 0) == (peaks[-1] > 0), "a host that does not move yet, at the start of its warm-up"
        assert learner.report().rounds[-1].strength == 1.0
    assert peaks == pytest.approx([0.0, 1e-3, 4e-3, 4e-3, 4e-3])
    reasons = [record.reason for record in learner.report().rounds]
    assert reasons == ["the learning rate of the host's optimizer is 0", None, None, None, None]


def none(optimizer: Any) -> None:
    """Step nothing."""


# -------------------------------------------------------------------------------------------- a source loss that fails


def raises(network: nn.Module) -> Tensor:
    raise ZeroDivisionError("theirs")


BAD: Dict[str, Any] = {
    "no tensor": (lambda network: 1.0, "source loss is no scalar.*received float"),
    "a vector": (lambda network: network(helpers.batch()).sum(1), r"source loss is no scalar.*shape \(64,\)"),
    "an integer": (lambda network: torch.ones((), dtype=torch.int64), "source loss is no scalar.*int64"),
    "raises": (raises, "ZeroDivisionError: theirs"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("rehearsed", [True, False])
def test_a_source_loss_that_fails_is_named_and_the_teacher_is_as_before(case: str, rehearsed: bool) -> None:
    loss, match = BAD[case]
    teacher, student = helpers.networks()
    schedule = {"schedule": Schedule(warmup=20, interval=5)} if rehearsed else {}
    learner = helpers.make_learner(teacher, student, update=MaskedDistillation(source_weight=1.0), **schedule)
    learner.distill(student(helpers.batch()), helpers.batch(), source_loss=loss).backward()
    before = values(teacher)
    with no_traces(teacher, student), pytest.raises(CldaError, match=match):
        learner.step(step_fn=lambda: None)
    assert not changed(teacher, before)
    assert not learner.report().rounds


def test_a_source_loss_without_a_graph_fails_in_the_first_step() -> None:
    teacher, student = helpers.networks()
    learner = helpers.make_learner(
        teacher, student, update=MaskedDistillation(source_weight=1.0), schedule=Schedule(warmup=20, interval=5)
    )
    learner.distill(student(helpers.batch()), helpers.batch(), source_loss=lambda _: torch.ones(())).backward()
    with helpers.nothing_changed(learner), pytest.raises(CldaError, match="source loss does not depend on the teacher"):
        learner.step(step_fn=lambda: pytest.fail("the optimizer was stepped"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_source_loss_that_is_not_finite_teaches_nothing(value: float) -> None:
    teacher, student = pair()
    before, update = values(teacher), MaskedDistillation(source_weight=1.0)
    context = round_context(
        teacher, student, inputs=vectors(), source_loss=lambda network: network(vectors()).sum() * value
    )
    result = update.apply(context)
    assert not result.updated
    assert set(result.skipped.values()) == {"a gradient of the round is not finite"}
    assert not changed(teacher, before)


def test_a_source_loss_that_is_no_function_is_refused_at_once() -> None:
    teacher, student = helpers.networks()
    learner = helpers.make_learner(teacher, student)
    with pytest.raises(CldaError, match="source_loss= cannot be called"):
        learner.distill(student(helpers.batch()), helpers.batch(), source_loss=torch.ones(()))


def test_the_source_loss_is_called_in_rounds_alone_with_the_teacher_in_eval_mode() -> None:
    teacher, student = helpers.networks()
    seen: List[Any] = []

    def loss(network: nn.Module) -> Tensor:
        seen.append((network, network.training))
        return network(helpers.batch(9)).square().mean()

    learner = helpers.make_learner(
        teacher.train(),
        student,
        update=MaskedDistillation(source_weight=1.0),
        schedule=Schedule(interval=2, observe_every=1),
    )
    for number in range(4):
        learner.distill(student(helpers.batch(number)), helpers.batch(number), source_loss=loss).backward()
        learner.step(step_fn=lambda: None)
    assert [network is teacher for network, _ in seen] == [True] * 3, "the rehearsal, and two rounds"
    assert not any(training for _, training in seen)
    assert teacher.training
