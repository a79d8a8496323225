"""The optimizer of a KD loss's own parameters, which the host's optimizer never sees."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Sequence, Tuple

import torch
from torch import nn

from .._host.layout import strided
from .._host.own_optimizer import OwnOptimizer
from .._host.plain import copied
from .._host.ranks import mean_where_seen
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
        found = [None if parameter.grad is None else strided(parameter.grad) for parameter in parameters.values()]
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
            optimizer, moments = OwnOptimizer(_LEARNING_RATE, grows=True), state["optimizer"]
            if moments:
                by_position = "param_groups" in moments  # the state of the bare optimizer, up to version 2
                former = {"optimizer": moments, "base_rates": [_LEARNING_RATE]}
                optimizer.load_state_dict(former if by_position else moments)
                optimizer.prepare(self.module, self._parameters())
        except Exception:
            for module, modules in children:
                module._modules.clear()
                module._modules.update(modules)
            self.module.load_state_dict(before)
            raise
        self._optimizer = optimizer

    def _parameters(self) -> Dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        parameters = {name: value for name, value in self.module.named_parameters() if value.requires_grad}
        identities = tuple(map(id, parameters.values()))
        if identities != self._checked:
            check_apart("distillation", self.module, self._models)
            self._checked = identities
        return parameters
