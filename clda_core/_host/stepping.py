"""Stepping the host's optimizer: alone, through a GradScaler, as Accelerate wraps it, or by a function of the host."""

from __future__ import annotations

import functools
import math
import warnings
from itertools import accumulate
from types import MethodType
from typing import Any, Callable, List, Optional, Tuple

from torch import nn

from ..errors import problem
from .accelerate import AcceleratedWatch, accelerated
from .shards import is_sharded


def adaptive_rate(optimizer: Any) -> Optional[float]:
    """Return the learning rate of an optimizer of Adam's kind, whose steps are of about that size, if it is known.

    Of several groups it is the rate that half of the parameters do not exceed, counted as tensors, 0 left aside: that
    of the backbone where the head has a higher one, of its middle where rates fall from layer to layer. Where it is a
    tensor on a device, it waits for the device.
    """
    groups = [group for group in getattr(optimizer, "param_groups", None) or () if "lr" in group]
    if not groups or not all("betas" in group for group in groups):
        return None
    rates = [(float(group["lr"]), len(group.get("params", ()))) for group in groups]
    counted = sorted((rate, count) for rate, count in rates if 0 < rate < math.inf)
    half = sum(count for _, count in counted) / 2
    sums = accumulate(count for _, count in counted)
    return next((rate for (rate, _), so_far in zip(counted, sums) if so_far >= half), 0.0)


Written = List[Tuple[nn.Parameter, int]]
"""Parameters, each with its version, which everything that writes to it raises."""


def just_stepped(optimizer: Any) -> Written:
    """Return the parameters that an optimizer has gradients for, with their versions after its step."""
    moved = [item for item in _held(optimizer) if isinstance(item, nn.Parameter) and item.grad is not None]
    return [] if any(map(is_sharded, moved)) else [(parameter, parameter._version) for parameter in moved]


def warn_if_stepped_again(written: Written) -> None:
    """Warn if all of these parameters were written since."""
    if written and all(parameter._version != version for parameter, version in written):
        warnings.warn(
            f"all {len(written)} parameters that learner.step() stepped were written again before the next distill(). "
            "If there is an optimizer.step() after it, remove it: learner.step(optimizer) makes that step. If the "
            "host means to write them, all is well",
            stacklevel=5,
        )


class StepWatch:
    """Watches an optimizer until it is closed: its ``step()`` is another one, which makes the step and notes it.

    A GradScaler skips the step after an overflow without saying so. A fused optimizer is called all the same and skips
    on the device, by the ``found_inf`` that it is handed; reading that waits for the device, as every other optimizer
    does under a GradScaler.

    Args:
        optimizer: Anything with ``step()``; when closed it has the ``step()`` that it had.
        before: Called before a step.
        after: Called after one that did not raise, with whether it was made.

    Attributes:
        inside: Whether the optimizer is stepping now.
    """

    def __init__(
        self,
        optimizer: Any,
        before: Optional[Callable[[], None]] = None,
        after: Optional[Callable[[bool], None]] = None,
    ) -> None:
        self.inside = self._closed = False
        self._optimizer, self._own = optimizer, vars(optimizer).get("step")
        self._called, self._overflow = False, None
        inner = optimizer.step

        @functools.wraps(getattr(inner, "__func__", inner))  # with its self, which binding takes from the signature
        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            if self._closed:
                return inner(*args, **kwargs)
            if before is not None:
                before()
            self._called, self._overflow = True, getattr(optimizer, "found_inf", None)
            self.inside = True
            try:
                result = inner(*args, **kwargs)
            finally:
                self.inside = False
            if after is not None:
                after(self.stepped())
            return result

        # A method, since a scheduler that is built now wraps the function in it.
        self._ours = optimizer.step = MethodType(step, optimizer)

    def stepped(self) -> bool:
        """Return whether the optimizer has stepped, and not without effect."""
        return self._called and (self._overflow is None or not bool(self._overflow))

    def close(self) -> None:
        """Give the optimizer its own ``step()`` back; one that somebody wrapped meanwhile only passes on from now."""
        self._closed = True
        if vars(self._optimizer).get("step") is not self._ours:
            return
        if self._own is None:
            vars(self._optimizer).pop("step", None)
        else:
            self._optimizer.step = self._own

    def __enter__(self) -> StepWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_steppable(
    optimizer: Any,
    scaler: Any,
    step_fn: Optional[Callable[[], Any]],
    stepped: Optional[Callable[[], bool]],
    student: Optional[nn.Module] = None,
) -> None:
    """Raise unless :func:`make_step` can step by these, and warn if the optimizer is not the ``student``'s."""
    if student is not None:
        _warn_if_of_others(optimizer, student)
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
    engines = accelerated(optimizer)
    inner = optimizer if engines is None else engines.optimizer
    if callable(getattr(inner, "first_step", None)) and callable(getattr(inner, "second_step", None)):
        raise problem(
            f"{type(inner).__name__} makes two steps in one, which step() cannot make for it",
            expected="step_fn= with the SAM optimizer's own step",
            received="the optimizer alone",
            fix="call learner.step(step_fn=lambda: optimizer.second_step(zero_grad=True)), "
            "or observe() before and after_step() after it",
        )


def _warn_if_of_others(optimizer: Any, student: nn.Module) -> None:
    """Warn if an optimizer holds parameters and none of them is the student's: a discriminator's, for example.

    One that holds flat or master copies, as DeepSpeed's and apex's do, holds tensors that are no ``Parameter``.
    """
    held = _held(optimizer)
    own = {id(parameter) for parameter in student.parameters()}
    if own and any(isinstance(item, nn.Parameter) for item in held) and not any(id(item) in own for item in held):
        warnings.warn(
            f"learner.step() got an optimizer without any parameter of the student, {type(optimizer).__name__} of "
            f"{len(held)} others. Its steps are counted as the student's, and rounds go by its learning rate. Step "
            "this one yourself, and call learner.step() with the optimizer that trains the student",
            stacklevel=5,
        )


def _held(optimizer: Any) -> List[Any]:
    """Return what an optimizer steps, as far as its groups say so."""
    return [item for group in getattr(optimizer, "param_groups", None) or () for item in group.get("params", ())]


def make_step(
    optimizer: Any,
    scaler: Any = None,
    step_fn: Optional[Callable[[], Any]] = None,
    stepped: Optional[Callable[[], bool]] = None,
) -> Tuple[Any, bool]:
    """Step, and return what the step returned and whether it was made."""
    if step_fn is not None:
        result, made = step_fn(), True
    elif scaler is not None:
        with StepWatch(optimizer) as watch:
            result = scaler.step(optimizer)
        made = watch.stepped()
    elif accelerated(optimizer) is not None:
        with AcceleratedWatch(optimizer) as engines:
            result = optimizer.step()
        made = engines.stepped()
    else:
        result, made = optimizer.step(), True
    return result, made if stepped is None else bool(stepped())


def unscale(scaler: Any, optimizer: Any) -> None:
    """Unscale gradients, unless that is done: for what the host clips, for example."""
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        # GradScaler offers no way to ask.
        if "unscale_() has already been called" not in str(error):
            raise
