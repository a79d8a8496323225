"""The study of validators: scores that change no training, agreement with figures, and tables from records."""

import math
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
import torch

from clda_core import CldaError

pytest.importorskip("scipy", reason="the study correlates with scipy, which is no dependency of the package")
pytest.importorskip("tabulate", reason="the study prints tables with tabulate, no dependency of the package")
pytest.importorskip("sklearn", reason="the digits benchmark reads scikit-learn's images")
pytest.importorskip("torchmetrics", reason="mIoU is torchmetrics'")
pytest.importorskip("transformers", reason="the street's networks are transformers' SegFormer")

from benchmarks.evidence import runs, street, validator_tables, validators
from benchmarks.evidence.command import main
from benchmarks.evidence.digits import Digits
from benchmarks.evidence.records import Records
from benchmarks.evidence.tasks import task as task_of
from benchmarks.evidence.validator_tables import Pair, agreement, best_offset, class_pairs_of, pairs_of
from benchmarks.street.models import NARROW, segmenter
from benchmarks.street.scenes import CLASSES, photo_frame
from clda_core.validation import HardConsistency, MixVal, MutualInformation, SoftConsistency, mixed, validate
from examples.classification.digits_data import TargetEvaluation
from examples.classification.digits_models import residual_network

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def pair(gap: float, lead: float, **rest: Any) -> Pair:
    return Pair(**{"task": "digits", "seed": 20, "kind": "uda", "quarter": 3, "gap": gap, "lead": lead, **rest})


def record(seed: int, gaps: List[float], *, kind: str = "uda", metric: str = "accuracy") -> Dict[str, Any]:
    """Return a record whose scores by "Exact" are the figures, and by "Reversed" their opposite."""

    def of(figure: float) -> Dict[str, Any]:
        return {
            "figures": {metric: figure, "IoU car": figure + 1, "IoU sky": 3.0},
            "scores": {"Exact": figure, "Reversed": -figure, "Absent": None},
            "by_class": {"Exact": {"IoU car": figure, "IoU sky": None}},
        }

    steps = 10 * len(gaps)
    looks = [{"step": 10 * (index + 1), **of(80.0 + gap)} for index, gap in enumerate(gaps)]
    made = {"setting": "digits-1", "seed": seed, "variant": kind, "metric": metric, "steps": steps}
    return {**made, "teacher": of(80.0), "looks": looks}


# ---------------------------------------------------------------------------------------------------------- agreement


def test_agreement_by_hand() -> None:
    found = agreement([pair(2.0, 0.1), pair(5.0, -0.1), pair(-3.0, -0.2), pair(0.5, -1.0), pair(-0.9, 1.0)])
    assert (found.pairs, found.clear) == (5, 3)
    assert found.right == pytest.approx(2 / 3)
    assert (found.ahead, found.behind) == (0.5, 1.0)
    gaps, leads = [2.0, 5.0, -3.0, 0.5, -0.9], [0.1, -0.1, -0.2, -1.0, 1.0]
    assert found.pearson == pytest.approx(np.corrcoef(gaps, leads)[0, 1])
    ranks = [np.argsort(np.argsort(values)) for values in (gaps, leads)]
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_too_little_to_say_is_none() -> None:
    none = agreement([])
    assert (none.pairs, none.clear, none.right, none.pearson, none.spearman) == (0, 0, None, None, None)
    same = agreement([pair(2.0, 0.0)] * 4)
    assert (same.right, same.pearson) == (0.0, None)


def test_the_offset_is_the_one_that_is_right_most_often() -> None:
    shifted = [pair(gap, 0.1 * gap - 1.0) for gap in (-4.0, -2.0, 2.0, 4.0)]
    found = best_offset(shifted)
    assert found == pytest.approx(-1.0)
    assert agreement(shifted, offset=found).right == 1.0
    assert agreement(shifted).right == 0.5
    assert best_offset([pair(2.0, 0.3), pair(-2.0, -0.3)]) == 0.0  # no other is better
    assert best_offset([pair(2.0, 0.3), pair(0.5, -0.3)]) is None  # no clear gap the other way
    assert best_offset([]) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_offset_against_every_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gaps = rng.normal(0, 3, 30)
    pairs = [pair(gap, gap + noise + 0.7) for gap, noise in zip(gaps, rng.normal(0, 3, 30))]
    best = best_offset(pairs)
    assert best is not None
    right = agreement(pairs, offset=best).right
    assert right is not None
    assert all(right >= (agreement(pairs, offset=one).right or 0.0) for one in np.linspace(-15, 15, 601))


# -------------------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_student_minus_teacher_by_quarter() -> None:
    records = {"digits": [record(20, [9.0] * 8), record(20, [-4.0, -2.0, -1.0, 0.5, 1.0, 2.0, 3.0, 4.0])]}
    found = pairs_of(records, range(20, 30))
    assert set(found) == {"Exact", "Reversed"}  # a score that was NaN gives no pair
    assert [one.quarter for one in found["Exact"]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [one.gap for one in found["Exact"]] == [-4.0, -2.0, -1.0, 0.5, 1.0, 2.0, 3.0, 4.0]  # the latest record
    assert [one.lead for one in found["Reversed"]] == [-one.gap for one in found["Exact"]]
    assert pairs_of(records, range(100, 200)) == {}
    (of_class,) = class_pairs_of(records, range(20, 30)).values()
    assert {one.label for one in of_class} == {"car"}
    assert [one.gap for one in of_class] == [one.lead for one in of_class]


def test_the_tables_take_offsets_from_tuning_seeds_alone() -> None:
    """Scores of the reported seeds that lack 2 points are right again by an offset, which the tuning seeds gave."""
    gaps = [-3.0, -1.5, 1.5, 3.0]

    def shifted(item: Dict[str, Any], by: float) -> Dict[str, Any]:
        for look in item["looks"]:
            look["scores"]["Exact"] -= by
        return item

    reported, tuning = shifted(record(20, gaps), 2.0), shifted(record(100, gaps), 2.0)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in validator_tables.tables({"digits": [reported], "street": [tuning]}).splitlines()
        if line.startswith("| Exact")
    ]
    assert rows[0] == ["Exact", "8", "8", "75% (50%, 100%)", "100% (100%, 100%)", "-2.0000", "1.00", "1.00"]
    assert rows[1] == ["Exact", "75%, 100%", "75%, 100%"]  # by task
    assert rows[2] == ["Exact", "100%, 100%", "100%, 100%", "0%, 100%", "100%, 100%"]  # by quarter
    assert rows[3] == ["Exact", "100%", "100%"]  # by class
    without = validator_tables.tables({"digits": [shifted(record(20, gaps), 2.0)]})
    row = next(line for line in without.splitlines() if line.startswith("| Exact"))
    assert [cell.strip() for cell in row.strip("|").split("|")][3:6] == ["75% (50%, 100%)", "", ""]
    assert validator_tables.tables({}) == "No pairs are recorded."


# --------------------------------------------------------------------------------------------------------------- runs


class TinyDigits(Digits):
    """The same host and data with networks of one block a stage, evaluated and scored on a few images."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluation = TargetEvaluation(self.target.images[:50], np.arange(50) % 10)
        self.steps, self.teacher_steps = 8, 2

    def teacher(self, seed: int) -> torch.nn.Module:
        return residual_network((1, 1, 1), seed=seed + 1)

    def student(self, seed: int) -> torch.nn.Module:
        return residual_network((1, 1, 1), seed=seed)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Digits:
    monkeypatch.setattr(runs, "WORK", tmp_path)
    monkeypatch.setattr(validators, "WHOLE", 64)
    return TinyDigits()


def test_every_validator_of_the_library_is_studied() -> None:
    assert {"MutualInformation", "SoftConsistency", "HardConsistency", "ConsistencyIoU", "MixVal"} <= set(
        validators.all_validators()
    )
    for name in ("Validator", "ByClass", "mixed", "validate"):
        assert name not in validators.all_validators()


def test_scoring_leaves_the_training_as_it_is(tiny: Digits) -> None:
    made = validators.scored(tiny, 100, "frozen-dist", looks=4)
    assert [look["step"] for look in made["looks"]] == [2, 4, 6, 8]
    plain = runs.run(tiny, 100, "frozen-dist")
    assert made["looks"][-1]["figures"] == plain["student"]
    assert made["teacher"]["figures"] == plain["teacher_before"]
    assert made["looks"][0]["scores"] != made["looks"][-1]["scores"]
    assert set(made["teacher"]["scores"]) == set(validators.all_validators())


def test_scores_are_those_of_the_library(tiny: Digits) -> None:
    images = validators.target_images(tiny, 100)
    assert sum(map(len, images.clean)) == 64
    assert not torch.equal(images.clean[0], images.view[0])
    again = validators.target_images(tiny, 100)
    assert torch.equal(images.view[0], again.view[0])
    model = tiny.student(0).train()
    each = {"mi": MutualInformation(), "soft": SoftConsistency(), "hard": HardConsistency(), "mix": MixVal()}
    found = validators.scores(model, images, each, [])["scores"]
    assert model.training
    views = iter(images.view * 2)
    for name in ("soft", "hard"):
        expected = validate(model, images.clean, each[name], view=lambda clean: next(views))
        assert found[name] == pytest.approx(expected, abs=1e-6)
    assert found["mi"] == pytest.approx(validate(model, images.clean, each["mi"]), abs=1e-6)
    mix = validate(model, images.clean, each["mix"])
    assert found["mix"] == (None if math.isnan(mix) else pytest.approx(mix, abs=1e-6))
    assert torch.equal(each["mix"].view(images.clean[0]), mixed(images.clean[0], each["mix"].ratio))


def test_classes_are_scored_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [photo_frame(index) for index in range(4)]
    images = torch.from_numpy(np.stack([frame.image for frame in frames]))
    labels = torch.from_numpy(np.stack([frame.labels for frame in frames])).long()
    monkeypatch.setattr(street, "frames", lambda split, resolution: (images, labels))
    monkeypatch.setattr(validators, "POSITIONED", 4)
    task, model = street.StreetNarrow(), segmenter(NARROW, 0)
    names = [name for name in task.evaluate(model) if name.startswith("IoU ")]
    assert names == [f"IoU {name}" for name in CLASSES]
    found = validators.scores(model, validators.target_images(task, 100), validators.all_validators(), names)
    assert set(found["by_class"]["ConsistencyIoU"]) == set(names)
    assert "mIoU" not in found["by_class"]["ConsistencyIoU"]


def test_students_that_cannot_start_from_the_teacher_do_not() -> None:
    assert "frozen-dist-init" in validators.kinds(task_of("digits"))
    assert "frozen-dist-init" not in validators.kinds(task_of("street-narrow"))


# ------------------------------------------------------------------------------------------------- command and report


def test_the_command_makes_what_is_missing_and_prints_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: Dict[str, Any] = {}
    monkeypatch.setattr("benchmarks.evidence.command._make", lambda jobs, teachers, runs: made.update(runs) or [])
    records, setting = Records(tmp_path / "validators" / "digits.jsonl"), Digits().setting()
    for kind in validators.kinds(Digits())[1:]:
        records.add({**record(20, [-3.0, 2.0, 3.0, 4.0], kind=kind), "setting": setting})
    command = ["validators", "--tasks", "digits", "--records", str(tmp_path)]
    assert main([*command, "--seeds", "20"]) == 0
    assert list(made) == ["digits uda 20"]
    assert "8 pairs of a teacher and a student" in capsys.readouterr().out
    assert main([*command[:2], "nothing", *command[3:]]) == 2
    assert "nothing" in capsys.readouterr().err


def test_the_report_takes_the_validators_up(tmp_path: Path) -> None:
    report = pytest.importorskip("benchmarks.evidence.report")
    Records(tmp_path / "validators" / "digits.jsonl").add(record(20, [-3.0, 2.0, 3.0, 4.0]))
    page = tmp_path / "evidence.md"
    page.write_text(f"{report.START}\n{report.END}\n")
    assert report.write_report(folder=tmp_path, docs=tmp_path) == 0
    assert "## The validators\n" in page.read_text()
    assert "](assets/evidence/validators.svg)" in page.read_text()
    assert (tmp_path / "assets/evidence/validators.svg").exists()
    assert report.write_report(folder=tmp_path, docs=tmp_path, check=True) == 0


def test_a_benchmark_that_does_not_exist_is_named() -> None:
    with pytest.raises(CldaError, match=r"no benchmark 'nothing'.*digits"):
        task_of("nothing")
