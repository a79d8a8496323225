from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterable

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from clda_core import CollaborativeLearner, Never, Schedule
from examples.classification import digits, digits_training
from examples.classification.checkpoint import Checkpoint, CheckpointError
from examples.classification.digits_data import FONTS, glyphs, source_digits, strong_view, target_digits
from examples.classification.digits_models import BIG, SMALL, residual_network
from examples.classification.self_training import Batches, HostEma, SelfTraining

ROOT = Path(digits.__file__).resolve().parents[2]

# torch 1.7 looks for a driver at the first backward pass; numpy 1.19 is older than the aliases others deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore:CUDA initialization:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def quick(**changes: object) -> digits.Config:
    settings = {"steps": 6, "threads": 1, "teacher_blocks": (1, 1, 1), "student_blocks": (1, 1, 1)}
    small = {"source_images": 200, "evaluations": 2, "host": SelfTraining(batch=16), "progress": False}
    return digits.Config(**{**settings, **small, **changes})  # type: ignore[arg-type]


def without_seconds(results: digits.Results) -> dict:
    plain = results.to_dict()
    for stage in (plain["teacher"], *plain["students"].values()):
        del stage["seconds"]
    return plain


def test_source_is_a_function_of_the_seed() -> None:
    first, again, other = source_digits(3, 50), source_digits(3, 50), source_digits(4, 50)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)


def test_source_and_target_have_one_format() -> None:
    source = source_digits(0, 500).images
    target, _ = target_digits()
    assert source.shape == (500, 1, 8, 8)
    assert target.images.shape == (1797, 1, 8, 8)
    for images in (source, target.images):
        assert images.dtype == torch.float32
        assert images.min() == 0.0
        assert images.max() == 1.0
    assert abs(source.mean() - target.images.mean()) < 0.05


def test_run_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    source_digits(0, 20)
    residual_network(SMALL, seed=0)
    digits.run(quick(steps=1), make_learners={"kd": digits.learners()[digits.FROZEN_KD]})
    assert torch.equal(torch.get_rng_state(), before)


def test_every_font_renders_ten_distinct_digits() -> None:
    drawn = glyphs()
    assert drawn.shape == (len(FONTS), 10, 64, 64)
    for font in drawn.flatten(2):
        distances = torch.cdist(font, font, compute_mode="donot_use_mm_for_euclid_dist")
        assert (distances + 100 * torch.eye(10)).min() > 5.0


def test_target_for_training_carries_no_labels() -> None:
    target, evaluation = target_digits()
    assert set(vars(target)) == {"images"}
    assert [name for name in dir(evaluation) if not name.startswith("_")] == ["accuracy"]
    batch = Batches(source_digits(0, 20), target, SelfTraining(batch=4), seed=0)[0]
    assert set(vars(batch)) == {"images", "labels", "target", "target_strong"}


def test_evaluation_counts_correct_predictions_and_restores_modes() -> None:
    class Constant(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.eye(10)[torch.zeros(len(images), dtype=torch.long)]

    _, evaluation = target_digits()
    model = Constant().train()
    assert evaluation.accuracy(model) == pytest.approx(100 * 178 / 1797)
    assert model.training


def test_strong_view_keeps_shape_and_masks() -> None:
    images = torch.ones(64, 1, 8, 8)
    view = strong_view(images, torch.Generator().manual_seed(0), masked=0.5)
    assert view.shape == images.shape
    assert 0.4 < view.eq(0).float().mean() < 0.65
    assert torch.equal(view, strong_view(images, torch.Generator().manual_seed(0), masked=0.5))
    assert not strong_view(images, torch.Generator().manual_seed(0), masked=1.0).ne(0).any()


def test_networks_differ_in_depth_only() -> None:
    big, small = (dict(residual_network(blocks, seed=0).named_parameters()) for blocks in (BIG, SMALL))
    assert {"conv1.weight", "bn1.weight", "layer1.3.conv2.weight", "layer2.5.bn2.bias", "fc.bias"} <= set(big)
    assert all(big[name].shape == parameter.shape for name, parameter in small.items())
    assert set(small) < set(big)


def test_batches_depend_on_seed_and_step_only() -> None:
    target, _ = target_digits()
    source = source_digits(0, 40)
    straight, again = (Batches(source, target, SelfTraining(batch=8), seed=5) for _ in range(2))
    _ = straight[0]
    assert torch.equal(straight[1].target_strong, again[1].target_strong)
    assert not torch.equal(straight[1].target, straight[2].target)


def test_host_ema_averages_the_weights() -> None:
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    ema = HostEma(model, decay=0.9)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model)
    assert torch.allclose(ema.model.weight, before + 0.5)
    assert not ema.model.weight.requires_grad


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "a.pt", {"seed": 1}).save({"step": 2})
    assert Checkpoint(tmp_path / "a.pt", {"seed": 1}).load() == {"step": 2}
    with pytest.raises(CheckpointError, match="another run .seed=1; now seed=2"):
        Checkpoint(tmp_path / "a.pt", {"seed": 2}).load()
    (tmp_path / "a.pt").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(tmp_path / "a.pt", {"seed": 1}).load()


def test_job_writes_table_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "new" / "out"
    arguments = ["--steps", "3", "--seed", "100", "--threads", "1", "--processes", "1", "--output", str(output)]
    assert digits.main(arguments, quick(evaluations=12)) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["config"]["steps"] == 3
    assert {"python", "torch", "numpy", "scikit-learn", "clda_core"} <= set(results["versions"])
    assert list(results["students"]) == [digits.UDA_ALONE, digits.FROZEN_KD, digits.CLDA, digits.IN_TURNS]
    for stage in (results["teacher"], *results["students"].values()):
        assert [point["step"] for point in stage["curve"]] == [0, 1, 2, 3]
        assert stage["curve"][-1]["accuracy"] == stage["accuracy"]
        assert 0.0 <= stage["accuracy"] <= 100.0
        assert stage["seconds"]["training"] > 0.0
    frozen = results["students"][digits.FROZEN_KD]
    assert frozen["report"]["rounds"] == []
    assert frozen["teacher_before"] == frozen["teacher_after"] == results["teacher"]["accuracy"]
    assert (output / "figure.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{frozen['accuracy']:.1f}" in printed
    assert "teacher before" in printed


def test_a_second_process_changes_no_figure_and_no_order_even_if_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it runs in this process, which is quicker, and is stopped after the first of its two students."""
    config = quick(steps=1, evaluations=1)
    alone = digits.run(config, folder=tmp_path / "alone")

    def start(process: Any) -> None:
        assert pickle.loads(pickle.dumps(process._args)) == (config, tmp_path / "both", digits.MEANWHILE)
        digits._train_ahead(config, tmp_path / "both", digits.MEANWHILE[:1])

    process = digits.multiprocessing.get_context("spawn").Process
    monkeypatch.setattr(process, "start", start)
    for method in ("join", "terminate"):
        monkeypatch.setattr(process, method, lambda self: None)
    both = digits.run(config, folder=tmp_path / "both", processes=2)
    assert without_seconds(alone) == without_seconds(both)
    assert list(both.students) == [digits.UDA_ALONE, digits.FROZEN_KD, digits.CLDA, digits.IN_TURNS]


def test_students_start_alike_and_uda_alone_ignores_the_teacher() -> None:
    by_default = digits.learners()
    both = {"a": by_default[digits.UDA_ALONE], "kd": by_default[digits.FROZEN_KD], "b": by_default[digits.UDA_ALONE]}
    students = digits.run(quick(evaluations=1), make_learners=both).students
    assert students["a"].curve == students["b"].curve
    assert students["a"].curve[0]["accuracy"] == students["kd"].curve[0]["accuracy"]
    assert students["a"].curve[-1]["loss"] != students["kd"].curve[-1]["loss"]


def test_the_second_turn_starts_as_the_first_from_a_teacher_that_was_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    taught = []

    def watched(teacher: torch.nn.Module, student: torch.nn.Module, batches: Iterable[Tensor]) -> None:
        taught.append((len(list(batches)), student.state_dict()))
        with torch.no_grad():
            teacher.fc.bias.zero_()
            teacher.fc.weight.zero_()

    monkeypatch.setattr(digits, "teach", watched)
    one = {digits.FROZEN_KD: digits.learners()[digits.FROZEN_KD]}
    students = digits.run(quick(evaluations=1), make_learners=one).students
    first, second = students[digits.FROZEN_KD], students[digits.IN_TURNS]
    assert [count for count, _ in taught] == [quick().steps] * 2
    assert first.curve[0]["accuracy"] == second.curve[0]["accuracy"]
    assert first.curve[-1]["loss"] != second.curve[-1]["loss"]
    assert second.teacher_before == first.teacher_before
    assert second.teacher_after == second.curve[-1]["teacher"] != second.teacher_before
    assert second.seconds["training"] > first.seconds["training"]


def resumable() -> dict:
    early = Schedule(warmup=1, interval=2)
    return {
        digits.FROZEN_KD: lambda teacher, student: CollaborativeLearner(teacher, student, schedule=Never()),
        "clda": lambda teacher, student: CollaborativeLearner(teacher, student, schedule=early),
    }


@pytest.fixture(scope="module")
def uninterrupted() -> dict:
    return without_seconds(digits.run(quick(), make_learners=resumable()))


@pytest.mark.parametrize(
    "stop_after", [4, 8, 17, 22], ids=["in the teacher", "before a checkpoint", "in CLDA", "in the second turn"]
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict, stop_after: int
) -> None:
    loss_of, calls = digits_training.self_training_loss, []

    def interrupted(*arguments: object) -> Tensor:
        calls.append(None)
        if len(calls) > stop_after:
            raise KeyboardInterrupt
        return loss_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(digits_training, "self_training_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            digits.run(quick(), make_learners=resumable(), folder=tmp_path)
    resumed = digits.run(quick(), make_learners=resumable(), folder=tmp_path, resume=True)
    assert without_seconds(resumed) == uninterrupted
    assert uninterrupted["students"]["clda"]["report"]["rounds"]


def test_new_run_does_not_go_on_from_old_checkpoints(tmp_path: Path) -> None:
    only = {"uda": digits.learners()[digits.UDA_ALONE]}
    first = digits.run(quick(seed=1, steps=1), make_learners=only, folder=tmp_path)
    with pytest.raises(CheckpointError, match="seed=1; now seed=2"):
        digits.run(quick(seed=2, steps=1), make_learners=only, folder=tmp_path, resume=True)
    second = digits.run(quick(seed=2, steps=1), make_learners=only, folder=tmp_path)
    assert second.teacher.curve != first.teacher.curve


@pytest.mark.filterwarnings("ignore:the student is larger than the teacher")
def test_runs_can_share_a_trained_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "teacher.pt"
    only = {"uda": digits.learners()[digits.UDA_ALONE]}
    first = digits.run(quick(steps=1), make_learners=only, teacher_file=shared)
    seconds = first.teacher.seconds["training"]
    second = digits.run(quick(steps=1, student_blocks=(1, 2, 1)), make_learners=only, teacher_file=shared)
    assert second.teacher.seconds["training"] == seconds
    assert second.teacher.curve == first.teacher.curve


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: expected an integer >= 1, received 0"),
        (["--steps", "many"], "argument --steps: expected an integer, received 'many'"),
        (["--seed", "-1"], "argument --seed: expected an integer >= 0 and < 2147483648, received -1"),
        (["--threads", "0"], "argument --threads: expected an integer >= 1"),
        (["--device", "abacus"], "argument --device: torch cannot use device 'abacus'"),
        (["--output", __file__], "argument --output: expected a folder that can be written"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_arguments_are_named(arguments: list, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        digits.main(arguments)
    assert message in capsys.readouterr().err


def test_resume_with_other_settings_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Checkpoint(tmp_path / "checkpoints" / "teacher.pt", {"stage": "teacher", "seed": 7}).save({})
    assert digits.main(["--steps", "1", "--threads", "1", "--output", str(tmp_path), "--resume"]) == 2
    assert "belongs to another run" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["-m", "examples.classification.digits"], ["examples/classification/digits.py"]])
def test_command_is_found_both_ways(command: list) -> None:
    shown = subprocess.run([sys.executable, *command, "--help"], cwd=str(ROOT), capture_output=True, check=True)
    assert b"--resume" in shown.stdout
