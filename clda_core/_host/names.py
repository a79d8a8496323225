"""The tensors and modules of a model by canonical name, whatever wraps it; found once, and again only if it changes."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from itertools import chain, combinations
from operator import attrgetter
from typing import Any, Container, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..errors import problem
from .compat import uninitialized
from .shards import reshard
from .undo import undoing

_PRIVATE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""What compile, FSDP, activation checkpointing and Lightning's Fabric call the module that they wrap."""

_WRAPPERS = frozenset(
    {
        *("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "ShardedDataParallel"),
        *("DeepSpeedEngine", "PipelineEngine"),
        *("AveragedModel", "BaseAveragedModel", "ModelEmaV2", "ModelEmaV3"),
    }
)
"""Classes (of torch, apex, fairscale, DeepSpeed, mmengine, timm) that call the module that they wrap ``module``."""


def canonical_name(name: str) -> str:
    """Strip what wrappers usually add to a parameter's name, where no more than the name is known.

    The private names of wrappers (``_orig_mod`` of compile) go wherever they stand, and any number of leading
    ``module.``, as DataParallel adds them. A name alone does not say whether a leading ``module`` is a wrapper's or an
    attribute of the user's own; :func:`canonical_parameters` looks at the model and strips only a wrapper's.

    Example:
        >>> canonical_name("module._orig_mod.module.layer1.0._orig_mod.weight")
        'layer1.0.weight'
    """
    parts = _public(name).split(".")
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def canonical_parameters(model: nn.Module) -> Dict[str, nn.Parameter]:
    """Return the model's parameters by canonical name; a tied parameter appears once, under its first name.

    Under FSDP2 they are the sharded ones. Integer ones, as of quantised weights, have no derivative and are left out.

    Raises:
        CldaError: If two parameters get the same canonical name, or one is of a lazy module and has no shape yet.
    """
    return named_tensors(model).parameters


def canonical_buffers(model: nn.Module) -> Dict[str, Tensor]:
    """Return the persistent floating-point buffers by canonical name; integer and non-persistent ones are left out.

    Raises:
        CldaError: If two buffers get the same canonical name.
    """
    return named_tensors(model).buffers


class NamedTensors(NamedTuple):
    """A model's tensors by canonical name.

    Attributes:
        parameters: See :func:`canonical_parameters`.
        buffers: See :func:`canonical_buffers`.
        all: Both together.
        state: The same object as long as the model holds the same tensors, in the same memory, under the same names.
    """

    parameters: Dict[str, nn.Parameter]
    buffers: Dict[str, Tensor]
    all: Dict[str, Tensor]
    state: object


@contextmanager
def looking_once(*models: nn.Module) -> Iterator[None]:
    """Look at each model once, whatever is asked for inside the block, in which nobody may exchange its tensors."""
    new = [model for model in models if id(model) not in _looks]

    def forget() -> None:
        for model in new:
            _looks.pop(id(model), None)

    with undoing(forget):
        _looks.update({id(model): _Look() for model in new})
        yield


def named_tensors(model: nn.Module) -> NamedTensors:
    """Return the model's parameters and buffers by canonical name; the model is walked only if it has changed.

    Raises:
        CldaError: If two parameters, or two buffers, get the same canonical name, or one is of a lazy module and has
            no shape yet.
    """
    look = _looks.get(id(model))
    if look is not None and look.tensors is not None:
        return look.tensors
    found = _tensors_now(model)
    if look is not None and model in _walks:
        look.tensors = found
    return found


def modules_of(model: nn.Module) -> List[nn.Module]:
    """Return the modules of a model, itself among them, each once."""
    look = _looks.get(id(model))
    if look is not None and look.modules is not None:
        return look.modules
    walk = _walks.get(model)
    modules = None if walk is None else walk.modules()
    if look is not None:
        look.modules = modules
    return list(model.modules()) if modules is None else modules


def _tensors_now(model: nn.Module) -> NamedTensors:
    walk = _walks.get(model)
    found = None if walk is None else walk.tensors()
    if found is not None:
        return found
    modules = list(model.modules())
    # FSDP2 exchanges parameters all the time, and scripted modules make their tables anew at every look.
    unsteady = reshard(modules) or any(isinstance(module, torch.jit.ScriptModule) for module in modules)
    parameters: Dict[str, nn.Parameter] = {}
    unwrapped = _unwrapped(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            _insert(parameters, _of_tensor(name, unwrapped), name, parameter)
    buffers: Dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        transient = getattr(module, "_non_persistent_buffers_set", ())
        for own, buffer in module.named_buffers(recurse=False):
            if own not in transient and buffer.is_floating_point():
                name = _joined(prefix, own)
                _insert(buffers, _of_tensor(name, unwrapped), name, buffer)
    found = NamedTensors(parameters, buffers, {**parameters, **buffers}, object())
    if unsteady:
        _walks.pop(model, None)
    else:
        _walks[model] = _Walk(modules, found)
    return found


def canonical_modules(model: nn.Module) -> Dict[str, nn.Module]:
    """Return modules by canonical name; of a wrapper and what it wraps, the wrapped one."""
    unwrapped = _unwrapped(model)
    return {unwrapped[name]: module for name, module in model.named_modules()}


def paired_names(saved: Iterable[str], model: nn.Module) -> Optional[Dict[str, str]]:
    """Return the saved name for each name in a model's ``state_dict()``, where wrappers are all that sets them apart.

    Of the saved names no more than the text is known, so what counts is whether all of them become the model's own
    without some leading ``module.``, or each without some ``module`` in it.

    Returns:
        ``None`` if the names are of another model.
    """
    keys = list(model.state_dict())
    unwrapped = {_public(name): short for name, short in _unwrapped(model).items()}
    own = {_of_tensor(_public(key), unwrapped): key for key in keys}
    short = {name: _public(name) for name in saved}
    while short and set(short.values()) != set(own) and all(name.startswith("module.") for name in short.values()):
        short = {name: wrapped[len("module.") :] for name, wrapped in short.items()}
    found = {_without_wrappers(name, own): saved_name for saved_name, name in short.items()}
    if found.keys() != own.keys() or not len(found) == len(short) == len(keys):
        return None
    return {key: found[name] for name, key in own.items()}


def _unwrapped(model: nn.Module) -> Dict[str, str]:
    """Return the canonical by the full name of every module of a model."""
    modules = dict(model.named_modules())
    short: Dict[str, str] = {}
    for name in modules:
        parent, _, attribute = name.rpartition(".")
        if not name:
            short[name] = ""
        elif attribute in _PRIVATE or (attribute == "module" and _is_wrapper(modules[parent], not short[parent])):
            short[name] = short[parent]
        else:
            short[name] = _joined(short[parent], attribute)
    return short


def _is_wrapper(module: nn.Module, outermost: bool) -> bool:
    """Return whether a module's attribute ``module`` is the model it wraps: by its class, or if it is all there is."""
    if any(kind.__name__ in _WRAPPERS for kind in type(module).__mro__):
        return True
    return outermost and not module._parameters and not module._buffers and list(module._modules) == ["module"]


def _of_tensor(name: str, unwrapped: Mapping[str, str]) -> str:
    owner, _, rest = name.rpartition(".")
    while owner not in unwrapped:  # a second name of a shared module
        owner, _, between = owner.rpartition(".")
        rest = f"{between}.{rest}"
    return _joined(unwrapped[owner], rest)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _public(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _PRIVATE)


def _without_wrappers(name: str, known: Container[str]) -> str:
    """Return a name without as few ``module`` as make it a known one; as it is if that cannot be."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part == "module"]
    for dropped in chain.from_iterable(combinations(places, count) for count in range(len(places) + 1)):
        short = ".".join(part for place, part in enumerate(parts) if place not in dropped)
        if short in known:
            return short
    return name


def _insert(named: Dict[str, Any], short: str, name: str, tensor: Tensor) -> None:
    if uninitialized(tensor):
        raise problem(
            "the model has lazy modules that have not been run yet",
            expected="a model whose parameters and buffers all have a shape",
            received=f"{name!r} without one",
            fix="run the model once on a batch, as torch asks of lazy modules, before you build the learner",
        )
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

    It holds names, numbers and weak references only, so nothing lives longer for it. An ``id`` stands for one object
    as long as none of those that were found is gone.
    """

    def __init__(self, modules: List[nn.Module], found: NamedTensors) -> None:
        self._gone: List[Any] = []
        self._modules = [weakref.ref(module, self._gone.append) for module in modules]
        self._children = _ids(_values(map(_children, modules)))
        self._sizes, self._names, values = _contents(modules)
        self._ids = _ids(values)
        self._alive = [weakref.ref(value, self._gone.append) for value in values if value is not None]
        places = {id(value): place for place, value in enumerate(values)}
        self._parameters = [(name, places[id(tensor)]) for name, tensor in found.parameters.items()]
        self._buffers = [(name, places[id(tensor)]) for name, tensor in found.buffers.items()]
        self._state = found.state
        self._memory = _memory(found)

    def modules(self) -> Optional[List[nn.Module]]:
        """Return the modules, or ``None`` if the model has changed."""
        modules = self._known()
        same = bool(modules) and _ids(_values(map(_children, modules))) == self._children
        return modules if same else None

    def tensors(self) -> Optional[NamedTensors]:
        """Return the tensors, or ``None`` if the model has changed."""
        sizes, names, values = _contents(self._known())
        if _ids(values) != self._ids or sizes != self._sizes or names != self._names:
            return None
        parameters = {name: values[place] for name, place in self._parameters}
        buffers = {name: values[place] for name, place in self._buffers}
        found = NamedTensors(parameters, buffers, {**parameters, **buffers}, self._state)
        return found if _memory(found) == self._memory else None  # Module.to() keeps a Parameter and moves its values

    def _known(self) -> List[nn.Module]:
        """Return the modules that were found; none if anything found then is gone."""
        modules: List[Any] = [known() for known in self._modules]
        return [] if self._gone else modules


# What follows runs at every step; these functions take a third of a loop's time.


def _contents(modules: Sequence[nn.Module]) -> Tuple[List[int], List[str], List[Any]]:
    """Return the number of children, parameters and buffers of each module, their names, and themselves."""
    tables = list(chain.from_iterable(map(_tables, modules)))
    return list(map(len, tables)), list(chain.from_iterable(filter(None, tables))), _values(tables)


def _values(tables: Iterable[Mapping[str, Any]]) -> List[Any]:
    return list(chain.from_iterable([table.values() for table in filter(None, tables)]))


def _ids(values: Iterable[Any]) -> List[int]:
    return list(map(id, values))


def _memory(found: NamedTensors) -> List[int]:
    """Return the addresses of all tensors; none where some have no memory of the usual kind."""
    tensors = found.all.values()
    try:
        return list(map(Tensor.data_ptr, tensors)) if _PLAIN.issuperset(map(type, tensors)) else []
    except RuntimeError:
        return []


_PLAIN = frozenset({Tensor, nn.Parameter})

_children = attrgetter("_modules")
_tables = attrgetter("_modules", "_parameters", "_buffers")

_walks: weakref.WeakKeyDictionary[nn.Module, _Walk] = weakref.WeakKeyDictionary()


class _Look:
    """What was found of a model inside :func:`looking_once`."""

    def __init__(self) -> None:
        self.tensors: Optional[NamedTensors] = None
        self.modules: Optional[List[nn.Module]] = None


_looks: Dict[int, _Look] = {}
"""By ``id`` of the models of the blocks that are open."""
