"""Saliency scores of a whole model, layer by layer, in bounded memory."""

from __future__ import annotations

import functools
import math
from typing import List, Optional, Tuple, Union

import torch
from torch import Tensor

from .._host.compat import has_float64, leading_bits
from ..errors import check_number, problem

__all__ = ["Histogram", "fraction_above", "mean", "quantile"]

_BITS = 12
_BINS = 1 << _BITS
_SIGN = _BINS // 2
_NORMAL = 8
_INFINITE = _SIGN - 8
CHUNK = 1 << 18
"""Scores that are counted at once on a CPU, where they stay in its cache; as many are gathered before that."""

_CHUNK_ELSEWHERE = 1 << 22
"""The same on other devices, where every operation takes time to launch, and memory is short: 16 MiB."""


class Histogram:
    r"""Counts of scores by layer and bin, and their sums: all that thresholds and saliency rates need.

    A score's bin is the leading 12 bits of its float32 representation, which are its sign, its exponent and the top
    three bits of its mantissa: eight bins of equal width for each octave, over the whole range of float32. So nothing
    is clipped, no range is fitted to data, histograms of different batches and ranks add up, and multiplying all
    scores by a power of two moves every count by whole octaves. Zero and subnormal scores (below ``2 ** -126``) are one
    bin, taken as zero. Within a bin scores are taken as evenly spread.

    Attributes:
        counts: Shape ``(L, 4096)``, int64: scores by layer and bin.
        sums: Shape ``(L,)``, float64: sums of the scores by layer.

    Args:
        counts: See above; kept, not copied.
        sums: See above; kept, not copied.

    Note:
        Memory is 32 KiB per layer, whatever the model's size. Deterministic: integer counts, and sums in a fixed order.

    Example:
        >>> histogram = Histogram.empty(2)
        >>> histogram.add(0, torch.tensor([0.0, 1.0, 2.0, 4.0]))
        >>> fraction_above(histogram, 1.5)
        tensor([0.5000,    nan], dtype=torch.float64)
    """

    def __init__(self, counts: Tensor, sums: Tensor) -> None:
        self.counts = counts
        self.sums = sums

    @classmethod
    def empty(cls, layers: int, device: Union[torch.device, str, None] = None) -> Histogram:
        """Return a histogram of ``layers`` layers that has seen no score.

        Args:
            layers: Number of layers, >= 1.
            device: Where scores will be. A device without float64 counts its scores and leaves the rest to the CPU.

        Raises:
            CldaError: If ``layers`` is no integer >= 1.
        """
        check_number("layers", layers, at_least=1, integer=True)
        if device is not None and not has_float64(torch.device(device)):
            device = "cpu"
        return cls(
            torch.zeros(layers, _BINS, dtype=torch.int64, device=device),
            torch.zeros(layers, dtype=torch.float64, device=device),
        )

    def add(self, layer: int, *scores: Tensor) -> None:
        """Count scores of one layer; several small tensors at once take less time than one by one.

        Args:
            layer: Index of the layer.
            scores: Any shape, any floating dtype (read as float32: what is larger is infinite), all on one device.
                Invalid scores are accepted here and seen in :attr:`finite` and :attr:`negative`.

        Note:
            The one place that synchronises with a CUDA device (``torch.bincount`` does).
        """
        counting = Counting(self)
        for part in scores:
            counting.add(layer, part.detach())
        counting.finish()

    def merge(self, other: Histogram) -> None:
        """Add the counts of a histogram over the same layers, in place.

        Raises:
            CldaError: If the numbers of layers differ.
        """
        if self.counts.shape != other.counts.shape:
            raise problem(
                "the histograms are of different layers",
                expected=f"{self.counts.shape[0]} layers",
                received=f"{other.counts.shape[0]} layers",
                fix="merge histograms of the same model and grouping",
            )
        self.counts += other.counts
        self.sums += other.sums

    @property
    def sizes(self) -> Tensor:
        """Number of scores seen in each layer, shape ``(L,)``, int64."""
        return self.counts.sum(dim=1)

    @property
    def seen(self) -> Tensor:
        """Which layers have seen a score, shape ``(L,)``, bool."""
        return self.sizes > 0

    @property
    def finite(self) -> Tensor:
        """Whether no score is infinite or NaN, 0-dim, bool."""
        return (self.counts[:, _INFINITE:_SIGN].sum() + self.counts[:, _SIGN + _INFINITE :].sum()) == 0

    @property
    def negative(self) -> Tensor:
        """Whether a score is negative, which no estimator may return, 0-dim, bool."""
        return self.counts[:, _SIGN + _NORMAL : _SIGN + _INFINITE].sum() > 0


def chunk_on(device: torch.device) -> int:
    """Return how many scores are counted at once on a device."""
    return CHUNK if device.type == "cpu" else _CHUNK_ELSEWHERE


class Counting:
    """Counts the scores of one parameter after the other, those of several small ones of a layer at once.

    On a CPU that is done chunk by chunk in one piece of memory, which stays in the cache.

    Args:
        into: What they are added to; complete after :meth:`finish`.
    """

    def __init__(self, into: Histogram) -> None:
        self._counts = into.counts.unbind()
        self._sums = into.sums.unbind()
        self._layer = 0
        self._parts: List[Tensor] = []
        self._size = 0
        self._memory: Optional[Tensor] = None

    def add(self, layer: int, scores: Tensor) -> None:
        """Take scores of a layer, without a graph; see :meth:`Histogram.add`."""
        size = scores.numel()
        if layer != self._layer or self._size + size > chunk_on(scores.device):
            self.finish()
            self._layer = layer
        self._parts.append((scores if scores.dim() == 1 else scores.reshape(-1)).float())
        self._size += size

    def finish(self) -> None:
        """Count what was gathered."""
        parts, size = self._parts, self._size
        self._parts, self._size = [], 0
        if not size:
            return
        if parts[0].device.type != "cpu":
            self._count(self._layer, torch.cat(parts) if len(parts) > 1 else parts[0], overwrite=len(parts) > 1)
            return
        if self._memory is None:
            self._memory = torch.empty(CHUNK, device="cpu")
        if size <= CHUNK:
            self._count(self._layer, torch.cat(parts, out=self._memory[:size]), overwrite=True)
            return
        for chunk in torch.split(parts[0], CHUNK):
            self._count(self._layer, self._memory[: chunk.numel()].copy_(chunk), overwrite=True)

    def add_chunk(self, layer: int, scores: Tensor) -> None:
        """Take a vector of scores of a layer that was gathered already, at most :func:`chunk_on` its device."""
        self._count(layer, scores.float(), overwrite=False)

    def _count(self, layer: int, scores: Tensor, *, overwrite: bool) -> None:
        counts, total = self._counts[layer], self._sums[layer]
        precise = torch.float64 if has_float64(scores.device) else torch.float32
        total.add_(scores.sum(dtype=precise).to(total.device))
        found = torch.bincount(leading_bits(scores, _BITS, overwrite=overwrite), minlength=_BINS)
        counts.add_(found.to(counts.device))


def quantile(histogram: Histogram, q: float) -> Tensor:
    """Return the score that a fraction ``q`` of all seen scores of the model does not exceed.

    Every parameter counts once, so large layers weigh more. The result lies in the right bin (relative error at most
    1/8), linearly interpolated inside it; it is 0 where at least that fraction of the scores is zero.

    Args:
        histogram: The model's scores.
        q: In (0, 1).

    Returns:
        0-dim, float64, on the histogram's device; NaN where nothing was seen.

    Raises:
        CldaError: If ``q`` is out of range.
    """
    check_number("q", q, above=0, below=1)
    counts = _masses(histogram).sum(dim=0)
    # Summed up as integers, which CUDA does in deterministic mode too.
    masses, cumulative = counts.double(), counts.cumsum(dim=0).double()
    rank = cumulative[-1:] * q
    place = torch.searchsorted(cumulative, rank)
    mass = masses.index_select(0, place)
    lower, width = _edges_at(place, histogram.counts.device)
    share = (rank - cumulative.index_select(0, place) + mass) / mass
    return ((lower + share * width) * (place > 0))[0]


def mean(histogram: Histogram) -> Tensor:
    """Return the mean of all seen scores of the model, 0-dim, float64; NaN where nothing was seen."""
    return histogram.sums.sum() / histogram.sizes.sum()


def fraction_above(histogram: Histogram, threshold: Union[Tensor, float]) -> Tensor:
    """Return the fraction of each layer's seen scores that exceeds a threshold.

    Exact but for the scores in the threshold's own bin, of which the fraction above is linearly interpolated. Zeros
    never exceed.

    Args:
        histogram: The model's scores.
        threshold: 0-dim, >= 0.

    Returns:
        Shape ``(L,)``, float64, in [0, 1]; NaN for a layer that saw no score, or where the threshold is NaN.
    """
    masses = _masses(histogram)
    value = torch.as_tensor(threshold, dtype=torch.float64, device=masses.device).reshape(1)
    place = torch.searchsorted(_edges(masses.device)[1:-1], value, right=True)
    lower, width = _edges_at(place, masses.device)
    share = ((lower + width - value) / width).clamp(0, 1) * (place > 0)
    inside = masses.index_select(1, place)[:, 0]
    totals = masses.sum(dim=1)
    beyond = totals - masses.cumsum(dim=1).index_select(1, place)[:, 0]
    fractions = (beyond.double() + inside * share) / totals
    return torch.where(torch.isnan(value), value, fractions)


def _masses(histogram: Histogram) -> Tensor:
    """Return the counts of valid scores ``(L, bins)``: zero and subnormals first, then the normal bins in order."""
    counts = histogram.counts
    zero = counts[:, :_NORMAL].sum(dim=1) + counts[:, _SIGN : _SIGN + _NORMAL].sum(dim=1)
    return torch.cat([zero[:, None], counts[:, _NORMAL:_INFINITE]], dim=1)


@functools.lru_cache(maxsize=4)
def _edges(device: torch.device) -> Tensor:
    edges = [math.ldexp(8 + index % 8, index // 8 - 130) for index in range(_NORMAL, _INFINITE + 1)]
    return torch.tensor([0.0, *edges], dtype=torch.float64, device=device)


def _edges_at(place: Tensor, device: torch.device) -> Tuple[Tensor, Tensor]:
    edges = _edges(device)
    lower = edges.index_select(0, place)
    return lower, edges.index_select(0, place + 1) - lower
