"""What several processes need: reductions by which every rank takes the same decision."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Iterator, List, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import problem

_has_data: ContextVar[bool] = ContextVar("_has_data", default=True)
"""Whether what this rank reduces counts.

A context rather than an argument, since relations and criteria reduce too: their signatures know nothing of ranks.
"""


@contextmanager
def adding(has_data: bool) -> Iterator[None]:
    """Let this rank add to sums and means inside the block only if it has data; it makes every call all the same."""
    token = _has_data.set(has_data)
    try:
        yield
    finally:
        _has_data.reset(token)


def world_size() -> int:
    """Return the number of ranks, 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_across_ranks(tensors: Sequence[Tensor]) -> List[Tensor]:
    """Return each tensor summed over the ranks with data; in one process the tensors themselves.

    One call for each dtype and device. What comes back is row-major, whatever the layout was: bring it to that of a
    parameter before it meets one in an optimizer (:func:`clda_core._host.layout.laid_out_like`).
    """
    if world_size() == 1:
        return list(tensors)
    summed: List[Tensor] = list(tensors)
    # Not a set, whose order differs from process to process.
    for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):
        chosen = [index for index, tensor in enumerate(tensors) if (tensor.dtype, tensor.device) == kind]
        flat = torch.cat([tensors[index].reshape(-1) for index in chosen])
        if not _has_data.get():
            flat.zero_()
        dist.all_reduce(torch.view_as_real(flat) if flat.is_complex() else flat)
        offset = 0
        for index in chosen:
            size = tensors[index].numel()
            summed[index] = flat[offset : offset + size].view_as(tensors[index])
            offset += size
    return summed


def mean_across_ranks(tensors: Sequence[Tensor]) -> List[Tensor]:
    """Return each tensor averaged over the ranks with data; in one process the tensors themselves.

    Raises:
        CldaError: On every rank, if none has data.
    """
    if world_size() == 1:
        return list(tensors)
    *summed, ranks = sum_across_ranks([*tensors, tensors[0].new_ones(1)])
    count = _checked(ranks.item())
    return [tensor / count for tensor in summed]


def mean_where_seen(found: Sequence[Optional[Tensor]], like: Sequence[Tensor]) -> List[Optional[Tensor]]:
    """Average tensors of which some ranks may lack some; the result is ``None`` where every rank lacks it.

    Args:
        found: This rank's tensors, ``None`` where it has none, which counts as zeros.
        like: Tensors of the same shapes.

    Raises:
        CldaError: On every rank, if none has data.
    """
    if world_size() == 1:
        return list(found)
    flags = [*[float(tensor is not None) for tensor in found], 1.0]
    filled = [torch.zeros_like(twin) if tensor is None else tensor for tensor, twin in zip(found, like)]
    summed = sum_across_ranks([*filled, torch.tensor(flags, dtype=torch.float32, device=like[0].device)])
    *seen, ranks = summed.pop().tolist()
    count = _checked(ranks)
    return [tensor / count if any_rank else None for tensor, any_rank in zip(summed, seen)]


def share_of_mean(device: torch.device) -> float:
    """Return by what this rank multiplies its loss, so that a mean over all ranks is one over the ranks with data."""
    count = _checked(sum_across_ranks([torch.ones(1, device=device)])[0].item())
    return world_size() / count if _has_data.get() else 0.0


def _checked(ranks: float) -> float:
    if not ranks:
        raise problem(
            "no rank has data at this step",
            expected="a batch that is neither empty nor masked out whole on at least one rank",
            received="none on any rank",
            fix="skip the step on every rank",
        )
    return ranks
