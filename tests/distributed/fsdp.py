"""What the ranks of `test_fsdp.py` do."""

import io
from typing import Any, Dict

import pytest
import torch

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # the collection of doctests imports this module too
    pytest.skip("torch.distributed.fsdp.fully_shard came with torch 2.6", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn import functional as F

from clda_core import CldaError, CollaborativeLearner, Schedule
from clda_core.lead import FixedTrust
from clda_core.saliency import Fisher, Hessian, Magnitude
from clda_core.selection import AllLayers
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation, agreement
from tests.distributed.host import BATCH, INPUTS, Scenario, collaborate, drawn, gathered, labels, networks
from tests.helpers import bits


def masked_distillation(**options: Any) -> Dict[str, Any]:
    return {"update": MaskedDistillation(learning_rate=1e-2, steps=2, **options)}


SCENARIOS: Dict[str, Scenario] = {
    "average": Scenario(lambda: {"update": Average(decay=0.9)}),
    "average, Fisher": Scenario(lambda: {"update": Average(decay=0.9), "saliency": Fisher()}),
    "average, magnitude": Scenario(
        lambda: {"update": Average(decay=0.9), "saliency": Magnitude(), "selection": AllLayers()}
    ),
    "aligned average": Scenario(lambda: {"update": AlignedAverage(decay=0.9)}),
    "masked distillation": Scenario(masked_distillation),
    "own targets": Scenario(lambda: {**masked_distillation(own_targets=True), "trust": FixedTrust(0.5)}, view=True),
    "guarded": Scenario(
        lambda: {"update": Guard(MaskedDistillation(learning_rate=0.1), criterion=agreement), "selection": AllLayers()}
    ),
    "guarded average": Scenario(lambda: {"update": Guard(Average(decay=0.5), criterion=agreement)}),
    "co-trained teacher": Scenario(masked_distillation, co_trained=True),
    "a rank without data": Scenario(masked_distillation, empty=[1], rate=0.0),
}


def shard(model: nn.Module, mesh: Any = None) -> nn.Module:
    """Shard every block by itself and the rest together, as one does."""
    options = {} if mesh is None else {"mesh": mesh}
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def train(rank: int, ranks: int, scenario: Scenario, whole: str = "", mesh: Any = None) -> Dict[str, Any]:
    teacher, student = networks(scenario)
    teacher.requires_grad_(scenario.co_trained)
    if whole != "teacher":
        shard(teacher, mesh)
    if whole != "student":
        shard(student, mesh)
    else:
        student = nn.parallel.DistributedDataParallel(student)
    return collaborate(teacher, student, scenario, rank, ranks)


def refused(rank: int, ranks: int) -> Dict[str, str]:
    """Return the errors of what sharded models cannot do."""
    scenario = Scenario()

    def learner(teacher: nn.Module, student: nn.Module, **options: Any) -> CollaborativeLearner:
        return CollaborativeLearner(teacher, student, schedule=Schedule(interval=1), trust=FixedTrust(), **options)

    def fsdp1() -> None:
        teacher, student = networks(scenario)
        learner(FullyShardedDataParallel(teacher, device_id=torch.device("cpu"), use_orig_params=True), student)

    def tensor_parallel() -> None:
        teacher, student = networks(scenario)
        mesh = init_device_mesh("cpu", (ranks,))
        teacher.head.weight = nn.Parameter(distribute_tensor(teacher.head.weight.detach(), mesh))
        learner(teacher, student)

    def second_order() -> None:
        teacher, student = networks(scenario)
        one = learner(shard(teacher), student, saliency=Hessian())
        target = drawn(rank, BATCH, INPUTS)
        one.distill(student(target), target).backward()
        one.observe()

    def loss() -> None:
        teacher, student = networks(scenario)
        one = learner(shard(teacher), student)
        one.observe(teacher(drawn(rank, BATCH, INPUTS)).sum())

    errors = {}
    for attempt in (fsdp1, tensor_parallel, second_order, loss):
        try:
            attempt()
            errors[attempt.__name__] = "no error"
        except CldaError as error:
            errors[attempt.__name__] = str(error)
    return errors


class Job:
    """A training that can be saved and resumed, sharded."""

    def __init__(self) -> None:
        teacher, student = networks(Scenario())
        self.teacher, self.student = shard(teacher.requires_grad_(False)), shard(student)
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=0.01)
        self.learner = CollaborativeLearner(
            self.teacher,
            self.student,
            schedule=Schedule(warmup=1, interval=2, observations=2),
            trust=FixedTrust(),
        )

    def train(self, steps: range, rank: int, ranks: int) -> None:
        for step in steps:
            source, target = (drawn(seed + step, BATCH, INPUTS).chunk(ranks)[rank] for seed in (0, 100))
            self.optimizer.zero_grad()
            logits = self.student(torch.cat([source, target]))
            loss = F.cross_entropy(logits[: len(source)], labels(step).chunk(ranks)[rank])
            (loss + self.learner.distill(logits[len(source) :], target)).backward()
            self.learner.step(self.optimizer)

    def state(self, rank: int) -> Dict[str, Any]:
        buffer = io.BytesIO()
        torch.save(self.learner.state_dict(), buffer)
        model, optimizer = get_state_dict(self.student, self.optimizer)
        return {
            "student": model,
            "optimizer": optimizer,
            "teacher": get_model_state_dict(self.teacher),
            "clda": {f"rank{rank}": buffer.getvalue()},
        }

    def load(self, folder: str, rank: int) -> None:
        state = self.state(rank)
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.student, self.optimizer, model_state_dict=state["student"], optim_state_dict=state["optimizer"]
        )
        set_model_state_dict(self.teacher, state["teacher"])
        self.learner.load_state_dict(torch.load(io.BytesIO(state["clda"][f"rank{rank}"]), weights_only=True))

    def outcome(self) -> Any:
        models = [gathered(self.teacher), gathered(self.student)]
        return bits([*models, self.learner.state_dict()])


def resumed(rank: int, ranks: int, folder: str) -> Dict[str, Any]:
    """Return what a training and one that was interrupted at step 3 of 6 came to."""
    whole = Job()
    whole.train(range(6), rank, ranks)
    first = Job()
    first.train(range(3), rank, ranks)
    dcp.save(first.state(rank), checkpoint_id=folder)
    second = Job()
    second.load(folder, rank)
    second.train(range(3, 6), rank, ranks)
    return {"uninterrupted": whole.outcome(), "resumed": second.outcome(), "halfway": first.outcome()}


def work(rank: int, ranks: int, folder: str) -> Dict[str, Any]:
    results: Dict[str, Any] = {name: train(rank, ranks, scenario) for name, scenario in SCENARIOS.items()}
    for name in ("average", "masked distillation"):
        for whole in ("student", "teacher"):
            results[f"{name}, {whole} whole"] = train(rank, ranks, SCENARIOS[name], whole)
    if ranks == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        results["masked distillation, two by two"] = train(rank, ranks, SCENARIOS["masked distillation"], mesh=mesh)
    return {**results, "refused": refused(rank, ranks), "resume": resumed(rank, ranks, folder)}
