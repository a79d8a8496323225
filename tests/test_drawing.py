"""The figure of a report, looked at as a reader sees it: what is drawn where, and that nothing covers anything else."""

import math
import sys
from typing import Any, List, Sequence, Tuple

import numpy as np
import pytest

from clda_core import CldaError, Report, RoundRecord
from clda_core.drawing import short_names

pytest.importorskip("matplotlib")


def blocks(count: int) -> Tuple[str, ...]:
    """Return names as those of a transformer's layers."""
    of_stages = [f"model.backbone.stage{at % 4}.blocks.{at // 4}" for at in range(count - 2)]
    return (*sorted(of_stages), "model.decode_head.linear_projections.0", "model.decode_head.classifier")


def report(layers: Sequence[str], count: int, **options: Any) -> Report:
    """Return a report of ``count`` rounds: the first layer has no rate, some rounds are rejected or change nothing."""

    def record(at: int) -> RoundRecord:
        accepted = None if at % 3 == 0 else at % 3 == 1
        updated = tuple(layers[1::3]) if accepted else ()
        rates = {name: (3 * row + at) % 11 / 10 for row, name in enumerate(layers) if row}
        lead, trust = at / count - 0.5, at / count
        of_class = (lead + 0.25, None if at % 2 else lead - 0.25)
        fixed = {"lead": lead, "trust": trust, "lead_by_class": of_class, "accepted": accepted, **options}
        return RoundRecord(step=12_000 + 100 * at, rates=rates, selected=updated, updated=updated, **fixed)

    rounds = tuple(record(at) for at in range(count))
    return Report(layers=tuple(layers), rounds=rounds, unrelated={}, steps=12_000 + 100 * count, discarded=0)


def pixels(figure: Any) -> Any:
    """Draw the figure and return it as printed in grey: rows from the top, 0 black and 255 white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] @ np.array([0.299, 0.587, 0.114])


def written(figure: Any) -> List[Any]:
    """Draw the figure and return the texts in it: axis labels, tick labels within their axis, and legends."""
    pixels(figure)
    texts: List[Any] = []
    for axes in (*figure.axes, *(child for parent in figure.axes for child in parent.child_axes)):
        for axis, label_at in ((axes.xaxis, 0), (axes.yaxis, 1)):
            if not axis.get_visible():  # that of twins
                continue
            low, high = sorted(axis.get_view_interval())
            texts.append(axis.label)
            texts += [text for text in axis.get_ticklabels() if low <= text.get_position()[label_at] <= high]
        texts += axes.get_legend().get_texts() if axes.get_legend() else axes.texts
    return [text for text in texts if text.get_visible() and text.get_text()]


def covered(figure: Any) -> List[Tuple[str, str]]:
    """Return the pairs of texts that cover each other in the drawn figure, and the texts that leave it."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in written(figure)]
    pairs = [
        (name, other)
        for at, (name, box) in enumerate(boxes)
        for other, another in boxes[at + 1 :]
        if box.x0 < another.x1 and another.x0 < box.x1 and box.y0 < another.y1 and another.y0 < box.y1
    ]
    whole = figure.bbox
    leaving = [
        (name, "the edge")
        for name, box in boxes
        if box.x0 < 0 or box.y0 < 0 or box.x1 > whole.width or box.y1 > whole.height
    ]
    return pairs + leaving


@pytest.mark.parametrize(
    ("layers", "rounds", "inches"),
    [(16, 30, (6, 4)), (66, 60, (5, 3.5)), (150, 1000, (6, 4)), (16, 1, (6, 4))],
)
def test_nothing_written_is_covered_or_cut_off(layers: int, rounds: int, inches: Tuple[float, float]) -> None:
    figure = report(blocks(layers), rounds).plot()
    assert figure.get_size_inches().tolist() == [6.0, 4.0]
    figure.set_size_inches(*inches)
    assert not covered(figure)
    of_layers = [
        text for text in written(figure) if "." in text.get_text() and text in figure.axes[0].get_yticklabels()
    ]
    assert len(of_layers) == 16 if layers == 16 else 5 <= len(of_layers) <= 30


def test_the_colours_have_one_scale_whatever_the_rates() -> None:
    low = report(("a", "b"), 3)
    (image,) = low.plot().axes[0].images
    assert image.get_clim() == (0.0, 1.0)


def test_plot_shows_rates_and_updates() -> None:
    made = report(("a", "b", "c"), 2)
    figure = made.plot()
    pixels(figure)  # before matplotlib 3.6 tick labels are empty until they are drawn
    axes, of_lead, of_trust = figure.axes
    assert axes.images[0].get_array().filled(math.nan)[1:].tolist() == [[0.3, 0.4], [0.6, 0.7]]
    assert axes.images[0].get_array().mask[0].all()
    assert axes.collections[0].get_offsets().tolist() == [[1.0, 1.0]]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in of_lead.get_xticklabels()] == ["12000", "12100"]
    lines = [list(line.get_ydata()) for line in of_lead.get_lines()]
    assert [-0.5, 0.0] in lines
    assert [-0.25, 0.25] in lines
    assert [list(line.get_ydata()) for line in of_trust.get_lines()] == [[0.0, 0.5]]
    assert of_trust.get_ylim() == (-0.05, 1.05)


def test_a_rejected_round_has_a_black_cross_above_its_column_and_no_other_has() -> None:
    made = report(("a", "b", "c"), 9)
    figure = made.plot()
    grey = pixels(figure)
    axes = figure.axes[0]
    for column, record in enumerate(made.rounds):
        x, y = axes.get_xaxis_transform().transform((column, 1.03))
        at = grey[len(grey) - round(y) - 3 : len(grey) - round(y) + 3, round(x) - 3 : round(x) + 3]
        assert bool(at.min() < 60) is (record.accepted is False)


def test_dots_are_seen_on_every_colour_in_print() -> None:
    """Their faces are white and their edges black, so one of both differs from whatever is below."""
    rounds = tuple(RoundRecord(step=at, rates={"a": at / 4}, updated=("a",) if at % 2 == 0 else ()) for at in range(5))
    figure = Report(("a",), rounds, {}, 5, 0).plot()
    grey = pixels(figure)
    axes = figure.axes[0]
    for column in range(5):
        x, y = (round(value) for value in axes.transData.transform((column, 0)))
        at = grey[len(grey) - y - 5 : len(grey) - y + 5, x - 5 : x + 5]
        assert bool(np.ptp(at) > 100) is (column % 2 == 0)


def test_an_unknown_rate_is_hatched() -> None:
    figure = report(("a", "b"), 2).plot()
    grey = pixels(figure)
    extent = figure.axes[0].get_window_extent()
    high = len(grey)
    quarter = (extent.y1 - extent.y0) / 4
    rows = [
        slice(round(high - extent.y1 + 5 + half), round(high - extent.y1 + half + quarter)) for half in (0, 2 * quarter)
    ]
    columns = slice(round(extent.x0) + 5, round((extent.x0 + extent.x1) / 2) - 5)
    unknown, known = (grey[row, columns] for row in rows)
    assert np.ptp(unknown) > 50
    assert np.ptp(known) == 0


def test_a_report_from_a_checkpoint_has_the_same_figure() -> None:
    made = report(blocks(16), 12)
    assert np.array_equal(pixels(made.plot()), pixels(Report.from_dict(made.to_dict()).plot()))


@pytest.mark.parametrize(
    ("count", "options"), [(0, {}), (3, {}), (3, {"lead": None, "trust": None, "lead_by_class": ()})]
)
def test_plot_returns_a_figure_that_can_be_saved(count: int, options: Any, tmp_path: Any) -> None:
    from matplotlib.figure import Figure

    before = set(sys.modules)
    figure = report(blocks(16), count, **options).plot()
    assert isinstance(figure, Figure)
    assert "matplotlib.pyplot" not in set(sys.modules) - before
    figure.savefig(tmp_path / "lsr.png")
    assert (tmp_path / "lsr.png").stat().st_size > 1000
    assert not covered(figure)
    assert len(figure.axes) == (3 if count and not options else 1)  # the lead's has two
    assert ("no round was made" in [text.get_text() for text in written(figure)]) is (count == 0)


def test_the_rates_alone_are_drawn_into_axes_of_the_users() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4))
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    assert report(blocks(16), 12).plot(left) is figure
    assert left.images
    assert figure.axes == [left, right]
    assert not right.has_data()


def test_what_most_names_begin_with_is_said_once() -> None:
    prefix, names = short_names(blocks(18))
    assert prefix == "model.backbone"
    assert names[0] == "stage0.blocks.0"
    assert names[-2:] == ["…linear_projections.0", "…decode_head.classifier"]
    assert short_names(("conv1", "layer1.0", "fc")) == ("", ["conv1", "layer1.0", "fc"])
    assert short_names(("net.a", "net.b", "net.c", "a")) == ("", ["net.a", "net.b", "net.c", "a"])  # two would be "a"
    assert short_names(("x" * 40,)) == ("", ["…" + "x" * 23])
    assert short_names(()) == ("", [])


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CldaError, match=r"needs matplotlib.*Fix: pip install 'clda-core\[plots\]'"):
        report(("a",), 1).plot()
