"""The ``clda`` entry of the ``uda`` config, checked."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Mapping, Optional

from torch import nn

from clda_core import CollaborativeLearner, Never, Schedule
from clda_core.distillation import DISTDistillation
from clda_core.errors import check_choice, check_number, problem
from clda_core.update import MaskedDistillation

MakeLearner = Callable[[nn.Module, nn.Module], CollaborativeLearner]


@dataclass(frozen=True)
class Options:
    """What ``uda=dict(type='CLDADACS', clda=dict(...))`` may hold; every default is our choice, none is the paper's.

    Attributes:
        teacher: ``dict(config=..., checkpoint=..., weights='model')``, see :func:`.teacher.build_teacher`.
        enabled: ``False`` is the host alone, bit for bit; the teacher is not even built.
        images: On which images the teacher is distilled: the host's ``"target"`` images, its ``"mixed"`` ones, or
            ``"both"``. Rounds use the last of them.
        view: The second view of these images, for rounds: ``"auto"`` takes the host's masked target images where it
            has them (MIC), else ``"colours"``: the host's own colour jitter and blur. ``"none"`` makes none.
        weight: Of the KD loss; the host's losses keep theirs.
        temperature: Of the KD loss, DIST.
        rounds: ``False`` is KD from the frozen teacher, the baseline to compare with.
        stronger: Whether the teacher learns its own prediction and the host's source loss too, on the view: for more
            memory and time per round. An experiment, see docs/update/masked-distillation.md.
        warmup: Iterations before the first round; none are needed, since the student is trusted by its lead.
        interval: Iterations between rounds; ``None`` is the library's.
        learning_rate: Of the update of the teacher, Adam; ``None`` goes by the host's.
        learner: ``"package.module:function"``, a function of your own from teacher and student to a
            :class:`~clda_core.CollaborativeLearner`, instead of the six before this one.
        resume_from: Our state file to resume from, where it does not lie in the work directory.
        restore_local_iter: Whether to give the host its own counter back on resuming. Without it the host starts its
            EMA anew from the student, as it does alone.
    """

    teacher: Mapping[str, Any] = field(default_factory=dict)
    enabled: bool = True
    images: str = "target"
    view: str = "auto"
    weight: float = 1.0
    temperature: float = 1.0
    rounds: bool = True
    stronger: bool = False
    warmup: int = 0
    interval: Optional[int] = None
    learning_rate: Optional[float] = None
    learner: Optional[str] = None
    resume_from: Optional[str] = None
    restore_local_iter: bool = False

    @staticmethod
    def from_config(config: Any) -> Options:
        """Check the entry and fill in the defaults.

        Raises:
            CldaError: If it is missing, has unknown keys, or a value is out of range.
        """
        names = [item.name for item in fields(Options)]
        if not isinstance(config, Mapping) or not set(config) <= set(names):
            raise problem(
                "uda.clda is missing or has unknown keys",
                expected=f"a dict with keys among {', '.join(names)}",
                received=sorted(config) if isinstance(config, Mapping) else repr(config),
                fix="set uda=dict(type='CLDADACS', clda=dict(teacher=dict(config=..., checkpoint=...)))",
            )
        options = Options(**config)
        check_choice("clda.images", options.images, ("target", "mixed", "both"))
        check_choice("clda.view", options.view, ("auto", "colours", "none"))
        check_number("clda.weight", options.weight, at_least=0)
        if options.stronger and options.view == "none":
            raise problem(
                "clda.stronger without a view",
                expected="a changed view of the target images, on which the teacher learns its own prediction",
                received="clda.view='none'",
                fix="set clda.view='colours'",
            )
        own = sorted({"temperature", "rounds", "stronger", "warmup", "interval", "learning_rate"} & set(config))
        if options.learner is not None and own:
            raise problem(
                "clda.learner and options of the default learner are given",
                expected="one of them",
                received=f"learner={options.learner!r} and {', '.join(own)}",
                fix="set these in your function, or leave clda.learner out",
            )
        return options

    def make_learner(self, teacher: nn.Module, student: nn.Module) -> CollaborativeLearner:
        """Build the learner: the user's, or the default one."""
        if self.learner is not None:
            return _imported(self.learner)(teacher, student)
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


def _imported(path: str) -> MakeLearner:
    module, _, name = path.partition(":")
    try:
        function: MakeLearner = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise problem(
            "clda.learner cannot be imported",
            expected="'package.module:function', a function from teacher and student to a CollaborativeLearner",
            received=f"{path!r} ({type(error).__name__}: {error})",
            fix="put the module on the Python path, for example into the folder that the host is run from",
        ) from error
    return function
