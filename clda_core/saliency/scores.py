"""From derivatives to scores: every parameter is scored, and the scores are counted layer by layer."""

from __future__ import annotations

from typing import Mapping, Optional, Sequence

import torch
from torch import Tensor

from .._host.shards import is_sharded, local, sum_over_shards
from ..errors import problem
from ..layers import Layer
from .base import SaliencyEstimator
from .histogram import Counting, Histogram

__all__ = ["score_layers"]


def score_layers(
    estimator: SaliencyEstimator,
    layers: Sequence[Layer],
    parameters: Mapping[str, Tensor],
    found: Mapping[str, Optional[Tensor]],
) -> Histogram:
    """Score every parameter whose derivative is known, and count the scores layer by layer.

    Args:
        estimator: Gives the scores; one of order 0 scores every parameter.
        layers: The model's layers.
        parameters: Its parameters by name; of sharded ones every rank scores its part, and all get all counts.
        found: Derivative by parameter name, ``None`` where it is unknown.

    Raises:
        CldaError: If the estimator returns something else than scores.
    """
    device = next(iter(parameters.values())).device
    sharded = {name: parameter for name, parameter in parameters.items() if is_sharded(parameter)}
    histogram = Histogram.empty(len(layers), device)
    parts = Histogram.empty(len(layers), device) if sharded else histogram
    of_whole, of_parts = Counting(histogram), Counting(parts)
    blind = estimator.order == 0
    for index, layer in enumerate(layers):
        for name in layer.parameters:
            derivative = found[name]
            if derivative is None and not blind:
                continue
            counting, own = (of_parts, local) if name in sharded else (of_whole, Tensor.detach)
            scores = _scores(estimator, name, own(parameters[name]), None if derivative is None else own(derivative))
            counting.add(index, scores if scores.device == device else scores.to(device))
    of_whole.finish()
    if sharded:
        of_parts.finish()
        counts, sums = (sum_over_shards(part, list(sharded.values())) for part in (parts.counts, parts.sums))
        histogram.merge(Histogram(counts, sums))
    return histogram


def _scores(estimator: SaliencyEstimator, name: str, parameter: Tensor, derivative: Optional[Tensor]) -> Tensor:
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
