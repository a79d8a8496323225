"""What happened: LSR by layer over rounds, which layers were updated, and what the guard decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple

from .history import Earlier, RoundRecord
from .schedule import RoundSchedule, Schedule, makes_rounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """The history of a learner; ``print(report)`` shows a table.

    Attributes:
        layers: Names of all teacher layers, in the model's order.
        rounds: The last rounds, oldest first: as many as the learner keeps.
        unrelated: By teacher layer, why it has no student layer.
        steps: Optimizer steps counted.
        discarded: Observations discarded because a gradient was not finite.
        earlier: The rounds before these, in sums.
        no_round: Why no round was made, where none was and that is known.
    """

    layers: Tuple[str, ...]
    rounds: Tuple[RoundRecord, ...]
    unrelated: Mapping[str, str]
    steps: int
    discarded: int
    earlier: Earlier = field(default_factory=Earlier)
    no_round: str = ""

    @property
    def made(self) -> int:
        """Rounds made in all, those included that are not kept one by one."""
        return self.earlier.rounds + len(self.rounds)

    def to_dict(self) -> Dict[str, Any]:
        """Return everything as plain Python data, fit for JSON."""
        return {
            "layers": list(self.layers),
            "rounds": [record.to_dict() for record in self.rounds],
            "unrelated": dict(self.unrelated),
            "steps": self.steps,
            "discarded": self.discarded,
            "earlier": self.earlier.to_dict(),
            "no_round": self.no_round,
        }

    @classmethod
    def from_dict(cls, report: Mapping[str, Any]) -> Report:
        """Read what :meth:`to_dict` returned, from JSON for example."""
        rounds = tuple(RoundRecord.from_dict(record) for record in report["rounds"])
        earlier = Earlier(**report.get("earlier", {}))
        return cls(**{**report, "layers": tuple(report["layers"]), "rounds": rounds, "earlier": earlier})

    @property
    def changed(self) -> int:
        """How many of the rounds made changed the teacher."""
        return self.earlier.changed + sum(bool(record.updated) for record in self.rounds)

    def metrics(self) -> Dict[str, float]:
        """Return the latest figures as a flat dict for any logger."""
        figures: Dict[str, float] = {
            "clda/steps": float(self.steps),
            "clda/rounds": float(self.made),
            "clda/rounds_changed": float(self.changed),
            "clda/discarded": float(self.discarded),
        }
        if self.rounds:
            last = self.rounds[-1]
            rates = list(last.rates.values())
            figures["clda/lsr_mean"] = sum(rates) / len(rates)
            figures["clda/lsr_min"] = min(rates)
            figures["clda/selected_layers"] = float(len(last.selected))
            figures["clda/updated_layers"] = float(len(last.updated))
            figures["clda/strength"] = last.strength
            for name in ("lead", "trust", "accepted", "score_before", "score_after"):
                value = getattr(last, name)
                if value is not None:
                    figures[f"clda/{name}"] = float(value)
        return figures

    def __str__(self) -> str:
        """Return the table: a line per layer, with its LSR in the first and last round and how often it was touched.

        It is of all rounds, whether or not they are kept one by one; but why a layer was selected and never updated is
        said by the rounds that are.
        """
        total = self.earlier
        for record in self.rounds:
            total = total.and_then(record)
        lines = [
            f"CLDA after {self.steps} optimizer steps: {self.made} rounds"
            + (f" (the last {len(self.rounds)} kept one by one)" if self.earlier.rounds else "")
            + (f", {total.changed} of them changed the teacher" if self.made else "")
            + (f", {total.judged} judged and {total.accepted} accepted" if total.judged else "")
            + (f", {self.discarded} observations discarded (non-finite)" if self.discarded else "")
        ]
        if not self.made:
            lines += [f"no round was made: {self.no_round}"] if self.no_round else []
            return "\n".join([*lines, *(f"{name}: unrelated: {reason}" for name, reason in self.unrelated.items())])
        lines += _of_lead(self.rounds)
        said = self.rounds[-1].reason if self.rounds and not total.changed else None
        if said is not None:
            lines.append(f"no round changed the teacher: {said}")
        why_not = {key.partition(": ")[0]: why for record in self.rounds for key, why in record.skipped.items()}
        if list(why_not.values()).count(str(said)) > 1:  # said above once for all
            why_not = {name: why for name, why in why_not.items() if why != said}
        width = max(len(name) for name in (*self.layers, "layer"))
        lines.append(f"{'layer':<{width}}  first LSR  last LSR  selected  updated  note")
        for name in self.layers:
            first, last = "  unknown", " unknown"
            if name in total.first_rates:
                first, last = f"{total.first_rates[name]:9.3f}", f"{total.last_rates[name]:8.3f}"
            selected, updated = total.selected.get(name, 0), total.updated.get(name, 0)
            note = f"unrelated: {self.unrelated[name]}" if name in self.unrelated else ""
            if not note and selected and not updated:
                note = why_not.get(name, "")
            lines.append(f"{name:<{width}}  {first}  {last}  {selected:8d}  {updated:7d}  {note}".rstrip())
        return "\n".join(lines)

    def plot(self, axes: Optional[Axes] = None, *, lead_axes: Optional[Axes] = None) -> Figure:
        """Draw LSR by layer over the rounds that are kept, and below it the lead and the trust.

        The colours go from 0 to 1, so that figures of several runs compare. A dot marks a layer that a round updated, a
        cross a round that was judged and rejected. What the names of most layers begin with is said once, at the axis,
        and where there are too many layers or rounds for the figure's size only every second or tenth is named.

        Args:
            axes: Matplotlib axes to draw the LSR into; a new figure of 6 by 4 inches with both by default.
            lead_axes: Axes to draw the lead into, beside ``axes``; without them it is left out there.

        Returns:
            The figure; save it with ``figure.savefig(path)``. A new one has a constrained layout, which also fits after
            ``figure.set_size_inches(width, height)``.

        Raises:
            CldaError: If matplotlib is not installed.
        """
        from .drawing import draw

        return draw(self.layers, self.rounds, axes, lead_axes)


def why_no_round(
    rounds: Sequence[RoundRecord], schedule: RoundSchedule, steps: int, owed: Optional[int], enabled: bool
) -> str:
    """Return why a learner made no round; nothing where it did, or where that is not known."""
    if rounds:
        return ""
    if not enabled:
        return "the learner is not enabled"
    if not makes_rounds(schedule):
        return "the schedule is Never()"
    if not steps:
        return "no optimizer step was counted. Call learner.step(optimizer) in place of optimizer.step()"
    if owed is not None:
        return f"the round of step {owed} waits for a step with target data"
    if isinstance(schedule, Schedule) and steps < schedule.warmup + schedule.interval:
        return f"the first is due at step {schedule.warmup + schedule.interval}"
    return ""


def _of_lead(rounds: Sequence[RoundRecord]) -> List[str]:
    """Return what the last rounds say of the lead."""
    lines = []
    leads = [(record.lead, record.trust) for record in rounds if record.lead is not None]
    if leads:
        first, last = leads[0], leads[-1]
        lines.append(f"lead of the student: {first[0]:+.3f} at first, {last[0]:+.3f} at last (trust {last[1]:.2f})")
    return lines
