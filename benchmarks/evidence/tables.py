"""Tables of means and paired differences, from records."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from tabulate import tabulate

from benchmarks.evidence.records import Record, key_of, standing
from benchmarks.evidence.statistics import Difference, holm, paired
from benchmarks.evidence.variants import CLDA, FROZEN, FROZEN_DIST, FROZEN_DIST_INIT, TURNS, UDA, VARIANTS

REPORTED = range(20, 30)
FRESH = range(30, 40)  # of benchmarks whose choices were made knowing some of those; run once, after the last choice
FORMER = range(10)  # reported for the defaults before; settings and defaults were chosen knowing some of them
Runs = Dict[str, Dict[int, Record]]
GROUPS = {
    "main": "The main comparison",
    "init": "With the student initialised from the teacher's layers",
    "in-turns": "In turns: a trained student teaches the teacher of the next",
    "control": "Controls: is it the student, or just more training?",
    "lead": "Controls: who leads, and is the student needed?",
    "cotrained": "With a teacher that the host trains on",
    "schedule": "How often",
    "selection": "Which layers",
    "former": "Which layers, with the former defaults: KL, and rounds in the second half of the training",
    "saliency": "Which saliency",
    "update": "Which update",
    "loss": "Which KD loss",
}
COMPARED_WITH_CLDA = ("schedule", "saliency", "update")  # one part of it each; the other groups with frozen-teacher KD

BOTH = ("student", "teacher")
CONTRASTS: Tuple[Tuple[str, str, Tuple[str, ...]], ...] = (
    (CLDA, FROZEN_DIST, BOTH),
    ("clda-init", "frozen-init", BOTH),
    ("clda-init", "frozen-dist-init", BOTH),
    (CLDA, "without-student", BOTH),
    ("clda-init", "without-student-init", BOTH),
    (CLDA, "lead-ignored", BOTH),
    ("lead-ignored", "without-student", BOTH),
    (CLDA, "level-trusted", BOTH),
    ("level-trusted", "without-student", BOTH),
    ("clda-init", "level-trusted-init", BOTH),
    ("level-trusted-init", "without-student-init", BOTH),
    ("anchored", "anchored-alone", BOTH),
    ("anchored-init", "anchored-alone-init", BOTH),
    ("anchored-init", "clda-init", BOTH),
    ("keep-best-init", "clda-init", BOTH),
    ("lead-known", CLDA, BOTH),
    (CLDA, "select-uniform", BOTH),
    (CLDA, "select-lowest", BOTH),
    (CLDA, "select-random", BOTH),
    (CLDA, "select-all", BOTH),
    (CLDA, "select-highest", BOTH),
    (CLDA, "teacher-longer", ("teacher",)),
    (CLDA, TURNS, BOTH),
    (TURNS, "frozen-twice", BOTH),
    (TURNS, "born-again", ("student",)),
    (TURNS, "frozen-longer", ("student",)),
    (TURNS, "teacher-longer", ("teacher",)),
    (TURNS, "turns-random", BOTH),
    (TURNS, "turns-highest", BOTH),
    (TURNS, "turns-all", BOTH),
    ("former", "former-random", BOTH),
    ("former", "former-all", BOTH),
    ("former", "former-highest", BOTH),
    ("clda-cotrained", "frozen-cotrained", BOTH),
)


def runs_of(records: Sequence[Record], seeds: Sequence[int] = REPORTED) -> Dict[str, Runs]:
    """Return the latest record by setting, variant and seed, of the given seeds and known variants.

    Withdrawn records are left out.
    """
    settings: Dict[str, Runs] = {}
    for record in standing(records):
        if record["seed"] in seeds and record["variant"] in VARIANTS:
            of_setting = settings.setdefault(record["setting"], {})
            of_setting.setdefault(record["variant"], {})[record["seed"]] = record
    return settings


def withdrawn_of(records: Sequence[Record], seeds: Sequence[int] = REPORTED) -> Dict[str, Runs]:
    """Return, as :func:`runs_of` does, the withdrawn runs that have not been made anew."""
    made = {key_of(record) for record in standing(records)}
    settings: Dict[str, Runs] = {}
    for record in records:
        known = record["seed"] in seeds and record["variant"] in VARIANTS
        if known and record.get("withdrawn") and key_of(record) not in made:
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


def baseline(name: str, *, alike: bool) -> str:
    """Return the frozen-teacher KD that a variant is compared with.

    Args:
        name: Of the variant.
        alike: Whether by the loss of CLDA, from the start that the variant has; otherwise by KL, from the student's
            own start.
    """
    if not alike:
        return FROZEN
    return FROZEN_DIST_INIT if VARIANTS[name].start == "teacher" else FROZEN_DIST


def tables(runs: Runs, withdrawn: Optional[Runs] = None, *, alike: bool) -> str:
    """Return one table per group: means, and paired differences to frozen KD, or to CLDA with one part replaced.

    Args:
        runs: By variant and seed.
        withdrawn: Runs whose figures do not count; a variant that has no others gets a row that says so, and stays in
            the family that Holm's correction is over.
        alike: Which frozen KD, see :func:`baseline`.
    """
    parts: List[str] = []
    gone: Mapping[str, Any] = withdrawn or {}
    for group, heading in GROUPS.items():
        of_group = [name for name, variant in VARIANTS.items() if variant.group == group]
        names = [name for name in of_group if name in runs]
        if not names and not any(name in gone for name in of_group):
            continue
        called = "CLDA" if group in COMPARED_WITH_CLDA else "frozen KD"
        bases = {name: CLDA if called == "CLDA" else baseline(name, alike=alike) for name in names}
        found = {
            (name, role): difference(runs, name, role, to=base)
            for name, base in bases.items()
            if name != base
            for role in BOTH
        }
        uncounted = {name: 1.0 for name in of_group if name in gone and name not in runs}
        adjusted = {
            role: holm(
                {
                    **uncounted,
                    **{name: item.p for (name, whose), item in found.items() if whose == role and item is not None},
                }
            )
            for role in BOTH
        }
        rows = []
        for name in of_group:
            if name not in runs:
                if name in gone:
                    rows.append([VARIANTS[name].title, f"withdrawn ({len(gone[name])})", *[""] * 5])
                continue
            records = runs[name]
            row: List[Any] = [VARIANTS[name].title, len(records)]
            for role in BOTH:
                row += [_mean(records, role), _described(found.get((name, role)), adjusted[role].get(name))]
            row.append(_cost(runs, name, alike=alike))
            rows.append(row)
        headers = ["", "seeds", "student", f"vs {called}", "teacher", f"vs {called}", "time"]
        parts.append(f"### {heading}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}")
    return "\n\n".join([*parts, *contrasts(runs, gone), *per_class(runs)])


def contrasts(runs: Runs, withdrawn: Optional[Mapping[str, Any]] = None) -> List[str]:
    """Return a table of the paired differences between variants of which neither is frozen-teacher KD.

    Comparisons with withdrawn runs stay in the family that Holm's correction is over.
    """
    found = {
        (f"{_titled(variant)} − {_titled(other)}", role): item
        for variant, other, roles in CONTRASTS
        for role in roles
        for item in [difference(runs, variant, role, to=other)]
        if item is not None
    }
    if not found:
        return []
    uncounted = {
        f"{_titled(variant)} − {_titled(other)} {role}": 1.0
        for variant, other, roles in CONTRASTS
        for role in roles
        if withdrawn and (variant in withdrawn or other in withdrawn)
    }
    adjusted = holm({**uncounted, **{" ".join(key): item.p for key, item in found.items()}})
    rows = [[*key, item.seeds, _described(item, adjusted[" ".join(key)])] for key, item in found.items()]
    headers = ["", "of the", "seeds", "difference"]
    return [f"### Head to head\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}"]


def _titled(name: str) -> str:
    variant = VARIANTS[name]
    return f"{variant.title} (former defaults)" if variant.group == "former" else variant.title


def per_class(runs: Runs) -> List[str]:
    """Return a table of the mean IoU of each class over the seeds that all have, where the records have it."""
    names = [name for name in (UDA, FROZEN, FROZEN_DIST, CLDA) if name in runs]
    seeds = set.intersection(*(set(runs[name]) for name in names)) if names else set()
    columns = [
        (f"{VARIANTS[name].title}: {role}", [runs[name][seed][role] for seed in sorted(seeds)])
        for name in names
        for role in ("student", "teacher")
        if seeds and all(runs[name][seed][role] for seed in seeds)
    ]
    classes = [key for key in (columns[0][1][0] if columns else ()) if key.startswith("IoU ")]
    if not classes:
        return []
    rows = [
        [key[4:], *(f"{np.mean([figures[key] for figures in every]):.1f}" for _, every in columns)] for key in classes
    ]
    headers = ["IoU", *(title for title, _ in columns)]
    return [
        f"### By class, over {len(seeds)} seeds\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}"
    ]


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


def cost_ratio(runs: Runs, name: str, *, alike: bool) -> Optional[float]:
    """Return the median ratio of processor time: other jobs on the machine would distort the time by the clock.

    Of a run with rounds or in turns it is its own overhead over frozen-teacher KD, see
    :func:`~benchmarks.evidence.training.overhead`.
    """
    records = runs.get(name, {}).values()
    with_rounds = any((record.get("rounds") or {}).get("made") for record in records) or VARIANTS[name].after_turn
    if with_rounds and not VARIANTS[name].cotrained:
        own = [record["overhead"] for record in records if record.get("overhead")]
        return float(np.median(own)) if own else None
    plain = runs.get(baseline(name, alike=alike), {})
    pairs = [(record, plain[seed]) for seed, record in runs.get(name, {}).items() if seed in plain]
    ratios = [
        ours["processor_seconds"] / theirs["processor_seconds"]
        for ours, theirs in pairs
        if "processor_seconds" in ours and "processor_seconds" in theirs
    ]
    return float(np.median(ratios)) if ratios else None


def _cost(runs: Runs, name: str, *, alike: bool) -> str:
    ratio = cost_ratio(runs, name, alike=alike)
    return "" if ratio is None else f"{ratio:.2f}×"
