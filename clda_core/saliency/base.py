"""What a saliency estimator is, and the derivatives it may ask for."""

from __future__ import annotations

from typing import Callable, List, Optional, Sequence

import torch
from torch import Tensor

from typing_extensions import Literal, Protocol

__all__ = ["Probe", "SaliencyEstimator"]

Probe = Callable[[Tensor, Optional[Tensor]], Tensor]
"""A loss on unlabelled target data: ``probe(logits, mask) -> scalar``, differentiable by the logits."""


class SaliencyEstimator(Protocol):
    r"""Scores parameters; it neither selects layers nor touches the model.

    Attributes:
        order: The derivative of the loss that :meth:`score` receives: 0 none, 1 the gradient, 2 an estimate of the
            Hessian's diagonal (Hutchinson).
    """

    order: Literal[0, 1, 2]

    def score(self, parameter: Tensor, derivative: Optional[Tensor]) -> Tensor:
        """Return how much each element of one parameter matters.

        Args:
            parameter: Any shape, detached, float32 or wider.
            derivative: The same shape and dtype, detached; ``None`` when ``order`` is 0.

        Returns:
            Non-negative finite scores of the same shape; higher matters more. Only ratios within the model count.
        """
        ...


def derivatives(
    order: int, loss: Tensor, parameters: Sequence[Tensor], generator: torch.Generator
) -> List[Optional[Tensor]]:
    ...
