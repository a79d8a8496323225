"""Telling the gradients that the host computes for a co-trained teacher from left-over ones."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Mapping, Tuple

import torch
from torch import Tensor, nn

from .._host.layout import strided
from .._host.shards import local, sum_over_shards
from ..errors import CldaError, problem
from ..layers import canonical_parameters

Leftover = Mapping[str, Tuple[Tensor, int]]
"""Gradients by parameter name, each with its version, which any write to it raises."""


def leftover_gradients(model: nn.Module) -> Dict[str, Tuple[Tensor, int]]:
    """Return the gradients that the parameters hold now.

    The tensors are held, since an address or an ``id`` may come back with the next gradient; drop them with
    :func:`still_leftover` as soon as the host has dropped them.
    """
    return {
        name: (parameter.grad, int(parameter.grad._version))
        for name, parameter in canonical_parameters(model).items()
        if parameter.grad is not None
    }


def still_leftover(model: nn.Module, leftover: Leftover) -> Dict[str, Tuple[Tensor, int]]:
    """Return those of the gradients that are still there and were not written to."""
    if not leftover:
        return {}
    now = leftover_gradients(model)
    return {
        name: (gradient, version)
        for name, (gradient, version) in leftover.items()
        if name in now and now[name][0] is gradient and now[name][1] == version
    }


def weakly(leftover: Leftover) -> Dict[str, Tuple[Any, int]]:
    """Return weak references to gradients, which hold no memory that the host frees.

    Before torch 1.9 they refer to nothing, since the gradient's Python object is made anew wherever it is asked for.
    """
    return {name: (weakref.ref(gradient), version) for name, (gradient, version) in leftover.items()}


def alive(references: Mapping[str, Tuple[Any, int]]) -> Dict[str, Tuple[Tensor, int]]:
    """Return the gradients of :func:`weakly` that the host has not dropped."""
    found = {name: (reference(), version) for name, (reference, version) in references.items()}
    return {name: (gradient, version) for name, (gradient, version) in found.items() if gradient is not None}


def hosts_gradients(model: nn.Module, leftover: Leftover) -> Dict[str, Tensor]:
    """Return the gradients that the host computed, by parameter name.

    Those that are zero in every element are left out: ``zero_grad()`` without ``set_to_none`` leaves them on parameters
    that the loss does not use, whose saliency is unknown. Synchronises once with the device.

    Args:
        model: The teacher.
        leftover: Gradients to ignore: those from before the learner was built, or that were observed before.
    """
    stale = still_leftover(model, leftover)
    found = {
        name: strided(parameter.grad)
        for name, parameter in canonical_parameters(model).items()
        if parameter.requires_grad and parameter.grad is not None and name not in stale
    }
    if not found:
        return {}
    device = next(iter(found.values())).device
    used = torch.stack([local(gradient).ne(0).any().to(device) for gradient in found.values()])
    flags: List[float] = sum_over_shards(used.float(), list(found.values())).tolist()
    return {name: gradient for (name, gradient), flag in zip(found.items(), flags) if flag}


_KNOWN = {
    "incompatible with .grad()": (
        "reentrant activation checkpointing cannot be differentiated by single parameters",
        "checkpointing without use_reentrant=True, or none, in the teacher",
        "pass use_reentrant=False to checkpoint(), or switch checkpointing off in the teacher (with_cp=False, "
        "gradient_checkpointing_disable()), which is not trained by backward()",
    ),
    "not compatible with .grad()": (),  # the same before torch 1.13
    "Inference tensors cannot be saved": (
        "tensors made in inference mode cannot be differentiated through",
        "inputs and a teacher made outside of torch.inference_mode()",
        "use torch.no_grad() where the loader or the teacher is made, or pass inputs.clone()",
    ),
}
"""By what torch says, what that means and how to avoid it."""


@contextmanager
def explained(*, known_only: bool = False) -> Iterator[None]:
    """Raise what fails inside as a :class:`CldaError` with the fix, where there is one.

    Args:
        known_only: Let pass what has no explanation here; it is said to be of a rehearsal otherwise.
    """
    try:
        yield
    except CldaError:
        raise
    except Exception as error:
        found = [text for text in _KNOWN if text in str(error)]
        if found:
            what, expected, fix = _KNOWN[found[0]] or next(iter(_KNOWN.values()))
            received = str(error).strip().splitlines()[0]
            raise problem(what, expected=expected, received=received, fix=fix) from error
        if known_only:
            raise
        raise CldaError(
            f"a round would fail: its rehearsal in the first step raised {type(error).__name__}: {error}. Nothing was "
            "changed. Fix: see the exception that caused this one"
        ) from error
