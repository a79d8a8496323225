"""Runs a program inside the host's own process, with the shims that the host needs in this environment.

    python host_process.py REPORT MODULE ARGUMENTS      MODULE is tools.train or tools.test of the unmodified host

The hosts are written for a GPU and for the package versions they pin. Each shim below mends one thing that breaks
elsewhere; it is applied only where that does break, and in the same way for the host alone and with us. With the
pinned packages on a GPU none is. ``verify`` copies this file next to the runs and starts it by its path, so that
nothing of this repository is imported unless the host's config asks for it; ``REPORT`` (JSON) says what was.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import resource
import sys
import time
import types
from typing import Any, Callable, List


def on_cpu_modules_stay() -> bool:
    """``Module.cuda`` is the identity where there is no GPU: the hosts call it without asking."""
    import torch

    if torch.cuda.is_available():
        return False
    torch.nn.Module.cuda = lambda self, device=None: self
    return True


def on_cpu_batches_keep_their_shape() -> bool:
    """An mmcv before 1.4 adds a dimension to a batch that it scatters to the CPU."""
    import torch
    from mmcv.parallel._functions import Scatter

    if torch.cuda.is_available() or Scatter.forward([-1], [torch.zeros(1)])[0].dim() == 1:
        return False
    Scatter.forward = staticmethod(lambda devices, batch: tuple(batch) if isinstance(batch, list) else (batch,))
    return True


def on_cpu_checkpoints_resume() -> bool:
    """The runner of mmcv maps a checkpoint that it resumes to the current GPU."""
    import torch
    from mmcv.runner import IterBasedRunner

    if torch.cuda.is_available():
        return False
    resume = IterBasedRunner.resume

    def resume_on_cpu(self: Any, checkpoint: str, resume_optimizer: bool = True, map_location: Any = "cpu") -> Any:
        return resume(self, checkpoint, resume_optimizer, map_location)

    IterBasedRunner.resume = resume_on_cpu
    return True


def torchvision_imports_without_operators() -> bool:
    """A torchvision built for another torch lacks compiled operators, whose registration then stops its import."""
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    importlib.import_module("torchvision")
    return True


def loaders_without_workers_are_not_persistent() -> bool:
    """The hosts ask for persistent workers from torch 1.8 on, which without workers (as here) is an error."""
    import torch
    from torch.utils.data import DataLoader

    if torch.__version__ < "1.8.0":  # compared as the hosts compare it
        return False
    init = DataLoader.__init__

    def init_of_any(
        self: Any, *args: Any, num_workers: int = 0, persistent_workers: bool = False, **kwargs: Any
    ) -> None:
        persistent = persistent_workers and num_workers > 0
        init(self, *args, num_workers=num_workers, persistent_workers=persistent, **kwargs)

    DataLoader.__init__ = init_of_any
    return True


def newer_mmcv_is_accepted() -> bool:
    """The hosts refuse mmcv after 1.4.0 by its version alone."""
    import mmcv

    if tuple(int(part) for part in mmcv.__version__.split(".")[:2]) <= (1, 4):
        return False
    version = mmcv.__version__
    mmcv.__version__ = "1.4.0"
    importlib.import_module("mmseg")
    mmcv.__version__ = version
    return True


def evaluation_comes_after_the_timer() -> bool:
    """Later mmcv's evaluation logs the iteration first, which it must not do before the iteration was timed."""
    from mmcv.runner import BaseRunner
    from mmcv.runner.hooks import evaluation

    if not hasattr(evaluation, "LoggerHook"):
        return False
    register = BaseRunner.register_hook

    def register_evaluation_low(self: Any, hook: Any, priority: Any = "NORMAL") -> None:
        register(self, hook, "LOW" if isinstance(hook, evaluation.EvalHook) else priority)

    BaseRunner.register_hook = register_evaluation_low
    return True


SHIMS: List[Callable[[], bool]] = [
    torchvision_imports_without_operators,
    on_cpu_modules_stay,
    on_cpu_batches_keep_their_shape,
    on_cpu_checkpoints_resume,
    loaders_without_workers_are_not_persistent,
    newer_mmcv_is_accepted,
    evaluation_comes_after_the_timer,
]


def main(report: str, module: str, arguments: List[str]) -> None:
    shims = [shim.__name__ for shim in SHIMS if shim()]
    seconds = timed_steps()
    program = importlib.import_module(module).main
    sys.argv = [module, *arguments]  # tools.test reads these, tools.train is given them
    program(*([arguments] if inspect.signature(program).parameters else []))
    with open(report, "w") as file:
        json.dump({"shims": shims, "ours": ours(), "peak_mib": peak_memory(), "seconds": seconds}, file)


def timed_steps() -> List[float]:
    """Return a list that fills with the time of each training step: the process's own, or the GPU's."""
    import torch
    from mmcv.parallel import MMDataParallel

    train_step, seconds = MMDataParallel.train_step, []

    def now() -> float:
        if not torch.cuda.is_available():
            return time.process_time()  # other processes on a busy machine do not count
        torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = now()
        result = train_step(self, *args, **kwargs)
        seconds.append(now() - started)
        return result

    MMDataParallel.train_step = timed
    return seconds


def ours() -> List[str]:
    return sorted(name for name in sys.modules if name.split(".")[0] in ("clda_core", "examples"))


def peak_memory() -> float:
    """Return the most memory held so far in MiB: by tensors on the GPU, or else by the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, kibibytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # this file's own folder holds nothing to import
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
