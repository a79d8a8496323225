"""Peak memory of a function, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable

import torch

Build = Callable[..., Callable[[], Any]]


def peak(build: Build, *arguments: Any, device: torch.device) -> int:
    """Return the bytes that ``build(*arguments, device)()`` needs at its peak beyond what was held before the call.

    On a GPU it is the allocator's, on a CPU the growth of the process's largest resident size. Where the system cannot
    forget that size (other than Linux), a call that needs less than was needed before it shows nothing.

    Args:
        build: A function that can be imported; makes the inputs and returns the work.
        arguments: Its arguments.
        device: Where to work.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, build, arguments, device).result()


def _peak(build: Build, arguments: Any, device: torch.device) -> int:
    torch.set_num_threads(1)
    work = build(*arguments, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    before = _largest(forget=True)
    work()
    return _largest() - before


def _largest(*, forget: bool = False) -> int:
    """Return the process's largest resident size in bytes, since the beginning or since it was last forgotten."""
    try:
        if forget:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
