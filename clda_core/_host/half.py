"""Half precision inside of models: the gradients of our losses, where the host scales its own.

Of the mean over all pixels of a batch the gradient by one pixel is too small for float16. A model that computes in
float16, as under autocast, would have gradients of zero.
"""

from __future__ import annotations

from typing import Any, List, Optional, Sequence

from torch import Tensor

__all__ = ["SCALE", "loss_scale", "unscaled"]

SCALE = 2.0**12
"""A sixteenth of what GradScaler begins with, which is too much for many models. A power of two rounds nothing."""


def loss_scale(scaler: Any) -> float:
    """Return by what we multiply our losses before they are differentiated: 1 unless the host scales its own."""
    enabled = getattr(scaler, "is_enabled", lambda: scaler is not None)
    return SCALE if enabled() else 1.0


def unscaled(gradients: Sequence[Optional[Tensor]], scale: float) -> List[Optional[Tensor]]:
    """Return the gradients of a loss from those of the scaled one."""
    if scale == 1:
        return list(gradients)
    return [None if gradient is None else gradient / scale for gradient in gradients]
