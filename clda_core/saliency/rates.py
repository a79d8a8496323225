"""LSRs averaged over the observations since the last round, in O(layers) state."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._host.compat import has_float64
from .._host.ranks import sum_across_ranks
from ..errors import problem
from .histogram import Histogram
from .threshold import Threshold, layer_saliency_rates


class Observations:
    """LSRs averaged over the observations since the last round, for target and source data.

    Args:
        layers: Number of layers :math:`L`.

    Note:
        Holds two vectors of length :math:`L` a domain, and a histogram of the source's saliency as the reference of
        :class:`~clda_core.saliency.ReferenceThreshold`, which is frozen at the first round.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._sums: Dict[str, Tensor] = {}
        self._counts: Dict[str, Tensor] = {}
        self._reference: Optional[Histogram] = None
        self._reference_frozen = False

    def copy(self) -> Observations:
        """Return the same observations, to add to without changing these."""
        other = Observations(self._layers)
        other._sums, other._counts = dict(self._sums), dict(self._counts)
        other._reference, other._reference_frozen = self._reference, self._reference_frozen
        return other

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
        added = {"sums": torch.where(known, rates, torch.zeros_like(rates)), "counts": known.long()}
        self._sums[domain] = self._sums.get(domain, 0) + added["sums"]
        self._counts[domain] = self._counts.get(domain, 0) + added["counts"]

    def threshold(self, threshold: Threshold, histogram: Histogram) -> Tensor:
        """Return the threshold for one observation, a 0-dim tensor.

        Args:
            threshold: The strategy.
            histogram: The observation.
        """
        reference = self._reference
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
        nothing = torch.zeros(self._layers, dtype=torch.float64, device="cpu")
        rows = [self._sums.get(domain, nothing) for domain in ("target", "source")]
        rows += [self._counts.get(domain, nothing).double() for domain in ("target", "source")]
        stacked = torch.stack(rows)
        table = sum_across_ranks([stacked.to(device) if has_float64(device) else stacked])[0].tolist()

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
