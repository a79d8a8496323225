"""A strategy described by its constructor arguments: for ``repr``, for checkpoints, for run records."""

from __future__ import annotations

import enum
import functools
import inspect
import math
import numbers
import os
import reprlib
from typing import Any, FrozenSet, Hashable, List, Mapping, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn

from ._host.names import canonical_parameters
from .errors import problem

PACKAGE = __name__.partition(".")[0]


class Strategy:
    """Gives a strategy the ``repr`` its constructor call had; strategies need not derive from it."""

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={_shown(getattr(self, name))}" for name in _kept_arguments(self))
        return f"{type(self).__name__}({arguments})"


def vouched_for(strategy: Any, name: str, *, by: Sequence[str]) -> bool:
    """Return whether what a strategy has under a name was written for the methods that it has.

    A subclass that overrides such a method, but not what goes with it, has inherited a claim about another one.

    Args:
        strategy: Any object.
        name: Of an attribute or a method.
        by: Names of the methods that it goes with.

    Example:
        >>> class Base:
        ...     claim, method = True, id
        >>> class Other(Base):
        ...     method = hash
        >>> [vouched_for(kind(), "claim", by=("method",)) for kind in (Base, Other)]
        [True, False]
    """
    tables = [getattr(strategy, "__dict__", {}), *map(vars, type(strategy).__mro__)]

    def place(attribute: str) -> int:
        return next((index for index, table in enumerate(tables) if attribute in table), len(tables))

    return place(name) <= min(map(place, by))


def _shown(value: Any) -> str:
    """Return a value's ``repr``, of a function its name, without the address that ``repr`` adds."""
    return str(value.__name__) if inspect.isfunction(value) else repr(value)


class Role(NamedTuple):
    """What the learner asks of a strategy: the methods and attributes that it must have, and one of ours."""

    methods: Tuple[str, ...]
    example: str
    attributes: Tuple[str, ...] = ()


ROLES: Mapping[str, Role] = {
    "saliency": Role(("score",), "Taylor()", ("order",)),
    "threshold": Role(("__call__",), "MeanThreshold()"),
    "selection": Role(("__call__",), "DrawnFraction()"),
    "relation": Role(("__call__",), "ByRelativeDepth()"),
    "validator": Role(("statistics", "score"), "SoftConsistency()", ("needs_view",)),
    "trust": Role(("__call__",), "LinearTrust()"),
    "update": Role(("apply",), "MaskedDistillation()"),
    "distillation": Role(("__call__",), "DISTDistillation()"),
    "schedule": Role(("due", "observes", "strength"), "Schedule(warmup=1000)"),
    "probe": Role(("__call__",), "PseudoLabelCrossEntropy()"),
}
"""By the learner's argument that takes the strategy."""


def describe(strategy: Any) -> Any:
    """Return a strategy, or a plain value, as plain Python data that is equal for equal configurations.

    A strategy becomes ``{"class": name, argument: value, ...}`` with the arguments its ``__init__`` declares and keeps
    under the same attribute name; a function becomes its name, with the arguments that ``functools.partial`` binds;
    numbers, strings, ``None`` and containers of these stay, paths, types and members of enumerations become strings,
    and sets sorted lists. Whatever else a strategy holds, a trainer or a network, may change while the training goes
    on, and is described by its class alone.

    What is of this package goes by its bare name, ``"Taylor"``, wherever the file that defines it may move; everything
    else by its module and name.
    """
    return _describe(strategy, True, frozenset())


def _describe(value: Any, whole: bool, outer: FrozenSet[int]) -> Any:
    """Describe a value; an object that is no strategy by its arguments too if ``whole``."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Real):  # NumPy's too, which a checkpoint must not hold
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
        return "nan" if math.isnan(number) else number  # which equals itself
    if isinstance(value, (os.PathLike, torch.dtype, torch.device)):
        return str(value)
    if id(value) in outer:
        return "..."
    outer = outer | {id(value)}
    if isinstance(value, (list, tuple)):
        return [_describe(item, whole, outer) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_describe(item, whole, outer) for item in value), key=repr)
    if isinstance(value, Mapping):
        return {str(key): _describe(item, whole, outer) for key, item in value.items()}
    if inspect.isroutine(value) or inspect.isclass(value):
        return _name(value)
    if isinstance(value, functools.partial):
        parts = {"partial": value.func, "args": value.args, "keywords": value.keywords}
        return {name: _describe(part, whole, outer) for name, part in parts.items()}
    described = {"class": _name(type(value))}
    if whole or _is_strategy(value):
        # What our strategies hold are strategies; those of others may hold the host.
        inner = _is_ours(type(value))
        described.update((name, _describe(getattr(value, name), inner, outer)) for name in _kept_arguments(value))
    return described


def _is_strategy(value: Any) -> bool:
    """Return whether a value is a strategy, by its base or by what it has, of which being called is not enough."""
    if isinstance(value, (Strategy, nn.Module)):
        return isinstance(value, Strategy)
    asked = [(*role.methods, *role.attributes) for role in ROLES.values()]
    return any(names != ("__call__",) and all(hasattr(type(value), name) for name in names) for names in asked)


def _kept_arguments(value: Any) -> List[str]:
    """Return the names of the constructor's arguments that are attributes too."""
    try:
        declared = inspect.signature(type(value).__init__).parameters
    except (TypeError, ValueError):  # of a class written in C
        return []
    return [name for name in declared if name != "self" and _has(value, name)]


def _has(value: Any, name: str) -> bool:
    try:
        getattr(value, name)
    except Exception:  # a property that has nothing to say yet
        return False
    return True


def _name(value: Any) -> str:
    return value.__qualname__ if _is_ours(value) else f"{value.__module__}.{value.__qualname__}"


def _is_ours(value: Any) -> bool:
    """Return whether a class or function is of this package."""
    return str(value.__module__).partition(".")[0] == PACKAGE


def check_strategies(strategies: Mapping[str, Any]) -> None:
    """Raise unless there is an instance of a strategy for every role; ``None`` leaves one to what the host gives."""
    for role, strategy in strategies.items():
        if strategy is None:
            continue
        methods, example, attributes = ROLES[role]
        missing = [name for name in methods if not callable(getattr(strategy, name, None))]
        missing += [name for name in attributes if not hasattr(strategy, name)]
        if missing or isinstance(strategy, type):
            raise problem(
                f"{role}= is no {role} strategy",
                expected=f"an object with {', '.join([*methods, *attributes])}",
                received=repr(strategy) if isinstance(strategy, type) else f"{strategy!r} without {missing}",
                fix=f"pass an instance, for example {role}={example}",
            )
    if strategies["saliency"].order not in (0, 1, 2):
        raise problem(
            "the order of the saliency estimator is unknown",
            expected="0 (no derivative), 1 (the gradient) or 2 (the Hessian's diagonal)",
            received=repr(strategies["saliency"].order),
            fix="set the class attribute order",
        )


def check_apart(role: str, strategy: Any, models: Sequence[nn.Module]) -> None:
    """Raise if a strategy that is or contains a module has parameters of the host's models among its own."""
    if isinstance(strategy, Strategy) and not isinstance(strategy, nn.Module):
        for part in vars(strategy).values():  # a guard's update and criterion, an update's loss
            check_apart(role, part, models)
        return
    if not isinstance(strategy, nn.Module):
        return
    own = {_identity(parameter) for parameter in strategy.parameters()}
    for whose, model in zip(("teacher", "student"), models):
        shared = [name for name, parameter in canonical_parameters(model).items() if _identity(parameter) in own]
        if own and shared:
            raise problem(
                f"{role}= holds the {whose}'s parameters, so the learner would train and save them as the strategy's",
                expected=f"a module whose parameters() are its own, without the {whose}",
                received=f"{type(strategy).__name__} with {shared[:5]}",
                fix=f"keep the {whose} out of its sub-modules (self.models = [model] hides it from parameters()), or "
                "read features through extract= and Outputs",
            )


def _identity(parameter: Tensor) -> Hashable:
    """Return what two parameters on the same memory have in common, whether or not they are one object."""
    address = 0 if parameter.device.type == "meta" else parameter.data_ptr()
    return (str(parameter.device), address) if address else id(parameter)
