"""Rounds: whole or not at all, by one copy of what they change; their rehearsal in the first step with target data."""

from typing import Any, Dict, List

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clda_core import CldaError, CollaborativeLearner, Never, Outputs, Schedule
from clda_core.distillation import FeatureDistillation
from clda_core.layers import group_layers
from clda_core.relation import BySimilarity
from clda_core.saliency import Hessian, Magnitude
from clda_core.selection import AllLayers
from clda_core.step import Step
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation, RoundContext, UpdateResult, base
from tests.helpers import (
    Net,
    batch,
    bits,
    images,
    make_learner,
    networks,
    no_traces,
    nothing_changed,
    seeded,
    sgd,
    train,
    values,
)
from tests.strategies import cases

LATER = Schedule(warmup=20, interval=5)
UPDATES: Dict[str, Any] = {name: make for name, _, make in cases("update")}


def first_step(learner: CollaborativeLearner, inputs: Any, **options: Any) -> None:
    learner.distill(learner.student(batch()), inputs, **options).backward()
    learner.step(sgd(learner.student))


def fails(learner: CollaborativeLearner, inputs: Any, match: str, **options: Any) -> None:
    """Expect the first step to fail before the optimizer is stepped, and everything to be as it was."""
    loss = learner.distill(learner.student(batch()), inputs, **options)
    loss.backward()
    with nothing_changed(learner), pytest.raises(CldaError, match=match) as caught:
        learner.step(step_fn=lambda: pytest.fail("the optimizer was stepped"))
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("saliency", [None, Hessian(), Magnitude()])
def test_a_rehearsal_writes_nothing(update: str, saliency: Any) -> None:
    teacher, student = networks()
    learner = make_learner(
        teacher, student, schedule=LATER, update=UPDATES[update](), saliency=saliency, relation=BySimilarity(minimum=0)
    )
    learner.distill(student(batch()), batch()).backward()
    before = bits(learner.state_dict())
    with no_traces(teacher, student, values_too=True):
        learner.step(step_fn=lambda: None)
    assert bits({**learner.state_dict(), "steps": 0, "rehearsed": False}) == before


def test_it_is_made_once_and_not_where_there_are_no_rounds() -> None:
    for schedule, expected in ((LATER, 1), (Never(), 0)):
        teacher, student = networks()
        calls: List[int] = []
        learner = make_learner(teacher, student, schedule=schedule, probe=lambda z, m, c=calls: c.append(1) or z.sum())
        for _ in range(3):
            first_step(learner, batch())
        assert len(calls) == expected
        train(make_learner(*networks(), schedule=schedule, enabled=False), sgd(student), 1)


def test_it_waits_for_target_data() -> None:
    learner = make_learner(*networks(), schedule=LATER)
    learner.step(step_fn=lambda: None)
    fails(learner, None, "nothing to observe on target data", teacher_output=learner.teacher(batch()))


def test_inputs_are_missing() -> None:
    output = networks()[0](batch())
    fails(make_learner(*networks(), schedule=LATER), None, "nothing to observe.*inputs", teacher_output=output)
    learner = make_learner(*networks(), schedule=LATER, saliency=Magnitude(), update=MaskedDistillation())
    fails(learner, None, "needs this step's target batch", teacher_output=output)
    learner = make_learner(*networks(), schedule=LATER, saliency=Magnitude(), update=Average())
    first_step(learner, None, teacher_output=output)  # needs none


class Narrow(nn.Module):
    """A student that takes the first three of the teacher's five inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: List[Tensor] = []
        self.first = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, narrow: Tensor) -> Tensor:
        self.seen.append(narrow)
        return self.head(self.first(narrow).relu())


@pytest.mark.parametrize("update", [MaskedDistillation, lambda: Guard(MaskedDistillation()), AlignedAverage])
def test_a_student_gets_its_own_inputs(update: Any) -> None:
    teacher, student = networks()[0], seeded(Narrow, 1)
    wide = batch(count=64)
    narrow = wide[:, :3]
    learner = make_learner(teacher, student, schedule=LATER, update=update())
    learner.distill(student(narrow), wide).backward()
    with pytest.raises(CldaError, match="cannot run the student on the teacher's inputs.*student_inputs="):
        learner.step(step_fn=lambda: None)
    learner = make_learner(teacher, student, update=update(), relation=BySimilarity(minimum=0))
    student.seen.clear()
    learner.distill(student(narrow), wide, student_inputs={"narrow": narrow}).backward()
    learner.step(step_fn=lambda: None)
    assert len(learner.report().rounds) == 1
    assert len(student.seen) > 1
    assert all(torch.equal(seen, narrow) for seen in student.seen)


class Moody(Net):
    """Returns something else in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output if self.training else torch.cat([output, output], 1)


@pytest.mark.parametrize("warmup", [0, 20])
def test_logits_of_another_shape_in_eval_mode(warmup: int) -> None:
    teacher, student = networks()[0], seeded(Moody, 1)
    before = values(teacher)
    learner = make_learner(teacher, student, schedule=Schedule(warmup=warmup, interval=1))
    learner.distill(student(batch()), batch()).backward()
    with pytest.raises(CldaError, match=r"another shape than those distilled: expected \(N, 3\).*\(64, 6\)"):
        learner.step(step_fn=lambda: None)
    assert values(teacher) == before


def test_a_head_outside_of_the_student() -> None:
    teacher, student = networks()
    head = nn.Linear(3, 3)
    learner = make_learner(teacher, student, schedule=LATER)
    learner.distill(head(student(batch())), batch()).backward()
    with pytest.raises(CldaError, match="not the student's alone"):
        learner.step(step_fn=lambda: None)


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize("saliency", [None, Magnitude()])
def test_reentrant_checkpointing_is_named(saliency: Any) -> None:
    class Reentrant(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.stem(x))
            options = {"use_reentrant": True} if hasattr(torch, "compile") else {}
            return self.head(checkpoint(self.blocks, hidden, **options) if hidden.requires_grad else hidden)

    learner = make_learner(seeded(lambda: Reentrant(3), 0), networks()[1], schedule=LATER, saliency=saliency)
    fails(learner, batch(), "reentrant activation checkpointing.*use_reentrant=False")


def test_tensors_of_inference_mode_are_named() -> None:
    mode = getattr(torch, "inference_mode", None)
    if mode is None:  # before torch 1.9
        return
    with mode():
        inputs = batch()
    fails(make_learner(*networks(), schedule=LATER), inputs, "inference mode.*clone")


@pytest.mark.skipif(not hasattr(torch, "inference_mode"), reason="inference mode came with torch 1.9")
def test_a_teachers_output_of_inference_mode_is_taken() -> None:
    """Also by a loss that keeps the teacher's features for the backward pass."""
    teacher, student = (seeded(lambda: nn.Conv2d(3, 4, 1), seed) for seed in (0, 1))
    learner = make_learner(
        teacher, student, distillation=FeatureDistillation(), extract=lambda output: Outputs(output, (output,))
    )
    with torch.inference_mode():
        output = teacher(images())
    learner.distill(student(images()), images(), teacher_output=output).backward()
    learner.step(sgd(student))
    assert learner.report().changed == 1


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_are_refused_and_initialised_ones_taken() -> None:
    if not hasattr(nn, "LazyLinear"):  # before torch 1.8
        return
    lazy = seeded(lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)), 0)
    with pytest.raises(CldaError, match="the teacher has lazy modules.*0.weight.*one batch"):
        CollaborativeLearner(lazy, nn.Linear(5, 3))
    lazy(batch())
    assert CollaborativeLearner(lazy, nn.Linear(5, 3))


def test_an_optimizer_that_cannot_be_built_fails_in_the_first_step() -> None:
    update = MaskedDistillation(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentun=0.9))
    fails(make_learner(*networks(), schedule=LATER, update=update), batch(), "rehearsal.*momentun")


def test_an_update_of_a_users_own_rehearses_if_it_can() -> None:
    calls: List[str] = []

    class Own(Average):
        def rehearse(self, context: Any) -> None:
            calls.append("rehearse")
            raise ZeroDivisionError("theirs")

    fails(make_learner(*networks(), schedule=LATER, update=Own()), batch(), "a round would fail.*ZeroDivisionError")
    assert calls == ["rehearse"]


# ---------------------------------------------------------------------------------------------- one copy, and undo


@pytest.mark.parametrize("update", [Guard(MaskedDistillation()), MaskedDistillation(), Guard(Average()), Average()])
def test_a_round_copies_what_it_changes_once(update: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: List[str] = []

    class Counted(base.Snapshot):
        def __init__(self, *arguments: Any) -> None:
            copies.append("layers")
            super().__init__(*arguments)

    def keep_state(kept: Any, context: RoundContext) -> Any:
        copies.append("state")
        assert kept is update
        return lambda: None

    monkeypatch.setattr(base, "Snapshot", Counted)
    monkeypatch.setattr(base, "keep_state", keep_state)
    learner = make_learner(*networks(), update=update)
    train(learner, sgd(learner.student), 1)
    assert (len(learner.report().rounds), copies) == (1, ["layers", "state"])


def test_a_round_that_changes_nothing_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_copy(*_: Any) -> None:
        pytest.fail("the teacher was copied")

    monkeypatch.setattr(base, "Snapshot", no_copy)
    learner = make_learner(*networks(), update=MaskedDistillation(), trust=lambda lead: 0.0)
    train(learner, sgd(learner.student), 2)
    assert [record.trust for record in learner.report().rounds] == [0.0, 0.0]


class First:
    """A round after the first step, and no more."""

    def due(self, step: int) -> bool:
        return step == 1

    def observes(self, step: int) -> bool:
        return step == 1

    def strength(self, step: int) -> float:
        return 1.0


@pytest.mark.parametrize(("trust", "rehearsed"), [(1.0, []), (0.0, [2])])
def test_a_round_in_the_first_step_is_not_rehearsed_afterwards(trust: float, rehearsed: List[int]) -> None:
    """One that changes nothing is: what an update does was not tried yet."""
    learner = make_learner(*networks(), schedule=First(), update=MaskedDistillation(), trust=lambda lead: trust)
    rounds, steps = learner._rounds, []
    rehearse = rounds.rehearse

    def noted(*arguments: Any, **options: Any) -> None:
        steps.append(learner.report().steps + 1)
        rehearse(*arguments, **options)

    rounds.rehearse = noted  # type: ignore[method-assign]
    train(learner, sgd(learner.student), 3)
    assert len(learner.report().rounds) == 1
    assert steps == rehearsed


class Remembering(MaskedDistillation):
    """Has state beside the optimizer's, and says nothing of how to go back to it."""

    rounds = 0

    def apply(self, context: RoundContext) -> UpdateResult:
        super().apply(context)
        self.rounds += 1
        raise ZeroDivisionError

    def state_dict(self) -> Dict[str, Any]:
        return {**super().state_dict(), "rounds": self.rounds}

    def load_state_dict(self, state: Any) -> None:
        self.rounds = state["rounds"]
        super().load_state_dict({name: value for name, value in state.items() if name != "rounds"})


@pytest.mark.parametrize("guarded", [False, True])
def test_state_that_a_subclass_adds_is_taken_back_too(guarded: bool) -> None:
    update = Remembering()
    learner = make_learner(*networks(), update=Guard(update) if guarded else update)
    with pytest.raises(CldaError, match="ZeroDivisionError"):
        train(learner, sgd(learner.student), 1)
    assert update.rounds == 0
    assert update._own.state_dict() == {}


class AddOne:
    """No more than an update must have."""

    def __init__(self, *, error: Any = None) -> None:
        self.error = error

    def apply(self, context: RoundContext) -> UpdateResult:
        parameters = dict(context.teacher.named_parameters())
        with torch.no_grad():
            for layer in context.layers:
                for name in layer.parameters:
                    parameters[name].add_(1)
        if self.error is not None:
            raise self.error
        return UpdateResult(tuple(layer.name for layer in context.layers))


class Memory(AddOne):
    """The same, remembering how often it was applied."""

    rounds = 0

    def apply(self, context: RoundContext) -> UpdateResult:
        self.rounds += 1
        return super().apply(context)

    def state_dict(self) -> Dict[str, Any]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: Any) -> None:
        self.rounds = state["rounds"]


def better(teacher: Tensor, original: Tensor, student: Tensor) -> Tensor:
    return (teacher - original).abs().sum()


def worse(teacher: Tensor, original: Tensor, student: Tensor) -> Tensor:
    return -better(teacher, original, student)


@pytest.mark.parametrize("guarded", [False, True])
def test_an_update_needs_apply_alone(guarded: bool) -> None:
    teacher, student = networks()
    update = Guard(AddOne(), criterion=better) if guarded else AddOne()
    learner = make_learner(teacher, student, update=update, selection=AllLayers())
    before = values(teacher)
    train(learner, sgd(student), 1)
    assert values(teacher) != before
    assert learner.report().rounds[0].updated
    assert learner.state_dict()["update"] == {}
    learner.load_state_dict(learner.state_dict())
    broken = AddOne(error=ValueError("mine"))
    failing = make_learner(teacher, student, update=Guard(broken) if guarded else broken)
    failing.distill(student(batch()), batch()).backward()
    with no_traces(teacher, student, values_too=True), pytest.raises(CldaError, match="mine.*as it was before"):
        failing.step(step_fn=lambda: None)


class Both(Memory):
    """Two updates, one after the other."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first, self.second = first, second

    def apply(self, context: RoundContext) -> UpdateResult:
        self.rounds += 1
        first = self.first.apply(context)
        return UpdateResult(first.updated, accepted=self.second.apply(context).accepted)


def test_a_guard_within_an_update_takes_back_its_own_part_alone() -> None:
    teacher, student = networks()
    inner = Memory()
    both = Both(AddOne(), Guard(inner, criterion=worse, backtracks=0))
    learner = make_learner(teacher, student, update=both, selection=AllLayers())
    before = {name: parameter.detach().clone() for name, parameter in teacher.named_parameters()}
    train(learner, sgd(student), 1)
    assert learner.report().rounds[0].accepted is False
    assert (both.rounds, inner.rounds) == (1, 0)
    (record,) = learner.report().rounds
    moved = {name for layer in group_layers(teacher) if layer.name in record.selected for name in layer.parameters}
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name] + (name in moved)), name


def test_dropping_a_step_is_dropping_its_value() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student)
    for stepped in (False, True):
        learner.distill(student(batch()), batch()).backward()
        learner.observe()
        assert learner._step.pending
        assert learner._step.observed == {"target"}
        learner.after_step(stepped=stepped)
        assert vars(learner._step) == vars(Step())
    assert learner.report().made == 1
