"""What is the same after every call: generators, modes, buffers, gradients; and what mistakes of a user leave."""

from typing import Any, Callable, Dict

import pytest
import torch
from torch import Tensor, nn

from clda_core import CldaError, saliency_rates, validate
from clda_core.distillation import KLDistillation, WeightedSum
from clda_core.lead import LinearTrust
from clda_core.saliency import Hessian
from clda_core.selection import AllLayers
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation
from clda_core.validation import MutualInformation, SoftConsistency
from tests.cuda.hosts import (
    PAIRS,
    Segmenter,
    both,
    generators,
    images,
    iteration,
    learner_of,
    no_draw,
    segmenters,
    supervised,
)
from tests.helpers import no_traces, seeded, values


class Drawing(Segmenter):
    """Draws on the device in eval mode too, and counts its passes in a buffer."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth, 0.2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return super().forward(x + 0.01 * torch.randn_like(x))


UPDATES: Dict[str, Callable[[], Any]] = {
    "default": MaskedDistillation,
    "view": lambda: MaskedDistillation(learns_on="view", own_targets=True),
    "average": lambda: Average(decay=0.9),
    "aligned": lambda: AlignedAverage(decay=0.9),
    "guard": lambda: Guard(MaskedDistillation()),
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("training", [False, True])
def test_models_that_draw_leave_the_generators_alone(device: torch.device, update: str, training: bool) -> None:
    teacher = seeded(lambda: Drawing(16, 3), 0).to(device).train(training)
    student = seeded(lambda: Drawing(16 if update == "average" else 8, 2), 1).to(device)
    teacher.stem[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    options = {"saliency": Hessian()} if update == "view" else {}
    learner = learner_of(
        (teacher, student), selection=AllLayers(), update=UPDATES[update](), trust=LinearTrust(zero=-9.0), **options
    )
    for step in range(3):
        x = images(device, step)
        torch.manual_seed(step)
        output = student(x)
        with no_draw(device), no_traces(teacher, student, values_too=True):
            loss = learner.distill(output, x, view=x + 0.1)
        optimizer.zero_grad()
        loss.backward()
        with no_draw(device), no_traces(teacher, student, values_too=True):
            learner.observe()
        optimizer.step()
        with no_draw(device), no_traces(student, values_too=True), no_traces(teacher):
            learner.after_step(optimizer=optimizer)
        with no_draw(device), no_traces(teacher, student, values_too=True):
            saliency_rates(teacher, [x], extract=both)
            validate(student, [x], MutualInformation(), extract=both)
            validate(student, [x], SoftConsistency(), view=lambda batch: batch + 0.1, extract=both)
    assert learner.report().made == 3
    assert any(record.updated for record in learner.report().rounds) or update == "guard"
    assert float(teacher.calls) == 0  # every pass was the learner's
    assert float(student.calls) == 3


@pytest.mark.parametrize("name", PAIRS)
def test_the_hosts_draws_go_on_as_without_us(device: torch.device, deterministic: None, name: str) -> None:
    def run(with_us: bool) -> Any:
        teacher, student = PAIRS[name](device, 0.2)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        learner = learner_of((teacher, student), distillation=WeightedSum([(0.0, KLDistillation())]))
        torch.manual_seed(3)
        for step in range(3):
            x = images(device, step)
            optimizer.zero_grad()
            output = student(x + 0.1 * torch.randn_like(x))
            loss = supervised(student, images(device, 50 + step)) + output[0].sum() * 0
            if with_us:
                loss = loss + learner.distill(output, x)
            loss.backward()
            learner.step(optimizer) if with_us else optimizer.step()
        assert learner.report().made == 3 * with_us
        return values(student), generators(device)

    assert run(True) == run(False)


# ------------------------------------------------------------------------------------------- mistakes of the user


def mistaken(device: torch.device, **wrong: Any) -> None:
    """Distil and step with something on the CPU, or wherever it is not expected."""
    teacher, student = segmenters(device)
    learner = learner_of((teacher, student), trust=LinearTrust())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    x = images(device)
    given = {"inputs": x, **wrong}
    output = student(x)
    with no_draw(device), no_traces(teacher, student, values_too=True):
        loss = learner.distill(output, given.pop("inputs"), **given)
    loss.backward()
    before = values(teacher)
    try:
        learner.step(optimizer)
    finally:
        assert values(teacher) == before


ELSEWHERE = {"cuda": "cpu", "cpu": "meta"}


@pytest.mark.parametrize("what", ["mask", "teacher_output"])
def test_tensors_on_another_device_are_named(device: torch.device, what: str) -> None:
    other = ELSEWHERE[device.type]
    grid, wrong = (8, 8), {}
    if what == "mask":
        wrong["mask"] = torch.ones(4, *grid, dtype=torch.bool, device=other)
    else:
        wrong["teacher_output"] = both((torch.zeros(4, 5, *grid, device=other), torch.zeros(4, 16, *grid)))
    with pytest.raises(CldaError, match="device") as error:
        mistaken(device, **wrong)
    assert all(text in str(error.value) for text in (device.type, other, "move both to one device"))


@pytest.mark.parametrize("what", ["inputs", "view"])
def test_inputs_on_another_device_are_named(device: torch.device, what: str) -> None:
    with pytest.raises(CldaError, match=f"(?s){ELSEWHERE[device.type]}.*Fix"):
        mistaken(device, **{what: images(torch.device("cpu")).to(ELSEWHERE[device.type])})


def test_models_on_two_devices_are_named(device: torch.device) -> None:
    other = torch.device(ELSEWHERE[device.type])
    if other.type == "meta":
        pytest.skip("needs a CUDA GPU")
    teacher, _ = segmenters(other)
    _, student = segmenters(device)
    learner = learner_of((teacher, student))
    x = images(device)
    with no_traces(teacher, student), pytest.raises(CldaError, match="device"):
        learner.distill(student(x), images(other))


def test_a_loss_on_another_device_is_refused_without_harm(device: torch.device) -> None:
    """A host whose labels were left on the CPU: its own error, and the learner as before."""
    if device.type == "cpu":
        pytest.skip("needs a CUDA GPU")
    teacher, student = segmenters(device)
    learner = learner_of((teacher, student), update=MaskedDistillation(source_weight=1.0))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    x = images(device)
    before = values(teacher)

    def source_loss(network: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(network(x)[0], torch.zeros(4, 8, 8, dtype=torch.int64))

    learner.distill(student(x), x, source_loss=source_loss).backward()
    with pytest.raises(Exception, match="device"):
        learner.step(optimizer)
    assert values(teacher) == before
    iteration(learner, optimizer, 1, device)
    assert learner.report().made
