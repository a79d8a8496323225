"""Undoing what forward passes of ours do to the buffers of the host's models."""

from __future__ import annotations

import warnings
import weakref
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

_Stamps = Tuple[List[int], List[int]]

_buffers = attrgetter("_buffers")
_versions = attrgetter("_version")


class _Known:
    """What is known about the buffers of one model; a buffer's place is its number in the order of the modules.

    Attributes:
        layout: The buffers' names by module.
        stamps: Identities and versions of the buffers after our last pass.
        ours: Places of the buffers that our passes write.
        modules: Places of the modules to which these belong.
        theirs: Places of the buffers that were written between our passes.
    """

    def __init__(self, layout: List[List[str]], stamps: _Stamps) -> None:
        self.layout = layout
        self.stamps = stamps
        self.ours: Set[int] = set()
        self.modules: Set[int] = set()
        self.theirs: Set[int] = set()


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


class Buffers:
    """The buffers of one model before a pass of ours, to put them back after it.

    Most models write no buffer in eval mode, and copying all of them before every pass would cost time at every step.
    So all are copied before the first pass, and again when a buffer was written between our passes that nobody else had
    written before (as when a fake-quantisation observer is switched on). Before the other passes only those are copied
    that earlier passes wrote. Writes show in the version that torch counts; after a pass with all the copies values are
    compared too, for writes through ``.data``.

    A module whose buffers a pass writes gets its plain attributes back as well, since a queue and its position, or a
    cache and its length, belong together.

    Args:
        model: The model that is about to be run.
        modules: Its modules.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        self._model, self._modules = model, modules
        self._tables: List[Dict[str, Optional[Tensor]]] = list(map(_buffers, modules))
        self._tensors = self._present()
        self._stamps = _stamps(self._tensors)
        self._copies_all = False
        known = _known.get(model)
        if known is None or (known.stamps[0] != self._stamps[0] and known.layout != self._layout()):
            known, self._copies_all = _Known(self._layout(), self._stamps), True
        elif known.stamps != self._stamps:
            before, now = zip(*known.stamps), zip(*self._stamps)
            changed = {place for place, pair in enumerate(zip(before, now)) if pair[0] != pair[1]}
            self._copies_all = not changed <= known.theirs
            known.theirs |= changed
        self._known = known
        places = range(len(self._tensors)) if self._copies_all else known.ours
        copied = [(place, self._tensors[place]) for place in places]
        self._copies = {place: tensor.detach().clone() for place, tensor in copied if tensor is not None}
        chosen = range(len(modules)) if self._copies_all else known.modules
        self._attributes = {index: dict(vars(modules[index])) for index in chosen}

    def put_back(self, *, complete: bool) -> None:
        """Put back what the pass changed.

        Args:
            complete: Whether the pass came to its end, so that it showed what such a pass writes.
        """
        known, now = self._known, self._present()
        same = len(now) == len(self._tensors) and all(map(is_, now, self._tensors)) and _stamps(now) == self._stamps
        known.stamps = self._stamps
        if self._copies_all or known.ours or not same:
            self._put_back(complete)
            known.stamps = _stamps(self._tensors)
        if complete:
            _known[self._model] = known

    def _present(self) -> List[Optional[Tensor]]:
        return list(chain.from_iterable([table.values() for table in filter(None, self._tables)]))

    def _layout(self) -> List[List[str]]:
        return [list(table.keys()) for table in self._tables]

    def _put_back(self, complete: bool) -> None:
        known = self._known
        written = self._written()
        touched: Set[int] = set()
        place = 0
        for index, (table, names) in enumerate(zip(self._tables, known.layout)):
            end = place + len(names)
            replaced = self._restore_table(index, table, dict(zip(names, self._tensors[place:end])))
            if replaced or not written.isdisjoint(range(place, end)):
                touched.add(index)
            place = end
        known.ours |= written
        known.modules |= touched
        for place in written.intersection(self._copies):
            tensor = self._tensors[place]
            if tensor is not None:
                _restore(tensor, self._copies[place])
        for index in touched.intersection(self._attributes):
            _restore_attributes(self._modules[index], self._attributes[index])
        if complete and not written <= set(self._copies):
            names = list(chain.from_iterable(known.layout))
            lost = [names[place] for place in sorted(written - set(self._copies))]
            warnings.warn(
                f"a forward pass of {type(self._model).__name__} in eval mode wrote buffers that no such pass had "
                f"written before: {lost[:5]}. What this one pass of the learner wrote cannot be undone; from now on it "
                "is. To avoid it, write them in training mode only (if self.training: ...)",
                stacklevel=2,
            )

    def _written(self) -> Set[int]:
        """Return the places of the tensors that were written in place."""
        written: Set[int] = set()
        doubtful: Dict[int, Tuple[Tensor, Tensor]] = {}
        for place, (tensor, version) in enumerate(zip(self._tensors, self._stamps[1])):
            copy = self._copies.get(place)
            if tensor is None:
                continue
            if version_of(tensor) != version or (copy is not None and copy.shape != tensor.shape):
                written.add(place)
            elif copy is not None and place in self._known.ours:
                written.add(place)  # perhaps through .data, which no version shows
            elif copy is not None:
                doubtful[place] = (tensor, copy)
        return written | {place for place, flag in zip(doubtful, _differ(list(doubtful.values()))) if flag}

    def _restore_table(self, index: int, table: Any, before: Mapping[str, Optional[Tensor]]) -> bool:
        """Put the same tensors under the same names; return whether any was not there."""
        if not isinstance(table, dict):  # of a scripted module, whose buffers cannot be exchanged
            return False
        if len(table) == len(before) and all(table.get(name, self) is tensor for name, tensor in before.items()):
            return False
        for name in [name for name in table if name not in before]:
            del table[name]
            getattr(self._modules[index], "_non_persistent_buffers_set", set()).discard(name)
        table.update(before)
        return True


def _restore(tensor: Tensor, copy: Tensor) -> None:
    with torch.no_grad():
        if tensor.shape != copy.shape:
            tensor.resize_(copy.shape)
        tensor.data.copy_(copy)


def _restore_attributes(module: nn.Module, before: Dict[str, Any]) -> None:
    now = vars(module)
    for name in [name for name in now if name not in before]:
        del now[name]
    for name, value in before.items():
        if name != "training" and now.get(name, now) is not value:
            now[name] = value


def _differ(pairs: Sequence[Tuple[Tensor, Tensor]]) -> List[bool]:
    """Return for pairs of tensors of equal shapes whether any element differs; waits for each device once."""
    different = [False] * len(pairs)
    by_device: Dict[torch.device, List[int]] = {}
    for index, (now, _) in enumerate(pairs):
        if now.device.type != "meta" and now.layout == torch.strided and now.numel():
            by_device.setdefault(now.device, []).append(index)
    for indices in by_device.values():
        flags = torch.stack([_unlike(*pairs[index]) for index in indices])
        for index, flag in zip(indices, flags.tolist()):
            different[index] = flag
    return different


def _unlike(now: Tensor, copy: Tensor) -> Tensor:
    return ((now != copy) & ((now == now) | (copy == copy))).any()  # NaN is like NaN


def _stamps(tensors: Sequence[Optional[Tensor]]) -> _Stamps:
    """Return the identity and the version of each tensor."""
    try:
        return list(map(id, tensors)), list(map(_versions, tensors))
    except (RuntimeError, AttributeError):
        return list(map(id, tensors)), list(map(version_of, tensors))


def version_of(tensor: Optional[Tensor]) -> int:
    """Return how often a tensor was written in place; -1 where that is not counted."""
    try:
        return -1 if tensor is None else int(tensor._version)
    except RuntimeError:  # a tensor of inference mode, which counts none
        return -1
