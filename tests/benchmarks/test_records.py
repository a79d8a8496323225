"""The committed records: which are withdrawn, and what the README says from them."""

import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest

pytest.importorskip("scipy", reason="the tables need scipy, which is no dependency of the package")
pytest.importorskip("tabulate", reason="the tables need tabulate, which is no dependency of the package")

from benchmarks.evidence.records import FOLDER, Records
from benchmarks.evidence.tables import FORMER, Runs, difference, runs_of

ROOT = Path(__file__).resolve().parents[2]
# The update had a fused Adam that took gradients of any layout from the first of these moments to the second.
FAULTY = ("2026-11-23T02:52:03Z", "2026-11-25T16:00:00Z")
WITH_REDUCTION = re.compile(r"\.stages\.[01]\.blocks\.\d+$")  # layers with a sequence_reduction convolution


def _by_fused_adam(record: Dict[str, Any]) -> bool:
    if not (record.get("rounds") or {}).get("made") or not FAULTY[0] < record["finished"] < FAULTY[1]:
        return False
    update = record["config"]["update"]
    update = update.get("update", update)
    return bool(update["class"].endswith(".MaskedDistillation") and update["optimizer"] is None)


@pytest.mark.parametrize("name", ["digits", "letters", "street", "street-narrow"])
def test_exactly_the_streets_rounds_by_the_faulty_optimizer_are_withdrawn(name: str) -> None:
    for record in Records(FOLDER / f"{name}.jsonl").read():
        expected = name.startswith("street") and _by_fused_adam(record)
        assert bool(record.get("withdrawn")) == expected, (record["variant"], record["seed"], record["finished"])


@pytest.mark.parametrize(("name", "runs"), [("street", 24), ("street-narrow", 0)])
def test_the_reason_says_whether_rounds_changed_a_layer_of_that_layout(name: str, runs: int) -> None:
    withdrawn = [record for record in Records(FOLDER / f"{name}.jsonl").read() if record.get("withdrawn")]
    changed = [
        any(count and WITH_REDUCTION.search(layer) for layer, count in record["rounds"]["updates"].items())
        for record in withdrawn
    ]
    assert sum(changed) == runs
    for record, hit in zip(withdrawn, changed):
        assert record["withdrawn"].startswith("their rounds changed layers" if hit else "made with the fused Adam")


# ------------------------------------------------------------------------------------------------------ README's table

ROWS: Tuple[Tuple[str, str], ...] = (
    *(("digits", name) for name in ("uda", "frozen", "frozen-dist", "clda", "teacher-longer")),
    *(("street", name) for name in ("uda", "frozen", "frozen-dist", "clda", "frozen-dist-init", "clda-init")),
    *(("street-narrow", name) for name in ("uda", "frozen", "frozen-dist", "clda")),
    *(("letters", name) for name in ("uda", "frozen", "frozen-dist", "clda")),
)


def test_the_readmes_figures_are_those_of_the_records() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = text.partition("<!-- results -->")[2].partition("<!-- /results -->")[0]
    lines = [line for line in results.splitlines() if line.startswith("| ") and "| teacher | student |" not in line]
    assert len(lines) == len(ROWS)
    runs: Dict[str, Runs] = {}
    for name in dict(ROWS):
        (runs[name],) = runs_of(Records(FOLDER / f"{name}.jsonl").read(), FORMER).values()
    for line, (name, variant) in zip(lines, ROWS):
        cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
        if variant not in runs[name]:
            assert cells == ["*withdrawn*", "*withdrawn*"], line
            continue
        for role, cell in zip(("teacher", "student"), cells):
            assert _numbers(cell) in _allowed(runs[name], variant, role), line


def _numbers(cell: str) -> List[str]:
    return re.findall(r"[+-]?\d+\.\d+", cell.replace("*", ""))


def _allowed(runs: Runs, variant: str, role: str) -> List[List[str]]:
    """Return what a cell may say: nothing, the mean, or the mean with the difference to frozen KD and its interval."""
    figures: List[Optional[float]] = [(record[role] or {}).get(record["metric"]) for record in runs[variant].values()]
    if None in figures:
        return [[]]
    mean = f"{sum(filter(None, figures)) / len(figures):.1f}"
    item = difference(runs, variant, role)
    assert item is not None
    told = [f"{item.mean:+.1f}", f"{item.low:.1f}", f"{item.high:.1f}"]
    return [[mean, *told]] if item.mean and variant != "uda" else [[mean]]
