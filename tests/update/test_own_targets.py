"""The teacher's own targets: those of the teacher before its first round, whatever rounds have made of it since."""

import copy
import pickle
from typing import Any, Dict, List, Optional, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core import CldaError, Schedule
from clda_core.lead import FixedTrust
from clda_core.selection import AllLayers
from clda_core.update import Guard, KeepBest, MaskedDistillation
from clda_core.update.writing import holding, with_weights, write_weights
from tests import helpers
from tests.helpers import no_traces
from tests.models import mlp
from tests.update.rounds import changed, randomise, round_context, same_bits, values
from tests.update.test_keep_best import Class0

FIRST, LAST = "0", "5"
"""The layers of :func:`pair` that have parameters."""

DRAWN: List[Sequence[str]] = [[FIRST], [LAST], [FIRST, LAST], [LAST], [FIRST]]
"""The layers of one round after another."""


def pair(dtype: torch.dtype = torch.float64) -> Any:
    teacher, student = randomise(mlp(hidden=6), 1), randomise(mlp(hidden=4), 2)
    return teacher.to(dtype).eval().requires_grad_(False), student.to(dtype).eval()


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def own(**options: Any) -> MaskedDistillation:
    return MaskedDistillation(**{"optimizer": sgd, "own_targets": True, **options})


def make_rounds(
    update: Any, teacher: nn.Module, student: nn.Module, seeds: Sequence[int] = range(len(DRAWN)), **options: Any
) -> None:
    for seed in seeds:
        x = batch(seed, next(teacher.parameters()).dtype)
        given = {"inputs": x, "view": x + 0.5 * x.sin(), "trust": 0.0, **options}
        update.apply(round_context(teacher, student, DRAWN[seed], **given))


def by_hand(teacher: nn.Module, targets_of: Optional[nn.Module]) -> Dict[str, Tensor]:
    """Return what the rounds of :func:`make_rounds` make of a teacher by targets of another, or of itself."""
    teacher = copy.deepcopy(teacher).requires_grad_(True)
    for seed, layers in enumerate(DRAWN):
        x = batch(seed)
        target = F.softmax((teacher if targets_of is None else targets_of)(x), dim=1).detach()
        prediction = F.log_softmax(teacher(x + 0.5 * x.sin()), dim=1)
        loss = (target * (target.log() - prediction)).sum() / len(x)
        names = [name for name, _ in teacher.named_parameters() if name.split(".")[0] in layers]
        chosen = [dict(teacher.named_parameters())[name] for name in names]
        with torch.no_grad():
            for parameter, gradient in zip(chosen, torch.autograd.grad(loss, chosen)):
                parameter -= 0.5 * gradient
    return values(teacher)


def near(teacher: nn.Module, expected: Dict[str, Tensor]) -> bool:
    return all(torch.allclose(value, expected[name], rtol=1e-9, atol=1e-12) for name, value in values(teacher).items())


@pytest.mark.parametrize("known", [False, True])
def test_they_are_those_of_the_teacher_before_its_first_round(known: bool) -> None:
    """Also where ``distill`` hands over what the teacher predicts now."""
    teacher, student = pair()
    original = copy.deepcopy(teacher)
    expected, current = by_hand(teacher, original), by_hand(teacher, None)
    update = own()
    for seed in range(len(DRAWN)):
        outputs = round_context(teacher, student, inputs=batch(seed)).teacher_outputs() if known else None
        make_rounds(update, teacher, student, [seed], teacher_before=outputs)
    assert near(teacher, expected)
    assert not near(teacher, current)


def test_of_a_teacher_that_its_host_trains_they_are_those_of_now() -> None:
    teacher, student = pair()
    expected = by_hand(teacher, None)
    update = own()
    make_rounds(update, teacher, student, cotrained=True)
    assert near(teacher, expected)
    assert "original" not in update.state_dict()


def test_what_was_kept_is_dropped_once_the_host_trains_the_teacher() -> None:
    teacher, student = pair()
    update = own()
    make_rounds(update, teacher, student, [0])
    make_rounds(update, teacher, student, [1], cotrained=True)
    assert "original" not in update.state_dict()


@pytest.mark.parametrize("how", ["frozen", "left to require gradients", "trained"])
def test_the_learner_tells_who_trains_the_teacher_by_gradients(how: str) -> None:
    teacher, student = helpers.networks()
    teacher.requires_grad_(how != "frozen")
    update = own()
    learner = helpers.make_learner(
        teacher, student, update=update, selection=AllLayers(), trust=FixedTrust(0.5), schedule=Schedule(interval=1)
    )
    optimizer = torch.optim.SGD([*teacher.parameters(), *student.parameters()], lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        x = helpers.batch(step)
        loss = learner.distill(student(x), x, view=x + 0.1 * x.sin())
        if how == "trained":
            loss = loss + teacher(x).square().mean()
        loss.backward()
        learner.step(optimizer)
    assert ("original" in update.state_dict()) == (how != "trained")
    assert learner.state_dict()["observer"]["cotrained"] == (how == "trained")


def test_only_what_was_updated_is_kept_and_only_for_own_targets() -> None:
    teacher, student = pair()
    before = values(teacher)
    update, without = own(), own(own_targets=False)
    make_rounds(update, teacher, student, [0])
    kept = update.state_dict()["original"]
    assert set(kept) == {f"{FIRST}.weight", f"{FIRST}.bias"}
    assert all(same_bits(kept[name], before[name]) for name in kept)
    assert changed(teacher, before)
    make_rounds(without, teacher, student, [0], trust=1.0)
    assert "original" not in without.state_dict()


def test_a_round_can_be_taken_back_with_what_it_kept() -> None:
    teacher, student = pair()
    update = own()
    make_rounds(update, teacher, student, [0])
    before, state = values(teacher), pickle.dumps(update.state_dict())
    x = batch(1)
    context = round_context(teacher, student, [FIRST, LAST], inputs=x, view=x + 0.5 * x.sin(), trust=0.0)
    context.before(update)
    update.apply(context)
    assert set(update.state_dict()["original"]) == {
        f"{name}.{kind}" for name in DRAWN[2] for kind in ("weight", "bias")
    }
    context.take_back(update)
    assert changed(teacher, before) == []
    assert pickle.dumps(update.state_dict()) == state


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_training_goes_by_the_same_targets(stop: int) -> None:
    teacher, student = pair(torch.float32)
    whole = copy.deepcopy(teacher)
    make_rounds(own(optimizer=None), whole, student)
    first, second = own(optimizer=None), own(optimizer=None)
    make_rounds(first, teacher, student, range(stop))
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    second.check_teacher(teacher)
    make_rounds(second, teacher, student, range(stop, len(DRAWN)))
    assert changed(teacher, values(whole)) == []


def test_a_state_without_them_goes_on_from_the_teacher_as_it_is() -> None:
    """Such are the states of former versions."""
    teacher, student = pair()
    update = own()
    make_rounds(update, teacher, student, [0, 1])
    state = {name: value for name, value in update.state_dict().items() if name != "original"}
    halfway, other = values(teacher), own()
    other.load_state_dict(state)
    make_rounds(other, teacher, student, [2])
    kept = other.state_dict()["original"]
    assert kept
    assert all(same_bits(kept[name], halfway[name]) for name in kept)


def test_a_state_of_another_teacher_is_refused() -> None:
    teacher, student = pair()
    update, other = own(), own()
    make_rounds(update, teacher, student)
    other.load_state_dict({"original": update.state_dict()["original"]})
    other.check_teacher(teacher)
    with pytest.raises(
        CldaError,
        match=r"the teacher before its first round.*is another network.*'0\.weight' of shape \(6, 5\).*\(7, 5\)",
    ):
        other.check_teacher(mlp(hidden=7))


def test_a_teacher_that_moved_to_another_dtype_is_asked_in_that() -> None:
    teacher, student = pair(torch.float32)
    update = own()
    make_rounds(update, teacher, student, [0, 1])
    teacher.double(), student.double()
    make_rounds(update, teacher, student, [2, 3])
    assert all(value.dtype == torch.float64 and value.isfinite().all() for value in teacher.state_dict().values())


@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="autocast on the CPU came with torch 1.10")
def test_weights_that_autocast_has_cached_are_not_taken_for_those_held() -> None:
    """It caches the half-precision copies of weights that require gradients."""
    teacher, _ = pair(torch.float32)
    teacher.requires_grad_(True)
    kept = with_weights({}, teacher, [f"{FIRST}.weight"])
    x = batch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        original = teacher(x).detach()
    write_weights(teacher, {f"{FIRST}.weight": -kept[f"{FIRST}.weight"]})
    with torch.autocast("cpu", torch.bfloat16):
        present = teacher(x).detach()
        with holding(teacher, kept):
            held = teacher(x).detach()
        again = teacher(x).detach()
    assert same_bits(held.float(), original.float())
    assert same_bits(again.float(), present.float())
    assert not same_bits(held.float(), present.float())


def test_it_leaves_no_trace() -> None:
    teacher, student = pair()
    update = own()
    make_rounds(update, teacher, student, [0, 1])
    x = batch(2)
    context = round_context(teacher, student, [LAST], inputs=x, view=x + 0.5 * x.sin(), trust=0.0)
    before = values(teacher)
    with no_traces(teacher, student):
        update.rehearse(context)
        assert changed(teacher, before) == []
        update.apply(context)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_the_former_teacher_is_asked_leaves_the_present_one(error: type) -> None:
    teacher, student = pair()
    update = own()
    make_rounds(update, teacher, student, [0, 1])
    before = values(teacher)

    def fail(*_: Any) -> Any:
        raise error("stop")

    x = batch(2)
    context = round_context(teacher, student, [LAST], inputs=x, view=x, trust=0.0, forward=fail)
    with pytest.raises(error, match="stop"):
        update.apply(context)
    assert changed(teacher, before) == []


def test_an_update_that_begins_anew_goes_by_the_teacher_gone_back_to() -> None:
    teacher, student = pair()
    update = KeepBest(own(), validator=Class0(), every=2, looks=1, tolerance=0.0)
    for seed in range(6):
        make_rounds(update, teacher, student, [seed % len(DRAWN)])
        if "original" not in update.state_dict()["update"]:
            return
    raise AssertionError("it never went back: choose another seed")


def test_a_rejected_round_keeps_nothing() -> None:
    teacher, student = pair()
    update = Guard(own(), criterion=lambda after, before, student: -(after - before).abs().sum(), backtracks=0)
    x = batch(0)
    context = round_context(teacher, student, [FIRST], inputs=x, view=x + 0.5 * x.sin(), trust=0.0)
    context.before(update)
    assert update.apply(context).accepted is False
    assert "original" not in str(update.state_dict())


def test_kept_weights_are_copies_of_what_was_not_kept_before() -> None:
    teacher, _ = pair()
    before = values(teacher)
    kept = with_weights({}, teacher, [f"{FIRST}.weight"])
    write_weights(teacher, {f"{FIRST}.weight": torch.zeros(()).expand(before[f"{FIRST}.weight"].shape)})
    kept = with_weights(kept, teacher, [f"{FIRST}.weight", f"{FIRST}.bias"])
    with holding(teacher, kept):
        assert changed(teacher, before) == []
    assert changed(teacher, before) == [f"{FIRST}.weight"]
