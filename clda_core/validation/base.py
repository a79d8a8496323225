"""What a validator is, and the checks on those that are given and on what they return."""

from __future__ import annotations

import math
from typing import Any, List, Optional

import torch
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from ..errors import problem

__all__ = [
    "ByClass",
    "MakesView",
    "Validator",
    "check_statistics",
    "check_validator",
    "nothing_unless_finite",
    "score_by_class",
    "score_of",
]


class Validator(Protocol):
    """A score of a network on target data without labels; higher is better.

    It keeps no state: what it sees of a batch are statistics, whose sums over batches, steps and ranks it can score. It
    may be one of :class:`ByClass` and :class:`MakesView` too.
    """

    @property
    def needs_view(self) -> bool:
        """Whether :meth:`statistics` needs the logits on a second view of the same images."""
        ...

    def statistics(self, logits: Tensor, view_logits: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Tensor:
        """Return what one batch adds to the score.

        Args:
            logits: Shape ``(N, C, ...)``, float, unnormalised.
            view_logits: The same network's on the second view, at the same positions; ``None`` without one.
            mask: Which positions count, and how much: bool or float weights ``(N,)`` or ``(N, ...)``.

        Returns:
            Shape ``(K,)``, float64 (float32 where the device has no float64), detached. ``K`` depends on the class
            count alone. The statistics of several batches are added, and may be multiplied by a common factor.
        """
        ...

    def score(self, statistics: Tensor) -> Tensor:
        """Return the score of summed statistics, a scalar; NaN if they have seen nothing."""
        ...


@runtime_checkable
class ByClass(Protocol):
    """What a validator may be that also scores each class."""

    def score_by_class(self, statistics: Tensor) -> Tensor:
        """Return the scores of summed statistics, shape ``(C,)``; NaN for a class that never appeared."""
        ...


@runtime_checkable
class MakesView(Protocol):
    """What a validator may be that makes its second view itself: it must not be given another one."""

    def view(self, inputs: Any) -> Any:
        """Return the second view of what the model is called with."""
        ...


def check_validator(validator: Any) -> None:
    """Raise :class:`CldaError` unless this is an instance of a validator."""
    missing = [name for name in ("statistics", "score") if not callable(getattr(validator, name, None))]
    if not isinstance(getattr(validator, "needs_view", None), bool):
        missing.append("needs_view")
    if missing or isinstance(validator, type):
        raise problem(
            "this is no validator",
            expected="an object with statistics(), score() and the bool needs_view",
            received=repr(validator) if isinstance(validator, type) else f"{validator!r} without {missing}",
            fix="pass an instance, for example MutualInformation()",
        )


def check_statistics(validator: Validator, statistics: Any, like: Optional[Tensor] = None) -> Tensor:
    """Return a validator's statistics, detached, if they can be added to earlier ones.

    Args:
        validator: Whose they are.
        statistics: What its ``statistics`` returned.
        like: Earlier statistics of it.

    Raises:
        CldaError: If they are no floating-point vector, or of another length than the earlier ones.
    """
    if isinstance(statistics, Tensor) and statistics.is_floating_point() and statistics.dim() == 1 and len(statistics):
        if like is None or len(statistics) == len(like):
            return statistics.detach()
        expected = f"{len(like)} of them, as before"
    else:
        expected = "a floating-point tensor of shape (K,)"
    raise problem(
        f"the statistics of {type(validator).__name__} cannot be added up",
        expected=expected,
        received=_shown(statistics),
        fix="return sums over the positions of the batch, as many for every batch of the same classes",
    )


def nothing_unless_finite(*statistics: Tensor) -> List[Tensor]:
    """Return the statistics, or zeros in the place of all if any of their elements is not finite.

    So a batch on which one of two networks overflows counts for neither of them, and sums stay finite. Waits for no
    device.
    """
    finite = torch.stack([torch.isfinite(one).all() for one in statistics]).all()
    return [torch.where(finite, one, torch.zeros_like(one)) for one in statistics]


def score_of(validator: Validator, statistics: Tensor) -> float:
    """Return the score of summed statistics as a number, NaN where it is not finite: then nothing can be decided.

    Raises:
        CldaError: If the validator returns something else than a scalar.
    """
    with torch.no_grad():
        score = validator.score(statistics)
    if not isinstance(score, Tensor) or score.numel() != 1 or score.is_complex():
        raise problem(
            f"the score of {type(validator).__name__} is no score",
            expected="a tensor with one real element",
            received=_shown(score),
            fix="return a scalar tensor, higher for a better network, and NaN where nothing was seen",
        )
    value = float(score)
    return value if math.isfinite(value) else math.nan


def score_by_class(validator: Validator, statistics: Tensor) -> Optional[Tensor]:
    """Return the scores by class ``(C,)``, NaN where they are not finite; ``None`` if the validator has none.

    Raises:
        CldaError: If the validator returns something else than a vector.
    """
    if not isinstance(validator, ByClass):
        return None
    with torch.no_grad():
        scores = validator.score_by_class(statistics)
    if not isinstance(scores, Tensor) or scores.dim() != 1 or not scores.is_floating_point():
        raise problem(
            f"the scores by class of {type(validator).__name__} are none",
            expected="a floating-point tensor of shape (C,)",
            received=_shown(scores),
            fix="return one score for each class, NaN for a class that never appeared",
        )
    return scores.masked_fill(~torch.isfinite(scores), math.nan)


def _shown(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
