"""The ``clda`` entry of ``model.init_args``, checked."""

# Without `from __future__ import annotations`, which the host's jsonargparse does not read.

from dataclasses import dataclass, field, fields
from typing import Any, Dict, Mapping, Optional

from torch import nn

from clda_core import CollaborativeLearner, Never, Schedule
from clda_core.distillation import DISTDistillation
from clda_core.errors import check_choice, check_number, problem
from clda_core.update import MaskedDistillation


@dataclass(frozen=True)
class Options:
    """What ``clda`` may hold; every default is our choice, none is the paper's.

    Attributes:
        teacher: The teacher's class path; ``class_path`` of ``model.init_args.network`` in its own config.
        teacher_args: Its ``init_args`` there. They are named otherwise here, since the command line would take a key
            ``class_path`` for its own.
        checkpoint: The file that the host wrote when it trained the teacher, or its URL.
        weights: Which network in it: ``"network"``, or ``"network_ema"``, the host EMA.
        enabled: ``False`` is the host alone, bit for bit; the teacher is not even built.
        view: The second view of the target images, for rounds: the host's ``"colours"``, or ``"masked"``: these with
            ``token_mask_ratio`` of their blocks blanked. ``"none"`` makes none.
        weight: Of the KD loss; the host's losses keep theirs.
        temperature: Of the KD loss, DIST.
        rounds: ``False`` is KD from the frozen teacher, the baseline to compare with.
        stronger: Whether the teacher learns its own prediction and the host's source loss too, on the view: for more
            memory and time per round. An experiment, see docs/update/masked-distillation.md.
        warmup: Steps before the first round; none are needed, since the student is trusted by its lead.
        interval: Steps between rounds; ``None`` is the library's.
        learning_rate: Of the update of the teacher, Adam; ``None`` goes by the host's.
    """

    teacher: str = ""
    teacher_args: Dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    weights: str = "network"
    enabled: bool = True
    view: str = "colours"
    weight: float = 1.0
    temperature: float = 1.0
    rounds: bool = True
    stronger: bool = False
    warmup: int = 0
    interval: Optional[int] = None
    learning_rate: Optional[float] = None

    def __post_init__(self) -> None:
        check_choice("clda.view", self.view, ("colours", "masked", "none"))
        check_choice("clda.weights", self.weights, ("network", "network_ema"))
        check_number("clda.weight", self.weight, at_least=0)
        if self.stronger and self.view == "none":
            raise problem(
                "clda.stronger without a view",
                expected="a changed view of the target images, on which the teacher learns its own prediction",
                received="clda.view='none'",
                fix="set clda.view='colours'",
            )

    @staticmethod
    def from_config(config: Any) -> "Options":
        """Check the entry and fill in the defaults.

        Raises:
            CldaError: If it is missing, has unknown keys, or a value is out of range.
        """
        names = [item.name for item in fields(Options)]
        if not isinstance(config, Mapping) or not set(config) <= set(names):
            raise problem(
                "model.init_args.clda is missing or has unknown keys",
                expected=f"a mapping with keys among {', '.join(names)}",
                received=sorted(config) if isinstance(config, Mapping) else repr(config),
                fix="set clda.teacher, clda.teacher_args and clda.checkpoint, as the configs beside the plug-in do",
            )
        return Options(**config)

    def make_learner(self, teacher: nn.Module, student: nn.Module) -> CollaborativeLearner:
        """Build the learner."""
        interval = {} if self.interval is None else {"interval": self.interval}
        return CollaborativeLearner(
            teacher,
            student,
            distillation=DISTDistillation(temperature=self.temperature),
            update=self._update(),
            schedule=Schedule(warmup=self.warmup, **interval) if self.rounds else Never(),
        )

    def _update(self) -> MaskedDistillation:
        own = {"learns_on": "view", "own_targets": True, "source_weight": 1.0} if self.stronger else {}
        return MaskedDistillation(learning_rate=self.learning_rate, **own)
