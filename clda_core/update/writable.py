"""What of a teacher rounds may write: not what its host froze, nothing too narrow for small steps, each memory once."""

from __future__ import annotations

from typing import AbstractSet, Collection, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from .._host.compat import has_complex_adam
from .._host.layout import overlaps
from .._host.names import canonical_modules, canonical_parameters, named_tensors
from ..errors import problem
from ..layers import Layer, ModelView
from ..saliency import SaliencyEstimator

_NORMS = (nn.modules.batchnorm._BatchNorm,)


def trainable(model: nn.Module) -> Optional[Set[str]]:
    """Return the parameters that require gradients by name; ``None`` if all do or none, as in a frozen teacher."""
    parameters = canonical_parameters(model)
    names = {name for name, parameter in parameters.items() if parameter.requires_grad}
    return names if 0 < len(names) < len(parameters) else None


def restricted(layers: Sequence[Layer], to: Collection[str], model: nn.Module) -> Tuple[Layer, ...]:
    """Return the layers with these parameters alone; a layer without one is left out.

    A buffer stays with its layer if a parameter of the buffer's own module does, or if that module has none.

    Args:
        layers: Layers of ``model``.
        to: Names of parameters.
        model: The model.
    """
    kept_whole = [all(name in to for name in layer.parameters) for layer in layers]
    if all(kept_whole):
        return tuple(layers)
    parameters = canonical_parameters(model)
    owners = {_owner(name) for name in parameters}
    kept = {_owner(name) for name in to}
    found: List[Layer] = []
    for layer, whole in zip(layers, kept_whole):
        names = tuple(name for name in layer.parameters if name in to)
        if whole:
            found.append(layer)
        elif names:
            buffers = tuple(name for name in layer.buffers if _owner(name) in kept or _owner(name) not in owners)
            numel = sum(parameters[name].numel() for name in names)
            found.append(layer._replace(parameters=names, buffers=buffers, numel=numel))
    return tuple(found)


def writable_layers(view: ModelView) -> Tuple[Layer, ...]:
    """Return the layers of a teacher with what rounds may observe and write.

    Of a partly frozen teacher that is what requires gradients. There a module without parameters is taken for frozen
    too, as BatchNorm with weights in buffers is, unless it is a BatchNorm without weights.
    """
    names = trainable(view.model)
    if names is None:
        return view.layers
    owners = {_owner(name) for name in canonical_parameters(view.model)}
    modules = canonical_modules(view.model)

    def follows(buffer: str) -> bool:
        return _owner(buffer) in owners or isinstance(modules.get(_owner(buffer)), _NORMS)

    layers = restricted(view.layers, names, view.model)
    return tuple(layer._replace(buffers=tuple(filter(follows, layer.buffers))) for layer in layers)


def written_now(view: ModelView, known: Optional[AbstractSet[str]]) -> Tuple[Layer, ...]:
    """Return what this round may write: nothing frozen since the learner was built, nothing of unknown saliency.

    Args:
        view: The teacher and its :func:`writable_layers`.
        known: Names of the parameters whose saliency is known; ``None`` for all.
    """
    layers = view.layers
    for names in (trainable(view.model), known):
        if names is not None:
            layers = restricted(layers, names, view.model)
    return layers


def check_precision(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise if a parameter that rounds may write is narrower than float32: most small steps would be lost in it."""
    parameters = canonical_parameters(model)
    for layer in layers:
        for name in layer.parameters:
            dtype = parameters[name].dtype if name in parameters else torch.float32
            if dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
                raise problem(
                    f"the teacher is kept in {_short(dtype)}, in which the small steps of rounds are lost",
                    expected="parameters in float32 or wider, of all layers that rounds may write",
                    received=f"{name}: {_short(dtype)}",
                    fix="call teacher.float() and run it in torch.autocast, which computes in half precision all the "
                    "same; or pass schedule=Never() for distillation alone",
                )


def check_writable(view: ModelView, estimator: SaliencyEstimator) -> None:
    """Raise unless rounds can observe and write every parameter of these layers, each by itself."""
    _check_some(view.layers)
    check_precision(view.model, view.layers)
    parameters = canonical_parameters(view.model)
    written = {name: parameters[name] for layer in view.layers for name in layer.parameters}
    _check_complex(written, estimator)
    pairs = overlaps(written)
    if pairs:
        first, second = pairs[0]
        raise problem(
            "parameters of the teacher share memory, so that writing one of them writes the other",
            expected="parameters with memory of their own, or one Parameter under several names",
            received=f"{first!r} overlaps " + ("itself" if first == second else f"{second!r}"),
            fix="tie weights by assigning the Parameter (b.weight = a.weight), copy a slice or an expanded tensor by "
            "clone(), or leave them out by layers=",
        )


def check_memory(teacher: nn.Module, student: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise if what is written of the teacher, or trained of the student, lies in the memory of the other.

    Args:
        teacher: The big model.
        student: The small one.
        layers: Of the teacher, what may be written.
    """
    written = {name for layer in layers for name in layer.parameters}
    ours = canonical_parameters(teacher)
    theirs = named_tensors(student).all
    both: Dict[str, Tensor] = {f"teacher {name}": tensor for name, tensor in ours.items()}
    both.update({f"student {name}": tensor for name, tensor in theirs.items()})
    shared: List[str] = []
    for pair in overlaps(both):
        names = dict(name.split(" ", 1) for name in pair)
        if len(names) == 2 and (
            teacher is student or names["teacher"] in written or theirs[names["student"]].requires_grad
        ):
            shared.append(names["teacher"])
    if shared:
        raise problem(
            "teacher and student share parameters",
            expected="two models without common memory, but for what is frozen in both",
            received="the same object twice" if teacher is student else f"shared: {shared[:5]}",
            fix="build the student on its own, or start it from the teacher with init_student(). Freeze a common "
            "backbone in both; the teacher then needs a trainable part beside it, or layers= that leave it out",
        )


def _check_some(layers: Sequence[Layer]) -> None:
    """Raise unless rounds may write something."""
    if not layers:
        raise problem(
            "rounds may write nothing of the teacher",
            expected="at least one parameter that requires gradients inside the layers",
            received="a partly frozen teacher, of which layers= leaves out all that its host trains",
            fix="freeze the whole teacher, let layers= keep a trainable part, or pass schedule=Never()",
        )


def _check_complex(written: Mapping[str, Tensor], estimator: SaliencyEstimator) -> None:
    names = [name for name, parameter in written.items() if parameter.is_complex()]
    if names and (estimator.order == 2 or not has_complex_adam()):
        raise problem(
            "the teacher has complex parameters",
            expected="real ones, for second derivatives and for torch before 1.13",
            received=f"{names[:5]}, {type(estimator).__name__}, torch {torch.__version__}",
            fix="use Taylor() or Fisher() with a newer torch, leave these parameters out by layers=, or keep them as "
            "torch.view_as_real gives them",
        )


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]
