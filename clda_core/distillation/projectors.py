"""The optimizer of a KD loss's own parameters, which the host's optimizer never sees."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Sequence, Tuple

import torch
from torch import nn

from .._host.layout import strided
from .._host.own_optimizer import OwnOptimizer
from .._host.plain import copied
from .._host.ranks import mean_where_seen
from .._host.shards import local
from ..errors import problem
from ..strategy import check_apart
from .protocol import Distillation

_LEARNING_RATE = 1e-3


class Projectors:
    """Trains and saves what a KD loss owns; does nothing for a loss without parameters.

    Args:
        distillation: The KD loss. If it is a module its parameters may appear at any call.
        models: The host's, of which the loss may own nothing.

    Raises:
        CldaError: If the loss has parameters of the host's models among its own; from any method if it got them later.
    """

    def __init__(self, distillation: Distillation, models: Sequence[nn.Module] = ()) -> None:
        self._models = tuple(models)
        self._checked: Tuple[int, ...] = ()
        self.module = distillation if isinstance(distillation, nn.Module) else nn.Module()
        self._optimizer = OwnOptimizer(_LEARNING_RATE, grows=True)

    def unscale(self, scaler: Any) -> bool:
        """Divide the gradients by the scale of a GradScaler, which does not know these parameters.

        Returns:
            Whether there was anything to divide, and by what.
        """
        parameters = self._parameters()
        scale = getattr(scaler, "get_scale", None)
        if scale is None or not parameters:
            return False
        inverse = 1.0 / float(scale())
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(inverse)
        return True

    def step(self) -> None:
        """Step with the gradients that the host's ``backward()`` left, unscaled before, averaged over ranks."""
        parameters = self._parameters()
        if not parameters:
            return
        found = [
            strided(parameter.grad) if parameter.requires_grad and parameter.grad is not None else None
            for parameter in parameters.values()
        ]
        gradients = {
            # One non-finite gradient would stay in Adam's moments for good.
            name: torch.where(torch.isfinite(gradient), gradient, torch.zeros_like(gradient))
            for name, gradient in zip(parameters, mean_where_seen(found, list(parameters.values())))
            if gradient is not None
        }
        self._optimizer.prepare(self.module, parameters)
        self._optimizer.step(parameters, gradients, 1.0)

    def drop_gradients(self) -> None:
        """Drop the gradients of the step that is over."""
        for parameter in self._parameters().values():
            parameter.grad = None

    def state_dict(self) -> Dict[str, Any]:
        """Return the parameters and the optimizer's state by their names, not copied."""
        return {"module": dict(self.module.state_dict()), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; on an error everything is as before."""
        before = copied(self.state_dict()["module"])
        children = [(module, dict(module._modules)) for module in self.module.modules()]
        try:
            self.module.load_state_dict(state["module"])
            optimizer, moments = OwnOptimizer(_LEARNING_RATE, grows=True), self._by_name(state["optimizer"])
            if moments:
                optimizer.load_state_dict(moments)
                optimizer.prepare(self.module, self._parameters())
        except Exception:
            for module, modules in children:
                module._modules.clear()
                module._modules.update(modules)
            self.module.load_state_dict(before)
            raise
        self._optimizer = optimizer

    def _parameters(self) -> Dict[str, nn.Parameter]:
        """Return what can be trained, by name; those that are frozen today too."""
        parameters = {
            name: value
            for name, value in self.module.named_parameters()
            if value.is_floating_point() or value.is_complex()
        }
        identities = tuple(map(id, parameters.values()))
        if identities != self._checked:
            check_apart("distillation", self.module, self._models)
            self._checked = identities
        return parameters

    def _by_name(self, state: Any) -> Mapping[str, Any]:
        """Return the optimizer's state by name; up to version 2 of the learner's state it counted the parameters."""
        if not state or "shapes" in state:
            return state or {}
        trained = {name: value for name, value in self._parameters().items() if value.requires_grad}
        names = list(trained)
        (group,) = state["param_groups"]
        if len(group["params"]) != len(names):
            raise problem(
                "the saved state of the projectors' optimizer is of other parameters",
                expected=f"moments of {names}",
                received=f"moments of {len(group['params'])} parameters",
                fix="build the KD loss as it was built when the state was saved",
            )
        moments = {names[index]: of_one for index, of_one in state["state"].items()}
        return {
            "optimizer": {"state": moments, "param_groups": [{**group, "params": names}]},
            "base_rates": [_LEARNING_RATE],
            "shapes": {name: list(local(parameter).shape) for name, parameter in trained.items()},
        }
