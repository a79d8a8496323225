"""Copying, restoring and blending tensors of the user's models: the one place that writes to them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Dict, Iterable, Iterator, List, Mapping, Tuple

import torch
from torch import Tensor, nn

from .._compat import lerp_
from ..layers import Layer, canonical_buffers, canonical_parameters, local_names

__all__ = ["Snapshot", "blend", "pair_tensors", "undone_on_error"]


class Snapshot:
    """A copy of some layers of a model, to restore them exactly.

    Args:
        model: The model; only the parameters and buffers of ``layers`` are copied.
        layers: The layers about to be written.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Layer]) -> None:
        parameters, buffers = canonical_parameters(model), canonical_buffers(model)
        tensors: List[Tensor] = [parameters[name] for layer in layers for name in layer.parameters]
        tensors += [buffers[name] for layer in layers for name in layer.buffers]
        self._copies = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore(self) -> None:
        """Write the copies back in place."""
        with torch.no_grad():
            for tensor, copy in self._copies:
                tensor.copy_(copy)


@contextmanager
def undone_on_error(model: nn.Module, layers: Iterable[Layer]) -> Iterator[Snapshot]:
    """Restore ``layers`` of ``model`` if the block raises anything."""
    snapshot = Snapshot(model, layers)
    try:
        yield snapshot
    except BaseException:
        snapshot.restore()
        raise


def blend(
    targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], weight: float, non_salient: Mapping[str, Tensor]
) -> None:
    """Move target tensors towards the sources of the same name: ``target <- target + weight · (source - target)``.

    Args:
        targets: Teacher tensors by canonical name, written in place.
        sources: What to move towards, of equal shapes; names that ``targets`` lacks are not allowed.
        weight: In [0, 1].
        non_salient: By name, True for the only elements that may move; a name that is absent moves whole.
    """
    with torch.no_grad():
        names = list(sources)
        masked = [
            torch.where(non_salient[name], sources[name].to(targets[name]), targets[name])
            if name in non_salient
            else sources[name]
            for name in names
        ]
        lerp_([targets[name].detach() for name in names], masked, weight)


def pair_tensors(
    teacher: nn.Module, layer: Layer, student: nn.Module, related: Layer, with_buffers: bool
) -> Tuple[Dict[str, Tuple[Tensor, Tensor]], Dict[str, str]]:
    """Pair the tensors of a teacher layer with those of its related student layer by local name.

    Returns:
        ``(teacher tensor, student tensor)`` of equal shape by the teacher's canonical name, and for what has no
        counterpart a reason by ``"layer: name"``.
    """
    kinds: List[Tuple[Tuple[str, ...], Tuple[str, ...], Mapping[str, Tensor], Mapping[str, Tensor]]] = [
        (layer.parameters, related.parameters, canonical_parameters(teacher), canonical_parameters(student))
    ]
    if with_buffers:
        kinds.append((layer.buffers, related.buffers, canonical_buffers(teacher), canonical_buffers(student)))
    pairs: Dict[str, Tuple[Tensor, Tensor]] = {}
    unpaired: Dict[str, str] = {}
    for teacher_names, student_names, of_teacher, of_student in kinds:
        available = local_names(related, student_names)
        for local, name in local_names(layer, teacher_names).items():
            target = of_teacher[name].detach()
            source = of_student[available[local]].detach() if local in available else None
            if source is None:
                unpaired[f"{layer.name}: {local}"] = f"student layer {related.name!r} has no {local!r}"
            elif source.shape != target.shape:
                shapes = f"{tuple(target.shape)} in the teacher, {tuple(source.shape)} in the student"
                unpaired[f"{layer.name}: {local}"] = f"shapes differ: {shapes}"
            else:
                pairs[name] = (target, source)
    return pairs, unpaired
