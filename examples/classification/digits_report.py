"""What the digits job leaves behind: a table, ``results.json`` and a figure."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import matplotlib
import numpy
import sklearn
import torch
from matplotlib.figure import Figure
from tabulate import tabulate

import clda_core
from clda_core import Report
from clda_core.checkpoint import atomically

from .figures import OKABE_ITO, Label, label_at_the_right


def versions() -> Dict[str, str]:
    """Return the versions that the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scikit-learn": sklearn.__version__,
        "matplotlib": matplotlib.__version__,
        "clda_core": clda_core.__version__,
    }


OVER_TEN_SEEDS = (
    "One seed says little. Over ten others, beyond KD from the frozen teacher, rounds gave the teacher\n"
    "+2.1 points [1.3, 3.4] and the student +0.1 [-0.0, 0.4] (means and 95% intervals; see docs/evidence.md)."
)

TOLERANCE = (
    "Equal commands give equal figures on one machine. Another processor, version of torch or number of threads\n"
    "rounds sums otherwise, and trainings part: of seed 0 the teacher has come out between 80.6 and 83.1, the\n"
    "student of the frozen teacher between 82.0 and 83.9."
)


def table(results: Mapping[str, Any]) -> str:
    """Lay out the accuracies: a line for each way the student was trained, with its teacher before and after.

    Args:
        results: As written to ``results.json``.
    """
    rows: List[List[str]] = []
    for title, stage in results["students"].items():
        teacher = [stage["teacher_before"], stage["teacher_after"]] if stage["uses_teacher"] else [None, None]
        seconds = f"{stage['seconds']['training']:.0f}"
        rows.append([title, *map(_percent, teacher), _percent(stage["accuracy"]), seconds])
    headers = ["student", "teacher before", "teacher after", "student", "training (s)"]
    return str(tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 4)))


def save_json(results: Mapping[str, Any], path: Path) -> None:
    """Write everything that was measured; a figure that is not finite becomes ``null``."""
    text = json.dumps(_plain(results), indent=2, allow_nan=False)
    with atomically(path) as unfinished:
        Path(unfinished).write_text(text + "\n", encoding="utf-8")


def save_figure(results: Mapping[str, Any], path: Path) -> None:
    """Draw for each student with rounds the LSR by layer and its lead over them, and the accuracies over the steps."""
    histories = {
        title: stage["report"] for title, stage in results["students"].items() if stage["report"].get("rounds")
    }
    figure = Figure(figsize=(6.0 * (len(histories) + 1), 4.5), constrained_layout=True)
    grid = figure.add_gridspec(2, len(histories) + 1, height_ratios=[2.0, 1.0])
    for column, (title, report) in enumerate(histories.items()):
        axes = figure.add_subplot(grid[0, column])
        Report.from_dict(report).plot(axes, lead_axes=figure.add_subplot(grid[1, column]))
        axes.set_title(title, fontsize=9, loc="left")
    _draw_accuracies(figure.add_subplot(grid[:, -1]), results)
    with atomically(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png")


def _draw_accuracies(axes: Any, results: Mapping[str, Any]) -> None:
    """Draw a line per network, a colour for each way to train, with its name at the right; teachers are dashed."""
    labels = []
    for (title, stage), color in zip(results["students"].items(), OKABE_ITO):
        steps = [point["step"] for point in stage["curve"]]
        for role, style in (("student", "-"), *([("teacher", "--")] if stage["uses_teacher"] else [])):
            heights = [point["accuracy" if role == "student" else role] for point in stage["curve"]]
            axes.plot(steps, heights, color=color, linestyle=style, linewidth=1.2)
            labels.append(Label(f"{title}: {role} {heights[-1]:.1f}", steps[-1], heights[-1], color))
    trained = [point["accuracy"] for stage in results["students"].values() for point in stage["curve"][1:]]
    axes.set_ylim(bottom=min(trained) - 1.0)  # the untrained start would flatten what differs
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer step of the student", fontsize=8)
    axes.set_ylabel("accuracy on the target (%)", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    label_at_the_right(axes, labels)


def _percent(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.1f}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
