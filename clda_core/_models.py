"""Borrowing the user's models: every context here gives back exactly what it took."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterable, Iterator

import torch
from torch import Tensor, nn

from ._named import modules_of
from ._sharded import reshard


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, so that dropout draws nothing and BatchNorm statistics stay; restore every module.

    Parameters that a forward pass gathered from other ranks are given up too.
    """
    modules = [module for model in models for module in modules_of(model)]
    changed = [module for module in modules if module.training]
    try:
        for module in changed:
            module.training = False
        yield
    finally:
        for module in changed:
            module.training = True
        reshard(modules)


@contextmanager
def requiring_grad(parameters: Iterable[Tensor], *, of: Iterable[Tensor] = ()) -> Iterator[None]:
    """Let exactly ``parameters`` require gradients among themselves and ``of``, with gradients enabled; restore both.

    Args:
        parameters: The parameters to differentiate by.
        of: Further parameters (usually all of the model's) that must not enter the graph meanwhile.
    """
    wanted = list(parameters)
    everyone = {id(parameter): parameter for parameter in [*of, *wanted]}
    before = [(parameter, parameter.requires_grad) for parameter in everyone.values()]
    chosen = {id(parameter) for parameter in wanted}
    try:
        for parameter, flag in before:
            if flag != (id(parameter) in chosen):
                parameter.requires_grad_(not flag)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in before:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
