"""Interrupted and resumed is the same as uninterrupted, bit for bit, also from one device to the other."""

import io
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest
import torch

from clda_core import CollaborativeLearner, Schedule, checkpoint
from clda_core.distillation import FeatureDistillation
from clda_core.lead import LinearTrust
from clda_core.saliency import Hessian, QuantileThreshold, ReferenceThreshold
from clda_core.selection import AllLayers
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation
from tests.cuda.hosts import PAIRS, both, images, iteration, supervised
from tests.helpers import bits, values

OPTIONS: Dict[str, Callable[[], Dict[str, Any]]] = {
    "default": dict,
    "features": lambda: {"distillation": FeatureDistillation()},
    "source": lambda: {"threshold": ReferenceThreshold(of=QuantileThreshold()), "update": Average(decay=0.9)},
    "aligned": lambda: {"update": Guard(AlignedAverage(decay=0.9)), "saliency": Hessian()},
    "view": lambda: {"update": MaskedDistillation(learns_on="view", own_targets=True, steps=2)},
}


def build(device: torch.device, name: str, options: str) -> Tuple[CollaborativeLearner, Any]:
    teacher, student = PAIRS[name](device, 0.0, alike=options == "source")
    schedule = Schedule(interval=2, observations=2, observe_every=1)
    chosen = {"selection": AllLayers(), "trust": LinearTrust(zero=-9.0), "schedule": schedule, **OPTIONS[options]()}
    learner = CollaborativeLearner(teacher, student, extract=both, **chosen)
    return learner, torch.optim.AdamW(student.parameters(), lr=1e-3)


def train(learner: CollaborativeLearner, optimizer: Any, steps: Any, device: torch.device, options: str) -> None:
    for step in steps:
        x = images(device, step)
        if options == "source" and learner.observing:
            learner.observe(lambda network, at=x: supervised(network, at), domain="source")
        iteration(learner, optimizer, step, device, view=x + 0.1)


def everything(learner: CollaborativeLearner, optimizer: Any) -> Any:
    state = bits(learner.state_dict()), bits(optimizer.state_dict())
    return values(learner.teacher), values(learner.student), state, learner.report().to_dict()


def through_a_file(learner: CollaborativeLearner, optimizer: Any) -> io.BytesIO:
    file = io.BytesIO()
    whole = {
        "teacher": learner.teacher.state_dict(),
        "student": learner.student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "clda": learner.state_dict(),
    }
    torch.save(whole, file)
    file.seek(0)
    return file


def restore(learner: CollaborativeLearner, optimizer: Any, file: io.BytesIO, where: Any) -> None:
    found = torch.load(file, map_location=where, weights_only=True)
    learner.student.load_state_dict(found["student"])
    learner.teacher.load_state_dict(found["teacher"])
    optimizer.load_state_dict(found["optimizer"])
    learner.load_state_dict(found["clda"])


@pytest.mark.parametrize(("name", "options"), [("segmenters", one) for one in OPTIONS] + [("encoders", "default")])
@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("mapped", [False, True])
def test_resumed_is_uninterrupted(
    device: torch.device, deterministic: None, name: str, options: str, at: int, mapped: bool
) -> None:
    """Also where the file was loaded to the CPU."""
    whole = build(device, name, options)
    train(*whole, range(6), device, options)
    first = build(device, name, options)
    train(*first, range(at), device, options)
    second = build(device, name, options)
    restore(*second, through_a_file(*first), "cpu" if mapped else None)
    train(*second, range(at, 6), device, options)
    assert whole[0].report().made == 3
    assert everything(*second) == everything(*whole)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("to_cpu", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_state_goes_on_on_another_device(device: torch.device, options: str, to_cpu: bool, mapped: bool) -> None:
    here, there = (device, torch.device("cpu"))[:: 1 if to_cpu else -1]
    first = build(here, "segmenters", options)
    train(*first, range(4), here, options)
    second = build(there, "segmenters", options)
    restore(*second, through_a_file(*first), there if mapped else None)
    train(*second, range(4, 6), there, options)
    train(*first, range(4, 6), here, options)
    mine, its = second[0].report(), first[0].report()
    assert mine.made == its.made == 3
    assert [record.updated for record in mine.rounds[:2]] == [record.updated for record in its.rounds[:2]]
    assert mine.rounds[-1].selected == its.rounds[-1].selected
    assert {value.device.type for value in second[0].teacher.parameters()} == {there.type}
    # A GPU convolves in TF32, by which two channels that are nearly alike may be matched the other way round.
    apart = 0.1 if options == "aligned" else 5e-3
    for (key, value), other in zip(second[0].teacher.named_parameters(), first[0].teacher.parameters()):
        assert torch.allclose(value.cpu(), other.cpu(), atol=apart), key


def test_a_state_of_other_kernels_goes_on(device: torch.device, deterministic: None) -> None:
    """As one that an older torch wrote, whose step counts are on the CPU; the optimizer here is fused."""
    whole = build(device, "segmenters", "default")
    train(*whole, range(4), device, "default")
    first = build(device, "segmenters", "default")
    train(*first, range(2), device, "default")
    state = first[0].state_dict()
    optimizer = state["update"]["optimizer"]
    assert optimizer["param_groups"][0]["fused"]
    for group in optimizer["param_groups"]:
        group.update(fused=None, foreach=True)
    for moments in optimizer["state"].values():
        moments["step"] = moments["step"].cpu()
    first[0].load_state_dict(state)
    second = build(device, "segmenters", "default")
    for mine, its in zip(
        (second[0].teacher, second[0].student, second[1]), (first[0].teacher, first[0].student, first[1])
    ):
        mine.load_state_dict(its.state_dict())
    second[0].load_state_dict(state)
    train(*second, range(2, 4), device, "default")
    assert values(second[0].teacher) == values(whole[0].teacher)


@pytest.mark.parametrize("options", OPTIONS)
def test_checkpoint_files(device: torch.device, deterministic: None, options: str, tmp_path: Path) -> None:
    """They are loaded to the CPU before they reach the models."""
    whole = build(device, "segmenters", options)
    train(*whole, range(6), device, options)
    first = build(device, "segmenters", options)
    train(*first, range(3), device, options)
    checkpoint.save(tmp_path / "file.pt", first[0], optimizer=first[1])
    second = build(device, "segmenters", options)
    checkpoint.load(tmp_path / "file.pt", second[0], optimizer=second[1])
    train(*second, range(3, 6), device, options)
    assert everything(*second) == everything(*whole)
