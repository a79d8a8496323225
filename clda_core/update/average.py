"""Exponential averaging of student layers into teacher layers."""

from __future__ import annotations

from typing import AbstractSet, Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor, nn
from typing_extensions import Literal

from .._host.borrowing import borrowed
from .._host.compat import lerp_
from .._host.names import named_tensors
from .._host.shards import local, part_for, whole
from ..errors import check_choice, check_number
from ..strategy import Strategy
from .base import RoundContext, UpdateResult
from .classes import Classes, find_classes
from .statistics import running_statistics
from .writing import blend, pair_tensors

__all__ = ["Average"]


class Average(Strategy):
    r"""Exponential averaging of related student layers into the selected teacher layers.

    :math:`\theta_T \leftarrow (1 - s(1 - d))\,\theta_T + s(1 - d)\,\theta_S` for every parameter of the selected layer
    that the related student layer has under the same local name and in the same shape; :math:`d` is ``decay`` and
    :math:`s` the schedule's strength. What has no counterpart is reported as skipped. The paper's rule is not public;
    this is the plainest reading of it.

    Where the KD loss has a ``class_map``, the student's rows of the layer that makes the logits go to their classes'
    rows in the teacher. That layer is found by running both models on a round's inputs once, as the one whose output is
    the logits. Whatever else may have classes in one of its first two dimensions is skipped.

    Args:
        decay: :math:`d` in [0, 1]; 1 changes nothing.
        buffers: ``"average"`` treats the running means and variances of norms alike, ``"keep"`` leaves the teacher's.
            All other buffers (masks, observers, counters, queues, tables) are left alone.

    Raises:
        CldaError: If an argument is out of range.

    Note:
        Averaging networks whose bases differ wrecks the teacher. Start the student from the teacher with
        :func:`init_student`, warm up, and put a :class:`~clda_core.update.Guard` around it.

    References:
        Tarvainen and Valpola, Mean teachers are better role models, NeurIPS 2017, Eq. (1), for the averaging.
    """

    needs_relation = True

    def __init__(self, *, decay: float = 0.99, buffers: Literal["keep", "average"] = "keep") -> None:
        check_number("decay", decay, at_least=0, at_most=1)
        check_choice("buffers", buffers, ("keep", "average"))
        self.decay = decay
        self.buffers = buffers
        self._pairs: Optional[_Pairs] = None
        self._classes: Optional[Tuple[Any, Classes]] = None

    def apply(self, context: RoundContext) -> UpdateResult:
        """Average the related student layers into the selected teacher layers, in place."""
        weight = (1 - self.decay) * context.strength
        of_teacher, of_student = named_tensors(context.teacher), named_tensors(context.student)
        related = [context.related.get(layer.name) for layer in context.layers]
        classes = self._where_classes_are(context, (of_teacher.state, of_student.state))
        made_of = (of_teacher.state, of_student.state, classes, context.layers, related)
        ours, theirs = of_teacher.all(), of_student.all()
        pairs = self._pairs
        if pairs is None or pairs.made_of != made_of or not pairs.where_they_were(ours, theirs):
            statistics = running_statistics(context.teacher) if self.buffers == "average" else None
            pairs = self._pairs = _pair(made_of, ours, theirs, statistics)
        targets, sources = pairs.of(ours, theirs)
        if classes is not None:
            for index, (name, other) in enumerate(pairs.names.items()):
                if classes.are_rows(name, targets[index].shape, other, sources[index].shape):
                    sources[index] = classes.in_teachers(whole(targets[index]), whole(sources[index]))
        if pairs.memory:
            lerp_(targets, sources, weight, alike=True)
        else:
            parts = {name: part_for(source, target) for name, source, target in zip(pairs.names, sources, targets)}
            blend({name: local(target) for name, target in zip(pairs.names, targets)}, parts, weight)
        return UpdateResult(pairs.updated, dict(pairs.skipped))

    def _where_classes_are(self, context: RoundContext, models: Tuple[Any, Any]) -> Optional[Classes]:
        """Return where the classes are, ``None`` without a class map; both models are run unless it is known."""
        if context.class_map is None:
            return None
        class_map = tuple(context.class_map)
        if self._classes is not None and self._classes[0] == models and self._classes[1].class_map == class_map:
            return self._classes[1]
        if context.inputs is None:
            return Classes(class_map)
        with borrowed(context.teacher, context.student, doing="watch", hooked=True):
            found = find_classes(context.teacher, context.student, context.predict, class_map)
        if found is None:  # until a larger batch comes
            return Classes(class_map)
        self._classes = models, found
        return found

    def rehearse(self, context: RoundContext) -> None:
        """Run both models where there is a class map, whose place in them has to be found."""
        if context.class_map is not None and context.inputs is not None:
            context.predict(context.teacher)
            context.student_outputs()

    def state_dict(self) -> Dict[str, Any]:
        """Return nothing: averaging has no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept what :meth:`state_dict` returned."""


class _Pairs(NamedTuple):
    """Which tensors are averaged, by name, so that it need not be found out anew in every round.

    Attributes:
        made_of: The states of both models, where the classes are, the selected layers and the related ones.
        names: The student's names by the teacher's.
        updated: Names of the layers that have pairs.
        skipped: What has no pair, and why.
        memory: Addresses of all tensors if each pair is of one dtype and device and none is sharded; else empty.
            ``Module.to()`` keeps the parameters and gives them other memory.
    """

    made_of: Tuple[Any, ...]
    names: Dict[str, str]
    updated: Tuple[str, ...]
    skipped: Dict[str, str]
    memory: List[int]

    def of(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        """Return the teacher's tensors, and the student's in the same order."""
        return [ours[name] for name in self.names], [theirs[name] for name in self.names.values()]

    def where_they_were(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
        """Return whether no tensor was given other memory."""
        return bool(self.memory) and self.memory == _addresses(*self.of(ours, theirs))


def _pair(
    made_of: Tuple[Any, ...],
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    statistics: Optional[AbstractSet[str]],
) -> _Pairs:
    """Pair the tensors of the selected layers with those of the related ones."""
    names: Dict[str, str] = {}
    updated: List[str] = []
    skipped: Dict[str, str] = {}
    classes = made_of[2]
    for layer, related in zip(*made_of[3:]):
        if related is None:
            skipped[layer.name] = "no related student layer"
            continue
        pairs, unpaired = pair_tensors(ours, layer, theirs, related, statistics, classes=classes)
        names.update(pairs)
        skipped.update(unpaired)
        if pairs:
            updated.append(layer.name)
    found = _Pairs(made_of, names, tuple(updated), skipped, [])
    targets, sources = found.of(ours, theirs)
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in (*targets, *sources))
    alike = all(a.dtype == b.dtype and a.device == b.device for a, b in zip(targets, sources))
    return found._replace(memory=_addresses(targets, sources)) if plain and alike else found


def _addresses(*tensors: Sequence[Tensor]) -> List[int]:
    return [address for some in tensors for address in map(Tensor.data_ptr, some)]
