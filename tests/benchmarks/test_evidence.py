"""The evidence benchmarks: records that survive, seeds and variants that exist, statistics, and runs of a few steps."""

import json
import multiprocessing
import re
import warnings
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
import torch

from clda_core import CldaError, Schedule, teach
from clda_core.update import MaskedDistillation

pytest.importorskip("scipy", reason="the benchmarks need scipy, which is no dependency of the package")
pytest.importorskip("sklearn", reason="the digits benchmark reads scikit-learn's images")

from benchmarks.evidence import observation, runs, teaching, variants
from benchmarks.evidence.command import main, seeds_in
from benchmarks.evidence.digits import Digits
from benchmarks.evidence.records import Records, claimed
from benchmarks.evidence.statistics import holm, paired
from benchmarks.evidence.training import overhead, train
from benchmarks.evidence.variants import CLDA, FROZEN, TURNS, UDA, VARIANTS, named
from examples.classification.digits_data import TargetEvaluation
from examples.classification.digits_models import residual_network

REPORTED = range(20, 30)


def record(seed: int = 0, variant: str = FROZEN, student: float = 80.0, teacher: float = 81.0) -> Dict[str, Any]:
    return {
        "setting": "digits-600-600",
        "seed": seed,
        "variant": variant,
        "metric": "accuracy",
        "student": {"accuracy": student},
        "teacher": {"accuracy": teacher},
        "teacher_before": {"accuracy": 81.0},
        "seconds": 10.0,
        "processor_seconds": 10.0,
        "overhead": 1.05 if variant == CLDA else None,
        "versions": {"torch": "2.0", "commit": "abc"},
    }


# ------------------------------------------------------------------------------------------------------------ records


def test_records_are_read_back_and_the_latest_counts(tmp_path: Path) -> None:
    records = Records(tmp_path / "digits.jsonl")
    assert records.read() == []
    for item in (record(0), record(1), record(0, student=90.0)):
        records.add(item)
    done = records.done()
    assert sorted(done) == [("digits-600-600", 0, FROZEN), ("digits-600-600", 1, FROZEN)]
    assert done[("digits-600-600", 0, FROZEN)]["student"] == {"accuracy": 90.0}


@pytest.mark.parametrize("keep", [1, 30, -2])
def test_a_line_cut_short_loses_itself_only(tmp_path: Path, keep: int) -> None:
    records = Records(tmp_path / "digits.jsonl")
    records.add(record(0))
    whole = records.path.read_text()
    records.path.write_text(whole + whole[:keep].rstrip("\n"))
    with pytest.warns(UserWarning, match="line 2 is no whole record"):
        assert len(records.read()) == 1
    records.add(record(1))
    with pytest.warns(UserWarning, match="line 2"):
        assert [item["seed"] for item in records.read()] == [0, 1]


def test_a_record_without_its_key_or_with_nan_is_refused(tmp_path: Path) -> None:
    records = Records(tmp_path / "digits.jsonl")
    with pytest.raises(KeyError, match="variant"):
        records.add({"setting": "x", "seed": 1})
    with pytest.raises(ValueError, match="nan|JSON"):
        records.add(record(student=float("nan")))
    assert not records.path.exists() or records.path.read_text() == ""


def _add_many(path: Path, first: int) -> None:
    records = Records(path)
    for seed in range(first, first + 50):
        records.add({**record(seed), "padding": "x" * 5000})


def test_two_processes_write_whole_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_add_many, args=(tmp_path / "r.jsonl", first)) for first in (0, 50)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(item["seed"] for item in Records(tmp_path / "r.jsonl").read()) == list(range(100))


def test_a_withdrawn_run_counts_as_not_made_until_it_is_made_anew(tmp_path: Path) -> None:
    records = Records(tmp_path / "digits.jsonl")
    records.add({**record(0), "withdrawn": "made with a fault"})
    records.add(record(1))
    assert [item["seed"] for item in records.read()] == [0, 1]
    assert [seed for _, seed, _ in records.done()] == [1]
    records.add(record(0, student=90.0))
    assert records.done()[("digits-600-600", 0, FROZEN)]["student"] == {"accuracy": 90.0}


def test_a_run_is_claimed_by_one_process_at_a_time(tmp_path: Path) -> None:
    with claimed(tmp_path, "0-clda") as first, claimed(tmp_path, "0-clda") as second, claimed(
        tmp_path, "1-clda"
    ) as third:
        assert (first, second, third) == (True, False, True)
    with claimed(tmp_path, "0") as again:
        assert again


# --------------------------------------------------------------------------------------------------------- statistics


def test_paired_difference_has_an_interval_that_covers_the_mean() -> None:
    theirs = np.linspace(70, 80, 10)
    noise = np.array([0.5, -0.3, 0.1, 0.4, -0.2, 0.0, 0.3, -0.4, 0.2, -0.1])
    found = paired(theirs + 2 + noise, theirs)
    assert found is not None
    assert found.mean == pytest.approx(2 + noise.mean())
    assert 1.5 < found.low < found.mean < found.high < 2.5
    assert found.above_zero
    assert found.p == pytest.approx(2 / 2**10)  # all signs flipped, either way
    none = paired(theirs + noise, theirs)
    assert none is not None
    assert none.low < 0 < none.high
    assert none.p > 0.2


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [paired(rng.normal(1.0, 2.0, 10), np.zeros(10)) for _ in range(30)]
    assert 0.8 <= np.mean([item.low <= 1.0 <= item.high for item in covered if item is not None]) <= 1.0


def test_too_few_pairs_have_no_difference_and_equal_ones_no_width() -> None:
    assert paired([1.0, 2.0], [0.0, 1.0]) is None
    same = paired([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    assert same is not None
    assert (same.low, same.mean, same.high) == (1.0, 1.0, 1.0)


def test_holm_against_its_definition() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5})
    assert adjusted == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})
    assert holm({}) == {}


# --------------------------------------------------------------------------------------------------------------- runs


class TinyDigits(Digits):
    """The same host and data with networks of a block or two a stage, evaluated on a few images."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluation = TargetEvaluation(self.target.images[:50], np.arange(50) % 10)

    def teacher(self, seed: int) -> torch.nn.Module:
        return residual_network((2, 2, 2), seed=seed + 1)

    def student(self, seed: int) -> torch.nn.Module:
        return residual_network((1, 1, 1), seed=seed)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Digits:
    monkeypatch.setattr(runs, "WORK", tmp_path)
    task = TinyDigits()
    task.steps, task.teacher_steps = 20, 4
    return task


def test_equal_runs_have_equal_figures(tiny: Digits) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, other = (runs.run(tiny, 100, "after-half") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for key in ("student", "student_ema", "teacher", "curve", "rounds", "teacher_before"):
        assert one[key] == other[key], key
    assert one["rounds"]["made"] == 1
    assert one["config"]["schedule"]["interval"] == Schedule().interval
    assert json.loads(json.dumps(one)) == one


def test_overhead_compares_the_steps_of_rounds_with_those_between() -> None:
    assert overhead([1.0] * 10, [False] * 10) is None
    # After five steps that are slow for another reason every second step is a round of twice the time.
    assert overhead([9.0] * 5 + [2.0, 1.0] * 5, [False] * 5 + [True, False] * 5) == pytest.approx((5 + 10 * 1.5) / 15)


def test_variants_start_from_the_same_teacher_and_differ_as_they_say(tiny: Digits) -> None:
    made = {
        name: runs.run(tiny, 100, name) for name in (UDA, FROZEN, "frozen-init", "frozen-cotrained", "teacher-longer")
    }
    assert len({json.dumps(item["teacher_before"]) for item in made.values()}) == 1
    assert made[UDA]["teacher"] is None
    assert made[FROZEN]["teacher"] == made[FROZEN]["teacher_before"]
    assert made[FROZEN]["rounds"]["made"] == 0
    assert made["teacher-longer"]["student"] is None
    assert made["frozen-init"]["curve"] != made[FROZEN]["curve"]
    assert made["frozen-cotrained"]["curve"] != made[FROZEN]["curve"]


def test_runs_of_another_teacher_are_not_recorded_beside(tiny: Digits) -> None:
    """The same seed gives another teacher on another kind of processor."""
    first = runs.run(tiny, 0, FROZEN)
    figure = first["teacher_before"][tiny.metric]
    other = {**first, "teacher_before": {tiny.metric: figure + 1}}
    runs.check_teacher(tiny, 0, figure, [first, {**other, "seed": 1}, {**other, "setting": "another"}])
    with pytest.raises(CldaError, match=r"teacher of seed 0 is another one.*--records FOLDER"):
        runs.run(tiny, 0, UDA, [first, other])


def test_turns_start_alike_and_each_has_the_teacher_that_the_one_before_left(
    tiny: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: List[Tuple[float, ...]] = []

    def watched(task: Digits, host: Any, **options: Any) -> Dict[str, Any]:
        started.append(tuple(_fingerprint(model) for model in (options["learner"].teacher, host.model)))
        return train(task, host, **options)

    runs.trained_teacher(tiny, 100)
    monkeypatch.setattr(runs, "train", watched)
    monkeypatch.setattr(runs, "TEACHING_ROUNDS", 3)
    # Unguarded: networks as little trained as these agree on too little for a guard to go by.
    monkeypatch.setattr(variants, "teach", lambda *models, **rest: teach(*models, update=MaskedDistillation(), **rest))
    frozen = runs.run(tiny, 100, FROZEN)
    one, two, again = (runs.run(tiny, 100, name) for name in ("turn", TURNS, "born-again"))
    first, second, second_again = started  # the first turn is frozen-teacher KD, and is trained once
    assert len({student for _, student in started}) == 1
    assert len({teacher for teacher, _ in (first, second, second_again)}) == 3
    assert one["student"] == two["turns"][0]["student"] == again["turns"][0]["student"] == frozen["student"]
    assert one["teacher"] == two["turns"][0]["teacher"]
    assert again["teacher"] == again["teacher_before"]
    assert two["overhead"] > one["overhead"] > 1


def test_longer_runs_take_more_steps(tiny: Digits) -> None:
    assert runs.run(tiny, 100, "frozen-twice")["curve"][-1]["step"] == 2 * tiny.steps
    trained_on = runs.run(tiny, 100, "frozen-longer")
    assert trained_on["curve"][-1]["step"] == tiny.steps
    assert trained_on["processor_seconds"] > runs.run(tiny, 100, FROZEN)["processor_seconds"]


class DroppingDigits(TinyDigits):
    """The same with dropout, which draws from the global generator."""

    def teacher(self, seed: int) -> torch.nn.Module:
        return torch.nn.Sequential(super().teacher(seed), torch.nn.Dropout(0.3))

    def student(self, seed: int) -> torch.nn.Module:
        return torch.nn.Sequential(super().student(seed), torch.nn.Dropout(0.3))


@pytest.mark.parametrize("first", [UDA, "frozen-longer"])
def test_a_run_draws_alike_whether_or_not_it_trains_the_teacher_first(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = DroppingDigits()
    task.steps, task.teacher_steps = 6, 4
    made: List[Dict[str, Any]] = []
    for folder, names in (("first", [first]), ("second", [FROZEN, first])):
        monkeypatch.setattr(runs, "WORK", tmp_path / folder)
        made.append([runs.run(task, 100, name) for name in names][-1])
    for key in ("teacher_before", "student", "student_ema", "curve"):
        assert made[0][key] == made[1][key], key


def test_an_unseeded_process_trains_the_same_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = DroppingDigits()
    task.teacher_steps = 4
    found = []
    for folder in ("a", "b"):
        monkeypatch.setattr(runs, "WORK", tmp_path / folder)
        torch.rand(1)
        state = torch.get_rng_state()
        found.append(_fingerprint(runs.trained_teacher(task, 100)))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]


def _fingerprint(model: torch.nn.Module) -> float:
    return float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters()))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_has_a_learner_that_can_be_built(tiny: Digits, name: str) -> None:
    variant = VARIANTS[name]
    learner = variant.learner(tiny, tiny.teacher(0), tiny.student(0), 0)
    assert (learner is None) == (variant.strategies is None)


def test_the_observation_measures_both_domains_by_layer(tiny: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observation, "BATCHES", 2)
    found = observation.observe(tiny, 100, "student", "source")
    layers = set(found["sizes"])
    for threshold in ("own_threshold", "source_threshold"):
        for domain in ("target", "source"):
            rates = found[threshold][domain]
            assert set(rates) == layers
            assert 0 < observation.overall(rates, found["sizes"]) < 1
    # A reference is averaged over the batches so far, a model's own threshold is each batch's.
    assert found["own_threshold"]["source"] == pytest.approx(found["source_threshold"]["source"], abs=0.02)
    assert found["own_threshold"]["target"] != found["source_threshold"]["target"]
    assert observation.observe(tiny, 100, "student", "uda")["target"] != found["target"]
    assert observation.overall({"a": 1.0, "b": 0.25}, {"a": 1, "b": 2}) == 0.5


def test_a_fixed_student_teaches_copies_of_the_teacher(
    tiny: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "ROUNDS", 2)
    monkeypatch.setattr(teaching, "BATCHES", 1)
    found = teaching.teach(tiny, 100)
    assert set(found["after"]) == {"lowest", "random", "highest", "all"}
    assert found["after"]["all"]["share_of_parameters"] == 1
    assert 0 < found["after"]["highest"]["share_of_parameters"] < found["after"]["lowest"]["share_of_parameters"]
    for figures in (found["before"], *found["after"].values()):
        assert figures["divergence"] >= 0
        assert 0 <= figures["agreement"] <= 1
    table = pytest.importorskip("benchmarks.evidence.report").teaching_table([found])
    assert "| highest" in table
    assert "| (before)" in table


def test_command_resumes_where_it_was(
    tiny: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = Records(tmp_path / "digits.jsonl")
    for seed in range(2):
        records.add({**record(seed), "setting": Digits().setting()})
    assert main(["digits", "--seeds", "0-1", "--variants", FROZEN, "--records", str(tmp_path)]) == 0
    assert "2 runs are recorded, 0 are to be made" in capsys.readouterr().out


def test_seeds_and_variants_that_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert seeds_in("0-2,7") == [0, 1, 2, 7]
    for text in ("", "a", "3-1", "1-"):
        with pytest.raises(CldaError, match="names no seeds"):
            seeds_in(text)
    with pytest.raises(CldaError, match="no variant or group 'nothing'"):
        named(["nothing"])
    assert list(named(["uda", "uda"])) == ["uda"]
    assert list(named(["all"])) == list(VARIANTS)
    assert main(["digits", "--variants", "nothing", "--records", str(tmp_path)]) == 2
    assert "Variants: uda, frozen, frozen-dist, clda" in capsys.readouterr().err


def test_head_to_head_and_by_class() -> None:
    tables = pytest.importorskip("benchmarks.evidence.tables")
    runs_by_variant: Dict[str, Dict[int, Dict[str, Any]]] = {FROZEN: {}, CLDA: {}, "select-all": {}}
    for seed in range(4):
        for variant, figure in ((FROZEN, 80.0), (CLDA, 83.0), ("select-all", 81.5)):
            item = record(seed, variant, student=figure, teacher=figure)
            item["student"]["IoU car"] = figure / 2
            item["teacher"]["IoU car"] = 1.0
            runs_by_variant[variant][seed] = item
    (head_to_head,) = tables.contrasts(runs_by_variant)
    assert "| CLDA − all layers | student  | 4       | +1.50 [+1.50, +1.50]" in head_to_head
    assert "random" not in head_to_head
    (by_class,) = tables.per_class(runs_by_variant)
    car = next(line for line in by_class.splitlines() if line.startswith("| car"))
    assert [cell.strip() for cell in car.strip("|").split("|")] == ["car", "40.0", "1.0", "41.5", "1.0"]
    assert tables.per_class({FROZEN: {0: record()}}) == []


def test_the_report_leaves_withdrawn_runs_out_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = pytest.importorskip("benchmarks.evidence.report")
    drawn: List[List[str]] = []
    monkeypatch.setattr(report, "cost_figure", lambda runs, path, alike: drawn.append(sorted(runs)))
    records = Records(tmp_path / "digits.jsonl")
    for seed in REPORTED[:4]:
        records.add(record(seed, FROZEN, student=80.0 + 0.1 * (seed % 10)))
        records.add({**record(seed, CLDA, student=66.6, teacher=66.6), "withdrawn": "made with a fault"})
        records.add(record(seed, "select-all", student=81.0))
    page = tmp_path / "evidence.md"
    page.write_text(f"{report.START}\n{report.END}\n")
    assert report.write_report(folder=tmp_path, docs=tmp_path) == 0
    text = page.read_text()
    assert "**Withdrawn**, 4 runs (CLDA: 4): made with a fault." in text
    (row,) = [line for line in text.splitlines() if line.startswith("| CLDA ")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["CLDA", "withdrawn (4)", *[""] * 5]
    assert "66.6" not in text
    assert "CLDA − all layers" not in text
    assert drawn == [[FROZEN, "select-all"]]
    records.add(record(REPORTED[0], CLDA, student=81.5))  # one of them is made anew
    assert report.write_report(folder=tmp_path, docs=tmp_path) == 0
    text = page.read_text()
    assert "**Withdrawn**, 3 runs (CLDA: 3): made with a fault." in text
    assert "| CLDA                            | 1       | 81.5" in text
    assert "66.6" not in text


def test_gains_are_over_frozen_kd_of_the_same_loss_and_start() -> None:
    """A better loss and a start from the teacher's layers are no gain of the rounds."""
    tables = pytest.importorskip("benchmarks.evidence.tables")
    figures = {FROZEN: 80.0, "frozen-dist": 81.0, CLDA: 82.0, "frozen-dist-init": 84.0, "clda-init": 84.5}
    of = {name: {seed: record(seed, name, student=figure) for seed in range(5)} for name, figure in figures.items()}
    for alike, gains in ((True, {CLDA: "+1.00", "clda-init": "+0.50"}), (False, {CLDA: "+2.00", "clda-init": "+4.50"})):
        lines = tables.tables(of, alike=alike).splitlines()
        for name, gain in gains.items():
            (line,) = (line for line in lines if line[1:].split("|")[0].strip() == tables.VARIANTS[name].title)
            assert gain in line


def test_withdrawn_comparisons_stay_in_the_family_of_holms_correction() -> None:
    """A comparison does not become significant because others were withdrawn."""
    tables = pytest.importorskip("benchmarks.evidence.tables")
    of: Dict[str, Dict[int, Dict[str, Any]]] = {name: {} for name in ("former", "former-random", FROZEN)}
    for seed in range(8):
        for name, figure in (("former", 82.0 + 0.1 * seed), ("former-random", 81.0), (FROZEN, 80.0)):
            of[name][seed] = record(seed, name, student=figure, teacher=figure)
    # All differences of one sign, in both roles: p = 2 / 2^8, doubled by the correction.
    gone = {"former-all": {0: record()}, CLDA: {0: record()}}
    starred = [re.findall(r"\]\*", table) for table in (tables.contrasts(of)[0], tables.contrasts(of, gone)[0])]
    assert [len(stars) for stars in starred] == [2, 0]
    heading = "### Which layers, with the former defaults"
    beside = tables.tables(of, {f"former-{name}": {0: record()} for name in ("highest", "all")}, alike=False)
    assert heading in beside
    assert "| all layers    | withdrawn (1)" in beside


def test_former_seeds_have_a_page_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = pytest.importorskip("benchmarks.evidence.report")
    drawn: List[Path] = []
    monkeypatch.setattr(report, "cost_figure", lambda runs, path, alike: drawn.append(path))
    records = Records(tmp_path / "digits.jsonl")
    for seed, figure in ((0, 70.0), (1, 71.0), (REPORTED[0], 90.0), (100, 10.0), (200, 20.0)):
        records.add(record(seed, FROZEN, student=figure))
    pages = [tmp_path / "evidence.md", tmp_path / "evidence-former.md"]
    pages[0].write_text(f"{report.START}\n{report.END}\n")
    with pytest.raises(CldaError, match="evidence-former.md is missing"):
        report.write_report(folder=tmp_path, docs=tmp_path)
    pages[1].write_text(f"{report.START}\n{report.END}\n")
    drawn.clear()
    assert report.write_report(folder=tmp_path, docs=tmp_path) == 0
    today, former = (page.read_text() for page in pages)
    assert "## digits-600-600\n" in today
    assert "## digits-600-600, former defaults\n" in former
    (row,) = [line for line in today.splitlines() if line.startswith("| KD from the frozen teacher")]
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["1", "90.0"]
    (row,) = [line for line in former.splitlines() if line.startswith("| KD from the frozen teacher")]
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["2", "70.5"]
    assert [path.name for path in drawn] == ["digits-600-600.svg", "digits-600-600-former-defaults.svg"]


def test_report_without_records_or_page_says_what_to_do(tmp_path: Path) -> None:
    report = pytest.importorskip("benchmarks.evidence.report")
    with pytest.raises(CldaError, match="no records in"):
        report.write_report(folder=tmp_path, docs=tmp_path)
    for seed in REPORTED[:4]:
        for variant, figure in (("frozen-dist", 80.0), (CLDA, 81.0)):
            Records(tmp_path / "digits.jsonl").add(record(seed, variant, student=figure + 0.1 * (seed % 10)))
    with pytest.raises(CldaError, match="evidence.md is missing"):
        report.write_report(folder=tmp_path, docs=tmp_path)
    page = tmp_path / "evidence.md"
    page.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    assert report.write_report(folder=tmp_path, docs=tmp_path) == 0
    assert "| +1.00 [+1.00, +1.00]" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert "old" not in page.read_text()
    assert report.write_report(folder=tmp_path, docs=tmp_path, check=True) == 0
    page.write_text(page.read_text().replace("+1.00", "+9.00"))
    assert report.write_report(folder=tmp_path, docs=tmp_path, check=True) == 1
