"""Accelerate needs nothing of ours: what its optimizer skips or accumulates, the learner notices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from clda_core import CldaError, CollaborativeLearner
from clda_core.checkpoint import LearnerAndTeacher
from clda_core.saliency import ReferenceThreshold
from clda_core.selection import AllLayers
from clda_core.update import Average
from tests.helpers import batch, bits, every_step, host_loss, labels, make_learner, make_sam, networks, sgd, values

accelerate = pytest.importorskip("accelerate", reason="a recipe for Accelerate needs Accelerate")


@pytest.fixture(autouse=True)
def anew() -> Any:
    """Let every test have an Accelerator of its own, which else shares its settings with those before it."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def training(**options: Any) -> Any:
    teacher, student = networks()
    accelerator = accelerate.Accelerator(cpu=True, **options)
    prepared, optimizer = accelerator.prepare(student, sgd(student))
    assert prepared is student, "in a single process nothing is wrapped"
    learner = CollaborativeLearner(
        teacher, student, schedule=every_step(interval=2), update=Average(decay=0.9), selection=AllLayers()
    )
    return accelerator, optimizer, learner


@pytest.mark.parametrize("accumulate", [1, 2])
def test_optimizer_steps_are_counted_not_micro_batches(accumulate: int) -> None:
    accelerator, optimizer, learner = training(gradient_accumulation_steps=accumulate)
    for step in range(8):
        with accelerator.accumulate(learner.student):
            loss = host_loss(learner.student, step) + learner.distill(learner.student(batch(step)), batch(step))
            accelerator.backward(loss)
            learner.step(optimizer)
            optimizer.zero_grad()
    assert learner.report().steps == 8 // accumulate
    assert [record.step for record in learner.report().rounds] == list(range(2, 8 // accumulate + 1, 2))


def test_rounds_know_the_learning_rate() -> None:
    accelerator, _, learner = training()
    optimizer = accelerator.prepare(torch.optim.Adam(learner.student.parameters()))
    for step, rate in enumerate((0.4, 0.1, 0.3, 0.05)):  # rounds are made after the second and the fourth
        optimizer.param_groups[0]["lr"] = rate
        accelerator.backward(learner.distill(learner.student(batch(step)), batch(step)))
        learner.step(optimizer)
        optimizer.zero_grad()
    assert learner.state_dict()["peak"] == 0.1


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="GradScaler works on the CPU from torch 2.3 on")
@pytest.mark.parametrize("fused", [False, True])  # of which Accelerate itself does not notice that it skipped
def test_a_step_that_the_scaler_skips_is_none(fused: bool) -> None:
    _, _, learner = training()
    adam = torch.optim.Adam(learner.student.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(adam, scaler=scaler)
    made = []
    for step in range(4):
        optimizer.zero_grad()
        loss = learner.distill(learner.student(batch(step)), batch(step))
        scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
        before = values(learner.student)["head.weight"]
        learner.step(optimizer)
        made.append(values(learner.student)["head.weight"] != before)
    assert made == [True, False, True, True]
    assert learner.report().steps == 3
    assert not adam._optimizer_step_post_hooks


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="GradScaler works on the CPU from torch 2.3 on")
@pytest.mark.parametrize("clipped", [False, True])  # for which the host unscales before
def test_gradients_of_a_co_trained_teacher_are_unscaled(clipped: bool) -> None:
    rates = []
    for scale in (1.0, 1024.0):
        accelerate.Accelerator(cpu=True)
        learner = make_learner(*networks(), threshold=ReferenceThreshold())
        both = [*learner.student.parameters(), *learner.teacher.parameters()]
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = accelerate.optimizer.AcceleratedOptimizer(torch.optim.SGD(both, lr=0.1), scaler=scaler)
        loss = learner.distill(learner.student(batch()), batch())
        scaler.scale(loss + F.cross_entropy(learner.teacher(batch()), labels())).backward()
        if clipped:
            scaler.unscale_(optimizer.optimizer)
        learner.observe(lambda teacher: F.cross_entropy(teacher(batch(1)), labels()), domain="source")
        learner.step(optimizer)
        rates.append(learner.report().rounds[-1].rates)
    assert rates[0] == rates[1]


def test_a_sam_optimizer_that_accelerate_wraps_is_refused_and_counted_in_two_halves() -> None:
    _, _, learner = training()
    sam = make_sam()(learner.student.parameters(), torch.optim.SGD, lr=0.05)
    optimizer = accelerate.Accelerator(cpu=True).prepare(sam)
    learner.distill(learner.student(batch()), batch()).backward()
    with pytest.raises(CldaError, match="SAM makes two steps in one.*Fix: call learner.step\\(step_fn="):
        learner.step(optimizer)
    for step in range(4):
        learner.distill(learner.student(batch(step)), batch(step)).backward()
        sam.first_step(zero_grad=True)
        learner.distill(learner.student(batch(step)), batch(step)).backward()
        learner.step(step_fn=lambda: sam.second_step(zero_grad=True))
    assert [record.step for record in learner.report().rounds] == [2, 4]


def test_batches_of_source_or_target_only_are_counted_and_make_rounds() -> None:
    accelerator, optimizer, learner = training()
    for step in range(8):
        optimizer.zero_grad()
        loss = host_loss(learner.student, step)
        if step % 2 == 0:  # where no round is due
            loss = learner.distill(learner.student(batch(step)), batch(step))
        accelerator.backward(loss)
        if step == 1:
            with pytest.warns(UserWarning, match="step 2 has no target data"):
                learner.step(optimizer)
        else:
            learner.step(optimizer)
    assert learner.report().steps == 8
    assert [record.step for record in learner.report().rounds] == [3, 5, 7]


def test_learner_and_teacher_go_with_the_engines_state_both_or_neither(tmp_path: Path) -> None:
    accelerator, optimizer, learner = training()
    accelerator.register_for_checkpointing(LearnerAndTeacher(learner))

    def train(steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            accelerator.backward(learner.distill(learner.student(batch(step)), batch(step)))
            learner.step(optimizer)

    train(3)
    accelerator.save_state(str(tmp_path))
    before = bits(learner.state_dict()), values(learner.teacher), values(learner.student)
    train(2)
    accelerator.load_state(str(tmp_path))
    assert (bits(learner.state_dict()), values(learner.teacher), values(learner.student)) == before
    (file,) = tmp_path.glob("custom_checkpoint_*")
    torch.save({**torch.load(str(file)), "teacher": networks()[1].state_dict()}, str(file))
    train(2)
    before = bits(learner.state_dict()), values(learner.teacher)
    with pytest.raises(CldaError, match="the saved teacher is of another architecture"):
        accelerator.load_state(str(tmp_path))
    assert (bits(learner.state_dict()), values(learner.teacher)) == before
