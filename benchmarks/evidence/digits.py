"""Fonts to real handwritten digits, residual networks with BatchNorm, self-training: the job of the examples."""

from __future__ import annotations

from functools import lru_cache
from typing import Dict

from torch import nn

from benchmarks.evidence.self_training import SelfTrainingHost
from benchmarks.evidence.task import Host, Task
from examples.classification.digits_data import LabelledImages, source_digits, target_digits
from examples.classification.digits_models import BIG, SMALL, residual_network
from examples.classification.self_training import Batch, Batches, SelfTraining


class DigitsHost(SelfTrainingHost):
    def __init__(self, model: nn.Module, batches: Batches, settings: SelfTraining) -> None:
        super().__init__(model, settings)
        self.batches = batches

    def batch(self, step: int) -> Batch:
        return self.batches[step]


class Digits(Task):
    name, metric = "digits", "accuracy"
    steps, teacher_steps, learning_rate, dense = 600, 600, 1e-3, False

    def __init__(self) -> None:
        self.settings = SelfTraining()
        self.target, self.evaluation = target_digits()

    def teacher(self, seed: int) -> nn.Module:
        return residual_network(BIG, seed=5 * seed + 1)

    def student(self, seed: int) -> nn.Module:
        return residual_network(SMALL, seed=5 * seed + 3)

    def host(self, model: nn.Module, seed: int, stream: int) -> Host:
        batches = Batches(_source(5 * seed), self.target, self.settings, 5 * seed + 2 + 2 * stream)
        return DigitsHost(model, batches, self.settings)

    def evaluate(self, model: nn.Module) -> Dict[str, float]:
        return {self.metric: self.evaluation.accuracy(model)}


@lru_cache(maxsize=2)
def _source(seed: int) -> LabelledImages:
    return source_digits(seed)
