"""Several distillation losses at once, each with its weight."""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple, Union

from torch import Tensor, nn

from ..errors import check_number, problem
from ..outputs import Outputs
from ..strategy import Strategy
from .protocol import Distillation, class_map_of, distillation_loss

__all__ = ["WeightedSum"]


class WeightedSum(Strategy, nn.Module):
    """Several distillation losses at once, or a single one with a weight: ``L = Σ_i w_i · L_i``.

    Args:
        terms: Pairs of a weight >= 0 and a loss; a loss may be a plain function, read features, or be a sum itself.

    Raises:
        CldaError: If ``terms`` is empty or not made of such pairs, or their class maps differ.

    Example:
        >>> import torch
        >>> from clda_core.distillation import KLDistillation, channel_wise_distillation
        >>> loss = WeightedSum([(1.0, KLDistillation(temperature=1.0)), (3.0, channel_wise_distillation)])
        >>> loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)).item()
        0.0
    """

    reads = "outputs"

    def __init__(self, terms: Sequence[Tuple[float, Distillation]]) -> None:
        super().__init__()
        terms = list(terms)
        pairs = all(isinstance(term, (tuple, list)) and len(term) == 2 and callable(term[1]) for term in terms)
        if not terms or not pairs:
            raise problem(
                "the terms are of a wrong form",
                expected="at least one pair (weight, loss), the loss a function of student, teacher and mask",
                received=repr(terms),
                fix="pass for example WeightedSum([(1.0, KLDistillation())])",
            )
        for weight, _ in terms:
            check_number("the weight of a term", weight, at_least=0)
        maps = [of for of in (class_map_of(loss) for _, loss in terms) if of is not None]
        if any(list(of) != list(maps[0]) for of in maps):
            raise problem(
                "the terms have different class maps",
                expected="one class_map in all terms that have one",
                received=repr(maps),
                fix="pass the same class_map to each",
            )
        self.class_map: Optional[Sequence[int]] = maps[0] if maps else None
        self.terms = terms
        self.owners = nn.ModuleList([loss for _, loss in terms if isinstance(loss, nn.Module)])

    def forward(
        self, student: Union[Tensor, Outputs], teacher: Union[Tensor, Outputs], mask: Optional[Tensor] = None
    ) -> Tensor:
        """Return the weighted sum; a tensor counts as outputs without features."""
        student = Outputs(student) if isinstance(student, Tensor) else student
        teacher = Outputs(teacher) if isinstance(teacher, Tensor) else teacher
        losses = [weight * distillation_loss(loss, student, teacher, mask) for weight, loss in self.terms]
        return sum(losses[1:], losses[0])


def single_losses(distillation: Distillation) -> List[Distillation]:
    """Return the losses that a sum, and the sums in it, are made of; of any other loss itself."""
    if not isinstance(distillation, WeightedSum):
        return [distillation]
    return [single for _, loss in distillation.terms for single in single_losses(loss)]
