"""Plain data: what every torch loads with ``weights_only=True``, and what a checkpoint therefore may hold."""

from __future__ import annotations

import copy
import enum
import numbers
import os
from collections import OrderedDict
from typing import Any, Dict, FrozenSet, Mapping, Optional

import torch
from torch import Tensor, nn

from ..errors import CldaError, problem

_DEPTH = 200
"""Containers may nest so deep; pickling fails a little later."""

_LEAVES = frozenset({type(None), bool, int, float, str})
"""What is plain by itself; looked at first where it is met, since histories hold very many of them."""

_WIDER = {"uint16": "int32", "uint32": "int64"}
"""NumPy's types that not every torch has, and the next that holds their values."""


def plain(value: Any, name: str) -> Any:
    """Return a value as tensors, numbers, strings, ``None``, and lists, tuples and dicts of these.

    What equals such a value becomes it: NumPy's numbers become Python's, members of an ``IntEnum`` integers, paths
    strings, named tuples tuples, subclasses of ``dict`` and ``list`` dicts and lists. NumPy's arrays become tensors.
    Containers are copied, tensors are not; with the state of a module go the versions that PyTorch keeps beside it.

    Args:
        value: Anything.
        name: What the value is saved as, for messages.

    Raises:
        CldaError: If something in it is of another type, contains itself, or two keys of a mapping become equal; the
            message names the entry.
    """
    return _plain(value, name, frozenset())


def copied(state: Any, device: Optional[str] = None) -> Any:
    """Return a state of tensors and plain Python types with tensors of its own, faster than ``copy.deepcopy``.

    Args:
        state: The state; with that of a module go the versions that PyTorch keeps beside it.
        device: Where the tensors are to be; where they are if ``None``.
    """
    if isinstance(state, Tensor):
        return state.detach().clone() if device is None else state.detach().to(device, copy=True)
    if type(state) is dict:
        return {key: copied(value, device) for key, value in state.items()}
    if type(state) is OrderedDict:
        of_module = OrderedDict((key, copied(value, device)) for key, value in state.items())
        vars(of_module).update(vars(state))
        return of_module
    if type(state) in (list, tuple):
        return type(state)([copied(value, device) for value in state])
    return state if type(state) in _LEAVES else copy.deepcopy(state)


def _plain(value: Any, name: str, outer: FrozenSet[int]) -> Any:
    kind = type(value)
    if kind in _LEAVES or isinstance(value, torch.dtype):
        return value
    if isinstance(value, Tensor):
        if kind in (Tensor, nn.Parameter) or kind.__module__.partition(".")[0] == "torch":
            return value.detach()
        raise _not_plain(value, name, fix=f"save {name}.as_subclass(torch.Tensor)")
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        if float(value) != value and value == value:
            raise _not_plain(value, name)
        return float(value)
    if isinstance(value, os.PathLike):
        return _plain(os.fspath(value), name, outer)
    if kind.__module__ == "numpy" and hasattr(value, "dtype"):
        return _plain_array(value, name, outer)
    if not isinstance(value, (list, tuple, Mapping)):
        raise _not_plain(value, name)
    if id(value) in outer or len(outer) > _DEPTH:
        raise problem(
            f"{name} cannot be saved",
            expected=f"containers that nest at most {_DEPTH} deep",
            received="one that contains itself" if id(value) in outer else "deeper ones",
            fix="leave out what refers back",
        )
    outer = outer | {id(value)}
    if isinstance(value, Mapping):
        return _plain_mapping(value, name, outer)
    items = [
        item if type(item) in _LEAVES else _plain(item, f"{name}[{index}]", outer) for index, item in enumerate(value)
    ]
    return tuple(items) if isinstance(value, tuple) else items


def _plain_mapping(value: Mapping[Any, Any], name: str, outer: FrozenSet[int]) -> Dict[Any, Any]:
    found: Dict[Any, Any] = {}
    for key, item in value.items():
        plain_key = key if type(key) in _LEAVES else _plain(key, f"a key of {name}", outer)
        if isinstance(plain_key, (Tensor, list, dict)):
            raise _not_plain(key, f"a key of {name}")
        if plain_key in found:
            raise problem(
                f"{name} cannot be saved",
                expected="keys that differ as plain data",
                received=f"{plain_key!r} twice",
                fix="give them names of their own",
            )
        found[plain_key] = item if type(item) in _LEAVES else _plain(item, f"{name}[{plain_key!r}]", outer)
    versions = getattr(value, "_metadata", None)
    if versions is not None:
        found = OrderedDict(found)
        found._metadata = _plain(versions, f"{name}._metadata", outer)  # type: ignore[attr-defined]
    return found


def _plain_array(value: Any, name: str, outer: FrozenSet[int]) -> Any:
    """Return a NumPy array as a tensor of its own, and one of its scalars as Python's."""
    if value.ndim == 0:
        scalar = value.item()
        if type(scalar) is type(value):
            raise _not_plain(value, name)
        return _plain(scalar, name, outer)
    try:
        return torch.tensor(value.astype(_WIDER.get(value.dtype.name, value.dtype.newbyteorder("="))))
    except (TypeError, RuntimeError):  # objects, strings, times
        raise _not_plain(value, name, fix=f"save {name}.tolist(), if that is plain") from None


def _not_plain(value: Any, name: str, fix: Optional[str] = None) -> CldaError:
    kind = type(value)
    instead = "its name" if isinstance(value, enum.Enum) else _INSTEAD.get(kind.__name__, _PARTS)
    return problem(
        f"{name} cannot be saved",
        expected="tensors, numbers, strings, None, and lists, tuples and dicts of these, which every torch loads with "
        "weights_only=True",
        received=f"{kind.__module__}.{kind.__qualname__}",
        fix=fix or f"save {instead}, and make it anew after load()",
    )


_PARTS = "the tensors, numbers and strings that it is made of"
_INSTEAD = {
    "set": "sorted(...) of it",
    "frozenset": "sorted(...) of it",
    "Namespace": "vars(...) of it",
    "SimpleNamespace": "vars(...) of it",
    "datetime": "its isoformat()",
    "date": "its isoformat()",
    "timedelta": "its total_seconds()",
    "bytes": "list(...) of it",
    "bytearray": "list(...) of it",
    "Generator": "its state",
    "complex": "[its real part, its imaginary part]",
}
"""By type, what to save."""
