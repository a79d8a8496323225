"""Going back to the best teacher: when, to what, and with nothing left behind."""

import copy
import pickle
from typing import Any, Callable, Dict, List, Mapping, Optional

import pytest
import torch
from torch import Tensor, nn

from clda_core.errors import CldaError
from clda_core.update import Guard, KeepBest, MaskedDistillation, RoundContext, UpdateResult
from clda_core.validation import MutualInformation, SoftConsistency
from tests.helpers import no_traces
from tests.models import mlp
from tests.update.rounds import changed, randomise, round_context, values

FIRST, LAST = "0", "5"
"""The layers of :func:`pair`."""


class Class0(nn.Module):
    """A validator of the mean logit of class 0: what it says can be worked out by hand."""

    needs_view = False

    def statistics(self, logits: Tensor, view: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Tensor:
        return torch.stack([logits[:, 0].double().sum(), torch.tensor(float(len(logits)), dtype=torch.float64)])

    def score(self, statistics: Tensor) -> Tensor:
        return statistics[0] / statistics[1]


class Unknown(Class0):
    def score(self, statistics: Tensor) -> Tensor:
        return torch.tensor(float("nan"))


class Shifts:
    """An update that adds to the biases of the selected layers, by one amount after another."""

    def __init__(self, *amounts: float) -> None:
        self.amounts = amounts
        self.made = 0

    def apply(self, context: RoundContext) -> UpdateResult:
        amount = self.amounts[self.made % len(self.amounts)]
        self.made += 1
        parameters = dict(context.teacher.named_parameters())
        with torch.no_grad():
            for layer in context.layers:
                parameters[f"{layer.name}.bias"].add_(amount)
        return UpdateResult(tuple(layer.name for layer in context.layers))

    def state_dict(self) -> Dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.made = state["made"]


def pair() -> Any:
    return randomise(mlp(4, 6, 3), 1), randomise(mlp(4, 5, 3), 2)


def rounds(update: KeepBest, teacher: nn.Module, student: nn.Module, *selected: str) -> List[UpdateResult]:
    """Make one round for each selected layer, each on a batch of its own."""
    results = []
    for index, name in enumerate(selected):
        context = round_context(teacher, student, [name], inputs=batch(index))
        context.before(update)
        results.append(update.apply(context))
    return results


def batch(seed: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def by_hand(model: nn.Module, *seeds: int) -> float:
    """Return the mean logit of class 0 on all of these batches."""
    with torch.no_grad():
        return float(copy.deepcopy(model).double()(torch.cat([batch(seed) for seed in seeds]).double())[:, 0].mean())


def test_a_teacher_that_became_worse_goes_back_in_every_layer() -> None:
    teacher, student = pair()
    before, original = values(teacher), copy.deepcopy(teacher)
    update = KeepBest(Shifts(-1.0), validator=Class0(), every=3, looks=1)
    results = rounds(update, teacher, student, LAST, FIRST)
    assert [result.accepted for result in results] == [None, None]
    assert sorted(changed(teacher, before)) == [f"{FIRST}.bias", f"{LAST}.bias"]
    worse = copy.deepcopy(teacher)
    [result] = rounds(update, teacher, student, LAST)
    assert changed(teacher, before) == [], "both layers, although this round selected one"
    assert (result.updated, result.accepted) == ((), False)
    assert list(result.skipped) == [LAST]
    assert result.score_before == pytest.approx(by_hand(original, 0), abs=1e-6)
    assert result.score_after == pytest.approx(by_hand(worse, 0), abs=1e-6)


def test_the_best_is_the_last_teacher_that_was_not_worse() -> None:
    teacher, student = pair()
    update = KeepBest(Shifts(1.0, 1.0, 1.0, -1.0, -1.0), validator=Class0(), every=3, looks=1)
    rounds(update, teacher, student, LAST, LAST)
    best = values(teacher)
    [third] = rounds(update, teacher, student, LAST)
    assert third.updated == (LAST,)
    assert third.accepted is None
    results = rounds(update, teacher, student, LAST, LAST, LAST)
    assert [result.accepted for result in results] == [None, None, False]
    assert changed(teacher, best) == [], "back to the teacher of the first decision, not to the one it began with"


def test_looks_are_summed_over_the_last_rounds_of_a_period() -> None:
    teacher, student = pair()
    update = KeepBest(Shifts(-1.0), validator=Class0(), every=4, looks=2)
    original = copy.deepcopy(teacher)
    rounds(update, teacher, student, LAST, LAST)
    at_first_look = copy.deepcopy(teacher)
    rounds(update, teacher, student, LAST)
    at_second_look = copy.deepcopy(teacher)
    context = round_context(teacher, student, [LAST], inputs=batch(7))
    result = update.apply(context)
    assert result.accepted is False
    # The first of the two looks was on batch 0 of the second call, the last one on batch 7.
    assert result.score_before == pytest.approx(by_hand(original, 0, 7), abs=1e-6)
    seen = (by_hand(at_first_look, 0) + by_hand(at_second_look, 7)) / 2
    assert result.score_after == pytest.approx(seen, abs=1e-6)


@pytest.mark.parametrize("inside", [True, False])
def test_going_back_is_final_inside_a_guard_and_around_one(inside: bool) -> None:
    teacher, student = pair()
    options: Any = {"criterion": lambda teacher, original, student: teacher.sum() * 0, "tolerance": 1.0}
    if inside:
        update: Any = Guard(KeepBest(Shifts(-1.0), validator=Class0(), every=3, looks=1), **options)
    else:
        update = KeepBest(Guard(Shifts(-1.0), **options), validator=Class0(), every=3, looks=1)
    before = values(teacher)
    results = rounds(update, teacher, student, LAST, FIRST, LAST)
    assert [result.accepted for result in results] == [True, True, False]
    assert changed(teacher, before) == []
    [next_round] = rounds(update, teacher, student, LAST)
    assert next_round.updated == (LAST,), "rounds go on"


@pytest.mark.parametrize("tolerance", [0.9, 1.1])
def test_the_tolerance_is_in_the_validators_units(tolerance: float) -> None:
    teacher, student = pair()
    update = KeepBest(Shifts(-1.0), validator=Class0(), every=2, looks=1, tolerance=tolerance)
    results = rounds(update, teacher, student, LAST, LAST)  # one shift of the head's bias: worse by 1.0
    assert results[-1].accepted is (False if tolerance < 1 else None)


def test_the_update_begins_anew_after_going_back() -> None:
    teacher, student = pair()
    update = KeepBest(Shifts(-1.0, 5.0), validator=Class0(), every=2, looks=1)
    rounds(update, teacher, student, LAST, LAST)
    assert update.update.made == 0
    distilling = KeepBest(MaskedDistillation(learning_rate=1.0), validator=Class0(), every=2, looks=1)
    found = []
    for seed in range(40):
        teacher, student = randomise(mlp(4, 6, 3), seed), randomise(mlp(4, 5, 3), seed + 100)
        distilling = KeepBest(MaskedDistillation(learning_rate=1.0), validator=Class0(), every=2, looks=1)
        results = rounds(distilling, teacher, student, LAST, LAST)
        found.append((results[-1].accepted, bool(distilling.update.state_dict())))
    assert set(found) == {(False, False), (None, True)}, "no moments of what was gone back from"


def test_without_a_score_nothing_is_decided() -> None:
    teacher, student = pair()
    before = values(teacher)
    update = KeepBest(Shifts(-1.0), validator=Unknown(), every=2, looks=1)
    results = rounds(update, teacher, student, LAST, LAST, LAST)
    assert [result.updated for result in results] == [(LAST,)] * 3
    assert changed(teacher, before) == [f"{LAST}.bias"]


def test_a_batch_on_which_the_present_teacher_overflows_counts_for_neither() -> None:
    teacher, student = pair()
    update = KeepBest(Shifts(float("inf")), validator=Class0(), every=2, looks=1)
    results = rounds(update, teacher, student, LAST, LAST)
    assert results[-1].accepted is None


def test_a_round_can_be_taken_back_with_what_it_went_back_to() -> None:
    teacher, student = pair()
    update = KeepBest(Shifts(-1.0), validator=Class0(), every=3, looks=1)
    rounds(update, teacher, student, LAST, FIRST)
    before, state = values(teacher), pickle.dumps(update.state_dict())
    context = round_context(teacher, student, [LAST], inputs=batch(5))
    context.before(update)
    assert update.apply(context).accepted is False
    assert changed(teacher, before)
    context.take_back(update)
    assert changed(teacher, before) == []
    assert pickle.dumps(update.state_dict()) == state
    assert update.apply(round_context(teacher, student, [LAST], inputs=batch(5))).accepted is False


@pytest.mark.parametrize("wrap", [lambda best: best, Guard])
def test_a_resumed_training_goes_back_alike(wrap: Callable[[Any], Any]) -> None:
    def made() -> Any:
        criterion = {"criterion": lambda teacher, original, student: teacher[:, 1].mean()} if wrap is Guard else {}
        return wrap(KeepBest(Shifts(-1.0, 0.5), validator=Class0(), every=3, looks=2), **criterion)

    teacher, student = pair()
    whole = made()
    names = [LAST, FIRST, LAST, FIRST, LAST, LAST]
    for index, name in enumerate(names):
        context = round_context(teacher, student, [name], inputs=batch(index))
        context.before(whole)
        whole.apply(context)
    other, _ = pair()
    first = made()
    for index, name in enumerate(names):
        if index in (1, 2, 4):
            second = made()
            second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
            first = pickle.loads(pickle.dumps(second)) if wrap is not Guard else second
        context = round_context(other, student, [name], inputs=batch(index))
        context.before(first)
        first.apply(context)
    assert changed(other, values(teacher)) == []


def test_by_default_it_goes_by_the_view_where_there_is_one() -> None:
    teacher, student = pair()
    scores = []
    for view in (None, batch(9)):
        teacher, student = pair()
        update = KeepBest(Shifts(-3.0), every=2, looks=1)
        for name in (FIRST, FIRST):
            context = round_context(teacher, student, [name], inputs=batch(0), view=view)
            update.apply(context)
        scores.append(update._of)
    assert scores == ["MutualInformation", "SoftConsistency"]


def test_it_leaves_no_trace() -> None:
    teacher, student = pair()
    update = KeepBest(Shifts(-1.0), validator=MutualInformation(), every=2, looks=2)
    rounds(update, teacher, student, LAST)
    context = round_context(teacher, student, [LAST], inputs=batch(0))
    with no_traces(teacher, student):
        update.rehearse(context)
        update.apply(context)


@pytest.mark.parametrize("rehearsed", [True, False])
def test_one_update_cannot_serve_two_teachers(rehearsed: bool) -> None:
    teacher, student = pair()
    update = KeepBest(Shifts(-1.0), validator=Class0(), every=2, looks=1)
    rounds(update, teacher, student, LAST)
    other = randomise(mlp(4, 6, 3), 3)
    before = values(other)
    context = round_context(other, student, [LAST], inputs=batch(0))
    with pytest.raises(CldaError, match="of another teacher.*an update of its own"):
        update.rehearse(context) if rehearsed else update.apply(context)
    assert changed(other, before) == []
    update.load_state_dict(KeepBest(Shifts(-1.0)).state_dict())
    assert update.apply(context).updated == (LAST,), "a state that was loaded belongs to the next round's"


def test_a_state_of_another_teacher_is_refused() -> None:
    teacher, student = pair()
    update = KeepBest(Shifts(-1.0), validator=Class0(), every=2, looks=1)
    rounds(update, teacher, student, LAST)
    restored = KeepBest(Shifts(-1.0), validator=Class0(), every=2, looks=1)
    restored.load_state_dict(update.state_dict())
    restored.check_teacher(teacher)
    with pytest.raises(CldaError, match=r"another network.*'5\.weight' of shape \(3, 6\).*shape \(3, 7\)"):
        restored.check_teacher(mlp(4, 7, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 3, "looks": 4}, "every"),
        ({"looks": 0}, "looks"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"validator": SoftConsistency}, "no validator"),
        ({"update": MaskedDistillation}, "no update"),
    ],
)
def test_bad_arguments(options: Dict[str, Any], message: str) -> None:
    with pytest.raises(CldaError, match=message):
        KeepBest(**{"update": MaskedDistillation(), **options})


def test_a_validator_that_needs_a_view_says_so_in_the_first_step() -> None:
    teacher, student = pair()
    update = KeepBest(MaskedDistillation(), validator=SoftConsistency())
    with pytest.raises(CldaError, match="SoftConsistency needs a second view"):
        update.rehearse(round_context(teacher, student, [LAST], inputs=batch(0)))
