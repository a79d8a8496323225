"""Undoing what forward passes of ours do to the buffers of the host's models."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any, Dict, List, MutableMapping, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

_tables = attrgetter("_buffers")
_Places = Tuple[List[int], List[str], List[Optional[Tensor]]]


@dataclass
class _Known:
    """What is known about the buffers of one model; a buffer's place is its number in the order of the modules.

    Attributes:
        sizes: The number of buffers of each module.
        names: The buffers' names in their modules.
        stamps: Identity and version of every buffer after our last pass.
        ours: Places of the buffers that our passes write.
        modules: Places of the modules to which these belong.
        theirs: Places of the buffers that were written between our passes.
    """

    sizes: List[int]
    names: List[str]
    stamps: List[Tuple[int, int]]
    ours: Set[int] = field(default_factory=set)
    modules: Set[int] = field(default_factory=set)
    theirs: Set[int] = field(default_factory=set)


_known: MutableMapping[nn.Module, _Known] = weakref.WeakKeyDictionary()


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
        self._buffers: List[Dict[str, Optional[Tensor]]] = list(map(_tables, modules))
        self._sizes, self._names, self._tensors = self._places()
        self._stamps = _stamps(self._tensors)
        known = _known.get(model)
        if known is None or (known.sizes, known.names) != (self._sizes, self._names):
            known, self._copies_all = _Known(self._sizes, self._names, self._stamps), True
        else:
            self._copies_all = False
            if known.stamps != self._stamps:
                changed = {place for place, pair in enumerate(zip(known.stamps, self._stamps)) if pair[0] != pair[1]}
                self._copies_all = not changed <= known.theirs
                known.theirs |= changed
        self._known = known
        copied = range(len(self._names)) if self._copies_all else known.ours
        with torch.no_grad():
            self._copies = {
                place: tensor.detach().clone()
                for place, tensor in ((place, self._tensors[place]) for place in copied)
                if tensor is not None
            }
        chosen = range(len(modules)) if self._copies_all else known.modules
        self._attributes = {index: dict(vars(modules[index])) for index in chosen}

    def put_back(self, *, complete: bool) -> None:
        """Put back what the pass changed.

        Args:
            complete: Whether the pass came to its end, so that it showed what such a pass writes.
        """
        known = self._known
        sizes, names, tensors = self._places()
        same = (sizes, names) == (self._sizes, self._names) and _stamps(tensors) == self._stamps
        known.stamps = self._stamps
        if self._copies_all or known.ours or not same:
            self._put_back(complete)
            known.stamps = _stamps(self._tensors)
        if complete:
            _known[self._model] = known

    def _places(self) -> _Places:
        filled = list(filter(None, self._buffers))
        names = list(chain.from_iterable(filled))
        return list(map(len, self._buffers)), names, list(chain.from_iterable([table.values() for table in filled]))

    def _put_back(self, complete: bool) -> None:
        known = self._known
        written = self._written()
        touched: Set[int] = set()
        start = 0
        for index, (table, size) in enumerate(zip(self._buffers, self._sizes)):
            places = range(start, start + size)
            start += size
            replaced = self._restore_table(index, table, places)
            if replaced or not written.isdisjoint(places):
                touched.add(index)
        known.ours |= written
        known.modules |= touched
        lost = [self._names[place] for place in sorted(written - set(self._copies))]
        for place in written.intersection(self._copies):
            tensor = self._tensors[place]
            if tensor is not None:
                _restore(tensor, self._copies[place])
        for index in touched.intersection(self._attributes):
            _restore_attributes(self._modules[index], self._attributes[index])
        if lost and complete:
            warnings.warn(
                f"a forward pass of {type(self._model).__name__} in eval mode wrote buffers that no such pass had "
                f"written before: {lost[:5]}. What this one pass of the learner wrote cannot be undone; from now on it "
                "is. To avoid it, write them in training mode only (if self.training: ...)",
                stacklevel=2,
            )

    def _written(self) -> Set[int]:
        """Return the places of the tensors that were written in place."""
        written: Set[int] = set()
        doubtful: List[int] = []
        pairs: List[Tuple[Tensor, Tensor]] = []
        for place, (tensor, stamp) in enumerate(zip(self._tensors, self._stamps)):
            copy = self._copies.get(place)
            if tensor is None:
                continue
            if _version(tensor) != stamp[1] or (copy is not None and copy.shape != tensor.shape):
                written.add(place)
            elif copy is not None and place in self._known.ours:
                written.add(place)  # perhaps through .data, which no version shows
            elif copy is not None:
                doubtful.append(place)
                pairs.append((tensor, copy))
        return written | {place for place, flag in zip(doubtful, _differ(pairs)) if flag}

    def _restore_table(self, index: int, table: Dict[str, Optional[Tensor]], places: Sequence[int]) -> bool:
        """Put the same tensors under the same names; return whether any was not there."""
        before = {self._names[place]: self._tensors[place] for place in places}
        if len(table) == len(before) and all(table.get(name, self) is tensor for name, tensor in before.items()):
            return False
        for name in [name for name in table if name not in before]:
            del table[name]
            getattr(self._modules[index], "_non_persistent_buffers_set", set()).discard(name)
        for name, tensor in before.items():
            table[name] = tensor
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


def _stamps(tensors: Sequence[Optional[Tensor]]) -> List[Tuple[int, int]]:
    try:
        return [(id(tensor), -1 if tensor is None else tensor._version) for tensor in tensors]
    except RuntimeError:
        return [(id(tensor), -1 if tensor is None else _version(tensor)) for tensor in tensors]


def _version(tensor: Tensor) -> int:
    try:
        return int(tensor._version)
    except RuntimeError:  # a tensor of inference mode, which counts none
        return -1
