"""The one public error type, and the checks on user-given numbers that raise it."""

from __future__ import annotations

import math
from typing import Any, Sequence

__all__ = ["CldaError"]


class CldaError(RuntimeError):
    """Raised for every wrong input or state; the user's objects are then as they were before the call.

    The message says what is wrong, what was expected, what was received and how to fix it.
    """


def problem(what: str, *, expected: object, received: object, fix: str) -> CldaError:
    """Build a :class:`CldaError` whose message has the four parts every error of ours has."""
    return CldaError(f"{what}: expected {expected}, received {received}. Fix: {fix}")


def check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    integer: bool = False,
) -> None:
    """Raise :class:`CldaError` unless ``value`` is a finite number (not a bool) within the given bounds."""
    kind = "an integer" if integer else "a finite number"
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in ((">", above), (">=", at_least), ("<", below), ("<=", at_most))
        if math.isfinite(bound)
    ]
    expected = " and ".join([kind, *bounds])
    right_type = isinstance(value, int) if integer else isinstance(value, (int, float))
    if isinstance(value, bool) or not right_type or not math.isfinite(value):
        raise problem(f"{name} is not {kind}", expected=expected, received=repr(value), fix=f"pass {name}={expected}")
    if not (value > above and value >= at_least and value < below and value <= at_most):
        raise problem(f"{name} is out of range", expected=expected, received=repr(value), fix=f"pass {name} within it")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise :class:`CldaError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise problem(f"{name} is unknown", expected=expected, received=repr(value), fix=f"pass one of them as {name}=")
