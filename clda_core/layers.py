"""What a layer is: a named group of a model's parameters, the unit in which saliency is reported and acted on."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple, Union

from torch import nn

from ._named import canonical_buffers, canonical_modules, canonical_name, canonical_parameters
from .errors import problem

__all__ = ["Layer", "LayerGrouping", "canonical_buffers", "canonical_name", "canonical_parameters", "group_layers"]

LayerGrouping = Union[Callable[[str], Optional[str]], Sequence[str]]
"""How a user regroups: a function from a parameter's name to its layer's name, or regular expressions."""

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
