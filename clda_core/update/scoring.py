"""Scoring a network on the batch of a round by a validator."""

from __future__ import annotations

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor, nn

from ..errors import problem
from ..outputs import Outputs
from ..validation import MakesView, MutualInformation, SoftConsistency, Validator
from ..validation.base import check_statistics
from .base import RoundContext

__all__ = ["DEFAULT_VALIDATORS", "statistics_of", "validator_of"]

DEFAULT_VALIDATORS: Tuple[Validator, Validator] = (MutualInformation(), SoftConsistency())
"""Where ``distill`` gets no view, and where it does."""


def validator_of(validator: Optional[Validator], context: RoundContext) -> Validator:
    """Return the validator that goes by what the host hands a round.

    Args:
        validator: The caller's; ``None`` for soft consistency where ``distill`` gets a view, and for mutual information
            where it does not.
        context: The round.

    Raises:
        CldaError: If it needs a view and there is none.
    """
    has_view = context.has_view()
    if validator is None:
        return DEFAULT_VALIDATORS[has_view]
    if validator.needs_view and not has_view and not isinstance(validator, MakesView):
        raise problem(
            f"the validator {type(validator).__name__} needs a second view of the target images",
            expected="view= of distill()"
            + (", with student_view= beside student_inputs=" * (context.student_inputs is not None)),
            received="none",
            fix="call learner.distill(student_output, images, view=changed_images), or use a validator that needs "
            "no view, such as MutualInformation()",
        )
    return validator


def statistics_of(
    validator: Validator,
    context: RoundContext,
    model: nn.Module,
    outputs: Callable[[], Outputs],
    like: Optional[Tensor] = None,
) -> Tensor:
    """Return what a validator counts of a model on a round's batch.

    Args:
        validator: That of :func:`validator_of`.
        context: The round.
        model: The teacher or the student, as it is now.
        outputs: Returns its outputs on the batch; asked after the model was run on the view.
        like: Earlier statistics, of as many elements.

    Raises:
        CldaError: If the validator returns no statistics.
    """
    view: Optional[Tensor] = None
    if isinstance(validator, MakesView):
        view = context.predict(model, validator.view(context.inputs_of(model))).logits
    elif validator.needs_view:
        view = context.predict(model, context.view_of(model)).logits
    with torch.no_grad():
        statistics = validator.statistics(outputs().logits, view, context.mask)
    return check_statistics(validator, statistics, like)
