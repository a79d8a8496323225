"""A run under Accelerate: how it starts, is saved and resumed, shows where it is, and trains without CLDA too."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from tqdm import tqdm

from clda_core.errors import problem

PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class HostAlone:
    """Stands where the learner does in a run without CLDA: the host's loop, nothing added."""

    enabled = False

    def distill(self, logits: Any, inputs: Any = None, **_: Any) -> float:
        return 0.0

    def step(self, optimizer: Any) -> None:
        optimizer.step()

    def metrics(self) -> Dict[str, float]:
        return {}


def start(output: Path, accumulate: int, *handlers: Any) -> Accelerator:
    """Return the Accelerator that ``accelerate launch``, torchrun or nobody has set up, logging to TensorBoard."""
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = Accelerator(
        cpu=on_cpu,  # else Accelerate takes ranks without a GPU for single processes
        gradient_accumulation_steps=accumulate,
        log_with="tensorboard" if importlib.util.find_spec("tensorboard") else None,
        project_dir=str(output),
        kwargs_handlers=list(handlers),
    )
    kind = accelerator.distributed_type
    # On a CPU Accelerate shards nothing, but transformers then loads the weights on one process alone.
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked or kind not in PLAIN:
        raise problem(
            "this script does not shard its networks",
            expected="one process, or several under DistributedDataParallel",
            received="FSDP" if asked else kind.value,
            fix="leave --use_fsdp and --use_deepspeed out; docs/distributed.md shows FSDP2 in a loop of your own",
        )
    return accelerator


def share_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every rank the first one's BatchNorm statistics, which are those of its part of the data."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


class Curve:
    """The figures of every evaluation; part of a checkpoint, so that a resumed run has the whole curve."""

    def __init__(self) -> None:
        self.points: List[Dict[str, Any]] = []

    def add(self, step: int, **figures: Dict[str, float]) -> None:
        """Add what each network came to; an empty dict stands for one that is not there."""
        self.points.append({"step": step, **figures})

    def last(self, network: str) -> Dict[str, float]:
        """Return the figures that a network had last."""
        return self.points[-1][network] if self.points else {}

    def flat(self) -> Dict[str, float]:
        """Return the last figures by ``network/name``, for a logger."""
        last = {network: figures for network, figures in self.points[-1].items() if network != "step"}
        return {f"{network}/{name}": value for network, each in last.items() for name, value in each.items()}

    def state_dict(self) -> Dict[str, Any]:
        return {"points": self.points}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.points = state["points"]


class Checkpoints:
    """The newest state of a run, a folder that is there as a whole or not at all.

    Args:
        accelerator: Whose ``save_state`` writes it: model, optimizer, scaler, and the random states of every rank.
        output: The run's folder.
        settings: What names the run, plain data; a checkpoint in which it differs is refused.
    """

    def __init__(self, accelerator: Accelerator, output: Path, settings: Dict[str, Any]) -> None:
        self.accelerator, self.output = accelerator, output
        self.settings = {**settings, "processes": accelerator.num_processes}

    def newest(self) -> Path | None:
        """Return the folder of the last complete checkpoint."""
        folders = self.output.glob("checkpoint-*[0-9]")
        return max(folders, key=lambda folder: int(folder.name.partition("-")[2]), default=None)

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps and remove the one before; every rank calls it."""
        before, unfinished = self.newest(), self.output / f"checkpoint-{step}.unfinished"
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (unfinished / "run.json").write_text(json.dumps({"step": step, **self.settings}), encoding="utf-8")
            os.replace(unfinished, self.output / f"checkpoint-{step}")
            if before is not None and before.name != f"checkpoint-{step}":
                shutil.rmtree(before)
        self.accelerator.wait_for_everyone()

    def first_step(self, resume: bool) -> int:
        """Return the step to go on from, before anything is built.

        Raises:
            CldaError: If there is nothing to resume, or the checkpoint is of a run with other settings or another
                number of processes; and if there is one, but ``resume`` was not asked for.
        """
        folder = self.newest()
        if folder is None:
            return 0
        if not resume:
            raise problem(
                f"{self.output} holds a run already",
                expected="a folder without checkpoints",
                received=folder.name,
                fix="go on with it by --resume, or choose another --output",
            )
        saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        differing = sorted(key for key in self.settings if saved.get(key) != self.settings[key])
        if differing:
            raise problem(
                f"{folder} belongs to another run",
                expected=", ".join(f"{key}={saved.get(key)}" for key in differing),
                received=", ".join(f"{key}={self.settings[key]}" for key in differing),
                fix="resume with that run's settings and as many processes, or choose another --output",
            )
        return int(saved["step"])

    def load(self, parts: Sequence[Any]) -> None:
        """Save ``parts`` too from now on, objects with ``state_dict()``, and restore the newest checkpoint if any."""
        self.accelerator.register_for_checkpointing(*parts)
        folder = self.newest()
        if folder is not None:
            self.accelerator.load_state(str(folder))


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak at a step, counted from 0: a linear rise, then a linear fall to zero."""
    return min(1.0, (step + 1) / max(1, warmup)) * (1.0 - step / steps)


def progress(first: int, steps: int, accelerator: Accelerator) -> Any:
    """Return the steps from ``first`` on, with a bar for people and a line now and then for logs, on one rank."""
    interval = 0.2 if sys.stderr.isatty() else 15.0
    hidden = not accelerator.is_main_process
    return tqdm(range(first, steps), initial=first, total=steps, unit="step", mininterval=interval, disable=hidden)


def check_finite(loss: float, step: int) -> float:
    """Return the loss.

    Raises:
        CldaError: If it is not finite.
    """
    if math.isfinite(loss):
        return loss
    raise problem(
        f"the loss is {loss} at step {step}",
        expected="a finite one",
        received=str(loss),
        fix="resume from the last checkpoint with a lower --rate, or without fp16",
    )
