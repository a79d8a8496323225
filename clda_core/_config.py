"""A strategy described by its constructor arguments: for ``repr``, for checkpoints, for run records."""

from __future__ import annotations

import functools
import inspect
import numbers
from typing import Any, Mapping


def describe(value: Any) -> Any:
    """Return ``value`` as plain Python data that is equal for equal configurations.

    A strategy becomes ``{"class": qualified name, argument: value, ...}`` with the arguments its ``__init__`` declares
    and keeps under the same attribute name; a function becomes its qualified name, with the arguments that
    ``functools.partial`` binds; numbers, strings, ``None`` and containers of these stay.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Real):  # NumPy's too, which a checkpoint must not hold
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, functools.partial):
        return {"partial": describe(value.func), "args": describe(value.args), "keywords": describe(value.keywords)}
    kind = type(value)
    arguments = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    described = {name: describe(getattr(value, name)) for name in arguments if hasattr(value, name)}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **described}


class Strategy:
    """Gives a strategy the ``repr`` its constructor call had; strategies need not derive from it."""

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        arguments = ", ".join(f"{name}={getattr(self, name)!r}" for name in names if hasattr(self, name))
        return f"{type(self).__name__}({arguments})"
