"""Masked distillation: the student's predictions teach the selected teacher layers."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional

import torch
from torch import Tensor, nn

from .._config import Strategy
from .._distributed import mean_across_ranks
from .._models import evaluating, requiring_grad
from ..distillation import Distillation, KLDistillation, distillation_loss
from ..errors import check_choice, check_number
from ..layers import canonical_parameters
from .base import Granularity, RoundContext, UpdateResult

__all__ = ["MaskedDistillation"]

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class MaskedDistillation(Strategy):
    r"""Distil the student's predictions into the teacher, with the gradient limited to the selected layers.

    A few steps on :math:`L(\theta_T) = D(f_T(x; \theta_T), f_S(x))`, where :math:`D` is a distillation loss with
    the student's predictions :math:`f_S(x)` on this step's target batch as its constant target, and every parameter
    outside the selected layers is constant. Both models run in eval mode: BatchNorm statistics stay. The networks need
    not be related and may differ in every shape. The optimizer is the learner's own. The paper speaks of layer-wise
    relations instead; this functional update is ours.

    Args:
        steps: Optimizer steps a round, >= 1.
        learning_rate: Of the default optimizer, Adam; > 0.
        distillation: The loss :math:`D`, called with the teacher in the student's place.
        optimizer: Builds another optimizer from the teacher's parameters, for example
            ``lambda parameters: torch.optim.SGD(parameters, lr=1e-2)``; then ``learning_rate`` is not used.
        granularity: ``"parameter"`` moves only non-salient elements of the selected layers.

    Raises:
        CldaError: If an argument is out of range.

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
        granularity: Granularity = "layer",
    ) -> None:
        check_number("steps", steps, at_least=1, integer=True)
        check_number("learning_rate", learning_rate, above=0)
        check_choice("granularity", granularity, ("layer", "parameter"))
        self.steps = steps
        self.learning_rate = learning_rate
        self.distillation = KLDistillation(temperature=1.0) if distillation is None else distillation
        self.optimizer = optimizer
        self.granularity: Granularity = granularity
        self._optimizer: Optional[torch.optim.Optimizer] = None
        self._base_rates: List[float] = []
        self._restored: Optional[Mapping[str, Any]] = None

    def apply(self, context: RoundContext) -> UpdateResult:
        """Take the steps on this step's target batch."""
        everything = canonical_parameters(context.teacher)
        names = [name for layer in context.layers for name in layer.parameters]
        selected = [everything[name] for name in names]
        optimizer = self._own_optimizer(context.teacher)
        target = context.student_outputs()
        inputs = context.required_inputs()
        for _ in range(self.steps):
            with evaluating(context.teacher), requiring_grad(selected, of=everything.values()):
                prediction = context.forward(context.teacher, inputs)
                loss = distillation_loss(self.distillation, prediction, target, context.mask)
                found = torch.autograd.grad(loss, selected, allow_unused=True)
            used = [index for index, gradient in enumerate(found) if gradient is not None]
            gradients = mean_across_ranks([gradient for gradient in found if gradient is not None])
            if not used or not all_finite(gradients):
                return UpdateResult((), {layer.name: "no finite gradient reaches it" for layer in context.layers})
            for index, gradient in zip(used, gradients):
                if names[index] in context.non_salient:
                    gradient.mul_(context.non_salient[names[index]])
            self._step(optimizer, [selected[index] for index in used], gradients, context.strength)
        reached = {names[index] for index in used}
        updated = tuple(layer.name for layer in context.layers if reached.intersection(layer.parameters))
        unused = {layer.name: "no gradient reaches it" for layer in context.layers if layer.name not in updated}
        return UpdateResult(updated, unused)

    def state_dict(self) -> Dict[str, Any]:
        """Return the optimizer's state."""
        if self._optimizer is None:
            return {} if self._restored is None else dict(self._restored)
        return {"optimizer": self._optimizer.state_dict(), "base_rates": list(self._base_rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the optimizer's state; it is applied when the teacher is at hand."""
        self._optimizer = None
        self._restored = state if state else None

    def _own_optimizer(self, teacher: nn.Module) -> torch.optim.Optimizer:
        if self._optimizer is None:
            parameters = list(canonical_parameters(teacher).values())
            with requiring_grad(parameters):
                if self.optimizer is None:
                    optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
                else:
                    optimizer = self.optimizer(parameters)
            self._base_rates = [group["lr"] for group in optimizer.param_groups]
            if self._restored is not None:
                optimizer.load_state_dict(dict(self._restored["optimizer"]))
                self._base_rates = list(self._restored["base_rates"])
                self._restored = None
            self._optimizer = optimizer
        return self._optimizer

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: List[nn.Parameter],
        gradients: List[Tensor],
        strength: float,
    ) -> None:
        """Step with ``gradients`` of ``parameters`` alone; the ``.grad`` of every parameter is as before afterwards."""
        everyone = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        before = [parameter.grad for parameter in everyone]
        try:
            for parameter in everyone:
                parameter.grad = None
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            for group, rate in zip(optimizer.param_groups, self._base_rates):
                group["lr"] = rate * strength
            optimizer.step()
        finally:
            for parameter, gradient_before in zip(everyone, before):
                parameter.grad = gradient_before


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no element is NaN or infinite, with one host-device synchronisation."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())
