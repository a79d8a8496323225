"""What validators share: the logits of a batch and of its view at the same positions, and sums over these."""

from __future__ import annotations

from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._host.compat import autocast_off, wide
from ..distillation.chunked import in_chunks
from ..distillation.masks import nearest, per_position, valid_mask
from ..distillation.positions import align, computing_dtype, smaller_grid
from ..errors import problem
from ..strategy import Strategy

__all__ = [
    "MeanByPrediction",
    "Positions",
    "at_positions",
    "by_prediction",
    "of_rows",
    "one_hot",
    "precise",
    "probabilities",
    "ratio",
    "summed",
]

Terms = Callable[..., Sequence[Tensor]]
"""``terms(values, weights, *beside)``: sums over some positions, each a scalar or ``(C,)``.

``values`` are the logits ``(1 or 2, n, C, p)`` in float64, which may be overwritten; ``weights`` and each of
``beside`` are ``(n, p)``.
"""


class Positions(NamedTuple):
    """The logits of a batch at its positions.

    Attributes:
        logits: Shape ``(N, C, P)`` each, as given: the batch's, and those on the second view where there is one.
        weights: Shape ``(N, P)``, float64, >= 0, as the mask has them: only so do sums of batches equal those of one.
    """

    logits: List[Tensor]
    weights: Tensor


def at_positions(whose: Any, logits: Tensor, view_logits: Optional[Tensor], mask: Optional[Tensor]) -> Positions:
    """Bring the logits and those on the view to the same positions; of two grids the smaller one is taken.

    Args:
        whose: The validator. A view that it does not need is left out.
        logits: Shape ``(N, C, ...)``.
        view_logits: The same on the second view.
        mask: Bool or float weights.

    Raises:
        CldaError: If the logits cannot be used, the view is missing or does not fit, or the mask does not fit.
    """
    name = type(whose).__name__
    _check_logits(logits, "logits")
    if whose.needs_view:
        _check_view(name, logits, view_logits)
    mask = valid_mask(mask, None)
    view = view_logits if whose.needs_view and view_logits is not None else logits
    weights = wide(logits.new_ones(1, 1))
    grid = smaller_grid(logits, view)
    if mask is not None:
        weights = wide(per_position(mask, logits, grid, "mask").detach())
        weights = nearest(weights.masked_fill(~(weights > 0), 0.0), grid).reshape(len(weights), -1)
    first, second, _ = align(logits.detach(), view, mask)
    tensors = [first, second] if whose.needs_view else [first]
    return Positions(tensors, weights.expand(first.shape[0], first.shape[2]))


def summed(positions: Positions, terms: Terms, *beside: Tensor) -> Tensor:
    """Return the sums that ``terms`` makes, over all positions, behind each other in one vector.

    They are NaN if the logits at a position that counts are not finite, as predictions of which could be.

    Args:
        positions: Of one batch.
        terms: See :data:`Terms`.
        beside: What else ``terms`` is given of each position, ``(N, P)``.
    """
    like, weights = positions.logits[0], positions.weights
    total: Optional[Tensor] = None
    with torch.no_grad(), autocast_off(like.device.type):
        for chunk, values in in_chunks(positions.logits, weights):
            where = (chunk[0], chunk[2])
            broken = values.sum() * 0.0  # NaN where any value is NaN or infinite
            parts = terms(values, weights[where], *(one[where] for one in beside))
            part = torch.cat([one.reshape(-1) for one in parts]) + broken
            total = part if total is None else total + part
    return wide(like.new_zeros(0)) if total is None else total


def precise(logits: Tensor) -> Tensor:
    """Return logits in float32, or float64 if they are: old versions of torch compare no half precision on a CPU."""
    return logits.to(computing_dtype(logits, logits))


def probabilities(logits: Tensor) -> Tuple[Tensor, Tensor]:
    """Return the probabilities along dimension 1 and their logarithms, which are finite for all logits of float32."""
    log_p = logits - logits.amax(1, keepdim=True)
    p = log_p.exp()
    total = p.sum(1, keepdim=True)
    return p.div_(total), log_p.sub_(total.log())


def one_hot(values: Tensor) -> Tensor:
    """Return 1 for the class that logits ``(n, C, p)`` predict, 0 for all others; of equal logits the first counts."""
    label = values.max(1, keepdim=True)[1]  # argmax along this dimension takes four times as long on a CPU
    return torch.zeros_like(values).scatter_(1, label, 1.0)


def by_prediction(predicted: Tensor, *of_position: Tensor) -> List[Tensor]:
    """Return values ``(n, p)`` summed over the positions of each predicted class: ``(C,)`` each.

    A product of matrices rather than a scatter, whose order on a GPU differs from run to run.
    """
    return [torch.matmul(predicted, value.unsqueeze(2)).sum((0, 2)) for value in of_position]


def of_rows(whose: Any, statistics: Tensor, rows: int, beside: int = 0) -> List[Tensor]:
    """Return the first ``beside`` elements, then ``rows`` vectors by class, of statistics.

    Raises:
        CldaError: If they are not of that form.
    """
    classes = (statistics.numel() - beside) // rows
    if statistics.dim() != 1 or classes < 2 or len(statistics) != beside + rows * classes:
        form = f"{beside} + {rows} x C" if beside else f"{rows} x C"
        raise problem(
            f"these are no statistics of {type(whose).__name__}",
            expected=f"shape (K,), where K = {form} for C >= 2 classes",
            received=f"shape {tuple(statistics.shape)}",
            fix="pass what its statistics() returned, or a sum of these",
        )
    return [*statistics[:beside].unbind(), *statistics[beside:].reshape(rows, classes).unbind()]


def ratio(sums: Tensor, counts: Tensor) -> Tensor:
    """Return a quotient of sums, NaN where nothing was counted."""
    return (sums / counts).masked_fill(counts == 0, float("nan"))


class MeanByPrediction(Strategy):
    """A validator whose score is a mean over positions, kept by the class that is predicted on the images."""

    needs_view: bool
    _terms: Terms
    """Returns the sums of weights and of what the mean is of, by predicted class."""

    def statistics(self, logits: Tensor, view_logits: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Tensor:
        """Return what one batch of logits ``(N, C, ...)`` adds to the score, shape ``(2 C,)``."""
        return summed(at_positions(self, logits, view_logits, mask), type(self)._terms)

    def score(self, statistics: Tensor) -> Tensor:
        """Return the mean over all positions; NaN if the statistics have seen nothing."""
        counts, sums = of_rows(self, statistics, 2)
        return ratio(sums.sum(), counts.sum())

    def score_by_class(self, statistics: Tensor) -> Tensor:
        """Return the mean over the positions of each predicted class ``(C,)``, NaN for one that was never predicted."""
        counts, sums = of_rows(self, statistics, 2)
        return ratio(sums, counts)


def _check_logits(logits: Any, what: str) -> None:
    fits = isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() >= 2
    if not fits or logits.shape[1] < 2 or logits.numel() == 0:
        raise problem(
            f"a validator cannot use the {what}",
            expected="a floating-point tensor (N, C, ...) of at least one sample, position, and C >= 2 classes",
            received=f"{logits.dtype} of shape {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else type(logits).__name__,
            fix="pass the network's logits, the classes in dimension 1; skip an empty batch",
        )


def _check_view(name: str, logits: Tensor, view_logits: Optional[Tensor]) -> None:
    if view_logits is None:
        raise problem(
            f"{name} compares predictions on two views, and was given one",
            expected="the logits on a second view of the same images",
            received="None",
            fix="pass view_logits=, or view= where the model is run for you; without a second view use "
            "MutualInformation()",
        )
    _check_logits(view_logits, "logits on the view")
    for differs, mine, others in (
        ("batch size", logits.shape[0], view_logits.shape[0]),
        ("class count", logits.shape[1], view_logits.shape[1]),
        ("number of dimensions", logits.dim(), view_logits.dim()),
        ("device", logits.device, view_logits.device),
    ):
        if mine != others:
            raise problem(
                f"the logits on the view are of another {differs}",
                expected=str(mine),
                received=str(others),
                fix="pass the logits of the same network on the same images, changed but in the same order and place",
            )
