"""How the losses compute: in chunks, each in float64, and with little kept between forward and backward pass.

In float32 the squares of rare classes' probabilities underflow, differences of large values overflow, and the
difference of two nearly equal distributions is rounding. A chunk is small, so float64 costs hardly any memory.
"""

from __future__ import annotations

from typing import Any, Iterator, List, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor

from .._host.compat import autocast_off, has_float64
from ..errors import problem
from .positions import Aligned

__all__ = [
    "Chunk",
    "KeepsGradient",
    "computed",
    "in_chunks",
    "mean_computed",
    "narrowed",
    "never",
    "only_first_derivatives",
    "shares",
    "to_exponentials",
]

Chunk = Tuple[slice, slice, slice]

_ON_CPU, _ELSEWHERE = 1 << 17, 1 << 19
"""Elements worked on at a time; the temporaries are a few times this. On a CPU small ones stay in the cache, and the
allocator keeps the memory of larger ones; elsewhere each chunk costs the launch of its kernels."""


def computed(function: Type[torch.autograd.Function], pair: Aligned, *options: Any) -> Tensor:
    """Return the loss that an autograd function computes from a pair, whatever autocast says."""
    with autocast_off(pair.student.device.type):
        loss: Tensor = function.apply(*pair, *options)  # type: ignore[no-untyped-call]
    return loss


def mean_computed(function: Type[torch.autograd.Function], pairs: Sequence[Aligned], *options: Any) -> Tensor:
    """Return the mean of the losses of several pairs, each :func:`computed`."""
    losses = [computed(function, pair, *options) for pair in pairs]
    return sum(losses[1:], losses[0]) / len(losses)


def in_chunks(
    tensors: Sequence[Tensor], weights: Optional[Tensor], *, dim: int = 1, spare: int = 0
) -> Iterator[Tuple[Chunk, Tensor]]:
    """Go through tensors chunk by chunk, each chunk in the precision in which we compute.

    Args:
        tensors: All of one shape ``(N, A, B)``.
        weights: Shape ``(N, B)``. Positions of weight 0 are read as zeros, so that no NaN gets out of them.
        dim: The dimension along which every chunk is whole, 1 or 2.
        spare: How many further tensors of a chunk's size are wanted to work in.

    Yields:
        Which part of the tensors it is; and these parts, then the spare memory, ``(len(tensors) + spare, n, a, b)``.
        The next chunk overwrites them: to allocate memory for each would take longer than the arithmetic.
    """
    like, count = tensors[0], len(tensors)
    parts = _parts(like, dim)
    memory = like.new_empty(count + spare, like[parts[0]].numel(), dtype=_working_dtype(like.device))
    for chunk in parts:
        part = like[chunk]
        values = memory[:, : part.numel()].view(-1, *part.shape)
        for into, tensor in zip(values, tensors):
            into.copy_(tensor[chunk])
        if weights is not None:
            values[:count].masked_fill_((weights[chunk[0], chunk[2]] == 0).unsqueeze(1), 0.0)
        yield chunk, values


def shares(shape: Sequence[int], weights: Optional[Tensor], like: Tensor) -> Tensor:
    """Return each position's share of the mean, ``(N, P)`` as ``shape`` says: of sum 1, or 0 if all weights are 0."""
    dtype = _working_dtype(like.device)
    if weights is None:
        return like.new_full((1, 1), 1 / (shape[0] * shape[1]), dtype=dtype).expand(*shape)
    weights = weights.to(dtype)
    valid = weights.sum()
    return weights / valid.masked_fill(valid == 0, 1.0)


def never(dtype: torch.dtype) -> float:
    """Return a logit whose probability is 0 beside any other; finite, so that a difference of two is not NaN."""
    return torch.finfo(dtype).min / 8


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


class KeepsGradient(torch.autograd.Function):
    """Keeps the gradient instead of the intermediate results, which are several times as large."""

    @staticmethod
    def keep(ctx: Any, gradient: Tensor, share: Tensor, factor: float, dtype: torch.dtype) -> None:
        """Keep the student's gradient of this dtype, but for the factor and the positions' shares of the mean.

        With these it would vanish in half precision.
        """
        ctx.save_for_backward(gradient, share)
        ctx.factor, ctx.dtype = factor, dtype

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tuple[Optional[Tensor], ...]:
        """Return the student's gradient, and none for the other arguments."""
        only_first_derivatives()
        gradient, share = ctx.saved_tensors
        out = torch.empty_like(gradient, dtype=ctx.dtype)
        torch.mul(gradient, share * (ctx.factor * upstream), out=out)
        return (out, *[None] * (len(ctx.needs_input_grad) - 1))


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


def _working_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if has_float64(device) else torch.float32


def _parts(tensor: Tensor, dim: int) -> List[Chunk]:
    samples, width, others = tensor.shape[0], tensor.shape[dim], tensor.shape[3 - dim]
    size = _ON_CPU if tensor.device.type == "cpu" else _ELSEWHERE
    rows = max(1, size // (width * others))
    columns = max(1, size // (width * rows))
    across = [slice(column, column + columns) for column in range(0, others, columns)]
    picked = [(slice(None), some) if dim == 1 else (some, slice(None)) for some in across]
    return [(slice(row, row + rows), *some) for row in range(0, samples, rows) for some in picked]
