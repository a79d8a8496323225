import copy
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import Tensor, nn

from clda_core import CldaError, CollaborativeLearner, Schedule
from clda_core._host.borrowing import borrowed, requiring_grad
from clda_core.distillation import KLDistillation
from clda_core.relation import BySimilarity
from clda_core.saliency import Fisher
from clda_core.schedule import Never
from clda_core.selection import AllLayers
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation
from tests.helpers import bits, every_step, make_learner, random_states, seeded, values
from tests.models import ResNet


class FrozenNorm(nn.Module):
    """Overrides ``train()`` to keep its norm in eval mode, as detectors and segmenters do, and counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.calls = 0

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self.norm.training = False
        self.calls += 1
        return self


def modes(*models: nn.Module) -> List[bool]:
    return [module.training for model in models for module in model.modules()]


def mixed() -> nn.Module:
    model = ResNet((2, 1)).train()
    model.layer1[0].bn1.eval()
    model.layer2.eval()
    model.layer2[0].conv1.train()
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_mixed_modes_are_restored(fails: bool) -> None:
    model, other = mixed(), FrozenNorm().train()
    before, calls = modes(model, other), other.calls
    assert len(set(before)) == 2

    def borrow() -> None:
        with borrowed(model, other):
            assert not any(modes(model, other))
            if fails:
                raise ValueError("stop")

    if fails:
        with pytest.raises(ValueError, match="stop"):
            borrow()
    else:
        borrow()
    assert modes(model, other) == before
    assert other.calls == calls


def test_a_model_may_be_borrowed_in_a_block_that_has_it_and_be_named_twice() -> None:
    model = mixed()
    before = modes(model)
    with borrowed(model, model):
        with borrowed(model):
            pass
        assert not any(modes(model))
    assert modes(model) == before


def test_a_pass_keeps_statistics_and_draws_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).train()
    state, rng = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    with borrowed(model):
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_modes_are_changed_past_the_slow_setter_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model, slow = mixed(), []
    setter = nn.Module.__setattr__
    monkeypatch.setattr(nn.Module, "__setattr__", lambda *arguments: slow.append(setter(*arguments)))
    with borrowed(model):
        assert not any(modes(model))
    assert not slow


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_lent_in_eval_mode_too() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())).train()
    before = bits(model.state_dict())
    for _ in range(3):
        with borrowed(model):
            assert torch.equal(model(torch.ones(2, 2)), model(torch.ones(2, 2)))
            assert not any(modes(model))
        assert all(modes(model))
        assert bits(model.state_dict()) == before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_requiring_grad_restores_flags_and_grad_mode(fails: bool, enabled: bool) -> None:
    a, b, c, outside = (nn.Parameter(torch.ones(2)) for _ in range(4))
    for parameter, flag in zip((a, b, c), (True, False, True)):
        parameter.requires_grad_(flag)

    def borrow() -> Any:
        with requiring_grad([b, b], of=[a, b, c]):
            assert [p.requires_grad for p in (a, b, c, outside)] == [False, True, False, True]
            found = torch.autograd.grad((a * b * c).sum(), [b])
            if fails:
                raise ValueError("stop")
            return found

    with torch.set_grad_enabled(enabled):
        if fails:
            with pytest.raises(ValueError, match="stop"):
                borrow()
        else:
            assert borrow()[0].tolist() == [1.0, 1.0]
        assert torch.is_grad_enabled() is enabled
    assert [p.requires_grad for p in (a, b, c, outside)] == [True, False, True, True]
    assert all(p.grad is None for p in (a, b, c, outside))


def test_gradients_are_off_or_on_for_what_was_asked_for_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    x = torch.ones(1, 2)
    with borrowed(model):
        assert not model(x).requires_grad
    with torch.no_grad(), borrowed(model, grad_to=model[1].parameters()) as lent:
        assert lent is model
        model(x).sum().backward()
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False]
    assert [parameter.grad is None for parameter in model.parameters()] == [True, True, False, False]
    assert torch.is_grad_enabled()


def test_strategies_find_modes_and_gradients_of_the_host_and_may_draw() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    before = random_states()
    with borrowed(model, doing="round", passes=False):
        assert model(torch.ones(1, 2)).requires_grad
        assert model[0].training
    assert random_states() == before


def test_requiring_grad_works_in_a_host_that_switched_gradients_off() -> None:
    parameter = nn.Parameter(torch.ones(1), requires_grad=False)
    with torch.no_grad(), requiring_grad([parameter]):
        assert (parameter * 2).requires_grad
    assert not parameter.requires_grad


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.compile came with torch 2.0")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("in_place", [False, True])
def test_strategies_get_the_model_itself_and_it_stays_compiled(in_place: bool) -> None:
    if in_place and not hasattr(nn.Module, "compile"):
        pytest.skip("Module.compile came with torch 2.2")
    pytest.importorskip("torch._dynamo").reset()  # forget what an earlier test compiled
    runs, hooked = [], []

    def backend(graph: Any, _: Any) -> Any:
        def run(*inputs: Tensor) -> Any:
            runs.append(graph)
            return graph.forward(*inputs)

        return run

    network, x = Network(), torch.randn(4, 3)
    if in_place:
        compiled = network
        network.compile(backend=backend)
    else:
        compiled = torch.compile(network, backend=backend)
    expected = compiled(x)
    assert len(runs) == 1
    with borrowed(compiled, passes=False):
        handle = network.linear.register_forward_hook(lambda *_: hooked.append(True))
        assert torch.equal(compiled(x), expected)
        handle.remove()
    assert hooked
    assert len(runs) == 1
    compiled(x)
    assert len(runs) == 2
    assert runs[0] is runs[1]


# ---------------------------------------------------------------------------- models that change after construction


def plain(width: int) -> Any:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


UPDATES: Dict[str, Callable[[], Any]] = {
    "masked": lambda: MaskedDistillation(learning_rate=1e-2),
    "guarded": lambda: Guard(MaskedDistillation(learning_rate=1e-2), tolerance=1e9),
    "average": lambda: Average(decay=0.5),
    "aligned": lambda: AlignedAverage(decay=0.5),
}


def assigned(model: Any) -> None:
    """What ``load_state_dict(assign=True)`` does: new parameters of the same values."""
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach().clone()))


def swapped(model: Any) -> None:
    model[2] = copy.deepcopy(model[2])


def steps(learner: CollaborativeLearner, count: int, seed: int = 0) -> None:
    for step in range(seed, seed + count):
        images = torch.randn(40, 4, generator=torch.Generator().manual_seed(step))
        learner.distill(learner.student(images), images).backward()
        learner.step(step_fn=lambda: None)


@pytest.mark.parametrize("change", [assigned, swapped])
@pytest.mark.parametrize("update", UPDATES)
def test_replaced_parameters_of_the_same_names_and_shapes_are_followed_bit_for_bit(update: str, change: Any) -> None:
    outcomes = []
    for changed in (False, True):
        teacher, student = seeded(lambda: plain(6), 0), seeded(lambda: plain(5), 1)
        learner = make_learner(teacher, student, update=UPDATES[update](), selection=AllLayers())
        steps(learner, 2)
        if changed:
            change(teacher)
        steps(learner, 2, seed=2)
        outcomes.append((values(teacher), bits(learner.state_dict())))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] != values(seeded(lambda: plain(6), 0))


def parametrized(model: Any) -> None:
    nn.utils.weight_norm(model[2])


def pruned(model: Any) -> None:
    model[0], model[2] = nn.Linear(4, 3), nn.Linear(3, model[4].in_features)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("change", [parametrized, pruned])
@pytest.mark.parametrize("update", UPDATES)
def test_renamed_or_resized_parameters_of_the_teacher_are_refused_with_the_reason(
    update: str, change: Any, observed: bool
) -> None:
    teacher, student = seeded(lambda: plain(6), 0), seeded(lambda: plain(5), 1)
    schedule = every_step(observe_every=1 if observed else 4)
    learner = make_learner(teacher, student, update=UPDATES[update](), selection=AllLayers(), schedule=schedule)
    steps(learner, 1)
    change(teacher)
    before = values(teacher)
    with pytest.raises(CldaError, match="the teacher's parameters were renamed, resized or replaced"):
        steps(learner, 1)
    assert values(teacher) == before


@pytest.mark.parametrize("update", UPDATES)
def test_a_resized_student_is_refused_only_where_its_layers_are_read(update: str) -> None:
    teacher, student = seeded(lambda: plain(6), 0), seeded(lambda: plain(5), 1)
    learner = make_learner(teacher, student, update=UPDATES[update](), selection=AllLayers())
    steps(learner, 1)
    pruned(student)
    if learner.update.needs_relation:
        with pytest.raises(CldaError, match="the student's parameters were renamed, resized or replaced"):
            steps(learner, 1)
    else:
        steps(learner, 1)
        assert len(learner.report().rounds) == 2


def test_models_and_strategies_of_a_learner_cannot_be_exchanged() -> None:
    teacher, student = seeded(lambda: plain(6), 0), seeded(lambda: plain(5), 1)
    learner = make_learner(teacher, student)
    config = bits(learner.state_dict())
    others = {
        "teacher": plain(6),
        "student": plain(5),
        "extract": lambda output: output,
        "saliency": Fisher(),
        "selection": AllLayers(),
        "relation": BySimilarity(),
        "update": Average(),
        "distillation": KLDistillation(),
        "schedule": Schedule(warmup=3),
        "probe": lambda logits, mask: logits.sum(),
        "keep_rounds": 2,
    }
    for name, other in others.items():
        with pytest.raises(CldaError, match=rf"learner\.{name} cannot be replaced.*build a new CollaborativeLearner"):
            setattr(learner, name, other)
    assert bits(learner.state_dict()) == config
    learner.enabled = False
    assert not learner.observing


# ------------------------------------------------------------------------- models that return the same memory always


class Static(nn.Module):
    """Writes its output over the one before, as a replayed CUDA graph does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = plain(width)
        self.memory: List[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        output = self.inner(x)
        if output.requires_grad:
            return output
        if not self.memory:
            self.memory.append(output.clone())
        self.memory[0].data.copy_(output)
        return self.memory[0]


@pytest.mark.parametrize("update", UPDATES)
def test_outputs_in_memory_that_the_next_pass_overwrites(update: str) -> None:
    """Guards compare the teacher's logits before and after; losses of two batches wait for one ``backward()``."""
    outcomes = []
    for build in (plain, Static):
        teacher, student = seeded(lambda build=build: build(6), 0), seeded(lambda build=build: build(5), 1)
        learner = make_learner(teacher, student, update=UPDATES[update](), selection=AllLayers())
        inner = student if build is plain else student.inner
        gradients = []
        for step in range(3):
            inner.zero_grad()
            losses = []
            for part in range(2):
                images = torch.randn(6, 4, generator=torch.Generator().manual_seed(2 * step + part))
                losses.append(learner.distill(student(images), images))
            sum(losses).backward()
            gradients.append([bits(parameter.grad) for parameter in inner.parameters()])
            learner.step(step_fn=lambda: None)
        rounds = [(record.score_before, record.score_after) for record in learner.report().rounds]
        outcomes.append((list(values(teacher).values()), gradients, rounds))
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0][2]) == 3


def test_a_loss_that_keeps_the_teachers_logits_for_backward_gets_its_own_copy() -> None:
    teacher, student = seeded(lambda: Static(6), 0), seeded(lambda: plain(5), 1)

    def squares(of_student: Tensor, of_teacher: Tensor, mask: Any = None) -> Tensor:
        return (of_student * of_teacher).sum()

    learner = make_learner(teacher, student, distillation=squares, schedule=Never())
    first, second = torch.ones(2, 4), -torch.ones(2, 4)
    with torch.no_grad():
        expected = [teacher(x).clone() for x in (first, second)]
    outputs = [torch.zeros(2, 3, requires_grad=True) for _ in range(2)]
    sum(learner.distill(output, x) for output, x in zip(outputs, (first, second))).backward()
    assert [bits(output.grad) for output in outputs] == [bits(value) for value in expected]
