"""A figure, its budget, and the table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Optional, Sequence

from tabulate import tabulate

from benchmarks.cost.timing import Spread


@dataclass(frozen=True)
class Figure:
    """One thing measured.

    Attributes:
        part: Which of the benchmark's parts it belongs to.
        what: What was measured, and against what.
        where: On which models.
        value: Median; ``None`` if it could not be measured, ``note`` then says why.
        unit: ``"×"`` for a ratio.
        low: Lower quartile, where there are repeats.
        high: Upper quartile.
        at_most: Budget.
        at_least: Budget, where more is better.
        note: What the reader has to know.
    """

    part: str
    what: str
    where: str
    value: Optional[float]
    unit: str = "×"
    low: Optional[float] = None
    high: Optional[float] = None
    at_most: Optional[float] = None
    at_least: Optional[float] = None
    note: str = ""

    @property
    def judged(self) -> bool:
        """Whether it has a budget and a value."""
        return self.value is not None and (self.at_most is not None or self.at_least is not None)

    @property
    def missed(self) -> bool:
        """Whether it is over (or under) its budget."""
        if self.value is None:
            return False
        over = self.at_most is not None and not self.value <= self.at_most
        return over or (self.at_least is not None and not self.value >= self.at_least)

    def to_dict(self) -> Dict[str, Any]:
        """Return a record, without what is absent."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


def figure(part: str, what: str, where: str, found: Spread, **options: Any) -> Figure:
    """Return a figure with its spread."""
    return Figure(part, what, where, found.median, low=found.low, high=found.high, **options)


def from_dict(record: Dict[str, Any]) -> Figure:
    """Return what :meth:`Figure.to_dict` was made of."""
    return Figure(**{"value": None, "where": "", **record})


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a table, and their notes under it."""
    notes = list(dict.fromkeys(one.note for one in figures if one.note))
    rows: List[List[str]] = []
    for one in figures:
        mark = f" [{notes.index(one.note) + 1}]" if one.note else ""
        spread = "" if one.low is None else f"{number(one.low)} – {number(one.high)}"
        rows.append([one.what + mark, one.where, _value(one), spread, _budget(one), _verdict(one)])
    headers = ["what", "where", "median", "quartiles", "budget", ""]
    lines = [tabulate(rows, headers, tablefmt="github", disable_numparse=True)]
    if notes:
        lines += ["", *(f"{index}. {note}" for index, note in enumerate(notes, start=1))]
    return "\n".join(lines)


def number(value: Optional[float]) -> str:
    """Return a number in three to four digits."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def _value(one: Figure) -> str:
    return "–" if one.value is None else f"{number(one.value)} {one.unit}".strip()


def _budget(one: Figure) -> str:
    if one.at_most is not None:
        return f"≤ {one.at_most:g}"
    return "" if one.at_least is None else f"≥ {one.at_least:g}"


def _verdict(one: Figure) -> str:
    if not one.judged:
        return ""
    return "missed" if one.missed else "met"
