"""What the ranks of `test_must_hold.py` do: they differ in more than their data."""

from typing import Any, Callable, Dict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core import Outputs
from clda_core.distillation import FeatureDistillation
from clda_core.relation import BySimilarity
from clda_core.saliency import Fisher, Hessian, Magnitude, ReferenceThreshold
from clda_core.selection import DomainShift, RandomFraction
from clda_core.update import Average, Guard, MaskedDistillation
from tests.helpers import Net, batch, bits, labels, make_learner, networks, sgd, values

STEPS = 2


def both(output: Any) -> Outputs:
    return Outputs(output[0], (output[1],))


class WithFeatures(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        features = self.net.features(x)
        return self.net.head(features[-1]), features[0]


SCENARIOS: Dict[str, Callable[[], Dict[str, Any]]] = {
    "guarded average, by similarity": lambda: {
        "update": Guard(Average(decay=0.5)),
        "saliency": Fisher(),
        "relation": BySimilarity(minimum=0.0),
    },
    "masked distillation, Hessian": lambda: {
        "update": MaskedDistillation(learning_rate=1e-2),
        "saliency": Hessian(),
    },
    "domain shift": lambda: {
        "threshold": ReferenceThreshold(),
        "selection": DomainShift(),
        "update": Average(decay=0.9),
    },
    "non-finite on one rank": lambda: {"update": MaskedDistillation(learning_rate=1e-2)},
    "a head used on one rank": lambda: {"update": MaskedDistillation(learning_rate=1e-2)},
    "students that differ": lambda: {
        "saliency": Magnitude(),
        "selection": RandomFraction(seed=2),
        "update": Guard(MaskedDistillation(learning_rate=1e-2)),
    },
    "projectors": lambda: {"distillation": FeatureDistillation(), "extract": both},
    "float64 beside float32": lambda: {"update": MaskedDistillation(learning_rate=1e-2), "saliency": Fisher()},
}


def observe(learner: Any, scenario: str, rank: int, step: int) -> None:
    if scenario == "domain shift":
        learner.observe(lambda net: F.cross_entropy(net(batch(70 + 10 * rank + step)), labels()), domain="source")
    if scenario == "non-finite on one rank" and step == 1:
        factor = float("nan") if rank else 1.0
        learner.observe(lambda net: net(batch()).sum() * factor)
    if scenario == "a head used on one rank":
        learner.observe(
            lambda net: net(batch(step)).pow(2).sum() + (net.unused(net.features(batch())[0]).sum() if rank else 0)
        )


def synchronise(student: nn.Module) -> None:
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    for tensors in (gradients, [buffer for buffer in student.buffers() if buffer.is_floating_point()]):
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]) / dist.get_world_size()
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def train(scenario: str, rank: int) -> Dict[str, Any]:
    torch.manual_seed(rank)
    teacher, student = networks()
    if scenario == "float64 beside float32":
        teacher.unused.double()
    optimizer = sgd(student)
    models = (WithFeatures(teacher), WithFeatures(student)) if scenario == "projectors" else (teacher, student)
    learner = make_learner(*models, **SCENARIOS[scenario]())
    data = [batch(10 * rank + step) for step in range(STEPS)]
    for step, target in enumerate(data):
        optimizer.zero_grad()
        learner.distill(models[1](target), target).backward()
        observe(learner, scenario, rank, step)
        if scenario != "students that differ":  # what DistributedDataParallel does for its host
            synchronise(student)
        learner.step(optimizer)
    report = learner.report()
    return {
        "data": bits(data),
        "rounds": bits(report.to_dict()["rounds"]),
        "discarded": report.discarded,
        "teacher": values(teacher),
        "projectors": bits(learner.state_dict()["projectors"]),
    }


def work(rank: int, ranks: int) -> Dict[str, Any]:
    return {scenario: train(scenario, rank) for scenario in SCENARIOS}
