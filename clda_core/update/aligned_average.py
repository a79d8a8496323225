"""Exponential averaging of student layers into teacher layers, after expressing them in the teacher's basis."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from typing_extensions import Literal

from .._host.activations import LEAST_ROWS, capturing, channel_dim, positions, rows
from .._host.borrowing import borrowed
from .._host.buffers import version_of
from .._host.names import named_tensors
from .._host.plain import copied
from .._host.ranks import sum_across_ranks
from .._host.shards import local, part_for, whole
from ..errors import check_choice, check_number
from ..strategy import Strategy
from .alignment import ChannelMaps, CorrelationSums, expressed, match_channels
from .base import RoundContext, UpdateResult
from .classes import MAY_BE_CLASSES, Classes, is_logits
from .module_pairs import ModulePair, paired_modules
from .norms import running_statistics
from .writing import blend

__all__ = ["AlignedAverage"]

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
        self._maps: Dict[str, Union[ChannelMaps, str]] = {}
        self._models: Optional[Tuple[Any, Any]] = None
        self._paired: Optional[_Paired] = None

    def apply(self, context: RoundContext) -> UpdateResult:
        """Average the aligned student layers into the selected teacher layers, in place."""
        context.required_inputs()
        tensors, of_student = named_tensors(context.teacher), named_tensors(context.student)
        related = [context.related.get(layer.name) for layer in context.layers]
        made_of = (tensors.state, of_student.state, context.layers, related)
        if self._paired is None or self._paired.made_of != made_of:
            statistics = running_statistics(context.teacher) if self.buffers == "average" else None
            self._paired = _Paired(made_of, *paired_modules(context, statistics))
        maps = self._current_maps(context, self._paired.pairs)
        of_teacher, skipped = tensors.all, dict(self._paired.skipped)
        targets: Dict[str, Tensor] = {}
        sources: Dict[str, Tensor] = {}
        updated: Dict[str, None] = {}
        for pair in self._paired.pairs:
            found, module = maps[pair.name], pair.student()
            for short, name in pair.tensors.items():
                target, source = of_teacher[name], getattr(module, name.rpartition(".")[2], None)
                if not isinstance(source, Tensor):
                    skipped[f"{pair.layer}: {short}"] = f"the student's module {pair.other!r} has no such tensor"
                elif isinstance(found, str):
                    skipped[f"{pair.layer}: {short}"] = found
                else:
                    aligned = expressed(whole(target), whole(source), found, pair.depthwise)
                    if aligned is None:
                        skipped[f"{pair.layer}: {short}"] = "it has no channels, or none with a counterpart"
                    else:
                        targets[name], sources[name] = local(target), part_for(aligned, target)
                        updated[pair.layer] = None
        blend(targets, sources, (1 - self.decay) * context.strength)
        return UpdateResult(tuple(updated), skipped)

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
        self._maps = {
            name: found if isinstance(found, str) else ChannelMaps(*copied(found)) for name, found in maps.items()
        }
        self._models = None

    def __getstate__(self) -> Dict[str, Any]:
        """Leave the weak references to the models out of a pickle."""
        return {**self.__dict__, "_models": None, "_paired": None}

    def _current_maps(self, context: RoundContext, pairs: Sequence[ModulePair]) -> Dict[str, Union[ChannelMaps, str]]:
        """Return the maps of the pairs, matching channels where that was not done since the last realignment."""
        models = context.teacher, context.student
        if self._models is not None and any(known() is not model for known, model in zip(self._models, models)):
            self._rounds = 0
        self._models = weakref.ref(context.teacher), weakref.ref(context.student)
        if self._rounds % self.realign_every == 0:
            self._rounds, self._maps = 0, {}
        missing = [pair for pair in pairs if pair.key not in self._maps]
        for_now: Dict[str, Union[ChannelMaps, str]] = {}
        if missing:
            found = _channel_maps(context, missing, self.samples, self.minimum)
            for pair in missing:
                of_pair = found.get(pair.name, _NOT_CALLED)
                kept = for_now if isinstance(of_pair, str) and of_pair.endswith(_TOO_FEW) else self._maps
                kept[pair.key] = of_pair
        self._rounds += 1
        known = {**self._maps, **for_now}
        return {pair.name: known[pair.key] for pair in pairs}


class _Paired(NamedTuple):
    """What is averaged, so that it need not be found out anew in every round.

    Attributes:
        made_of: The states of both models, the selected layers and the related ones.
        pairs: Pairs of modules.
        skipped: What has no pair, and why.
    """

    made_of: Tuple[Any, ...]
    pairs: Sequence[ModulePair]
    skipped: Mapping[str, str]


def _channel_maps(
    context: RoundContext, pairs: Sequence[ModulePair], samples: int, minimum: float
) -> Dict[str, Union[ChannelMaps, str]]:
    """Run both models and match channels module by module, keeping one teacher activation at a time.

    Returns:
        By the teacher module's name its maps, or why there are none; a module that is not called is absent.
    """
    activations: Dict[int, Optional[Tensor]] = {}
    student: Dict[str, Tuple[int, int]] = {}
    matches: Dict[Tuple[int, int], Union[List[int], str]] = {}
    maps: Dict[str, Union[ChannelMaps, str]] = {}
    outputs: Dict[str, Tensor] = {}
    partners = {pair.name: pair.other for pair in pairs}
    classes = None if context.class_map is None else Classes(tuple(context.class_map))
    number_in_student, number_in_teacher = _numbering(), _numbering()

    def keep(name: str, module: nn.Module, inputs: Tuple[Any, ...], output: Any) -> None:
        into, out = (number_in_student(value, module) for value in (inputs, output))
        for number, value in ((into, inputs), (out, output)):
            if number not in activations:
                activations[number] = positions(value, module, samples)
        student[name] = into, out

    def matched(value: Any, module: nn.Module, partner: int) -> Union[List[int], str]:
        key = number_in_teacher(value, module), partner
        if key not in matches:
            matches[key] = _matched(positions(value, module, samples), activations[partner], minimum)
        return matches[key]

    def match(name: str, module: nn.Module, inputs: Tuple[Any, ...], output: Any) -> None:
        if partners[name] not in student:
            return
        into, out = student[partners[name]]
        found = matched(output, module, out), matched(inputs, module, into)
        reason = next((one for one in found if isinstance(one, str)), None)
        maps[name] = ChannelMaps(found[1], found[0]) if reason is None else reason  # type: ignore[arg-type]
        partner = activations[out]
        if partner is not None and (partners[name] in heads or classes is not None):
            own = positions(output, module, samples)
            unclear = own is not None and classes is not None and classes.concern(own.shape[1:2], partner.shape[1:2])
            if own is not None and (partners[name] in heads or unclear):
                outputs[name] = own

    with borrowed(context.teacher, context.student, doing="watch", hooked=True):
        with capturing({pair.other: pair.student() for pair in pairs}, keep):
            logits = positions(context.predict(context.student).logits, None, samples)
        outs = {name: activations[out] for name, (_, out) in student.items()}
        heads = {name for name, out in outs.items() if out is not None and is_logits(out, logits)}
        with capturing({pair.name: pair.teacher() for pair in pairs}, match):
            logits = positions(context.predict(context.teacher).logits, None, samples)
    for name, own in outputs.items():
        maps[name] = _by_class(maps[name], own, logits, classes, partners[name] in heads)
    return maps


def _numbering() -> Callable[[Any, nn.Module], int]:
    """Return a function that numbers the activations of one forward pass as :func:`positions` reads them.

    What one module puts out and others take in gets one number, so that its channels need not be matched again.
    """
    seen: Dict[Tuple[int, int], Tuple[Any, int, int]] = {}
    fresh = itertools.count()

    def number(value: Any, module: nn.Module) -> int:
        value = value[0] if isinstance(value, (tuple, list)) and value else value
        version = version_of(value) if isinstance(value, Tensor) else -1
        if version < 0:
            return next(fresh)
        place = id(value), channel_dim(value, module)
        known = seen.get(place)
        if known is None or known[0]() is not value or known[1] != version:
            known = seen[place] = weakref.ref(value), version, next(fresh)
        return known[2]

    return number


def _by_class(
    maps: Union[ChannelMaps, str],
    output: Tensor,
    logits: Optional[Tensor],
    classes: Optional[Classes],
    makes_students: bool,
) -> Union[ChannelMaps, str]:
    """Return maps whose output channels are matched by their classes where both modules' outputs are the logits.

    Args:
        maps: What was matched by activations.
        output: The teacher module's.
        logits: The teacher's, in the student's classes.
        classes: Where the student's classes are in the teacher, if their places differ.
        makes_students: Whether the student module's output is its logits.
    """
    if isinstance(maps, str) or logits is None:
        return maps
    chosen = list(range(logits.shape[1])) if classes is None else list(classes.class_map)
    width = output.shape[1]
    if not (makes_students and max(chosen) < width and is_logits(output[:, chosen], logits)):
        unclear = len(chosen) == width if classes is None else classes.concern((width,), (len(chosen),))
        return MAY_BE_CLASSES if unclear else maps
    places = {index: index for index in chosen} if classes is None else classes.places
    return ChannelMaps(maps.into.match, [places.get(channel, -1) for channel in range(width)])


def _matched(teacher: Optional[Tensor], student: Optional[Tensor], minimum: float) -> Union[List[int], str]:
    """Return the student channel of every teacher channel, or why they cannot be matched; equal on every rank."""
    both = None if teacher is None or student is None else rows(teacher, student)
    if both is None:
        return _UNLIKE
    sums = CorrelationSums(*sum_across_ranks(CorrelationSums.of(*both)))
    if not bool(sums.samples >= LEAST_ROWS):
        return f"{float(sums.samples):.0f} {_TOO_FEW}"
    correlation = sums.correlation()
    if not bool(torch.isfinite(correlation).all()):
        return _UNLIKE
    return match_channels(correlation, minimum=minimum)
