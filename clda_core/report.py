"""What happened: LSR by layer over rounds, which layers were updated, and what the guard decided."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, cast

from .errors import CldaError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Earlier", "Report", "RoundRecord"]

_BLUE, _ORANGE = "#0072B2", "#D55E00"
"""Of Okabe and Ito's palette, which colour-blind readers tell apart."""


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
        accepted: The guard's decision; ``None`` without a guard, or where nothing was written.
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
        if self.accepted is False:
            return "the guard rejected it"
        return Counter(self.skipped.values()).most_common(1)[0][0] if self.skipped else "no layer was selected"


class Earlier(NamedTuple):
    """What is known of rounds that are not kept one by one any more.

    Attributes:
        rounds: How many.
        changed: How many of them changed the teacher.
        judged: How many of them a guard judged.
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
    """

    layers: Tuple[str, ...]
    rounds: Tuple[RoundRecord, ...]
    unrelated: Mapping[str, str]
    steps: int
    discarded: int
    earlier: Earlier = Earlier()

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
        """Return the table: a line a layer, with its LSR in the first and last round and how often it was touched.

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
            + (f", guard accepted {total.accepted} of {total.judged}" if total.judged else "")
            + (f", {self.discarded} observations discarded (non-finite)" if self.discarded else "")
        ]
        if not self.made:
            return "\n".join([*lines, *(f"{name}: unrelated: {reason}" for name, reason in self.unrelated.items())])
        lines += _of_lead(self.rounds)
        if self.rounds and not total.changed:
            lines.append(f"no round changed the teacher: {self.rounds[-1].reason}")
        why_not = {key.partition(": ")[0]: why for record in self.rounds for key, why in record.skipped.items()}
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
        """Draw LSR by layer over the rounds that are kept, with a dot where a layer was updated, and the lead below it.

        Args:
            axes: Matplotlib axes to draw the LSR into; a new figure of both by default.
            lead_axes: Axes to draw the lead into, beside ``axes``; without them it is left out there.

        Returns:
            The figure; save it with ``figure.savefig(path)``.

        Raises:
            CldaError: If matplotlib is not installed.
        """
        if axes is None:
            leads = any(record.lead is not None for record in self.rounds)
            axes, lead_axes = _new_axes(1.6 + 0.24 * len(self.layers), lead=leads)
        figure = cast("Figure", axes.figure)
        if self.rounds:
            nan = float("nan")
            grid = [[record.rates.get(name, nan) for record in self.rounds] for name in self.layers]
            image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0)
            figure.colorbar(image, ax=axes, label="LSR")
            dots = [
                (column, row)
                for row, name in enumerate(self.layers)
                for column, record in enumerate(self.rounds)
                if name in record.updated
            ]
            axes.scatter([x for x, _ in dots], [y for _, y in dots], s=6, color="white", linewidths=0)
            ticks = sorted({round(i * (len(self.rounds) - 1) / 8) for i in range(9)})
            axes.set_xticks(ticks)
            axes.set_xticklabels([str(self.rounds[tick].step) for tick in ticks])
        axes.set_yticks(range(len(self.layers)))
        axes.set_yticklabels(self.layers, fontsize=7)
        axes.set_xlabel("optimizer step")
        axes.set_title("LSR of the teacher (dots: updated)", fontsize=10)
        if lead_axes is not None and self.rounds:
            _draw_lead(lead_axes, self.rounds)
        figure.tight_layout()
        return figure


def _draw_lead(axes: Axes, rounds: Sequence[RoundRecord]) -> None:
    """Draw the lead, those of the classes, and the trust; rounds that changed nothing are hollow."""
    nan = float("nan")
    steps = [record.step for record in rounds]
    leads = [nan if record.lead is None else record.lead for record in rounds]
    for index in range(max(len(record.lead_by_class) for record in rounds)):
        of_class = [record.lead_by_class[index] if index < len(record.lead_by_class) else None for record in rounds]
        axes.plot(steps, [nan if lead is None else lead for lead in of_class], color="0.8", linewidth=0.8)
    axes.axhline(0.0, color="0.5", linewidth=0.8)
    axes.plot(steps, leads, color=_BLUE, label="lead")
    for changed, face in ((True, _BLUE), (False, "white")):
        chosen = [index for index, record in enumerate(rounds) if bool(record.updated) is changed]
        axes.scatter(
            [steps[index] for index in chosen],
            [leads[index] for index in chosen],
            s=14,
            color=face,
            edgecolors=_BLUE,
            zorder=3,
            label="changed the teacher" if changed else "changed nothing",
        )
    axes.set_ylabel("lead of the student")
    axes.set_xlabel("optimizer step")
    of_trust = axes.twinx()
    of_trust.plot(
        steps, [nan if record.trust is None else record.trust for record in rounds], color=_ORANGE, linestyle="--"
    )
    of_trust.set_ylim(-0.05, 1.05)
    of_trust.set_ylabel("trust (dashed)", color=_ORANGE)
    axes.legend(loc="lower right", fontsize=7)
    axes.set_title("Student's score minus teacher's (grey: by class)", fontsize=10)


def _of_lead(rounds: Sequence[RoundRecord]) -> List[str]:
    """Return what the last rounds say of the lead."""
    lines = []
    leads = [(record.lead, record.trust) for record in rounds if record.lead is not None]
    if leads:
        first, last = leads[0], leads[-1]
        lines.append(f"lead of the student: {first[0]:+.3f} at first, {last[0]:+.3f} at last (trust {last[1]:.2f})")
    return lines


def _counted(counts: Mapping[str, int], names: Iterable[str]) -> Dict[str, int]:
    return {**counts, **{name: counts.get(name, 0) + 1 for name in names}}


def _new_axes(height: float, *, lead: bool) -> Tuple[Axes, Optional[Axes]]:
    """Return axes of a new figure for the LSR, and for the lead if there is one."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CldaError(
            "report().plot() needs matplotlib, which is not installed. Fix: pip install 'clda-core[plots]', or read "
            "the figures from report().to_dict()"
        ) from error
    if not lead:
        return Figure(figsize=(8.0, height)).add_subplot(1, 1, 1), None
    figure = Figure(figsize=(8.0, height + 2.6))
    grid = figure.add_gridspec(2, 1, height_ratios=[height, 2.6])
    return figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
