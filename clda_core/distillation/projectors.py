"""The optimizer of a KD loss's own parameters, which the host's optimizer never sees."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .._host.layout import laid_out_like, strided
from .._host.ranks import mean_where_seen
from ..strategy import check_apart
from ..update.writing import copied

_LEARNING_RATE = 1e-3


class Projectors:
    """Trains and saves what a KD loss owns; does nothing for a loss without parameters.

    Args:
        distillation: The KD loss. If it is a module its parameters may appear as late as its first call.
        models: The host's, of which the loss may own nothing.

    Raises:
        CldaError: If the loss has parameters of the host's models among its own; from any method if it got them later.
    """

    def __init__(self, distillation: Callable[..., Tensor], models: Sequence[nn.Module] = ()) -> None:
        self._models = tuple(models)
        self._checked: Tuple[int, ...] = ()
        self.module: Optional[nn.Module] = distillation if isinstance(distillation, nn.Module) else None
        self._optimizer: Optional[torch.optim.Optimizer] = None
        self._restored: Optional[Mapping[str, Any]] = None

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
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(inverse)
        return True

    def step(self) -> None:
        """Step with the gradients that the host's ``backward()`` left, unscaled before, averaged over ranks."""
        parameters = self._parameters()
        if not parameters:
            return
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE)
            if self._restored is not None:
                self._optimizer.load_state_dict(dict(self._restored))
                self._restored = None
        found = [None if parameter.grad is None else strided(parameter.grad) for parameter in parameters]
        gradients = mean_where_seen(found, parameters)
        for parameter, gradient in zip(parameters, gradients):
            # One non-finite gradient would stay in Adam's moments for good.
            if gradient is not None:
                gradient = torch.where(torch.isfinite(gradient), gradient, torch.zeros_like(gradient))
                gradient = laid_out_like(gradient, parameter)
            parameter.grad = gradient
        self._optimizer.step()

    def drop_gradients(self) -> None:
        """Drop the gradients of the step that is over."""
        for parameter in self._parameters():
            parameter.grad = None

    def state_dict(self) -> Dict[str, Any]:
        """Return the parameters and the optimizer's state, not copied."""
        module = {} if self.module is None else self.module.state_dict()
        return {
            "module": dict(module),
            "optimizer": self._restored if self._optimizer is None else self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; on an error everything is as before."""
        if self.module is not None:
            before = copied(self.state_dict()["module"])
            children = [(module, dict(module._modules)) for module in self.module.modules()]
            try:
                self.module.load_state_dict(state["module"])
            except Exception:
                for module, modules in children:
                    module._modules.clear()
                    module._modules.update(modules)
                self.module.load_state_dict(before)
                raise
        # Optimizers adopt the tensors they load and then write to them.
        self._optimizer, self._restored = None, copied(state["optimizer"])

    def _parameters(self) -> List[nn.Parameter]:
        if self.module is None:
            return []
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        identities = tuple(map(id, parameters))
        if identities != self._checked:
            check_apart("distillation", self.module, self._models)
            self._checked = identities
        return parameters
