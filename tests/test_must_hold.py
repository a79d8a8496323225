"""What must hold, whatever the strategies: one group of tests for each promise, numbered as the promises are.

1 off means off, 3 no deep copies and O(layers) state, 4 in place, 5 step() is sugar, 6 unknown is not non-salient, 7
non-finite, 8 buffers, 9 names, 10 distributed, 11 a checkpoint is a copy, 12 atomic, 13 KD losses, 14 old and new, 15
errors. That nothing leaves traces (2), and that resumed is uninterrupted (11), is in ``test_contracts.py`` for every
strategy, and in ``test_bad_input.py`` for what raises.
"""

import ast
import functools
import gc
import pathlib
import sys
import types
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clda_core
from clda_core import CldaError, CollaborativeLearner, Schedule, group_layers
from clda_core.distillation import FeatureDistillation, KLDistillation, WeightedSum
from clda_core.relation import ByName, BySimilarity
from clda_core.saliency import FixedThreshold, ReferenceThreshold
from clda_core.saliency.observer import Observer
from clda_core.selection import AllLayers
from clda_core.update import Average, Guard, MaskedDistillation, agreement
from tests.distributed import processes, unlike
from tests.helpers import (
    INPUTS,
    SAMPLES,
    FakeScaler,
    Net,
    Segmenter,
    batch,
    bits,
    every_step,
    host_loss,
    images,
    labels,
    loaded,
    make_learner,
    make_sam,
    networks,
    random_states,
    saved,
    scalers,
    seeded,
    sgd,
    train,
    values,
)
from tests.strategies import cases
from tests.test_contracts import options_for

PACKAGE = pathlib.Path(clda_core.__file__).parent

UPDATES: Dict[str, Callable[[], Any]] = {name: make for name, role, make in cases("update")}
SALIENCIES: Dict[str, Callable[[], Any]] = {name: make for name, role, make in cases("saliency")}


# ------------------------------------------------------------------------------------------------- 1 off means off


def host_loop(make: Any, steps: int = 4, **options: Any) -> Tuple[Any, ...]:
    """Run a host with dropout and BatchNorm, with or without a learner, and return all that came of it."""
    torch.manual_seed(7)
    teacher, student = networks()
    optimizer = sgd(student)
    learner = make(teacher, student)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = host_loss(student, step)
        if learner is not None:
            target = batch(step)
            output = student(target) if options.get("view") else torch.zeros(SAMPLES, 3, requires_grad=True)
            loss = loss + learner.distill(output, target)
        loss.backward()
        losses.append(loss.item())
        optimizer.step() if learner is None else learner.step(optimizer)
    return bits(losses), values(student), values(teacher), bits(optimizer.state_dict()), random_states()


def test_01_off_means_off_bit_for_bit() -> None:
    without = host_loop(lambda teacher, student: None)
    disabled = host_loop(lambda teacher, student: make_learner(teacher, student, enabled=False))
    assert disabled == without


def test_01_off_needs_no_observe_and_passes_exceptions_and_results_on() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, enabled=False)
    learner.observe()
    learner.after_step()
    assert learner.distill({"any": "output"}).item() == 0
    assert learner.step(step_fn=lambda: "result") == "result"

    def fail() -> None:
        raise ZeroDivisionError("the host's own")

    with pytest.raises(ZeroDivisionError, match="the host's own"):
        learner.step(step_fn=fail)


def test_01_a_zero_weight_leaves_the_student_on_the_hosts_trajectory() -> None:
    without = host_loop(lambda teacher, student: None)

    def make(teacher: nn.Module, student: nn.Module) -> CollaborativeLearner:
        weightless = WeightedSum([(0.0, KLDistillation())])
        return make_learner(teacher, student, distillation=weightless, update=Average(decay=0.9))

    with_learner = host_loop(make)
    assert with_learner[:2] == without[:2]
    assert with_learner[2] != without[2], "rounds were made"
    assert with_learner[3:] == without[3:]


# ---------------------------------------------------------------------------- 3 never deep-copied, O(layers) state


@pytest.mark.parametrize("update", UPDATES)
def test_03_models_are_never_copied_whole(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a model was copied")

    monkeypatch.setattr(nn.Module, "__deepcopy__", refuse, raising=False)
    monkeypatch.setattr(nn.Module, "__reduce_ex__", refuse, raising=False)
    teacher, student = networks()
    learner = make_learner(teacher, student, update=UPDATES[update](), relation=BySimilarity(minimum=0.0))
    train(learner, sgd(student), 2)
    learner.load_state_dict(learner.state_dict())


def elements(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, dict):
        return sum(elements(item) for item in value.values())
    return sum(elements(item) for item in value) if isinstance(value, (list, tuple)) else 0


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_03_state_does_not_grow_with_the_width(saliency: str) -> None:
    sizes = []
    for width in (6, 24):
        teacher, student = seeded(lambda width=width: Net(3, width), 0).eval(), seeded(Net, 1)
        learner = make_learner(
            teacher,
            student,
            saliency=SALIENCIES[saliency](),
            schedule=Schedule(warmup=0, interval=5, observations=5),
            threshold=ReferenceThreshold(),
        )
        learner.distill(student(batch()), batch())
        learner.observe(lambda model: F.cross_entropy(model(batch()), labels()), domain="source")
        learner.step(step_fn=lambda: None)
        sizes.append(elements(learner.state_dict()))
    assert sizes[0] == sizes[1] > 0


def tensors_held(learner: CollaborativeLearner) -> List[Tensor]:
    """Every tensor that can be reached from the learner, but for the models' own."""
    modules = [module for model in (learner.teacher, learner.student) for module in model.modules()]
    own = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
    seen, held, left = {id(thing) for thing in (*modules, *own)}, [], [learner]
    while left:
        thing: Any = left.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            held.append(thing)
        if isinstance(thing, types.FunctionType):  # whose globals would lead anywhere
            left.extend([*(thing.__closure__ or ()), *(thing.__defaults__ or ())])
        else:
            left.extend(gc.get_referents(thing))
    return held


def check_what_is_held(update: Any) -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, update=update, schedule=every_step(interval=2, observations=2))
    held, parameters = [], dict(teacher.named_parameters())
    for steps in range(1, 5):  # in the middle of a round, and after it
        train(learner, sgd(student), 1)
        held.append(elements(tensors_held(learner)))
        written = {name for record in learner.report().rounds for name in record.selected}
        layers = [layer for layer in group_layers(teacher) if layer.name in written]
        allowed = 0
        if "MaskedDistillation" in repr(update):
            allowed = sum(2 * layer.numel + len(layer.parameters) for layer in layers)
        if "AlignedAverage" in repr(update):
            weights = [parameters[name] for layer in layers for name in layer.parameters if "weight" in name]
            allowed = sum(4 * (weight.shape[0] + weight.shape[-1]) for weight in weights)
        if "own_targets=True" in repr(update):
            allowed += sum(layer.numel for layer in layers)
        if "KeepBest" in repr(update):
            buffers = dict(teacher.named_buffers())
            allowed += sum(layer.numel + sum(buffers[name].numel() for name in layer.buffers) for layer in layers)
        assert held[-1] <= 4 * len(learner.report().layers) + allowed, f"after {steps} steps"
    assert held[0] > 0, "two vectors of an element for each layer"


@pytest.mark.parametrize("update", UPDATES)
def test_03_no_teacher_sized_tensor_is_held_between_steps(update: str) -> None:
    """Beside Adam's two moments of the layers that were updated, the matched channels of their modules, and a copy of
    these layers where the best teacher is kept, or the one before the first round."""
    check_what_is_held(UPDATES[update]())


@pytest.mark.parametrize("where", ["observer", "update", "a closure"])
def test_03_a_leak_would_be_seen(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, method = (Observer, "_derivatives") if where == "observer" else (Average, "apply")
    original = getattr(kind, method)

    def leaking(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        kept = list(result.values()) if where == "observer" else [p.clone() for p in args[0].teacher.parameters()]
        vars(self)["kept"] = (lambda: kept) if where == "a closure" else kept
        return result

    monkeypatch.setattr(kind, method, leaking)
    with pytest.raises(AssertionError, match="after [12] steps"):
        check_what_is_held(Average(decay=0.9))


# ---------------------------------------------------------------------------------------------------- 4 in place


@pytest.mark.parametrize("update", UPDATES)
def test_04_updates_are_in_place_and_outside_autograd(update: str) -> None:
    teacher, student = networks()
    before, addresses = values(teacher), {name: (id(p), p.data_ptr()) for name, p in teacher.named_parameters()}
    learner = make_learner(teacher, student, update=UPDATES[update](), selection=AllLayers())
    train(learner, sgd(student), 3)
    if any(record.updated for record in learner.report().rounds):
        assert values(teacher) != before
    else:
        assert all(record.accepted is False for record in learner.report().rounds)
    assert {name: (id(p), p.data_ptr()) for name, p in teacher.named_parameters()} == addresses
    assert all(parameter.is_leaf and parameter.grad_fn is None for parameter in teacher.parameters())


# ----------------------------------------------------------------------------------------------- 5 step() is sugar


def run_of(advance: Callable[[CollaborativeLearner, Any], Any], steps: int = 4, **options: Any) -> Any:
    torch.manual_seed(3)
    teacher, student = networks()
    optimizer = sgd(student)
    learner = make_learner(teacher, student, **options)
    for step in range(steps):
        optimizer.zero_grad()
        (host_loss(student, step) + learner.distill(student(batch(step)), batch(step))).backward()
        advance(learner, optimizer)
    return values(teacher), values(student), bits(learner.state_dict()), bits(optimizer.state_dict())


def by_hand(learner: CollaborativeLearner, optimizer: Any) -> None:
    learner.observe()
    optimizer.step()
    learner.after_step(optimizer=optimizer)


def test_05_step_equals_observe_step_after_step() -> None:
    sugar = run_of(lambda learner, optimizer: learner.step(optimizer))
    assert run_of(by_hand) == sugar
    assert run_of(lambda learner, optimizer: learner.step(optimizer, step_fn=optimizer.step)) == sugar


def test_05_anything_with_a_step_will_do_and_its_result_comes_back() -> None:
    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def step(self) -> str:
            self.inner.step()
            return "stepped"

    results = []
    wrapped = run_of(lambda learner, optimizer: results.append(learner.step(Wrapper(optimizer))))
    assert wrapped == run_of(by_hand)
    assert results == ["stepped"] * 4


def test_05_several_optimizers_are_one_step() -> None:
    teacher, student = networks()
    heads = torch.optim.SGD(student.head.parameters(), lr=0.1)
    rest = torch.optim.Adam([*student.stem.parameters(), *student.blocks.parameters()], lr=0.01)
    learner = make_learner(teacher, student)
    before = values(student)
    learner.distill(student(batch()), batch()).backward()
    learner.step(step_fn=lambda: [heads.step(), rest.step()])
    assert learner.report().steps == 1
    assert values(student)["head.weight"] != before["head.weight"]
    assert values(student)["stem.weight"] != before["stem.weight"]


def test_05_sam_in_two_steps() -> None:
    """After ``second_step(zero_grad=True)`` gradients are gone: they are observed before."""
    teacher, student = networks()
    optimizer = make_sam()(list(student.stem.parameters()) + list(student.head.parameters()), torch.optim.SGD, lr=0.1)
    learner = make_learner(teacher, student, update=MaskedDistillation())

    def half_step(step: int, move: Callable[..., None]) -> None:
        (host_loss(student, step) + learner.distill(student(batch(step)), batch(step))).backward()
        move(zero_grad=True)

    for step in range(3):
        half_step(step, optimizer.first_step)
        half_step(step, lambda zero_grad: (learner.observe(), optimizer.second_step(zero_grad)))
        learner.after_step()
    assert learner.report().steps == 3
    assert [record.step for record in learner.report().rounds] == [1, 2, 3]


def test_05_sam_through_step_fn_and_closure() -> None:
    teacher, student = networks()
    optimizer = make_sam()(list(student.head.parameters()), torch.optim.SGD, lr=0.1)
    learner = make_learner(teacher, student)
    before = values(student)

    def closure() -> Tensor:
        loss = learner.distill(student(batch()), batch())
        loss.backward()
        return loss

    closure()
    learner.step(step_fn=lambda: optimizer.step(closure))
    assert learner.report().steps == 1
    assert values(student)["head.weight"] != before["head.weight"]


def test_05_lbfgs_through_step_fn() -> None:
    teacher, student = networks()
    optimizer = torch.optim.LBFGS(student.head.parameters(), lr=0.1, max_iter=3)
    learner = make_learner(teacher, student)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = learner.distill(student(batch()), batch())
        loss.backward()
        return loss

    before = values(student)
    learner.distill(student(batch()), batch())
    assert learner.step(step_fn=lambda: optimizer.step(closure)).item() > 0
    assert learner.report().steps == len(learner.report().rounds) == 1
    assert values(student)["head.weight"] != before["head.weight"]


@pytest.mark.parametrize("make_scaler", scalers())
@pytest.mark.parametrize("unscaled_by_host", [False, True])
def test_05_a_step_that_the_scaler_skips_is_none(make_scaler: Any, unscaled_by_host: bool) -> None:
    teacher, student = networks()
    optimizer, scaler = sgd(student), make_scaler()
    learner = make_learner(teacher, student)
    skipped = []
    for step in range(3):
        optimizer.zero_grad()
        loss = host_loss(student, step) + learner.distill(student(batch(step)), batch(step))
        scaler.scale(loss).backward()
        if step == 1:
            student.head.weight.grad.fill_(float("inf"))
        if unscaled_by_host:
            scaler.unscale_(optimizer)
        before = values(teacher), values(student), bits(learner.state_dict())
        learner.step(optimizer, scaler=scaler)
        skipped.append((values(teacher), values(student), bits(learner.state_dict())) == before)
        assert "step" not in vars(optimizer), "nothing is left on the optimizer"
        scaler.update()
    assert skipped == [False, True, False]
    assert learner.report().steps == 2


class Wrapper:
    """An optimizer wrapper as engines have it: it owns the scaler and the accumulation, and says what it did."""

    def __init__(self, optimizer: Any, scaler: Any) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.step_was_skipped = False
        self.gradient_state = type("GradientState", (), {"sync_gradients": True})()

    def step(self) -> None:
        if self.gradient_state.sync_gradients:
            before = bits(self.optimizer.state_dict())
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.step_was_skipped = bits(self.optimizer.state_dict()) == before


@pytest.mark.parametrize("make_scaler", scalers())
@pytest.mark.parametrize("way", ["the wrapper says so", "step_fn and stepped", "the halves"])
def test_05_a_step_that_a_wrapper_skips_is_none(make_scaler: Any, way: str) -> None:
    """Neither counters nor observations, projectors nor teacher; the next round is as if the step had not been."""
    outcomes = []
    for overflow in (False, True):
        teacher, student = networks()
        student.eval()  # without dropout, which a skipped step draws for as well
        wrapper = Wrapper(sgd(student), make_scaler())
        options = options_for("distillation", FeatureDistillation())
        learner = make_learner(teacher, student, **{**options, "schedule": every_step(interval=2, observations=2)})
        for step in [0, 1, 99, 2, 3] if overflow else [0, 1, 2, 3]:
            wrapper.optimizer.zero_grad()
            loss = learner.distill(student(batch(step)), batch(step))
            wrapper.scaler.scale(loss).backward()
            before = values(teacher), values(student), bits(learner.state_dict())
            if step == 99:
                student.head.weight.grad.fill_(float("inf"))
            if way == "the wrapper says so":
                learner.step(wrapper)
            elif way == "step_fn and stepped":
                learner.step(step_fn=wrapper.step, stepped=lambda w=wrapper: not w.step_was_skipped)
            else:
                learner.observe()
                wrapper.step()
                learner.after_step(stepped=not wrapper.step_was_skipped)
            if step == 99:
                assert (values(teacher), values(student), bits(learner.state_dict())) == before
        outcomes.append((learner.report().steps, [dict(record.rates) for record in learner.report().rounds]))
    assert outcomes[0][0] == 4
    assert outcomes[0][1]
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("make_scaler", scalers())
@pytest.mark.parametrize("way", ["scaler=", "scaler=, unscaled by the host", "the wrapper's own", "the halves", "both"])
def test_05_projectors_train_with_unscaled_gradients(make_scaler: Any, way: str) -> None:
    """Bit for bit, since scales are powers of two; a scale that grows half-way is felt by Adam's moments otherwise."""

    def run(scaler: Any) -> Any:
        teacher, student = networks()
        student.eval()
        learner = make_learner(teacher, student, **options_for("distillation", FeatureDistillation()))
        optimizer = sgd(student)
        for step in range(4):
            optimizer.zero_grad()
            loss = learner.distill(student(batch(step)), batch(step))
            if scaler is None:
                loss.backward()
                learner.step(optimizer)
                continue
            scaler.scale(loss).backward()
            if way == "scaler=, unscaled by the host":
                scaler.unscale_(optimizer)
            if way in ("the halves", "both"):
                learner.observe(lambda net: net(batch(9)).pow(2).sum(), domain="source", scaler=scaler)
                learner.observe(scaler=scaler)
            if way == "the halves":
                scaler.step(optimizer)
                scaler.update(4096.0 if step == 1 else None)
                learner.after_step()
            elif way == "the wrapper's own":
                learner.step(Wrapper(optimizer, scaler))
            else:
                learner.step(optimizer, scaler=scaler)
                scaler.update(4096.0 if step == 1 else None)
        return bits(learner.state_dict()["projectors"])

    assert run(make_scaler()) == run(None)


def test_05_an_overflow_in_the_projectors_alone_spares_them_and_their_moments() -> None:
    teacher, student = networks()
    loss = FeatureDistillation()
    learner = make_learner(teacher, student, **options_for("distillation", loss))
    optimizer, scaler = sgd(student), FakeScaler()
    for step in range(2):
        scaler.scale(learner.distill(student(batch(step)), batch(step))).backward()
        if step == 1:
            for projector in loss.parameters():
                projector.grad.fill_(float("inf"))
        learner.step(optimizer, scaler=scaler)
        scaler.update()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in loss.parameters())
    assert learner.report().steps == 2


def test_05_micro_batches_of_a_wrapper_that_accumulates_are_not_counted() -> None:
    runs = []
    for accumulate in (False, True):
        torch.manual_seed(0)  # dropout
        teacher, student = networks()
        wrapper = Wrapper(sgd(student), FakeScaler(1.0))
        learner = make_learner(teacher, student, **options_for("distillation", FeatureDistillation()))
        for step in range(4):
            sync = step % 2 == 1
            wrapper.gradient_state.sync_gradients = sync
            (learner.distill(student(batch(step)), batch(step)) / 2).backward()
            if accumulate or sync:
                learner.step(wrapper)
            if sync:
                wrapper.optimizer.zero_grad()
        runs.append((values(teacher), values(student), bits(learner.state_dict())))
        assert learner.report().steps == 2
    assert runs[0] == runs[1]


@pytest.mark.parametrize("make_scaler", scalers())
def test_05_gradients_of_a_co_trained_teacher_are_unscaled_before_they_are_read(make_scaler: Any) -> None:
    reports = []
    for scaled in (False, True):
        teacher, student = networks()
        optimizer = torch.optim.SGD([*student.head.parameters(), *teacher.head.parameters()], lr=0.1)
        scaler = make_scaler() if scaled else None
        learner = make_learner(teacher, student, update=Average(decay=1.0), threshold=FixedThreshold(1e-3))
        loss = F.cross_entropy(teacher(batch()), labels()) + learner.distill(student.eval()(batch()), batch())
        (scaler.scale(loss) if scaler else loss).backward()
        for name, parameter in teacher.named_parameters():
            if not name.startswith("head"):
                parameter.grad = None
        learner.step(optimizer, scaler=scaler)
        reports.append(learner.report().rounds[0].rates)
    assert list(reports[0]) == ["head"]
    assert reports[0] == reports[1]


def test_05_optimizer_steps_are_counted_not_micro_batches() -> None:
    teacher, student = networks()
    optimizer = sgd(student)
    learner = make_learner(teacher, student, schedule=Schedule(warmup=1, interval=2))
    for step in range(5):
        optimizer.zero_grad()
        for part in range(3):
            learner.distill(student(batch(3 * step + part)), batch(3 * step + part)).backward()
        learner.step(optimizer)
    assert learner.report().steps == 5
    assert [record.step for record in learner.report().rounds] == [3, 5]


# ------------------------------------------------------------------------------------ 6 unknown is not non-salient


@pytest.mark.parametrize("saliency", ["Taylor", "Fisher", "Hessian"])
def test_06_a_layer_the_loss_does_not_use_is_never_selected(saliency: str) -> None:
    teacher, student = networks()
    learner = make_learner(
        teacher, student, saliency=SALIENCIES[saliency](), selection=AllLayers(), update=Average(decay=0.5)
    )
    before = values(teacher)
    train(learner, sgd(student), 2)
    assert len(learner.report().rounds) == 2
    for record in learner.report().rounds:
        assert record.selected
        assert "unused" not in record.rates
        assert "unused" not in record.selected
    assert values(teacher)["unused.weight"] == before["unused.weight"]
    assert "unknown" in str(learner.report())


def test_06_gradients_that_zero_grad_filled_with_zeros_were_not_seen() -> None:
    """The default of ``zero_grad()`` before torch 2."""
    teacher, student = networks()
    learner = make_learner(teacher, student, selection=AllLayers(), update=Average(decay=1.0))
    for parameter in teacher.parameters():
        parameter.grad = torch.zeros_like(parameter)
    F.cross_entropy(teacher(batch()), labels()).backward()
    learner.distill(student(batch()), batch())
    learner.step(step_fn=lambda: None)
    assert set(learner.report().rounds[0].rates) == {"stem", "blocks.0", "blocks.1", "blocks.2", "head"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


def test_06_tied_weights_are_written_once() -> None:
    teacher, student = seeded(Tied, 0), seeded(Tied, 1)
    was = teacher.first.weight.detach().clone()
    learner = make_learner(teacher, student, update=Average(decay=0.5), selection=AllLayers(), relation=ByName())
    learner.distill(student(batch()), batch())
    learner.step(step_fn=lambda: None)
    assert teacher.first.weight is teacher.second.weight
    assert torch.allclose(teacher.first.weight, 0.5 * (was + student.first.weight))


# ---------------------------------------------------------------------------------------------------- 7 non-finite


def non_finite(kind: str) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(batch()).sum() * float(kind)


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("update", ["Average", "Average1", "MaskedDistillation", "Guard"])
def test_07_a_non_finite_gradient_skips_the_round_and_is_counted(kind: str, update: str) -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, update=UPDATES[update](), selection=AllLayers())
    before = values(teacher)
    learner.distill(student(batch()), batch())
    learner.observe(non_finite(kind))
    learner.after_step()
    assert values(teacher) == before
    assert not learner.report().rounds
    assert learner.report().discarded == learner.metrics()["clda/discarded"] == 1
    assert learner.report().steps == 1
    learner.distill(student(batch()), batch())
    learner.step(step_fn=lambda: None)
    assert len(learner.report().rounds) == 1, "the next round is made"


def test_07_a_non_finite_gradient_skips_the_round_though_earlier_ones_were_finite() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, schedule=every_step(interval=2, observations=2))
    for loss in (None, non_finite("nan")):
        learner.distill(student(batch()), batch())
        learner.observe(loss)
        learner.after_step()
    assert not learner.report().rounds


def test_07_ten_discarded_in_a_row_raise() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student)
    for count in range(1, 10):
        learner.observe(non_finite("nan"))
        learner.after_step()
        assert learner.report().discarded == count
    learner.observe(non_finite("nan"))
    with pytest.raises(CldaError, match="last 10 observations were all discarded.*expected finite.*Fix:"):
        learner.after_step()


def test_07_a_finite_one_starts_the_count_again() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student)
    for index in range(25):
        learner.distill(student(batch()), batch())
        learner.observe(None if index % 9 == 8 else non_finite("nan"))
        learner.after_step()
    assert learner.report().discarded == 23


def test_07_a_nan_loss_term_alone_is_legal() -> None:
    """As DAFormer's feature distance on an empty mask: NaN in the sum that is logged, no gradient from it."""
    teacher, student = networks()
    optimizer = torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=0.1)
    learner = make_learner(teacher, student)
    loss = F.cross_entropy(teacher(batch()), labels()) + learner.distill(student(batch()), batch())
    (loss + torch.tensor(float("nan"))).backward()
    learner.step(optimizer)
    assert learner.report().discarded == 0
    assert len(learner.report().rounds) == 1


# ------------------------------------------------------------------------------------------------------- 8 buffers


def test_08_buffers_are_an_explicit_choice() -> None:
    for choice in ("keep", "average"):
        teacher, student = networks()
        with torch.no_grad():
            student.blocks[0].norm.running_mean.fill_(5.0)
            student.calls.fill_(3)
            student.scale.fill_(7.0)
            student.blocks[0].norm.num_batches_tracked.fill_(9)
        before = dict(values(teacher))
        learner = make_learner(teacher, student, update=Average(decay=0.5, buffers=choice), selection=AllLayers())
        student.eval()
        learner.distill(student(batch()), batch())
        learner.step(step_fn=lambda: None)
        moved = {name for name, value in values(teacher).items() if before[name] != value}
        buffers = {name for name, _ in teacher.named_buffers()}
        statistics = {name for name in buffers if name.rpartition(".")[2] in ("running_mean", "running_var")}
        assert moved & buffers == (statistics & moved if choice == "average" else set())
        assert ("blocks.0.norm.running_mean" in moved) == (choice == "average")


@pytest.mark.parametrize("update", ["MaskedDistillation", "Guard"])
def test_08_rounds_and_distillation_leave_batch_statistics_alone(update: str) -> None:
    teacher, student = networks()
    teacher.train()
    learner = make_learner(teacher, student, update=UPDATES[update](), selection=AllLayers())
    buffers = {name: bits(buffer) for name, buffer in teacher.named_buffers()}
    train(learner, sgd(student), 2)
    assert {name: bits(buffer) for name, buffer in teacher.named_buffers()} == buffers


# --------------------------------------------------------------------------------------------------------- 9 names


class Compiled(nn.Module):
    """What ``torch.compile`` returns, seen from its names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


class Wrapped(nn.Module):
    """What DataParallel and its kin are, seen from their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


WRAPPERS: Dict[str, Callable[[nn.Module], nn.Module]] = {
    "data parallel": nn.DataParallel,
    "compiled": Compiled,
    "both": lambda model: Compiled(Wrapped(model)),
    "the other way round, twice": lambda model: Wrapped(Compiled(Wrapped(Compiled(model)))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_09_wrappers_change_nothing(wrapper: str) -> None:
    def run(wrap_teacher: bool, wrap_student: bool) -> Any:
        torch.manual_seed(0)
        teacher, student = networks()
        optimizer = sgd(student)
        wrap = WRAPPERS[wrapper]
        learner = make_learner(
            wrap(teacher) if wrap_teacher else teacher,
            wrap(student) if wrap_student else student,
            update=Guard(Average(decay=0.9), criterion=agreement, tolerance=1.0),
        )
        train(learner, optimizer, 3)
        return learner.report().to_dict(), values(teacher), bits(learner.state_dict())

    plain = run(False, False)
    assert plain[0]["rounds"][0]["updated"]
    assert run(True, False) == run(False, True) == run(True, True) == plain


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.compile came with torch 2.0")
def test_09_names_of_a_compiled_model_are_the_models_own() -> None:
    teacher, student = networks()
    compiled = torch.compile(teacher, backend="eager")  # compiles at its first call, which is not made here
    assert make_learner(compiled, student).report().layers == make_learner(teacher, student).report().layers


# --------------------------------------------------------------------------------------------------- 10 distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> List[Dict[str, Any]]:
    """Run every scenario on two processes with different data, and return what each rank got."""
    return processes.run(unlike.work, ranks=2, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scenario", unlike.SCENARIOS)
def test_10_every_rank_decides_alike(ranks: List[Dict[str, Any]], scenario: str) -> None:
    first, second = (rank[scenario] for rank in ranks)
    assert first["data"] != second["data"], "the ranks see different data"
    assert first["rounds"], "rounds were made"
    assert any(record["selected"] for record in first["rounds"])
    assert first["rounds"] == second["rounds"], "same rates, selection, guard decision and scores"
    assert first["discarded"] == second["discarded"] == (1 if scenario == "non-finite on one rank" else 0)
    assert first["teacher"] == second["teacher"], "the teacher stays equal"
    assert first["projectors"] == second["projectors"]


def test_10_a_layer_seen_on_one_rank_only_is_known_on_all(ranks: List[Dict[str, Any]]) -> None:
    for rank in ranks:
        assert "unused" in rank["a head used on one rank"]["rounds"][0]["rates"]
        assert "unused" not in rank["domain shift"]["rounds"][0]["rates"]


# -------------------------------------------------------------------------------------------------------- 11 resume


def resumable(options: Callable[[], Dict[str, Any]]) -> Tuple[CollaborativeLearner, Any]:
    teacher, student = networks()
    schedule = Schedule(warmup=1, interval=2, observations=2, decay="linear", total=20)
    learner = CollaborativeLearner(teacher, student, **{"schedule": schedule, **options()})
    return learner, sgd(student)


@pytest.mark.parametrize("update", UPDATES)
def test_11_a_checkpoint_in_memory_changes_neither_with_the_run_nor_with_one_resumed_from_it(update: str) -> None:
    options = lambda: {**options_for("distillation", FeatureDistillation()), "update": UPDATES[update]()}  # noqa: E731
    learner, optimizer = resumable(options)
    train(learner, optimizer, 3)
    state = learner.state_dict()
    before = bits(state)
    train(learner, optimizer, 2, start=3)
    assert bits(state) == before
    resumed, its_optimizer = resumable(options)
    resumed.load_state_dict(state)
    train(resumed, its_optimizer, 2, start=3)
    assert bits(state) == before


def test_11_what_the_host_draws_for_rounds_is_drawn_alike_after_resuming() -> None:
    calls: List[int] = []

    def source_loss(network: Any) -> Any:
        calls.append(1)
        return F.cross_entropy(network(batch(7)), labels(7))

    def noisy(x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn(SAMPLES, INPUTS)

    def options() -> Dict[str, Any]:
        return {"update": MaskedDistillation(source_weight=1.0), "schedule": Schedule(interval=6)}

    def go_on(learner: CollaborativeLearner, optimizer: Any) -> Any:
        torch.manual_seed(5)
        calls.clear()
        for step in range(3, 8):
            optimizer.zero_grad()
            x = batch(step)
            learner.distill(learner.student(x), x, view=functools.partial(noisy, x), source_loss=source_loss).backward()
            learner.step(optimizer)
        return bits([learner.state_dict(), learner.teacher.state_dict(), torch.get_rng_state()]), len(calls)

    learner, optimizer = resumable(options)
    train(learner, optimizer, 3)
    parts = (learner.teacher, learner.student, optimizer, learner)
    states = loaded(saved([part.state_dict() for part in parts]))
    resumed, its_optimizer = resumable(options)
    for part, state in zip((resumed.teacher, resumed.student, its_optimizer, resumed), states):
        part.load_state_dict(state)
    assert go_on(resumed, its_optimizer) == go_on(learner, optimizer)


# -------------------------------------------------------------------------------------------------------- 12 atomic


class HalfWay(Average):
    """Writes everything it may write, and then fails."""

    def apply(self, context: Any) -> Any:
        super().apply(context)
        with torch.no_grad():
            for module in context.teacher.modules():
                for _, buffer in module.named_buffers(recurse=False):
                    if buffer.is_floating_point() and buffer.numel() > 1:
                        buffer.add_(1)
        raise KeyError("half-way")


@pytest.mark.parametrize("wrap", [lambda update: update, Guard])
def test_12_an_update_that_fails_half_way_leaves_the_teacher_as_it_was(wrap: Any) -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, update=wrap(HalfWay(decay=0.5)), selection=AllLayers())
    before = values(teacher)
    learner.distill(student(batch()), batch())
    with pytest.raises(CldaError, match="HalfWay|Guard") as caught:
        learner.step(step_fn=lambda: None)
    assert isinstance(caught.value.__cause__, KeyError)
    assert values(teacher) == before
    assert not learner.report().rounds
    assert learner.report().steps == 1, "the optimizer's step was made and counts"


def test_12_a_rejected_round_leaves_the_teacher_as_it_was() -> None:
    scores = iter([1.0, 0.0])
    teacher, student = networks()
    guard = Guard(Average(decay=0.5, buffers="average"), criterion=lambda *_: torch.tensor(next(scores)), backtracks=0)
    learner = make_learner(teacher, student, update=guard, selection=AllLayers())
    before = values(teacher)
    learner.distill(student(batch()), batch())
    learner.step(step_fn=lambda: None)
    assert learner.report().rounds[0].accepted is False
    assert values(teacher) == before


# ------------------------------------------------------------------------------------ 13 KD losses (through distill)


def test_13_distill_masks_resizes_and_computes_in_full_precision() -> None:
    """The losses' own tests are in distillation/; this one goes through the learner."""
    teacher, student = seeded(lambda: Segmenter(stride=2), 0).eval(), seeded(lambda: Segmenter(stride=4), 1)
    learner = make_learner(teacher, student, distillation=KLDistillation(temperature=2.0), ignore_index=255)
    x = images()
    labelled = torch.zeros(2, 8, 8, dtype=torch.int64)
    labelled[:, :4] = 255
    student_logits, teacher_logits = student(x), teacher(x).detach()
    assert student_logits.shape[2:] != teacher_logits.shape[2:]
    loss = learner.distill(student_logits, x, mask=labelled)
    small = F.interpolate(teacher_logits.double(), size=student_logits.shape[2:], mode="bilinear", align_corners=False)
    p, q = (F.log_softmax(z[:, :, 1:].double() / 2.0, dim=1) for z in (small, student_logits))
    expected = 4 * (p.exp() * (p - q)).sum(1).mean()
    assert torch.allclose(loss.double(), expected, rtol=1e-5)
    if hasattr(torch, "autocast"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = learner.distill(student_logits, teacher_output=teacher_logits, mask=labelled)
        assert under.dtype == torch.float32
        assert torch.equal(under, learner.distill(student_logits, teacher_output=teacher_logits, mask=labelled))


# --------------------------------------------------------------------------------------------------- 14 old and new


@functools.lru_cache(maxsize=1)
def sources() -> List[Tuple[pathlib.Path, ast.Module]]:
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(PACKAGE.rglob("*.py"))]


ALLOWED = {"torch", "numpy", "typing_extensions", "matplotlib", "clda_core"}
STANDARD = getattr(sys, "stdlib_module_names", None)


INTEGRATIONS = PACKAGE / "integrations"


@pytest.mark.skipif(STANDARD is None, reason="Python 3.10 and newer know the names of the standard library")
def test_14_only_torch_numpy_typing_extensions_and_the_standard_library_are_imported() -> None:
    for path, tree in sources():
        if INTEGRATIONS in path.parents:
            continue  # each imports its engine
        at_import = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                root = name.partition(".")[0]
                assert root in ALLOWED or root in STANDARD, f"{path} imports {name}"
                assert root != "matplotlib" or node not in at_import, f"{path} imports matplotlib when imported"


NEWER_THAN_1_7 = {
    *("amp", "compile", "func", "inference_mode", "vmap", "argwhere", "asarray", "concat", "frombuffer"),
    *("nan_to_num_", "mT", "parametrize", "register_step_post_hook", "_foreach_lerp_", "_foreach_copy_"),
    *("untyped_storage", "swapaxes", "tile", "diff", "quantile_", "autocast"),
}


def test_14_newer_torch_is_used_in_the_compatibility_module_only() -> None:
    """A scan of ``torch.<name>`` and ``torch.<module>.<name>``; the suite runs on torch 1.7.1 for everything else."""
    for path, tree in sources():
        if path.name == "compat.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in NEWER_THAN_1_7, f"{path}:{node.lineno} uses torch.{node.attr}"
            if isinstance(node, ast.Attribute) and node.attr.startswith("_foreach"):
                raise AssertionError(f"{path}:{node.lineno} uses {node.attr}")


def test_14_annotations_are_not_evaluated() -> None:
    """``list[int]`` and ``X | Y`` in annotations are errors on Python 3.8 otherwise."""
    for path, tree in sources():
        annotated = any(isinstance(node, (ast.AnnAssign, ast.FunctionDef)) for node in ast.walk(tree))
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        assert not annotated or imports, f"{path} lacks from __future__ import annotations"


# --------------------------------------------------------------------------------------------------------- 15 errors


def texts(node: ast.AST) -> str:
    return "".join(str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant))


def test_15_every_error_says_what_was_expected_what_was_received_and_the_fix() -> None:
    raised = 0
    makers = {"problem"} | {
        node.name
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(part, ast.Return) and called(part.value) == "problem" for part in ast.walk(node))
    }
    for path, tree in sources():
        for node in ast.walk(tree):
            place = f"{path}:{getattr(node, 'lineno', 0)}"
            assert not isinstance(node, ast.Assert), f"{place}: an assert does not check user input"
            if called(node) == "problem":
                assert {word.arg for word in node.keywords} == {"expected", "received", "fix"}, place
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            raised += 1
            name = called(node.exc)
            if name == "CldaError":
                assert "Fix: " in texts(node.exc), place
            else:
                assert name in makers, f"{place}: raise problem(...) instead of {name}"
    assert raised > 20


def called(node: Any) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
