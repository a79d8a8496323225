"""From the teacher's gradients to LSRs averaged over observations, in O(layers) state."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ._distributed import sum_across_ranks
from .errors import problem
from .layers import Layer, canonical_parameters
from .saliency import SaliencyEstimator
from .saliency.histogram import Histogram
from .selection import Threshold, layer_saliency_rates

__all__ = [
    "Observations",
    "hosts_gradients",
    "leftover_gradients",
    "non_salient_elements",
    "score_layers",
    "still_leftover",
]

Leftover = Mapping[str, Tuple[Tensor, int]]
"""Gradients by parameter name, each with its version, which any write to it raises."""


def leftover_gradients(model: nn.Module) -> Dict[str, Tuple[Tensor, int]]:
    """Return the gradients that the parameters hold now.

    The tensors are held, since an address or an ``id`` may come back with the next gradient; drop them with
    :func:`still_leftover` as soon as the host has dropped them.
    """
    return {
        name: (parameter.grad, int(parameter.grad._version))
        for name, parameter in canonical_parameters(model).items()
        if parameter.grad is not None
    }


def still_leftover(model: nn.Module, leftover: Leftover) -> Dict[str, Tuple[Tensor, int]]:
    """Return those of the gradients that are still there and were not written to."""
    if not leftover:
        return {}
    now = leftover_gradients(model)
    return {
        name: (gradient, version)
        for name, (gradient, version) in leftover.items()
        if name in now and now[name][0] is gradient and now[name][1] == version
    }


def hosts_gradients(model: nn.Module, leftover: Leftover) -> Dict[str, Tensor]:
    """Return the gradients that the host computed, by parameter name.

    Those that are zero in every element are left out: ``zero_grad()`` without ``set_to_none`` leaves them on parameters
    that the loss does not use, whose saliency is unknown. Synchronises once with the device.

    Args:
        model: The teacher.
        leftover: Gradients to ignore: those from before the learner was built.
    """
    stale = still_leftover(model, leftover)
    found = {
        name: parameter.grad
        for name, parameter in canonical_parameters(model).items()
        if parameter.requires_grad and parameter.grad is not None and name not in stale
    }
    if not found:
        return {}
    device = next(iter(found.values())).device
    used: List[bool] = torch.stack([gradient.ne(0).any().to(device) for gradient in found.values()]).tolist()
    return {name: gradient for (name, gradient), flag in zip(found.items(), used) if flag}


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
    histogram = Histogram.empty(len(layers), device)
    for index, layer in enumerate(layers):
        for name in layer.parameters:
            if found[name] is not None or estimator.order == 0:
                histogram.add(index, _scores(estimator, name, parameters[name], found[name]).to(device))
    return histogram


def non_salient_elements(
    estimator: SaliencyEstimator,
    parameters: Mapping[str, Tensor],
    found: Mapping[str, Optional[Tensor]],
    threshold: Tensor,
) -> Dict[str, Tensor]:
    """Return, by parameter name, True where the saliency does not exceed the threshold; False where it is unknown."""
    return {
        name: torch.zeros_like(parameters[name], dtype=torch.bool)
        if derivative is None and estimator.order > 0
        else _scores(estimator, name, parameters[name], derivative) <= threshold.to(parameters[name].device)
        for name, derivative in found.items()
    }


def _scores(estimator: SaliencyEstimator, name: str, parameter: Tensor, derivative: Optional[Tensor]) -> Tensor:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    scores = estimator.score(parameter.detach().to(wide), None if derivative is None else derivative.detach().to(wide))
    if not isinstance(scores, Tensor) or scores.shape != parameter.shape:
        received = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise problem(
            f"the saliency estimator {type(estimator).__name__} returned no scores for {name!r}",
            expected=f"a tensor of shape {tuple(parameter.shape)}",
            received=received,
            fix="return one non-negative score for each element of the parameter",
        )
    return scores


class Observations:
    """LSRs averaged over the observations since the last round, for target and source data.

    Args:
        layers: Number of layers :math:`L`.

    Note:
        Holds two vectors of length :math:`L` a domain, and a histogram of the source's saliency as the reference of
        :class:`~clda_core.selection.ReferenceThreshold`, which is frozen at the first round.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._sums: Dict[str, Tensor] = {}
        self._counts: Dict[str, Tensor] = {}
        self._reference: Optional[Histogram] = None
        self._reference_frozen = False

    def add(self, domain: str, histogram: Histogram, threshold: Threshold) -> None:
        """Add one observation.

        Raises:
            CldaError: If the estimator gave negative scores, or the threshold needs source data not yet observed.
        """
        if bool(histogram.negative):
            raise problem(
                "the saliency estimator returned negative scores",
                expected="non-negative scores",
                received="at least one below 0",
                fix="return an absolute value or a square",
            )
        if domain == "source" and not self._reference_frozen:
            self._reference = _merged(self._reference, histogram)
        rates = layer_saliency_rates(histogram, self.threshold(threshold, histogram)).double().cpu()
        known = ~torch.isnan(rates)
        if domain not in self._sums:
            self._sums[domain] = torch.zeros(self._layers, dtype=torch.float64)
            self._counts[domain] = torch.zeros(self._layers, dtype=torch.int64)
        self._sums[domain] += torch.where(known, rates, torch.zeros_like(rates))
        self._counts[domain] += known.long()

    def threshold(self, threshold: Threshold, histogram: Histogram, pending: Sequence[Histogram] = ()) -> Tensor:
        """Return the threshold for one observation, a 0-dim tensor.

        Args:
            threshold: The strategy.
            histogram: The observation.
            pending: Observations of source data that are not added yet.
        """
        reference = self._reference
        for other in () if self._reference_frozen else pending:
            reference = _merged(reference, other)
        value = threshold(histogram, None if reference is None else _moved(reference, histogram.counts.device))
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise problem(
                f"the threshold {type(threshold).__name__} returned something else",
                expected="a 0-dimensional tensor",
                received=f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__,
                fix="return torch.tensor(value) from the threshold",
            )
        return value

    def rates(self, names: Sequence[str], device: torch.device) -> Tuple[Dict[str, float], Dict[str, float]]:
        """Return the mean LSR by layer name on target and on source data; a layer that was never seen is absent.

        The mean is over the observations of all ranks, so every rank gets the same figures; ``device`` is where the
        ranks' reduction runs.
        """
        nothing = torch.zeros(self._layers, dtype=torch.float64)
        rows = [self._sums.get(domain, nothing) for domain in ("target", "source")]
        rows += [self._counts.get(domain, nothing).double() for domain in ("target", "source")]
        table = sum_across_ranks([torch.stack(rows).to(device)])[0].tolist()

        def means(sums: List[float], counts: List[float]) -> Dict[str, float]:
            return {name: total / count for name, total, count in zip(names, sums, counts) if count}

        return means(table[0], table[2]), means(table[1], table[3])

    def start_next_round(self) -> None:
        """Forget the observations of the finished round; the reference stays."""
        self._reference_frozen = self._reference is not None
        self._sums.clear()
        self._counts.clear()

    def state_dict(self) -> Dict[str, Any]:
        """Return the state as tensors and plain Python types."""
        reference = self._reference
        return {
            "sums": {domain: sums.clone() for domain, sums in self._sums.items()},
            "counts": {domain: counts.clone() for domain, counts in self._counts.items()},
            "reference": None
            if reference is None
            else {"counts": reference.counts.clone(), "sums": reference.sums.clone()},
            "reference_frozen": self._reference_frozen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            CldaError: If the vectors are not of this many layers.
        """
        found = state["reference"]
        reference = None if found is None else Histogram(found["counts"].clone(), found["sums"].clone())
        sums = {domain: value.cpu().clone() for domain, value in state["sums"].items()}
        counts = {domain: value.cpu().clone() for domain, value in state["counts"].items()}
        vectors = [*sums.values(), *counts.values(), *([] if reference is None else [reference.sums, reference.sizes])]
        if sums.keys() != counts.keys() or any(tuple(vector.shape) != (self._layers,) for vector in vectors):
            raise problem(
                "the saved observations do not fit",
                expected=f"vectors of {self._layers} layers",
                received=str([tuple(vector.shape) for vector in vectors]),
                fix="load the state of a learner of the same architecture",
            )
        self._sums, self._counts, self._reference = sums, counts, reference
        self._reference_frozen = bool(state["reference_frozen"])


def _merged(base: Optional[Histogram], other: Histogram) -> Histogram:
    """Return the sum of both where ``other`` is, as a new histogram."""
    merged = Histogram(other.counts.clone(), other.sums.clone())
    if base is not None:
        merged.merge(_moved(base, other.counts.device))
    return merged


def _moved(histogram: Histogram, device: torch.device) -> Histogram:
    return Histogram(histogram.counts.to(device), histogram.sums.to(device))
