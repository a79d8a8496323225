from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import sys
import types
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import numpy as np
import pytest
import torch
from torch import nn

from clda_core import CldaError, CollaborativeLearner, Schedule, group_layers
from clda_core.lead import FixedTrust
from clda_core.update import MaskedDistillation
from examples.mic.cls import compatibility, host, synthetic, train, verify
from examples.mic.cls.plugin import Plugin, first_output
from examples.mic.cls.teacher import architecture_of
from tests.examples.mic_cls_fakes import write_host

SCRIPT_FILE = f"examples/{host.SCRIPT}"


@pytest.fixture(autouse=True)
def _nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Whether numpy and torchvision are the host's is not what these tests are about; `apply` has tests of its own.
    monkeypatch.setattr(compatibility, "apply", list)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    forget_host()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_host(tmp_path_factory.mktemp("MIC") / "cls")


def forget_host() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("common", "dalib", "utils")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def teacher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A resnet50 that the host alone has trained."""
    log = tmp_path_factory.mktemp("teacher")
    with host.entered(folder):
        host.run(["-a", "resnet50", "--epochs", "1", "-i", "6", "--seed", "5", "--log", str(log)])
    forget_host()
    return log / "checkpoints" / "best.pth"


def launch(folder: Path, log: Path, ours: List[str], theirs: Optional[List[str]] = None) -> Optional[Plugin]:
    forget_host()
    options = train.parser().parse_args(["--host", str(folder), *ours])
    return train.run(options, ["--log", str(log), *(theirs or [])])


def with_teacher(file: Path, *more: str) -> List[str]:
    return ["--clda-teacher", str(file), "--clda-teacher-arch", "resnet50", *more]


def eager(teacher: nn.Module, student: nn.Module) -> CollaborativeLearner:
    schedule = Schedule(warmup=1, interval=2)
    return CollaborativeLearner(
        teacher,
        student,
        update=MaskedDistillation(learning_rate=0.05),
        schedule=schedule,
        trust=FixedTrust(),
        extract=first_output,
    )


def weights(log: Path, name: str = "latest.pth") -> Dict[str, Any]:
    return torch.load(str(log / "checkpoints" / name), map_location="cpu")


def same(first: Any, second: Any) -> bool:
    return verify.equal(first, second)


def ended(log: Path) -> Dict[str, Any]:
    return json.loads((log / "end.json").read_text())


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = tmp_path_factory.mktemp("alone")
    forget_host()
    with host.entered(folder):
        host.run(["--log", str(log)])
    forget_host()
    return log


# ------------------------------------------------------------------------------------------------------ what must hold


def test_off_is_bitwise_the_host_alone_and_builds_no_teacher(folder: Path, alone: Path, tmp_path: Path) -> None:
    assert launch(folder, tmp_path, ["--clda-off", "--clda-teacher", "no such file"]) is None
    assert same(weights(alone), weights(tmp_path))
    assert ended(alone) == ended(tmp_path)
    assert sorted(os.listdir(str(tmp_path / "checkpoints"))) == ["best.pth", "latest.pth"]


def test_weight_zero_without_rounds_is_bitwise_the_host_alone(
    folder: Path, alone: Path, teacher: Path, tmp_path: Path
) -> None:
    launched = launch(folder, tmp_path, with_teacher(teacher, "--clda-weight", "0", "--clda-no-rounds"))
    assert launched is not None
    assert launched.learner is not None
    assert launched.learner.report().steps == 6
    assert same(weights(alone), weights(tmp_path))
    # losses, and what Python's, numpy's and torch's generators give after the training
    assert ended(alone) == ended(tmp_path)


def test_the_view_is_the_hosts_masked_images_and_the_learner_gets_its_optimizer(
    folder: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: List[Any] = []
    rates: List[Any] = []
    distill, after_step = CollaborativeLearner.distill, CollaborativeLearner.after_step

    def watched(self: Any, output: Any, inputs: Any, **more: Any) -> Any:
        calls.append((inputs, more["view"]))
        return distill(self, output, inputs, **more)

    def counted(self: Any, **more: Any) -> None:
        rates.append(more["optimizer"].param_groups[0]["lr"])
        after_step(self, **more)

    monkeypatch.setattr(CollaborativeLearner, "distill", watched)
    monkeypatch.setattr(CollaborativeLearner, "after_step", counted)
    launched = launch(folder, tmp_path, with_teacher(teacher, "--clda-interval", "1"))
    assert launched is not None
    assert len(calls) == len(rates) == 6
    for images, view in calls:
        shown = (view != 0).any(dim=1, keepdim=True).float()
        assert view.shape == images.shape
        assert torch.equal(view, images * shown)
        assert 0.3 < float(shown.mean()) < 0.7
    assert launched.learner is not None
    assert launched.learner.state_dict()["lead"]["of"] == "SoftConsistency"
    assert len(launched.learner.report().rounds) == 6


def test_losses_of_the_first_iteration_are_the_hosts_own(
    folder: Path, alone: Path, teacher: Path, tmp_path: Path
) -> None:
    launch(folder, tmp_path, with_teacher(teacher, "--clda-warmup", "1", "--clda-interval", "1"))
    own, other = ended(alone)["losses"], ended(tmp_path)["losses"]
    assert own[:2] == other[:2]
    assert own[3] != other[3]


def test_kd_joins_as_if_added_to_the_hosts_second_loss(folder: Path, teacher: Path, tmp_path: Path) -> None:
    by_hand = {
        "    main(args)": "    import clda_core.distillation\n"
        "    big = ImageClassifier(utils.get_model('resnet50', pretrain=False), args.classes)\n"
        f"    big.load_state_dict(torch.load({str(teacher)!r}))\n    big.eval()\n    main(args)",
        "        losses.append(loss.item())\n        loss.backward()\n        optimizer.second_step": (
            "        with torch.no_grad():\n            z = big(x_t)\n"
            "        kd = clda_core.distillation.dist_distillation(y_t, z, temperature=3)\n"
            "        losses.append(loss.item())\n        (loss + 0.5 * kd).backward()\n        optimizer.second_step"
        ),
    }
    edited = write_host(tmp_path / "edited", {SCRIPT_FILE: by_hand})
    forget_host()
    with host.entered(edited):
        host.run(["--log", str(tmp_path / "by-hand")])
    options = ["--clda-weight", "0.5", "--clda-temperature", "3", "--clda-no-rounds"]
    launch(folder, tmp_path / "ours", with_teacher(teacher, *options))
    expected, received = weights(tmp_path / "by-hand"), weights(tmp_path / "ours")
    for name, value in expected.items():
        assert torch.allclose(value.double(), received[name].double(), atol=1e-5), name


def test_rounds_change_only_reported_layers_of_the_teacher(
    folder: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "learner_from", lambda options: eager)
    launched = launch(folder, tmp_path, with_teacher(teacher))
    assert launched is not None
    assert launched.learner is not None
    rounds = launched.learner.report().rounds
    assert [record.step for record in rounds] == [3, 5]
    updated = {layer for record in rounds for layer in record.updated}
    reported = {
        name for layer in group_layers(launched.learner.teacher) if layer.name in updated for name in layer.parameters
    }
    before, after = torch.load(str(teacher)), launched.learner.teacher.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= reported


def test_teacher_is_frozen_evaluating_and_unknown_to_the_host(
    folder: Path, alone: Path, teacher: Path, tmp_path: Path
) -> None:
    launched = launch(folder, tmp_path, with_teacher(teacher, "--clda-warmup", "1", "--clda-interval", "1"))
    assert launched is not None
    assert launched.learner is not None
    big, student = launched.learner.teacher, launched.learner.student
    assert not any(module.training for module in big.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in big.parameters())
    stepped = {id(p) for group in launched.optimizer.param_groups for p in group["params"]}
    assert stepped == {id(p) for p in student.parameters()}
    assert list(weights(tmp_path)) == list(weights(alone))
    assert all(module is not big for module in student.modules())


def test_nothing_is_left_on_the_host(folder: Path, teacher: Path, tmp_path: Path) -> None:
    save, copy, directory, streams = torch.save, shutil.copy, os.getcwd(), (sys.stdout, sys.stderr, sys.argv)
    launched = launch(folder, tmp_path, with_teacher(teacher))
    assert launched is not None
    assert launched.learner is not None
    assert not launched.learner.student._forward_hooks
    sam, host_ema = sys.modules["common.utils.sam"].SAM, sys.modules["dalib.modules.teacher"].EMATeacher
    for method in (sam.first_step, sam.second_step, host_ema.__init__, host_ema.forward):
        assert method.__code__.co_name != "method"  # what the plugin's wrapper is called
    assert (torch.save, shutil.copy, os.getcwd(), (sys.stdout, sys.stderr, sys.argv)) == (
        save,
        copy,
        directory,
        streams,
    )


def test_building_the_teacher_leaves_every_random_generator(folder: Path, teacher: Path, tmp_path: Path) -> None:
    def drawing(big: nn.Module, student: nn.Module) -> CollaborativeLearner:
        random.random(), np.random.rand(), torch.rand(1)
        return CollaborativeLearner(big, student, extract=first_output, enabled=False)

    states: List[Any] = []

    class Recorded(Plugin):
        def _attach(self, student: nn.Module) -> None:
            states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
            super()._attach(student)
            states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Plugin", Recorded)
        patch.setattr(train, "learner_from", lambda options: drawing)
        launch(folder, tmp_path, with_teacher(teacher))
    assert states[0] == states[1]


def test_host_ema_stays_in_train_mode_and_gets_no_hook(folder: Path, teacher: Path, tmp_path: Path) -> None:
    seen: List[Any] = []

    class Recorded(Plugin):
        def _around_ema_init(self, original: Any, ema: Any, *args: Any, **kwargs: Any) -> None:
            super()._around_ema_init(original, ema, *args, **kwargs)
            seen.append(ema)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Plugin", Recorded)
        launch(folder, tmp_path, with_teacher(teacher, "--clda-warmup", "1", "--clda-interval", "1"))
    (ema,) = seen
    assert all(module.training for module in ema.modules())
    assert not ema.ema_model._forward_hooks


def test_save_and_resume_restore_teacher_learner_and_student(
    folder: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train, "learner_from", lambda options: eager)
    launch(folder, tmp_path / "first", with_teacher(teacher))
    ours = tmp_path / "first" / "checkpoints" / "latest.clda.pt"
    resume = ["--clda-resume", str(ours), "--clda-teacher-arch", "resnet50"]
    launch(folder, tmp_path / "second", resume, ["--epochs", "1", "-i", "0"])
    assert same(weights(tmp_path / "first", "latest.clda.pt"), weights(tmp_path / "second", "latest.clda.pt"))
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))
    assert "The host cannot resume a training" in capsys.readouterr().out
    resumed = launch(folder, tmp_path / "third", resume, ["--epochs", "1", "-i", "1"])
    assert resumed is not None
    assert resumed.learner is not None
    assert resumed.learner.report().steps == 7


def test_ours_follows_the_hosts_latest_and_best(folder: Path, teacher: Path, tmp_path: Path) -> None:
    launch(folder, tmp_path, with_teacher(teacher), ["--spoil", "1", "--epochs", "2"])
    latest, best = (weights(tmp_path, f"{name}.clda.pt") for name in ("latest", "best"))
    assert latest["learner"]["steps"] == 6
    assert best["learner"]["steps"] == 3
    names = sorted(os.listdir(str(tmp_path / "checkpoints")))
    assert names == ["best.clda.pt", "best.pth", "latest.clda.pt", "latest.pth"]


def test_students_checkpoint_loads_in_the_host_alone(
    folder: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    launch(folder, tmp_path, with_teacher(teacher))
    forget_host()
    capsys.readouterr()
    with host.entered(folder):
        host.run(["--log", str(tmp_path), "--phase", "test"])
    assert "Acc@1" in capsys.readouterr().out


def test_updated_teacher_can_be_the_teacher_of_another_run(
    folder: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "learner_from", lambda options: eager)
    launch(folder, tmp_path / "first", with_teacher(teacher))
    file = tmp_path / "first" / "checkpoints" / "latest.clda.pt"
    second = launch(folder, tmp_path / "second", with_teacher(file), ["-i", "0"])
    assert second is not None
    assert second.learner is not None
    assert same(dict(second.learner.teacher.state_dict()), dict(torch.load(str(file))["teacher"]))


def test_command_trains_prints_and_saves_the_report(
    folder: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # A relative path is the user's, not one in the host's folder; the learner is found beside it.
    (tmp_path / "my_mic_learner.py").write_text(
        "from clda_core import CollaborativeLearner, Schedule\n"
        "def make(teacher, student):\n"
        "    return CollaborativeLearner(teacher, student, schedule=Schedule(warmup=0, interval=3),\n"
        "                                extract=lambda y: y[0] if isinstance(y, tuple) else y)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    relative = os.path.relpath(str(teacher), str(tmp_path))
    ours = ["--host", str(folder), *with_teacher(Path(relative)), "--clda-learner", "my_mic_learner:make"]
    assert train.main([*ours, "--", "--log", str(tmp_path / "log")]) == 0
    assert "test_acc1" in capsys.readouterr().out
    written = json.loads((tmp_path / "log" / "clda.json").read_text())
    assert [record["step"] for record in written["report"]["rounds"]] == [3, 6]
    assert len(written["kd_losses"]) == 2
    assert written["settings"]["clda_weight"] == 1.0
    assert written["settings"]["host"] == ["--log", str(tmp_path / "log")]


def test_testing_phase_is_the_hosts_alone(folder: Path, teacher: Path, tmp_path: Path) -> None:
    launch(folder, tmp_path, with_teacher(teacher))
    assert launch(folder, tmp_path, with_teacher(teacher), ["--phase", "test"]) is None


# --------------------------------------------------------------------------------------------------------- bad input


def test_missing_host_is_named(tmp_path: Path) -> None:
    with pytest.raises(CldaError, match=r"not MIC's cls folder.*which is no folder.*clone the repository"):
        host.find(tmp_path / "nowhere")
    with pytest.raises(CldaError, match=r"without examples/cdan_mcc_sdat_masking.py"):
        host.find(tmp_path)


def test_repository_instead_of_its_cls_folder(folder: Path) -> None:
    with pytest.raises(CldaError, match=r"Fix: pass --host .*/cls"):
        host.find(folder.parent)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            SCRIPT_FILE,
            "from common.utils.sam import SAM",
            "import common.utils.sam as sam",
            "the line 'from common.utils",
        ),
        ("common/utils/sam.py", "def first_step(self, zero", "def climb(self, zero", "SAM.first_step.*no such name"),
        ("dalib/modules/teacher.py", "def forward(self, target_img", "def forward(self, weak, strong", "weak, strong"),
        ("examples/utils.py", "def get_model(model_name", "def get_model(name", "get_model.model_name, pretrain"),
    ],
    ids=["script", "SAM", "host EMA", "utils"],
)
def test_host_of_another_version_is_refused(
    tmp_path: Path, teacher: Path, file: str, old: str, new: str, message: str
) -> None:
    other = write_host(tmp_path / "host", {file: {old: new}})
    with pytest.raises(CldaError, match=f"the host is of an unknown version.*{message}.*check out lhoyer/MIC"):
        launch(other, tmp_path / "log", with_teacher(teacher))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "pseudo, _ = teacher(x_t)",
            "pseudo, _ = teacher.ema_model(x_t)[0].max(1)[::-1]",
            "second_step.. without them",
        ),
        (
            "x = torch.cat((x_s, x_t), dim=0)",
            "x = torch.cat((x_s, x_t, x_t), dim=0)",
            "2 x 4 images, source then target",
        ),
        ("        optimizer.second_step(zero_grad=True)\n", "", "another call of the host EMA"),
    ],
    ids=["no host EMA", "another batch", "no second step"],
)
def test_host_with_another_iteration_is_refused(
    tmp_path: Path, teacher: Path, old: str, new: str, message: str
) -> None:
    changes = {old: new, "f_s, f_t = f.chunk(2, dim=0)": "f_s = f_t = f", "y_s, y_t = y.chunk(2, dim=0)": "y_s = y[:4]"}
    other = write_host(tmp_path / "host", {SCRIPT_FILE: changes})
    with pytest.raises(CldaError, match=f"iteration is not the known one.*{message}"):
        launch(other, tmp_path / "log", with_teacher(teacher))


def test_other_module_in_the_way_is_named(
    folder: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "utils.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("utils")
    options = train.parser().parse_args(["--host", str(folder), *with_teacher(teacher)])
    with pytest.raises(CldaError, match=r"another module utils is in the way.*Fix: rename it"):
        train.run(options, ["--log", str(tmp_path)])


def test_missing_requirement_of_the_host_is_named(tmp_path: Path, teacher: Path) -> None:
    other = write_host(tmp_path / "host", {"examples/utils.py": {"import torch\n": "import torch, no_such_package\n"}})
    with pytest.raises(CldaError, match=r"utils cannot be imported.*no_such_package.*requirements.txt"):
        launch(other, tmp_path / "log", with_teacher(teacher))


def test_missing_teacher_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CldaError, match=r"there is no teacher.*--clda-teacher FILE"):
        launch(folder, tmp_path, [])
    with pytest.raises(CldaError, match=r"checkpoint is not there.*nowhere.pth"):
        launch(folder, tmp_path, with_teacher(tmp_path / "nowhere.pth"))
    assert not (tmp_path / "checkpoints").exists()


def test_file_that_is_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(CldaError, match=r"cannot be read.*text.pth"):
        launch(folder, tmp_path, with_teacher(tmp_path / "text.pth"))
    torch.save({"model": 1}, str(tmp_path / "other.pth"))
    with pytest.raises(CldaError, match=r"not one of the host's.*other.pth with \['model'\]"):
        launch(folder, tmp_path, with_teacher(tmp_path / "other.pth"))


def test_teacher_of_another_architecture_says_which(folder: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CldaError, match=r"expected resnet18, received resnet50 in .*Fix: pass --clda-teacher-arch resnet50"
    ):
        launch(folder, tmp_path, ["--clda-teacher", str(teacher), "--clda-teacher-arch", "resnet18"])
    with pytest.raises(CldaError, match=r"architecture is unknown to the host.*'resnet1000'"):
        launch(folder, tmp_path, ["--clda-teacher", str(teacher), "--clda-teacher-arch", "resnet1000"])


def test_weights_of_no_resnet_have_no_name() -> None:
    assert architecture_of({"backbone.blocks.0.norm1.weight": torch.ones(1)}) == ""


def test_teacher_of_other_classes_is_refused(folder: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CldaError, match=r"different classes: expected 4, the student's number of classes, received 3 in"
    ):
        launch(folder, tmp_path, with_teacher(teacher), ["--classes", "4"])


def test_student_larger_than_the_teacher_warns(folder: Path, alone: Path, tmp_path: Path) -> None:
    small = ["--clda-teacher", str(alone / "checkpoints" / "best.pth"), "--clda-teacher-arch", "resnet18"]
    with pytest.warns(UserWarning, match="the student is larger than the teacher"):
        launch(folder, tmp_path, small, ["-a", "resnet50", "-i", "1"])


def test_resume_needs_our_file_and_the_hosts(folder: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(CldaError, match=r"no student to resume.*latest.pth beside it"):
        launch(folder, tmp_path, ["--clda-resume", str(teacher)])
    torch.save({"teacher": torch.load(str(teacher))}, str(tmp_path / "latest.clda.pt"))
    launch(folder, tmp_path / "log", ["--clda-off"], ["-i", "0"])
    shutil.copy(str(tmp_path / "log" / "checkpoints" / "latest.pth"), str(tmp_path / "latest.pth"))
    with pytest.raises(CldaError, match=r"the file to resume from is not ours"):
        launch(folder, tmp_path, ["--clda-resume", str(tmp_path / "latest.clda.pt"), "--clda-teacher-arch", "resnet50"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clda-weight", "-1"], "--clda-weight is out of range"),
        (["--clda-learner", "nowhere:make"], "--clda-learner cannot be found.*nowhere:make"),
        (["--clda-learner", "json:nothing"], "--clda-learner cannot be found"),
        (["--clda-learner", "json:loads", "--clda-warmup", "0"], "received --clda-warmup"),
        (["--clda-learner", "operator:is_"], "returned something else.*received bool"),
        (["--clda-temperature", "0"], "temperature is out of range"),
        (["--clda-interval", "0"], "interval is out of range"),
    ],
)
def test_bad_options_are_named(folder: Path, teacher: Path, tmp_path: Path, options: List[str], message: str) -> None:
    with pytest.raises(CldaError, match=message):
        launch(folder, tmp_path, with_teacher(teacher, *options))


def test_errors_end_the_command_with_status_2(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert train.main(["--host", str(folder), "--", "--log", "x"]) == 2
    assert "mic-cls: there is no teacher" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- verify and compatibility


def test_verify_fails_without_a_host(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert verify.main(["--host", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("FAIL  the host is not MIC's cls folder")
    assert "NOT all checks hold" in printed


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.ones(2), "b": [1, 2]},
        {"b": [1, 2], "a": torch.zeros(2)},
        {"a": torch.zeros(2, dtype=torch.float64), "b": [1, 2]},
        {"a": torch.zeros(2), "b": [1]},
        {"a": torch.zeros(2), "b": [1, 3]},
        {"a": torch.zeros(2)},
        None,
    ],
)
def test_verify_sees_every_difference(other: Any) -> None:
    own = {"a": torch.zeros(2), "b": [1, 2]}
    assert verify.equal(own, {"a": torch.zeros(2), "b": [1, 2]})
    assert not verify.equal(own, other)


def test_synthetic_data_are_laid_out_as_visda(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="the host's torchvision brings Pillow")
    synthetic.write_visda(tmp_path, images_per_class=2, size=8)
    for domain in ("train", "validation"):
        lines = (tmp_path / "image_list" / f"{domain}.txt").read_text().splitlines()
        assert len(lines) == 2 * len(synthetic.CLASSES)
        assert all((tmp_path / line.split()[0]).is_file() for line in lines)
        assert {line.split()[1] for line in lines} == {str(label) for label in range(12)}


@pytest.mark.skipif("float" in vars(np).get("__deprecated_attrs__", ()), reason="this numpy has it, with a warning")
def test_what_numpy_dropped_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "float", float, raising=False)  # restored, or removed, afterwards
    assert not compatibility._put_back_float()
    del np.float
    assert compatibility._put_back_float()
    assert np.float is float


def test_what_torchvision_dropped_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    models = types.ModuleType("torchvision.models")
    models.__path__ = []
    package = types.ModuleType("torchvision")
    package.__path__ = []
    for name, module in (("torchvision", package), ("torchvision.models", models), ("torchvision.models.utils", None)):
        monkeypatch.setitem(sys.modules, name, module)
    assert compatibility._put_back_download()
    assert sys.modules["torchvision.models.utils"].load_state_dict_from_url is torch.hub.load_state_dict_from_url
    assert not compatibility._put_back_download()
