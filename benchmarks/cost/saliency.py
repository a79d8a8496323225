"""One observation of the teacher against the bare forward and backward pass it needs, and against Torch-Pruning."""

from __future__ import annotations

from typing import Iterator

import torch

from benchmarks.cost.figures import Figure, figure
from benchmarks.cost.others import missing, other
from benchmarks.cost.settings import Forced, Host, Setting
from benchmarks.cost.timing import OFTEN, interleaved, ratio
from clda_core import CollaborativeLearner
from clda_core.layers import canonical_parameters, group_layers
from clda_core.saliency import MeanThreshold, PseudoLabelCrossEntropy, Taylor, layer_saliency_rates
from clda_core.saliency.scores import score_layers

BARE, PRUNING = 1.20, 0.5


def saliency(setting: Setting, device: torch.device, repeats: int) -> Iterator[Figure]:
    """Observe by the public calls; score the same gradients as Torch-Pruning does."""
    host, probe, schedule = Host(setting, device), PseudoLabelCrossEntropy(), Forced()
    learner = CollaborativeLearner(host.teacher, host.student, schedule=schedule)
    schedule.observed = True
    parameters = list(host.teacher.parameters())

    def observe() -> None:
        learner.observe(lambda teacher: probe(teacher(host.mixed)))
        learner.after_step()

    def bare() -> None:
        host.teacher.requires_grad_(True)
        torch.autograd.grad(probe(host.teacher(host.mixed)), parameters)
        host.teacher.requires_grad_(False)

    times = interleaved({"observe": observe, "bare": bare}, repeats=OFTEN * repeats, device=device)
    what = "saliency + LSR of one observation / bare forward + backward of the probe"
    yield figure("saliency", what, setting.name, ratio(times, "observe", "bare"), at_most=BARE)
    yield from _against_pruning(host, setting, repeats, device)


def _against_pruning(host: Host, setting: Setting, repeats: int, device: torch.device) -> Iterator[Figure]:
    what = "saliency + LSR from given gradients / Torch-Pruning's GroupTaylorImportance"
    pruning = other("torch_pruning")
    if pruning is None:
        yield Figure("saliency", what, setting.name, None, at_most=PRUNING, note=missing("torch_pruning"))
        return
    teacher = host.teacher.requires_grad_(True)
    PseudoLabelCrossEntropy()(teacher(host.mixed), None).backward()
    try:
        graph = pruning.DependencyGraph().build_dependency(teacher, example_inputs=host.mixed[:1])
        groups = list(graph.get_all_groups(root_module_types=[torch.nn.Conv2d, torch.nn.Linear]))
    except Exception as error:
        note = f"Torch-Pruning cannot trace this network ({type(error).__name__})"
        yield Figure("saliency", what, setting.name, None, at_most=PRUNING, note=note)
        return
    importance = pruning.importance.GroupTaylorImportance()
    layers, by_name = group_layers(teacher), canonical_parameters(teacher)
    gradients = {name: parameter.grad for name, parameter in by_name.items()}
    threshold = MeanThreshold()

    def ours() -> None:
        histogram = score_layers(Taylor(), layers, by_name, gradients)
        layer_saliency_rates(histogram, threshold(histogram, None)).tolist()

    def theirs() -> None:
        for group in groups:
            importance(group)

    with torch.no_grad():
        times = interleaved({"ours": ours, "theirs": theirs}, repeats=repeats, device=device)
    note = "its dependency graph and groups are made beforehand; ours scores every parameter, it scores channels"
    yield figure("saliency", what, setting.name, ratio(times, "ours", "theirs"), at_most=PRUNING, note=note)
