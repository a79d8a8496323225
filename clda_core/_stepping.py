"""Stepping the host's optimizer: alone, through a GradScaler, or through the host's own function."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, Optional, Tuple


def make_step(
    optimizer: Any,
    scaler: Any = None,
    step_fn: Optional[Callable[[], Any]] = None,
    stepped: Optional[Callable[[], bool]] = None,
) -> Tuple[Any, bool]:
    """Step, and return what the step returned and whether it was made."""
    if scaler is not None and step_fn is None:
        return None, scaler_step(scaler, optimizer)
    result = optimizer.step() if step_fn is None else step_fn()
    if stepped is not None:
        return result, bool(stepped())
    # Accelerate's optimizer, which holds the scaler itself, says so by this property.
    return result, step_fn is not None or not getattr(optimizer, "step_was_skipped", False)


def accumulates(optimizer: Any) -> bool:
    """Return whether the optimizer's ``step()`` waits for further micro-batches, as Accelerate's does."""
    return not getattr(getattr(optimizer, "gradient_state", None), "sync_gradients", True)


def unscale(scaler: Any, optimizer: Any) -> None:
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        # The host has unscaled already, to clip gradients for example; GradScaler offers no way to ask.
        if "unscale_() has already been called" not in str(error):
            raise


def scaler_step(scaler: Any, optimizer: Any) -> bool:
    """Call ``scaler.step(optimizer)`` and return whether the optimizer really stepped."""
    with watching(optimizer) as stepped:
        scaler.step(optimizer)
    return stepped()


@contextmanager
def watching(optimizer: Any) -> Iterator[Callable[[], bool]]:
    """Watch an optimizer that a GradScaler steps; what is yielded returns whether it did.

    A GradScaler skips the step after an overflow without saying so, so ``optimizer.step`` is watched for the call; it
    is the instance's own again afterwards. A fused optimizer is called all the same and skips on the device, by the
    ``found_inf`` it is handed; reading that waits for the device, as every other optimizer does under a GradScaler.
    """
    overflows: List[Any] = []
    inner = optimizer.step
    own = vars(optimizer).get("step")

    @functools.wraps(inner)
    def watched(*args: Any, **kwargs: Any) -> Any:
        overflows.append(getattr(optimizer, "found_inf", None))
        return inner(*args, **kwargs)

    optimizer.step = watched
    try:
        yield lambda: bool(overflows) and not any(overflow is not None and bool(overflow) for overflow in overflows)
    finally:
        if own is None:
            del optimizer.step
        else:
            optimizer.step = own
