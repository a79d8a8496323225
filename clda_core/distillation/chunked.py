"""What the losses share: they work in chunks, each in float64, and keep little between forward and backward pass.

In float32 the squares of rare classes' probabilities underflow, differences of large values overflow, and the
difference of two nearly equal distributions is rounding. A chunk is small, so float64 costs hardly any memory.
"""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..errors import problem

__all__ = [
    "Chunk",
    "buffers",
    "chunks",
    "kept_gradient",
    "narrowed",
    "never",
    "only_first_derivatives",
    "read_both",
    "shares",
    "to_exponentials",
    "values_in",
    "working_dtype",
]

Chunk = Tuple[slice, slice, slice]

_ON_CPU, _ELSEWHERE = 1 << 17, 1 << 20
"""Elements worked on at a time; the temporaries are a few times this. On a CPU small ones stay in the cache, and the
allocator keeps the memory of larger ones; elsewhere each chunk costs the launch of its kernels."""


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64, or float32 on devices of which some have no float64."""
    return torch.float64 if tensor.device.type in ("cpu", "cuda") else torch.float32


def never(dtype: torch.dtype) -> float:
    """Return a logit whose probability is 0 beside any other; finite, so that a difference of two is not NaN."""
    return torch.finfo(dtype).min / 8


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


def shares(shape: Sequence[int], weights: Optional[Tensor], like: Tensor) -> Tensor:
    """Return each position's share of the mean, ``(N, P)`` as ``shape`` says: of sum 1, or 0 if all weights are 0."""
    dtype = working_dtype(like)
    if weights is None:
        return torch.full((1, 1), 1 / (shape[0] * shape[1]), dtype=dtype, device=like.device).expand(*shape)
    weights = weights.to(dtype)
    valid = weights.sum()
    return weights / valid.masked_fill(valid == 0, 1.0)


def values_in(chunk: Chunk, values: Tensor, weights: Optional[Tensor]) -> Tensor:
    """Return a chunk of ``values``, with zeros where a position's weight is 0, so that no NaN gets out of it."""
    part = values[chunk].to(working_dtype(values))
    return part if weights is None else part.masked_fill((weights[chunk[0], chunk[2]] == 0).unsqueeze(1), 0.0)


def buffers(count: int, like: Tensor, part: Chunk) -> Tensor:
    """Return memory ``(count, elements)`` for tensors of a chunk's size, which all chunks use in turn.

    To allocate it anew for each takes longer than the arithmetic. ``part`` is the first chunk, which is the largest.
    """
    return torch.empty(count, like[part].numel(), dtype=working_dtype(like), device=like.device)


def read_both(chunk: Chunk, student: Tensor, teacher: Tensor, weights: Optional[Tensor], memory: Tensor) -> Tensor:
    """Copy a chunk of both models' logits into memory.

    Args:
        chunk: What to read.
        student: Shape ``(N, C, P)``.
        teacher: Likewise.
        weights: Shape ``(N, P)``. Positions of weight 0 are read as zeros, so that no NaN gets out of them.
        memory: From :func:`buffers`, at least two tensors.

    Returns:
        All the memory as ``(count, n, c, p)``: the chunk of the student, that of the teacher, and what is free.
    """
    part = student[chunk]
    found = memory[:, : part.numel()].view(-1, *part.shape)
    found[0].copy_(part)
    found[1].copy_(teacher[chunk])
    if weights is not None:
        found[:2].masked_fill_((weights[chunk[0], chunk[2]] == 0).unsqueeze(1), 0.0)
    return found


def to_exponentials(logits: Tensor, temperature: float, dim: int, out: Optional[Tensor] = None) -> Tensor:
    """Subtract the largest along ``dim`` and divide by the temperature, in place; write the exponentials to ``out``.

    Without ``out`` they overwrite the logits.
    """
    logits.sub_(logits.amax(dim, keepdim=True))
    if temperature != 1:
        logits.div_(temperature)
    return torch.exp(logits, out=logits if out is None else out)


def narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a finite value that ``dtype`` cannot hold as its largest, so that only what was infinite is infinite."""
    return torch.where(torch.isinf(value), value, value.clamp(max=torch.finfo(dtype).max)).to(dtype)


def kept_gradient(ctx: Any, upstream: Tensor) -> Tensor:
    """Return the student's gradient in a backward pass, from what the forward pass kept.

    Kept are ``ctx.saved_tensors``: the gradient without the positions' shares of the mean, which would make it vanish
    in half precision, and these shares; and ``ctx.factor`` and ``ctx.dtype``.
    """
    only_first_derivatives()
    gradient, share = ctx.saved_tensors
    out = torch.empty_like(gradient, dtype=ctx.dtype)
    return torch.mul(gradient, share * (ctx.factor * upstream), out=out)


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
