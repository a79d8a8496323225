"""Slow float64 oracles for saliency, written from the definitions and sharing no code with the package."""

import math
from typing import Callable, Dict, List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor


def taylor(theta: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    return np.abs(theta.astype(np.float64) * gradient.astype(np.float64))


def fisher(theta: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    return 0.5 * gradient.astype(np.float64) ** 2 * theta.astype(np.float64) ** 2


def hessian(theta: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    return 0.5 * np.abs(diagonal.astype(np.float64)) * theta.astype(np.float64) ** 2


def full_hessian(loss: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """The Hessian by rows, for a flat ``theta``."""
    theta = theta.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
    return torch.stack([torch.autograd.grad(entry, theta, retain_graph=True)[0] for entry in gradient])


def quantile(layers: Sequence[np.ndarray], q: float) -> float:
    """The smallest score that at least a fraction q of all scores does not exceed."""
    scores = np.sort(np.concatenate([layer.reshape(-1) for layer in layers]))
    return float(scores[max(0, math.ceil(q * len(scores)) - 1)])


def rates(layers: Sequence[np.ndarray], threshold: float) -> List[float]:
    return [float(np.mean(layer > threshold)) if layer.size else math.nan for layer in layers]


def in_bin_of(layers: Sequence[np.ndarray], threshold: float) -> List[float]:
    """The fraction of each layer's scores in the same eighth of an octave as the threshold: the bound on the error."""
    if threshold < 2.0**-126:
        return [0.0 for _ in layers]
    octave = 2.0 ** math.floor(math.log2(threshold))
    lower = octave * (1 + math.floor((threshold / octave - 1) * 8) / 8)
    return [float(np.sum((layer >= lower) & (layer <= lower + octave / 8)) / max(1, layer.size)) for layer in layers]


def probe(logits: np.ndarray, weights: Optional[np.ndarray]) -> float:
    """Cross-entropy against the argmax, position by position."""
    rows = np.moveaxis(logits.astype(np.float64), 1, -1).reshape(-1, logits.shape[1])
    weights = np.ones(len(rows)) if weights is None else weights.astype(np.float64).reshape(-1)
    total = 0.0
    for row, weight in zip(rows, weights):
        if weight > 0:
            shifted = row - row.max()
            total += weight * (math.log(np.exp(shifted).sum()) - shifted[row.argmax()])
    return total / weights.sum()


def lowest(values: Dict[str, float], count: int) -> List[str]:
    """Selection sort; the first of equals."""
    left, chosen = list(values), []
    for _ in range(count):
        best = left[0]
        for name in left:
            if values[name] < values[best]:
                best = name
        left.remove(best)
        chosen.append(best)
    return [name for name in values if name in chosen]
