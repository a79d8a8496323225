"""What a layer is: a named group of a model's parameters, the unit in which saliency is reported and acted on."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Callable, Dict, List, MutableMapping, Optional, Sequence, Tuple, TypeVar, Union

import torch
from torch import Tensor, nn

from ._sharded import reshard
from .errors import problem

__all__ = ["Layer", "LayerGrouping", "canonical_buffers", "canonical_name", "canonical_parameters", "group_layers"]

LayerGrouping = Union[Callable[[str], Optional[str]], Sequence[str]]
"""How a user regroups: a function from a parameter's name to its layer's name, or regular expressions."""

_T = TypeVar("_T", bound=Tensor)

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Layer:
    """A named group of parameters of one model.

    Attributes:
        name: Canonical name, for example ``layer3.2``.
        parameters: Canonical names of its parameters, in the model's order.
        buffers: Canonical names of its persistent floating-point buffers (BatchNorm statistics).
        numel: Number of parameters, counted in elements.
        stage: Name of the container of which the layer is an element, ``""`` for the model itself; ``None`` outside
            any.
    """

    name: str
    parameters: Tuple[str, ...]
    buffers: Tuple[str, ...]
    numel: int
    stage: Optional[str]


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

    Under FSDP2 they are the sharded ones.

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


def group_layers(model: nn.Module, by: Optional[LayerGrouping] = None) -> Tuple[Layer, ...]:
    """Divide a model's parameters into named layers.

    By default a layer is a repeated block (a residual or transformer block: a composite module inside a ``Sequential``,
    ``ModuleList`` or ``ModuleDict`` whose class occurs at least twice so, the innermost where they nest), and every
    remaining leaf module is a layer of its own. A leaf with one-dimensional parameters only (a norm) joins the leaf
    before it under the same parent. A parameter that hangs directly on a composite module (a class token) is a layer.

    Args:
        model: Any module; it is only read.
        by: ``None`` for the default; a function from canonical parameter name to layer name, ``None`` leaving the
            parameter out; or regular expressions, of which the first to match the start of the name gives the layer
            the matched text as its name, and a parameter that matches none is left out.

    Returns:
        Layers in the model's order. Every parameter is in at most one layer; tied parameters count once.

    Raises:
        CldaError: If the model has no parameters, ``by`` puts every parameter out, or it returns no string.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
        >>> [(layer.name, layer.numel) for layer in group_layers(model)]
        [('0', 15), ('2', 4)]
    """
    parameters = canonical_parameters(model)
    if not parameters:
        raise problem(
            "the model has no parameters",
            expected="a model with at least one parameter",
            received=type(model).__name__,
            fix="pass the network itself, not a wrapper without parameters",
        )
    modules = canonical_modules(model)
    name_of = _default_grouping(modules) if by is None else _user_grouping(by)
    members: Dict[str, List[str]] = {}
    owner_layer: Dict[str, str] = {}
    for name in parameters:
        layer = name_of(name)
        if layer is None:
            continue
        if not isinstance(layer, str) or not layer:
            raise problem(
                f"the layer grouping failed for parameter {name!r}",
                expected="a layer name (non-empty str) or None",
                received=repr(layer),
                fix="return the layer's name, or None to leave the parameter out",
            )
        members.setdefault(layer, []).append(name)
        owner_layer.setdefault(name.rpartition(".")[0], layer)
    if not members:
        raise problem(
            "the layer grouping leaves every parameter out",
            expected=f"at least one parameter to match, for example {next(iter(parameters))!r}",
            received=repr(by),
            fix="correct the patterns or the function passed as layers=",
        )
    buffers: Dict[str, List[str]] = {}
    for name in canonical_buffers(model):
        owner = name.rpartition(".")[0]
        layer = owner_layer.get(owner, name_of(name) if by is None else None)
        if layer in members:
            buffers.setdefault(layer, []).append(name)
    return tuple(
        Layer(
            name=layer,
            parameters=tuple(names),
            buffers=tuple(buffers.get(layer, ())),
            numel=sum(parameters[name].numel() for name in names),
            stage=_stage(layer, modules),
        )
        for layer, names in members.items()
    )


def local_names(layer: Layer, names: Sequence[str]) -> Dict[str, str]:
    """Return full by local name, by which the tensors of two related layers are paired.

    Below the layer's own module the local name is the rest of the path. A norm that joined the layer of a numbered
    sibling is named by its distance, so that ``features.1.weight`` of layer ``features.0`` pairs with
    ``features.4.weight`` of layer ``features.3``.

    Example:
        >>> layer = Layer("features.3", ("features.3.weight", "features.4.bias"), (), 2, "features")
        >>> local_names(layer, layer.parameters)
        {'weight': 'features.3.weight', '+1.bias': 'features.4.bias'}
    """
    parent, _, position = layer.name.rpartition(".")
    prefix = parent + "." if parent else ""
    local: Dict[str, str] = {}
    for name in names:
        sibling, _, rest = name[len(prefix) :].partition(".")
        if name.startswith(layer.name + "."):
            local[name[len(layer.name) + 1 :]] = name
        elif name.startswith(prefix) and position.isdigit() and sibling.isdigit():
            local[f"+{int(sibling) - int(position)}.{rest}"] = name
        else:
            local[name] = name
    return local


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


def canonical_modules(model: nn.Module) -> Dict[str, nn.Module]:
    """Return modules by canonical name; of a wrapper and what it wraps, the wrapped one."""
    named: Dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        short = canonical_name(name)
        named["" if short == "module" else short] = module
    return named


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _blocks(modules: Dict[str, nn.Module]) -> List[str]:
    candidates = [
        name
        for name, module in modules.items()
        if name
        and not isinstance(module, _CONTAINERS)
        and not _is_leaf(module)
        and isinstance(modules.get(_parent(name)), _CONTAINERS)
        and next(module.parameters(), None) is not None
    ]
    kinds = Counter(type(modules[name]) for name in candidates)
    repeated = [name for name in candidates if kinds[type(modules[name])] > 1]
    return [name for name in repeated if not any(other.startswith(name + ".") for other in repeated)]


def _default_grouping(modules: Dict[str, nn.Module]) -> Callable[[str], Optional[str]]:
    blocks = frozenset(_blocks(modules))
    leaf_layer: Dict[str, str] = {}
    last_weight: Dict[str, str] = {}
    for name, module in modules.items():
        parent = _parent(name)
        if not _is_leaf(module):
            last_weight.pop(parent, None)
            continue
        shapes = [parameter.dim() for parameter in module.parameters(recurse=False)]
        if any(dim > 1 for dim in shapes):
            last_weight[parent] = name
        leaf_layer[name] = last_weight.get(parent, name)

    def name_of(tensor_name: str) -> Optional[str]:
        owner = _parent(tensor_name)
        ancestor = owner
        while ancestor:
            if ancestor in blocks:
                return ancestor
            ancestor = _parent(ancestor)
        return leaf_layer.get(owner) or tensor_name

    return name_of


def _user_grouping(by: LayerGrouping) -> Callable[[str], Optional[str]]:
    if callable(by):
        return by
    if not isinstance(by, (list, tuple)) or not all(isinstance(pattern, str) for pattern in by):
        raise problem(
            "the layer grouping is of a wrong type",
            expected="a callable or a sequence of regular expressions",
            received=repr(by),
            fix=r"pass for example layers=[r'blocks\.\d+', r'head']",
        )
    try:
        patterns = [re.compile(pattern) for pattern in by]
    except re.error as error:
        raise problem(
            "a layer pattern is not a regular expression",
            expected="regular expressions",
            received=f"{error.pattern!r}: {error}",
            fix=r"escape what is meant literally, for example r'blocks\.\d+'",
        ) from error

    def name_of(tensor_name: str) -> Optional[str]:
        matches = (pattern.match(tensor_name) for pattern in patterns)
        return next((match.group(0) for match in matches if match), None)

    return name_of


def _stage(layer: str, modules: Dict[str, nn.Module]) -> Optional[str]:
    return _parent(layer) if isinstance(modules.get(_parent(layer)), _CONTAINERS) else None
