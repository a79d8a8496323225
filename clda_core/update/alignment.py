"""Which channel of one network plays the part of which channel of another."""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from .._host.compat import wide
from ..errors import check_number, problem

__all__ = ["ChannelMaps", "CorrelationSums", "expressed", "linear_assignment", "match_channels"]


class CorrelationSums(NamedTuple):
    """Sums over the same samples of two sets of channels, from which correlations follow; add up over ranks.

    Attributes:
        samples: Scalar, number of samples.
        first: Shape ``(p,)``, sum of each channel of the first set.
        second: Shape ``(q,)``, the same of the second.
        first_square: Shape ``(p,)``, sum of squares.
        second_square: Shape ``(q,)``, the same of the second.
        product: Shape ``(p, q)``, sum of products.
    """

    samples: Tensor
    first: Tensor
    second: Tensor
    first_square: Tensor
    second_square: Tensor
    product: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> CorrelationSums:
        """Sum over the rows of ``x``, shape ``(n, p)``, and ``y``, shape ``(n, q)``, in float64."""
        a, b = wide(x), wide(y)
        samples = a.new_tensor(float(a.shape[0]))
        return cls(samples, a.sum(0), b.sum(0), a.pow(2).sum(0), b.pow(2).sum(0), a.t() @ b)

    def correlation(self) -> Tensor:
        """Return Pearson correlations, shape ``(p, q)``; 0 where a channel does not vary."""
        a, b = self.first / self.samples, self.second / self.samples
        covariance = self.product / self.samples - a[:, None] * b[None, :]
        return (
            _whitening(self.first_square / self.samples, a)[:, None]
            * covariance
            * _whitening(self.second_square / self.samples, b)
        )

    def varying(self) -> Tuple[Tensor, Tensor]:
        """Return which channels of both sets vary, bool of shapes ``(p,)`` and ``(q,)``."""
        first, second = self.first_square / self.samples, self.second_square / self.samples
        return _whitening(first, self.first / self.samples) > 0, _whitening(second, self.second / self.samples) > 0


def match_channels(correlation: Tensor, *, minimum: float = 0.0) -> List[int]:
    r"""Choose for every teacher channel the student channel that plays its part.

    Equal widths: the permutation :math:`\pi` that maximises :math:`\sum_i \mathrm{corr}(i, \pi(i))`, so that every
    student channel is used once. Unequal widths: each teacher channel takes its most correlated student channel, so
    that several may take the same. Near-ties (1e-6) keep the order.

    Args:
        correlation: Shape ``(p, q)``: teacher channels x student channels, in [-1, 1].
        minimum: A match must be correlated by more than this, in [0, 1).

    Returns:
        The student channel of each teacher channel; -1 where there is none.

    Raises:
        CldaError: If ``minimum`` is out of range.

    Example:
        >>> match_channels(torch.tensor([[0.1, 0.9], [0.8, 0.7]]))
        [1, 0]
        >>> match_channels(torch.tensor([[0.1, 0.9], [0.8, 0.7], [-0.1, -0.2]]))
        [1, 0, -1]

    References:
        Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020. <https://arxiv.org/abs/1910.05653>
        Ainsworth et al., Git Re-Basin, ICLR 2023 (activation matching). <https://arxiv.org/abs/2209.04836>
    """
    check_number("minimum", minimum, at_least=0, below=1)
    values = correlation.detach().to("cpu", torch.float64)
    if values.shape[0] == values.shape[1]:
        chosen = linear_assignment(-values - 1e-6 * torch.eye(values.shape[0], dtype=values.dtype, device="cpu"))
    else:
        chosen = values.argmax(1).tolist() if values.shape[1] else [-1] * values.shape[0]
    table = values.numpy()
    return [column if column >= 0 and table[row, column] > minimum else -1 for row, column in enumerate(chosen)]


class Counterparts:
    """Which student channels play the parts of the teacher's.

    Attributes:
        match: The student channel of every teacher channel, -1 where there is none.
        channels: The teacher channels that have a counterpart.
        partners: Their counterparts.
        multiplicity: How many teacher channels have each of these counterparts; ``None`` if none has more than one.
    """

    def __init__(self, match: Union[Sequence[int], Tensor]) -> None:
        self.match = torch.as_tensor(match, dtype=torch.int64, device="cpu")
        self.channels = torch.where(self.match >= 0)[0]
        self.partners = self.match[self.channels]
        multiplicity = torch.bincount(self.partners)[self.partners]
        self.multiplicity = multiplicity if bool((multiplicity > 1).any()) else None

    @property
    def complete(self) -> bool:
        """Whether every teacher channel has one."""
        return len(self.channels) == len(self.match)


class ChannelMaps:
    """The counterparts of the channels that go into a module, and of those that come out."""

    def __init__(self, into: Union[Sequence[int], Tensor], out: Union[Sequence[int], Tensor]) -> None:
        self.into, self.out = Counterparts(into), Counterparts(out)


def expressed(target: Tensor, source: Tensor, maps: ChannelMaps, depthwise: bool) -> Optional[Tensor]:
    """Return the student's tensor in the teacher's basis, the teacher's values where channels have no counterpart.

    Returns:
        ``None`` if no element has a counterpart, or the maps do not fit the tensors.
    """
    if target.dim() == 0:
        return None
    into, out = maps.into, maps.out
    per_channel = target.dim() == 1 or depthwise
    fits = target.shape[0] == len(out.match) and (per_channel or target.shape[1] == len(into.match))
    if not fits or not len(out.channels) or not (per_channel or len(into.channels)):
        return None
    device = target.device
    chosen = source.to(target).index_select(0, out.partners.to(device))
    if not per_channel:
        chosen = chosen.index_select(1, into.partners.to(device))
        if into.multiplicity is not None:
            chosen = chosen / into.multiplicity.to(target).view(1, -1, *[1] * (target.dim() - 2))
    if out.complete and (per_channel or into.complete):
        return chosen
    result = target.clone()
    if per_channel:
        result[out.channels.to(device)] = chosen
    else:
        result[out.channels.to(device)[:, None], into.channels.to(device)] = chosen
    return result


def linear_assignment(cost: Tensor) -> List[int]:
    r"""Solve the linear assignment problem exactly: the permutation of least total cost.

    Minimises :math:`\sum_i \mathrm{cost}(i, \pi(i))` over permutations :math:`\pi` by shortest augmenting paths on
    reduced costs, after a first pass that assigns what is free: :math:`O(n^3)`, each step vectorised over the columns.

    Args:
        cost: Shape ``(n, n)``, finite; used in float64 on the CPU, so that differences below about 1e-15 of the largest
            magnitude may be lost.

    Returns:
        :math:`\pi`: the column of each row.

    Raises:
        CldaError: If ``cost`` is not square or not finite.

    Example:
        >>> linear_assignment(torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]]))
        [1, 0, 2]

    References:
        Jonker and Volgenant, A shortest augmenting path algorithm for dense and sparse linear assignment problems,
        Computing 38, 1987. Crouse, On implementing 2D rectangular assignment algorithms, IEEE TAES 2016.
    """
    values = cost.detach().to("cpu", torch.float64)
    if values.dim() != 2 or values.shape[0] != values.shape[1] or not bool(torch.isfinite(values).all()):
        raise problem(
            "the assignment problem is not well-defined",
            expected="a square matrix of finite costs",
            received=f"shape {tuple(values.shape)}, all finite: {bool(torch.isfinite(values).all())}",
            fix="pass an (n, n) matrix without NaN or infinity",
        )
    size = values.shape[0]
    if size == 0:
        return []
    costs = _in_range(values.numpy())  # the steps below are too small for torch, whose calls take several times as long
    lowest = costs.min(1)
    column_price = (costs - lowest[:, None]).min(0)
    column_of, row_of = _greedy(costs - lowest[:, None] - column_price)
    row_price = lowest.tolist()
    for start in range(size):
        if column_of[start] < 0:
            _augment(start, costs, row_price, column_price, column_of, row_of)
    return column_of


def _in_range(costs: Any) -> Any:
    """Scale costs by a power of two to a largest magnitude of about 1: no sum overflows, and nothing is rounded."""
    exponent = int(np.frexp(np.abs(costs).max())[1])
    return np.ldexp(costs, -exponent)


def _greedy(reduced: Any) -> Tuple[List[int], List[int]]:
    """Assign rows and columns that meet at a reduced cost of zero, as long as both are free."""
    size = reduced.shape[0]
    column_of, row_of = [-1] * size, [-1] * size
    free = np.ones(size, dtype=bool)
    for row in range(size):
        possible = (reduced[row] <= 0) & free
        column = int(possible.argmax())
        if possible[column]:
            column_of[row], row_of[column], free[column] = column, row, False
    return column_of, row_of


def _augment(
    start: int, cost: Any, row_price: List[float], column_price: Any, column_of: List[int], row_of: List[int]
) -> None:
    """Assign one more row along the shortest path of reduced costs from it to a free column (Dijkstra)."""
    infinity = float("inf")
    distance = np.full_like(column_price, infinity)
    closed = np.zeros_like(column_price)
    via = np.zeros_like(column_price, dtype=np.int64)
    visited: List[Tuple[int, float]] = []
    row, reached = start, 0.0
    while True:
        candidate = cost[row] - column_price
        candidate += closed + (reached - row_price[row])
        via[candidate < distance] = row
        np.minimum(distance, candidate, out=distance)
        column = int(distance.argmin())
        reached = float(distance[column])
        if row_of[column] < 0:
            break
        visited.append((column, reached))
        distance[column] = closed[column] = infinity
        row = row_of[column]
    row_price[start] += reached
    for passed, before in visited:
        row_price[row_of[passed]] += reached - before
        column_price[passed] -= reached - before
    while True:
        row = int(via[column])
        row_of[column] = row
        column_of[row], column = column, column_of[row]
        if row == start:
            return


def _whitening(square: Tensor, mean: Tensor) -> Tensor:
    """Return one over the standard deviation, and 0 where there is none beyond rounding."""
    variance = square - mean.pow(2)
    varies = variance > 1e-10 * square
    return torch.where(varies, torch.where(varies, variance, torch.ones_like(variance)).rsqrt(), torch.zeros_like(mean))
