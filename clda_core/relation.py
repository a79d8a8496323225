"""Which student layer a teacher layer is related to."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from typing_extensions import Protocol, runtime_checkable

from ._host.activations import LEAST_ROWS
from ._host.borrowing import borrowed
from .errors import check_number, problem
from .layers import Layer, ModelView
from .similarity import CHANCE, layer_features, linear_cka, similarities
from .strategy import Strategy

__all__ = [
    "ByName",
    "ByRelativeDepth",
    "BySimilarity",
    "Explicit",
    "NeedsInputs",
    "RelatedLayers",
    "Relation",
    "linear_cka",
]


@dataclass(frozen=True)
class RelatedLayers:
    """The result of relating two models.

    Attributes:
        pairs: Student layer by teacher layer name.
        unrelated: By teacher layer name, why it has no student layer.
    """

    pairs: Mapping[str, Layer]
    unrelated: Mapping[str, str] = field(default_factory=dict)


class Relation(Protocol):
    """Relates teacher layers to student layers; it only reads the models. A plain function will do."""

    def __call__(self, teacher: ModelView, student: ModelView, inputs: Any, /) -> RelatedLayers:
        """Relate every teacher layer to a student layer, or say by name why it is unrelated.

        ``inputs`` is the target batch as it was given to ``distill``, for a relation that needs it
        (:class:`NeedsInputs`), and ``None`` otherwise.
        """
        ...


@runtime_checkable
class NeedsInputs(Protocol):
    """What a relation has that needs a batch: it relates at the first round, others when the learner is built."""

    @property
    def needs_inputs(self) -> bool:
        """Whether a batch is needed."""
        ...


def needs_inputs(relation: Relation) -> bool:
    """Return whether a relation needs a batch."""
    return isinstance(relation, NeedsInputs) and relation.needs_inputs


class ByName(Strategy):
    """Relates layers of the same canonical name.

    The right relation where both models come from one family and share their shape, and where deeper teachers only
    append blocks. The teacher's surplus blocks are unrelated; :class:`ByRelativeDepth` relates those too.

    Example:
        >>> from torch import nn
        >>> from clda_core.layers import group_layers
        >>> big, small = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 2)), nn.Sequential(nn.Linear(2, 2))
        >>> related = ByName()(ModelView(big, group_layers(big)), ModelView(small, group_layers(small)))
        >>> sorted(related.pairs), sorted(related.unrelated)
        (['0'], ['1'])
    """

    def __call__(self, teacher: ModelView, student: ModelView, inputs: Any = None) -> RelatedLayers:
        """Relate by name; ``inputs`` is not read."""
        return _related(teacher, student, {layer.name: layer.name for layer in teacher.layers}, {})


class ByRelativeDepth(Strategy):
    r"""Relates layers at the same relative depth of the same stage.

    Of a stage with :math:`n_t` layers in the teacher and :math:`n_s` in the student, teacher layer :math:`i` (from 0)
    relates to student layer :math:`\lfloor i (n_s - 1) / (n_t - 1) + 1/2 \rfloor`, so that first meets first and last
    meets last; a teacher's only layer meets the first, which like it changes width and resolution. Stages are the
    containers that :attr:`Layer.stage <clda_core.layers.Layer.stage>` names. They pair by name; those left over pair
    in their order if both models have equally many. Every other layer relates by name.

    Deeper teachers therefore relate several layers to one student layer.

    Example:
        >>> from torch import nn
        >>> from clda_core.layers import group_layers
        >>> def net(depth):
        ...     return nn.ModuleDict({"blocks": nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))})
        >>> big, small = net(4), net(2)
        >>> related = ByRelativeDepth()(ModelView(big, group_layers(big)), ModelView(small, group_layers(small)))
        >>> [layer.name for layer in related.pairs.values()]
        ['blocks.0', 'blocks.0', 'blocks.1', 'blocks.1']
    """

    def __call__(self, teacher: ModelView, student: ModelView, inputs: Any = None) -> RelatedLayers:
        """Relate by stage and depth, else by name; ``inputs`` is not read."""
        chosen = {layer.name: layer.name for layer in teacher.layers}
        ours, theirs = _stages(teacher.layers), _stages(student.layers)
        for stage, other in _paired_stages(list(ours), list(theirs)):
            names, candidates = ours[stage], theirs[other]
            for index, name in enumerate(names):
                chosen[name] = candidates[_relative_index(index, len(names), len(candidates))]
        return _related(teacher, student, chosen, {})


class Explicit(Strategy):
    """Relates layers as the user says.

    Args:
        mapping: Student layer name by teacher layer name. Teacher layers left out are unrelated.

    Raises:
        CldaError: If ``mapping`` is no mapping of names, is empty, or (when called) names a layer that does not exist.

    Example:
        >>> Explicit({"layer3.0": "layer2.0"})
        Explicit(mapping={'layer3.0': 'layer2.0'})
    """

    def __init__(self, mapping: Mapping[str, str]) -> None:
        valid = isinstance(mapping, Mapping) and all(isinstance(name, str) for pair in mapping.items() for name in pair)
        if not valid or not mapping:
            raise problem(
                "the explicit relation is not a mapping of layer names",
                expected="a non-empty mapping from teacher layer name to student layer name",
                received=repr(mapping),
                fix="pass for example Explicit({'layer3.0': 'layer2.0'})",
            )
        self.mapping = mapping

    def __call__(self, teacher: ModelView, student: ModelView, inputs: Any = None) -> RelatedLayers:
        """Relate by the mapping; ``inputs`` is not read."""
        _check_known("teacher", self.mapping, teacher.layers)
        _check_known("student", self.mapping.values(), student.layers)
        reasons = {layer.name: "the explicit mapping leaves it out" for layer in teacher.layers}
        return _related(teacher, student, self.mapping, reasons)


class BySimilarity(Strategy):
    """Relates each teacher layer to the student layer whose output features are most similar on real inputs.

    Similarity is :func:`linear_cka` of the outputs of the layers' modules. Feature maps are averaged to the smaller
    of the two grids, so that rows are images x positions; token sequences count as square grids where their length
    allows. Vectors, sequences and maps are not compared with one another: their numbers of rows, and with them the bias
    of the measure, differ too much. Of equally similar student layers the first is taken. Several teacher layers may
    relate to one student layer, and depth need not be kept in order.

    Args:
        minimum: Least similarity, in [0, 1], of layers to be related; the rest is unrelated. Our choice, 0.5.
        samples: Most rows to compare, >= 32; bounds memory to ``samples`` x channels floats per layer.

    Raises:
        CldaError: If an argument is out of range, or (when called) no inputs are given.

    Note:
        Runs both models once each, in eval mode without gradients; hooks, modes and random state are given back.
        Layers which are no module (groups of a user's own, single parameters), which the forward pass does not call,
        or whose output is no tensor, are unrelated. So are layers whose features have too few rows for their channels:
        fewer than 32, or so few that unrelated features would have a linear CKA above 0.25 by chance (its mean over all
        pairings of the rows). In distributed runs similarities are averaged over the ranks that have enough rows.

    References:
        Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019.
        <https://arxiv.org/abs/1905.00414>
    """

    needs_inputs = True

    def __init__(self, *, minimum: float = 0.5, samples: int = 2048) -> None:
        check_number("minimum", minimum, at_least=0, at_most=1)
        check_number("samples", samples, at_least=LEAST_ROWS, integer=True)
        self.minimum = minimum
        self.samples = samples

    def __call__(self, teacher: ModelView, student: ModelView, inputs: Any = None) -> RelatedLayers:
        """Relate by similarity on ``inputs``: positional arguments (tuple), keywords (mapping), or one argument."""
        if inputs is None:
            raise problem(
                "layers cannot be related by similarity without inputs",
                expected="a batch of model inputs",
                received="None",
                fix="pass inputs= to distill(), or choose ByRelativeDepth()",
            )
        with borrowed(teacher.model, student.model, doing="watch", hooked=True):
            ours, reasons = layer_features(teacher, inputs, self.samples)
            theirs, _ = layer_features(student, inputs, self.samples)
            table = similarities(ours, theirs)
        chosen: Dict[str, str] = {}
        for name, values in zip(ours, table):
            best = max(range(len(values)), key=lambda index: values[index].cka, default=None)
            compared = [value for value in values if value.rows]
            if best is None or not compared:
                reasons[name] = "no student layer has finite features on a grid comparable with its own"
            elif values[best].cka < 0:
                closest = min(compared, key=lambda value: value.chance)
                reasons[name] = (
                    f"it was compared over {closest.rows:.0f} rows (samples x positions), where unrelated features "
                    f"have a linear CKA of {closest.chance:.2f}; at least {LEAST_ROWS} and at most {CHANCE} are needed"
                )
            elif values[best].cka < self.minimum:
                reasons[name] = (
                    f"its most similar student layer, {list(theirs)[best]}, "
                    f"has a linear CKA of {values[best].cka:.2f}, below minimum={self.minimum:g}"
                )
            else:
                chosen[name] = list(theirs)[best]
        return _related(teacher, student, chosen, reasons)


def _related(
    teacher: ModelView, student: ModelView, chosen: Mapping[str, str], reasons: Mapping[str, str]
) -> RelatedLayers:
    """Look the chosen names up; whatever is not chosen or not there is unrelated, with its reason."""
    candidates = {layer.name: layer for layer in student.layers}
    pairs: Dict[str, Layer] = {}
    unrelated: Dict[str, str] = {}
    for layer in teacher.layers:
        wanted = chosen.get(layer.name)
        if wanted is not None and wanted in candidates:
            pairs[layer.name] = candidates[wanted]
        else:
            unrelated[layer.name] = reasons.get(layer.name, f"the student has no layer named {layer.name!r}")
    return RelatedLayers(pairs, unrelated)


def _stages(layers: Sequence[Layer]) -> Dict[str, List[str]]:
    stages: Dict[str, List[str]] = {}
    for layer in layers:
        if layer.stage is not None:
            stages.setdefault(layer.stage, []).append(layer.name)
    return stages


def _paired_stages(ours: List[str], theirs: List[str]) -> List[Tuple[str, str]]:
    same = [(stage, stage) for stage in ours if stage in theirs]
    left = [stage for stage in ours if stage not in theirs]
    right = [stage for stage in theirs if stage not in ours]
    return same + (list(zip(left, right)) if len(left) == len(right) else [])


def _relative_index(index: int, count: int, others: int) -> int:
    """Scale an index from ``count`` layers to ``others``, rounding halves up, in integers and so exactly."""
    if count == 1:
        return 0
    return (2 * index * (others - 1) + count - 1) // (2 * (count - 1))


def _check_known(whose: str, names: Any, layers: Sequence[Layer]) -> None:
    known = [layer.name for layer in layers]
    unknown = [name for name in names if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.4)
        raise problem(
            f"the explicit relation names {whose} layers that do not exist",
            expected=f"names among {known}",
            received=repr(unknown),
            fix=f"perhaps {close} is meant" if close else f"use one of the {whose}'s layer names",
        )


def check_related(related: Any, teacher: ModelView, student: ModelView, needed: bool) -> None:
    """Raise unless a relation returned layers of both models; at least one pair of them if ``needed``."""
    ours = {layer.name for layer in teacher.layers}
    theirs: Dict[str, Layer] = {layer.name: layer for layer in student.layers}
    if (
        not isinstance(related, RelatedLayers)
        or not set(related.pairs) <= ours
        or not all(isinstance(layer, Layer) and theirs.get(layer.name) == layer for layer in related.pairs.values())
    ):
        raise problem(
            "the relation returned something else than related layers",
            expected="clda_core.relation.RelatedLayers of the teacher's layer names and the student's layers",
            received=repr(related),
            fix="return RelatedLayers({teacher layer name: student layer}, unrelated) from relation=",
        )
    if needed and not related.pairs:
        raise problem(
            "no teacher layer can be related to a student layer",
            expected="at least one related pair of layers",
            received=f"unrelated: {dict(related.unrelated)}",
            fix="pass another relation=, for example Explicit({...}), or an update that needs none",
        )
