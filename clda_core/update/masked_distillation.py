"""Masked distillation: the student's predictions teach the selected teacher layers."""

from __future__ import annotations

from typing import Any, Dict, Iterable, Mapping, Optional, Sequence, Set

import torch
from torch import Tensor, nn

from .._host.borrowing import borrowed
from .._host.compat import has_float64, norms
from .._host.layout import strided
from .._host.own_optimizer import OptimizerFactory, OwnOptimizer
from .._host.ranks import mean_where_seen
from .._host.shards import gradients, is_sharded, local, sum_over_shards
from ..distillation import Distillation, KLDistillation, distillation_loss
from ..errors import check_number, problem
from ..layers import canonical_parameters
from ..strategy import Strategy
from .base import RoundContext, UpdateResult

__all__ = ["MaskedDistillation"]


class MaskedDistillation(Strategy):
    r"""Distil the student's predictions into the teacher, with the gradient limited to the selected layers.

    A few steps on :math:`L(\theta_T) = D(f_T(x; \theta_T), f_S(x))`, where :math:`D` is a distillation loss with
    the student's predictions :math:`f_S(x)` on this step's target batch as its constant target, and every parameter
    outside the selected layers is constant. Both models run in eval mode: BatchNorm statistics stay. The networks need
    not be related and may differ in every shape. The optimizer is the learner's own. The paper speaks of layer-wise
    relations instead; this functional update is ours.

    Args:
        steps: Optimizer steps a round, >= 1.
        learning_rate: Of the default optimizer, Adam, whose first steps move every element by about as much; > 0.
        distillation: The loss :math:`D`, called with the teacher in the student's place. Where the learner's KD loss
            has a ``class_map``, the teacher's logits come in the student's classes.
        optimizer: Builds another optimizer from the teacher's parameters, for example
            ``lambda parameters: torch.optim.SGD(parameters, lr=1e-2)``; then ``learning_rate`` is not used.

    Raises:
        CldaError: If an argument is out of range, or ``optimizer`` holds other parameters than it was given.

    Note:
        Memory beyond the teacher's activations: gradients and optimizer state of the layers selected so far. The
        schedule's strength scales the learning rate. A step with a non-finite gradient is not made. On several ranks
        gradients are averaged, so that the teacher stays equal everywhere.

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, for :math:`D`; Zhang et al., Deep Mutual
        Learning, CVPR 2018, for teaching in both directions.
    """

    needs_relation = False

    def __init__(
        self,
        *,
        steps: int = 1,
        learning_rate: float = 1e-4,
        distillation: Optional[Distillation] = None,
        optimizer: Optional[OptimizerFactory] = None,
    ) -> None:
        check_number("steps", steps, at_least=1, integer=True)
        check_number("learning_rate", learning_rate, above=0)
        self.steps = steps
        self.learning_rate = learning_rate
        self.distillation = KLDistillation(temperature=1.0) if distillation is None else distillation
        self.optimizer = optimizer
        self._own = OwnOptimizer(learning_rate, optimizer)

    def apply(self, context: RoundContext) -> UpdateResult:
        """Take the steps on this step's target batch."""
        everything = canonical_parameters(context.teacher)
        names = [name for layer in context.layers for name in layer.parameters]
        selected = [everything[name] for name in names]
        self._own.prepare(context.teacher, everything)
        target = context.student_outputs()
        inputs = context.required_inputs()
        reached: Set[str] = set()
        reason = "no gradient reaches it"
        for _ in range(self.steps):
            with borrowed(context.teacher, grad_to=selected):
                prediction = context.forward(context.teacher, inputs)
                loss = distillation_loss(self.distillation, prediction, target, context.mask)
                averaged = _averaged_gradients(loss, selected)
            found = {name: gradient for name, gradient in zip(names, averaged) if gradient is not None}
            if not found:
                break
            if not all_finite(found.values()):
                reason = "a gradient of the round is not finite"
                break
            self._own.step(everything, found, context.strength)
            reached.update(found)
        updated = tuple(layer.name for layer in context.layers if reached.intersection(layer.parameters))
        return UpdateResult(updated, {layer.name: reason for layer in context.layers if layer.name not in updated})

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raise unless a restored state belongs to this teacher."""
        self._own.check_fits(canonical_parameters(teacher))

    def rehearse(self, context: RoundContext) -> None:
        """Differentiate the loss once by every layer, and drop the gradients.

        Raises:
            CldaError: If none of the layers has a gradient.
        """
        everything = canonical_parameters(context.teacher)
        wanted = [everything[name] for layer in context.layers for name in layer.parameters]
        target = context.student_outputs()
        with borrowed(context.teacher, grad_to=wanted):
            prediction = context.forward(context.teacher, context.required_inputs())
            loss = distillation_loss(self.distillation, prediction, target, context.mask)
            found = _averaged_gradients(loss, wanted)
        if all(gradient is None for gradient in found):
            raise problem(
                "the update's loss does not depend on the teacher",
                expected="logits with a graph to its parameters",
                received="no gradient for any of them",
                fix="take detach() and no_grad() out of the teacher's forward pass and of extract=",
            )

    def state_dict(self) -> Dict[str, Any]:
        """Return the optimizer's state by parameter name; under FSDP2 this rank's part of it, as plain tensors."""
        return self._own.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the optimizer's state; it is applied when the teacher is at hand."""
        self._own.load_state_dict(state)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no element is NaN or infinite, on any rank.

    It synchronises with the device once, and once more if a norm overflows.
    """
    every = list(tensors)
    parts = [torch.view_as_real(part) if part.is_complex() else part for part in map(local, every)]
    # Norms are NaN or infinite where an element is; where finite elements make one overflow, sums in float64 decide.
    if _on_every_rank(torch.isfinite(norms(parts)).all(), every):
        return True
    device = parts[0].device
    precise = torch.float64 if all(has_float64(part.device) for part in parts) else torch.float32
    sums = torch.stack([part.sum(dtype=precise).to(device) for part in parts])
    return _on_every_rank(torch.isfinite(sums).all(), every)


def _on_every_rank(here: Tensor, sharded: Sequence[Tensor]) -> bool:
    return bool(sum_over_shards(1 - here.float(), sharded) == 0) if any(map(is_sharded, sharded)) else bool(here)


def _averaged_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Optional[Tensor]]:
    if any(map(is_sharded, parameters)):
        return gradients(loss, parameters)
    if not loss.requires_grad:  # nothing of what is differentiated by took part
        return mean_where_seen([None] * len(parameters), parameters)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return mean_where_seen([None if one is None else strided(one) for one in found], parameters)
