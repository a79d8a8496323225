"""From the teacher's gradients to LSRs averaged over observations, in O(layers) state."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .errors import problem
from .layers import Layer, canonical_parameters
from .saliency import SaliencyEstimator
from .saliency.histogram import Histogram
from .selection import Threshold, layer_saliency_rates

__all__ = ["Observations", "hosts_gradients", "non_salient_elements", "score_layers"]

Stamp = Tuple[int, int]


def hosts_gradients(model: nn.Module, leftover: Mapping[str, Stamp]) -> Dict[str, Stamp]:
    """Return which parameters hold a gradient that the host computed, each with a stamp that changes when it does.

    Args:
        model: The teacher.
        leftover: Stamps of gradients to ignore: those from before the learner was built.
    """
    stamps = {
        name: (id(parameter.grad), int(parameter.grad._version))
        for name, parameter in canonical_parameters(model).items()
        if parameter.requires_grad and parameter.grad is not None
    }
    return {name: stamp for name, stamp in stamps.items() if leftover.get(name) != stamp}


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
            if self._reference is None:
                self._reference = Histogram(histogram.counts.clone(), histogram.sums.clone())
            else:
                self._reference.merge(histogram)
        rates = layer_saliency_rates(histogram, self.threshold(threshold, histogram)).double().cpu()
        known = ~torch.isnan(rates)
        if domain not in self._sums:
            self._sums[domain] = torch.zeros(self._layers, dtype=torch.float64)
            self._counts[domain] = torch.zeros(self._layers, dtype=torch.int64)
        self._sums[domain] += torch.where(known, rates, torch.zeros_like(rates))
        self._counts[domain] += known.long()

    def threshold(self, threshold: Threshold, histogram: Histogram) -> Tensor:
        """Return the threshold for one observation, a 0-dim tensor."""
        value = threshold(histogram, self._reference)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise problem(
                f"the threshold {type(threshold).__name__} returned something else",
                expected="a 0-dimensional tensor",
                received=f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__,
                fix="return torch.tensor(value) from the threshold",
            )
        return value

    def seen(self, domain: str) -> bool:
        """Return whether a domain was observed since the last round."""
        return domain in self._counts

    def rates(self, domain: str, names: Sequence[str]) -> Dict[str, float]:
        """Return the mean LSR by layer name; a layer that was never seen is absent."""
        if not self.seen(domain):
            return {}
        sums, counts = self._sums[domain].tolist(), self._counts[domain].tolist()
        return {name: sums[index] / counts[index] for index, name in enumerate(names) if counts[index]}

    def start_next_round(self) -> None:
        """Forget the observations of the finished round; the reference stays."""
        self._reference_frozen = self._reference is not None
        self._sums.clear()
        self._counts.clear()

    def state_dict(self) -> Dict[str, Any]:
        """Return the state as tensors and plain Python types."""
        reference = self._reference
        return {
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "reference": None if reference is None else {"counts": reference.counts, "sums": reference.sums},
            "reference_frozen": self._reference_frozen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        reference = state["reference"]
        self._sums = {domain: sums.clone() for domain, sums in state["sums"].items()}
        self._counts = {domain: counts.clone() for domain, counts in state["counts"].items()}
        self._reference = None if reference is None else Histogram(reference["counts"], reference["sums"])
        self._reference_frozen = bool(state["reference_frozen"])
