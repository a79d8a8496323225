"""LSRs averaged over the observations since the last round, in O(layers) state."""

from __future__ import annotations

from typing import Any, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Sequence, Set

import torch
from torch import Tensor

from .._host.compat import has_float64
from .._host.ranks import sum_across_ranks
from ..errors import problem
from .histogram import Histogram
from .threshold import Threshold, layer_saliency_rates

__all__ = ["Averages", "LayerRates"]


class LayerRates(NamedTuple):
    """Layer saliency rates by layer name; a layer whose rate is unknown is absent.

    Attributes:
        target: On target data.
        source: On source data.
    """

    target: Dict[str, float]
    source: Dict[str, float]


class Averages(NamedTuple):
    """LSRs averaged over the observations since the last round, and those of that round. A value: nothing changes it.

    Attributes:
        sums: By domain, the sum of each layer's rates, shape ``(L,)``.
        counts: By domain, over how many observations each was summed, shape ``(L,)``.
        known: Names of the parameters whose saliency on target data is known: as seen since the last round, or until
            then as before it, whose rates may be used again; ``None`` where nobody noted that.
        reference: Saliency on source data, as a :class:`~clda_core.saliency.ReferenceThreshold` takes it.
        frozen: Whether the reference stays as it is: it does from the first round on.
        last: The rates of the last round, for rounds that are not observed.
    """

    sums: Mapping[str, Tensor] = {}
    counts: Mapping[str, Tensor] = {}
    known: Optional[FrozenSet[str]] = None
    reference: Optional[Histogram] = None
    frozen: bool = False
    last: Optional[LayerRates] = None

    def plus(self, domain: str, histogram: Histogram, known: Set[str], threshold: Threshold) -> Averages:
        """Return the averages with one observation more.

        Args:
            domain: ``"target"`` or ``"source"``.
            histogram: The scores.
            known: Names of the parameters that they are of.
            threshold: Which of them are salient.

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
        reference, of_target = self.reference, self.known
        if domain == "source" and not self.frozen:
            reference = _merged(reference, histogram)
        if domain == "target" and domain not in self.sums:
            of_target = frozenset(known)
        elif domain == "target" and of_target is not None:
            of_target |= known
        rates = layer_saliency_rates(histogram, _value(threshold, histogram, reference)).double().cpu()
        seen = ~torch.isnan(rates)
        sums = self.sums.get(domain, 0) + torch.where(seen, rates, torch.zeros_like(rates))
        counts = self.counts.get(domain, 0) + seen.long()
        return self._replace(
            sums={**self.sums, domain: sums},
            counts={**self.counts, domain: counts},
            known=of_target,
            reference=reference,
        )

    def after_round(self, rates: LayerRates) -> Averages:
        """Return the averages after a round that went by ``rates``: none but the reference."""
        frozen = self.reference is not None
        return Averages(known=self.known, reference=self.reference, frozen=frozen, last=rates)

    def rates(self, names: Sequence[str], device: torch.device) -> LayerRates:
        """Return the mean LSR of the layers.

        The mean is over the observations of all ranks, so every rank gets the same figures; ``device`` is where the
        ranks' reduction runs.
        """
        nothing = torch.zeros(len(names), dtype=torch.float64, device="cpu")
        rows = [self.sums.get(domain, nothing) for domain in ("target", "source")]
        rows += [self.counts.get(domain, nothing).double() for domain in ("target", "source")]
        stacked = torch.stack(rows)
        table = sum_across_ranks([stacked.to(device) if has_float64(device) else stacked])[0].tolist()

        def means(sums: List[float], counts: List[float]) -> Dict[str, float]:
            return {name: total / count for name, total, count in zip(names, sums, counts) if count}

        return LayerRates(means(table[0], table[2]), means(table[1], table[3]))

    def state_dict(self) -> Dict[str, Any]:
        """Return the state as tensors and plain Python types."""
        reference, last = self.reference, self.last
        return {
            "sums": {domain: sums.clone() for domain, sums in self.sums.items()},
            "counts": {domain: counts.clone() for domain, counts in self.counts.items()},
            "known": None if self.known is None else sorted(self.known),
            "reference": None
            if reference is None
            else {"counts": reference.counts.clone(), "sums": reference.sums.clone()},
            "reference_frozen": self.frozen,
            "last": None if last is None else {"target": dict(last.target), "source": dict(last.source)},
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], layers: int) -> Averages:
        """Return what :meth:`state_dict` returned as a value again.

        Raises:
            CldaError: If the vectors are not of this many layers.
        """
        found, known, last = state["reference"], state["known"], state["last"]
        reference = None if found is None else Histogram(found["counts"].clone(), found["sums"].clone())
        sums, counts = (
            {domain: value.cpu().clone() for domain, value in state[what].items()} for what in ("sums", "counts")
        )
        vectors = [*sums.values(), *counts.values(), *([] if reference is None else [reference.sums, reference.sizes])]
        if sums.keys() != counts.keys() or any(tuple(vector.shape) != (layers,) for vector in vectors):
            raise problem(
                "the saved observations do not fit",
                expected=f"vectors of {layers} layers",
                received=str([tuple(vector.shape) for vector in vectors]),
                fix="load the state of a learner of the same architecture",
            )
        return cls(
            sums,
            counts,
            known=None if known is None else frozenset(known),
            reference=reference,
            frozen=bool(state["reference_frozen"]),
            last=None if last is None else LayerRates(dict(last["target"]), dict(last["source"])),
        )


def _value(threshold: Threshold, histogram: Histogram, reference: Optional[Histogram]) -> Tensor:
    """Return the threshold for one observation, a 0-dim tensor."""
    value = threshold(histogram, None if reference is None else _moved(reference, histogram.counts.device))
    if not isinstance(value, Tensor) or value.dim() != 0:
        name = getattr(threshold, "__name__", type(threshold).__name__)
        raise problem(
            f"the threshold {name} returned something else",
            expected="a 0-dimensional tensor",
            received=f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__,
            fix="return torch.tensor(value) from the threshold",
        )
    return value


def _merged(base: Optional[Histogram], other: Histogram) -> Histogram:
    """Return the sum of both where ``other`` is, as a new histogram."""
    merged = Histogram(other.counts.clone(), other.sums.clone())
    if base is not None:
        merged.merge(_moved(base, other.counts.device))
    return merged


def _moved(histogram: Histogram, device: torch.device) -> Histogram:
    return Histogram(histogram.counts.to(device), histogram.sums.to(device))
