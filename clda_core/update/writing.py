"""Copying, restoring and blending tensors of the user's models: the one place that writes to them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import AbstractSet, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from .._host.compat import clones, copy_, halve_towards_, lerp_
from .._host.names import named_tensors
from .._host.shards import here
from .._host.undo import undoing
from ..errors import problem
from ..layers import Layer, local_names
from .classes import MAY_BE_CLASSES, Classes
from .norms import NO_STATISTIC

__all__ = [
    "Snapshot",
    "Weights",
    "blend",
    "check_weights",
    "holding",
    "names_in",
    "pair_tensors",
    "tensors_of",
    "undone_on_error",
    "with_weights",
    "write_weights",
]

Weights = Mapping[str, Tensor]
"""What some tensors of a model had at an earlier time, by canonical name; of a shard, this rank's part."""


class Snapshot:
    """A copy of some tensors of a model, to restore them exactly.

    Args:
        model: The model.
        names: Of the tensors about to be written.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        tensors = tensors_of(model)
        self._tensors = [here(tensors[name]) for name in names]
        self._copies = clones(self._tensors)

    def restore(self) -> None:
        """Write the copies back in place."""
        copy_(self._tensors, self._copies)

    def go_halfway_back(self) -> None:
        """Write the mean of the copies and the present values, in place."""
        halve_towards_(self._tensors, self._copies)


@contextmanager
def undone_on_error(model: nn.Module, layers: Iterable[Layer]) -> Iterator[Snapshot]:
    """Restore ``layers`` of ``model`` if the block raises anything."""
    snapshot = Snapshot(model, names_in(layers))
    with undoing(snapshot.restore, on_error_only=True):
        yield snapshot


def with_weights(kept: Weights, model: nn.Module, names: Iterable[str]) -> Weights:
    """Return kept weights, with copies of the tensors of these names added that are not kept yet.

    Args:
        kept: What the model had at an earlier time; tensors that are not among them have stayed the same since.
        model: The model.
        names: Of the tensors about to be written.
    """
    tensors = tensors_of(model)
    added = [name for name in names if name not in kept]
    moved = {name: value.to(tensors[name].device) for name, value in kept.items()}
    return {**moved, **dict(zip(added, clones([here(tensors[name]) for name in added])))}


def write_weights(model: nn.Module, kept: Weights) -> None:
    """Write kept weights to the model, which may have moved to another device or dtype since."""
    tensors = tensors_of(model)
    targets = [here(tensors[name]) for name in kept]
    copy_(targets, [value.to(target) for value, target in zip(kept.values(), targets)])


@contextmanager
def holding(model: nn.Module, kept: Weights) -> Iterator[None]:
    """Let the model have kept weights inside the block, also where the host's autocast has cached the present ones."""
    before = Snapshot(model, kept)

    def give_back() -> None:
        before.restore()
        torch.clear_autocast_cache()

    with undoing(give_back):
        write_weights(model, kept)
        torch.clear_autocast_cache()
        yield


def check_weights(model: nn.Module, kept: Weights, whose: str) -> None:
    """Raise unless kept weights, from a saved state, are of this model.

    Args:
        model: The model.
        kept: The weights.
        whose: What they are called in the message, for example ``"the best teacher so far"``.
    """
    tensors = tensors_of(model)
    for name, value in kept.items():
        shape = tuple(here(tensors[name]).shape) if name in tensors else None
        if shape != tuple(value.shape):
            raise problem(
                f"{whose} in the saved state is another network",
                expected=f"{name!r} of shape {tuple(value.shape)}, as saved",
                received="no such tensor" if shape is None else f"shape {shape}",
                fix="load it into a learner of the teacher it was saved with; under FSDP2 on every rank what that "
                "rank saved, on as many ranks",
            )


def blend(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], weight: float) -> None:
    """Move target tensors towards the sources of the same name: ``target <- target + weight · (source - target)``.

    Args:
        targets: Teacher tensors by canonical name, written in place.
        sources: What to move towards, of equal shapes; names that ``targets`` lacks are not allowed.
        weight: In [0, 1].
    """
    with torch.no_grad():
        lerp_([targets[name] for name in sources], list(sources.values()), weight)


def names_in(layers: Iterable[Layer]) -> List[str]:
    """Return the names of all parameters and buffers of layers."""
    return [name for layer in layers for name in (*layer.parameters, *layer.buffers)]


def tensors_of(model: nn.Module) -> Dict[str, Tensor]:
    """Return all parameters and persistent floating-point buffers by canonical name."""
    return named_tensors(model).all


def pair_tensors(
    targets: Mapping[str, Tensor],
    layer: Layer,
    sources: Mapping[str, Tensor],
    related: Layer,
    statistics: Optional[AbstractSet[str]],
    roles: Tuple[str, str] = ("teacher", "student"),
    classes: Optional[Classes] = None,
) -> Tuple[Dict[str, str], Dict[str, str]]:
    """Pair the tensors of a layer with those of its related layer in the other model by local name.

    Args:
        targets: :func:`tensors_of` the model about to be written.
        layer: A layer of that model.
        sources: :func:`tensors_of` the model to be read.
        related: A layer of that model.
        statistics: Names of the only buffers to be paired (:mod:`~clda_core.update.norms`); ``None`` passes over
            buffers without a word.
        roles: What the reasons call the two models.
        classes: Where the classes are in both, if their places differ.

    Returns:
        The source's canonical name by the target's, of tensors of equal shape or with a row for each class
        (:meth:`Classes.are_rows`), and for what has no counterpart a reason by ``"layer: name"``.
    """
    kinds = [(layer.parameters, related.parameters)]
    if statistics is not None:
        kinds.append((layer.buffers, related.buffers))
    pairs: Dict[str, str] = {}
    unpaired: Dict[str, str] = {}
    for target_names, source_names in kinds:
        available = local_names(related, source_names)
        for short, name in local_names(layer, target_names).items():
            if statistics is not None and target_names is layer.buffers and name not in statistics:
                unpaired[f"{layer.name}: {short}"] = NO_STATISTIC
                continue
            if short not in available:
                unpaired[f"{layer.name}: {short}"] = f"{roles[1]} layer {related.name!r} has no {short!r}"
                continue
            target, source = targets[name], sources[available[short]]
            sides = [(name, target.shape), (available[short], source.shape)]
            (of_teacher, big), (of_student, small) = sides if roles[0] == "teacher" else sides[::-1]
            if classes is not None and classes.are_rows(of_teacher, big, of_student, small) and big[1:] == small[1:]:
                pairs[name] = available[short]
            elif classes is not None and classes.concern(big, small):
                unpaired[f"{layer.name}: {short}"] = MAY_BE_CLASSES
            elif target.shape != source.shape:
                shapes = f"{tuple(target.shape)} in the {roles[0]}, {tuple(source.shape)} in the {roles[1]}"
                unpaired[f"{layer.name}: {short}"] = f"shapes differ: {shapes}"
            else:
                pairs[name] = available[short]
    return pairs, unpaired
