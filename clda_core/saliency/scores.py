"""From derivatives to scores: every parameter is scored, and the scores are counted layer by layer."""

from __future__ import annotations

from typing import List, Mapping, Optional, Sequence

import torch
from torch import Tensor

from .._host.shards import is_sharded, local, sum_over_shards
from ..errors import problem
from ..layers import Layer
from .base import SaliencyEstimator
from .histogram import CHUNK, Histogram

__all__ = ["score_layers"]


def score_layers(
    estimator: SaliencyEstimator,
    layers: Sequence[Layer],
    parameters: Mapping[str, Tensor],
    found: Mapping[str, Optional[Tensor]],
) -> Histogram:
    """Score every parameter whose derivative is known, and summarise the scores layer by layer.

    Raises:
        CldaError: If the estimator returns something else than scores.
    """
    device = next(iter(parameters.values())).device
    sharded = [parameter for parameter in parameters.values() if is_sharded(parameter)]
    of_whole, of_shards = _Gathering(len(layers), device), _Gathering(len(layers), device)
    for index, layer in enumerate(layers):
        for name in layer.parameters:
            if found[name] is not None or estimator.order == 0:
                scores = _scores(estimator, name, parameters[name], found[name]).to(device)
                (of_shards if sharded and is_sharded(parameters[name]) else of_whole).add(index, scores)
    histogram = of_whole.finish()
    if sharded:
        parts = of_shards.finish()
        histogram.merge(Histogram(sum_over_shards(parts.counts, sharded), sum_over_shards(parts.sums, sharded)))
    return histogram


class _Gathering:
    """Counts scores layer after layer, those of several small parameters at once."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._histogram = Histogram.empty(layers, device)
        self._layer = 0
        self._scores: List[Tensor] = []
        self._size = 0

    def add(self, layer: int, scores: Tensor) -> None:
        """Take the scores of one parameter."""
        if layer != self._layer or self._size + scores.numel() > CHUNK:
            self.finish()
        self._layer = layer
        self._scores.append(scores)
        self._size += scores.numel()

    def finish(self) -> Histogram:
        """Count what was gathered."""
        if self._scores:
            self._histogram.add(self._layer, *self._scores)
        self._scores, self._size = [], 0
        return self._histogram


def _scores(estimator: SaliencyEstimator, name: str, parameter: Tensor, derivative: Optional[Tensor]) -> Tensor:
    parameter = local(parameter)
    derivative = None if derivative is None else local(derivative)
    if parameter.dtype != torch.float32 or (derivative is not None and derivative.dtype != torch.float32):
        wide = torch.promote_types(parameter.dtype, torch.float32)
        parameter, derivative = parameter.to(wide), None if derivative is None else derivative.to(wide)
    scores = estimator.score(parameter, derivative)
    if not isinstance(scores, Tensor) or scores.shape != parameter.shape:
        received = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise problem(
            f"the saliency estimator {type(estimator).__name__} returned no scores for {name!r}",
            expected=f"a tensor of shape {tuple(parameter.shape)}",
            received=received,
            fix="return one non-negative score for each element of the parameter",
        )
    return scores
