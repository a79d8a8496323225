"""A training iteration with CLDA against the same with frozen-teacher KD, amortised over the schedule."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cost.figures import Figure, figure
from benchmarks.cost.settings import Forced, Host, Setting
from benchmarks.cost.timing import OFTEN, Spread, Times, interleaved, ratio, spread
from clda_core import CollaborativeLearner, Never, Schedule
from clda_core._host.compat import adam
from clda_core._host.names import looking_once
from clda_core.distillation import KLDistillation
from clda_core.layers import canonical_parameters
from clda_core.lead import FixedTrust
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation, RoundContext, Update, UpdateResult
from clda_core.update.guard import consensus

STEPS = 10_000
"""Of the training over which the rounds are spread."""

AVERAGING, LEADING, WORST, FUNCTIONAL, OFF = 1.03, 1.25, 1.30, 1.10, 1.005

RARER = Schedule(interval=15, observe_every=5)
"""What the cards of averaging and of the guard suggest."""

RAREST = Schedule(interval=30, observe_every=5)
"""What the card of aligned averaging suggests."""

_EXPECTED = (
    "the default schedule (a round every 7 steps, observed every 3 rounds), as if the student led all along, with a "
    "view by which both networks are validated: no training costs more"
)
_REJECTED = "a round every 15 steps, observed every 5 rounds; as if it rejected every update, after two backtracks"
_REALIGNED = AlignedAverage().realign_every  # rounds with and without matching differ by far, and are timed apart
_AMORTISED = (
    "a round every 15 steps (aligned: 30), observed every 5 rounds, the student trusted whoever leads; both sides "
    "train the student on two batches, run the host EMA and the teacher, and load no data"
)


def iteration(setting: Setting, device: torch.device, repeats: int) -> Iterator[Figure]:
    """Measure whole iterations, then rounds, then what a functional update costs over what it needs."""
    host = Host(setting, device)
    frozen = CollaborativeLearner(host.teacher, host.student, schedule=Never())
    by_kl = CollaborativeLearner(host.teacher, host.student, schedule=Never(), distillation=KLDistillation())
    off = CollaborativeLearner(host.teacher, host.student, enabled=False)
    with warnings.catch_warnings():  # one student in several loops: each writes what the learner of another has stepped
        warnings.filterwarnings("ignore", "all .* parameters that learner.step", UserWarning)
        times = interleaved(
            {
                "host": host.alone,
                "off": lambda: host.with_learner(off),
                "plain": host.with_plain_kd,
                "by KL": lambda: host.with_learner(by_kl),
                "frozen": lambda: host.with_learner(frozen),
            },
            repeats=repeats,
            device=device,
        )
    rounds = _rounds(host, device, max(3, repeats // 3))
    yield from _off(host, off, times, setting.name, repeats, device)
    yield figure("iteration", "KD with KL by the learner / by hand", setting.name, ratio(times, "by KL", "plain"))
    for name, (_, schedule, budget, note) in _updates().items():
        found = _amortised(rounds, name, schedule)
        what = f"CLDA, {name} / frozen-teacher KD"
        yield figure("iteration", what, setting.name, found, at_most=budget, note=note)
    yield from _functional(host, setting.name, repeats, device)


def shares(schedule: Schedule, steps: int) -> Tuple[float, float]:
    """Return the shares of the steps that end with an observed round and with one that goes by earlier rates."""
    due = [step for step in range(1, steps + 1) if schedule.due(step)]
    observed = [step for step in due if schedule.observes(step)]
    return len(observed) / steps, (len(due) - len(observed)) / steps


def _updates() -> Dict[str, Tuple[Update, Schedule, float, str]]:
    rejecting = Guard(MaskedDistillation(), criterion=_judging(math.nan))
    return {
        "Average": (Average(), RARER, AVERAGING, _AMORTISED),
        "AlignedAverage": (AlignedAverage(realign_every=1_000_000), RAREST, AVERAGING, _AMORTISED),
        "defaults": (MaskedDistillation(), Schedule(), LEADING, _EXPECTED),
        "guarded, all rejected": (rejecting, RARER, WORST, _REJECTED),
    }


def _judging(score: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the default criterion, at its cost, with another result."""
    return lambda *logits: torch.full_like(consensus(*logits), score)


def _rounds(host: Host, device: torch.device, repeats: int) -> Times:
    """Time what a learner does at a step that ends with a round beyond what it does at any step."""
    tasks: Dict[str, Callable[[], None]] = {}
    with torch.no_grad():
        output, target = host.student(host.mixed).requires_grad_(), host.teacher(host.mixed)
    updates = {name: update for name, (update, *_) in _updates().items()}
    for name, update in {**updates, "AlignedAverage, realigning": AlignedAverage(realign_every=1)}.items():
        schedule = Forced()
        averages = isinstance(update, (Average, AlignedAverage))  # which are judged without the looks at both networks
        trust = FixedTrust() if averages else _leads
        learner = CollaborativeLearner(host.teacher, host.student, update=update, schedule=schedule, trust=trust)
        step = functools.partial(_step, learner, schedule, output, target, host.mixed)
        step(True, True)  # the rounds without an observation go by the rates of this one
        tasks[f"{name} observed"] = functools.partial(step, True, True)
        tasks[f"{name} round"] = functools.partial(step, True, False)
    tasks["nothing"] = functools.partial(step, False, False)
    frozen = CollaborativeLearner(host.teacher, host.student, schedule=Never())
    tasks["frozen"] = functools.partial(_step, frozen, schedule, output, target, host.mixed, False, False)
    tasks["iteration"] = lambda: host.with_learner(frozen)
    return interleaved(tasks, repeats=repeats, device=device)


def _leads(lead: float) -> float:
    """Trust the student, whatever the validator said."""
    return 1.0


def _step(
    learner: CollaborativeLearner,
    schedule: Forced,
    output: Tensor,
    target: Tensor,
    images: Tensor,
    round_: bool,
    observed: bool,
) -> None:
    """Make the learner's part of a step, with both models' outputs at hand and nothing to optimise."""
    schedule.round, schedule.observed = round_, observed
    learner.distill(output, images, teacher_output=target, view=images)
    learner.step(step_fn=lambda: None)


def _amortised(rounds: Times, name: str, schedule: Schedule) -> Spread:
    """Return the cost of steps outside rounds, and of the rounds in their shares, over frozen-teacher KD's.

    By the learner's calls alone, beside an iteration of frozen-teacher KD of the same repeat: whole iterations that do
    the same vary by more than the budget.
    """
    observed, due = shares(schedule, STEPS)

    def of_repeat(index: int) -> float:
        here = {task: seconds[index] for task, seconds in rounds.items()}
        idle = here["nothing"]
        extra = idle - here["frozen"]
        extra += observed * (here[f"{name} observed"] - idle) + due * (here[f"{name} round"] - idle)
        if name == "AlignedAverage":
            realigned = here["AlignedAverage, realigning round"] - here["AlignedAverage round"]
            extra += (observed + due) / _REALIGNED * realigned
        return 1.0 + extra / here["iteration"]

    return spread([of_repeat(index) for index in range(len(rounds["iteration"]))])


def _off(
    host: Host, off: CollaborativeLearner, times: Times, where: str, repeats: int, device: torch.device
) -> Iterator[Figure]:
    """Judge by the calls alone: whole iterations vary by more than the budget."""
    start = torch.zeros((), device=device, requires_grad=True)
    output = torch.zeros(2, 2, device=device)

    def without() -> None:
        (start * 1.0).backward()

    def with_calls() -> None:
        (start * 1.0 + off.distill(output, host.mixed)).backward()
        off.step(step_fn=lambda: None)

    calls = interleaved({"with": with_calls, "without": without}, repeats=repeats, device=device)
    unit = spread(times["host"]).median
    found = spread([1.0 + (more - less) / unit for more, less in zip(calls["with"], calls["without"])])
    note = "the time of the calls on their own beside an iteration of the host; below it whole iterations"
    yield figure("iteration", "CLDA off / host alone", where, found, at_most=OFF, note=note)
    yield figure("iteration", "CLDA off / host alone, whole iterations", where, ratio(times, "off", "host"))


class _Watched:
    """An update that keeps what the round handed to it."""

    needs_relation = False

    def __init__(self) -> None:
        self.context: Optional[RoundContext] = None

    def apply(self, context: RoundContext) -> UpdateResult:
        self.context = context
        return UpdateResult(())

    def state_dict(self) -> Dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def context_of_a_round(host: Host) -> RoundContext:
    """Return what an update is handed in a round with the default saliency and selection."""
    watched, schedule = _Watched(), Forced()
    learner = CollaborativeLearner(host.teacher, host.student, update=watched, schedule=schedule, trust=FixedTrust())
    with torch.no_grad():
        output, target = host.student(host.mixed).requires_grad_(), host.teacher(host.mixed)
    _step(learner, schedule, output, target, host.mixed, True, True)
    assert watched.context is not None
    return watched.context


def _functional(host: Host, where: str, repeats: int, device: torch.device) -> Iterator[Figure]:
    context = context_of_a_round(host)
    update = MaskedDistillation()
    parameters = canonical_parameters(host.teacher)
    selected = [parameters[name] for layer in context.layers for name in layer.parameters]
    prediction = context.student_outputs().logits
    optimizer = adam(selected, 1e-4)

    def teacher_by_hand() -> None:
        for parameter in selected:
            parameter.requires_grad_(True)
        logits = host.teacher(host.mixed)
        loss = F.kl_div(F.log_softmax(logits, 1), F.softmax(prediction, 1), reduction="sum")
        (loss * (logits.shape[1] / logits.numel())).backward()
        optimizer.step()
        for parameter in selected:
            parameter.grad = None
            parameter.requires_grad_(False)

    def by_hand() -> None:
        host.student.eval()
        with torch.no_grad():
            host.student(host.mixed)
        host.student.train()
        teacher_by_hand()

    tasks = {
        "update": lambda: update.apply(dataclasses.replace(context, _cache={})),
        "update, predictions at hand": lambda: update.apply(context),
        "by hand": by_hand,
        "teacher by hand": teacher_by_hand,
    }
    with looking_once(host.teacher, host.student):  # as a round does, for the update and all else
        times = interleaved(tasks, repeats=OFTEN * repeats, device=device)
    note = (
        "by hand: the same passes, F.kl_div, and a step of the same optimizer, of the selected layers alone; without a "
        "look at whether a gradient is finite, and with modes, buffers and gradients left as they come"
    )
    what = "MaskedDistillation / the same by hand"
    yield figure("iteration", what, where, ratio(times, "update", "by hand"), at_most=FUNCTIONAL, note=note)
    what = "MaskedDistillation, student's predictions at hand / the same by hand"
    found = ratio(times, "update, predictions at hand", "teacher by hand")
    yield figure("iteration", what, where, found, at_most=FUNCTIONAL, note=note)
