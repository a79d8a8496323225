"""The tensors and modules of a model by canonical name, whatever wraps it; found once, and again only if it changes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Dict, List, MutableMapping, Optional, Sequence, Tuple, TypeVar

import torch
from torch import Tensor, nn

from ._sharded import reshard
from .errors import problem

_T = TypeVar("_T", bound=Tensor)

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical_name(name: str) -> str:
    """Strip what wrappers add to a parameter's name.

    Leading ``module.`` (DataParallel and its kin) goes in any number and order with ``_orig_mod`` (compile); the
    wrappers' private names go wherever they stand. A ``module`` in the middle is the user's own and stays.

    Example:
        >>> canonical_name("module._orig_mod.module.layer1.0._orig_mod.weight")
        'layer1.0.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def canonical_parameters(model: nn.Module) -> Dict[str, nn.Parameter]:
    """Return the model's parameters by canonical name; a tied parameter appears once, under its first name.

    Under FSDP2 they are the sharded ones. Integer ones, as of quantised weights, have no derivative and are left out.

    Raises:
        CldaError: If two parameters get the same canonical name.
    """
    return named_tensors(model).parameters


def canonical_buffers(model: nn.Module) -> Dict[str, Tensor]:
    """Return the persistent floating-point buffers by canonical name; integer and non-persistent ones are left out.

    Raises:
        CldaError: If two buffers get the same canonical name.
    """
    return named_tensors(model).buffers


@dataclass(frozen=True)
class NamedTensors:
    """A model's tensors by canonical name.

    Attributes:
        parameters: See :func:`canonical_parameters`.
        buffers: See :func:`canonical_buffers`.
        state: The same object as long as the model holds the same tensors under the same names.
    """

    parameters: Dict[str, nn.Parameter]
    buffers: Dict[str, Tensor]
    state: object

    def all(self) -> Dict[str, Tensor]:
        """Return both together."""
        return {**self.parameters, **self.buffers}


def named_tensors(model: nn.Module) -> NamedTensors:
    """Return the model's parameters and buffers by canonical name; the model is walked only if it has changed.

    Raises:
        CldaError: If two parameters, or two buffers, get the same canonical name.
    """
    walk = _walks.get(model)
    found = None if walk is None else walk.tensors()
    if found is not None:
        return found
    modules = list(model.modules())
    # FSDP2 exchanges parameters all the time, and scripted modules make their tables anew at every look.
    unsteady = reshard(modules) or any(isinstance(module, torch.jit.ScriptModule) for module in modules)
    parameters: Dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            _insert(parameters, name, parameter)
    buffers: Dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        transient = getattr(module, "_non_persistent_buffers_set", ())
        for name, buffer in module.named_buffers(recurse=False):
            if name not in transient and buffer.is_floating_point():
                _insert(buffers, f"{prefix}.{name}" if prefix else name, buffer)
    found = NamedTensors(parameters, buffers, object())
    if unsteady:
        _walks.pop(model, None)
    else:
        _walks[model] = _Walk(modules, found)
    return found


def modules_of(model: nn.Module) -> List[nn.Module]:
    """Return the modules of a model, itself among them, each once."""
    walk = _walks.get(model)
    modules = None if walk is None else walk.modules()
    return list(model.modules()) if modules is None else modules


def canonical_modules(model: nn.Module) -> Dict[str, nn.Module]:
    """Return modules by canonical name; of a wrapper and what it wraps, the wrapped one."""
    named: Dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        short = canonical_name(name)
        named["" if short == "module" else short] = module
    return named


def _insert(named: Dict[str, _T], name: str, tensor: _T) -> None:
    short = canonical_name(name)
    if short in named:
        raise problem(
            "two tensors of the model share a canonical name",
            expected="names that differ beyond wrapper prefixes",
            received=f"{name!r}, which becomes {short!r} again",
            fix="rename one of the modules",
        )
    named[short] = tensor


class _Walk:
    """What one walk over a model found; that another would find the same is seen in a fraction of the time.

    It holds names and weak references only, so nothing lives longer for it.
    """

    def __init__(self, modules: List[nn.Module], found: NamedTensors) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self._sizes, self._names, values = _contents(modules)
        self._values = [_nothing if value is None else weakref.ref(value) for value in values]
        places = {id(value): place for place, value in enumerate(values)}
        self._parameters = [(name, places[id(tensor)]) for name, tensor in found.parameters.items()]
        self._buffers = [(name, places[id(tensor)]) for name, tensor in found.buffers.items()]
        self._state = found.state

    def modules(self) -> Optional[List[nn.Module]]:
        """Return the modules, or ``None`` if the model has changed."""
        return None if self._look() is None else [known() for known in self._modules]  # type: ignore[misc]

    def tensors(self) -> Optional[NamedTensors]:
        """Return the tensors, or ``None`` if the model has changed."""
        values = self._look()
        if values is None:
            return None
        parameters = {name: values[place] for name, place in self._parameters}
        return NamedTensors(parameters, {name: values[place] for name, place in self._buffers}, self._state)

    def _look(self) -> Optional[List[Any]]:
        modules = [known() for known in self._modules]
        if any(map(is_, modules, [None] * len(modules))):
            return None
        sizes, names, values = _contents(modules)
        same = sizes == self._sizes and names == self._names
        return values if same and all(map(is_, values, [known() for known in self._values])) else None


def _contents(modules: Sequence[Any]) -> Tuple[List[int], List[str], List[Any]]:
    """Return the number of children, parameters and buffers of each module, their names, and themselves."""
    tables = list(chain.from_iterable(map(_tables, modules)))  # these functions take a third of a loop's time
    filled = list(filter(None, tables))
    names = list(chain.from_iterable(filled))
    return list(map(len, tables)), names, list(chain.from_iterable([table.values() for table in filled]))


_tables = attrgetter("_modules", "_parameters", "_buffers")


def _nothing() -> None:
    """Stand for a weak reference to ``None``."""


_walks: MutableMapping[nn.Module, _Walk] = weakref.WeakKeyDictionary()
