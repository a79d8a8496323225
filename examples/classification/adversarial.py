"""The digits job with an adversarial host: DANN, or CDAN with ``--conditional``, and CLDA in its training loop.

    python -m examples.classification.adversarial --seed 0 --conditional

A discriminator with an optimizer of its own tells the domains apart by the features, and the network learns features by
which it cannot (Ganin et al., DANN, JMLR 2016); the conditional one sees features and predictions together (Long et
al., CDAN, NeurIPS 2018). Everything but the host is that of ``digits.py``: data, networks, and the comparison of four
students. Nothing is resumed. ``runs/adversarial`` then holds ``results.json`` and ``figure.png``.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a file: the imports below start at the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.classification.digits import Config, options_of, run_command
from examples.classification.digits_data import CLASSES
from examples.classification.digits_training import HostAlone, Log, MakeLearner, Stage, Task, progress
from examples.classification.self_training import Batches, SelfTraining, set_learning_rate, source_loss


@dataclass(frozen=True)
class Adversarial:
    """How the host trains.

    Attributes:
        batch: Images per domain and step.
        learning_rate: Of both AdamW optimizers, at its peak.
        weight_decay: Of both.
        hidden: Units of the discriminator's hidden layers.
        weight: Of the domain loss, for the network, once it has risen.
        conditional: Whether the discriminator sees the outer product of features and predictions (CDAN).
        entropy: Whether confident images count more in the domain loss (CDAN+E).
    """

    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    hidden: int = 128
    weight: float = 1.0
    conditional: bool = False
    entropy: bool = False

    def weight_at(self, step: int, steps: int) -> float:
        """Return the weight of the domain loss at a step, counted from 0: DANN's slow rise from 0."""
        return self.weight * (2.0 / (1.0 + math.exp(-10.0 * step / steps)) - 1.0)


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by ``-weight``."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, None]:
        return -ctx.weight * gradient, None


def domain_discriminator(features: int, host: Adversarial, *, seed: int) -> nn.Module:
    """Build the network that says whether features are the source's: a logit per image."""
    inputs = features * CLASSES if host.conditional else features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(inputs, host.hidden), nn.ReLU(), nn.Linear(host.hidden, host.hidden), nn.ReLU(),
            nn.Linear(host.hidden, 1),
        )  # fmt: skip


def domain_loss(discriminator: nn.Module, features: Tensor, logits: Tensor, host: Adversarial, weight: float) -> Tensor:
    """Return the discriminator's cross-entropy, whose gradient reaches the features reversed and times ``weight``.

    Args:
        discriminator: Maps what it sees to a logit per image.
        features: Shape ``(2N, F)``, the source's first, then the target's.
        logits: Shape ``(2N, 10)``.
        host: Says what the discriminator sees and which images count.
        weight: Of the reversed gradient.
    """
    predictions = logits.detach().softmax(dim=1)
    seen = torch.einsum("nf,nc->nfc", features, predictions).flatten(1) if host.conditional else features
    is_source = torch.zeros(len(features), device=features.device)
    is_source[: len(features) // 2] = 1.0
    counts = torch.ones_like(is_source)
    if host.entropy:
        entropy = -(predictions * predictions.clamp_min(1e-8).log()).sum(dim=1)
        counts = 1.0 + torch.exp(-entropy)
    answers = discriminator(ReverseGradient.apply(seen, weight)).squeeze(1)
    return F.binary_cross_entropy_with_logits(answers, is_source, counts / counts.mean())


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
    """Train ``model`` in place by adversarial UDA, as a student of ``teacher`` if there is one.

    Arguments are those of ``digits_training.train``; no checkpoint is kept.
    """
    host: Adversarial = task.host
    batches = Batches(task.source, task.target, SelfTraining(batch=host.batch), seed)
    discriminator = domain_discriminator(model.fc.in_features, host, seed=seed).to(task.source.images.device)
    learner = HostAlone() if teacher is None or make_learner is None else make_learner(teacher, model)  # CLDA 1 of 5
    optimizer, optimizer_d = (
        torch.optim.AdamW(trained.parameters(), lr=host.learning_rate, weight_decay=host.weight_decay)
        for trained in (model, discriminator)
    )
    log = Log(task.evaluation, model, teacher)

    model.train()
    began = time.perf_counter()
    for step in progress(name, 0, task):
        set_learning_rate(optimizer, host.learning_rate, step, task.steps)
        set_learning_rate(optimizer_d, host.learning_rate, step, task.steps)
        batch = batches[step]
        features = model.features(torch.cat([batch.images, batch.target]))
        logits = model.fc(features)
        source_logits, target_logits = logits.chunk(2)
        loss = F.cross_entropy(source_logits, batch.labels)
        loss = loss + domain_loss(discriminator, features, logits, host, host.weight_at(step, task.steps))
        loss = loss + learner.distill(  # CLDA 2 of 5; the host itself has no use for the strong view
            target_logits, batch.target, view=batch.target_strong, source_loss=partial(source_loss, batch)
        )
        optimizer.zero_grad()
        optimizer_d.zero_grad()
        loss.backward()
        optimizer_d.step()
        learner.step(optimizer)  # CLDA 3 of 5, instead of optimizer.step()

        if task.evaluates_after(step):
            log.add(step + 1, float(loss.detach()), learner.metrics(), time.perf_counter() - began)  # CLDA 4 of 5
            began = time.perf_counter()
    return log.stage(learner)  # CLDA 5 of 5


def main(arguments: Optional[List[str]] = None, config: Optional[Config] = None) -> int:
    """Run the job from the command line, which overrides ``config``; return the exit status."""
    parser = options_of("adversarial", "Fonts to handwritten digits by adversarial UDA, a student trained four ways.")
    parser.add_argument("--conditional", action="store_true", help="CDAN instead of DANN")
    parser.add_argument("--entropy", action="store_true", help="confident images count more in the domain loss")
    options = parser.parse_args(arguments)
    config = config or Config(host=Adversarial())
    host = replace(config.host, conditional=options.conditional, entropy=options.entropy)
    return run_command("adversarial", options, replace(config, host=host), train=train)


if __name__ == "__main__":
    sys.exit(main())
