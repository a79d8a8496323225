"""The one reduction the learner needs, so that every rank takes the same decision."""

from __future__ import annotations

from typing import List, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks, 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_across_ranks(tensors: Sequence[Tensor]) -> List[Tensor]:
    """Return each tensor summed over all ranks, in one call a dtype; without a process group the tensors themselves."""
    if world_size() == 1:
        return list(tensors)
    summed: List[Tensor] = list(tensors)
    # Not a set, whose order differs from process to process.
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[index].reshape(-1) for index in chosen])
        dist.all_reduce(flat)
        offset = 0
        for index in chosen:
            size = tensors[index].numel()
            summed[index] = flat[offset : offset + size].view_as(tensors[index])
            offset += size
    return summed


def mean_across_ranks(tensors: Sequence[Tensor]) -> List[Tensor]:
    """Return each tensor averaged over all ranks; without a process group the tensors themselves."""
    size = world_size()
    return list(tensors) if size == 1 else [tensor / size for tensor in sum_across_ranks(tensors)]


def mean_where_seen(found: Sequence[Optional[Tensor]], like: Sequence[Tensor]) -> List[Optional[Tensor]]:
    """Average tensors of which some ranks may lack some; the result is ``None`` where every rank lacks it.

    Args:
        found: This rank's tensors, ``None`` where it has none.
        like: Tensors of the same shapes, which stand in as zeros.
    """
    if world_size() == 1:
        return list(found)
    flags = torch.tensor([tensor is not None for tensor in found], dtype=torch.float32, device=like[0].device)
    filled = [torch.zeros_like(twin) if tensor is None else tensor for tensor, twin in zip(found, like)]
    summed = sum_across_ranks([*filled, flags])
    seen = summed.pop().tolist()
    return [tensor / world_size() if any_rank else None for tensor, any_rank in zip(summed, seen)]
