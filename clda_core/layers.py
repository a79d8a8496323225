"""What a layer is: a named group of a model's parameters, the unit in which saliency is reported and acted on."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

from torch import nn

from ._host.compat import parametrized, uninitialized
from ._host.names import canonical_buffers, canonical_modules, canonical_name, canonical_parameters
from ._host.shards import check_sharding
from .errors import problem

__all__ = [
    "Layer",
    "LayerGrouping",
    "ModelView",
    "canonical_buffers",
    "canonical_name",
    "canonical_parameters",
    "group_layers",
]

LayerGrouping = Union[Callable[[str], Optional[str]], Sequence[str]]
"""How a user regroups: a function from a parameter's name to its layer's name, or regular expressions."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class Layer(NamedTuple):
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


class ModelView(NamedTuple):
    """A model and the layers it was divided into.

    Attributes:
        model: The model.
        layers: Its layers.
        inputs: What it is run on where that is not what the other one is run on.
    """

    model: nn.Module
    layers: Tuple[Layer, ...]
    inputs: Any = None


def group_layers(model: nn.Module, by: Optional[LayerGrouping] = None) -> Tuple[Layer, ...]:
    """Divide a model's parameters into named layers.

    By default a layer is a *repeated block* (a residual or transformer block): a composite module, an element of a
    ``Sequential``, ``ModuleList`` or ``ModuleDict``, whose class occurs at least twice as such an element. Where these
    nest, one that lists blocks is a stage and no layer; one that lists only parts of itself is the block. An element of
    a list inside is a part, not a block of its own right, if

    - it has fewer than two parameters that mix channels (a convolution with its norm and activation), or
    - it has no norm although the module around it has one (a head of attention, an expert, squeeze and excitation), or
    - its list holds other things and none of its own class (the attention of a block that lists its sub-layers).

    Every remaining leaf module is a layer of its own, under whatever parametrization. A leaf with one-dimensional
    parameters only (a norm) joins the leaf before it under the same parent. A parameter that hangs directly on a
    composite module (a class token) is a layer. The buffers of a module without parameters (a frozen norm) belong to
    the layer of the parameters before it, also where ``by`` regroups.

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
    of_module: Dict[str, Optional[str]] = {}
    for name in parameters:
        layer, owner = name_of(name), _parent(_plain_name(name, modules))
        of_module[owner] = of_module.get(owner) or layer
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
    if not members:
        raise problem(
            "the layer grouping leaves every parameter out",
            expected=f"at least one parameter to match, for example {next(iter(parameters))!r}",
            received=repr(by),
            fix="correct the patterns or the function passed as layers=",
        )
    buffers: Dict[str, List[str]] = {}
    places = {name: place for place, name in enumerate(modules)}
    for name in canonical_buffers(model):
        owner = _parent(_plain_name(name, modules))
        layer = of_module.get(owner)
        if owner not in of_module:
            layer = name_of(name) if by is None else _layer_before(owner, places, of_module)
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


def _above(name: str) -> Iterator[str]:
    """Yield the names of the modules around a module or tensor, the nearest first, the model's own excepted."""
    name = _parent(name)
    while name:
        yield name
        name = _parent(name)


def _plain_name(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of a module's tensor; of what a parametrised one is computed from, that of the computed one."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-2]):
        owner = ".".join(parts[:place])
        if part == "parametrizations" and owner in modules and parametrized(modules[owner]):
            return f"{owner}.{parts[place + 1]}" if owner else parts[place + 1]
    return name


def _kind(module: nn.Module) -> type:
    """Return a module's class; of a parametrised module, which has a class of its own, the class it had before."""
    return type(module).__bases__[0] if parametrized(module) else type(module)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_leaf(module: nn.Module) -> bool:
    """Return whether a module holds its parameters itself: it has no parts, or none of them has parameters."""
    computed = parametrized(module)
    parts = [part for name, part in module.named_children() if not (computed and name == "parametrizations")]
    own = computed or next(module.parameters(recurse=False), None) is not None
    return not parts or (own and not any(map(_has_parameters, parts)))


def _is_norm(module: nn.Module) -> bool:
    shapes = [parameter.dim() for parameter in module.parameters()]
    return _is_leaf(module) and (isinstance(module, _NORMS) or (bool(shapes) and max(shapes) == 1))


def _weights(module: nn.Module) -> int:
    """Count the parameters that mix channels: matrices and kernels, but no depthwise ones."""
    return sum(
        parameter.dim() > 1 and parameter.shape[1] > 1 and sum(size > 1 for size in parameter.shape) > 1
        for parameter in module.parameters()
    )


def _blocks(modules: Mapping[str, nn.Module]) -> FrozenSet[str]:
    """Return the names of the repeated blocks, as :func:`group_layers` describes them."""
    candidates = [
        name
        for name, module in modules.items()
        if name
        and not isinstance(module, _CONTAINERS)
        and not _is_leaf(module)
        and isinstance(modules.get(_parent(name)), _CONTAINERS)
        and _has_parameters(module)
    ]
    kinds = Counter(_kind(modules[name]) for name in candidates)
    repeated = {name: _kind(modules[name]) for name in candidates if kinds[_kind(modules[name])] > 1}
    stages = {
        repeated[around]
        for name in repeated
        for around in _above(name)
        if around in repeated and _is_listed_block(modules[name], modules[_parent(name)], modules[around])
    }
    holding = {around for name in repeated for around in _above(name)}
    blocks: Set[str] = set()
    for name, kind in repeated.items():
        is_stage = kind in stages and name in holding
        if not is_stage and blocks.isdisjoint(_above(name)):
            blocks.add(name)
    return frozenset(blocks)


def _is_listed_block(module: nn.Module, container: nn.Module, around: nn.Module) -> bool:
    """Return whether an element of a container is a block of its own right, and not a part of the block around it."""
    others = [other for other in container.children() if other is not module and _has_parameters(other)]
    alone = bool(others) and all(_kind(other) is not _kind(module) for other in others)
    without_norm = not any(map(_is_norm, module.modules())) and any(map(_is_norm, around.modules()))
    return not alone and not without_norm and _weights(module) > 1


def _layer_before(owner: str, places: Mapping[str, int], of_module: Mapping[str, Optional[str]]) -> Optional[str]:
    """Return the layer of the parameters before a module without any, under the nearest module around it with some.

    Of a module that comes before them it is the layer of the first.
    """
    for around in (*_above(owner), ""):
        inside = [name for name in of_module if not around or f"{name}.".startswith(f"{around}.")]
        if inside:
            before = [name for name in inside if places[name] < places[owner]]
            return of_module[(before or inside[:1])[-1]]
    return None


def _default_grouping(modules: Mapping[str, nn.Module]) -> Callable[[str], Optional[str]]:
    modules = {name: module for name, module in modules.items() if _plain_name(f"{name}.", modules) == f"{name}."}
    blocks = _blocks(modules)
    leaf_layer: Dict[str, str] = {}
    last_weight: Dict[str, str] = {}
    for name, module in modules.items():
        parent = _parent(name)
        if not _is_leaf(module):
            last_weight.pop(parent, None)
            continue
        leaf = next((around for around in _above(name) if around in leaf_layer), None)
        if leaf is not None:
            leaf_layer[name] = leaf_layer[leaf]
            continue
        if any(parameter.dim() > 1 for parameter in module.parameters()):
            last_weight[parent] = name
        leaf_layer[name] = last_weight.get(parent, name)

    def name_of(tensor_name: str) -> Optional[str]:
        plain = _plain_name(tensor_name, modules)
        block = next((around for around in _above(plain) if around in blocks), None)
        return block or leaf_layer.get(_parent(plain)) or plain

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


def _stage(layer: str, modules: Mapping[str, nn.Module]) -> Optional[str]:
    return _parent(layer) if isinstance(modules.get(_parent(layer)), _CONTAINERS) else None


def check_models(teacher: nn.Module, student: nn.Module) -> None:
    """Raise unless both are models that can be read, see :func:`check_model`."""
    check_model("teacher", teacher)
    check_model("student", student)


def check_model(whose: str, model: nn.Module) -> None:
    """Raise unless it is a model whose parameters have a shape, sharded in a way that can be read if at all."""
    if not isinstance(model, nn.Module):
        raise problem(
            f"the {whose} is no model",
            expected="a torch.nn.Module",
            received=type(model).__name__,
            fix="pass the network itself, the teacher before the student where there are two",
        )
    check_sharding(whose, model)
    names = [name for name, parameter in model.named_parameters() if uninitialized(parameter)]
    if names:
        raise problem(
            f"the {whose} has lazy modules, whose parameters have no shape yet",
            expected="a model whose parameters are initialised",
            received=f"uninitialised: {names[:5]}",
            fix="run the model on one batch, under torch.no_grad(), before the learner and the optimizer are built",
        )


def size(model: nn.Module) -> int:
    """Return the number of parameters, those of integer types included."""
    return sum(parameter.numel() for parameter in model.parameters())


def warn_if_swapped(teacher: nn.Module, student: nn.Module) -> None:
    """Warn if the student is larger than the teacher."""
    of_teacher, of_student = size(teacher), size(student)
    if of_student > of_teacher:
        warnings.warn(
            f"the student is larger than the teacher: {of_student:,} parameters against {of_teacher:,}. Rounds write "
            "to the teacher: if the two are swapped, pass the big model first",
            stacklevel=3,
        )
