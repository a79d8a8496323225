"""Who leads: the student's score minus the teacher's on target data, and how far the student is trusted by it."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ._host.ranks import sum_across_ranks
from .errors import check_number, problem
from .strategy import Strategy
from .update import RoundContext
from .update.scoring import DEFAULT_VALIDATORS, statistics_of, validator_of
from .validation import Validator
from .validation.base import nothing_unless_finite, score_by_class, score_of

__all__ = ["FixedTrust", "LinearTrust", "Look", "Trust"]

Trust = Callable[[float], float]
"""``trust(lead) -> t``: how far the student is trusted, in [0, 1], by its score minus the teacher's."""

MEMORY = 0.8
"""Of what earlier looks have counted, the share that the next one keeps: about the last five looks are averaged."""


class LinearTrust(Strategy):
    r"""Trust that rises from 0 to 1 with the lead: :math:`t = \min(1, \max(0, (d - a) / (b - a)))`.

    :math:`d` is the lead, :math:`a` is ``zero`` and :math:`b` is ``full``. Validators underrate a network whose
    learning rate is still high, as the student's is for most of the training, so with ``zero`` at 0 rounds begin late
    rather than early.

    Args:
        zero: The lead at which the student begins to be trusted, in the validator's units.
        full: The lead from which on it is trusted alone, > ``zero``.

    Raises:
        CldaError: If the numbers are not finite, or ``full`` is not above ``zero``.

    Example:
        >>> trust = LinearTrust(zero=-0.1, full=0.1)
        >>> [trust(lead) for lead in (-0.2, 0.0, 0.3)]
        [0.0, 0.5, 1.0]
    """

    def __init__(self, *, zero: float = 0.0, full: float = 0.05) -> None:
        check_number("zero", zero)
        check_number("full", full, above=zero)
        self.zero = zero
        self.full = full

    def __call__(self, lead: float) -> float:
        """Return the trust; see :data:`Trust`."""
        return min(1.0, max(0.0, (lead - self.zero) / (self.full - self.zero)))


class FixedTrust(Strategy):
    """Control: the same trust whoever leads. Nothing is validated then.

    Args:
        trust: In [0, 1]. With 1, rounds learn from the student alone; with 0 they go on without the student.

    Raises:
        CldaError: If ``trust`` is out of range.

    Example:
        >>> FixedTrust(0.5)(-3.0)
        0.5
    """

    def __init__(self, trust: float = 1.0) -> None:
        check_number("trust", trust, at_least=0, at_most=1)
        self.trust = trust

    def __call__(self, lead: float) -> float:
        """Return the trust; see :data:`Trust`."""
        return self.trust


class Look(NamedTuple):
    """What is known of both networks after a look.

    Attributes:
        trust: How far the student is trusted.
        lead: The student's score minus the teacher's; ``None`` if it is unknown, or nobody asked.
        by_class: The same for each class, ``None`` where unknown; empty for validators that score no classes.
        reason: Why the student is not trusted, where ``trust`` is 0.
    """

    trust: float
    lead: Optional[float] = None
    by_class: Tuple[Optional[float], ...] = ()
    reason: str = "the student is not trusted: by the validator it is behind the teacher"


class Averages(NamedTuple):
    """What a validator has counted of both networks; earlier looks fade.

    Attributes:
        of: The validator's name, ``None`` before the first look.
        teacher: Its statistics of the teacher.
        student: Its statistics of the student.
    """

    of: Optional[str] = None
    teacher: Tensor = torch.zeros(0)
    student: Tensor = torch.zeros(0)

    def and_then(self, of: str, teacher: Tensor, student: Tensor) -> Averages:
        """Return the averages with one more look; another validator's begin anew, since its scale is another."""
        if self.of != of or len(self.teacher) != len(teacher):
            return Averages(of, teacher, student)
        return Averages(of, teacher + MEMORY * self.teacher.to(teacher), student + MEMORY * self.student.to(student))


class Lead:
    """Validates both networks on the batch of a round, and averages over the looks.

    The statistics of earlier looks fade by :data:`MEMORY`, so that one batch decides nothing and the networks of long
    ago count no more.

    Args:
        validator: Scores a network; ``None`` for soft consistency where ``distill`` gets a view, and for mutual
            information where it does not.
        trust: How far the student is trusted by its lead.

    Attributes:
        averages: Of the looks so far.
    """

    def __init__(self, validator: Optional[Validator], trust: Trust) -> None:
        self.averages = Averages()
        self._validator = validator
        self._trust = trust

    def look(self, context: RoundContext, *, renewed: bool = True) -> Look:
        """Validate both networks once more and return what is known now.

        Args:
            context: The round.
            renewed: Whether the round has observations of its own; otherwise it goes by the last look, if there is one,
                and needs no view.

        Raises:
            CldaError: If the validator needs a view and there is none, or returns no statistics; or ``trust`` returns
                no number in [0, 1].
        """
        if isinstance(self._trust, FixedTrust):
            return Look(self._trust.trust, reason="the student is not trusted: trust= says so")
        if context.inputs is None:
            return Look(0.0, reason="the student is not trusted: distill() got no inputs to validate the networks on")
        validator = None if renewed else self._last_asked()
        if validator is None:
            validator = validator_of(self._validator, context)
            teacher, student = sum_across_ranks(nothing_unless_finite(*_statistics(validator, context)))
            self.averages = self.averages.and_then(type(validator).__name__, teacher, student)
        return self._decided(validator, self.averages.teacher, self.averages.student)

    def _last_asked(self) -> Optional[Validator]:
        """Return the validator of the last look; ``None`` before the first."""
        candidates = DEFAULT_VALIDATORS if self._validator is None else (self._validator,)
        return next((one for one in candidates if type(one).__name__ == self.averages.of), None)

    def rehearse(self, context: RoundContext) -> None:
        """Do all of a look that can fail, and forget it."""
        if not isinstance(self._trust, FixedTrust) and context.inputs is not None:
            validator = validator_of(self._validator, context)
            self._decided(validator, *_statistics(validator, context))

    def _decided(self, validator: Validator, teacher: Tensor, student: Tensor) -> Look:
        """Return what statistics of both networks say."""
        lead = score_of(validator, student) - score_of(validator, teacher)
        if math.isnan(lead):
            return Look(0.0, reason="the student is not trusted: the validator could not score both networks")
        trust = self._trust(lead)
        return Look(_checked(trust), lead, _by_class(validator, teacher, student))

    def state_dict(self) -> Dict[str, Any]:
        """Return what is averaged, and by which validator."""
        return self.averages._asdict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.averages = Averages(**state)


def _checked(trust: Any) -> float:
    """Return what a trust function returned if that is a number in [0, 1]."""
    number = isinstance(trust, (int, float)) and not isinstance(trust, bool)
    if not number or not 0 <= trust <= 1:  # NaN among them
        raise problem(
            "trust= returned no trust",
            expected="a number in [0, 1]",
            received=repr(trust),
            fix="return one for every lead, as LinearTrust() does",
        )
    return float(trust)


def _by_class(validator: Validator, teacher: Tensor, student: Tensor) -> Tuple[Optional[float], ...]:
    """Return the lead of each class by statistics of both networks."""
    of_teacher, of_student = score_by_class(validator, teacher), score_by_class(validator, student)
    if of_teacher is None or of_student is None:
        return ()
    leads = (of_student.double().cpu() - of_teacher.double().cpu()).tolist()
    return tuple(None if math.isnan(lead) else lead for lead in leads)


def _statistics(validator: Validator, context: RoundContext) -> Tuple[Tensor, Tensor]:
    """Return what a validator counts of teacher and student on a batch."""
    teacher = statistics_of(validator, context, context.teacher, context.teacher_outputs)
    return teacher, statistics_of(validator, context, context.student, context.student_outputs, like=teacher)
