"""What the integrations share, and what needs no engine."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from clda_core import CldaError
from clda_core.integrations._engine import Steps, check_trains, students_optimizer
from tests.helpers import batch, every_step, make_learner, networks, sgd


def test_the_optimizer_that_holds_most_of_the_student_counts() -> None:
    learner = make_learner(*networks())
    student = learner.student
    part, most = sgd(student.stem), sgd(student.blocks)
    other = sgd(nn.Linear(100, 100))
    assert students_optimizer([other, part, most], learner) is most
    twice = sgd(student), sgd(student)
    assert students_optimizer(twice, learner) is twice[0]


def test_an_optimizer_of_something_else_is_refused() -> None:
    learner = make_learner(*networks())
    other = sgd(nn.Linear(2, 2))
    match = "does not train the learner's student.*received 1 optimizers without any.*Fix: build the learner with the"
    with pytest.raises(CldaError, match=match):
        students_optimizer([other], learner)
    learner.enabled = False
    assert students_optimizer([other], learner) is None
    learner.enabled = True
    learner.student.requires_grad_(False)
    with pytest.raises(CldaError, match="received a student whose parameters are all frozen"):
        students_optimizer([other], learner)


def test_the_model_of_the_engine_must_hold_the_student() -> None:
    learner = make_learner(*networks())
    whole = nn.ModuleList([learner.student, nn.Linear(2, 2)])
    check_trains(whole, sgd(whole), learner)
    flat = torch.optim.SGD([torch.zeros(100, requires_grad=True)], lr=0.1)  # as DeepSpeed's, of copies
    check_trains(whole, flat, learner)
    for model, optimizer in ((whole, sgd(whole[1])), (nn.Linear(2, 2), flat), (nn.Linear(2, 2), None)):
        with pytest.raises(CldaError, match="does not train the learner's student"):
            check_trains(model, optimizer, learner)


def test_a_step_is_observed_once_and_ended_once() -> None:
    learner = make_learner(*networks())
    steps = Steps(learner, "")
    steps.begin()
    steps.end(made=True)  # before anything was observed
    for made in (True, False, True):
        learner.distill(learner.student(batch()), batch()).backward()
        steps.observe(None)
        steps.observe(None)
        steps.end(made)
        steps.end(made)
    assert learner.report().steps == 2
    learner.distill(learner.student(batch()), batch())
    steps.observe(None)
    steps.begin()  # drops what a training that raised has left
    steps.end(made=True)
    assert learner.report().steps == 2


def test_rounds_know_the_learning_rate_of_the_optimizer_that_steps() -> None:
    learner = make_learner(*networks(), schedule=every_step())
    optimizer, steps = torch.optim.Adam(learner.student.parameters()), Steps(learner, "")
    steps.begin()
    for rate, peak in ((0.1, 0.1), (0.2, 0.2), (0.05, 0.2)):
        optimizer.param_groups[0]["lr"] = rate
        learner.distill(learner.student(batch()), batch()).backward()
        steps.observe(optimizer)
        optimizer.step()
        steps.end(made=True)
        assert learner.state_dict()["peak"] == peak


def test_a_training_without_a_step_is_said_once() -> None:
    learner = make_learner(*networks())

    def run(batches: int, accumulated: int = 1, **happens: Any) -> int:
        steps = Steps(learner, "Do this.")
        steps.begin()
        if happens.get("stepped"):
            learner.distill(learner.student(batch()), batch())
            steps.observe(None)
            steps.end(made=False)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(batches):
                steps.after_batch(accumulated)
            if happens.get("epoch"):
                steps.warn()
        assert all("no optimizer step of the student was seen" in str(entry.message) for entry in said)
        assert all(str(entry.message).endswith("Do this.") for entry in said)
        return len(said)

    assert run(99) == 0
    assert run(300) == 1
    assert run(300, accumulated=4) == 0
    assert run(400, accumulated=4) == 1
    assert run(1, epoch=True) == 1
    assert run(200, epoch=True) == 1
    assert run(0, epoch=True) == 0
    assert run(300, epoch=True, stepped=True) == 0
    learner.enabled = False
    assert run(300, epoch=True) == 0
