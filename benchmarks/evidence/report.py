"""docs/evidence.md and its figures, from the records alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import matplotlib
import numpy as np
from tabulate import tabulate

from benchmarks.evidence.records import FOLDER, Record, Records
from benchmarks.evidence.statistics import Difference, holm, paired
from benchmarks.evidence.variants import FROZEN, VARIANTS
from clda_core import CldaError

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "clda"

DOCS = Path(__file__).resolve().parents[2] / "docs"
REPORTED = range(10)
Runs = Dict[str, Dict[int, Record]]
GROUPS = {
    "main": "The main comparison",
    "control": "Controls: is it the student, or just more training?",
    "cotrained": "With a teacher that the host trains on",
    "selection": "Which layers",
    "saliency": "Which saliency",
    "update": "Which update",
    "loss": "Which KD loss",
}


def runs_of(records: Sequence[Record], seeds: Sequence[int] = REPORTED) -> Dict[str, Runs]:
    """Return the latest record by setting, variant and seed, of the given seeds and known variants."""
    settings: Dict[str, Runs] = {}
    for record in records:
        if record["seed"] in seeds and record["variant"] in VARIANTS:
            of_setting = settings.setdefault(record["setting"], {})
            of_setting.setdefault(record["variant"], {})[record["seed"]] = record
    return settings


def difference(runs: Runs, variant: str, role: str, *, to: str = FROZEN) -> Optional[Difference]:
    """Return the paired difference of a variant's ``student`` or ``teacher`` to another variant's."""
    pairs = [
        (_figure(record, role), _figure(runs[to][seed], role))
        for seed, record in sorted(runs.get(variant, {}).items())
        if seed in runs.get(to, {})
    ]
    whole = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    return paired([ours for ours, _ in whole], [theirs for _, theirs in whole])


def tables(runs: Runs) -> str:
    """Return one table a group, of means and paired differences to frozen-teacher KD."""
    parts: List[str] = []
    for group, heading in GROUPS.items():
        names = [name for name, variant in VARIANTS.items() if variant.group == group and name in runs]
        if not names:
            continue
        compared = [name for name in names if name != FROZEN]
        found = {(name, role): difference(runs, name, role) for name in compared for role in ("student", "teacher")}
        adjusted = {
            role: holm({name: item.p for (name, whose), item in found.items() if whose == role and item is not None})
            for role in ("student", "teacher")
        }
        rows = []
        for name in names:
            records = runs[name]
            row: List[Any] = [VARIANTS[name].title, len(records)]
            for role in ("student", "teacher"):
                row += [_mean(records, role), _described(found.get((name, role)), adjusted[role].get(name))]
            row.append(_cost(runs, name))
            rows.append(row)
        headers = ["", "seeds", "student", "vs frozen KD", "teacher", "vs frozen KD", "time"]
        parts.append(f"### {heading}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}")
    return "\n\n".join(parts)


def cost_figure(runs: Runs, path: Path) -> None:
    """Draw the gains of both models against the time a variant takes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharex=True, constrained_layout=True)
    for axis, role in zip(axes, ("student", "teacher")):
        for name in runs:
            item, cost = difference(runs, name, role), _cost_ratio(runs, name)
            if item is None or cost is None:
                continue
            bars = [[item.mean - item.low], [item.high - item.mean]]
            axis.errorbar([cost], [item.mean], yerr=bars, fmt="o", capsize=2, label=VARIANTS[name].title)
            axis.annotate(
                VARIANTS[name].title, (cost, item.mean), fontsize=6, xytext=(3, 3), textcoords="offset points"
            )
        axis.axhline(0, color="0.7", linewidth=0.8)
        axis.axvline(1.1, color="0.7", linewidth=0.8, linestyle=":")
        axis.set_xlabel("time, in units of frozen-teacher KD")
        axis.set_ylabel(f"{role}: points above frozen-teacher KD")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write_report(*, folder: Path = FOLDER, docs: Path = DOCS, check: bool = False) -> int:
    """Fill the generated part of ``docs/evidence.md``; the text around it is written by hand.

    Args:
        folder: Of the records.
        docs: Of the page.
        check: Only compare, and fail if the page is not what the records say.

    Raises:
        CldaError: If there are no records.
    """
    parts: List[str] = []
    for path in sorted(folder.glob("*.jsonl")):
        for setting, runs in sorted(runs_of(Records(path).read()).items()):
            figure = Path("assets/evidence") / f"{setting}.svg"
            if not check:
                cost_figure(runs, docs / figure)
            counts = sorted({seed for of_variant in runs.values() for seed in of_variant})
            picture = f"![Gain against time]({figure.as_posix()})"
            parts.append("\n\n".join([f"## {setting}", _provenance(runs, counts), tables(runs), picture]))
    if not parts:
        raise CldaError(f"no records in {folder.name}/. Fix: python -m benchmarks.evidence digits --seeds 0-9")
    page = docs / "evidence.md"
    if not page.exists():
        raise CldaError(f"docs/evidence.md is missing. Fix: make it, with {START} and {END} where the tables go")
    before, _, after = _split(page.read_text(encoding="utf-8"))
    text = f"{before}{START}\n" + "\n\n".join(parts) + f"\n{END}{after}"
    if check:
        if text != page.read_text(encoding="utf-8"):
            print("evidence: docs/evidence.md is not what the records say; run the report", file=sys.stderr)
            return 1
        return 0
    page.write_text(text, encoding="utf-8")
    print("\n\n".join(parts))
    return 0


START, END = "<!-- generated from benchmarks/records -->", "<!-- /generated -->"


def _split(page: str) -> Tuple[str, str, str]:
    before, start, rest = page.partition(START)
    inside, end, after = rest.partition(END)
    if not start or not end:
        raise CldaError(f"docs/evidence.md has no place for the tables. Fix: put {START} and {END} into it")
    return before, inside, after


def _provenance(runs: Runs, seeds: Sequence[int]) -> str:
    records = [record for of_variant in runs.values() for record in of_variant.values()]
    versions = sorted({f"torch {record['versions']['torch']}" for record in records})
    commits = sorted({record["versions"]["commit"] for record in records})
    metric = records[0]["metric"]
    named = ", ".join(commits[:4]) + (", …" if len(commits) > 4 else "")
    return (
        f"{metric} on target data in %, means over seeds (of {seeds[0]} to {seeds[-1]}); differences are paired, with "
        f"their 95% bootstrap interval; a star where Holm's correction over the table leaves p < 0.05. "
        f"{len(records)} runs, "
        f"{', '.join(versions)}, commit {named}."
    )


def _figure(record: Record, role: str) -> Optional[float]:
    figures = record[role]
    if figures is None and role == "teacher":
        figures = record["teacher_before"]
    return None if figures is None else float(figures[record["metric"]])


def _mean(records: Dict[int, Record], role: str) -> str:
    figures = [figure for record in records.values() for figure in [_figure(record, role)] if figure is not None]
    return f"{np.mean(figures):.1f}" if figures else ""


def _described(item: Optional[Difference], adjusted: Optional[float]) -> str:
    if item is None:
        return ""
    star = "*" if adjusted is not None and adjusted < 0.05 else ""
    return f"{item.mean:+.2f} [{item.low:+.2f}, {item.high:+.2f}]{star}"


def _cost_ratio(runs: Runs, name: str) -> Optional[float]:
    """Return the median ratio of processor time: other jobs on the machine would distort the time by the clock."""
    frozen = runs.get(FROZEN, {})
    pairs = [(record, frozen[seed]) for seed, record in runs.get(name, {}).items() if seed in frozen]
    ratios = [
        ours["processor_seconds"] / theirs["processor_seconds"]
        for ours, theirs in pairs
        if "processor_seconds" in ours and "processor_seconds" in theirs
    ]
    return float(np.median(ratios)) if ratios else None


def _cost(runs: Runs, name: str) -> str:
    ratio = _cost_ratio(runs, name)
    return "" if ratio is None else f"{ratio:.2f}×"
