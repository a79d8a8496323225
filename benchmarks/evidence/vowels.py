"""Held out: vowels of men in quiet rooms and of women in noise, temporal convolutions; nothing of CLDA is tuned here.

The host was made to work first, with tuning seed 100 and without any KD. With a norm over channels and frames in place
of BatchNorm, self-training took the student 2 to 3 points below what it learns from the source alone, whether women
spoke in quiet, men in noise, or women in noise and echo, and also where pseudo-labels began to count later. With
BatchNorm self-training adds about 6 points for women in noise, and under 1 for men, which is why the voices differ too.
As it is set here, seed 100, it takes the student from 65.5% to 71.2%, and the teacher from 66.0% to 76.1%.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.self_training import SelfTrainingHost
from benchmarks.evidence.task import Host, Task, evaluating
from benchmarks.vowels.spectra import BANDS, CLASSES, source_vowels, strong_view, target_vowels
from examples.classification.self_training import Batch, SelfTraining

BIG, SMALL, WIDTH = 6, 2, 64  # blocks, and their width
SOURCE, TARGET, EVALUATION = 1000, 800, 400


class Block(nn.Module):
    """Two convolutions over time, the first of them dilated, and a shortcut: ``(N, width, T)`` to the same."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.spread = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.relu(self.spread(self.norm(x))))


class Tagger(nn.Module):
    """A temporal convolutional network: utterances ``(N, bands, T)`` to logits ``(N, C, T)``."""

    def __init__(self, blocks: int, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Conv1d(BANDS, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width, 2 ** (index % 3)) for index in range(blocks)))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Conv1d(width, len(CLASSES), 1)

    def forward(self, utterances: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(utterances))))


class VowelsHost(SelfTrainingHost):
    def __init__(self, model: nn.Module, seed: int, stream: int, settings: SelfTraining) -> None:
        super().__init__(model, settings)
        self.seed = 5 * seed + stream
        self.utterances, self.labels = _source(seed)
        self.target, _ = _target(seed)

    def batch(self, step: int) -> Batch:
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.randint(len(self.utterances), (self.settings.batch,), generator=rng)
        target = self.target[torch.randint(len(self.target), (self.settings.batch,), generator=rng)]
        return Batch(
            strong_view(self.utterances[chosen], rng, masked=0.0),
            self.labels[chosen],
            target,
            strong_view(target, rng, masked=self.settings.masked),
        )


class Vowels(Task):
    name, metric = "vowels", "accuracy"
    steps, teacher_steps, learning_rate, dense, related = 300, 300, 3e-3, True, False

    def __init__(self) -> None:
        self.settings = SelfTraining(batch=32, masked=0.15, target_start=0.4, target_rise=0.2)

    def teacher(self, seed: int) -> nn.Module:
        return _network(BIG, 5 * seed + 1)

    def student(self, seed: int) -> nn.Module:
        return _network(SMALL, 5 * seed + 3)

    def host(self, model: nn.Module, seed: int, stream: int) -> Host:
        return VowelsHost(model, seed, stream, self.settings)

    def evaluate(self, model: nn.Module) -> Dict[str, float]:
        utterances, labels = _evaluation()
        with evaluating(model):
            right = sum(
                int((model(batch).argmax(dim=1) == truth).sum())
                for batch, truth in zip(utterances.split(200), labels.split(200))
            )
        return {self.metric: 100.0 * right / labels.numel()}


def _network(blocks: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tagger(blocks)


@lru_cache(maxsize=2)
def _source(seed: int) -> Tuple[Tensor, Tensor]:
    return source_vowels(seed, SOURCE)


@lru_cache(maxsize=2)
def _target(seed: int) -> Tuple[Tensor, Tensor]:
    return target_vowels(seed, TARGET)


@lru_cache(maxsize=1)
def _evaluation() -> Tuple[Tensor, Tensor]:
    return target_vowels(10_000, EVALUATION)
