"""What is compared: each variant is one way to train the student, from the same teacher, start and batches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence

from torch import Tensor, nn

from benchmarks.evidence.task import Task
from clda_core import CldaError, CollaborativeLearner, Never, Schedule, teach
from clda_core.distillation import ChannelWiseDistillation, DecoupledDistillation, Distillation, KLDistillation
from clda_core.lead import FixedTrust, LinearTrust, Trust
from clda_core.saliency import Fisher, Hessian, Magnitude
from clda_core.selection import (
    AllLayers,
    DomainShift,
    DrawnFraction,
    HighestFraction,
    LowestFraction,
    RandomFraction,
    Selection,
)
from clda_core.update import AlignedAverage, Average, Guard, KeepBest, MaskedDistillation, Update
from clda_core.validation import ConsistencyIoU

Strategies = Callable[[Task, int], Dict[str, Any]]
AfterTurn = Callable[[nn.Module, nn.Module, Sequence[Tensor], int], nn.Module]


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        title: In tables.
        group: Of the comparison that it belongs to.
        strategies: From task and seed to arguments of :class:`~clda_core.CollaborativeLearner`, made anew for each run;
            ``None`` trains without a learner.
        start: ``"own"`` weights of the student, or ``"teacher"``: initialised from the teacher's related layers.
        kind: What is trained: a ``"student"``, the ``"teacher"`` for as many steps more, a student of that
            (``"after-teacher"``), or ``"duda"``: DUDA-like.
        cotrained: Whether the host's UDA loss goes on updating the teacher between rounds.
        dense: Whether it needs logits with positions.
        length: Optimizer steps, in units of the task's.
        turns: Students trained one after another, each from the same start and on the same batches.
        view: Whether the host hands its second view to the learner.
        oracle: Whether the lead is known from the labels of the evaluation, and not from a validator.
        after_turn: Called after each turn with teacher, trained student, batches and seed; returns the next's teacher.
    """

    title: str
    group: str
    strategies: Optional[Strategies] = None
    start: str = "own"
    kind: str = "student"
    cotrained: bool = False
    dense: bool = False
    length: int = 1
    turns: int = 1
    view: bool = True
    oracle: bool = False
    after_turn: Optional[AfterTurn] = None

    def learner(self, task: Task, teacher: nn.Module, student: nn.Module, seed: int) -> Optional[CollaborativeLearner]:
        """Return the learner of a run, or ``None``."""
        if self.strategies is None:
            return None
        known = {"trust": by_labels(task, teacher, student)} if self.oracle else {}
        return CollaborativeLearner(teacher, student, **{**self.strategies(task, seed), **known})


def by_labels(task: Task, teacher: nn.Module, student: nn.Module, *, every: int = 8) -> Trust:
    """Return trust by the labels of the evaluation: it rises from 0 for a student 1 point behind to 1 for one ahead.

    Both are evaluated at one round in so many.
    """
    rounds = itertools.count()
    known = [0.0]

    def trust(lead: float) -> float:
        if next(rounds) % every == 0:
            ahead = task.evaluate(student)[task.metric] - task.evaluate(teacher)[task.metric]
            known[0] = min(1.0, max(0.0, 0.5 + ahead / 2))
        return known[0]

    return trust


def frozen(task: Task, seed: int) -> Dict[str, Any]:
    """Return KD from a teacher without rounds, by the loss that KD usually has."""
    return {"schedule": Never(), "distillation": KLDistillation()}


def frozen_alike(task: Task, seed: int) -> Dict[str, Any]:
    """Return KD from a teacher without rounds, by the loss of CLDA."""
    return {"schedule": Never()}


def defaults(task: Task, seed: int) -> Dict[str, Any]:
    """Return nothing: the library's defaults."""
    return {}


def warmed(task: Task, seed: int) -> Dict[str, Any]:
    """Return what the defaults were before rounds went by the lead; the records of seeds 0 to 9 are of these."""
    return {
        "schedule": Schedule(warmup=300),
        "selection": LowestFraction(),
        "trust": FixedTrust(1.0),
        "update": Guard(MaskedDistillation(learning_rate=1e-4)),
    }


def former(task: Task, seed: int) -> Dict[str, Any]:
    """Return what the defaults were at first."""
    return {
        **warmed(task, seed),
        "schedule": Schedule(warmup=task.steps // 2),
        "distillation": KLDistillation(),
        "update": longer_steps(task, seed),
    }


def with_(base: Strategies = defaults, **makers: Callable[[Task, int], Any]) -> Strategies:
    """Return the defaults, or others, with some strategies replaced."""
    return lambda task, seed: {**base(task, seed), **{role: make(task, seed) for role, make in makers.items()}}


def lead_ignored(task: Task, seed: int) -> Dict[str, Any]:
    """Return rounds that learn from the student alone, whoever leads."""
    return {"trust": FixedTrust(1.0)}


def level_trusted(task: Task, seed: int) -> Dict[str, Any]:
    """Return rounds that trust a student in full once it is level, and in part before."""
    return {"validator": ConsistencyIoU(), "trust": LinearTrust(zero=-0.05, full=0.0)}


def own_targets(task: Task, seed: int) -> Update:
    return MaskedDistillation(learns_on="view", own_targets=True)


def without_student(task: Task, seed: int) -> Dict[str, Any]:
    """Return as many rounds with the teacher's own predictions as targets, on the view."""
    return {"trust": FixedTrust(0.0), "update": own_targets(task, seed)}


def anchored(task: Task, seed: int) -> Update:
    """Return the stronger setting for images: own targets on the view, with the source's loss as an anchor."""
    return MaskedDistillation(learns_on="view", own_targets=True, source_weight=1.0)


def anchored_image(task: Task, seed: int) -> Update:
    """Return the same with the student's predictions learnt on the images as they are."""
    return MaskedDistillation(own_targets=True, source_weight=1.0)


def anchored_without_student(task: Task, seed: int) -> Dict[str, Any]:
    """Return the same rounds with the teacher's own predictions as the only targets."""
    return {"trust": FixedTrust(0.0), "update": anchored(task, seed)}


def kept_best(task: Task, seed: int) -> Update:
    return KeepBest(MaskedDistillation())


def supervised(task: Task, seed: int) -> Update:
    return MaskedDistillation(source_weight=1.0)


def on_view(task: Task, seed: int) -> Update:
    return MaskedDistillation(learns_on="view")


def lowest(task: Task, seed: int) -> Selection:
    return LowestFraction()


def uniform(task: Task, seed: int) -> Selection:
    return DrawnFraction(bias=0.0, seed=seed)


def random_layers(task: Task, seed: int) -> Selection:
    return RandomFraction(seed=seed)


def highest(task: Task, seed: int) -> Selection:
    return HighestFraction()


def all_layers(task: Task, seed: int) -> Selection:
    return AllLayers()


def channel_wise(task: Task, seed: int) -> Distillation:
    return ChannelWiseDistillation()


def decoupled(task: Task, seed: int) -> Distillation:
    return DecoupledDistillation()


def longer_steps(task: Task, seed: int) -> Update:
    return Guard(MaskedDistillation(learning_rate=1e-3))


def every(interval: int) -> Strategies:
    """Return the defaults with more or fewer rounds."""
    return lambda task, seed: {"schedule": Schedule(interval=interval)}


def after(share: float) -> Strategies:
    """Return the defaults with rounds after a share of the training."""
    return lambda task, seed: {"schedule": Schedule(warmup=round(share * task.steps))}


def taught(selection: Callable[[int], Selection]) -> AfterTurn:
    """Return what ends a turn: the student teaches the teacher, with a selection made from the seed."""

    def after(teacher: nn.Module, student: nn.Module, batches: Sequence[Tensor], seed: int) -> nn.Module:
        teach(teacher, student, batches, selection=selection(seed))
        return teacher

    return after


def born_again(teacher: nn.Module, student: nn.Module, batches: Sequence[Tensor], seed: int) -> nn.Module:
    """Return the student as the next turn's teacher (Furlanello et al., Born-Again Neural Networks, ICML 2018)."""
    return student.requires_grad_(False)


def in_turns(title: str, after: AfterTurn, *, turns: int = 2) -> Variant:
    """Return KD in turns, each from a teacher that does not change meanwhile, and what happens after each."""
    return Variant(title, "in-turns", frozen, turns=turns, after_turn=after)


UDA, FROZEN, FROZEN_DIST, FROZEN_DIST_INIT = "uda", "frozen", "frozen-dist", "frozen-dist-init"
CLDA, TURNS = "clda", "turns"

VARIANTS: Dict[str, Variant] = {
    UDA: Variant("UDA alone", "main"),
    FROZEN: Variant("KD from the frozen teacher (KL)", "main", frozen),
    FROZEN_DIST: Variant("KD from the frozen teacher, the loss of CLDA", "main", frozen_alike),
    CLDA: Variant("CLDA", "main", defaults),
    "frozen-init": Variant("frozen KD (KL), student initialised", "main", frozen, start="teacher"),
    FROZEN_DIST_INIT: Variant("frozen KD (DIST), student initialised", "init", frozen_alike, start="teacher"),
    "clda-init": Variant("CLDA, student initialised", "init", defaults, start="teacher"),
    TURNS: in_turns("CLDA in two turns", taught(lambda seed: LowestFraction())),
    "turn": in_turns("CLDA in one turn", taught(lambda seed: LowestFraction()), turns=1),
    "turns-3": in_turns("CLDA in three turns", taught(lambda seed: LowestFraction()), turns=3),
    "turns-random": in_turns("two turns, random layers", taught(lambda seed: RandomFraction(seed=seed))),
    "turns-highest": in_turns("two turns, highest LSR", taught(lambda seed: HighestFraction())),
    "turns-all": in_turns("two turns, all layers", taught(lambda seed: AllLayers())),
    "born-again": in_turns("two turns, the first student teaches the second", born_again),
    "frozen-twice": Variant("frozen KD, twice as many steps", "in-turns", frozen, length=2),
    "teacher-longer": Variant("teacher trained on, no student", "control", kind="teacher"),
    "frozen-longer": Variant("KD from the teacher trained on", "control", frozen, kind="after-teacher"),
    "frozen-cotrained": Variant("KD from a co-trained teacher", "cotrained", frozen_alike, cotrained=True),
    "clda-cotrained": Variant("CLDA, teacher co-trained", "cotrained", defaults, cotrained=True),
    "duda": Variant("DUDA-like: big auxiliary student", "control", kind="duda"),
    "after-half": Variant("rounds in the second half", "schedule", after(0.5)),
    "after-three-quarters": Variant("rounds in the last quarter", "schedule", after(0.75)),
    "rate-1e-3": Variant("longer steps of the teacher: Adam at 1e-3", "update", with_(update=longer_steps)),
    "interval-5": Variant("a round every 5 steps", "schedule", every(5)),
    "interval-20": Variant("a round every 20 steps", "schedule", every(20)),
    "lead-ignored": Variant("the student trusted whoever leads", "lead", lead_ignored),
    "lead-known": Variant("the lead known from labels (oracle)", "lead", defaults, oracle=True),
    "without-student": Variant("rounds without the student", "lead", without_student),
    "lead-ignored-init": Variant("trusted whoever leads, student initialised", "lead", lead_ignored, start="teacher"),
    "lead-known-init": Variant(
        "lead known from labels, student initialised", "lead", defaults, start="teacher", oracle=True
    ),
    "without-student-init": Variant(
        "without the student, student initialised", "lead", without_student, start="teacher"
    ),
    "no-view": Variant("CLDA without a view", "lead", defaults, view=False),
    "with-source": Variant("CLDA with the source's loss in its rounds", "lead", with_(update=supervised)),
    "own-targets": Variant("the teacher's own targets too, on the view", "lead", with_(update=own_targets)),
    "level-trusted": Variant("trusted from level on, by IoU", "lead", level_trusted),
    "level-trusted-init": Variant(
        "trusted from level on, by IoU, student initialised", "lead", level_trusted, start="teacher"
    ),
    "own-targets-init": Variant(
        "the teacher's own targets too, student initialised", "lead", with_(update=own_targets), start="teacher"
    ),
    "anchored": Variant("own targets and the source's loss, on the view", "lead", with_(update=anchored)),
    "anchored-init": Variant(
        "own targets and the source's loss, student initialised", "lead", with_(update=anchored), start="teacher"
    ),
    "anchored-image": Variant(
        "own targets on the view, the student's on the image, the source's loss", "lead", with_(update=anchored_image)
    ),
    "anchored-image-init": Variant(
        "own targets on the view, the student's on the image, the source's loss, initialised",
        "lead",
        with_(update=anchored_image),
        start="teacher",
    ),
    "anchored-alone": Variant("the same rounds without the student", "lead", anchored_without_student),
    "anchored-alone-init": Variant(
        "the same without the student, student initialised", "lead", anchored_without_student, start="teacher"
    ),
    "on-view": Variant("the teacher learns on the view", "lead", with_(update=on_view)),
    "warmed": Variant("the former defaults, rounds after 300 steps", "lead", warmed),
    "warmed-init": Variant("the former defaults, student initialised", "lead", warmed, start="teacher"),
    "select-lowest": Variant("always the lowest LSR", "selection", with_(selection=lowest)),
    "select-uniform": Variant("drawn anew, uniformly", "selection", with_(selection=uniform)),
    "select-uniform-init": Variant(
        "drawn anew, uniformly, student initialised", "selection", with_(selection=uniform), start="teacher"
    ),
    "select-lowest-init": Variant(
        "always the lowest LSR, student initialised", "selection", with_(selection=lowest), start="teacher"
    ),
    "select-all-init": Variant(
        "all layers, student initialised", "selection", with_(selection=all_layers), start="teacher"
    ),
    "select-random": Variant("random layers", "selection", with_(selection=random_layers)),
    "select-highest": Variant("highest LSR", "selection", with_(selection=highest)),
    "select-all": Variant("all layers", "selection", with_(selection=all_layers)),
    "select-shift": Variant(
        "LSR lower on target than on source", "selection", with_(selection=lambda task, seed: DomainShift())
    ),
    "former": Variant("lowest LSR", "former", former),
    "former-random": Variant("random layers", "former", with_(former, selection=random_layers)),
    "former-highest": Variant("highest LSR", "former", with_(former, selection=highest)),
    "former-all": Variant("all layers", "former", with_(former, selection=all_layers)),
    "saliency-magnitude": Variant("magnitude", "saliency", with_(saliency=lambda task, seed: Magnitude())),
    "saliency-fisher": Variant("Fisher", "saliency", with_(saliency=lambda task, seed: Fisher())),
    "saliency-hessian": Variant("Hessian", "saliency", with_(saliency=lambda task, seed: Hessian())),
    "update-average": Variant("average, unguarded", "update", with_(update=lambda task, seed: Average())),
    "update-average-guarded": Variant("average, guarded", "update", with_(update=lambda task, seed: Guard(Average()))),
    "update-aligned": Variant(
        "aligned average, unguarded", "update", with_(update=lambda task, seed: AlignedAverage())
    ),
    "update-aligned-guarded": Variant(
        "aligned average, guarded", "update", with_(update=lambda task, seed: Guard(AlignedAverage()))
    ),
    "keep-best": Variant("going back to the best teacher", "lead", with_(update=kept_best)),
    "keep-best-init": Variant(
        "going back to the best teacher, student initialised", "init", with_(update=kept_best), start="teacher"
    ),
    "lead-ignored-kept": Variant(
        "trusted whoever leads, going back to the best teacher", "lead", with_(lead_ignored, update=kept_best)
    ),
    "update-distil-unguarded": Variant(
        "masked distillation, unguarded", "update", with_(update=lambda task, seed: MaskedDistillation())
    ),
    "loss-kl": Variant("KL, CLDA", "loss", with_(distillation=lambda task, seed: KLDistillation())),
    "frozen-channel-wise": Variant(
        "channel-wise, frozen KD", "loss", with_(frozen, distillation=channel_wise), dense=True
    ),
    "loss-channel-wise": Variant("channel-wise, CLDA", "loss", with_(distillation=channel_wise), dense=True),
    "frozen-decoupled": Variant("decoupled, frozen KD", "loss", with_(frozen, distillation=decoupled)),
    "loss-decoupled": Variant("decoupled, CLDA", "loss", with_(distillation=decoupled)),
}


def named(names: List[str]) -> Dict[str, Variant]:
    """Return variants by name or by group.

    Raises:
        CldaError: If one does not exist.
    """
    chosen: Dict[str, Variant] = {}
    for name in names:
        found = {key: variant for key, variant in VARIANTS.items() if name in (key, variant.group, "all")}
        if not found:
            groups = sorted({variant.group for variant in VARIANTS.values()})
            raise CldaError(
                f"no variant or group {name!r}. Variants: {', '.join(VARIANTS)}. Groups: all, {', '.join(groups)}"
            )
        chosen.update(found)
    return chosen
