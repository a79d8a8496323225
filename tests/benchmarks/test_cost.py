"""The cost benchmark: figures and budgets, shares of a schedule, the report, and every part on tiny networks."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the benchmarks' segmentation networks are transformers'")
pytest.importorskip("tabulate", reason="the benchmarks print tables with tabulate, no dependency of the package")
pytest.importorskip("sklearn", reason="the digits' networks stand beside scikit-learn's images")

from benchmarks.cost import imports as import_part
from benchmarks.cost.command import main
from benchmarks.cost.distillation import distillation
from benchmarks.cost.figures import Figure, from_dict, table
from benchmarks.cost.iteration import iteration, shares
from benchmarks.cost.memory import memory
from benchmarks.cost.report import END, START, read, write_report
from benchmarks.cost.saliency import saliency
from benchmarks.cost.scaling import scaling, slope
from benchmarks.cost.settings import Host, VitSegmenter, plain_kl, settings
from benchmarks.cost.synchronisation import LOSSES, waits
from benchmarks.cost.timing import interleaved, ratio, spread
from benchmarks.cost.weights import weights
from clda_core import CldaError, CollaborativeLearner, Never, Schedule
from clda_core.distillation import KLDistillation, kl_distillation

CPU = torch.device("cpu")
TINY = settings(CPU)["tiny"]

# ------------------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize(
    ("value", "budget", "missed"),
    [
        (1.02, {"at_most": 1.03}, False),
        (1.04, {"at_most": 1.03}, True),
        (0.95, {"at_least": 0.9}, False),
        (0.85, {"at_least": 0.9}, True),
        (float("nan"), {"at_most": 1.0}, True),
        (None, {"at_most": 1.0}, False),
        (99.0, {}, False),
    ],
)
def test_a_budget_is_missed_from_one_side_only(value, budget, missed) -> None:
    one = Figure("part", "what", "where", value, **budget)
    assert one.missed is missed
    assert one.judged is (value is not None and bool(budget))


def test_a_figure_survives_its_record_and_shows_in_the_table() -> None:
    one = Figure("part", "ours / theirs", "street", 1.25, low=1.2, high=1.5, at_most=1.1, note="why")
    other = Figure("part", "ours / absent", "street", None, at_most=1.0, note="absent is not installed")
    nowhere = Figure("imports", "import", "", 30.0, unit="ms")
    for figure in (one, other, nowhere):
        assert from_dict(json.loads(json.dumps(figure.to_dict()))) == figure
    shown = table([one, other])
    row = next(line for line in shown.splitlines() if "ours / theirs" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == ["1.250 ×", "1.200 – 1.500", "≤ 1.1", "missed"]
    assert "2. absent is not installed" in shown


def test_times_are_taken_in_turns_and_compared_repeat_by_repeat() -> None:
    calls = []
    tasks = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleaved(tasks, repeats=3, device=CPU, at_least=0.0)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ba"
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}
    assert ratio({"a": [2.0, 30.0, 6.0], "b": [1.0, 10.0, 3.0]}, "a", "b").median == 2.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_the_shares_of_a_schedule_are_those_of_its_steps() -> None:
    assert shares(Schedule(warmup=500), 1000) == (0.024, 0.047)
    assert shares(Schedule(warmup=0, interval=1, observe_every=1), 100) == (1.0, 0.0)


# -------------------------------------------------------------------------------------------------------------- parts


def test_the_host_distils_the_same_with_the_learner_and_by_hand() -> None:
    hosts = [Host(TINY, CPU) for _ in range(2)]
    models = hosts[1].teacher, hosts[1].student
    learner = CollaborativeLearner(*models, schedule=Never(), distillation=KLDistillation())
    for host, step in zip(hosts, (hosts[0].with_plain_kd, lambda: hosts[1].with_learner(learner))):
        host.student.eval()  # no dropout
        step()
    for ours, theirs in zip(*(host.student.parameters() for host in hosts)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    logits = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(plain_kl(*logits), kl_distillation(*logits))


def test_a_vision_transformer_has_logits_of_the_images_size() -> None:
    network = VitSegmenter((1, 16, 2), classes=5)
    assert network(torch.rand(2, 3, 28, 42)).shape == (2, 5, 28, 42)


def test_an_iteration_has_a_figure_for_each_budget() -> None:
    found = list(iteration(TINY, CPU, 1))
    assert [one.at_most for one in found if one.judged] == [1.005, 1.03, 1.03, 1.25, 1.3, 1.1, 1.1]
    assert all(one.value is not None and one.value > 0 for one in found)
    by_name = {one.what: one.value for one in found}
    assert by_name["CLDA, guarded, all rejected / frozen-teacher KD"] > 0


def test_weights_and_saliency_say_what_is_not_installed(monkeypatch) -> None:
    for module in ("weights", "saliency"):
        monkeypatch.setattr(f"benchmarks.cost.{module}.other", lambda name: None)
    found = [*weights(TINY, CPU, 2), *saliency(TINY, CPU, 1)]
    absent = {one.what: one.note for one in found if one.value is None}
    assert absent == {
        "Average: time / timm's ModelEmaV3": "timm is not installed",
        "saliency + LSR from given gradients / Torch-Pruning's GroupTaylorImportance": "torch-pruning is not installed",
    }
    rates = [one.value for one in found if one.unit == "GB/s"]
    assert len(rates) == 3
    assert min(rates) > 0


def test_the_losses_take_less_memory_than_the_plain_composition() -> None:
    found = {one.what: one for one in distillation(CPU, 1, (2, 19, 512, 512))}
    for loss in ("KL", "DIST, the default"):
        judged = next(one for what, one in found.items() if what.startswith(f"{loss}: peak memory / plain"))
        assert not judged.missed
        assert found[f"peak memory, {loss}"].value > 2 * 19 * 512 * 512 * 4 / 2**20  # the gradient at least


def test_memory_is_measured_beyond_the_frozen_teachers() -> None:
    found = list(memory(TINY, CPU, None))
    assert found[0].value > 0
    assert [one.what.partition(",")[0] for one in found[1:4]] == ["beyond it"] * 3


def test_the_slope_is_that_of_the_last_decade() -> None:
    assert slope([1, 10, 100], [5.0, 1.0, 10.0]) == pytest.approx(1.0)
    assert slope([1, 10], [1.0, 100.0]) == pytest.approx(2.0)
    found = list(scaling(CPU, 1, (1_000, 10_000), (2, 4)))
    assert [one.where for one in found if one.judged] == ["1,000 to 10,000 parameters"] * 2 + ["2 to 4 layers"] * 2


@pytest.mark.parametrize(("cpu", "missed"), [([90.0, 31.0, 82.0], False), ([90.0, 81.0, 82.0], True)])
def test_the_import_is_judged_by_the_least_of_its_runs_beside_torchs(cpu, missed, monkeypatch) -> None:
    script, runs = import_part._loaded(), iter(zip(cpu, (2600.0, 2200.0, 2000.0)))
    monkeypatch.setattr(script, "both", lambda: next(runs))
    monkeypatch.setattr(import_part, "_loaded", lambda: script)
    alone, share = import_part.imports(len(cpu))
    assert (alone.value, alone.judged) == (min(cpu), False)
    assert (share.value, share.missed) == (pytest.approx(min(cpu) / 2000.0), missed)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_outside_rounds_waits_for_the_device(name) -> None:
    assert not waits(LOSSES[name](), CPU)


def test_a_round_does_wait() -> None:
    assert waits(LOSSES["KLDistillation"](), CPU, round_=True)


# ------------------------------------------------------------------------------------------------- command and report


def test_the_command_writes_a_record_that_the_report_reads(tmp_path: Path, capsys) -> None:
    record, page = tmp_path / "cpu.jsonl", tmp_path / "cost.md"
    assert main(["--parts", "synchronisation", "--record", str(record), "--note", "Nothing else ran."]) == 0
    assert "1 budgets, 0 missed" in capsys.readouterr().out
    page.write_text(f"by hand\n{START}\nold\n{END}\nmore by hand\n")
    assert write_report(folder=tmp_path, page=page, check=True) == 1
    assert write_report(folder=tmp_path, page=page) == 0
    text = page.read_text()
    assert text.startswith("by hand\n")
    assert text.endswith("\nmore by hand\n")
    assert "### Waiting for the device" in text
    assert "Nothing else ran." in text
    assert write_report(folder=tmp_path, page=page, check=True) == 0


def test_a_missed_budget_is_the_exit_status(tmp_path: Path, monkeypatch, capsys) -> None:
    missed = Figure("synchronisation", "too much", "here", 2.0, at_most=1.0)
    monkeypatch.setattr("benchmarks.cost.command.synchronisation", lambda device: iter([missed]))
    record = tmp_path / "cpu.jsonl"
    assert main(["--parts", "synchronisation", "--record", str(record)]) == 1
    assert "missed: too much (here)" in capsys.readouterr().err
    assert read(record)[1] == [missed]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--parts", "speed"], "'speed' is unknown"), (["--models", "resnet"], "'resnet' is unknown")],
)
def test_what_is_unknown_is_named(tmp_path: Path, arguments, message, capsys) -> None:
    assert main([*arguments, "--record", str(tmp_path / "cpu.jsonl")]) == 2
    assert message in capsys.readouterr().err


def test_a_report_needs_records_and_a_place_for_them(tmp_path: Path) -> None:
    with pytest.raises(CldaError, match="no records"):
        write_report(folder=tmp_path, page=tmp_path / "cost.md")
    main(["--parts", "synchronisation", "--record", str(tmp_path / "cpu.jsonl")])
    with pytest.raises(CldaError, match="no place for the tables"):
        write_report(folder=tmp_path, page=tmp_path / "cost.md")
    (tmp_path / "cuda.jsonl").write_text("{}\n")
    with pytest.raises(CldaError, match=r"cuda\.jsonl is no record"):
        write_report(folder=tmp_path, page=tmp_path / "cost.md")
