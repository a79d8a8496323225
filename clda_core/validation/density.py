"""Soft neighbourhood density: whether each prediction lies in a dense neighbourhood of alike ones."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

from .._host.compat import autocast_off, wide
from ..errors import check_number, problem
from ..strategy import Strategy
from .sums import at_positions, precise, probabilities

__all__ = ["NeighbourhoodDensity"]

_ELEMENTS = 1 << 20
"""Similarities worked on at a time."""


class NeighbourhoodDensity(Strategy):
    r"""Soft neighbourhood density: mean entropy of each prediction's similarity to the others of its batch, in nats.

    .. math:: \overline{H(P_i)}, \qquad
        P_{ij} = \frac{\exp(s_{ij} / \tau)}{\sum_{k \ne i} \exp(s_{ik} / \tau)}, \quad j \ne i

    with the cosine similarity :math:`s_{ij}` of the predicted probabilities at positions :math:`i` and :math:`j`. The
    entropy is high where a prediction has many near neighbours: where the network has formed dense clusters of target
    data. The source takes all target data for one batch; here the score is the mean over batches.

    Args:
        temperature: :math:`\tau`, > 0.
        samples: Of how many positions of a batch similarities are taken, >= 2, though of at least one for each image.
            Of more, each image gives as many, evenly spaced among those that count.

    Raises:
        CldaError: If an argument is out of range.

    Note:
        The statistics are the number of batches and the sum of their scores. A batch with fewer than two positions
        that count is not counted. A mask says which positions are neighbours at all; its weights then weigh the
        entropies. Time is quadratic in ``samples``.

    Example:
        >>> validator = NeighbourhoodDensity()
        >>> alike, apart = torch.zeros(4, 4), 99 * torch.eye(4)[[0, 0, 1, 2]]
        >>> [round(validator.score(validator.statistics(logits)).item(), 4) for logits in (alike, apart)]
        [1.0986, 0.5493]

    References:
        Saito et al., Tune it the Right Way: Unsupervised Validation of Domain Adaptation via Soft Neighborhood Density,
        ICCV 2021. <https://arxiv.org/abs/2108.10860>
    """

    needs_view = False

    def __init__(self, *, temperature: float = 0.05, samples: int = 1024) -> None:
        check_number("temperature", temperature, above=0)
        check_number("samples", samples, at_least=2, integer=True)
        self.temperature = temperature
        self.samples = samples

    def statistics(self, logits: Tensor, view_logits: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Tensor:
        """Return 1 and the score of one batch of logits ``(N, C, ...)``, or zeros if it has none: shape ``(2,)``."""
        (given,), weights = at_positions(self, logits, view_logits, mask)
        with torch.no_grad(), autocast_off(given.device.type):
            index, valid = _evenly(weights > 0, max(1, self.samples // len(given)))
            picked = wide(precise(given).gather(2, index.unsqueeze(1).expand(-1, given.shape[1], -1)))
            picked = picked.masked_fill(~valid.unsqueeze(1), 0.0)
            broken = picked.sum() * 0.0
            p = probabilities(picked)[0].transpose(1, 2).reshape(-1, given.shape[1])
            entropies = _entropies(p / p.norm(dim=1, keepdim=True), valid.reshape(-1), self.temperature)
            weights = (weights.gather(1, index) * valid).reshape(-1)
            density = (weights * entropies).sum() / weights.sum() + broken
            seen = valid.sum() > 1
            counted = torch.stack([torch.ones_like(density), density])
            return torch.where(seen, counted, torch.zeros_like(counted))

    def score(self, statistics: Tensor) -> Tensor:
        """Return the mean over batches, >= 0; NaN if the statistics have seen none."""
        if tuple(statistics.shape) != (2,):
            raise problem(
                "these are no statistics of NeighbourhoodDensity",
                expected="shape (2,)",
                received=f"shape {tuple(statistics.shape)}",
                fix="pass what its statistics() returned, or a sum of these",
            )
        batches, densities = statistics.unbind()
        return (densities / batches).masked_fill(batches == 0, float("nan"))


def _evenly(counts: Tensor, most: int) -> Tuple[Tensor, Tensor]:
    """Return at most so many positions of each image that count, evenly spaced among these, without a draw.

    Args:
        counts: Which positions count, shape ``(N, P)``.
        most: The number, >= 1.

    Returns:
        Their indices ``(N, K)``, and which of these are meant ``(N, K)``: an image may have fewer. Waits for no device.
    """
    most = min(most, counts.shape[1])
    rank = counts.long().cumsum(1)
    total = rank[:, -1:]
    taken = total.clamp(max=most)
    slot = torch.arange(most, device=counts.device).expand(len(counts), -1)
    target = (wide(slot * total) / wide(taken.clamp(min=1))).floor().long() + 1
    index = torch.searchsorted(rank, target.contiguous())
    return index.clamp(max=counts.shape[1] - 1), slot < taken


def _entropies(directions: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Return the entropy of each row's softmax over the similarities to all other valid rows, some rows at a time."""
    count = len(directions)
    never = torch.finfo(directions.dtype).min / 8
    numbers = torch.arange(count, device=directions.device)
    found = []
    for rows in torch.split(numbers, max(1, _ELEMENTS // count)):
        banned = ~valid.unsqueeze(0) | (rows.unsqueeze(1) == numbers.unsqueeze(0))
        similarity = (directions[rows] @ directions.t() / temperature).masked_fill(banned, never)
        log_p = similarity - similarity.amax(1, keepdim=True)
        shares = log_p.exp()
        total = shares.sum(1)
        found.append(total.log() - (shares * log_p).sum(1) / total)
    return torch.cat(found)
