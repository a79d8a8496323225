import json
import math
import sys
from typing import Any

import pytest

from clda_core import CldaError, Report, RoundRecord


def report(**options: Any) -> Report:
    rounds = (
        RoundRecord(
            step=210,
            rates={"conv1": 0.5, "layer1.0": 0.125},
            selected=("layer1.0",),
            updated=("layer1.0",),
            skipped={"layer1.0: bias": "shapes differ"},
            accepted=True,
            score_before=1.0,
            score_after=1.25,
        ),
        RoundRecord(
            step=220,
            rates={"conv1": 0.25, "layer1.0": 1.0},
            source_rates={"conv1": 0.75},
            selected=("conv1", "layer1.0"),
            strength=0.5,
            accepted=False,
            score_before=1.25,
            score_after=float("nan"),
        ),
    )
    defaults = {
        "layers": ("conv1", "layer1.0", "classifier"),
        "rounds": rounds,
        "unrelated": {"classifier": "no student layer of this name"},
        "steps": 225,
        "discarded": 3,
    }
    return Report(**{**defaults, **options})


EMPTY = {"rounds": (), "unrelated": {}, "steps": 7, "discarded": 0}

TABLE = """\
CLDA after 225 optimizer steps: 2 rounds, guard accepted 1 of 2, 3 observations discarded (non-finite)
layer       first LSR  last LSR  selected  updated  note
conv1           0.500     0.250         1        0
layer1.0        0.125     1.000         2        1
classifier    unknown   unknown         0        0  unrelated: no student layer of this name"""


def test_the_table() -> None:
    assert str(report()) == TABLE


def test_the_table_without_guard_or_rounds() -> None:
    plain = report(rounds=(RoundRecord(step=1, rates={"conv1": 1.0}),), unrelated={}, discarded=0)
    assert str(plain).splitlines()[0] == "CLDA after 225 optimizer steps: 1 rounds"
    assert str(report(**EMPTY)) == "CLDA after 7 optimizer steps: 0 rounds"
    before = report(**{**EMPTY, "unrelated": {"conv1": "no such layer"}})
    assert str(before).splitlines()[1:] == ["conv1: unrelated: no such layer"]


@pytest.mark.parametrize("options", [{}, EMPTY])
def test_to_dict_is_json_and_holds_everything(options: Any) -> None:
    made = report(**options)
    loaded = json.loads(json.dumps(made.to_dict()))
    assert str(loaded) == str(made.to_dict())
    rounds = [
        {**item, "selected": tuple(item["selected"]), "updated": tuple(item["updated"])} for item in loaded["rounds"]
    ]
    again = Report(
        tuple(loaded["layers"]),
        tuple(RoundRecord(**item) for item in rounds),
        loaded["unrelated"],
        loaded["steps"],
        loaded["discarded"],
    )
    assert repr(again) == repr(made)  # not ==, since a score is NaN


def test_to_dict_shares_nothing_with_the_report() -> None:
    made = report()
    made.to_dict()["rounds"][0]["rates"]["conv1"] = 9.0
    made.to_dict()["unrelated"].clear()
    assert str(made) == TABLE


@pytest.mark.parametrize("options", [{}, EMPTY, {"rounds": (RoundRecord(step=3, rates={}),)}])
def test_plot_returns_a_figure_that_can_be_saved(options: Any, tmp_path: Any) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    before = set(sys.modules)
    figure = report(**options).plot()
    assert isinstance(figure, figure_module.Figure)
    assert "matplotlib.pyplot" not in set(sys.modules) - before
    figure.savefig(tmp_path / "lsr.png")
    assert (tmp_path / "lsr.png").stat().st_size > 1000


def test_plot_shows_rates_and_updates() -> None:
    pytest.importorskip("matplotlib")
    axes = report().plot().axes[0]
    shown = axes.images[0].get_array().filled(float("nan")).tolist()
    assert shown[:2] == [[0.5, 0.25], [0.125, 1.0]]
    assert all(math.isnan(value) for value in shown[2])
    assert axes.collections[0].get_offsets().tolist() == [[0.0, 1.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "layer1.0", "classifier"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["210", "220"]


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CldaError, match=r"needs matplotlib.*Fix: pip install 'clda-core\[plots\]'"):
        report().plot()
