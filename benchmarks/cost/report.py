"""docs/cost.md, from the committed records alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

from benchmarks.cost.figures import Figure, from_dict, table
from clda_core import CldaError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "records" / "cost"
START, END = "<!-- generated from benchmarks/records/cost -->", "<!-- /generated -->"
TITLES = {
    "iteration": "An iteration",
    "weights": "The weight update alone",
    "saliency": "One observation",
    "distillation": "The KD loss",
    "memory": "Peak memory of training",
    "scaling": "Larger and deeper networks",
    "imports": "Import",
    "synchronisation": "Waiting for the device",
}


def read(path: Path) -> Tuple[Dict[str, Any], List[Figure]]:
    """Return a run's provenance and its figures.

    Raises:
        CldaError: If the file is no whole record of a run.
    """
    try:
        run, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {**run, "versions": dict(run["versions"])}, [from_dict(line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CldaError(
            f"{path.name} is no record ({error}). Fix: python -m benchmarks.cost --record {path}"
        ) from error


def write_report(*, folder: Path = FOLDER, page: Path = ROOT / "docs" / "cost.md", check: bool = False) -> int:
    """Fill the generated part of the page; the text around it is written by hand.

    Args:
        folder: Of the records, one file a device.
        page: What to write.
        check: Only compare, and fail if the page is not what the records say.

    Raises:
        CldaError: If there are no records, or the page has no place for them.
    """
    parts = [_section(*read(path)) for path in sorted(folder.glob("*.jsonl"))]
    if not parts:
        raise CldaError(
            f"no records in {folder.name}/. Fix: python -m benchmarks.cost --record {folder.name}/cpu.jsonl"
        )
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise CldaError(f"{page.name} has no place for the tables. Fix: put {START} and {END} into it")
    generated = f"{before}{START}\n" + "\n\n".join(parts) + f"\n{END}{after}"
    if check:
        if generated != text:
            print(f"cost: {page.name} is not what the records say; run the report", file=sys.stderr)
            return 1
        return 0
    page.write_text(generated, encoding="utf-8")
    return 0


def _section(run: Dict[str, Any], figures: List[Figure]) -> str:
    missed = [one for one in figures if one.missed]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [
        f"## {'On a GPU' if run['device'] == 'cuda' else 'On a CPU'}",
        f"`{run['run']}` on {run['machine']}, {run['started'][:10]}; {versions}. {run['note']}".rstrip(),
        f"{sum(one.judged for one in figures)} budgets, {len(missed)} missed"
        + (": " + "; ".join(f"{one.what} ({one.where})" for one in missed) if missed else "")
        + ".",
    ]
    for part, title in TITLES.items():
        of_part = [one for one in figures if one.part == part]
        if of_part:
            lines += [f"### {title}", table(of_part)]
    return "\n\n".join(lines)
