"""Where the elements of tensors lie in memory: what flat kernels must be given, and which tensors overlap.

A fused optimizer pairs the elements of parameter, gradient and moments by their place in memory, not by their index.
"""

from __future__ import annotations

from typing import Iterator, List, Mapping, NamedTuple, Optional, Tuple

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


class _Memory(NamedTuple):
    """The memory of one tensor: a device and a range of addresses in bytes, of which it may use a part."""

    name: str
    tensor: Tensor
    device: str
    start: int
    end: int


def overlaps(tensors: Mapping[str, Tensor]) -> List[Tuple[str, str]]:
    """Return the pairs of names whose tensors have memory in common; of a tensor that overlaps itself its name twice.

    Tensors without memory (empty ones, those on the meta device) overlap nothing. Views that are interleaved without
    a common element, such as the two halves of the columns of a matrix, do not overlap.
    """
    found: List[Tuple[str, str]] = []
    active: List[_Memory] = []
    everything = [memory for memory in (_memory(name, tensor) for name, tensor in tensors.items()) if memory]
    for memory in sorted(everything, key=lambda one: (one.device, one.start, one.end)):
        active = [other for other in active if other.device == memory.device and other.end > memory.start]
        found += [(other.name, memory.name) for other in active if _share(other.tensor, memory.tensor)]
        if _overlaps_itself(memory.tensor):
            found.append((memory.name, memory.name))
        active.append(memory)
    return found


def _memory(name: str, tensor: Tensor) -> Optional[_Memory]:
    part = local(tensor)
    if part.device.type == "meta" or part.layout != torch.strided or not part.numel():
        return None
    try:
        start = part.data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
        return None
    extent = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride())) + 1
    return _Memory(name, part, str(part.device), start, start + extent * part.element_size()) if start else None


def _share(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors whose ranges of addresses meet have an element in common."""
    if is_dense(first) and is_dense(second) or first.element_size() != second.element_size():
        return True
    return _repeated(torch.cat([_distinct(_places(first)), _distinct(_places(second))]))


def _overlaps_itself(tensor: Tensor) -> bool:
    extent = 1
    for stride, size in sorted(_dimensions(tensor)):
        if stride < extent:
            return _repeated(_places(tensor))
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


def _distinct(places: Tensor) -> Tensor:
    ordered = places.sort()[0]
    return torch.cat([ordered[:1], ordered[1:][ordered[1:] != ordered[:-1]]])


def _repeated(places: Tensor) -> bool:
    return len(_distinct(places)) < len(places)
