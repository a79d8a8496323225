"""What the ranks of `test_layouts.py` do."""

from typing import Any, Dict, List

import numpy as np
import torch
from torch import Tensor, nn

from clda_core._host.ranks import sum_across_ranks
from clda_core.distillation.projectors import Projectors
from clda_core.update import MaskedDistillation
from tests.update.rounds import randomise, round_context

ROUNDS, IMAGES, RATE = 3, 4, 1e-2


def networks(channels_last: bool) -> Any:
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 5, 2), nn.Flatten())
    student = randomise(nn.Sequential(nn.Flatten(), nn.Linear(27, 20)), 2).double()
    teacher = randomise(teacher, 1).double()
    return teacher.to(memory_format=torch.channels_last) if channels_last else teacher, student


def images(seed: int, channels_last: bool) -> Tensor:
    drawn = torch.randn(IMAGES, 3, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.contiguous(memory_format=torch.channels_last) if channels_last else drawn


def updated(parts: Any, channels_last: bool) -> Dict[str, np.ndarray]:
    """Return the teacher after rounds on the images of these seeds."""
    teacher, student = networks(channels_last)
    update = MaskedDistillation(learning_rate=RATE)
    for index in range(ROUNDS):
        batch = torch.cat([images(10 * index + part, channels_last) for part in parts])
        update.apply(round_context(teacher, student, inputs=batch))
    return {name: value.detach().contiguous().numpy() for name, value in teacher.named_parameters()}


def projected(parts: Any) -> np.ndarray:
    """Return a channels-last projector of a KD loss after a step on the mean gradient of these seeds."""
    own = randomise(nn.Conv2d(3, 4, 2), 3).double().to(memory_format=torch.channels_last)
    projectors = Projectors(own)
    sum(own(images(part, False)).tanh().mean() for part in parts).div(len(parts)).backward()
    projectors.step()
    found: np.ndarray = own.weight.detach().contiguous().numpy()
    return found


def work(rank: int, ranks: int) -> List[Any]:
    mixed = [torch.tensor([1.0 + rank]), torch.tensor([1j * (1 + rank)]), torch.tensor([0.5], dtype=torch.float64)]
    sums = [complex(found.item()) for found in sum_across_ranks(mixed)]
    return [updated([rank], False), updated([rank], True), projected([rank]), sums]
