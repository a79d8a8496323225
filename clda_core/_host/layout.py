"""Where the elements of tensors lie in memory: what flat kernels must be given, and which tensors overlap.

A fused optimizer pairs the elements of parameter, gradient and moments by their place in memory, not by their index.
"""

from __future__ import annotations

from typing import Iterator, List, Mapping, Tuple

import torch
from torch import Tensor

from .shards import as_sharded, is_sharded, local


def strided(tensor: Tensor) -> Tensor:
    """Return a tensor with one memory place for each element: a sparse gradient densified, a conjugate resolved."""
    if tensor.layout != torch.strided:
        return tensor.to_dense()
    return tensor.resolve_conj() if hasattr(torch, "resolve_conj") and tensor.is_complex() else tensor


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor's elements fill their memory in some order, without gaps and without overlap."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor with its elements in the memory order of another one of the same shape.

    Everything that enters an optimizer together with a parameter (gradient, moments) goes through here:
    ``torch.autograd.grad``, reductions over ranks and checkpoints keep no such order.

    Args:
        tensor: Strided or sparse, on any memory; of a sharded ``like`` sharded alike.
        like: The parameter. If it is not :func:`is_dense` no flat kernel may read it, and any order is returned.

    Returns:
        ``tensor`` itself or a view of it if the order is right, else a copy; with the strides of ``like``.
    """
    if is_sharded(like):
        part = local(tensor)
        ordered = laid_out_like(part, local(like))
        return tensor if ordered is part else as_sharded(ordered, like)
    values = strided(tensor)
    if values.stride() == like.stride():
        return values
    pairs = zip(values.shape, values.stride(), like.stride())
    if is_dense(like) and all(size == 1 or ours == theirs for size, ours, theirs in pairs):
        return values.as_strided(values.shape, like.stride(), values.storage_offset())
    return torch.empty_like(like, dtype=values.dtype, device=values.device).copy_(values)


_Memory = Tuple[str, int, int, str, Tensor]
"""Device and range of addresses in bytes, of which a tensor may use a part; its name and the tensor."""


def overlaps(tensors: Mapping[str, Tensor]) -> List[Tuple[str, str]]:
    """Return the pairs of names whose tensors have memory in common; of a tensor that overlaps itself its name twice.

    Tensors without memory (empty ones, those on the meta device) overlap nothing. Views that are interleaved without
    a common element, such as the two halves of the columns of a matrix, do not overlap.
    """
    found: List[Tuple[str, str]] = []
    active: List[_Memory] = []
    for memory in sorted(_memories(tensors), key=lambda one: one[:3]):
        device, start, _, name, tensor = memory
        active = [other for other in active if other[0] == device and other[2] > start]
        found += [(other, name) for *_, other, its in active if _share(its, tensor)]
        if _overlaps_itself(tensor):
            found.append((name, name))
        active.append(memory)
    return found


def _memories(tensors: Mapping[str, Tensor]) -> Iterator[_Memory]:
    for name, tensor in tensors.items():
        part = local(tensor)
        if part.device.type == "meta" or part.layout != torch.strided or not part.numel():
            continue
        try:
            start = part.data_ptr()
        except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
            continue
        extent = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride())) + 1
        if start:
            yield str(part.device), start, start + extent * part.element_size(), name, part


def _share(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors whose ranges of addresses meet have an element in common."""
    if is_dense(first) and is_dense(second) or first.element_size() != second.element_size():
        return True
    both = torch.cat([torch.unique(_places(first)), torch.unique(_places(second))])
    return len(torch.unique(both)) < len(both)


def _overlaps_itself(tensor: Tensor) -> bool:
    extent = 1
    for stride, size in sorted(_dimensions(tensor)):
        if stride < extent:
            return len(torch.unique(_places(tensor))) < tensor.numel()
        extent += (size - 1) * stride
    return False


def _dimensions(tensor: Tensor) -> Iterator[Tuple[int, int]]:
    return ((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)


def _places(tensor: Tensor) -> Tensor:
    """Return the addresses of all elements, in bytes."""
    places = torch.tensor([tensor.data_ptr()], dtype=torch.int64, device="cpu")
    for stride, size in _dimensions(tensor):
        steps = torch.arange(size, dtype=torch.int64, device="cpu") * (stride * tensor.element_size())
        places = (places[:, None] + steps).reshape(-1)
    return places
