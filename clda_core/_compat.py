"""The one place that knows which torch is installed: newer features where present, from torch 1.7.1 on."""

from __future__ import annotations

from typing import Any, List, Sequence

import torch
from torch import Tensor


def lerp_(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Move each target in place towards its source: ``target <- target + weight · (source - target)``.

    Fused across tensors where torch has the kernel. Sources are brought to their target's dtype and device.
    """
    with torch.no_grad():
        matched = [source.to(target) for target, source in zip(targets, sources)]
        fused = getattr(torch, "_foreach_lerp_", None)
        if fused is not None and matched:
            fused(list(targets), matched, weight)
            return
        for target, source in zip(targets, matched):
            target.lerp_(source, weight)


def scaler_step(scaler: Any, optimizer: Any) -> bool:
    """Call ``scaler.step(optimizer)`` and return whether the optimizer really stepped.

    A GradScaler skips the step after an overflow without saying so, so ``optimizer.step`` is watched for the call; it
    is the instance's own again afterwards.
    """
    calls: List[bool] = []
    inner = optimizer.step
    own = vars(optimizer).get("step")

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(True)
        return inner(*args, **kwargs)

    optimizer.step = watched
    try:
        scaler.step(optimizer)
    finally:
        if own is None:
            del optimizer.step
        else:
            optimizer.step = own
    return bool(calls)
