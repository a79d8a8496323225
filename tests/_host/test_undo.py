"""Ctrl-C at any line: what was borrowed is given back, and a round is made whole or not at all."""

import contextlib
import copy
import sys
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
import torch
from torch import Tensor, nn

import clda_core
from clda_core import CollaborativeLearner
from clda_core._host.undo import settled, undoing
from clda_core.lead import FixedTrust
from clda_core.relation import BySimilarity
from clda_core.selection import AllLayers
from clda_core.update import AlignedAverage, Average, Guard, KeepBest, MaskedDistillation, agreement
from tests.helpers import make_learner, random_states, seeded, values

SAMPLED = 40
"""Lines tried for each update, evenly spread; more take a second for every thirty."""

TRACED = (clda_core.__path__[0], contextlib.__file__, sys.modules["torch.autograd.grad_mode"].__file__)


class Former:
    """A validator that scores the teacher 0 and the best one 1, of which it is asked in turns."""

    needs_view = False

    def __init__(self) -> None:
        self.asked = 0

    def statistics(self, logits: Tensor, view_logits: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Tensor:
        self.asked += 1
        return torch.tensor([float(self.asked % 2 == 0)])

    def score(self, statistics: Tensor) -> Tensor:
        return statistics[0]


UPDATES: Dict[str, Callable[[], Any]] = {
    "Average": lambda: Average(decay=0.5, buffers="average"),
    "AlignedAverage": lambda: AlignedAverage(decay=0.5, buffers="average"),
    "accepted": lambda: Guard(MaskedDistillation(learning_rate=1e-2), criterion=agreement, tolerance=1e9),
    "rejected": lambda: Guard(MaskedDistillation(learning_rate=1e-2), criterion=distance, backtracks=1),
    "own targets": lambda: MaskedDistillation(learning_rate=1e-2, own_targets=True),
    "gone back": lambda: KeepBest(MaskedDistillation(learning_rate=1e-2), validator=Former(), every=2, looks=1),
}


def distance(teacher: Tensor, original: Tensor, student: Tensor) -> Tensor:
    """Reject whatever moves the teacher."""
    return -(teacher - original).abs().sum()


def net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 3)
    ).train()


class Interrupting:
    """Counts the distinct lines that a function runs, and raises ``KeyboardInterrupt`` at the chosen one.

    Lines of context managers are told apart by where they are entered and left.
    """

    def __init__(self, at: Optional[int] = None) -> None:
        self.lines: Dict[Tuple[Any, ...], None] = {}
        self._at = at

    def __call__(self, function: Callable[[], Any]) -> None:
        sys.settrace(self._enter)
        try:
            function()
        finally:
            sys.settrace(None)

    def _enter(self, frame: Any, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(TRACED) else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            caller = frame.f_back
            ours = frame.f_code.co_filename.startswith(TRACED[0])
            place = (frame.f_code, frame.f_lineno) + (() if ours else (caller.f_code, caller.f_lineno))
            if place not in self.lines:
                self.lines[place] = None
                if len(self.lines) - 1 == self._at:
                    raise KeyboardInterrupt
        return self._line


def left_behind(*models: nn.Module) -> Any:
    flags = [(p.requires_grad, p.grad is None) for model in models for p in model.parameters()]
    modules = [(part.training, len(part._forward_hooks)) for model in models for part in model.modules()]
    return flags, modules, torch.is_grad_enabled(), random_states()


def state(learner: CollaborativeLearner) -> Tuple[Any, ...]:
    """Return what a round changes, which must be of one time."""
    report = learner.report()
    update = learner.update.state_dict()
    moments = [] if "optimizer" not in update else [str(update["optimizer"])]
    return values(learner.teacher), len(report.rounds), moments, update.get("rounds")


def one_step(learner: CollaborativeLearner) -> None:
    images = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    learner.distill(learner.student(images), images, view=-images).backward()
    learner.step(step_fn=lambda: None)


@pytest.mark.parametrize("update", UPDATES)
def test_an_interrupt_at_any_line_of_a_step_leaves_all_as_before_or_after(update: str) -> None:
    learner = make_learner(
        seeded(lambda: net(6), 0),
        seeded(lambda: net(4), 1),
        update=UPDATES[update](),
        relation=BySimilarity(minimum=0.0),
        selection=AllLayers(),
        trust=FixedTrust(0.5 if update == "own targets" else 1.0),
    )
    one_step(learner)
    images = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    learner.distill(learner.student(images), images, view=-images).backward()

    def step(of: CollaborativeLearner) -> Callable[[], Any]:
        return lambda: of.step(step_fn=lambda: None)

    finished, counting = copy.deepcopy(learner), Interrupting()
    counting(step(finished))
    assert len(counting.lines) > 300
    before, after = state(learner), state(finished)
    if update == "gone back":
        assert finished.report().rounds[-1].accepted is False
    assert before[1] + 1 == after[1]
    bad: List[str] = []
    places = list(counting.lines)
    offset = list(UPDATES).index(update)
    for at in range(offset, len(places), 1 + len(places) // SAMPLED):
        one = copy.deepcopy(learner)
        borrowed = left_behind(one.teacher, one.student)
        with pytest.raises(KeyboardInterrupt):
            Interrupting(at)(step(one))
        found = left_behind(one.teacher, one.student)
        where = f"{places[at][0].co_name}, line {places[at][1]} of {places[at][0].co_filename}"
        torch.set_grad_enabled(True)
        if found != borrowed:
            bad.append(f"{where}: {[a == b for a, b in zip(found, borrowed)]} left behind")
        if state(one) not in (before, after):
            bad.append(f"{where}: torn {[(a == b, a == c) for a, b, c in zip(state(one), before, after)]}")
        if (one._step.observed or one._step.pending) and one._steps:
            bad.append(f"{where}: the step is not forgotten")
    assert not bad, "\n".join(bad)


def test_what_is_borrowed_inside_is_given_back_first_and_once() -> None:
    order: List[str] = []

    def outer_and_inner() -> None:
        with undoing(lambda: order.append("outer"), on_error_only=True), undoing(lambda: order.append("inner")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outer_and_inner()
    assert order == ["inner", "outer"]
    with undoing(lambda: order.append("kept"), on_error_only=True), undoing(lambda: order.append("given back")):
        pass
    assert order == ["inner", "outer", "given back"]


def test_a_context_that_an_interrupt_left_open_is_settled_once_and_not_again_when_it_is_collected() -> None:
    class Host:
        def __init__(self) -> None:
            self.value, self.broken_off = 0, 0

        def _drop_step(self) -> None:
            self.broken_off += 1

        @settled
        def work(self) -> None:
            def give_back() -> None:
                self.value -= 1

            self.left_open = undoing(give_back)
            self.left_open.__enter__()
            self.value += 1
            torch.set_grad_enabled(False)
            raise KeyboardInterrupt

    host = Host()
    with pytest.raises(KeyboardInterrupt):
        host.work()
    assert (host.value, host.broken_off, torch.is_grad_enabled()) == (0, 1, True)
    del host.left_open
    assert host.value == 0
