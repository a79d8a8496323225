"""Accelerate's optimizer: it wraps another, decides by itself when that steps, and may hold its GradScaler."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional


class Accelerated(NamedTuple):
    """What is in an optimizer of Accelerate.

    Attributes:
        optimizer: The one that it wraps.
        scaler: The GradScaler that it steps through, if any.
        accumulates: Whether its ``step()`` now waits for further micro-batches.
    """

    optimizer: Any
    scaler: Any
    accumulates: bool


def accelerated(optimizer: Any) -> Optional[Accelerated]:
    """Return what is in an optimizer of Accelerate, and ``None`` for any other."""
    if not hasattr(optimizer, "step_was_skipped"):
        return None
    return Accelerated(
        getattr(optimizer, "optimizer", optimizer),
        getattr(optimizer, "scaler", None),
        not getattr(getattr(optimizer, "gradient_state", None), "sync_gradients", True),
    )


class AcceleratedWatch:
    """Watches an optimizer of Accelerate until it is closed, as :class:`~.stepping.StepWatch` does others.

    It says when its scaler skipped the step. Of a fused optimizer it takes every step for made: from torch 2.0 on the
    ``found_inf`` that this was handed is looked at too, by a hook, since Accelerate exchanges its ``step``.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._overflow: Any = None
        register = getattr(getattr(optimizer, "optimizer", None), "register_step_post_hook", None)
        self._handle = None if register is None else register(self._note)

    def _note(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._overflow = getattr(optimizer, "found_inf", None)

    def stepped(self) -> bool:
        """Return whether the step was made."""
        return not self._optimizer.step_was_skipped and (self._overflow is None or not bool(self._overflow))

    def close(self) -> None:
        """Watch no more."""
        if self._handle is not None:
            self._handle.remove()

    def __enter__(self) -> AcceleratedWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
