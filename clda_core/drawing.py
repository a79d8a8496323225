"""The figure of a report: LSR by layer over the rounds, and below it who led and how far the student was trusted.

Matplotlib is imported when a figure is asked for. Its oldest supported version, 3.3, knows the constrained layout by
the argument ``constrained_layout=True`` alone.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple, cast

from typing_extensions import Literal

from .errors import CldaError
from .history import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION = "#0072B2", "#D55E00"
"""Of Okabe and Ito's palette, which colour-blind readers tell apart."""

UNKNOWN: Dict[str, Any] = {"facecolor": "white", "edgecolor": "0.6", "hatch": "//////"}
"""Of a layer without a rate: hatched, since in print the colour map's colours are greys."""

SIZE = (6.0, 4.0)
SMALL = 6.5
IN_LEGEND = 16.0
"""Inches; points of what is written at ticks and in legends; size of a mark there, where those drawn may be tiny."""


def draw(
    layers: Sequence[str], rounds: Sequence[RoundRecord], axes: Optional[Axes], lead_axes: Optional[Axes]
) -> Figure:
    """Draw the rounds into axes, or into those of a new figure; see :meth:`~clda_core.report.Report.plot`."""
    own = axes is None
    if axes is None:
        axes, lead_axes = _new_axes(lead=any(record.lead is not None for record in rounds))
    _draw_rates(axes, layers, rounds, above_another=own and lead_axes is not None)
    if lead_axes is not None:
        _draw_lead(lead_axes, rounds)
    return cast("Figure", axes.figure)


def short_names(layers: Sequence[str], *, length: int = 24) -> Tuple[str, List[str]]:
    """Return the beginning that most of the layers' names share, and the names without it.

    Args:
        layers: Names with dots.
        length: Characters of the longest name shown; of a longer one the beginning is cut off.
    """
    beginnings = Counter(name[:at] for name in layers for at, sign in enumerate(name) if sign == ".")
    shared = [beginning for beginning, count in beginnings.items() if count >= max(2, 0.75 * len(layers))]
    prefix = max(shared, key=len, default="")
    names = [name[len(prefix) + 1 :] if prefix and name.startswith(f"{prefix}.") else name for name in layers]
    if len(set(names)) < len(layers):
        prefix, names = "", list(layers)
    return prefix, [_end(name, length) for name in names]


def _end(name: str, length: int) -> str:
    """Return the end of a dotted name that is too long, from a dot on if there is a late one."""
    if len(name) <= length:
        return name
    whole = name[1 - length :].partition(".")[2]
    return f"…{whole or name[1 - length :]}"


def _new_axes(*, lead: bool) -> Tuple[Axes, Optional[Axes]]:
    """Return axes of a new figure for the LSR, and for the lead if there is one."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CldaError(
            "report().plot() needs matplotlib, which is not installed. Fix: pip install 'clda-core[plots]', or read "
            "the figures from report().to_dict()"
        ) from error
    figure = Figure(figsize=SIZE, constrained_layout=True)
    if not lead:
        return figure.add_subplot(1, 1, 1), None
    grid = figure.add_gridspec(2, 1, height_ratios=[2.0, 1.0])
    return figure.add_subplot(grid[0]), figure.add_subplot(grid[1])


def _draw_rates(axes: Axes, layers: Sequence[str], rounds: Sequence[RoundRecord], *, above_another: bool) -> None:
    """Draw the rate of each layer in each round, dots where it was updated, and crosses over rejected rounds."""
    figure = cast("Figure", axes.figure)
    prefix, names = short_names(layers)
    axes.set_ylabel(f"layer of {_end(prefix, 30)}" if prefix else "layer of the teacher", fontsize=8)
    _name_ticks(axes, "y", names)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    _name_steps(axes, rounds)
    if above_another:
        axes.set_xlabel("")
        axes.tick_params(labelbottom=False)
    if not rounds:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no round was made", transform=axes.transAxes, ha="center", va="center", fontsize=9)
        return
    nan = float("nan")
    grid = [[record.rates.get(name, nan) for record in rounds] for name in layers]
    axes.patch.set(**UNKNOWN)
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0, vmax=1.0)
    bar = figure.colorbar(image, cax=axes.inset_axes((1.015, 0.0, 0.025, 1.0)), ticks=[0.0, 0.5, 1.0])
    bar.set_label("LSR", fontsize=8)
    bar.ax.tick_params(labelsize=SMALL)
    wide, high = _inches(axes)
    cell = 72 * min(wide / len(rounds), high / max(1, len(layers)))
    width = min(4.0, max(1.2, 0.6 * cell))
    dots = [
        (column, row)
        for row, name in enumerate(layers)
        for column, record in enumerate(rounds)
        if name in record.updated
    ]
    if dots:
        style: Dict[str, Any] = {"color": "white", "edgecolors": "black", "linewidths": width / 8}
        axes.scatter([column for column, _ in dots], [row for _, row in dots], s=width**2, **style)
        axes.scatter([], [], s=IN_LEGEND, label="updated", **{**style, "linewidths": 0.5})
    rejected = [column for column, record in enumerate(rounds) if record.accepted is False]
    if rejected:
        across = min(4.0, max(2.0, 72 * wide / len(rounds)))
        axes.scatter(
            rejected,
            [1.03] * len(rejected),
            s=across**2,
            marker="x",
            color="black",
            linewidths=0.8,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )
        axes.scatter([], [], s=IN_LEGEND, marker="x", color="black", linewidths=0.8, label="rejected")
    if any(rate != rate for row in grid for rate in row):
        axes.fill_between([], [], linewidth=0.0, label="unknown", **UNKNOWN)
    _legend(axes, wide)


def _draw_lead(axes: Axes, rounds: Sequence[RoundRecord]) -> None:
    """Draw the lead, those of the classes, and the trust; rounds that changed nothing are hollow or crossed out."""
    nan = float("nan")
    at = list(range(len(rounds)))
    leads = [nan if record.lead is None else record.lead for record in rounds]
    for index in range(max((len(record.lead_by_class) for record in rounds), default=0)):
        of_class = [record.lead_by_class[index] if index < len(record.lead_by_class) else None for record in rounds]
        values = [nan if lead is None else lead for lead in of_class]
        axes.plot(at, values, color="0.75", linewidth=0.7, label="one class" if index == 0 else None)
    axes.axhline(0.0, color="0.4", linewidth=0.7)
    axes.plot(at, leads, color=BLUE, linewidth=1.2)
    groups: Sequence[Tuple[str, Callable[[RoundRecord], bool], Dict[str, Any]]] = (
        ("changed the teacher", lambda one: bool(one.updated), {"color": BLUE, "edgecolors": BLUE}),
        (
            "changed nothing",
            lambda one: not one.updated and one.accepted is not False,
            {"color": "white", "edgecolors": BLUE},
        ),
        ("rejected", lambda one: not one.updated and one.accepted is False, {"color": "black", "marker": "x"}),
    )
    wide, _ = _inches(axes)
    width = min(4.0, max(1.5, 72 * wide / max(1, len(rounds))))
    for label, belongs, style in groups:
        chosen = [column for column in at if belongs(rounds[column])]
        if chosen:
            axes.scatter(chosen, [leads[column] for column in chosen], s=width**2, zorder=3, linewidths=0.8, **style)
            axes.scatter([], [], s=IN_LEGEND, label=label, linewidths=0.8, **style)
    axes.set_ylabel("student's lead", color=BLUE, fontsize=8)
    axes.tick_params(labelsize=SMALL)
    of_trust = axes.twinx()
    trusts = [nan if record.trust is None else record.trust for record in rounds]
    marker = "s" if len(rounds) == 1 else ""  # a single point has no line
    of_trust.plot(at, trusts, color=VERMILION, linestyle="--", linewidth=1.0, marker=marker, fillstyle="none")
    of_trust.set_ylim(-0.05, 1.05)
    of_trust.set_yticks([0.0, 0.5, 1.0])
    of_trust.tick_params(labelsize=SMALL)
    of_trust.set_ylabel("trust (dashed)", color=VERMILION, fontsize=8)
    _name_steps(axes, rounds)
    _legend(axes, wide)


def _name_steps(axes: Axes, rounds: Sequence[RoundRecord]) -> None:
    axes.set_xlim(-0.5, max(1, len(rounds)) - 0.5)
    axes.set_xlabel("optimizer step", fontsize=8)
    _name_ticks(axes, "x", [str(record.step) for record in rounds])


def _name_ticks(axes: Axes, which: Literal["x", "y"], names: Sequence[str]) -> None:
    """Put a name at each whole number, and at only so many as there is room for when the figure is drawn."""
    from matplotlib.ticker import FuncFormatter, Locator

    longest = max((len(name) for name in names), default=1)
    points = 1.2 * SMALL if which == "y" else 0.75 * SMALL * (longest + 1)

    class Fitting(Locator):
        def __call__(self) -> List[int]:
            fitting = max(1, int(72 * _inches(axes)["xy".index(which)] / points))
            steps = (step * power for power in (1, 10, 100, 1000) for step in (1, 2, 5))
            return list(range(0, len(names), next(step for step in steps if len(names) <= step * fitting)))

    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(Fitting())
    axis.set_major_formatter(FuncFormatter(lambda at, _: names[round(at)] if 0 <= round(at) < len(names) else ""))
    axes.tick_params(axis=which, labelsize=SMALL)


def _inches(axes: Axes) -> Tuple[float, float]:
    extent = axes.get_window_extent()
    dpi = cast("Figure", axes.figure).dpi
    return extent.width / dpi, extent.height / dpi


def _legend(axes: Axes, wide: float) -> None:
    """Put what the marks mean above the axes, at the right."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            labels,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.04),
            ncol=len(handles),
            frameon=False,
            fontsize=SMALL,
            borderpad=0.2,
            handletextpad=0.2,
            columnspacing=1.0,
        )
