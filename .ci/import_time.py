"""Measure what ``import clda_core`` costs beside ``import torch``; fail above the budget."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from typing import Sequence, Tuple

BUDGET = 0.04  # of the time that importing torch takes
RUNS = 15
ALONE = """
import time
before = time.thread_time()
import torch
between = time.thread_time()
import clda_core
print(time.thread_time() - between, between - before)
"""


def both() -> Tuple[float, float]:
    """Return the processor times of the import and of torch's before it, in a new process, in ms."""
    # An installed package has its bytecode; so has this one after the first import.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    shown = subprocess.run([sys.executable, "-c", ALONE], check=True, stdout=subprocess.PIPE, env=environment).stdout
    ours, torchs = shown.split()
    return 1e3 * float(ours), 1e3 * float(torchs)


def share(times: Sequence[Tuple[float, float]]) -> float:
    """Return the import's share of torch's, of what each needs: the least of its times in several processes.

    An import does the same work every time. Whatever is above the least is of the machine: other processes in its
    caches, a lower clock, a slow disk. How fast the machine is at its best is the same for both.
    """
    return min(ours for ours, _ in times) / min(torchs for _, torchs in times)


def main() -> None:
    """Time both imports in new processes, and judge the share.

    Whole processes with and without it would not do: their difference drowns in what else the machine does. So does
    wall-clock time on a busy one.
    """
    both()  # compiles to bytecode
    times = [both() for _ in range(RUNS)]
    for name, one in zip(("clda_core", "torch"), zip(*times)):
        print(f"import {name}: {min(one):.1f} ms of processor time; median of {RUNS}: {statistics.median(one):.1f} ms")
    print(f"{100 * share(times):.1f}% of torch's (budget {100 * BUDGET:.0f}%)")
    if share(times) > BUDGET:
        sys.exit("the import is over its budget")


if __name__ == "__main__":
    main()
