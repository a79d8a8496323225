"""Exponential averaging of student layers into teacher layers."""

from __future__ import annotations

from operator import itemgetter
from typing import AbstractSet, Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

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
from .norms import running_statistics
from .writing import blend, pair_tensors

__all__ = ["Average"]

_Chosen = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


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
        if self._pairs is None or self._pairs.made_of != made_of:
            statistics = running_statistics(context.teacher) if self.buffers == "average" else None
            self._pairs = _pair(made_of, of_teacher.all, of_student.all, statistics)
        pairs = self._pairs
        targets, sources = pairs.targets(of_teacher.all), pairs.sources(of_student.all)
        if pairs.alike:
            lerp_(targets, sources, weight, alike=True)
        else:
            blend(*_in_teachers_classes(pairs.names, targets, sources, classes), weight)
        return UpdateResult(pairs.updated, dict(pairs.skipped))

    def _where_classes_are(self, context: RoundContext, models: Tuple[Any, Any]) -> Optional[Classes]:
        """Return where the classes are, ``None`` without a class map; both models are run unless it is known."""
        if context.class_map is None:
            return None
        class_map = tuple(context.class_map)
        known = self._classes
        if known is not None and known[0] in (None, models) and known[1].class_map == class_map:
            self._classes = models, known[1]
            return known[1]
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

    def __getstate__(self) -> Dict[str, Any]:
        """Leave what is known of two models out of a pickle."""
        return {**self.__dict__, "_pairs": None, "_classes": None}

    def state_dict(self) -> Dict[str, Any]:
        """Return which modules make the logits, once a class map has asked for that; averaging has no other state."""
        if self._classes is None:
            return {}
        found = self._classes[1]
        names = {"of_teacher": sorted(found.of_teacher), "of_student": sorted(found.of_student)}
        return {"class_map": list(found.class_map), **names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the next round's models are taken for those it is of."""
        self._classes = None
        if state:
            names = frozenset(state["of_teacher"]), frozenset(state["of_student"])
            self._classes = None, Classes(tuple(state["class_map"]), *names)


class _Pairs(NamedTuple):
    """Which tensors are averaged, by name, so that it need not be found out anew in every round.

    Attributes:
        made_of: The states of both models, where the classes are, the selected layers and the related ones.
        names: The student's names by the teacher's.
        targets: Returns the teacher's tensors in this order from all of them by name.
        sources: Returns the student's.
        updated: Names of the layers that have pairs.
        skipped: What has no pair, and why.
        alike: Whether the tensors can go to the kernel as they are: whole, and each pair of one dtype and device.
    """

    made_of: Tuple[Any, ...]
    names: Dict[str, str]
    targets: _Chosen
    sources: _Chosen
    updated: Tuple[str, ...]
    skipped: Dict[str, str]
    alike: bool


def _pair(
    made_of: Tuple[Any, ...],
    of_teacher: Mapping[str, Tensor],
    of_student: Mapping[str, Tensor],
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
        pairs, unpaired = pair_tensors(of_teacher, layer, of_student, related, statistics, classes=classes)
        names.update(pairs)
        skipped.update(unpaired)
        if pairs:
            updated.append(layer.name)
    targets, sources = _chosen(list(names)), _chosen(list(names.values()))
    # Rows of classes are put in the teacher's order first.
    alike = classes is None and all(map(_are_alike, targets(of_teacher), sources(of_student)))
    return _Pairs(made_of, names, targets, sources, tuple(updated), skipped, alike)


def _are_alike(target: Tensor, source: Tensor) -> bool:
    plain = type(target) in (Tensor, nn.Parameter) and type(source) in (Tensor, nn.Parameter)
    return plain and target.dtype == source.dtype and target.device == source.device


def _chosen(names: Sequence[str]) -> _Chosen:
    """Return a function that picks the tensors of these names out of a model's, in C, for it runs in every round."""
    if len(names) < 2:  # of which itemgetter makes no tuple
        return lambda tensors: tuple(tensors[name] for name in names)
    return itemgetter(*names)


def _in_teachers_classes(
    names: Mapping[str, str], targets: Sequence[Tensor], sources: Sequence[Tensor], classes: Optional[Classes]
) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
    """Return this rank's parts of the targets and of what they move towards, by the teacher's name."""
    parts: Tuple[Dict[str, Tensor], Dict[str, Tensor]] = {}, {}
    for (name, other), target, source in zip(names.items(), targets, sources):
        if classes is not None and classes.are_rows(name, target.shape, other, source.shape):
            source = classes.in_teachers(whole(target), whole(source))
        parts[0][name], parts[1][name] = local(target), part_for(source, target)
    return parts
