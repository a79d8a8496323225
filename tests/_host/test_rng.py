"""The host's random state: no draw of ours shows, and no draw of another thread is taken back."""

import threading
from typing import Any, Callable, List

import pytest
import torch
from torch import Tensor, nn

from clda_core import CollaborativeLearner
from clda_core._host.rng import keeping_rng
from tests.helpers import make_learner, random_states, seeded


class Drawing(nn.Module):
    """Lets another thread draw in the middle of its forward pass; may draw itself, in eval mode too."""

    def __init__(self, width: int, draws: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(5, width)
        self.head = nn.Linear(width, 3)
        self.draws = draws
        self.meanwhile: List[Callable[[], None]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        for elsewhere in self.meanwhile:
            elsewhere()
        if self.draws:
            x = x + 0.01 * torch.randn_like(x)
        return self.head(x.relu())


class Loader:
    """A thread that draws one number each time it is asked to."""

    def __init__(self) -> None:
        self.drawn: List[float] = []
        self._ask, self._answer = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while self._ask.acquire() and not self._stopped:
            self.drawn.append(torch.rand(1, dtype=torch.float64).item())
            self._answer.release()

    def draw(self) -> None:
        self._ask.release()
        assert self._answer.acquire(timeout=10)

    def stop(self) -> None:
        self._stopped = True
        self._ask.release()
        self._thread.join()


@pytest.fixture
def loader() -> Any:
    one = Loader()
    yield one
    one.stop()


def run(teacher: Drawing, student: Drawing, steps: int = 3) -> CollaborativeLearner:
    learner = make_learner(teacher, student)
    for _ in range(steps):
        x = torch.ones(4, 5)
        learner.distill(student(x), x).backward()
        learner.step(step_fn=lambda: None)
    return learner


needs_watching = not hasattr(torch, "Tag")


def test_a_thread_that_draws_during_our_passes_sees_no_number_twice(loader: Loader) -> None:
    torch.manual_seed(0)
    expected = torch.rand(200, dtype=torch.float64).tolist()
    torch.manual_seed(0)
    teacher, student = seeded(lambda: Drawing(6), 0), seeded(lambda: Drawing(4), 1)
    if needs_watching:  # there, what draws is known after a pass in which nobody else drew
        run(teacher, student)
    teacher.meanwhile.append(loader.draw)
    student.meanwhile.append(loader.draw)
    learner = run(teacher, student)
    assert len(learner.report().rounds) == 3
    assert len(loader.drawn) > 10
    if not needs_watching:
        assert loader.drawn == expected[: len(loader.drawn)]
    assert len(set(loader.drawn)) == len(loader.drawn)


@pytest.mark.parametrize("alone", [True, False])
def test_what_our_passes_draw_is_given_back(alone: bool, request: pytest.FixtureRequest) -> None:
    teacher, student = seeded(lambda: Drawing(6, draws=True), 0), seeded(lambda: Drawing(4), 1)
    if not alone:
        request.getfixturevalue("loader")
    before = random_states()
    run(teacher, student)
    assert random_states() == before


def test_without_other_threads_a_model_that_begins_to_draw_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    teacher, student = seeded(lambda: Drawing(6), 0), seeded(lambda: Drawing(4), 1)
    run(teacher, student)
    teacher.draws = True
    before = random_states()
    run(teacher, student)
    assert random_states() == before


def test_the_block_that_raises_gives_back_too() -> None:
    model = Drawing(6, draws=True)
    before = random_states()

    def block() -> None:
        with keeping_rng("distill", model):
            torch.rand(3)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        block()
    assert random_states() == before


def test_own_generators_and_dropout_that_drops_nothing_are_no_draws(loader: Loader) -> None:
    model = Drawing(6)
    attention = getattr(nn.functional, "scaled_dot_product_attention", None)
    state = torch.get_rng_state()
    with keeping_rng("distill", model):
        torch.randint(0, 2, (3,), generator=torch.Generator().manual_seed(0))
        if attention is not None:
            attention(torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8))
        if not needs_watching:
            loader.draw()
    assert torch.equal(torch.get_rng_state(), state) is needs_watching


def test_after_an_error_the_state_is_as_before_although_a_thread_is_alive(loader: Loader) -> None:
    model = Drawing(4).eval()
    x = torch.ones(2, 5)
    for _ in range(2):  # known not to draw
        with keeping_rng("distill", model):
            model(x)
    before = random_states()
    with pytest.raises(ValueError, match="in the middle"), keeping_rng("distill", model):
        _draws_and_fails()
    assert random_states() == before


def _draws_and_fails() -> None:
    torch.rand(3)
    raise ValueError("in the middle")
