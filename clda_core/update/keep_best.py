"""Going back to the best teacher so far, where rounds have made the teacher worse on target data."""

from __future__ import annotations

import functools
import math
import weakref
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Tuple

from torch import Tensor, nn

from .._host.plain import copied
from .._host.ranks import sum_across_ranks
from .._host.undo import undoing
from ..errors import check_number, problem
from ..layers import Layer
from ..strategy import Strategy
from ..validation import Validator
from ..validation.base import check_validator, nothing_unless_finite, score_of
from .base import (
    RoundContext,
    Update,
    UpdateResult,
    check_teacher,
    check_update,
    keep_state,
    load_state,
    needs_relation,
    rehearse,
    state_of,
    weighs_trust,
)
from .scoring import statistics_of, validator_of
from .writing import Snapshot, Weights, check_weights, holding, names_in, with_weights, write_weights

__all__ = ["KeepBest"]

WENT_BACK = "the teacher had become worse, and went back to the best one so far"


class KeepBest(Strategy):
    r"""Run an update, and go back to the best teacher so far where rounds have made the teacher worse.

    :class:`~clda_core.update.Guard` judges one round by one batch; harm that is too small to be seen there adds up.
    Here the best teacher so far and the present one are validated on the same target batches, those of the last
    ``looks`` of every ``every`` rounds. With :math:`s` the validator's score of what it has counted on these batches,
    the teacher goes back if :math:`s_\text{best} - s_\text{present} > \text{tolerance}`; the update then begins anew,
    as if it had made no round. Otherwise the present teacher is the best from there on. Where either score is unknown
    (NaN), nothing is decided.

    Args:
        update: The update that makes the rounds.
        validator: Scores a network on target data without labels, higher for a better one; by default
            :class:`~clda_core.validation.SoftConsistency` where ``distill`` gets a view, and
            :class:`~clda_core.validation.MutualInformation` where it does not.
        every: Rounds from one decision to the next, >= ``looks``. Counted are rounds in which the student is trusted.
        looks: How many of the last of these rounds the two are validated in, >= 1.
        tolerance: In the validator's units, >= 0.

    Raises:
        CldaError: If an argument is out of range or no such strategy; in a round, if the validator needs a view and
            there is none, or returns no statistics.

    Note:
        For teachers that rounds alone change: what a host trains meanwhile would be mixed with what is gone back to. An
        update that trains the teacher towards what the validator measures, as ``own_targets`` does, cannot be judged by
        it. Holds a copy of all layers that were updated since the best teacher; it is part of the state. A look costs
        three forward passes of the teacher, two without a view. On several ranks statistics are added, so that all
        decide alike.

    Example:
        >>> from clda_core.update import MaskedDistillation
        >>> update = KeepBest(MaskedDistillation(), every=20, looks=4)

    References:
        Prechelt, Early Stopping, but when?, 1998, for going back to the best weights; the score without labels is this
        library's choice.
    """

    def __init__(
        self,
        update: Update,
        *,
        validator: Optional[Validator] = None,
        every: int = 10,
        looks: int = 5,
        tolerance: float = 0.0,
    ) -> None:
        check_update(update)
        if validator is not None:
            check_validator(validator)
        check_number("looks", looks, at_least=1, integer=True)
        check_number("every", every, at_least=looks, integer=True)
        check_number("tolerance", tolerance, at_least=0)
        self.update = update
        self.validator = validator
        self.every = every
        self.looks = looks
        self.tolerance = tolerance
        self._as_new = copied(state_of(update))
        self._rounds = 0
        self._best: Weights = {}
        """What layers that were updated since had in the best teacher."""
        self._counted: Tuple[Tensor, ...] = ()
        """The validator's statistics of the best teacher and of the present one, in this period."""
        self._of: Optional[str] = None
        """The validator's name: another one's scale is another."""
        self._teacher: Optional[weakref.ReferenceType[nn.Module]] = None
        """Whose layers these are; unknown before the first round, and after a state was loaded."""
        self._undo: Callable[[], None] = _nothing

    def __getstate__(self) -> Dict[str, Any]:
        """Leave out of a pickle the weak reference to the teacher, and what takes the last round back."""
        return {**self.__dict__, "_teacher": None, "_undo": _nothing}

    @property
    def needs_relation(self) -> bool:
        """The update's."""
        return needs_relation(self.update)

    @property
    def weighs_trust(self) -> bool:
        """The update's."""
        return weighs_trust(self.update)

    def apply(self, context: RoundContext) -> UpdateResult:
        """Validate both teachers if it is time, and go back or let the update make its round."""
        self._undo = _nothing
        self._check_same(context.teacher)
        self._rounds += 1
        place = (self._rounds - 1) % self.every + 1
        if place > self.every - self.looks and self._best:
            self._look(context)
        if place == self.every:
            scores = self._scores(context)
            if scores is not None and scores[0] - scores[1] > self.tolerance:
                self._go_back(context.teacher)
                skipped = {layer.name: WENT_BACK for layer in context.layers}
                return UpdateResult((), skipped, False, scores[0], scores[1])
            if scores is not None:
                self._best = {}
            self._counted = ()
        self._remember(context.teacher, context.layers)
        return self.update.apply(context)

    def _check_same(self, teacher: nn.Module) -> None:
        """Raise if the rounds so far were another teacher's, to whose weights this one would go back."""
        if self._teacher is not None and self._teacher() is not teacher:
            raise problem(
                "KeepBest keeps the layers of another teacher",
                expected="one teacher in all rounds",
                received="a second one",
                fix="give every learner an update of its own",
            )
        self._teacher = weakref.ref(teacher)

    def _remember(self, teacher: nn.Module, layers: Iterable[Layer]) -> None:
        """Keep what the layers have, of which the best teacher has the same, since nothing has updated them."""
        self._best = with_weights(self._best, teacher, names_in(layers))

    def _look(self, context: RoundContext) -> None:
        """Count the batch for the best teacher and for the present one."""
        validator = validator_of(self.validator, context)
        present = statistics_of(validator, context, context.teacher, context.teacher_outputs)
        with holding(context.teacher, self._best):
            predicted = functools.partial(context.predict, context.teacher)
            best = statistics_of(validator, context, context.teacher, predicted, like=present)
        both = sum_across_ranks(nothing_unless_finite(best, present))
        same = self._of == type(validator).__name__ and self._counted and len(self._counted[0]) == len(best)
        self._of = type(validator).__name__
        self._counted = tuple(one + before.to(one) for one, before in zip(both, self._counted)) if same else tuple(both)

    def _scores(self, context: RoundContext) -> Optional[Tuple[float, float]]:
        """Return the scores of the best and of the present teacher, or ``None`` if they are not known."""
        if not self._counted:
            return None
        validator = validator_of(self.validator, context)
        best, present = (score_of(validator, one) for one in self._counted)
        return None if math.isnan(best) or math.isnan(present) else (best, present)

    def _go_back(self, teacher: nn.Module) -> None:
        self._undo = Snapshot(teacher, self._best).restore
        with undoing(self._undo, on_error_only=True):
            write_weights(teacher, self._best)
            load_state(self.update, self._as_new)
        self._best, self._counted = {}, ()

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raise unless a restored state belongs to this teacher."""
        check_weights(teacher, self._best, "the best teacher so far")
        check_teacher(self.update, teacher)

    def rehearse(self, context: RoundContext) -> None:
        """Validate the teacher once, and rehearse the update."""
        self._check_same(context.teacher)
        validator = validator_of(self.validator, context)
        score_of(validator, statistics_of(validator, context, context.teacher, context.teacher_outputs))
        rehearse(self.update, context)

    def keep(self, context: RoundContext) -> Callable[[], None]:
        """Return what takes back the state, and layers beyond the selected ones if the teacher went back."""
        own = (self._rounds, self._best, self._counted, self._of)
        take_update_back = keep_state(self.update, context)
        self._undo = _nothing

        def go_back() -> None:
            self._undo()
            self._rounds, self._best, self._counted, self._of = own
            take_update_back()

        return go_back

    def state_dict(self) -> Dict[str, Any]:
        """Return the best teacher's layers, what is counted, and the update's state."""
        return {
            "rounds": self._rounds,
            "best": dict(self._best),
            "counted": list(self._counted),
            "of": self._of,
            "update": state_of(self.update),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        rounds, best = int(state["rounds"]), dict(state["best"])
        counted, of = tuple(state["counted"]), state["of"]
        load_state(self.update, state["update"])
        self._teacher = None
        self._rounds, self._best, self._counted, self._of = rounds, best, counted, of


def _nothing() -> None:
    """Take nothing back."""
