"""Which student layer a teacher layer is related to."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from typing_extensions import Protocol

from ._host.activations import LEAST_ROWS, capturing, positions, rows, wide
from ._host.borrowing import borrowed
from ._host.names import canonical_modules
from ._host.ranks import sum_across_ranks
from .errors import check_number, problem
from .layers import Layer, ModelView
from .outputs import call_model
from .strategy import Strategy

__all__ = [
    "ByName",
    "ByRelativeDepth",
    "BySimilarity",
    "Explicit",
    "RelatedLayers",
    "Relation",
    "linear_cka",
]


_CHANCE = 0.25
"""The linear CKA that unrelated features may have at most for a comparison to count."""


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
    """Relates teacher layers to student layers; it only reads the models.

    Attributes:
        needs_inputs: Whether a batch of inputs is needed; if so the learner relates at the first round.
    """

    needs_inputs: bool

    def __call__(self, teacher: ModelView, student: ModelView, inputs: Any = None) -> RelatedLayers:
        """Relate every teacher layer to a student layer, or say by name why it is unrelated."""
        ...


class ByName(Strategy):
    """Relates layers of the same canonical name.

    The right relation where both models come from one family and share their shape, and where deeper teachers only
    append blocks. The teacher's surplus blocks are unrelated; :class:`ByRelativeDepth` relates those too.

    Example:
        >>> from clda_core.layers import group_layers
        >>> big, small = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 2)), nn.Sequential(nn.Linear(2, 2))
        >>> related = ByName()(ModelView(big, group_layers(big)), ModelView(small, group_layers(small)))
        >>> sorted(related.pairs), sorted(related.unrelated)
        (['0'], ['1'])
    """

    needs_inputs: bool = False

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
        >>> from clda_core.layers import group_layers
        >>> def net(depth):
        ...     return nn.ModuleDict({"blocks": nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))})
        >>> big, small = net(4), net(2)
        >>> related = ByRelativeDepth()(ModelView(big, group_layers(big)), ModelView(small, group_layers(small)))
        >>> [layer.name for layer in related.pairs.values()]
        ['blocks.0', 'blocks.0', 'blocks.1', 'blocks.1']
    """

    needs_inputs: bool = False

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

    needs_inputs: bool = False

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
        samples: Most rows to compare, >= 32; bounds memory to ``samples`` x channels floats a layer.

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

    needs_inputs: bool = True

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
            ours, reasons = _features(teacher, inputs, self.samples)
            theirs, _ = _features(student, inputs, self.samples)
            table = _similarities(ours, theirs)
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
                    f"have a linear CKA of {closest.chance:.2f}; at least {LEAST_ROWS} and at most {_CHANCE} are needed"
                )
            elif values[best].cka < self.minimum:
                reasons[name] = (
                    f"its most similar student layer, {list(theirs)[best]}, "
                    f"has a linear CKA of {values[best].cka:.2f}, below minimum={self.minimum:g}"
                )
            else:
                chosen[name] = list(theirs)[best]
        return _related(teacher, student, chosen, reasons)


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    r"""Compute the linear centred kernel alignment of two sets of features of the same samples.

    .. math:: \mathrm{CKA}(X, Y) = \frac{\lVert Y^\top X \rVert_F^2}
              {\lVert X^\top X \rVert_F \, \lVert Y^\top Y \rVert_F}

    with the columns of :math:`X, Y` centred: the feature-space form. It does not change when features are rotated,
    permuted, scaled by one number, or shifted.

    Args:
        x: Shape ``(n, p)``, float; one row a sample.
        y: Shape ``(n, q)``, float; rows of the same samples.

    Returns:
        Scalar in [0, 1], dtype of ``x``, computed in float64; 0 if either does not vary.

    Raises:
        CldaError: If the shapes are not ``(n, p)`` and ``(n, q)`` with n >= 2, or a dtype is not floating-point.

    Note:
        Biased upwards when n is not much larger than p and q: for unrelated features towards 1.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
        >>> round(linear_cka(x, 3 * x.flip(1) + 1).item(), 6)
        1.0

    References:
        Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, Table 1 ("Linear CKA").
        <https://arxiv.org/abs/1905.00414>
    """
    fine = x.dim() == y.dim() == 2 and x.shape[0] == y.shape[0] >= 2
    if not fine or not x.is_floating_point() or not y.is_floating_point():
        raise problem(
            "linear CKA cannot compare these features",
            expected="two floating-point tensors (n, p) and (n, q) with n >= 2",
            received=f"{x.dtype} of shape {tuple(x.shape)} and {y.dtype} of shape {tuple(y.shape)}",
            fix="flatten to one row a sample and pass the same samples in the same order",
        )
    return _cka_and_chance(x, y)[0].to(x.dtype)


def _cka_and_chance(x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor]:
    """Return the linear CKA and its mean over all pairings of the rows of ``x`` with those of ``y``, in float64.

    That mean, exact and cheap, is what chance alone gives: with the columns centred, the mean of ``||Y'X||^2`` over
    permutations is ``tr(X'X) tr(Y'Y) / (n - 1)``, and the denominator does not depend on them.
    """
    a, b = _centred(x), _centred(y)
    first, second = a.t() @ a, b.t() @ b
    within = first.norm() * second.norm()
    zero = torch.zeros_like(within)
    scale = torch.where(within == 0, zero + 1, within)
    across = (b.t() @ a).pow(2).sum() / scale
    chance = first.trace() * second.trace() / (max(len(x) - 1, 1) * scale)
    return torch.where(within == 0, zero, across), torch.where(within == 0, zero, chance)


def _centred(x: Tensor) -> Tensor:
    """Centre columns and scale the whole to a largest magnitude of 1, so that fourth powers stay in range."""
    centred = wide(x) - wide(x).mean(0, keepdim=True)
    scale = centred.abs().max() if centred.numel() else centred.new_zeros(())
    floor = 1e-12 * wide(x).abs().max() if x.numel() else scale
    varies = (scale > floor) | (scale != scale)
    return torch.where(varies, centred / torch.where(varies, scale, torch.ones_like(scale)), torch.zeros_like(centred))


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


def _features(view: ModelView, inputs: Any, samples: int) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    """Run a model once and return its layers' output features by layer name, and why some layers have none."""
    modules = canonical_modules(view.model)
    watched = {layer.name: modules[layer.name] for layer in view.layers if layer.name in modules}
    features: Dict[str, Optional[Tensor]] = {}

    def read(name: str, module: nn.Module, _: Tuple[Any, ...], output: Any) -> None:
        features[name] = positions(output, module, samples)

    with capturing(watched, read):
        call_model(view.model, inputs if view.inputs is None else view.inputs)
    reasons: Dict[str, str] = {}
    usable: Dict[str, Tensor] = {}
    for layer in view.layers:
        value = features.get(layer.name)
        if layer.name not in watched:
            reasons[layer.name] = "it is a group of parameters, not a module with an output to compare"
        elif layer.name not in features:
            reasons[layer.name] = "its module is not called in the forward pass"
        elif value is None:
            reasons[layer.name] = "its module's output is not a floating-point tensor (N, ...)"
        else:
            usable[layer.name] = value
    return usable, reasons


class _Similarity(NamedTuple):
    """What two layers' features say, averaged over ranks.

    Attributes:
        cka: Linear CKA over the ranks that have enough rows, -1 where none has.
        chance: What unrelated features would have.
        rows: Number of rows, 0 where the features cannot be compared.
    """

    cka: float
    chance: float
    rows: float


def _similarities(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> List[List[_Similarity]]:
    """Return the similarities by teacher layer and student layer; equal on every rank."""
    if not ours or not theirs:
        return [[] for _ in ours]
    figures = [_figures(first, second) for first in ours.values() for second in theirs.values()]
    device = figures[0].device
    (summed,) = sum_across_ranks([torch.stack([figure.to(device) for figure in figures])])
    found = [
        _Similarity(cka / enough if enough else -1.0, chance / (comparable or 1.0), count / (comparable or 1.0))
        for comparable, enough, cka, chance, count in summed.tolist()
    ]
    return [found[start : start + len(theirs)] for start in range(0, len(found), len(theirs))]


def _figures(first: Tensor, second: Tensor) -> Tensor:
    """Return what ranks add up: whether comparable, whether by enough rows; and CKA, chance and rows if they are."""
    both = rows(first, second)
    nothing = wide(first.new_zeros(()))
    if both is None:
        return torch.stack([nothing] * 5)
    cka, chance = _cka_and_chance(*both)
    count = nothing + len(both[0])
    comparable = torch.isfinite(cka)
    enough = comparable & (chance <= _CHANCE) & (count >= LEAST_ROWS)
    if_enough = torch.where(enough, cka, nothing)
    if_comparable = [torch.where(comparable, one, nothing) for one in (chance, count)]
    return torch.stack([comparable.to(cka), enough.to(cka), if_enough, *if_comparable])


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
