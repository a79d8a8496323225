"""What a module put out (and took in) during one forward pass, in a form that two different networks share."""

from __future__ import annotations

import functools
import math
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, Mapping, Optional, Set, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .undo import undoing

_SPATIAL = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}
_FIRST = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)
_POOLS: Tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)

LEAST_ROWS = 32
"""Samples (images x positions) below which nothing is read from how channels vary together.

Of two unrelated channels the correlation over n rows has a standard deviation of 1 / sqrt(n). The largest of a hundred
such correlations is about sqrt(2 log(100) / n): 0.54 over 32 rows, and 1, as high as that of a true match, over 9.
"""

Read = Callable[[str, nn.Module, Tuple[Any, ...], Any], None]
"""Receives ``(name, module, positional inputs, output)`` of a module's first call."""


@contextmanager
def capturing(modules: Mapping[str, nn.Module], read: Read) -> Iterator[None]:
    """Hand each module's first call to ``read`` while the context is open; leave no hook behind.

    The models are borrowed for that with ``borrowed(..., hooked=True)``.
    """
    seen: Set[str] = set()
    hooks: List[Any] = []

    def first_call(name: str, module: nn.Module, inputs: Tuple[Any, ...], output: Any) -> None:
        if name not in seen:
            seen.add(name)
            read(name, module, inputs, output)

    def remove() -> None:  # by what was registered: an interrupt may have kept a handle from us
        for module in modules.values():
            for key in [key for key, hook in module._forward_hooks.items() if hook in hooks]:
                del module._forward_hooks[key]

    with undoing(remove):
        for name, module in modules.items():
            hooks.append(functools.partial(first_call, name))
            module.register_forward_hook(hooks[-1])
        yield


def positions(value: Any, module: Optional[nn.Module], samples: int) -> Optional[Tensor]:
    """Bring an activation of ``module`` to ``(N, C, *grid)``, float32, of at most ``samples`` rows ``N * grid``.

    A sequence whose length is a square, or a square and a class token before it, becomes a square grid. A grid is
    averaged to fewer cells; of a batch larger than ``samples`` evenly spaced items are taken, without any draw. The
    result is a copy, which later in-place operations of the model (``ReLU(inplace=True)``) do not reach.

    Returns:
        ``None`` where the activation holds no floating-point tensor with a batch and a channel dimension.
    """
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, Tensor) or value.dim() < 2 or not value.is_floating_point() or value.numel() == 0:
        return None
    batch = value.detach()
    items = batch.shape[0]
    if items > samples:
        batch = batch[torch.tensor([index * items // samples for index in range(samples)], device=batch.device)]
    channel = channel_dim(batch, module)
    grid = batch.movedim(channel, 1).float()
    if batch.dim() == 3 and channel == 2:
        grid = _square(grid)
    if grid.dim() > 5:
        grid = grid.flatten(4)
    rank = grid.dim() - 2
    if rank:
        side = max(1, int((samples // grid.shape[0]) ** (1.0 / rank) + 1e-9))
        grid = _pool(grid, [min(size, side) for size in grid.shape[2:]])
    return grid.clone()


def channel_dim(value: Tensor, module: Optional[nn.Module]) -> int:
    """Return the channel dimension: 1 for what convolves or batch-normalises over this many axes, else the last.

    Of a module that holds nothing but vectors, such as a norm of the user's own, it is whichever of the two is as long
    as they are; where both are, 1 of images and the last of sequences. Without a module it is 1, as in logits.
    """
    rank, last = value.dim() - 2, value.dim() - 1
    if rank <= 0 or module is None:
        return 1
    if any(isinstance(part, (*_SPATIAL.get(rank, ()), *_FIRST)) for part in module.modules()):
        return 1
    vectors = list(module.parameters())
    # Of LayerNorm's subclasses there are some that go by dimension 1.
    if type(module) is nn.LayerNorm or not vectors or any(vector.dim() != 1 for vector in vectors):
        return last
    by_preference = (1, last) if rank > 1 else (last, 1)
    as_long = [dim for dim in by_preference if all(len(vector) == value.shape[dim] for vector in vectors)]
    return as_long[0] if as_long else last


def rows(first: Tensor, second: Tensor) -> Optional[Tuple[Tensor, Tensor]]:
    """Bring two results of :func:`positions` to matrices ``(n, C_1)`` and ``(n, C_2)`` whose rows correspond.

    Both are averaged to the smaller grid.

    Returns:
        ``None`` where the batch sizes or the ranks of the grids differ, so that rows do not correspond.
    """
    if first.shape[0] != second.shape[0] or first.dim() != second.dim():
        return None
    if first.dim() > 2:
        grid = [min(sizes) for sizes in zip(first.shape[2:], second.shape[2:])]
        first, second = _pool(first, grid), _pool(second, grid)
    return _matrix(first), _matrix(second)


def _square(value: Tensor) -> Tensor:
    length = value.shape[2]
    for skipped in (0, 1):
        side = math.isqrt(length - skipped)
        if side > 1 and side * side == length - skipped:
            return value[:, :, skipped:].reshape(value.shape[0], value.shape[1], side, side)
    return value


def _pool(value: Tensor, grid: List[int]) -> Tensor:
    return value if list(value.shape[2:]) == grid else _POOLS[len(grid) - 1](value, grid)


def _matrix(value: Tensor) -> Tensor:
    return value.flatten(2).transpose(1, 2).reshape(-1, value.shape[1]) if value.dim() > 2 else value
