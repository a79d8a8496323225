"""What the losses that work in chunks share: they keep their gradient instead of several times as much in between."""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..errors import problem

__all__ = ["Chunk", "chunks", "only_first_derivatives", "shares", "values_in"]

Chunk = Tuple[slice, slice, slice]

_ON_CPU, _ELSEWHERE = 1 << 17, 1 << 20
"""Elements worked on at a time; the temporaries are a few times this. On a CPU small ones stay in the cache, and the
allocator keeps the memory of larger ones; elsewhere each chunk costs the launch of its kernels."""


def chunks(tensor: Tensor, dim: int = 1) -> List[Chunk]:
    """Return the parts of a tensor ``(N, A, B)`` to be worked on one by one, each whole along ``dim``."""
    samples, width, others = tensor.shape[0], tensor.shape[dim], tensor.shape[3 - dim]
    size = _ON_CPU if tensor.device.type == "cpu" else _ELSEWHERE
    rows = max(1, size // (width * others))
    columns = max(1, size // (width * rows))
    everything, found = slice(None), []
    for row in range(0, samples, rows):
        for column in range(0, others, columns):
            part = slice(column, column + columns)
            picked = (everything, part) if dim == 1 else (part, everything)
            found.append((slice(row, row + rows), *picked))
    return found


def shares(shape: Sequence[int], weights: Optional[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return each position's share of the mean, ``(N, P)`` as ``shape`` says: of sum 1, or 0 if all weights are 0."""
    if weights is None:
        return torch.full((1, 1), 1 / (shape[0] * shape[1]), dtype=dtype, device=like.device).expand(*shape)
    valid = weights.sum()
    return weights / valid.masked_fill(valid == 0, 1.0)


def values_in(
    chunk: Chunk, student: Tensor, teacher: Tensor, ignored: Optional[Tensor], dtype: torch.dtype
) -> Tuple[Tensor, Tensor]:
    """Return a chunk of both tensors in ``dtype``, with zeros where a position is ignored, so that no NaN gets out."""
    x, y = student[chunk].to(dtype), teacher[chunk].to(dtype)
    return (x, y) if ignored is None else (x.masked_fill(ignored, 0.0), y.masked_fill(ignored, 0.0))


def only_first_derivatives() -> None:
    """Raise in a backward pass that is to be differentiated again.

    torch's ``once_differentiable`` would let ``create_graph=True`` pass, and second derivatives silently miss the loss.
    """
    if torch.is_grad_enabled():
        raise problem(
            "the loss cannot be differentiated twice",
            expected="a backward pass without create_graph=True",
            received="create_graph=True",
            fix="take second derivatives of the other losses alone, or of a plain function of the logits",
        )
