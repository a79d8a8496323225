"""Stepping the host's optimizer: alone, through a GradScaler, or through the host's own function."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, Optional, Tuple

from ..errors import problem


def make_step(
    optimizer: Any,
    scaler: Any = None,
    step_fn: Optional[Callable[[], Any]] = None,
    stepped: Optional[Callable[[], bool]] = None,
) -> Tuple[Any, bool]:
    """Step, and return what the step returned and whether it was made."""
    if scaler is not None and step_fn is None:
        return None, scaler_step(scaler, optimizer)
    watch = StepWatch(optimizer)
    try:
        result = optimizer.step() if step_fn is None else step_fn()
    finally:
        made = watch.stepped()
    if stepped is not None:
        made = bool(stepped())
    elif step_fn is not None:
        made = True
    return result, made


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


class StepWatch:
    """Watches one step of an optimizer that holds its scaler itself, as Accelerate's does, and says when it skips.

    By its ``step_was_skipped``, which takes a fused optimizer's step for made whatever it did, and so by
    ``found_inf`` as well.

    Args:
        optimizer: Any optimizer; one that does not say whether it skipped steps is taken for one that does not skip.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._overflows: List[Any] = []
        self._handle: Any = None
        register = getattr(getattr(optimizer, "optimizer", None), "register_step_post_hook", None)
        if hasattr(optimizer, "step_was_skipped") and register is not None:  # which came with torch 2.0
            self._handle = register(self._note)

    def stepped(self) -> bool:
        """Return whether the step was made, and watch no more."""
        if self._handle is not None:
            self._handle.remove()
        return not getattr(self._optimizer, "step_was_skipped", False) and not any(map(bool, self._overflows))

    def _note(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if getattr(optimizer, "found_inf", None) is not None:
            self._overflows.append(optimizer.found_inf)


def overflowed(optimizer: Any) -> bool:
    """Return whether a fused optimizer now steps without effect, because of what a GradScaler handed to it."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def check_steppable(
    optimizer: Any, scaler: Any, step_fn: Optional[Callable[[], Any]], stepped: Optional[Callable[[], bool]]
) -> None:
    """Raise unless :func:`make_step` can step by these."""
    if stepped is not None and (scaler is not None or not callable(stepped)):
        raise problem(
            "step() cannot ask stepped= whether the step was made",
            expected="a function without arguments, and no scaler=, whose skipped steps are noticed anyway",
            received="a scaler beside it" if scaler is not None else type(stepped).__name__,
            fix="pass one of scaler=scaler and stepped=lambda: not skipped",
        )
    if step_fn is not None:
        if scaler is not None:
            raise problem(
                "step() got both scaler= and step_fn=",
                expected="one of them",
                received="both",
                fix="let step_fn= do the scaler's step too, and say by stepped= whether it was made",
            )
        if not callable(step_fn):
            raise problem(
                "step_fn cannot be called",
                expected="a function without arguments",
                received=type(step_fn).__name__,
                fix="pass step_fn=lambda: optimizer.step(closure)",
            )
        return
    if not callable(getattr(optimizer, "step", None)):
        raise problem(
            "there is nothing to step",
            expected="an optimizer with step(), or step_fn=",
            received=type(optimizer).__name__,
            fix="call learner.step(optimizer)",
        )
    if scaler is not None and not callable(getattr(scaler, "step", None)):
        raise problem(
            "scaler cannot step an optimizer",
            expected="a GradScaler, or None",
            received=type(scaler).__name__,
            fix="pass scaler=torch.cuda.amp.GradScaler(), or leave it out",
        )
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's holds the one that it was made of
    if callable(getattr(inner, "first_step", None)) and callable(getattr(inner, "second_step", None)):
        raise problem(
            f"{type(inner).__name__} makes two steps in one, which step() cannot make for it",
            expected="step_fn= with the SAM optimizer's own step",
            received="the optimizer alone",
            fix="call learner.step(step_fn=lambda: optimizer.second_step(zero_grad=True)), "
            "or observe() before and after_step() after it",
        )
