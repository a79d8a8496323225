"""The figures of the evidence, as a reader sees them: what is named, in which colours, within which scale."""

import re
from pathlib import Path
from typing import Any, Dict, List

import pytest

pytest.importorskip("scipy", reason="the benchmarks need scipy, which is no dependency of the package")
pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")

from benchmarks.evidence import report, validator_tables
from benchmarks.evidence.variants import CLDA, FROZEN_DIST, UDA, VARIANTS
from examples.classification.figures import OKABE_ITO

MANY = [name for name, variant in VARIANTS.items() if variant.start == "own" and not variant.after_turn][:20]


def runs(names: List[str]) -> Dict[str, Dict[int, Any]]:
    """Return records of variants, each 0.1 points above the one before, and UDA 30 below."""

    def record(at: int, name: str, seed: int) -> Dict[str, Any]:
        gain = -30.0 if name == UDA else 0.1 * at + 0.01 * seed * at
        figures = {"accuracy": 80.0 + gain}
        own = {"overhead": None, "processor_seconds": 10.0 + at}
        return {"metric": "accuracy", "student": figures, "teacher": figures, "teacher_before": figures, **own}

    return {name: {seed: record(at, name, seed) for seed in range(4)} for at, name in enumerate(names)}


@pytest.mark.parametrize("names", [MANY, [FROZEN_DIST, CLDA, "with-source"]])
def test_a_figure_names_six_variants_at_most_each_in_a_colour_of_its_own(
    names: List[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: List[Any] = []
    save = report._save
    monkeypatch.setattr(report, "_save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    report.cost_figure(runs(names), tmp_path / "gain.svg", alike=True)
    for axes in drawn[0].axes:
        named = [text.get_text().rpartition(" ")[0] for text in axes.texts]
        assert len(set(named)) == len(named) == min(len(OKABE_ITO), len(names) - 1)
        assert VARIANTS[CLDA].title in named
        assert len({text.get_color() for text in axes.texts}) == len(named)
    assert ("grey" in drawn[0].axes[1].get_xlabel()) is (len(names) > 7)


def test_one_variant_far_off_does_not_flatten_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAIN", (CLDA,))
    monkeypatch.setattr(report, "OKABE_ITO", OKABE_ITO[:1])
    drawn: List[Any] = []
    monkeypatch.setattr(report, "_save", lambda figure, path: drawn.append(figure))
    report.cost_figure(runs(MANY), tmp_path / "gain.svg", alike=True)
    assert drawn[0].axes[0].get_ylim()[0] > -5
    assert any(line.get_marker() == "v" for line in drawn[0].axes[0].lines)


def test_what_is_written_is_text_and_a_figure_depends_on_the_records_alone(tmp_path: Path) -> None:
    for path in (tmp_path / "a.svg", tmp_path / "b.svg"):
        report.cost_figure(runs([FROZEN_DIST, CLDA]), path, alike=True)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert re.search(r"<text [^>]*>CLDA [+-]\d", text)


def test_the_observation_has_one_scale_and_two_styles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: List[Any] = []
    monkeypatch.setattr(report, "_save", lambda figure, path: drawn.append(figure))
    rates = {"source": {"a": 0.5, "b": 0.25}, "target": {"a": 0.25, "b": 0.5}}
    records = [{"variant": f"{network}-source", "own_threshold": rates} for network in ("teacher", "student")]
    report.observation_figure(records, tmp_path / "lsr.svg")
    assert {axes.get_ylim() for axes in drawn[0].axes} == {(0.0, 1.0)}
    lines = drawn[0].axes[0].lines
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 2


def test_the_points_of_the_validators_are_an_image_and_tasks_differ_in_their_marker() -> None:
    def record(seed: int, gap: float) -> Dict[str, Any]:
        look = {"step": 5, "figures": {"accuracy": 80.0 + gap}, "scores": {"Exact": gap}, "by_class": {}}
        teacher = {"figures": {"accuracy": 80.0}, "scores": {"Exact": 0.0}, "by_class": {}}
        run = {"setting": "a", "seed": seed, "variant": "clda", "metric": "accuracy", "steps": 10}
        return {**run, "teacher": teacher, "looks": [look]}

    figure = validator_tables.figure({"digits": [record(20, 1.0)], "street": [record(20, -1.0)]})
    axes = figure.axes[0]
    points = [drawn for drawn in axes.collections if len(drawn.get_offsets())]
    assert [drawn.get_rasterized() for drawn in points] == [True, True]
    assert len({tuple(drawn.get_facecolor()[0]) for drawn in points}) == 2
    assert len({drawn.get_paths()[0].vertices.tobytes() for drawn in points}) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["digits", "street"]
