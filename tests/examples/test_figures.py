from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from examples.classification.figures import OKABE_ITO, Label, label_at_the_right, spread


def test_heights_that_are_far_apart_stay() -> None:
    assert spread([3.0, 1.0, 2.0], 0.5) == [3.0, 1.0, 2.0]


def test_heights_that_touch_part_around_their_middle_in_their_order() -> None:
    assert spread([1.0, 1.0, 5.0], 1.0) == [0.5, 1.5, 5.0]
    assert spread([2.1, 2.0, 1.9], 1.0) == pytest.approx([3.0, 2.0, 1.0])
    assert spread([], 1.0) == []


def test_neighbours_that_come_too_near_by_that_join_them() -> None:
    moved = spread([0.0, 0.0, 0.6], 1.0)
    assert np.diff(moved) == pytest.approx([1.0, 1.0])
    assert np.mean(moved) == pytest.approx(0.2)


def test_every_colour_differs_from_every_other_in_print() -> None:
    """In grey no two are alike, so that the lines differ in a copy; black is the darkest."""
    values = [[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in OKABE_ITO]
    grey = sorted(np.array(values) @ np.array([0.299, 0.587, 0.114]))
    assert np.diff(grey).min() > 5
    assert grey[0] == 0


def test_labels_neither_cover_each_other_nor_leave_the_figure() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(5, 3), constrained_layout=True)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(1, 1, 1)
    axes.set_ylim(0, 10)
    labels = [
        Label(f"the way called {at}", 1.0, height, "black") for at, height in enumerate((5.0, 5.1, 5.0, 0.1, 9.9))
    ]
    label_at_the_right(axes, labels)
    canvas.draw()
    canvas.draw()
    boxes = sorted((Text.get_window_extent(text).extents for text in axes.texts), key=lambda box: box[1])
    assert all(below[3] <= above[1] + 0.5 for below, above in zip(boxes, boxes[1:]))
    assert max(box[2] for box in boxes) <= figure.bbox.width
    assert [text.get_text() for text in axes.texts] == [label.text for label in labels]
