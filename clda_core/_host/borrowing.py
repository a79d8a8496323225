"""Borrowing the user's models: one context manager lends them, and gives back exactly what it took."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .buffers import Buffers
from .names import canonical_parameters, looking_once, modules_of
from .rng import keeping_rng
from .shards import reshard
from .undo import undoing


@contextmanager
def borrowed(
    model: nn.Module,
    *models: nn.Module,
    doing: Optional[str] = None,
    passes: bool = True,
    hooked: bool = False,
    grad_to: Optional[Iterable[Tensor]] = None,
) -> Iterator[nn.Module]:
    """Borrow the user's models for a block, and give them back as they were, whatever ends it.

    ======================================== =========================================================================
    for a block that runs models             they are in eval mode, so that dropout draws nothing; the mode of every
                                             module and every buffer is restored, parameters that a pass gathered from
                                             other ranks are given up; gradients are off, or on for ``grad_to`` alone,
                                             and ``requires_grad`` is restored
    around blocks (``passes=False``)         what is compiled runs as it was before, since the set of parameters that
                                             require gradients changes from round to round; whether a tensor was
                                             replaced is looked at once
    with ``doing``                           the global random state is given back: :func:`~.rng.keeping_rng`; what is
                                             compiled runs as it was before where the block is watched for that
    with ``hooked``                          hooks of ours fire: what is compiled runs as it was before, and PyTorch's
                                             Transformer encoders run part by part
    ======================================== =========================================================================

    Buffers are restored because not all of them are statistics that eval mode leaves alone: a forward pass may count
    its calls, fill a queue or follow ranges in eval mode too.

    Args:
        model: A model.
        models: Further ones.
        doing: What kind of work it is: blocks of one kind on the same model are taken to draw alike. ``None`` inside a
            block that keeps the random state.
        passes: Whether the block runs the models itself; otherwise strategies in it do, and borrow them again.
        hooked: Whether it puts hooks on them.
        grad_to: The only parameters of the models to require gradients, which are enabled then.

    Yields:
        The first model: inside ``DistributedDataParallel``, whose own forward pass counts on a ``backward()`` of the
        host (:func:`inside_ddp`).
    """
    every = (model, *models)
    with ExitStack() as stack:
        watched = doing is not None and stack.enter_context(keeping_rng(doing, *every))
        if watched or hooked or not passes:
            stack.enter_context(_uncompiled(every))
        if not passes:
            stack.enter_context(looking_once(*every))
        if hooked:
            stack.enter_context(_part_by_part(every))
        if passes:
            stack.enter_context(_evaluating(every))
            if grad_to is None:
                stack.enter_context(torch.no_grad())
            else:
                others = [parameter for one in every for parameter in canonical_parameters(one).values()]
                stack.enter_context(requiring_grad(grad_to, of=others))
        yield inside_ddp(model)


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


def inside_ddp(model: nn.Module) -> nn.Module:
    """Return the model inside ``DistributedDataParallel``, any other model itself.

    The wrapper's forward pass prepares it for the host's next ``backward()``, and counts on that. A forward pass of
    ours, after which none comes, would break it or have it skip a broadcast of buffers.
    """
    wrapper = getattr(model, "_orig_mod", model)  # torch.compile around the wrapper
    return wrapper.module if isinstance(wrapper, DistributedDataParallel) else model


@contextmanager
def _evaluating(models: Tuple[nn.Module, ...]) -> Iterator[None]:
    parts = {model: modules_of(model) for model in models}
    modules = [module for some in parts.values() for module in some]
    changed = [module for module in modules if module.training]
    buffers: List[Buffers] = []
    complete = False

    def give_back() -> None:
        _set_training(changed, True)
        for one in buffers:
            one.put_back(complete=complete)
        reshard(modules)

    with undoing(give_back):
        buffers.extend(Buffers(model, some) for model, some in parts.items())
        _set_training(changed, False)
        yield
        complete = True


def _set_training(modules: Iterable[nn.Module], flag: bool) -> None:
    for module in modules:
        attributes = vars(module)
        if "training" in attributes:  # past Module.__setattr__, which takes forty times as long
            attributes["training"] = flag
        else:  # of a scripted module
            module.training = flag


@contextmanager
def _uncompiled(models: Tuple[nn.Module, ...]) -> Iterator[None]:
    """Run what ``torch.compile`` or ``Module.compile`` made of these models as it was before."""
    if "torch._dynamo" not in sys.modules:  # importing the compiler takes seconds; nothing is compiled without it
        yield
        return
    set_stance = getattr(getattr(torch, "compiler", None), "set_stance", None)
    if set_stance is not None:
        with set_stance("force_eager"):
            yield
        return
    # torch 2.0 to 2.5 has no stance: what these attributes call is put aside.
    changes: List[Tuple[Dict[str, Any], str, Any]] = []
    for module in {module for model in models for module in modules_of(model)}:
        attributes = vars(module)
        if "_orig_mod" in attributes.get("_modules", ()) and "forward" in attributes:
            changes.append((attributes, "forward", attributes["_modules"]["_orig_mod"]))
        if attributes.get("_compiled_call_impl") is not None:
            changes.append((attributes, "_compiled_call_impl", None))
    with _changed(changes):
        yield


@contextmanager
def _part_by_part(models: Tuple[nn.Module, ...]) -> Iterator[None]:
    """Run PyTorch's Transformer encoders through the modules that they are made of, also in eval mode.

    Their fast path calls none of these, so that no hook fires, and passes nested tensors from layer to layer.
    """
    mha = getattr(torch.backends, "mha", None)  # came with torch 2.3
    if mha is not None:
        before = mha.get_fastpath_enabled()
        with undoing(lambda: mha.set_fastpath_enabled(before)):
            mha.set_fastpath_enabled(False)
            yield
        return
    # From torch 1.12 on the fast path asks which activation a layer has; before it there is none.
    name = "activation_relu_or_gelu"
    layers = [vars(module) for model in models for module in modules_of(model)]
    with _changed([(attributes, name, 0) for attributes in layers if name in attributes]):
        yield


@contextmanager
def _changed(changes: Iterable[Tuple[Dict[str, Any], str, Any]]) -> Iterator[None]:
    """Let attributes (of whom, name, value) have other values in the block."""
    wanted = list(changes)
    before = [(attributes, name, attributes[name]) for attributes, name, _ in wanted]

    def write(values: Iterable[Tuple[Dict[str, Any], str, Any]]) -> None:
        for attributes, name, value in values:
            attributes[name] = value

    with undoing(lambda: write(before)):
        write(wanted)
        yield
