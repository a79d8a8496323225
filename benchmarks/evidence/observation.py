"""The paper's observation: does the domain shift make parameters non-salient, and more so in the big network?"""

from __future__ import annotations

import time
from typing import Any, Dict

import torch
from torch import nn

from benchmarks.evidence.records import Record
from benchmarks.evidence.runs import trained_teacher, versions
from benchmarks.evidence.task import Host, Task
from benchmarks.evidence.training import train, train_on_source
from clda_core.layers import group_layers
from clda_core.saliency import MeanThreshold, ReferenceThreshold, Threshold, saliency_rates

BATCHES = 20
TRAININGS = ("source", "uda")
NETWORKS = ("teacher", "student")


def observe(task: Task, seed: int, network: str, training: str) -> Record:
    """Train one network one way and return the record of its saliency rates on both domains.

    Args:
        task: The benchmark.
        seed: Of everything random.
        network: ``"teacher"`` or ``"student"``, by its size.
        training: ``"source"``: on labelled source data alone; ``"uda"``: by the host.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _trained(task, seed, network, training)
        host = task.host(model, seed, stream=4)
        return {
            "setting": task.setting(),
            "seed": seed,
            "variant": f"{network}-{training}",
            "metric": task.metric,
            "target": task.evaluate(model),
            "sizes": {layer.name: layer.numel for layer in group_layers(model)},
            "own_threshold": _rates(model, host, MeanThreshold()),
            "source_threshold": _rates(model, host, ReferenceThreshold()),
            "versions": versions(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def _rates(model: nn.Module, host: Host, threshold: Threshold) -> Dict[str, Dict[str, float]]:
    """Return each layer's LSR on ``target`` and on ``source`` images, over the same number of batches.

    Taylor saliency of the cross-entropy against the network's own pseudo-labels, on both domains. A threshold that
    refers to the source sees its batches up to the one in question.
    """
    batches = [host.loss(step, BATCHES) for step in range(BATCHES)]
    images = {"target": [batch.images for batch in batches], "source": [batch.source for batch in batches]}
    source = images["source"] if isinstance(threshold, ReferenceThreshold) else None
    return {
        domain: _rounded(saliency_rates(model, of_domain, threshold=threshold, source=source))
        for domain, of_domain in images.items()
    }


def overall(rates: Dict[str, float], sizes: Dict[str, int]) -> float:
    """Return the salient share of all parameters: the mean rate weighted by the layers' sizes."""
    return sum(rate * sizes[name] for name, rate in rates.items()) / sum(sizes[name] for name in rates)


def _trained(task: Task, seed: int, network: str, training: str) -> nn.Module:
    if network == "teacher" and training == "uda":
        return trained_teacher(task, seed)
    big = network == "teacher"
    model = task.teacher(seed) if big else task.student(seed)
    host, steps = task.host(model, seed, stream=0 if big else 1), task.teacher_steps if big else task.steps
    if training == "source":
        train_on_source(task, host, steps=steps)
    else:
        train(task, host, steps=steps, evaluations=1)
    return model.eval()


def _rounded(rates: Dict[str, Any]) -> Dict[str, float]:
    return {name: round(float(rate), 5) for name, rate in rates.items()}
