"""Borrowing the user's models: every context here gives back exactly what it took."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterable, Iterator, List, Tuple

import torch
from torch import Tensor, nn

from .buffers import Buffers
from .names import modules_of
from .shards import reshard
from .undo import undoing


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models in eval mode, so that dropout draws nothing; restore the mode of every module, and every buffer.

    Buffers are restored because not all of them are statistics that eval mode leaves alone: a forward pass may count
    its calls, fill a queue or follow ranges in eval mode too. Parameters that a forward pass gathered from other ranks
    are given up.
    """
    borrowed = [(model, modules_of(model)) for model in dict.fromkeys(models)]
    modules = [module for _, parts in borrowed for module in parts]
    changed = [module for module in modules if module.training]
    buffers: List[Buffers] = []
    complete = False

    def give_back() -> None:
        for module in changed:
            module.training = True
        for one in buffers:
            one.put_back(complete=complete)
        reshard(modules)

    with undoing(give_back):
        buffers.extend(Buffers(model, parts) for model, parts in borrowed)
        for module in changed:
            module.training = False
        yield
        complete = True


@contextmanager
def requiring_grad(parameters: Iterable[Tensor], *, of: Iterable[Tensor] = ()) -> Iterator[None]:
    """Let exactly ``parameters`` require gradients among themselves and ``of``, with gradients enabled; restore both.

    Args:
        parameters: The parameters to differentiate by.
        of: Further parameters (usually all of the model's) that must not enter the graph meanwhile.
    """
    wanted = list(parameters)
    everyone = {id(parameter): parameter for parameter in [*of, *wanted]}
    before: List[Tuple[Tensor, bool]] = [(parameter, parameter.requires_grad) for parameter in everyone.values()]
    chosen = {id(parameter) for parameter in wanted}

    def give_back() -> None:
        for parameter, flag in before:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    with undoing(give_back):
        for parameter, flag in before:
            if flag != (id(parameter) in chosen):
                parameter.requires_grad_(not flag)
        with torch.enable_grad():
            yield
