"""Masked distillation: the student's predictions teach the selected teacher layers."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Set

import torch
from torch import Tensor

from .._compat import adam, norms
from .._config import Strategy
from .._distributed import mean_where_seen
from .._models import evaluating, requiring_grad
from .._sharded import as_sharded, gradients, is_sharded, local, sum_over_shards
from ..distillation import Distillation, KLDistillation, distillation_loss
from ..errors import check_choice, check_number, problem
from ..layers import canonical_parameters
from .base import Granularity, RoundContext, UpdateResult
from .writing import copied

__all__ = ["MaskedDistillation"]

_KERNELS = ("foreach", "fused")

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
        learning_rate: Of the default optimizer, Adam, whose first steps move every element by about as much; > 0.
        distillation: The loss :math:`D`, called with the teacher in the student's place. Where the learner's KD loss
            has a ``class_map``, the teacher's logits come in the student's classes.
        optimizer: Builds another optimizer from the teacher's parameters, for example
            ``lambda parameters: torch.optim.SGD(parameters, lr=1e-2)``; then ``learning_rate`` is not used.
        granularity: ``"parameter"`` moves only non-salient elements of the selected layers.

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
        movable = context.movable(self.granularity)
        optimizer = self._own_optimizer(list(everything.values()))
        target = context.student_outputs()
        inputs = context.required_inputs()
        reached: Set[str] = set()
        reason = "no gradient reaches it"
        for _ in range(self.steps):
            with evaluating(context.teacher), requiring_grad(selected, of=everything.values()):
                prediction = context.forward(context.teacher, inputs)
                loss = distillation_loss(self.distillation, prediction, target, context.mask)
                averaged = _averaged_gradients(loss, selected)
            found = {name: gradient for name, gradient in zip(names, averaged) if gradient is not None}
            if not found:
                break
            if not all_finite(found.values()):
                reason = "a gradient of the round is not finite"
                break
            self._step(optimizer, everything, found, movable, context.strength)
            reached.update(found)
        updated = tuple(layer.name for layer in context.layers if reached.intersection(layer.parameters))
        return UpdateResult(updated, {layer.name: reason for layer in context.layers if layer.name not in updated})

    def state_dict(self) -> Dict[str, Any]:
        """Return the optimizer's state; under FSDP2 this rank's part of it, as plain tensors."""
        if self._optimizer is None:
            return {} if self._restored is None else dict(self._restored)
        return {"optimizer": _without_shards(self._optimizer.state_dict()), "base_rates": list(self._base_rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the optimizer's state; it is applied when the teacher is at hand."""
        self._optimizer = None
        # Optimizers adopt the tensors they load and then write to them.
        self._restored = copied(dict(state)) if state else None

    def _own_optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        if self._optimizer is None:
            with requiring_grad(parameters):
                if self.optimizer is None:
                    optimizer = adam(parameters, self.learning_rate)
                else:
                    optimizer = self.optimizer(parameters)
            _check_held(optimizer, parameters)
            self._base_rates = [group["lr"] for group in optimizer.param_groups]
            if self._restored is not None:
                kernels = [{key: group[key] for key in _KERNELS if key in group} for group in optimizer.param_groups]
                optimizer.load_state_dict(_with_shards(self._restored["optimizer"], optimizer))
                for group, ours in zip(optimizer.param_groups, kernels):
                    for key in _KERNELS:  # another version of torch may have saved a choice that this one lacks
                        group.pop(key, None)
                    group.update(ours)
                self._base_rates = list(self._restored["base_rates"])
                self._restored = None
            self._optimizer = optimizer
        _check_held(self._optimizer, parameters)
        return self._optimizer

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, Tensor],
        found: Mapping[str, Tensor],
        movable: Mapping[str, Tensor],
        strength: float,
    ) -> None:
        """Step with the gradients ``found`` alone; the ``.grad`` of every parameter is as before afterwards."""
        # Momentum and weight decay move elements without a gradient too, so these are put back after the step.
        kept = {name: local(parameters[name]).clone() for name in found if name in movable}
        before = [(parameter, parameter.grad) for parameter in parameters.values()]
        try:
            for name, parameter in parameters.items():
                gradient = found.get(name)
                if gradient is not None and name in kept:
                    gradient = as_sharded(local(gradient) * movable[name], parameter)
                parameter.grad = gradient
            for group, rate in zip(optimizer.param_groups, self._base_rates):
                group["lr"] = rate * strength
            optimizer.step()
        finally:
            for parameter, gradient in before:
                parameter.grad = gradient
        with torch.no_grad():
            for name, copied in kept.items():
                part = local(parameters[name])
                part.copy_(torch.where(movable[name], part, copied))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no element is NaN or infinite, on any rank.

    It synchronises with the device once, and once more if a norm overflows.
    """
    every = list(tensors)
    parts = [local(tensor) for tensor in every]
    # Norms are NaN or infinite where an element is; where finite elements make one overflow, sums in float64 decide.
    if not _any_rank(~torch.isfinite(norms(parts)).all(), every):
        return True
    precise = torch.float32 if parts[0].device.type == "mps" else torch.float64
    sums = torch.stack([part.sum(dtype=precise) for part in parts])
    return not _any_rank(~torch.isfinite(sums).all(), every)


def _any_rank(here: Tensor, sharded: Sequence[Tensor]) -> bool:
    return bool(sum_over_shards(here.float(), sharded))


def _averaged_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Optional[Tensor]]:
    if any(map(is_sharded, parameters)):
        return gradients(loss, parameters)
    if not loss.requires_grad:  # nothing of what is differentiated by took part
        return mean_where_seen([None] * len(parameters), parameters)
    return mean_where_seen(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)


def _without_shards(state: Mapping[str, Any]) -> Dict[str, Any]:
    """Return an optimizer's state with this rank's parts in place of sharded tensors."""
    held = {
        index: {key: local(value) if is_sharded(value) else value for key, value in of_one.items()}
        for index, of_one in state["state"].items()
    }
    return {**state, "state": held}


def _with_shards(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    """Return what :func:`_without_shards` returned with tensors sharded like the optimizer's parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held: Dict[Any, Any] = {}
    for index, of_one in state["state"].items():
        held[index] = dict(of_one)
        for key, value in of_one.items():
            if is_sharded(parameters[index]) and isinstance(value, Tensor) and value.dim():
                expected = tuple(local(parameters[index]).shape)
                if tuple(value.shape) != expected:
                    raise problem(
                        "the saved state of the update's optimizer is of other shards",
                        expected=f"a part of shape {expected}",
                        received=f"shape {tuple(value.shape)}",
                        fix="load on every rank what that rank saved, on as many ranks",
                    )
                held[index][key] = as_sharded(value, parameters[index])
    return {**state, "state": held}


def _check_held(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    held = {id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}
    if held != {id(parameter) for parameter in parameters}:
        raise problem(
            "the update's optimizer does not hold the teacher's parameters",
            expected=f"an optimizer of these {len(parameters)} parameters",
            received=f"{type(optimizer).__name__} of {len(held)}, not the same ones",
            fix="let optimizer= take all the parameters it is given, and give every learner an update of its own",
        )
