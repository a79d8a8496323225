"""Buffers that a forward pass writes in eval mode too: our passes' writes are undone, the host's stay."""

from typing import Any, Callable, Dict, List, Optional

import pytest
import torch
from torch import Tensor, nn

from clda_core import CollaborativeLearner, Never
from clda_core._host.borrowing import borrowed
from clda_core.relation import BySimilarity
from clda_core.selection import AllLayers
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation
from tests.helpers import bits, make_learner, seeded


class Middle(nn.Module):
    """Passes its input on, and remembers something; ``forward`` does so in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.remember(x)
        return x

    def remember(self, x: Tensor) -> None:
        raise NotImplementedError


class Counter(Middle):
    """Integer and not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def remember(self, x: Tensor) -> None:
        self.calls += 1


class Range(Middle):
    """What fake quantisation does: follows the range of its input, with buffers that are empty at first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor([]))
        self.register_buffer("high", torch.full((), float("-inf")))

    def remember(self, x: Tensor) -> None:
        low = x.min(dim=0)[0]
        fresh = self.low.numel() == 0
        self.low.resize_(low.shape)
        self.low.copy_(low if fresh else torch.min(self.low, low))
        self.high.copy_(torch.max(self.high, x.max()))


class Queue(Middle):
    """Assigns a new tensor, and keeps the position as a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(4, 2))
        self.position = 0

    def remember(self, x: Tensor) -> None:
        self.queue = torch.cat([self.queue[1:], x[:1, :2]])
        self.position += 1


class Hidden(Middle):
    """Writes through ``.data``, which no version shows."""

    def remember(self, x: Tensor) -> None:
        self.table.data.add_(1)


class Cache(Middle):
    """Registers a buffer in its first pass, as rotary position embeddings do, and keeps its length beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.length: Optional[int] = None

    def remember(self, x: Tensor) -> None:
        if self.length is None:
            self.register_buffer("cache", torch.ones(3), persistent=False)
            self.length = 3
        assert len(self.cache) == self.length


class Sometimes(Middle):
    """Writes only when a flag, a buffer itself, says so, as observers that are switched on later."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("enabled", torch.zeros((), dtype=torch.uint8))

    def remember(self, x: Tensor) -> None:
        if self.enabled:
            self.table += 1


MIDDLES = [Counter, Range, Queue, Hidden, Cache]


def net(middle: Callable[[], nn.Module], width: int = 6) -> Any:
    return nn.Sequential(nn.Linear(5, width), middle(), nn.ReLU(), nn.Linear(width, 3))


def attributes(model: nn.Module) -> List[Dict[str, Any]]:
    plain = (int, float, str, type(None))
    return [{name: value for name, value in vars(part).items() if type(value) in plain} for part in model.modules()]


def everything(model: nn.Module) -> Any:
    tables = [[(name, id(buffer)) for name, buffer in part._buffers.items()] for part in model.modules()]
    return contents(model), tables, attributes(model)


def contents(model: nn.Module) -> Any:
    """Return all values without ``numpy()``, after which a tensor's memory cannot be resized."""
    return [(name, tensor.tolist()) for name, tensor in [*model.named_parameters(), *model.named_buffers()]]


def inputs(seed: int) -> Tensor:
    return torch.randn(64, 5, generator=torch.Generator().manual_seed(seed)) * (seed + 1)


def run_twice(model: nn.Module, step: int, then: Callable[[], None] = lambda: None) -> None:
    with borrowed(model):
        model(inputs(step))
        model(inputs(step))
        then()


def stop() -> None:
    raise ZeroDivisionError("stop")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("middle", MIDDLES)
def test_evaluating_puts_every_buffer_back(middle: Any, fails: bool) -> None:
    model = seeded(lambda: net(middle), 0)
    fresh = everything(model)
    for step in range(3):
        before = everything(model)
        if fails:
            with pytest.raises(ZeroDivisionError, match="stop"):
                run_twice(model, step, stop)
        else:
            run_twice(model, step)
        assert everything(model) == before
        model(inputs(step))  # the host's own pass in between
    assert everything(model) != fresh


@pytest.mark.parametrize("update", [lambda: Guard(MaskedDistillation()), AlignedAverage, Average])
@pytest.mark.parametrize("middle", MIDDLES)
def test_rounds_and_distillation_leave_the_buffers_of_both_models(middle: Any, update: Any) -> None:
    teacher, student = seeded(lambda: net(middle, 8), 0), seeded(lambda: net(middle), 1)
    learner = make_learner(teacher, student, update=update(), selection=AllLayers(), relation=BySimilarity(minimum=0.0))
    for step in range(3):
        output = student(inputs(step))
        of_student, of_teacher = everything(student), everything(teacher)[1:]
        buffers = contents(teacher)[4:]
        learner.distill(output, inputs(step)).backward()
        learner.step(step_fn=lambda: None)
        assert everything(student) == of_student
        assert everything(teacher)[1:] == of_teacher
        assert contents(teacher)[4:] == buffers
    assert len(learner.report().rounds) == 3


@pytest.mark.parametrize("middle", MIDDLES)
def test_buffers_are_put_back_when_a_pass_or_a_strategy_raises(middle: Any) -> None:
    class Failing(Average):
        def apply(self, context: Any) -> Any:
            context.predict(context.teacher)
            context.student_outputs()
            raise ZeroDivisionError("theirs")

    teacher, student = seeded(lambda: net(middle, 8), 0), seeded(lambda: net(middle), 1)
    learner = make_learner(teacher, student, update=Failing(), selection=AllLayers())
    output = student(inputs(0))
    before = everything(teacher), everything(student)
    learner.distill(output, inputs(0))
    with pytest.raises(Exception, match="theirs"):
        learner.step(step_fn=lambda: None)
    assert (everything(teacher), everything(student)) == before


def test_an_observer_that_is_switched_on_later_is_undone_from_its_first_pass() -> None:
    model = seeded(lambda: net(Sometimes), 0)
    for step in range(6):
        if step == 3:
            model[1].enabled.fill_(1)
        before = everything(model)
        with borrowed(model):
            model(inputs(step))
        assert everything(model) == before


def test_a_write_that_nothing_announced_is_said_once_and_undone_from_then_on() -> None:
    class Late(Counter):
        def remember(self, x: Tensor) -> None:
            self.position = getattr(self, "position", 0) + 1
            if self.position > 2:
                self.calls += 1

    model = seeded(lambda: net(Late), 0)

    def passes() -> int:
        with borrowed(model):
            model(inputs(0))
        return int(model[1].calls)

    assert [passes(), passes()] == [0, 0]
    with pytest.warns(UserWarning, match=r"wrote buffers .*calls.* cannot be undone"):
        assert passes() == 1
    assert [passes(), passes()] == [1, 1]


def test_batch_norm_costs_no_copy_after_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a student whose statistics the host's own passes move all the time."""
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), 0)
    clones: List[int] = []
    original = Tensor.clone

    def clone(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        clones.append(self.numel())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "clone", clone)
    counts = []
    for step in range(5):
        model.train()(inputs(step))
        del clones[:]
        with borrowed(model):
            model(inputs(step))
        counts.append(len(clones))
    assert counts[0] == 3
    assert counts[2:] == [0, 0, 0]


def test_the_hosts_statistics_are_kept() -> None:
    """A student in training mode moves its own statistics; only our passes leave none."""
    runs = []
    for schedule in (None, Never()):
        teacher = seeded(lambda: net(Counter, 8), 0)
        student = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), Counter(), nn.Linear(4, 3)), 1)
        options: Dict[str, Any] = {} if schedule is None else {"schedule": schedule}
        learner = make_learner(teacher, student, **options)
        for step in range(3):
            learner.distill(student(inputs(step)), inputs(step)).backward()
            learner.step(step_fn=lambda: None)
        runs.append(bits(dict(student.named_buffers())))
        assert isinstance(learner, CollaborativeLearner)
    assert runs[0] == runs[1]
    assert int(student[2].calls) == 3
