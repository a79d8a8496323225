"""What scores without labels say of the better of two networks: tables and a figure, from the validators' records."""

from __future__ import annotations

from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate

from benchmarks.evidence.records import Record
from benchmarks.evidence.tables import REPORTED
from examples.classification.figures import OKABE_ITO

TUNING = range(100, 200)
ALL = (*REPORTED, *TUNING)
CLEAR = 1.0  # points; which network is better is asked of gaps above this
QUARTERS = ("first", "second", "third", "last")


class Pair(NamedTuple):
    """A teacher and a student at one moment: student minus teacher.

    Attributes:
        task: Name of the benchmark.
        seed: Of the run.
        kind: Of the student.
        quarter: Of the training, 0 to 3.
        gap: In points of the figure.
        lead: In the validator's units.
        label: Of the class, where the figure and the score are a class's.
    """

    task: str
    seed: int
    kind: str
    quarter: int
    gap: float
    lead: float
    label: str = ""


class Agreement(NamedTuple):
    """How well leads go by gaps.

    Attributes:
        pairs: Number of pairs.
        clear: Number of those whose gap is above 1 point, either way.
        right: Share of those whose lead has the gap's sign.
        ahead: The same of those in which the student is better.
        behind: The same of those in which it is worse.
        pearson: Correlation of lead and gap over all pairs.
        spearman: The same of their ranks.
    """

    pairs: int
    clear: int
    right: Optional[float]
    ahead: Optional[float]
    behind: Optional[float]
    pearson: Optional[float]
    spearman: Optional[float]


def pairs_of(records: Dict[str, Sequence[Record]], seeds: Sequence[int]) -> Dict[str, List[Pair]]:
    """Return each validator's pairs, from the latest record of each run.

    Args:
        records: By task.
        seeds: Whose runs count.
    """
    found: Dict[str, List[Pair]] = {}
    for task, record, look in _looks(records, seeds):
        gap = look["figures"][record["metric"]] - record["teacher"]["figures"][record["metric"]]
        for name, score in look["scores"].items():
            lead = _difference(score, record["teacher"]["scores"].get(name))
            if lead is not None:
                found.setdefault(name, []).append(
                    Pair(task, record["seed"], record["variant"], _quarter(record, look), gap, lead)
                )
    return found


def class_pairs_of(records: Dict[str, Sequence[Record]], seeds: Sequence[int]) -> Dict[str, List[Pair]]:
    """Return the pairs of each validator that scores classes: one for each class."""
    found: Dict[str, List[Pair]] = {}
    for task, record, look in _looks(records, seeds):
        for name, of_classes in look["by_class"].items():
            of_teacher = record["teacher"]["by_class"].get(name, {})
            for label, score in of_classes.items():
                lead = _difference(score, of_teacher.get(label))
                if lead is not None:
                    gap = look["figures"][label] - record["teacher"]["figures"][label]
                    pair = Pair(task, record["seed"], record["variant"], _quarter(record, look), gap, lead, label[4:])
                    found.setdefault(name, []).append(pair)
    return found


def agreement(pairs: Sequence[Pair], *, offset: float = 0.0) -> Agreement:
    """Return how well leads above ``offset`` go by gaps; ``None`` where there are too few pairs to say."""
    gaps, leads = np.array([pair.gap for pair in pairs]), np.array([pair.lead for pair in pairs])
    right = (leads > offset) == (gaps > 0)
    clear, ahead, behind = np.abs(gaps) > CLEAR, gaps > CLEAR, gaps < -CLEAR
    shares = (float(np.mean(right[chosen])) if chosen.any() else None for chosen in (clear, ahead, behind))
    spread = len(pairs) > 2 and np.ptp(gaps) > 0 and np.ptp(leads) > 0
    pearson, spearman = (float(test(leads, gaps)[0]) if spread else None for test in (stats.pearsonr, stats.spearmanr))
    return Agreement(len(pairs), int(clear.sum()), *shares, pearson, spearman)


def best_offset(pairs: Sequence[Pair]) -> Optional[float]:
    """Return the lead above which the student is best taken for the better one; of equally good ones that nearest to 0.

    It is the middle between two leads, or 0, and maximises the share of clear gaps whose sign is right; ``None`` unless
    there are clear gaps of both signs.
    """
    clear = [pair for pair in pairs if abs(pair.gap) > CLEAR]
    leads, ahead = np.array([pair.lead for pair in clear]), np.array([pair.gap > 0 for pair in clear])
    if not ahead.any() or ahead.all():
        return None
    ordered = np.unique(leads)
    candidates = np.concatenate([[0.0], (ordered[1:] + ordered[:-1]) / 2])
    right = np.array([np.mean((leads > one) == ahead) for one in candidates])
    best = candidates[right > right.max() - 1e-9]
    return float(best[np.argmin(np.abs(best))])


def tables(records: Dict[str, Sequence[Record]]) -> str:
    """Return the tables: all tasks, by task, by progress of the training, and by class."""
    found, tuning = pairs_of(records, ALL), pairs_of(records, TUNING)
    if not found:
        return "No pairs are recorded."
    offsets = {name: best_offset(tuning.get(name, [])) for name in found}
    count = max(len(pairs) for pairs in found.values())
    seeds = {task: sorted({pair.seed for of in found.values() for pair in of if pair.task == task}) for task in records}
    tasks = sorted(task for task, of_task in seeds.items() if of_task)
    seen = "; ".join(f"{task}: {', '.join(map(str, seeds[task]))}" for task in tasks)
    told = (
        f"{count} pairs of a teacher and a student during its training (seeds of {seen}). *Right*: the share of pairs "
        f"with a gap of more than {CLEAR:.0f} point in the figure whose sign the scores give; in brackets of those in "
        "which the student is ahead, and behind. *At the offset*: the same where the student counts as ahead from "
        "another lead than 0 on, the one that is right most often on the seeds from 100 on. Correlations are of lead "
        "and gap, means over tasks."
    )
    parts = [told, _overall(found, offsets)]
    by_task = {task: lambda pair, task=task: pair.task == task for task in tasks}
    parts.append("### By task: right, and at the offset\n\n" + _split(found, offsets, by_task))
    by_quarter = {name: lambda pair, at=at: pair.quarter == at for at, name in enumerate(QUARTERS)}
    parts.append("### By quarter of the training: right, and at the offset\n\n" + _split(found, offsets, by_quarter))
    of_classes = class_pairs_of(records, ALL)
    if of_classes:
        labels = sorted({pair.label for pairs in of_classes.values() for pair in pairs})
        by_label = {label: lambda pair, label=label: pair.label == label for label in labels}
        parts.append(
            "### By class: right, without an offset\n\n"
            + _split(of_classes, {}, {"all": lambda pair: True, **by_label}, shown=lambda of: f"{_percent(of.right)}")
        )
    return "\n\n".join(parts)


def _overall(found: Dict[str, List[Pair]], offsets: Dict[str, Optional[float]]) -> str:
    rows = []
    for name, pairs in found.items():
        plain, offset = agreement(pairs), offsets[name]
        of_tasks = [agreement([pair for pair in pairs if pair.task == task]) for task in {pair.task for pair in pairs}]
        rows.append(
            [
                name,
                plain.pairs,
                plain.clear,
                _shares(plain),
                "" if offset is None else _shares(agreement(pairs, offset=offset)),
                "" if offset is None else f"{offset:+.4f}",
                *(_mean([getattr(of, which) for of in of_tasks]) for which in ("pearson", "spearman")),
            ]
        )
    headers = ["validator", "pairs", "clear", "right", "at the offset", "offset", "Pearson r", "Spearman r"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _split(
    pairs: Dict[str, List[Pair]],
    offsets: Dict[str, Optional[float]],
    parts: Dict[str, Callable[[Pair], bool]],
    *,
    shown: Optional[Callable[[Agreement], str]] = None,
) -> str:
    """Return a row per validator and a column per part, each with its number of clear gaps in the heading."""
    rows, counts = [], dict.fromkeys(parts, 0)
    for validator, of_validator in pairs.items():
        row = [validator]
        for name, belongs in parts.items():
            chosen = [pair for pair in of_validator if belongs(pair)]
            plain, offset = agreement(chosen), offsets.get(validator)
            counts[name] = max(counts[name], plain.clear)
            if shown is not None:
                row.append(shown(plain))
                continue
            at = None if offset is None else agreement(chosen, offset=offset).right
            row.append(", ".join(filter(None, [_percent(plain.right), _percent(at)])))
        rows.append(row)
    headers = ["validator", *(f"{name} ({counts[name]})" for name in parts)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def figure(records: Dict[str, Sequence[Record]]) -> Figure:
    """Draw leads against gaps, a panel for each validator, a colour and a marker for each task.

    The points are thousands: they are drawn as an image, what is written as text.
    """
    pairs = pairs_of(records, ALL)
    tasks = sorted({pair.task for of in pairs.values() for pair in of})
    columns = 4
    rows = -(-len(pairs) // columns)
    drawn = Figure(figsize=(6.5, 1.5 * rows + 0.5), dpi=150, constrained_layout=True)
    axes = drawn.subplots(rows, columns, squeeze=False)
    for axis, (name, of) in zip(axes.flat, pairs.items()):
        for task, color, marker in zip(tasks, OKABE_ITO[1:], "o^sDv"):
            chosen = [pair for pair in of if pair.task == task]
            axis.scatter(
                [pair.gap for pair in chosen],
                [pair.lead for pair in chosen],
                s=[9 if pair.quarter == 3 else 3 for pair in chosen],
                alpha=0.6,
                linewidths=0,
                color=color,
                marker=marker,
                rasterized=True,
            )
            axis.scatter([], [], s=16, color=color, marker=marker, label=task)
        axis.axhline(0, color="0.6", linewidth=0.6)
        axis.axvline(0, color="0.6", linewidth=0.6)
        axis.set_title(name, fontsize=7)
        axis.tick_params(labelsize=6)
    for axis in list(axes.flat)[len(pairs) :]:
        axis.set_visible(False)
    drawn.supxlabel(
        "student − teacher in accuracy or mIoU, points (large: the last quarter of the training)", fontsize=8
    )
    drawn.supylabel("student − teacher in the validator's score", fontsize=8)
    axes[0, 0].legend(fontsize=6, frameon=False, borderpad=0, handletextpad=0)
    return drawn


def _looks(records: Dict[str, Sequence[Record]], seeds: Sequence[int]) -> Iterable[Tuple[str, Record, Record]]:
    for task, of_task in records.items():
        latest = {(record["setting"], record["seed"], record["variant"]): record for record in of_task}
        for record in latest.values():
            if record["seed"] in seeds:
                for look in record["looks"]:
                    yield task, record, look


def _quarter(record: Record, look: Record) -> int:
    return min(3, 4 * (look["step"] - 1) // record["steps"])


def _difference(ours: Optional[float], theirs: Optional[float]) -> Optional[float]:
    return None if ours is None or theirs is None else ours - theirs


def _mean(values: Sequence[Optional[float]]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.2f}" if known else ""


def _shares(of: Agreement) -> str:
    return f"{_percent(of.right)} ({_percent(of.ahead) or '–'}, {_percent(of.behind) or '–'})"


def _percent(share: Optional[float]) -> str:
    return "" if share is None else f"{100 * share:.0f}%"
