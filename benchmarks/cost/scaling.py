"""How the time of a round grows with the teacher's parameters, and with its number of layers."""

from __future__ import annotations

import math
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from benchmarks.cost.figures import Figure, figure
from benchmarks.cost.settings import Forced
from benchmarks.cost.timing import interleaved, spread
from clda_core import CollaborativeLearner
from clda_core.update import Average, Guard, MaskedDistillation, Update

PARAMETERS = (10**6, 10**7, 10**8)
LAYERS = (10, 100, 1_000, 10_000)
SLOPE = 1.15
"""Of the logarithms, over the last decade; 1 is linear."""

_BLOCKS, _WIDTH = 10, 32
_BY_HAND = "for scale: a forward and backward pass of it by hand"
_NOTE = "slope of log time over log size in the last decade: 1 is linear, below it the fixed costs still show"
_UPDATES: Dict[str, Callable[[], Update]] = {"Average": Average, "defaults": lambda: Guard(MaskedDistillation())}


def scaling(device: torch.device, repeats: int, parameters: Sequence[int], layers: Sequence[int]) -> Iterator[Figure]:
    """Time an observed round of a chain of linear layers, by the learner's calls alone."""
    by_parameters = [(size, _BLOCKS, round(math.sqrt(size / _BLOCKS))) for size in parameters]
    by_layers = [(count, count, _WIDTH) for count in layers]
    for unit, chains in (("parameters", by_parameters), ("layers", by_layers)):
        yield from _growth(unit, chains, repeats, device)


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the slope of the logarithms over the last two sizes."""
    return float(np.diff(np.log(seconds[-2:]))[0] / np.diff(np.log(sizes[-2:]))[0])


def _growth(unit: str, chains: List[Tuple[int, int, int]], repeats: int, device: torch.device) -> Iterator[Figure]:
    seconds: Dict[str, List[float]] = {}
    for size, blocks, width in chains:
        tasks = {f"an observed round, {name}": _round(blocks, width, make(), device) for name, make in _UPDATES.items()}
        tasks[_BY_HAND] = _passes(blocks, width, device)
        times = interleaved(tasks, repeats=repeats, device=device, at_least=0.0)
        for name, found in times.items():
            milliseconds = spread([1e3 * second for second in found])
            where = f"{size:,} {unit}"
            yield figure("scaling", name, where, milliseconds, unit="ms")
            seconds.setdefault(name, []).append(milliseconds.median)
    sizes = [size for size, _, _ in chains]
    for name, found in seconds.items():
        where = f"{sizes[-2]:,} to {sizes[-1]:,} {unit}"
        budget = None if name == _BY_HAND else SLOPE
        yield Figure("scaling", f"slope, {name}", where, slope(sizes, found), "", at_most=budget, note=_NOTE)


def _round(blocks: int, width: int, update: Update, device: torch.device) -> Callable[[], None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher, student = (_chain(blocks, width).to(device) for _ in range(2))
    inputs = torch.ones(1, width, device=device)
    schedule = Forced()
    schedule.round = schedule.observed = True
    learner = CollaborativeLearner(teacher.eval(), student, update=update, schedule=schedule)
    output = torch.zeros(1, width, device=device, requires_grad=True)

    def run() -> None:
        learner.distill(output, inputs, teacher_output=output)
        learner.step(step_fn=lambda: None)

    return run


def _passes(blocks: int, width: int, device: torch.device) -> Callable[[], None]:
    teacher, inputs = _chain(blocks, width).to(device), torch.ones(1, width, device=device)
    parameters = list(teacher.parameters())

    def run() -> None:
        torch.autograd.grad(teacher(inputs).square().sum(), parameters)

    return run


def _chain(blocks: int, width: int) -> nn.Module:
    """Return linear layers in a row, started so that a signal keeps its size through any number of them."""
    chain = nn.Sequential(*(nn.Linear(width, width) for _ in range(blocks)))
    with torch.no_grad():
        for layer in chain:
            layer.weight.normal_(0.0, width**-0.5)
            layer.weight.lerp_(torch.eye(width), 0.9)
    return chain
