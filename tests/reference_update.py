"""Slow float64 oracles for updates, written from the equations alone."""

import math
from typing import List, Mapping

import numpy as np
from torch import Tensor


def float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().copy()


def average(teacher: Tensor, student: Tensor, decay: float, strength: float = 1.0) -> np.ndarray:
    t, s = float64(teacher), float64(student)
    weight = strength * (1 - decay)
    return (1 - weight) * t + weight * s


def distributions(logits: Tensor) -> List[List[float]]:
    """Return the softmax over dimension 1 at every position."""
    rows = np.moveaxis(float64(logits), 1, -1).reshape(-1, logits.shape[1])
    found = []
    for row in rows:
        powers = [math.exp(value - max(row)) for value in row]
        found.append([power / sum(powers) for power in powers])
    return found


def entropy(p: List[float]) -> float:
    return -sum(value * math.log(value) for value in p if value > 0)


def mutual_information(logits: Tensor) -> float:
    rows = distributions(logits)
    mean = [sum(row[c] for row in rows) / len(rows) for c in range(logits.shape[1])]
    return entropy(mean) - sum(entropy(row) for row in rows) / len(rows)


def agreement(teacher: Tensor, student: Tensor) -> float:
    pairs = list(zip(distributions(teacher), distributions(student)))
    return -sum(s * math.log(s / t) for of_t, of_s in pairs for t, s in zip(of_t, of_s) if s > 0) / len(pairs)


class Adam:
    """Kingma and Ba 2015, Algorithm 1, a tensor at a time; a tensor without a gradient is skipped."""

    def __init__(self) -> None:
        self.moments = {}

    def step(
        self,
        values: Mapping[str, np.ndarray],
        gradients: Mapping[str, np.ndarray],
        rate: float,
    ) -> None:
        for name, gradient in gradients.items():
            m, v, t = self.moments.get(name, (0.0, 0.0, 0))
            m, v, t = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2, t + 1
            self.moments[name] = (m, v, t)
            values[name] -= rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
