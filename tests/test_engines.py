"""Mixed precision, torch.compile, and errors of a training engine's kind, in real training steps."""

import threading
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
import torch
from torch import Tensor, nn

from clda_core import CldaError, CollaborativeLearner
from clda_core.saliency import PseudoLabelCrossEntropy, Taylor
from clda_core.selection import AllLayers, LowestFraction, RandomFraction
from clda_core.update import Average, Guard, MaskedDistillation
from tests.helpers import (
    batch,
    bits,
    host_loss,
    make_learner,
    networks,
    no_traces,
    nothing_changed,
    random_states,
    sgd,
    values,
)

# ---------------------------------------------------------------------------------------------------- mixed precision

needs_autocast = pytest.mark.skipif(not hasattr(torch, "autocast"), reason="this torch has no autocast on the CPU")


def without_dropout(*models: nn.Module) -> None:
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


@needs_autocast
def test_under_autocast_the_kd_loss_and_the_rounds_are_in_full_precision() -> None:
    runs = []
    for enabled in (False, True):
        teacher, student = networks()
        without_dropout(student)
        optimizer = sgd(student)
        learner = make_learner(teacher, student, update=Average(decay=0.8), selection=AllLayers())
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                output = student(batch(step))
                loss = learner.distill(output, batch(step))
                total = host_loss(student, step) + loss
                assert student.stem(batch(step)).dtype == (torch.bfloat16 if enabled else torch.float32)
            assert loss.dtype == torch.float32
            total.backward()
            learner.step(optimizer)
        assert {tensor.dtype for tensor in teacher.parameters()} == {torch.float32}
        runs.append(learner.report().rounds)
    assert len(runs[1]) == 3
    assert runs[1][0].rates == runs[0][0].rates, "the first round's saliency does not depend on autocast"


# ------------------------------------------------------------------------------------------------------ torch.compile

needs_compile = pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.compile came with torch 2.0")
SELECTIONS: Dict[str, Callable[[], Any]] = {
    "the default": LowestFraction,
    "other layers in each round": lambda: RandomFraction(fraction=0.5, seed=1),
}


def compiled_run(backend: Any, **options: Any) -> Tuple[CollaborativeLearner, nn.Module, nn.Module]:
    """Train five steps with a round in each, with models compiled by ``backend``, ``None`` for uncompiled ones."""
    torch.manual_seed(0)
    teacher, student = networks()
    without_dropout(teacher, student)
    optimizer = sgd(student)
    run_teacher, run_student = teacher, student
    if backend is not None:
        torch._dynamo.reset()
        run_teacher, run_student = torch.compile(teacher, backend=backend), torch.compile(student, backend=backend)
    learner = make_learner(run_teacher, run_student, **options)
    for step in range(5):
        optimizer.zero_grad()
        (host_loss(run_student, step) + learner.distill(run_student(batch(step)), batch(step))).backward()
        learner.step(optimizer)
    return learner, teacher, run_teacher


@pytest.fixture(params=["alone", "beside a loader's thread"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let another thread be alive, or not: beside one, the first pass of its kind is watched for draws."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    if request.param != "alone":
        thread.start()
    yield
    over.set()
    if thread.ident:
        thread.join()


@needs_compile
@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own, of some versions
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(
    "update",
    [lambda: Guard(MaskedDistillation(learning_rate=1e-2)), lambda: Average(decay=0.8)],
    ids=["guarded", "average"],
)
def test_rounds_compile_nothing_anew(selection: str, update: Any) -> None:
    compiled: List[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    def options() -> Dict[str, Any]:
        return {"selection": SELECTIONS[selection](), "update": update()}

    plain, its_teacher, _ = compiled_run(None, **options())
    learner, teacher, run_teacher = compiled_run(counting, **options())
    assert len(learner.report().rounds) == 5
    assert len(compiled) == 2, "the teacher's forward pass once, the student's once"
    assert values(teacher) == values(its_teacher), "bit for bit as uncompiled"
    assert learner.report().rounds == plain.report().rounds
    with torch.no_grad():
        assert torch.equal(run_teacher(batch()), teacher(batch())), "what the rounds wrote is seen"
    assert len(compiled) == 2


@needs_compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_compiled_teacher_computes_with_what_the_rounds_wrote() -> None:
    learner, teacher, run_teacher = compiled_run("aot_eager", update=Average(decay=0.5), selection=AllLayers())
    assert len(learner.report().rounds) == 5
    untouched, _ = networks()
    with torch.no_grad():
        now = run_teacher(batch())
        assert torch.allclose(now, teacher(batch()), atol=1e-5)
        assert not torch.allclose(now, untouched(batch()), atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- errors

OUT_OF_MEMORY: List[Any] = [RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")]
OUT_OF_MEMORY += [torch.OutOfMemoryError("out of memory")] if hasattr(torch, "OutOfMemoryError") else []
OUT_OF_MEMORY += [KeyboardInterrupt()]


class Failing:
    """Calls ``function`` a number of times, draws from the random generators, and then raises."""

    def __init__(self, function: Any, error: BaseException, after: int = 0) -> None:
        self.function, self.error, self.left = function, error, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        torch.rand(3)
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.function(*args, **kwargs)


class FailingScore(Taylor):
    error: BaseException

    def score(self, parameter: Tensor, derivative: Any) -> Tensor:
        raise self.error


def ready(**options: Any) -> Tuple[CollaborativeLearner, Any]:
    """Return a learner with a round behind it, at the point where the optimizer is about to step."""
    torch.manual_seed(0)
    teacher, student = networks()
    optimizer = sgd(student)
    learner = make_learner(teacher, student, **{"selection": AllLayers(), **options})
    for step in range(2):
        optimizer.zero_grad()
        learner.distill(student(batch(step)), batch(step)).backward()
        if step == 0:
            learner.step(optimizer)
    return learner, optimizer


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("what", ["probe", "saliency", "loss function"])
def test_what_raises_while_observing_changes_nothing(what: str, error: BaseException) -> None:
    probe = PseudoLabelCrossEntropy()
    learner, optimizer = ready()
    loss = None
    if what == "probe":
        learner._observer._probe = Failing(probe, error)
    elif what == "saliency":
        learner._observer._saliency = FailingScore()
        FailingScore.error = error
    else:
        loss = Failing(None, error)
    with nothing_changed(learner, optimizer), pytest.raises(type(error)):
        learner.observe(loss)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("steps_made", [0, 1])
def test_what_raises_in_an_update_leaves_its_own_state_as_it_was(steps_made: int, error: BaseException) -> None:
    """Without a guard: the moments of its optimizer are those of the last round that was made."""
    from clda_core.distillation import KLDistillation

    def training() -> Tuple[CollaborativeLearner, Any, MaskedDistillation]:
        update = MaskedDistillation(steps=2, learning_rate=1e-2)
        return (*ready(update=update), update)

    learner, optimizer, update = training()
    moments, teacher = bits(update.state_dict()), values(learner.teacher)
    update.distillation = Failing(KLDistillation(temperature=1.0), error, after=steps_made)
    learner.observe()
    optimizer.step()
    before, student = random_states(), values(learner.student)
    expected = CldaError if isinstance(error, Exception) else type(error)
    with no_traces(learner.teacher, learner.student), pytest.raises(expected, match=r"out of memory|^$"):
        learner.after_step()
    assert random_states() == before
    assert values(learner.student) == student
    assert values(learner.teacher) == teacher
    assert bits(update.state_dict()) == moments
    assert len(learner.report().rounds) == 1
    # And the next round is made, from there.
    update.distillation = KLDistillation(temperature=1.0)
    learner.distill(learner.student(batch(2)), batch(2))
    learner.step(step_fn=lambda: None)
    assert len(learner.report().rounds) == 2
