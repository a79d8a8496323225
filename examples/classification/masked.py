"""The digits job with a masked-consistency host that steps twice: MIC's self-training under SAM, and CLDA in its loop.

    python -m examples.classification.masked --seed 0

As in MIC's classification job, without the adversarial part: the loss of ``self_training.py`` (Hoyer et al., MIC, CVPR
2023), minimised by sharpness-aware minimisation (Foret et al., SAM, ICLR 2021). SAM needs two backward passes and two
steps per iteration, so the learner is called in its two halves. Everything but the host is that of ``digits.py``: data,
networks, and the comparison of four students. Nothing is resumed. ``runs/masked`` then holds ``results.json`` and
``figure.png``.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Iterable, List, Optional, Tuple

import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a file: the imports below start at the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.classification.digits import Config, options_of, run_command
from examples.classification.digits_training import HostAlone, Log, MakeLearner, Stage, Task, progress
from examples.classification.self_training import (
    Batch,
    Batches,
    HostEma,
    SelfTraining,
    forward,
    self_training_loss,
    set_learning_rate,
    source_loss,
)


@dataclass(frozen=True)
class Masked(SelfTraining):
    """How the host trains.

    Attributes:
        rho: How far SAM climbs, as the length of the step in the space of all weights.
    """

    rho: float = 0.02


class Sam:
    """Sharpness-aware minimisation: climb along the gradient, and descend by the gradient found up there.

    Args:
        parameters: Of the model.
        optimizer: Makes the second step.
        rho: Length of the first step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, rho: float) -> None:
        self.parameters, self.optimizer, self.rho = list(parameters), optimizer, rho
        self.before: List[Tensor] = []

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb, and drop the gradients."""
        length = torch.stack([parameter.grad.norm() for parameter in self.parameters]).norm()
        self.before = [parameter.clone() for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.add_(parameter.grad, alpha=self.rho / (float(length) + 1e-12))
        self.optimizer.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Return to where the climb began, and descend."""
        for parameter, before in zip(self.parameters, self.before):
            parameter.copy_(before)
        self.optimizer.step()


def masked_consistency(
    model: nn.Module, batch: Batch, host_ema: HostEma, target_weight: float
) -> Tuple[Tensor, Tensor]:
    """Return the host's loss, and the logits of the masked target view with their graph."""
    source_logits, target_logits = forward(model, batch)
    return self_training_loss(source_logits, target_logits, batch, host_ema, target_weight), target_logits


def train(
    name: str,
    model: nn.Module,
    task: Task,
    *,
    seed: int,
    teacher: Optional[nn.Module] = None,
    make_learner: Optional[MakeLearner] = None,
    checkpoint: None = None,
) -> Stage:
    """Train ``model`` in place by masked consistency and SAM, as a student of ``teacher`` if there is one.

    Arguments are those of ``digits_training.train``; no checkpoint is kept.
    """
    host: Masked = task.host
    batches = Batches(task.source, task.target, host, seed)
    learner = HostAlone() if teacher is None or make_learner is None else make_learner(teacher, model)  # CLDA 1 of 6
    optimizer = torch.optim.AdamW(model.parameters(), lr=host.learning_rate, weight_decay=host.weight_decay)
    sam = Sam(model.parameters(), optimizer, host.rho)
    host_ema = HostEma(model, host.ema_decay)
    log = Log(task.evaluation, model, teacher)

    model.train()
    began = time.perf_counter()
    for step in progress(name, 0, task):
        set_learning_rate(optimizer, host.learning_rate, step, task.steps)
        batch, target_weight = batches[step], host.target_weight_at(step, task.steps)
        optimizer.zero_grad()
        loss, _ = masked_consistency(model, batch, host_ema, target_weight)
        loss.backward()
        sam.first_step()

        loss, target_logits = masked_consistency(model, batch, host_ema, target_weight)
        # Where SAM climbs to is the host's own; the KD loss belongs to the descent.
        loss = loss + learner.distill(  # CLDA 2 of 6
            target_logits, batch.target, view=batch.target_strong, source_loss=partial(source_loss, batch)
        )
        loss.backward()
        learner.observe()  # CLDA 3 of 6
        sam.second_step()
        learner.after_step(optimizer=optimizer)  # CLDA 4 of 6
        host_ema.update(model)

        if task.evaluates_after(step):
            log.add(step + 1, float(loss.detach()), learner.metrics(), time.perf_counter() - began)  # CLDA 5 of 6
            began = time.perf_counter()
    return log.stage(learner)  # CLDA 6 of 6


def main(arguments: Optional[List[str]] = None, config: Optional[Config] = None) -> int:
    """Run the job from the command line, which overrides ``config``; return the exit status."""
    parser = options_of("masked", "Fonts to handwritten digits by masked consistency and SAM, a student four ways.")
    return run_command("masked", parser.parse_args(arguments), config or Config(host=Masked()), train=train)


if __name__ == "__main__":
    sys.exit(main())
