"""From derivatives to scores: every parameter is scored, and the scores are counted layer by layer."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._host.shards import here, is_sharded, sum_over_shards
from ..errors import problem
from ..layers import Layer
from ..strategy import vouched_for
from .base import Elementwise, SaliencyEstimator
from .histogram import Counting, Histogram, chunk_on

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
    of_whole, of_parts = _Scoring(estimator, histogram, device), _Scoring(estimator, parts, device)
    blind = estimator.order == 0
    for index, layer in enumerate(layers):
        for name in layer.parameters:
            derivative = found[name]
            if derivative is None and not blind:
                continue
            scoring = of_parts if name in sharded else of_whole
            scoring.add(index, name, here(parameters[name]), None if derivative is None else here(derivative))
    of_whole.finish()
    if sharded:
        of_parts.finish()
        counts, sums = (sum_over_shards(part, list(sharded.values())) for part in (parts.counts, parts.sums))
        histogram.merge(Histogram(counts, sums))
    return histogram


class _Scoring:
    """Scores parameters and counts the scores.

    The parameters of a layer are scored together where the estimator is :class:`Elementwise`, so that the number of
    operations goes with the layers, but for views; in pieces of bounded size.

    Args:
        estimator: Gives the scores.
        into: What they are added to; complete after :meth:`finish`.
        device: Where they are counted.
    """

    def __init__(self, estimator: SaliencyEstimator, into: Histogram, device: torch.device) -> None:
        self._estimator = estimator
        self._counting = Counting(into)
        self._device = device
        declared = isinstance(estimator, Elementwise) and estimator.elementwise
        self._joins = declared and vouched_for(estimator, "elementwise", by=("score",))
        self._kind: Tuple[Any, ...] = ()
        self._names: List[str] = []
        self._parameters: List[Tensor] = []
        self._derivatives: List[Tensor] = []
        self._size = 0

    def add(self, layer: int, name: str, parameter: Tensor, derivative: Optional[Tensor]) -> None:
        """Take a parameter of a layer and its derivative."""
        if not self._joins:
            slope = None if derivative is None else derivative.detach()
            self._counting.add(layer, self._scores(name, parameter.detach(), slope))
            return
        kind = (layer, parameter.device, parameter.dtype, None if derivative is None else derivative.dtype)
        size = parameter.numel()
        if kind != self._kind or self._size + size > chunk_on(parameter.device):
            self._score()
            self._kind = kind
        self._names.append(name)
        self._parameters.append(parameter)
        if derivative is not None:
            self._derivatives.append(derivative)
        self._size += size

    def finish(self) -> None:
        """Count what was gathered."""
        self._score()
        self._counting.finish()

    def _score(self) -> None:
        names, size = self._names, self._size
        values, slopes = self._parameters, self._derivatives
        self._names, self._parameters, self._derivatives, self._size = [], [], [], 0
        if not size:
            return
        layer, device = self._kind[:2]
        chunk = chunk_on(device)
        parts = [_pieces(tensors, chunk) for tensors in (values, slopes)]
        for value, slope in zip_longest(*parts):
            self._counting.add_chunk(layer, self._scores(", ".join(names), value, slope))

    def _scores(self, name: str, parameter: Tensor, derivative: Optional[Tensor]) -> Tensor:
        scores = _scores(self._estimator, name, parameter, derivative)
        return scores if scores.device == self._device else scores.to(self._device)


def _pieces(tensors: Sequence[Tensor], chunk: int) -> Sequence[Tensor]:
    """Return all elements as vectors without a graph, none longer than a chunk."""
    if len(tensors) > 1:
        with torch.no_grad():
            return [torch.cat([tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in tensors])]
    return [part for tensor in tensors for part in torch.split(tensor.detach().reshape(-1), chunk)]


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
