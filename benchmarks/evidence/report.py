"""docs/evidence.md, docs/evidence-former.md and their figures, from the records alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Dict, List, Mapping, Sequence, Tuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.evidence import validator_tables
from benchmarks.evidence.observation import NETWORKS, TRAININGS, overall
from benchmarks.evidence.records import FOLDER, Record, Records, validator_records
from benchmarks.evidence.statistics import Difference
from benchmarks.evidence.tables import (
    FORMER,
    FRESH,
    REPORTED,
    Runs,
    baseline,
    cost_ratio,
    difference,
    runs_of,
    tables,
    withdrawn_of,
)
from benchmarks.evidence.variants import CLDA, FROZEN, FROZEN_DIST, TURNS, UDA, VARIANTS
from clda_core import CldaError
from examples.classification.figures import OKABE_ITO, Label, label_at_the_right

SVG = {"svg.hashsalt": "clda", "svg.fonttype": "none"}
MAIN = (
    *(CLDA, "clda-init", "anchored", "anchored-init", TURNS, FROZEN_DIST),
    *(FROZEN, UDA, "select-uniform", "without-student", "former"),
)
"""The variants that a figure names: of those that were run the first six, and others where fewer are left."""
GREY = " (grey: other variants, see the tables)"
OF_DOMAIN = {
    "source": {"color": OKABE_ITO[1], "marker": "o"},
    "target": {"color": OKABE_ITO[2], "marker": "x", "linestyle": "--"},
}

DOCS = Path(__file__).resolve().parents[2] / "docs"


def cost_figure(runs: Runs, path: Path, *, alike: bool) -> None:
    """Draw the gains of both models against the time a variant takes; ``alike`` as of :func:`baseline`.

    At most six variants are named, each in a colour of its own; the others are grey, and the tables name them. A gain
    far outside those of most variants is drawn at the edge as an arrowhead.
    """
    costs = {name: cost_ratio(runs, name, alike=alike) for name in runs if name != baseline(name, alike=alike)}
    shown = {name: cost for name, cost in costs.items() if cost is not None}
    main = [name for name in dict.fromkeys([*MAIN, *VARIANTS]) if name in shown][: len(OKABE_ITO)]
    figure = Figure(figsize=(6.5, 5.5), constrained_layout=True)
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, role in ((above, "student"), (below, "teacher")):
        gains = {name: difference(runs, name, role, to=baseline(name, alike=alike)) for name in shown}
        known = {name: gain for name, gain in gains.items() if gain is not None}
        low, high = _limits(known, main)
        axes.set_ylim(low, high)
        labels = []
        for name in sorted(known, key=lambda name: name in main):  # the named ones last, over the others
            gain, cost = known[name], shown[name]
            color = OKABE_ITO[main.index(name)] if name in main else "0.7"
            if not low <= gain.mean <= high:
                edge, marker = (low, "v") if gain.mean < low else (high, "^")
                axes.plot([cost], [edge], marker=marker, color=color, markersize=5, clip_on=False, linestyle="")
            else:
                bars = [[gain.mean - gain.low], [gain.high - gain.mean]]
                style = {"marker": "o", "markersize": 4, "linewidth": 0.8, "capsize": 2 if name in main else 0}
                axes.errorbar([cost], [gain.mean], yerr=bars, color=color, **style)
            if name in main:
                at = min(high, max(low, gain.mean))
                labels.append(Label(f"{VARIANTS[name].title} {round(gain.mean, 1) + 0.0:+.1f}", cost, at, color))
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_ylabel(f"{role}: points above frozen KD", fontsize=8)
        axes.tick_params(labelsize=7)
        label_at_the_right(axes, labels, size=6.5)
    below.set_xlabel("time, in units of frozen KD" + (GREY if len(shown) > len(main) else ""), fontsize=8)
    _save(figure, path)


def _limits(gains: Mapping[str, Difference], main: Sequence[str]) -> Tuple[float, float]:
    """Return what the middle nine tenths of the gains, 0 and the intervals of those named span, and a margin."""
    middle = np.quantile([*(gain.mean for gain in gains.values()), 0.0], [0.05, 0.95])
    ends = [end for name in main if name in gains for end in (gains[name].low, gains[name].high)]
    low, high = min([*middle, *ends]), max([*middle, *ends])
    margin = 0.05 * max(high - low, 0.5)
    return float(low - margin), float(high + margin)


def _save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same for the same records, with letters as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(SVG):
        figure.savefig(path, metadata={"Date": None})


def observation_table(records: Sequence[Record]) -> str:
    """Return the salient share of each network, by training and domain."""
    rows = []
    for network in NETWORKS:
        for training in TRAININGS:
            chosen = [record for record in records if record["variant"] == f"{network}-{training}"]
            if not chosen:
                continue
            row = [network, {"source": "source only", "uda": "UDA"}[training], str(len(chosen))]
            row.append(f"{np.mean([record['target'][record['metric']] for record in chosen]):.1f}")
            for threshold in ("own_threshold", "source_threshold"):
                for domain in ("source", "target"):
                    salient = [100 * overall(record[threshold][domain], record["sizes"]) for record in chosen]
                    row.append(f"{np.mean(salient):.1f} ± {np.std(salient):.1f}")
            rows.append(row)
    shares = ["source", "target", "source, its threshold", "target, source's threshold"]
    headers = ["network", "trained by", "seeds", "target figure", *shares]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def teaching_table(records: Sequence[Record]) -> str:
    """Return what a fixed student made of the teacher, by the layers that it was allowed to move."""
    metric = records[0]["metric"]
    rows = [["(before)", "", *_means([record["before"] for record in records], metric)]]
    for name in records[0]["after"]:
        chosen = [record["after"][name] for record in records]
        share = np.mean([100 * figures["share_of_parameters"] for figures in chosen])
        rows.append([name, f"{share:.0f}%", *_means(chosen, metric)])
    student = np.mean([record["student"][metric] for record in records])
    headers = ["layers by LSR", "of the parameters", "teacher", "KL from the student", "agreement"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return f"Means over {len(records)} seeds; the student's figure is {student:.1f}.\n\n{table}"


def _means(figures: Sequence[Record], metric: str) -> List[str]:
    teacher = np.mean([figure["teacher"][metric] for figure in figures])
    divergence, agreement = (np.mean([figure[key] for figure in figures]) for key in ("divergence", "agreement"))
    return [f"{teacher:.1f}", f"{divergence:.3f}", f"{100 * agreement:.1f}%"]


def observation_figure(records: Sequence[Record], path: Path) -> None:
    """Draw each layer's LSR on both domains, one panel a network and training."""
    figure = Figure(figsize=(6.5, 4.5), constrained_layout=True)
    panels = figure.subplots(len(NETWORKS), len(TRAININGS), sharey=True, squeeze=False)
    for row, network in zip(panels, NETWORKS):
        for axes, training in zip(row, TRAININGS):
            chosen = [record for record in records if record["variant"] == f"{network}-{training}"]
            for domain, style in OF_DOMAIN.items():
                rates = [list(record["own_threshold"][domain].values()) for record in chosen]
                if rates:
                    mean = np.mean(rates, axis=0)
                    axes.plot(mean, linewidth=1, markersize=3.5, label=f"{domain} images", **style)
            axes.set_ylim(0, 1)
            axes.set_title(f"{network}, {'source only' if training == 'source' else 'UDA'}", fontsize=8, loc="left")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.tick_params(labelsize=7)
    for axes in panels[-1]:
        axes.set_xlabel("layer, from input to output", fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("LSR", fontsize=8)
    panels[0, 0].legend(fontsize=7, frameon=False)
    _save(figure, path)


def write_report(*, folder: Path = FOLDER, docs: Path = DOCS, check: bool = False) -> int:
    """Fill the generated parts of the two pages; the text around them is written by hand.

    Args:
        folder: Of the records.
        docs: Of the pages.
        check: Only compare, and fail if a page is not what the records say.

    Raises:
        CldaError: If there are no records, or a page is missing.
    """
    parts = _sections(folder, docs, FRESH, check=check, called="fresh seeds")
    parts += _sections(folder, docs, REPORTED, check=check)
    for path in sorted((folder / "observation").glob("*.jsonl")):
        records = _latest(Records(path).standing())
        if records:
            figure = Path("assets/evidence") / f"observation-{path.stem}.svg"
            if not check:
                observation_figure(records, docs / figure)
            picture = f"![LSR by layer]({figure.as_posix()})"
            parts.append("\n\n".join([f"## The observation: {path.stem}", observation_table(records), picture]))
    for path in sorted((folder / "teaching").glob("*.jsonl")):
        records = _latest(Records(path).standing())
        if records:
            parts.append(f"## One direction alone: {path.stem}\n\n{teaching_table(records)}")
    parts += _validators(folder, docs, check=check)
    former = _sections(folder, docs, FORMER, check=check, called="former defaults", alike=False)
    if not parts and not former:
        raise CldaError(f"no records in {folder.name}/. Fix: python -m benchmarks.evidence digits --seeds 20-29")
    pages = [(docs / "evidence.md", parts), (docs / "evidence-former.md", former)]
    return max(_fill(page, of_page, check=check) for page, of_page in pages if of_page)


def _fill(page: Path, parts: Sequence[str], *, check: bool) -> int:
    """Write a page's generated part, or compare it; return the exit status."""
    if not page.exists():
        raise CldaError(f"docs/{page.name} is missing. Fix: make it, with {START} and {END} where the tables go")
    there = page.read_text(encoding="utf-8")
    before, start, rest = there.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise CldaError(f"docs/{page.name} has no place for the tables. Fix: put {START} and {END} into it")
    text = f"{before}{START}\n" + "\n\n".join(parts) + f"\n{END}{after}"
    if not check:
        page.write_text(text, encoding="utf-8")
        print("\n\n".join(parts))
    elif text != there:
        print(f"evidence: docs/{page.name} is not what the records say; run the report", file=sys.stderr)
        return 1
    return 0


def _sections(
    folder: Path, docs: Path, seeds: Sequence[int], *, check: bool, called: str = "", alike: bool = True
) -> List[str]:
    """Return a section per benchmark from the runs of some seeds, and draw its figure; ``alike`` as of `baseline`."""
    sections: List[str] = []
    for path in sorted(folder.glob("*.jsonl")):
        records = Records(path).read()
        withdrawn = withdrawn_of(records, seeds)
        for setting, runs in sorted(runs_of(records, seeds).items()):
            figure = Path("assets/evidence") / f"{'-'.join([setting, *called.split()])}.svg"
            if not check:
                cost_figure(runs, docs / figure, alike=alike)
            counts = sorted({seed for of_variant in runs.values() for seed in of_variant})
            picture = f"![Gain against time]({figure.as_posix()})"
            gone = withdrawn.get(setting, {})
            told = [_provenance(runs, counts, alike=alike), *withdrawal(gone)]
            told += [tables(runs, gone, alike=alike), picture]
            title = f"## {setting}, {called}" if called else f"## {setting}"
            sections.append("\n\n".join([title, *told]))
    return sections


def _validators(folder: Path, docs: Path, *, check: bool) -> List[str]:
    """Return the validators' section, and draw its figure."""
    records = validator_records(folder)
    if not records:
        return []
    picture = Path("assets/evidence/validators.svg")
    if not check:
        _save(validator_tables.figure(records), docs / picture)
    return [f"## The validators\n\n{validator_tables.tables(records)}\n\n![Leads against gaps]({picture.as_posix()})"]


def _latest(records: Sequence[Record]) -> List[Record]:
    """Return the records of the reported seeds, or while there are none those of the seeds reported before."""
    of_seeds = ([record for record in records if record["seed"] in seeds] for seeds in (REPORTED, FORMER))
    return next((found for found in of_seeds if found), [])


START, END = "<!-- generated from benchmarks/records -->", "<!-- /generated -->"


def withdrawal(withdrawn: Runs) -> List[str]:
    """Return a paragraph per reason: how many runs of which variants it took out of the tables."""
    by_reason: Dict[str, Dict[str, int]] = {}
    for name, of_seed in withdrawn.items():
        for record in of_seed.values():
            counts = by_reason.setdefault(record["withdrawn"], {})
            counts[name] = counts.get(name, 0) + 1
    return [
        f"**Withdrawn**, {sum(counts.values())} runs ("
        + ", ".join(f"{VARIANTS[name].title}: {counts[name]}" for name in VARIANTS if name in counts)
        + f"): {reason}."
        for reason, counts in sorted(by_reason.items())
    ]


def _provenance(runs: Runs, seeds: Sequence[int], *, alike: bool) -> str:
    records = [record for of_variant in runs.values() for record in of_variant.values()]
    versions = sorted({f"torch {record['versions']['torch']}" for record in records})
    commits = sorted({record["versions"]["commit"] for record in records})
    metric = records[0]["metric"]
    named = ", ".join(commits[:4]) + (", …" if len(commits) > 4 else "")
    return (
        f"{metric} on target data in %, means over seeds (of {seeds[0]} to {seeds[-1]}); frozen KD is "
        f"{'by the loss of CLDA, from the same start' if alike else 'by KL'}; differences are paired, with "
        f"their 95% bootstrap interval; a star where Holm's correction over the table leaves p < 0.05. "
        f"{len(records)} runs, "
        f"{', '.join(versions)}, commit {named}."
    )
