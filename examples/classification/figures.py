"""What figures need to read in print and with any colour blindness: colours, and labels beside what they name."""

from __future__ import annotations

from typing import Any, List, NamedTuple, Sequence

OKABE_ITO = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Colours that everybody tells apart (Okabe and Ito, 2008), the ones that are hard to see on white left out."""


class Label(NamedTuple):
    """What is written beside a point at its height: a text in the colour of what it names."""

    text: str
    x: float
    y: float
    color: str


def label_at_the_right(axes: Any, labels: Sequence[Label], *, size: float = 7.0) -> None:
    """Write labels outside the right edge, none over another, each with a thin line to its point.

    Call it when the axes' limits are final. With a constrained layout the axes give way to the labels.

    Args:
        axes: Matplotlib axes.
        labels: In any order.
        size: Of the letters, in points.
    """
    low, high = axes.get_ylim()
    inches = axes.get_window_extent().height / axes.figure.dpi
    heights = spread([label.y for label in labels], (high - low) * 1.3 * size / 72 / inches)
    for label, height in zip(labels, heights):
        axes.annotate(
            label.text,
            xy=(label.x, label.y),
            xytext=(1.04, (height - low) / (high - low)),
            textcoords="axes fraction",
            color=label.color,
            fontsize=size,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0.0, 0.5),
                "color": label.color,
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


def spread(heights: Sequence[float], gap: float) -> List[float]:
    """Move heights as little as it takes that none is nearer to another than ``gap``; their order stays."""
    clusters: List[List[float]] = []  # each the middle of neighbours that touch, and their number
    for height in sorted(heights):
        clusters.append([height, 1.0])
        while len(clusters) > 1:
            (below, under), (above, over) = clusters[-2:]
            if above - below >= gap * (under + over) / 2:
                break
            middle = (below * under + above * over) / (under + over)
            clusters[-2:] = [[middle, under + over]]
    places = [middle + gap * (at - (count - 1) / 2) for middle, count in clusters for at in range(int(count))]
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = dict(zip(order, places))
    return [placed[index] for index in range(len(heights))]
