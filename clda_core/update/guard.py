"""A guard around an update: accept it or roll it back, by an unsupervised criterion on target data."""

from __future__ import annotations

import inspect
import math
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, cast

import torch
from torch import Tensor, nn

from .._host.compat import wide
from .._host.ranks import mean_across_ranks
from .._host.undo import undoing
from ..distillation import kl_distillation
from ..distillation.positions import align_logits, computing_dtype
from ..errors import check_number, problem
from ..strategy import Strategy
from ..validation import MutualInformation
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

__all__ = ["Criterion", "Guard", "agreement", "consensus", "mutual_information"]

Criterion = Callable[..., Tensor]
"""``criterion(teacher_logits, original_logits, student_logits, mask=mask) -> scalar`` on one batch; higher is better.

``original_logits`` are the teacher's before the update; before it they are the same as ``teacher_logits``. ``mask`` is
the batch's, bool or float weights, or ``None``. A criterion without a parameter ``mask`` is never given what a mask
leaves out: its logits are then of shape ``(M, C)``, one row for each position that counts.
"""


def consensus(
    teacher_logits: Tensor, original_logits: Tensor, student_logits: Tensor, *, mask: Optional[Tensor] = None
) -> Tensor:
    r"""Negative KL divergence of the teacher from the student where both were of one mind before, in nats.

    :math:`-\mathrm{mean}_{i \in A}\, \mathrm{KL}(p_S \| p_T)_i` over the samples and positions :math:`A` at which the
    original teacher and the student predict the same class. These predictions are the likeliest to be right, so an
    update that keeps them may move all others at will. It falls when the teacher loses or blurs what it shared with the
    student, and rises on the way towards the student. It does not ask whether the student is right.

    Args:
        teacher_logits: Shape ``(N, C, ...)``, of the updated teacher.
        original_logits: The same of the teacher before the update.
        student_logits: The same classes; another grid is resized to the smaller of the two.
        mask: Which positions count, and how much: bool or float weights, as for a KD loss.

    Returns:
        Scalar float32 or float64, <= 0; NaN, which the guard rejects, if they were of one mind at fewer than half of
        the positions that count: then one of them is not fit to judge the other, as early in the student's training.

    Raises:
        CldaError: If the logits do not fit each other.

    Example:
        >>> student, original = torch.tensor([[0.0, 2.0], [2.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 4.0]])
        >>> wrecked = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
        >>> bool(consensus(student, original, student) > consensus(original, original, student))
        True
        >>> bool(consensus(wrecked, original, student) > consensus(original, original, student))
        False
    """
    updated, student, weights = align_logits(teacher_logits, student_logits, mask)
    original = align_logits(original_logits, student_logits, mask).student
    same = original.argmax(dim=1) == student.argmax(dim=1)
    everywhere = torch.ones_like(same) if weights is None else weights
    shared = same if weights is None else same * weights
    score = 0.0 - kl_distillation(updated, student, shared, temperature=1.0)
    majority = 2 * shared.sum() >= everywhere.sum()
    return torch.where(majority, score, torch.full_like(score, float("nan")))


def mutual_information(
    teacher_logits: Tensor, original_logits: Tensor, student_logits: Tensor, *, mask: Optional[Tensor] = None
) -> Tensor:
    r"""Mutual information between input and predicted class, :math:`H(\bar p) - \overline{H(p)}`, in nats.

    It falls when predictions collapse to one class and when they blur: the score of
    :class:`clda_core.validation.MutualInformation` on one batch.

    Args:
        teacher_logits: Shape ``(N, C, ...)``.
        original_logits: Not used.
        student_logits: Not used.
        mask: Which positions count, and how much: bool or float weights, as for a KD loss.

    Returns:
        Scalar float32 or float64 in ``[0, log C]``; NaN, which the guard rejects, if the mask leaves nothing.

    Raises:
        CldaError: If the logits cannot be used, or the mask does not fit.

    Example:
        >>> certain, unsure = torch.eye(2) * 100, torch.zeros(2, 2)
        >>> round(mutual_information(certain, unsure, unsure).item(), 4)
        0.6931

    References:
        Shi and Sha, Information-Theoretical Learning of Discriminative Clusters for Unsupervised Domain Adaptation,
        ICML 2012, Eq. (3).
    """
    validator = MutualInformation()
    score = validator.score(validator.statistics(teacher_logits, mask=mask))
    return score.to(computing_dtype(teacher_logits, teacher_logits))


def agreement(
    teacher_logits: Tensor, original_logits: Tensor, student_logits: Tensor, *, mask: Optional[Tensor] = None
) -> Tensor:
    r"""Negative mean Kullback-Leibler divergence :math:`-\mathrm{KL}(p_S \| p_T)` between the models, in nats.

    Args:
        teacher_logits: Shape ``(N, C, ...)``.
        original_logits: Not used.
        student_logits: The same classes; another grid is resized to the smaller of the two.
        mask: Which positions count, and how much: bool or float weights, as for a KD loss.

    Returns:
        Scalar float32 or float64, <= 0.

    Raises:
        CldaError: If the logits do not fit each other.

    Example:
        >>> agreement(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3)).item()
        0.0
    """
    return 0.0 - kl_distillation(teacher_logits, student_logits, mask, temperature=1.0)


class Guard(Strategy):
    r"""Run an update, and roll it back unless the teacher is as good on target data as before.

    With the criterion :math:`c` on this step's target batch the update is accepted if
    :math:`c_\text{after} \ge c_\text{before} - \text{tolerance}`; if not, the teacher goes half the way back, and so on
    (backtracking line search). A NaN is a rejection. The update's own state (the
    moments of its optimizer) is rolled back with the teacher: a rejected step would otherwise be part of the next one.

    Args:
        update: The update to guard.
        criterion: Unsupervised, higher is better: :func:`consensus`, :func:`mutual_information`, :func:`agreement` or
            your own (:data:`Criterion`). What the batch's mask leaves out does not enter it.
        tolerance: In the criterion's units, >= 0.
        backtracks: How often an update that is not accepted is halved and judged again before it is rolled back, >= 0.

    Raises:
        CldaError: If ``tolerance`` or ``backtracks`` is negative, the criterion cannot be called with three logits, or
            (in :meth:`apply`) it returns no scalar.

    Note:
        Costs two forward passes of the teacher (one more for each backtrack), one of the student, and a copy of the
        selected layers and of the update's state a round. On several ranks the scores are averaged, so that all decide
        alike.
    """

    def __init__(
        self, update: Update, *, criterion: Criterion = consensus, tolerance: float = 0.0, backtracks: int = 2
    ) -> None:
        check_update(update)
        check_number("tolerance", tolerance, at_least=0)
        check_number("backtracks", backtracks, at_least=0, integer=True)
        _check_criterion(criterion)
        self.update = update
        self.criterion = criterion
        self.tolerance = tolerance
        self.backtracks = backtracks
        self._masks = _takes_mask(criterion)

    @property
    def needs_relation(self) -> bool:
        """The guarded update's."""
        return needs_relation(self.update)

    @property
    def weighs_trust(self) -> bool:
        """The guarded update's."""
        return weighs_trust(self.update)

    def apply(self, context: RoundContext) -> UpdateResult:
        """Apply the guarded update and accept it or roll it back."""
        earlier = context.before(self)
        with undoing(earlier.take_back, on_error_only=True):
            original = context.predict(context.teacher).logits
            before = self._score(context, original, original)
            result = self.update.apply(context)
            if not result.updated:  # nothing to judge; what judged it already may have gone back, and that stays
                if result.accepted is None:
                    earlier.take_back()
                return result
            for attempt in range(self.backtracks + 1):
                if attempt:
                    earlier.go_halfway_back()
                after = self._score(context, context.predict(context.teacher).logits, original)
                accepted = bool(after >= before - self.tolerance)
                if accepted:
                    break
            if not accepted:
                earlier.take_back()
        updated = result.updated if accepted else ()
        return UpdateResult(updated, result.skipped, accepted, _known(before), _known(after))

    def check_teacher(self, teacher: nn.Module) -> None:
        """Let the guarded update say whether what it has restored belongs to this teacher."""
        check_teacher(self.update, teacher)

    def rehearse(self, context: RoundContext) -> None:
        """Judge the teacher as it is, and rehearse the guarded update."""
        original = context.predict(context.teacher).logits
        self._score(context, original, original)
        rehearse(self.update, context)

    def keep(self, context: RoundContext) -> Callable[[], None]:
        """Return what takes the guarded update's state back."""
        return keep_state(self.update, context)

    def state_dict(self) -> Dict[str, Any]:
        """Return the guarded update's state."""
        return state_of(self.update)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the guarded update's state."""
        load_state(self.update, state)

    def _score(self, context: RoundContext, teacher: Tensor, original: Tensor) -> float:
        student, mask = context.student_outputs().logits, context.mask
        with torch.no_grad():
            if self._masks:
                score: Optional[Tensor] = self.criterion(teacher, original, student, mask=mask)
            else:
                score = self.criterion(*_where_it_counts(teacher, original, student, mask))
        if not isinstance(score, Tensor) or score.numel() != 1:
            raise problem(
                "the guard's criterion returned something else than a score",
                expected="a tensor with one element",
                received=type(score).__name__ if not isinstance(score, Tensor) else f"shape {tuple(score.shape)}",
                fix="return a scalar tensor, higher for a better teacher, from criterion=",
            )
        return float(mean_across_ranks([wide(score.detach())])[0])


def _parameters(criterion: Criterion) -> Optional[inspect.Signature]:
    """Return the signature, ``None`` of what does not tell it, as some functions written in C."""
    try:
        return inspect.signature(criterion)
    except (TypeError, ValueError):
        return None


def _check_criterion(criterion: Any) -> None:
    signature = _parameters(criterion) if callable(criterion) else None
    try:
        if signature is not None:
            signature.bind(None, None, None, **({"mask": None} if _takes_mask(criterion) else {}))
        fits = callable(criterion)
    except TypeError:
        fits = False
    if not fits:
        raise problem(
            "the guard's criterion cannot be called with three logits",
            expected="a function of the teacher's logits now, those before the update, the student's, and mask=",
            received=f"{criterion!r}{signature or ''}",
            fix="write for example def criterion(teacher, original, student, *, mask=None)",
        )


def _takes_mask(criterion: Criterion) -> bool:
    signature = _parameters(criterion)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [] if signature is None else list(signature.parameters.values())
    return any(
        one.kind == inspect.Parameter.VAR_KEYWORD or (one.name == "mask" and one.kind in by_name) for one in parameters
    )


def _where_it_counts(
    teacher: Tensor, original: Tensor, student: Tensor, mask: Optional[Tensor]
) -> Tuple[Tensor, Tensor, Tensor]:
    """Return logits ``(M, C)`` of the positions that a mask does not leave out; without a mask what was given."""
    if mask is None:
        return teacher, original, student
    now, before = align_logits(teacher, student, mask), align_logits(original, student, mask)
    counts = cast(Tensor, now.weights) > 0
    found = [logits.transpose(1, 2)[counts] for logits in (now.student, before.student, now.teacher)]
    return found[0], found[1], found[2]


def _known(score: float) -> Optional[float]:
    """Return ``None`` for NaN, which would be no JSON and unequal to itself in reports."""
    return None if math.isnan(score) else score
