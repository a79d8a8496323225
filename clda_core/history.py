"""What is kept of the rounds: a record of each of the last ones, and sums over those before."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, Mapping, NamedTuple, Optional, Tuple

__all__ = ["Earlier", "RoundRecord"]


@dataclass(frozen=True)
class RoundRecord:
    """One round.

    Attributes:
        step: Optimizer step after which the round was made.
        rates: LSR on target data by teacher layer, in [0, 1]; a layer without a seen gradient is absent.
        source_rates: The same on source data, where that was observed.
        selected: The non-salient layers the selection chose.
        updated: The layers that were changed.
        skipped: By layer, or ``layer: parameter``, why something selected was not changed.
        strength: The schedule's factor on the update's size.
        lead: The student's score minus the teacher's, averaged over the looks; ``None`` if unknown.
        lead_by_class: The same for each class where the validator scores classes, ``None`` where unknown.
        trust: How far the student was trusted, in [0, 1]; ``None`` in rounds of versions that did not ask.
        accepted: What a guard decided, or ``False`` where ``KeepBest`` went back; ``None`` where nothing was judged.
        score_before: The guard's criterion before the update; ``None`` without a decision, or if unknown (NaN).
        score_after: The same after it.
    """

    step: int
    rates: Mapping[str, float]
    source_rates: Mapping[str, float] = field(default_factory=dict)
    selected: Tuple[str, ...] = ()
    updated: Tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    strength: float = 1.0
    lead: Optional[float] = None
    lead_by_class: Tuple[Optional[float], ...] = ()
    trust: Optional[float] = None
    accepted: Optional[bool] = None
    score_before: Optional[float] = None
    score_after: Optional[float] = None

    def to_dict(self) -> Dict[str, Any]:
        """Return everything as plain Python data, which shares nothing with the record."""
        plain: Dict[str, Any] = dict(vars(self))  # dataclasses.asdict() copies every number deeply
        plain.update((name, dict(plain[name])) for name in ("rates", "source_rates", "skipped"))
        plain.update((name, list(plain[name])) for name in ("selected", "updated", "lead_by_class"))
        return plain

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> RoundRecord:
        """Read one of the rounds of :meth:`Report.to_dict`."""
        lists = {name: tuple(record.get(name, ())) for name in ("selected", "updated", "lead_by_class")}
        return cls(**{**record, **lists})

    @property
    def reason(self) -> Optional[str]:
        """Why the round changed nothing; ``None`` if it did."""
        if self.updated:
            return None
        skipped_all = bool(self.selected) and set(self.selected) <= set(self.skipped)
        if self.accepted is False and not skipped_all:  # KeepBest skips all of them, with a reason of its own
            return "the guard rejected it"
        return Counter(self.skipped.values()).most_common(1)[0][0] if self.skipped else "no layer was selected"


class Earlier(NamedTuple):
    """What is known of rounds that are not kept one by one any more.

    Attributes:
        rounds: How many.
        changed: How many of them changed the teacher.
        judged: How many of them have an ``accepted``.
        accepted: How many of these it accepted.
        first_rates: By layer, its LSR on target data in the first of them where that was known.
        last_rates: The same in the last.
        selected: By layer, in how many it was selected.
        updated: By layer, in how many it was changed.
    """

    rounds: int = 0
    changed: int = 0
    judged: int = 0
    accepted: int = 0
    first_rates: Mapping[str, float] = {}
    last_rates: Mapping[str, float] = {}
    selected: Mapping[str, int] = {}
    updated: Mapping[str, int] = {}

    def to_dict(self) -> Dict[str, Any]:
        """Return everything as plain Python data, which shares nothing with this."""
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in self._asdict().items()}

    def and_then(self, record: RoundRecord) -> Earlier:
        """Return what is known with one more round, the next one."""
        return Earlier(
            rounds=self.rounds + 1,
            changed=self.changed + bool(record.updated),
            judged=self.judged + (record.accepted is not None),
            accepted=self.accepted + bool(record.accepted),
            first_rates={**record.rates, **self.first_rates},
            last_rates={**self.last_rates, **record.rates},
            selected=_counted(self.selected, record.selected),
            updated=_counted(self.updated, record.updated),
        )


class History(NamedTuple):
    """The rounds of a learner, the last ones one by one.

    Attributes:
        rounds: The last ones, oldest first.
        earlier: Those before, in sums.
    """

    rounds: Tuple[RoundRecord, ...] = ()
    earlier: Earlier = Earlier()

    def and_then(self, record: RoundRecord, *, keep: int) -> History:
        """Return the history with one more round, of which the last ``keep`` are kept one by one."""
        return History((*self.rounds, record), self.earlier).last(keep)

    def last(self, keep: int) -> History:
        """Return the same history with no more than ``keep`` rounds one by one."""
        earlier = self.earlier
        for record in self.rounds[:-keep]:
            earlier = earlier.and_then(record)
        return History(self.rounds[-keep:], earlier)


def _counted(counts: Mapping[str, int], names: Iterable[str]) -> Dict[str, int]:
    return {**counts, **{name: counts.get(name, 0) + 1 for name in names}}
