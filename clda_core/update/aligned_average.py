"""Exponential averaging of student layers into teacher layers, after expressing them in the teacher's basis."""

from __future__ import annotations

import weakref
from typing import AbstractSet, Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from typing_extensions import Literal

from .._host.activations import LEAST_ROWS, capturing, positions, rows, watching
from .._host.names import canonical_modules
from .._host.ranks import sum_across_ranks
from .._host.shards import local as part_here
from .._host.shards import part_for, whole
from ..errors import check_choice, check_number
from ..layers import Layer, local_names
from ..strategy import Strategy
from .alignment import Moments, match_channels
from .base import RoundContext, UpdateResult
from .classes import MAY_BE_CLASSES, Classes, is_logits
from .statistics import NO_STATISTIC, running_statistics
from .writing import blend, copied, tensors_of

__all__ = ["AlignedAverage"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NOT_CALLED = "its module is not called in the forward pass"
_TOO_FEW = f"rows (samples x positions) are too few to match channels, {LEAST_ROWS} are needed"
_UNLIKE = "its activations cannot be compared with the student's (not finite, or on grids of other rank)"


class AlignedAverage(Strategy):
    r"""Exponential averaging of related student layers, first expressed in the teacher's basis.

    :math:`\theta_T \leftarrow (1 - s(1 - d))\,\theta_T + s(1 - d)\,\theta'` with ``decay`` :math:`d` and the schedule's
    strength :math:`s`. For each pair of convolutions, linear or norm modules of a teacher layer and its related student
    layer (paired by local name), a round's target batch gives the correlation of every teacher channel with every
    student channel, once for what goes into the module and once for what comes out; from these
    :func:`~clda_core.update.alignment.match_channels` chooses the student channels :math:`\mathrm{in}(j)` and
    :math:`\mathrm{out}(i)`, and

    .. math:: W'_{ij} = \frac{W^S_{\mathrm{out}(i),\,\mathrm{in}(j)}}{m_{\mathrm{in}(j)}}, \qquad
              b'_i = b^S_{\mathrm{out}(i)}

    where :math:`m_c` is the number of teacher channels that take student channel :math:`c` (1 for equal widths). So a
    student that is a permuted or a narrower Net2Net copy of the teacher is mapped back to the teacher's own function.
    A channel without a counterpart (it does not vary, or correlates with none) keeps the teacher's weights. Where the
    outputs of both modules are the logits, classes stay as they are, or go where the KD loss's ``class_map`` says;
    rows of classes that the student does not have, or has several of, keep the teacher's weights.

    Fewer than 32 rows (samples x positions, summed over ranks) match nothing: the modules are skipped, and matched in
    the next round that has more.

    Args:
        decay: :math:`d` in [0, 1]; 1 changes nothing.
        buffers: ``"average"`` treats the running means and variances of norms like their other vectors, ``"keep"``
            leaves the teacher's. All other buffers (masks, observers, counters, queues, tables) are left alone.
        minimum: Channels must be correlated by more than this, in [0, 1), to correspond.
        samples: Most samples (images x positions) to correlate over, >= 32; bounds memory.
        realign_every: Rounds for which channels that were matched stay matched, >= 1. Matching takes far longer than
            the rest of a round, and a round moves the teacher by a hundredth of the way.

    Raises:
        CldaError: If an argument is out of range, or (in :meth:`apply`) the round has no inputs.

    Note:
        Each module is aligned by itself: modules that read and write one residual stream may get *different* maps, each
        best where it stands, and the query and key projections of an attention block may be permuted apart. Whole
        blocks then fit less well than their parts; put a :class:`~clda_core.update.Guard` around it.

        Skipped with a reason: kernels of different sizes, grouped convolutions other than depthwise, transposed
        convolutions, embeddings, attention projections that PyTorch applies without calling a module, parameters that
        hang on a composite module. A module called several times is aligned on its first call.

        Runs both models once in eval mode without gradients; hooks, modes and random state are given back. In
        distributed runs correlations are those over all ranks' samples, so that every rank writes the same.

    References:
        Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020. <https://arxiv.org/abs/1910.05653>
        Ainsworth et al., Git Re-Basin, ICLR 2023. <https://arxiv.org/abs/2209.04836>
        Chen et al., Net2Net, ICLR 2016, for the division by the multiplicity.
        <https://arxiv.org/abs/1511.05641>
    """

    needs_relation = True

    def __init__(
        self,
        *,
        decay: float = 0.99,
        buffers: Literal["keep", "average"] = "keep",
        minimum: float = 0.0,
        samples: int = 2048,
        realign_every: int = 20,
    ) -> None:
        check_number("decay", decay, at_least=0, at_most=1)
        check_choice("buffers", buffers, ("keep", "average"))
        check_number("minimum", minimum, at_least=0, below=1)
        check_number("samples", samples, at_least=LEAST_ROWS, integer=True)
        check_number("realign_every", realign_every, at_least=1, integer=True)
        self.decay = decay
        self.buffers = buffers
        self.minimum = minimum
        self.samples = samples
        self.realign_every = realign_every
        self._rounds = 0
        self._maps: Dict[str, Union[_Maps, str]] = {}
        self._models: Optional[Tuple[Any, Any]] = None

    def apply(self, context: RoundContext) -> UpdateResult:
        """Average the aligned student layers into the selected teacher layers, in place."""
        context.required_inputs()
        statistics = running_statistics(context.teacher) if self.buffers == "average" else None
        pairs, skipped = _paired_modules(context, statistics)
        maps = self._current_maps(context, pairs)
        of_teacher = tensors_of(context.teacher)
        targets: Dict[str, Tensor] = {}
        sources: Dict[str, Tensor] = {}
        updated: List[str] = []
        for pair in pairs:
            found = maps[pair.name]
            for local, name in pair.tensors.items():
                target = of_teacher[name]
                source = getattr(pair.theirs, name.rpartition(".")[2], None)
                reason = found if isinstance(found, str) else None
                if not isinstance(source, Tensor):
                    reason = f"the student's module {pair.other!r} has no such tensor"
                elif not isinstance(found, str):
                    aligned = _expressed(whole(target), whole(source), found, _is_depthwise(pair.ours))
                    reason = "it has no channels, or none with a counterpart" if aligned is None else None
                    if aligned is not None:
                        targets[name], sources[name] = part_here(target), part_for(aligned, target)
                        updated.append(pair.layer)
                if reason is not None:
                    skipped[f"{pair.layer}: {local}"] = reason
        blend(targets, sources, (1 - self.decay) * context.strength)
        return UpdateResult(tuple(dict.fromkeys(updated)), skipped)

    def rehearse(self, context: RoundContext) -> None:
        """Run both models on the inputs."""
        context.student_outputs()
        context.predict(context.teacher)

    def state_dict(self) -> Dict[str, Any]:
        """Return the matched channels, and in how many rounds they were used."""
        maps = {
            name: found if isinstance(found, str) else [found.into.match, found.out.match]
            for name, found in self._maps.items()
        }
        return {"rounds": self._rounds, "maps": maps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the next round's models are taken for those it is of."""
        self._rounds = int(state.get("rounds", 0))
        maps = state.get("maps", {})
        self._maps = {name: found if isinstance(found, str) else _Maps(*copied(found)) for name, found in maps.items()}
        self._models = None

    def __getstate__(self) -> Dict[str, Any]:
        """Leave the weak references to the models out of a pickle."""
        return {**self.__dict__, "_models": None}

    def _current_maps(self, context: RoundContext, pairs: List[_Pair]) -> Dict[str, Union[_Maps, str]]:
        """Return the maps of the pairs, matching channels where that was not done since the last realignment."""
        models = context.teacher, context.student
        if self._models is not None and any(known() is not model for known, model in zip(self._models, models)):
            self._rounds = 0
        self._models = weakref.ref(context.teacher), weakref.ref(context.student)
        if self._rounds % self.realign_every == 0:
            self._rounds, self._maps = 0, {}
        missing = [pair for pair in pairs if _key(pair) not in self._maps]
        for_now: Dict[str, Union[_Maps, str]] = {}
        if missing:
            found = _channel_maps(context, missing, self.samples, self.minimum)
            for pair in missing:
                of_pair = found.get(pair.name, _NOT_CALLED)
                kept = for_now if isinstance(of_pair, str) and of_pair.endswith(_TOO_FEW) else self._maps
                kept[_key(pair)] = of_pair
        self._rounds += 1
        known = {**self._maps, **for_now}
        return {pair.name: known[_key(pair)] for pair in pairs}


def _key(pair: _Pair) -> str:
    """Return what a map is kept under: both modules' names."""
    return f"{pair.name} <- {pair.other}"


class _Counterparts:
    """Which student channels play the parts of the teacher's.

    Attributes:
        match: The student channel of every teacher channel, -1 where there is none.
        ours: The teacher channels that have a counterpart.
        theirs: Their counterparts.
        multiplicity: How many teacher channels have each of these counterparts.
    """

    def __init__(self, match: Union[Sequence[int], Tensor]) -> None:
        self.match = torch.as_tensor(match, dtype=torch.int64, device="cpu")
        self.ours = torch.where(self.match >= 0)[0]
        self.theirs = self.match[self.ours]
        self.multiplicity = torch.bincount(self.theirs)[self.theirs]


class _Maps:
    """The counterparts of the channels that go into a module, and of those that come out."""

    def __init__(self, into: Union[Sequence[int], Tensor], out: Union[Sequence[int], Tensor]) -> None:
        self.into, self.out = _Counterparts(into), _Counterparts(out)


class _Pair(NamedTuple):
    layer: str
    name: str
    other: str
    ours: nn.Module
    theirs: nn.Module
    tensors: Mapping[str, str]
    """Canonical by local name."""


def _paired_modules(
    context: RoundContext, statistics: Optional[AbstractSet[str]]
) -> Tuple[List[_Pair], Dict[str, str]]:
    """Pair the leaf modules of selected and related layers by local name; say what cannot be aligned.

    Args:
        context: The round.
        statistics: Names of the only buffers to be averaged, ``None`` if none is to be.
    """
    ours, theirs = canonical_modules(context.teacher), canonical_modules(context.student)
    pairs: List[_Pair] = []
    skipped: Dict[str, str] = {}
    for layer in context.layers:
        if layer.name not in context.related:
            skipped[layer.name] = "no related student layer"
            continue
        related = context.related[layer.name]
        candidates = _owners(related, related.parameters + related.buffers)
        names = layer.parameters
        if statistics is not None:
            names += tuple(name for name in layer.buffers if name in statistics)
            others = local_names(layer, [name for name in layer.buffers if name not in statistics])
            skipped.update({f"{layer.name}: {local}": NO_STATISTIC for local in others})
        for owner, (name, tensors) in _owners(layer, names).items():
            if owner not in candidates:
                reason: Optional[str] = f"student layer {related.name!r} has no module with this local name"
            else:
                other = candidates[owner][0]
                reason = _why_not(ours.get(name), theirs.get(other))
            if reason is None:
                pairs.append(_Pair(layer.name, name, other, ours[name], theirs[other], tensors))
            else:
                skipped.update({f"{layer.name}: {local}": reason for local in tensors})
    return pairs, skipped


def _owners(layer: Layer, names: Sequence[str]) -> Dict[str, Tuple[str, Dict[str, str]]]:
    """Return by local module name the module's canonical name and its tensors' canonical by local names."""
    owners: Dict[str, Tuple[str, Dict[str, str]]] = {}
    for local, name in local_names(layer, names).items():
        owner = owners.setdefault(local.rpartition(".")[0], (name.rpartition(".")[0], {}))
        owner[1][local] = name
    return owners


def _why_not(ours: Optional[nn.Module], theirs: Optional[nn.Module]) -> Optional[str]:
    """Return why two modules cannot be aligned, or ``None`` if they can."""
    if ours is None or theirs is None or _has_children(ours) or _has_children(theirs):
        return "it does not belong to a leaf module"
    kinds = _kind(ours), _kind(theirs)
    if kinds[0] is None:
        return f"{type(ours).__name__} cannot be aligned"
    if kinds[0] != kinds[1]:
        return f"a {type(ours).__name__} does not pair with a {type(theirs).__name__}"
    if isinstance(ours, _CONVOLUTIONS) and isinstance(theirs, _CONVOLUTIONS):
        if ours.kernel_size != theirs.kernel_size:
            return f"kernel sizes differ: {ours.kernel_size} in the teacher, {theirs.kernel_size} in the student"
        plain = ours.groups == theirs.groups == 1
        if not plain and not (_is_depthwise(ours) and _is_depthwise(theirs)):
            return f"groups={ours.groups} and groups={theirs.groups}: only ungrouped or depthwise pairs can be aligned"
    return None


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _kind(module: nn.Module) -> Optional[type]:
    """Return what a module must share with its partner, ``None`` if modules of its kind cannot be aligned."""
    for kind in (*_CONVOLUTIONS, nn.Linear, nn.modules.batchnorm._BatchNorm):
        if isinstance(module, kind):
            return kind
    return type(module) if all(parameter.dim() == 1 for parameter in module.parameters()) else None


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


def _channel_maps(
    context: RoundContext, pairs: List[_Pair], samples: int, minimum: float
) -> Dict[str, Union[_Maps, str]]:
    """Run both models and match channels module by module, keeping one teacher activation at a time.

    Returns:
        By the teacher module's name its maps, or why there are none; a module that is not called is absent.
    """
    student: Dict[str, Tuple[Optional[Tensor], Optional[Tensor]]] = {}
    maps: Dict[str, Union[_Maps, str]] = {}
    outputs: Dict[str, Tensor] = {}
    partners = {pair.name: pair.other for pair in pairs}
    classes = None if context.class_map is None else Classes(tuple(context.class_map))

    def may_be_classes(ours: Tensor, theirs: Tensor) -> bool:
        return classes is not None and classes.concern(ours.shape[1:2], theirs.shape[1:2])

    def keep(name: str, module: nn.Module, inputs: Tuple[Any, ...], output: Any) -> None:
        student[name] = (positions(inputs, module, samples), positions(output, module, samples))

    def match(name: str, module: nn.Module, inputs: Tuple[Any, ...], output: Any) -> None:
        if partners[name] not in student:
            return
        into, out = student[partners[name]]
        ours = positions(output, module, samples)
        found = [_matched(ours, out, minimum), _matched(positions(inputs, module, samples), into, minimum)]
        reason = next((one for one in found if isinstance(one, str)), None)
        maps[name] = _Maps(found[1], found[0]) if reason is None else reason  # type: ignore[arg-type]
        if ours is not None and out is not None and (partners[name] in heads or may_be_classes(ours, out)):
            outputs[name] = ours

    with watching(context.teacher, context.student):
        with capturing({pair.other: pair.theirs for pair in pairs}, keep):
            logits = positions(context.predict(context.student).logits, None, samples)
        heads = {name for name, (_, out) in student.items() if out is not None and is_logits(out, logits)}
        with capturing({pair.name: pair.ours for pair in pairs}, match):
            logits = positions(context.predict(context.teacher).logits, None, samples)
    for name, ours in outputs.items():
        maps[name] = _by_class(maps[name], ours, logits, classes, partners[name] in heads)
    return maps


def _by_class(
    maps: Union[_Maps, str], ours: Tensor, logits: Optional[Tensor], classes: Optional[Classes], theirs_are: bool
) -> Union[_Maps, str]:
    """Return maps whose output channels are matched by their classes where both modules' outputs are the logits.

    Args:
        maps: What was matched by activations.
        ours: The teacher's output.
        logits: The teacher's, in the student's classes.
        classes: Where the student's classes are in the teacher, if their places differ.
        theirs_are: Whether the student's output is its logits.
    """
    if isinstance(maps, str) or logits is None:
        return maps
    chosen = list(range(logits.shape[1])) if classes is None else list(classes.class_map)
    both = theirs_are and max(chosen) < ours.shape[1] and is_logits(ours[:, chosen], logits)
    if not both:
        unclear = len(chosen) == ours.shape[1] if classes is None else classes.concern(ours.shape[1:2], (len(chosen),))
        return MAY_BE_CLASSES if unclear else maps
    places = {index: index for index in chosen} if classes is None else classes.places
    return _Maps(maps.into.match, [places.get(channel, -1) for channel in range(ours.shape[1])])


def _matched(ours: Optional[Tensor], theirs: Optional[Tensor], minimum: float) -> Union[List[int], str]:
    """Return the student channel of every teacher channel, or why they cannot be matched; equal on every rank."""
    both = None if ours is None or theirs is None else rows(ours, theirs)
    if both is None:
        return _UNLIKE
    moments = Moments(*sum_across_ranks(Moments.of(*both)))
    if not bool(moments.samples >= LEAST_ROWS):
        return f"{float(moments.samples):.0f} {_TOO_FEW}"
    correlation = moments.correlation()
    if not bool(torch.isfinite(correlation).all()):
        return _UNLIKE
    return match_channels(correlation, minimum=minimum)


def _expressed(target: Tensor, source: Tensor, maps: _Maps, depthwise: bool) -> Optional[Tensor]:
    """Return the student's tensor in the teacher's basis, the teacher's values where channels have no counterpart.

    Returns:
        ``None`` if no element has a counterpart, or the maps do not fit the tensors.
    """
    if target.dim() == 0:
        return None
    per_channel = target.dim() == 1 or depthwise
    fits = len(target) == len(maps.out.match) and (per_channel or target.shape[1] == len(maps.into.match))
    if not fits or not len(maps.out.ours) or not (per_channel or len(maps.into.ours)):
        return None
    device = target.device
    result = target.clone()
    ours = maps.out.ours.to(device)
    chosen = source.to(target)[maps.out.theirs.to(device)]
    if per_channel:
        result[ours] = chosen
        return result
    counts = maps.into.multiplicity.to(target).view(1, -1, *[1] * (target.dim() - 2))
    result[ours[:, None], maps.into.ours.to(device)] = chosen[:, maps.into.theirs.to(device)] / counts
    return result
