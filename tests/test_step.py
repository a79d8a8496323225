"""Steps without target data: a zero loss, no observation and no round, which is made at the next step with some."""

import copy
import warnings
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core import CldaError, CollaborativeLearner, Never, Outputs, Schedule
from clda_core.distillation import FeatureDistillation, KLDistillation, WeightedSum
from clda_core.saliency import Magnitude
from clda_core.selection import AllLayers
from clda_core.update import Average, MaskedDistillation
from tests.helpers import (
    Segmenter,
    batch,
    bits,
    host_loss,
    images,
    labels,
    loaded,
    make_learner,
    networks,
    no_traces,
    saved,
    seeded,
    sgd,
    train_step,
    values,
)
from tests.strategies import cases

MESSAGE = "has no target data.*made at the next step with target data"


@pytest.fixture
def silent() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no target data")
        yield


def host_step(learner: CollaborativeLearner, optimizer: Any, step: int, target: bool = True) -> None:
    """One iteration of a host that has target data at some steps only."""
    if target:
        train_step(learner, optimizer, step)
        return
    optimizer.zero_grad()
    host_loss(learner.student, step).backward()
    learner.step(optimizer)


def due_every_two(**options: Any) -> Any:
    teacher, student = networks()
    schedule = Schedule(warmup=2, interval=2, observe_every=1)
    return make_learner(teacher, student, **{"schedule": schedule, **options}), sgd(student)


EMPTY: Dict[str, Callable[[Any, Tensor], Any]] = {
    "an empty batch": lambda learner, x: learner.distill(learner.student(x)[:0], x[:0]),
    "a mask of False": lambda learner, x: learner.distill(
        learner.student(x), x, mask=torch.zeros(len(x), dtype=torch.bool)
    ),
    "weights of 0": lambda learner, x: learner.distill(learner.student(x), x, mask=torch.zeros(len(x))),
    "ignored labels": lambda learner, x: learner.distill(learner.student(x), x, mask=torch.full((len(x),), 255)),
    "negative labels": lambda learner, x: learner.distill(learner.student(x), x, mask=torch.full((len(x),), -100)),
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("scheduled", ["never", "not due", "due"])
def test_nothing_to_distil_is_a_zero_loss_with_a_zero_gradient(case: str, scheduled: str, silent: Any) -> None:
    schedules = {"never": Never(), "not due": Schedule(), "due": Schedule(warmup=0, interval=1)}
    teacher, student = networks()
    learner = make_learner(teacher, student, schedule=schedules[scheduled], ignore_index=255)
    before = values(teacher)
    loss = EMPTY[case](learner, batch())
    loss.backward()
    assert loss.item() == 0
    assert learner.metrics()["clda/kd_loss"] == 0
    assert all(
        not bool((parameter.grad != 0).any()) for parameter in student.parameters() if parameter.grad is not None
    )
    assert student.head.weight.grad is not None, "the loss has a graph"
    learner.step(sgd(student))
    assert (learner.report().steps, learner.report().rounds, values(teacher)) == (1, (), before)


def test_nothing_to_distil_does_not_run_the_teacher_and_passes_no_nan_on() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, schedule=Never())

    def never(*_: Any) -> None:
        raise AssertionError("the teacher was run")

    handle = teacher.register_forward_pre_hook(never)
    output = student(batch())
    broken = output * torch.full_like(output, float("nan"))
    loss = learner.distill(Outputs(broken, (broken,)), batch(), mask=torch.zeros(8, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, broken)
    assert loss.item() == 0
    assert not bool((gradient != 0).any())
    handle.remove()


LOSSES = {name: (role, make) for name, role, make in cases("distillation", "feature function")}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_nothing_is_zero_without_looking_at_the_mask(name: str) -> None:
    """As on a device, where a mask that leaves nothing is not looked at outside of rounds."""
    role, make = LOSSES[name]
    drawn = [torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    student, teacher = Outputs(drawn[0].requires_grad_(), (drawn[0],)), Outputs(drawn[1], (drawn[1],))
    loss, mask = make(), torch.zeros(4, 4, 4, dtype=torch.bool)
    reads = "features" if role == "feature function" else getattr(loss, "reads", "logits")
    pair = [of if reads == "outputs" else getattr(of, reads) for of in (student, teacher)]
    value = loss(*pair, mask)
    assert value.item() == 0
    (gradient,) = torch.autograd.grad(value, student.logits, allow_unused=True)
    assert gradient is None or not bool((gradient != 0).any())


def test_a_round_without_target_data_is_made_at_the_next_step_with_some_and_observed_there() -> None:
    learner, optimizer = due_every_two()
    observing: List[bool] = []

    def run() -> None:
        for step in range(8):
            observing.append(learner.observing)
            host_step(learner, optimizer, step, target=step % 2 == 0)  # rounds are due at the others

    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        run()
    assert [record.step for record in learner.report().rounds] == [5, 7]
    assert observing == [False, False, False, True, True, True, True, True]
    assert learner.report().steps == 8
    assert len(caught) == 1, "it is said once"


def test_the_round_that_is_owed_is_the_one_of_a_loop_that_had_its_data_then(silent: Any) -> None:
    """The teacher is the same whether the due step came with data, or one step of source data before them."""
    late, its_optimizer = due_every_two()
    usual, optimizer = due_every_two(schedule=Schedule(warmup=3, interval=2, observe_every=1))
    for learner, its in ((late, its_optimizer), (usual, optimizer)):
        torch.manual_seed(0)
        for step in range(5):
            host_step(learner, its, step, target=step != 3)
    assert [record.step for record in late.report().rounds] == [record.step for record in usual.report().rounds] == [5]
    assert values(late.teacher) == values(usual.teacher)


def test_no_rounds_are_lost_or_doubled_by_a_loop_that_alternates(silent: Any) -> None:
    learner, optimizer = due_every_two(schedule=Schedule(warmup=4, interval=4), update=MaskedDistillation())
    for step in range(24):
        host_step(learner, optimizer, step, target=step % 2 == 0)
    assert [record.step for record in learner.report().rounds] == [9, 13, 17, 21]
    assert all(record.updated for record in learner.report().rounds), "also those between two observations"


def test_a_round_that_is_owed_survives_a_checkpoint(silent: Any) -> None:
    whole, optimizer = due_every_two()
    for step in range(4):
        host_step(whole, optimizer, step, target=step != 3)
    states = loaded(saved([part.state_dict() for part in (whole.teacher, whole.student, optimizer, whole)]))
    assert states[3]["owed"] == 4
    resumed, its_optimizer = due_every_two()
    for part, state in zip((resumed.teacher, resumed.student, its_optimizer, resumed), states):
        part.load_state_dict(state)
    assert resumed.observing
    for learner, its in ((whole, optimizer), (resumed, its_optimizer)):
        torch.manual_seed(0)
        host_step(learner, its, 4)
    assert [record.step for record in resumed.report().rounds] == [5]
    assert bits(resumed.state_dict()) == bits(whole.state_dict())
    assert values(resumed.teacher) == values(whole.teacher)


def test_a_resumed_training_waits_for_inputs_as_before(silent: Any) -> None:
    def observed(learner: CollaborativeLearner) -> List[int]:
        learner.observe(lambda teacher: teacher(batch()).pow(2).mean())
        learner.after_step()
        return [record.step for record in learner.report().rounds]

    learner = make_learner(*networks(), update=MaskedDistillation())
    learner.distill(learner.student(batch()), batch())
    learner.step(step_fn=lambda: None)
    resumed = make_learner(*networks(), update=MaskedDistillation())
    resumed.teacher.load_state_dict(learner.teacher.state_dict())
    resumed.load_state_dict(learner.state_dict())
    assert observed(learner) == observed(resumed) == [1]
    assert bits(resumed.state_dict()) == bits(learner.state_dict())


def test_a_step_observed_while_off_is_no_step_of_the_learner(silent: Any) -> None:
    learner, optimizer = due_every_two(enabled=False)
    learner.observe()
    learner.after_step()
    learner.enabled = True
    with pytest.raises(CldaError, match="without observe"):
        learner.after_step()
    assert learner.report().steps == 0


def test_a_skipped_step_owes_nothing(silent: Any) -> None:
    learner, optimizer = due_every_two()
    for step in range(3):
        host_step(learner, optimizer, step)
    learner.observe()
    learner.after_step(stepped=False)
    assert learner.state_dict()["owed"] is None
    host_step(learner, optimizer, 3)
    assert [record.step for record in learner.report().rounds] == [4]


def test_micro_batches_without_data_do_not_erase_those_with_some() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student)
    nothing = torch.zeros(8, dtype=torch.bool)
    for mask in (nothing, None, nothing):
        learner.distill(student(batch()), batch(), mask=mask).backward()
    learner.step(sgd(student))
    assert len(learner.report().rounds) == 1


def test_source_gradients_of_a_co_trained_teacher_are_not_taken_for_target_ones(silent: Any) -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, update=Average(decay=0.9))
    F.cross_entropy(teacher(batch()), labels()).backward()
    learner.step(sgd(student))
    assert not learner.report().rounds
    assert learner.state_dict()["observer"]["averages"]["counts"] == {}


def test_a_loss_that_is_observed_is_data_of_its_own_but_no_batch_for_the_update(silent: Any) -> None:
    def observed(learner: CollaborativeLearner) -> List[int]:
        learner.observe(lambda teacher: teacher(batch()).pow(2).mean())
        learner.after_step()
        return [record.step for record in learner.report().rounds]

    assert observed(make_learner(*networks(), update=Average(decay=0.9))) == [1]
    learner = make_learner(*networks(), update=MaskedDistillation())
    learner.distill(learner.student(batch()), batch())
    learner.step(step_fn=lambda: None)
    assert observed(learner) == [1], "the batch comes with distill()"
    learner.distill(learner.student(batch()), batch())
    learner.step(step_fn=lambda: None)
    assert [record.step for record in learner.report().rounds] == [1, 3]


def test_source_data_are_observed_at_a_step_without_target_data(silent: Any) -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student)
    learner.observe(lambda net: net(batch()).pow(2).mean(), domain="source")
    learner.step(step_fn=lambda: None)
    assert set(learner.state_dict()["observer"]["averages"]["counts"]) == {"source"}


def test_data_that_come_after_observe_owe_the_round(silent: Any) -> None:
    """As an optimizer that calls a closure, with nothing distilled before it."""
    teacher, student = networks()
    learner = make_learner(teacher, student)
    learner.step(step_fn=lambda: learner.distill(student(batch()), batch()))
    assert not learner.report().rounds
    assert learner.state_dict()["owed"] == 1


def test_nothing_is_said_where_no_round_waits() -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, schedule=Never())
    for _ in range(2):
        learner.step(sgd(student))
    learner = make_learner(teacher, student, schedule=Schedule(warmup=5))
    learner.distill(student(batch()), batch(), mask=torch.zeros(8))
    learner.step(sgd(student))
    assert learner.report().steps == 1


def test_an_empty_batch_leaves_no_traces(silent: Any) -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student, selection=AllLayers(), saliency=Magnitude())
    output = student(batch())[:0]
    with no_traces(teacher, student, values_too=True):
        learner.distill(output, batch(count=0))
        learner.step(step_fn=lambda: None)


def test_projectors_wait_for_data_too(silent: Any) -> None:
    teacher, student = seeded(lambda: Segmenter(8), 0), seeded(Segmenter, 1)
    loss = WeightedSum([(1.0, KLDistillation()), (1.0, FeatureDistillation())])

    def extract(output: Tensor) -> Outputs:
        return Outputs(output, (output,))

    learner = make_learner(teacher, student, distillation=loss, extract=extract)
    learner.distill(student(images()), images(), mask=torch.zeros(2)).backward()
    learner.step(sgd(student))
    assert not list(loss.parameters())
    learner.distill(student(images()), images()).backward()
    learner.step(sgd(student))
    assert len(learner.report().rounds) == 1


def test_models_without_data_keep_the_learner_usable_after_an_error(silent: Any) -> None:
    teacher, student = networks()
    learner = make_learner(teacher, student)

    class Broken(nn.Module):
        def step(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        learner.step(Broken())
    assert learner.state_dict()["owed"] is None
    train_step(learner, sgd(student), 0)
    assert len(learner.report().rounds) == 1


def test_a_loss_that_is_read_on_validation_data_is_no_data_of_the_step(silent: Any) -> None:
    """Under ``no_grad`` the loss is only read: the step has no target data by it, nor another batch than its own."""
    trained = {}
    for how in ("alone", "read before", "read after"):
        torch.manual_seed(0)  # of the student's dropout
        learner, optimizer = due_every_two(update=MaskedDistillation(learning_rate=1e-2), selection=AllLayers())
        for step in range(6):
            optimizer.zero_grad()
            with torch.no_grad():
                if how == "read before":
                    learner.distill(learner.student.eval()(batch(90)), batch(90))
            learner.student.train()
            if step % 2:
                learner.distill(learner.student(batch(step)), batch(step)).backward()
            else:
                host_loss(learner.student, step).backward()
            with torch.no_grad():
                if how == "read after":
                    learner.distill(learner.student.eval()(batch(91)), batch(91))
            learner.student.train()
            learner.step(optimizer)
        trained[how] = bits(learner.report().to_dict()["rounds"]), values(learner.teacher), values(learner.student)
    assert len(learner.report().rounds) == 2
    assert trained["read before"] == trained["alone"]
    assert trained["read after"] == trained["alone"]


# ------------------------------------------------------------------------------------------------ steps of others


OTHERS = "learner.step.. got an optimizer without any parameter of the student, Adam of 2 others"


@pytest.mark.parametrize("alone", [True, False])
def test_an_optimizer_without_the_students_parameters_is_warned_of(alone: bool) -> None:
    """As the discriminator's of an adversarial host: at a step that is observed, alone or after the student's."""
    teacher, student = networks()
    observed = Schedule(interval=1, observe_every=1)
    learner, optimizer = make_learner(teacher, student, schedule=observed), sgd(student)
    discriminator = torch.optim.Adam(nn.Linear(4, 1).parameters(), lr=0.1)
    learner.distill(student(batch()), batch()).backward()
    if not alone:
        learner.step(optimizer)
        learner.distill(student(batch()), batch())
    with pytest.warns(UserWarning, match=OTHERS):
        learner.step(discriminator)


def test_no_other_optimizer_is_warned_of() -> None:
    """Of a part of the student, of both networks, of copies as DeepSpeed and apex make them, or of none at all."""
    teacher, student = networks()
    own = list(student.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in own]).requires_grad_()

    class Wrapped:
        def step(self) -> None:
            pass

    class WithoutParameters(Wrapped):
        def __init__(self) -> None:
            self.param_groups = [{"lr": 0.1}]

    held: List[Any] = [own[:1], [*own, *teacher.parameters()], [flat]]
    learner = make_learner(teacher, student, schedule=Schedule(interval=1, observe_every=1))
    for optimizer in [*(torch.optim.SGD(parameters, lr=0.1) for parameters in held), Wrapped(), WithoutParameters()]:
        learner.distill(student(batch()), batch()).backward()
        learner.step(optimizer)


AGAIN = r"all \d+ parameters that learner.step.. stepped were written again.*optimizer.step.. after it, remove it"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, "through a GradScaler"])
def test_a_second_step_after_the_learners_is_warned_of(kind: Any) -> None:
    teacher, student = networks()
    own = [parameter for parameter in student.parameters() if parameter.requires_grad]
    scaled = kind == "through a GradScaler"
    optimizer = (torch.optim.SGD if scaled else kind)(own, lr=0.01)
    learner = make_learner(teacher, student)
    learner.distill(student(batch()), batch()).backward()
    learner.step(optimizer, scaler=Passing() if scaled else None)
    optimizer.step()
    logits = student(batch(1))
    with pytest.warns(UserWarning, match=AGAIN):
        learner.distill(logits, batch(1))
    learner.distill(logits, batch(1)).backward()


class Passing:
    """A GradScaler that scales by 1."""

    def step(self, optimizer: Any) -> None:
        optimizer.step()

    def get_scale(self) -> float:
        return 1.0

    def unscale_(self, optimizer: Any) -> None:
        pass


@pytest.mark.parametrize("written", ["nothing", "the head by another optimizer", "statistics", "a checkpoint of both"])
def test_no_other_write_is_taken_for_a_second_step(written: str) -> None:
    teacher, student = networks()
    learner, optimizer = make_learner(teacher, student), sgd(student)
    head = torch.optim.SGD(student.head.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        learner.distill(student(batch(step)), batch(step)).backward()
        learner.step(optimizer)
        if written == "the head by another optimizer":
            head.step()
        elif written == "statistics":
            student.train()(batch(90))
        elif written == "a checkpoint of both":
            student.load_state_dict(copy.deepcopy(student.state_dict()))
            learner.load_state_dict(learner.state_dict())
    learner.distill(student(batch()), batch())


def test_a_copy_of_a_learner_is_not_warned_of_a_second_step() -> None:
    teacher, student = nn.Linear(5, 3), nn.Linear(5, 3)
    learner = CollaborativeLearner(teacher, student)
    learner.distill(student(batch()), batch()).backward()
    learner.step(torch.optim.SGD(student.parameters(), lr=0.1))
    other = copy.deepcopy(learner)
    other.distill(other.student(batch()), batch())


def test_many_calls_of_distill_without_a_step_are_warned_of_once() -> None:
    learner, optimizer = due_every_two()
    logits = learner.student(batch())
    for _ in range(99):
        learner.distill(logits, batch())
    with torch.no_grad():
        learner.distill(logits, batch())
    with pytest.warns(UserWarning, match="distill.. was called 100 times without a step of the learner"):
        learner.distill(logits, batch())
    learner.distill(logits, batch())
    learner.step(optimizer)
    for _ in range(99):
        learner.distill(logits, batch())
