"""Times of functions that run in turns, on a machine that may do other things too."""

from __future__ import annotations

import gc
import math
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence

import numpy as np
import torch

Times = Dict[str, List[float]]

OFTEN = 5
"""By how much the repeats are multiplied for a ratio that is close to its budget.

On a CPU that does other things too, the ratio of one pair of passes varies by 0.05, the median of 7 by 0.025, that of
35 by 0.01.
"""


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    low, median, high = np.percentile(values, [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def ratio(times: Times, of: str, to: str) -> Spread:
    """Return the ratio of two functions' times, each pair of the same repeat: what slows one down slows the other."""
    return spread([ours / theirs for ours, theirs in zip(times[of], times[to])])


def interleaved(
    tasks: Mapping[str, Callable[[], Any]], *, repeats: int, device: torch.device, at_least: float = 0.02
) -> Times:
    """Return seconds a call of each function, measured once a repeat, in turns.

    Whatever runs before a function leaves its own tensors in the processor's cache. So the turns go forwards in one
    repeat and backwards in the next, and a quick function is called once before each of its samples.

    Args:
        tasks: Functions by name. Each is called twice before.
        repeats: Samples of each.
        device: Where they work.
        at_least: Seconds a sample lasts; quick functions are called several times for it.
    """
    clock = clock_of(device)
    calls = {}
    for name, task in tasks.items():
        task()
        calls[name] = max(1, min(10_000, math.ceil(at_least / max(_sample(task, 1, clock), 1e-7))))
    times: Times = {name: [] for name in tasks}
    names = list(tasks)
    gc.collect()
    gc.freeze()  # what is there by now need not be looked through before every sample
    try:
        for repeat in range(repeats):
            first = repeat // 2 % len(names)
            turns = names[first:] + names[:first]
            for name in turns[::-1] if repeat % 2 else turns:
                if calls[name] > 1:
                    tasks[name]()
                times[name].append(_sample(tasks[name], calls[name], clock))
    finally:
        gc.unfreeze()
    return times


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds: processor time where one thread of the CPU does all the work, else wall-clock time."""
    if device.type == "cuda":
        return _cuda_clock
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _sample(task: Callable[[], Any], calls: int, clock: Callable[[], float]) -> float:
    gc.collect()
    gc.disable()
    try:
        began = clock()
        for _ in range(calls):
            task()
        return (clock() - began) / calls
    finally:
        gc.enable()
