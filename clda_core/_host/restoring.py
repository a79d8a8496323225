"""Restoring several objects from their states, all of them or none, and models whatever wraps them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Dict, List, Mapping, Tuple, cast

from torch import nn

from ..errors import CldaError, problem
from .names import paired_names
from .plain import copied


def load_all(parts: List[Tuple[str, Any, Any]]) -> None:
    """Call ``load_state_dict`` of every part; if one raises, those that were called get their former state again.

    Args:
        parts: Name, object and state of each.

    Raises:
        CldaError: If a part has no such method, or its method raises.
    """
    for name, part, _ in parts:
        if not callable(getattr(part, "load_state_dict", None)):
            raise _not_restored(name, part, f"{type(part).__name__} without it")
    before: List[Tuple[Any, Any]] = []
    try:
        for name, part, state in parts:
            try:
                # On the CPU, where it costs no memory of a device.
                before.append((part, copied(part.state_dict(), "cpu") if hasattr(part, "state_dict") else None))
                part.load_state_dict(state)
            except CldaError:
                raise
            except Exception as error:
                received = f"{type(part).__name__}, which raised {type(error).__name__}: {error}"
                raise _not_restored(name, part, received) from error
    except BaseException:
        for part, state in reversed(before):
            if state is not None:
                _give_back(part, state)
        raise


def fitted(role: str, model: nn.Module, state: Any) -> Mapping[str, Any]:
    """Return a saved ``state_dict()`` under the names that the model has today, which wrappers may have changed.

    Raises:
        CldaError: If it is of another architecture.
    """
    if not isinstance(state, Mapping):
        raise problem(
            f"the saved {role} cannot be read",
            expected="a state_dict() of the model",
            received=type(state).__name__,
            fix="load a file that clda_core.checkpoint.save() wrote",
        )
    own = model.state_dict()
    if set(own) != set(state):
        state = _renamed(state, model)
    ours, theirs = _shapes(own), _shapes(state)
    if ours != theirs:
        name = next(name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name))
        raise problem(
            f"the saved {role} is of another architecture",
            expected=f"{name} of shape {ours[name]}" if name in ours else f"no {name}",
            received=f"shape {theirs[name]}" if name in theirs else "none",
            fix=f"build the {role} as it was built when it was saved",
        )
    return cast(Mapping[str, Any], state)


def _renamed(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return ``state`` under the names of ``model`` where they are the same but for wrappers, else as it is."""
    names = paired_names(map(str, state), model)
    if names is None:
        return state
    renamed = OrderedDict((own, state[name]) for own, name in names.items())
    versions = getattr(state, "_metadata", {})
    modules = {own.rpartition(".")[0]: versions.get(name.rpartition(".")[0]) for own, name in names.items()}
    renamed._metadata = {name: value for name, value in modules.items() if value}  # type: ignore[attr-defined]
    return renamed


def _shapes(tensors: Mapping[str, Any]) -> Dict[str, Any]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in tensors.items()}


def _give_back(part: Any, state: Any) -> None:
    try:
        part.load_state_dict(state)
    except Exception:  # it does not take its own state; the error that led here is on its way
        return


def _not_restored(name: str, part: Any, received: str) -> CldaError:
    return problem(
        f"{name} cannot be restored",
        expected=f"an object with load_state_dict() that takes what was saved as {name}",
        received=received,
        fix=f"build {name} as it was built when it was saved; plain data need not be passed, load() returns them",
    )
