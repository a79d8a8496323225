"""Which buffers are running statistics of a norm: of all that a model keeps in buffers, the only ones to average."""

from __future__ import annotations

from typing import FrozenSet, List, Tuple

from torch import Tensor, nn

from .._host.names import canonical_modules

__all__ = ["frozen_norms", "running_statistics"]

NO_STATISTIC = "it is no running statistic of a norm"

_STATISTICS = ("running_mean", "running_var")


def running_statistics(model: nn.Module) -> FrozenSet[str]:
    """Return the canonical names of the running means and variances that the norms of a model keep in buffers.

    A norm is a module that has both, as PyTorch's batch and instance norms and most of users' own. Of a frozen one,
    which keeps its weight in a buffer too, they are constants and not among these.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> norm.register_buffer("temperature", norm.running_mean[:1])
        >>> sorted(running_statistics(norm))
        ['running_mean', 'running_var']
    """
    return _buffers(model, _STATISTICS, frozen=False)


def frozen_norms(model: nn.Module) -> FrozenSet[str]:
    """Return the canonical names of the buffers of frozen norms: weight and bias beside the running statistics."""
    return _buffers(model, (*_STATISTICS, "weight", "bias"), frozen=True)


def _buffers(model: nn.Module, wanted: Tuple[str, ...], frozen: bool) -> FrozenSet[str]:
    found: List[str] = []
    for name, module in canonical_modules(model).items():
        held = {key for key, value in module._buffers.items() if isinstance(value, Tensor)}
        if held.issuperset(_STATISTICS) and ("weight" in held) == frozen:
            found += [f"{name}.{key}" if name else key for key in wanted if key in held]
    return frozenset(found)
