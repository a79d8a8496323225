from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("PIL")

from PIL import Image

from clda_core import CldaError, CollaborativeLearner
from examples.daformer.options import Options
from tests.hosts.segmentation import checks, command, configs, data, host, host_process, runs
from tests.hosts.segmentation.checks import Result, run_check
from tests.hosts.segmentation.host import DAFORMER, MIC_SEG, check_folder, version_of
from tests.hosts.segmentation.runs import Laboratory, Run, RunFailed

# ------------------------------------------------------------------------------------------------------ made-up data


def files_in(folder: Path) -> Dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".json"}


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(str(path)))


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    data.write_data(folder, source_frames=3, target_frames=4)
    return folder


def test_data_is_a_function_of_the_seed(frames: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        data.write_data(tmp_path / str(seed), source_frames=3, target_frames=4, seed=seed)
    assert files_in(tmp_path / "0") == files_in(frames)
    assert set(files_in(tmp_path / "1")) == set(files_in(frames))
    assert files_in(tmp_path / "1") != files_in(frames)


def test_every_frame_has_a_label_where_the_hosts_look_for_it(frames: Path) -> None:
    cityscapes = frames / "cityscapes"
    pairs = [
        (path, frames / "gta" / "labels" / f"{path.stem}_labelTrainIds.png")
        for path in (frames / "gta" / "images").glob("*.png")
    ]
    for path in (cityscapes / "leftImg8bit").glob("*/*/*_leftImg8bit.png"):
        name = path.name.replace("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
        pairs.append((path, cityscapes / "gtFine" / path.parent.relative_to(cityscapes / "leftImg8bit") / name))
    assert len(pairs) == 3 + 4 + 1
    for image, label in pairs:
        assert pixels_of(image).shape == (data.HEIGHT, data.WIDTH, 3)
        assert pixels_of(label).shape == (data.HEIGHT, data.WIDTH)
        assert set(np.unique(pixels_of(label))) <= {*range(19), 255}


def test_class_statistics_count_the_pixels_of_the_labels(frames: Path) -> None:
    folder = frames / "gta"
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("samples_with_class", *STATISTICS)}
    assert len(read["sample_class_stats"]) == 3
    assert any(read["samples_with_class"].values())
    for kind, found in read["samples_with_class"].items():
        for path, count in found:
            assert (pixels_of(folder / "labels" / Path(path).name) == int(kind)).sum() == count
            assert read["sample_class_stats_dict"][path][kind] == count
    for frame in read["sample_class_stats"]:
        path = frame.pop("file")
        assert frame == read["sample_class_stats_dict"][path]
        assert sum(frame.values()) == (pixels_of(Path(path)) != 255).sum()


STATISTICS = ("sample_class_stats", "sample_class_stats_dict")


def test_classes_look_alike_in_both_domains_but_not_the_same(frames: Path) -> None:
    def colour(image: Path, label: Path) -> np.ndarray:
        return pixels_of(image)[pixels_of(label) == data.CAR].mean(axis=0)

    source = colour(frames / "gta/images/00000.png", frames / "gta/labels/00000_labelTrainIds.png")
    town = "train/traintown/traintown_000000_000019"
    cityscapes = frames / "cityscapes"
    target = colour(
        cityscapes / f"leftImg8bit/{town}_leftImg8bit.png", cityscapes / f"gtFine/{town}_gtFine_labelTrainIds.png"
    )
    assert source.argmax() == target.argmax()
    assert abs(source - target).max() > 10


# --------------------------------------------------------------------------------------------------------- configs


def read_config(path: Path) -> Dict[str, Any]:
    found: Dict[str, Any] = {}
    exec(path.read_text(), {}, found)
    return found


def laboratory(folder: Path, of: host.Host = DAFORMER, model: str = "daformer", **options: Any) -> Laboratory:
    return Laboratory(of, folder / "host", folder / "work", model, **options)


def test_the_host_alone_has_nothing_of_ours_in_its_config(tmp_path: Path) -> None:
    text = laboratory(tmp_path)._config("host").read_text()
    assert "clda" not in text.lower().replace(str(tmp_path).lower(), "")
    assert "custom_imports" not in text


def test_off_differs_from_the_host_by_what_a_user_adds(tmp_path: Path) -> None:
    lab = laboratory(tmp_path)
    alone, off = read_config(lab._config("host")), read_config(lab._config("off"))
    assert off.pop("custom_imports")["imports"] == ["examples.daformer.plugin"]
    assert off["uda"].pop("type") == "CLDADACS"
    assert off["uda"].pop("clda")["enabled"] is False
    assert off["checkpoint_config"].pop("type") == "CLDACheckpointHook"
    assert off == alone


@pytest.mark.parametrize(("of", "model"), [(DAFORMER, "daformer"), (MIC_SEG, "daformer"), (MIC_SEG, "hrda")])
def test_teacher_is_bigger_than_the_student_and_of_the_same_kind(tmp_path: Path, of: host.Host, model: str) -> None:
    lab = laboratory(tmp_path, of, model)
    student, teacher = (read_config(lab._config(name))["model"] for name in ("host", "teacher"))
    widths = [model["decode_head"].pop("in_channels") for model in (student, teacher)]
    assert all(small < big for small, big in zip(*widths))
    assert student.pop("backbone") != teacher.pop("backbone")
    assert student == teacher
    assert ("hr_crop_size" in student) == (model == "hrda")


def test_mic_masks_whatever_its_model(tmp_path: Path) -> None:
    for of, model in ((DAFORMER, "daformer"), (MIC_SEG, "daformer"), (MIC_SEG, "hrda")):
        uda = read_config(laboratory(tmp_path / of.name / model, of, model)._config("host"))["uda"]
        assert ("mask_mode" in uda) == (of is MIC_SEG)


def test_merging_goes_into_dictionaries_and_leaves_both_as_they_were() -> None:
    config, changes = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3}, "d": [2], "e": {}}
    before = copy.deepcopy((config, changes))
    assert configs.merged(config, changes) == {"a": {"b": 3, "c": 2}, "d": [2], "e": {}}
    assert (config, changes) == before


def test_the_plugin_takes_what_every_run_asks_of_it(tmp_path: Path) -> None:
    given = [plan.clda for plan in laboratory(tmp_path).plans().values() if plan.clda is not None]
    assert any(not clda.get("weight", 1.0) for clda in given)
    for clda in given:
        entry = configs.with_clda(Path("teacher.py"), Path("teacher.pth"), **clda)["uda"]["clda"]
        learner = Options.from_config(entry).make_learner(nn.Linear(2, 3), nn.Linear(2, 3))
        assert isinstance(learner, CollaborativeLearner)


def test_a_run_warns_whatever_the_shell_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    (tmp_path / "host").mkdir()
    seen: List[Dict[str, str]] = []

    def run(*_: Any, env: Dict[str, str], **__: Any) -> Any:
        seen.append(env)
        return types.SimpleNamespace(returncode=1, stdout=b"")

    monkeypatch.setattr(runs.subprocess, "run", run)
    with pytest.raises(RunFailed):
        laboratory(tmp_path)._process("host", "tools.train", [])
    assert seen[0]["PYTHONWARNINGS"] == "default"


def test_a_run_of_weight_0_is_long_enough_for_a_round() -> None:
    assert configs.hasty_learner(nn.Linear(2, 3), nn.Linear(2, 3)).schedule.due(runs.SHORT)


@pytest.mark.parametrize("iterations", [12, 13, 30, 47])
def test_resuming_is_between_rounds_and_within_the_run(tmp_path: Path, iterations: int) -> None:
    lab = laboratory(tmp_path, iterations=iterations)
    # mmcv 1.7 repeats an iteration, so the step of the first save may be one later.
    first_save = lab.resumed_at + runs.FIRST_SAVED_AFTER + 1
    assert lab.resumed_at <= iterations
    assert not any(step % configs.ROUND_EVERY == 0 for step in range(lab.resumed_at, first_save + 1))


# ----------------------------------------------------------------------------------------------------- made-up runs


def write_run(folder: Path, steps: int = 30, *, clda: bool = False, report: Optional[Dict[str, Any]] = None) -> Run:
    """Write what a run would leave behind: a converged host with a teacher of two layers, one of them updated twice."""
    folder.mkdir(parents=True)
    value = torch.arange(3.0)
    tensors = {"model.weight": value, "ema_model.weight": value / 2, "model.seen": torch.tensor(steps)}
    group = {"params": [0], "weight_decay": 0.01, "lr": 1e-4}
    optimizer = {"state": {0: {"step": steps, "exp_avg": value}}, "param_groups": [group]}
    torch.save({"state_dict": tensors, "optimizer": optimizer}, str(folder / f"iter_{steps}.pth"))
    entries: List[Dict[str, Any]] = [{"env_info": "x", "seed": 0}]
    for step in range(1, steps + 1):
        entry = {"mode": "train", "iter": step, "decode.loss_seg": 2.0 / step}
        entry["src.loss_imnet_feat_dist"] = float("nan")
        if clda:
            entry.update({"clda.loss_kd": 1.0 / step, "clda.rounds": step // 12})
        entries.append(entry)
    entries.append({"mode": "val", "iter": 4, "mIoU": 0.2956})
    (folder / "run.log.json").write_text("\n".join(map(json.dumps, entries)))
    if clda:
        write_state(folder, steps, rounds=2)
    return Run(folder, report=report or {"ours": ["clda_core"] if clda else [], "peak_mib": 100.0})


def write_state(folder: Path, steps: int, *, rounds: int, teacher: Optional[Dict[str, Tensor]] = None) -> None:
    history = [{"step": 6 * (index + 1), "updated": ["segmentor.block"]} for index in range(rounds)]
    learner = {"steps": steps, "history": history}
    state = {"teacher": teacher or {"block.weight": torch.ones(2), "head.weight": torch.ones(2)}, "learner": learner}
    torch.save(state, str(folder / f"iter_{steps}.clda.pth"))


class Recorded:
    """A laboratory whose runs have been made up; a test changes one of them and sees who notices."""

    device = "cpu"
    resumed_at = 14

    def __init__(self, folder: Path) -> None:
        self.runs = {name: write_run(folder / name) for name in ("host", "host again", "off")}
        for name in ("without weight", "frozen", "on", "resumed"):
            self.runs[name] = write_run(folder / name, clda=True)
        self.runs["teacher"] = write_run(folder / "teacher")
        before = {"block.weight": torch.zeros(2), "head.weight": torch.ones(2)}
        saved = {f"model.{name}": value for name, value in before.items()}
        torch.save({"state_dict": saved, "optimizer": {}}, str(folder / "teacher" / "iter_30.pth"))
        write_state(folder / "frozen", 30, rounds=0, teacher=before)
        write_state(folder / "on", 14, rounds=1)
        write_state(folder / "resumed", 16, rounds=1)
        write_state(folder / "resumed", 30, rounds=2)
        self.runs["resumed"] = Run(folder / "resumed", "clda: the host does not save local_iter", {"ours": []})
        self.tested = Run(folder, TABLE, {"ours": []})
        self.found: Dict[str, Any] = {
            "layers": {"segmentor.block": ["block.weight"], "segmentor.head": ["head.weight"]},
            "recipes": {"recipe.py": None},
        }

    def run(self, name: str) -> Run:
        return self.runs[name]

    def test(self, checkpoint: Path) -> Run:
        return self.tested

    def ask_host(self) -> Dict[str, Any]:
        return self.found

    def rewrite(self, name: str, change: Any, file: str = "iter_30.pth") -> None:
        path = self.runs[name].folder / file
        content = torch.load(str(path))
        change(content)
        torch.save(content, str(path))

    def relog(self, name: str, change: Any) -> None:
        path = self.runs[name].folder / "run.log.json"
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        for entry in entries:
            change(entry)
        path.write_text("\n".join(map(json.dumps, entries)))


TABLE = """
Summary:

+-------+-------+-------+
|  aAcc |  mIoU |  mAcc |
+-------+-------+-------+
| 69.53 | 29.56 | 49.18 |
+-------+-------+-------+
"""

CHECKED = [name for name in checks.CHECKS if name != "cost"]


@pytest.fixture
def lab(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path)


@pytest.mark.parametrize("name", CHECKED)
def test_a_check_passes_where_all_is_well(lab: Recorded, name: str) -> None:
    result = run_check(name, lab)  # type: ignore[arg-type]
    assert result.holds is True, result.figures


def last_bit(tensors: Dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].clone()
    tensors[name][-1] += 1e-6


def moment(checkpoint: Dict[str, Any]) -> None:
    checkpoint["optimizer"]["state"][0]["exp_avg"] = torch.arange(3.0) + 1e-6


def other_loss(entry: Dict[str, Any]) -> None:
    if entry.get("iter") == 3:
        entry["decode.loss_seg"] += 1e-5


def first_loss(entry: Dict[str, Any]) -> None:
    if entry.get("iter") == 1:
        entry["decode.loss_seg"] += 1e-5


def rising(entry: Dict[str, Any]) -> None:
    if "clda.loss_kd" in entry:
        entry["clda.loss_kd"] = float(entry["iter"])


def once_nan(entry: Dict[str, Any]) -> None:
    if entry.get("iter") == 20:
        entry["clda.loss_kd"] = float("nan")


def no_rounds(state: Dict[str, Any]) -> None:
    state["learner"]["history"] = []


STATE, FIRST = "iter_30.clda.pth", "iter_16.clda.pth"

FAULTS = {
    "another weight": (
        "host-repeats",
        lambda lab: lab.rewrite("host", lambda c: last_bit(c["state_dict"], "model.weight")),
    ),
    "ours imported": ("host-repeats", lambda lab: lab.runs["host"].report["ours"].append("clda_core")),
    "another host EMA": (
        "off-is-host",
        lambda lab: lab.rewrite("off", lambda c: last_bit(c["state_dict"], "ema_model.weight")),
    ),
    "another moment": ("off-is-host", lambda lab: lab.rewrite("off", moment)),
    "another loss": ("off-is-host", lambda lab: lab.relog("off", other_loss)),
    "KD of weight 0 acts": ("weight-0-is-host", lambda lab: lab.rewrite("without weight", moment)),
    "no rounds meanwhile": ("weight-0-is-host", lambda lab: lab.rewrite("without weight", no_rounds, STATE)),
    "another first loss": ("first-losses", lambda lab: lab.relog("on", first_loss)),
    "a tensor of ours": ("names", lambda lab: lab.rewrite("on", lambda c: c["state_dict"].update(clda=torch.ones(1)))),
    "a parameter of ours": (
        "names",
        lambda lab: lab.rewrite("on", lambda c: c["optimizer"]["param_groups"][0]["params"].append(1)),
    ),
    "KD loss rises": ("kd-falls", lambda lab: lab.relog("on", rising)),
    "KD loss is NaN once": ("kd-falls", lambda lab: lab.relog("on", once_nan)),
    "no KD loss": ("kd-falls", lambda lab: lab.relog("on", lambda entry: entry.pop("clda.loss_kd", None))),
    "no rounds": ("rounds", lambda lab: lab.rewrite("on", no_rounds, STATE)),
    "a layer not named": (
        "rounds",
        lambda lab: lab.rewrite("on", lambda s: last_bit(s["teacher"], "head.weight"), STATE),
    ),
    "rounds not logged": ("rounds", lambda lab: lab.relog("on", lambda entry: entry.update({"clda.rounds": 0}))),
    "frozen teacher moves": (
        "rounds",
        lambda lab: lab.rewrite("frozen", lambda s: last_bit(s["teacher"], "head.weight"), STATE),
    ),
    "teacher lost": (
        "resume",
        lambda lab: lab.rewrite("resumed", lambda s: last_bit(s["teacher"], "head.weight"), FIRST),
    ),
    "rounds lost": ("resume", lambda lab: lab.rewrite("resumed", no_rounds, FIRST)),
    "steps lost": ("resume", lambda lab: lab.rewrite("resumed", lambda s: s["learner"].update(steps=2), FIRST)),
    "no round follows": ("resume", lambda lab: lab.rewrite("resumed", lambda s: s["learner"]["history"].pop(), STATE)),
    "no warning": ("resume", lambda lab: lab.runs.update(resumed=Run(lab.runs["resumed"].folder))),
    "another mIoU": (
        "test-command",
        lambda lab: lab.relog("on", lambda entry: entry.pop("mIoU", None) and entry.update(mIoU=0.31)),
    ),
    "no mIoU": ("test-command", lambda lab: setattr(lab, "tested", Run(Path(), "nan", {"ours": []}))),
    "tested with ours": ("test-command", lambda lab: lab.tested.report["ours"].append("examples.daformer")),
    "a broken recipe": ("recipes", lambda lab: lab.found["recipes"].update({"b.py": "KeyError: 'x'"})),
    "no recipes": ("recipes", lambda lab: lab.found["recipes"].clear()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_check_fails_on_its_fault(lab: Recorded, fault: str) -> None:
    name, make = FAULTS[fault]
    make(lab)
    result = run_check(name, lab)  # type: ignore[arg-type]
    assert result.holds is False
    assert result.figures


def test_nothing_is_said_of_us_where_the_host_does_not_repeat_itself(lab: Recorded) -> None:
    for name in ("host again", "off", "without weight"):
        lab.rewrite(name, moment)
    for check in ("off-is-host", "weight-0-is-host"):
        assert "--device cpu" in run_check(check, lab).figures  # type: ignore[arg-type]


def test_every_check_has_a_fault_that_it_finds() -> None:
    assert {name for name, _ in FAULTS.values()} == set(CHECKED)


def test_cost_gives_figures_and_judges_nothing(lab: Recorded) -> None:
    lab.runs["host"].report["seconds"] = [3.0, 1.0]
    lab.runs["on"].report.update(seconds=[3.0 if step in (6, 12) else 1.5 for step in range(1, 31)], peak_mib=250.0)
    result = run_check("cost", lab)  # type: ignore[arg-type]
    assert result.holds is None
    assert "with KD time x1.50, memory x1.00" in result.figures
    assert "where a round is made time x3.00, memory x2.50" in result.figures
    assert "alone 1.00 s a step" in result.figures


def test_a_failed_run_fails_the_check_and_says_why(lab: Recorded) -> None:
    def run(name: str) -> Run:
        raise RunFailed("the run 'host' ended with status 1: RuntimeError: no such operator (see host.txt)")

    lab.run = run  # type: ignore[assignment]
    result = run_check("off-is-host", lab)  # type: ignore[arg-type]
    assert result == Result(False, "the run 'host' ended with status 1: RuntimeError: no such operator (see host.txt)")


@pytest.mark.skipif(not hasattr(torch, "_weights_only_unpickler"), reason="torch.load refuses nothing before 1.13")
def test_a_state_of_more_than_plain_data_is_refused(lab: Recorded) -> None:
    lab.rewrite("on", lambda state: state.update(learner=Result(True, "an object")), STATE)
    assert "UnpicklingError" in run_check("rounds", lab).figures  # type: ignore[arg-type]


def test_differing_sees_every_bit_and_takes_nan_as_equal() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert checks.differing({"a": nan, "b": float("nan")}, {"a": nan.clone(), "b": float("nan")}) == []
    assert checks.differing({"a": nan}, {"a": torch.tensor([1.0, 1.0])}) == ["a"]
    assert checks.differing({"a": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.float64)}) == ["a"]
    assert checks.differing({"a": torch.ones(2)}, {"a": torch.ones(2, 1)}) == ["a"]
    assert checks.differing({"a": 1, "b": 2}, {"b": 2, "c": 3}) == ["a", "c"]


# ---------------------------------------------------------------------------------------------- hosts and command line


def write_host(folder: Path, of: host.Host) -> Path:
    for name in of.has:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("raise RuntimeError('this is no host')\n")
    return folder


def status(capsys: pytest.CaptureFixture[str], of: host.Host, *arguments: str) -> Any:
    code = command.main(of, "examples.verify", list(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_host_is_told_from_another(tmp_path: Path) -> None:
    daformer, mic = write_host(tmp_path / "DAFormer", DAFORMER), write_host(tmp_path / "MIC" / "seg", MIC_SEG)
    write_host(mic, DAFORMER)
    check_folder(DAFORMER, daformer)
    check_folder(MIC_SEG, mic)
    for of, root in ((DAFORMER, mic), (MIC_SEG, daformer), (MIC_SEG, mic.parent)):
        with pytest.raises(CldaError, match="another repository"):
            check_folder(of, root)


def test_a_missing_host_ends_with_its_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, errors = status(capsys, MIC_SEG, "--host", str(tmp_path / "nowhere"))
    assert (code, printed) == (2, "")
    assert "git clone https://github.com/lhoyer/MIC, and pass its folder seg as --host" in errors


def test_another_commit_and_changed_files_are_warned_of(tmp_path: Path) -> None:
    root = write_host(tmp_path / "host", DAFORMER)
    assert version_of(DAFORMER, tmp_path / "nowhere")[0] == "unknown"

    def git(*arguments: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(root), *author, *arguments], check=True, stdout=subprocess.DEVNULL)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "a host")
    commit, warnings = version_of(DAFORMER, root)
    assert len(commit) == 7
    assert warnings == [f"commit e6f6e04 was verified, this is {commit}"]
    (root / "tools" / "train.py").write_text("changed")
    assert "tools/train.py" in version_of(DAFORMER, root)[1][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--iterations", "11"], "integer >= 12"), (["--only", "speed"], "invalid choice"), ([], "--host")],
)
def test_a_wrong_option_ends_before_anything_runs(
    arguments: List[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--host", str(tmp_path), *arguments] if arguments else []
    with pytest.raises(SystemExit, match="2"):
        command.main(DAFORMER, "examples.verify", given)
    assert message in capsys.readouterr().err


def test_nothing_is_written_where_something_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_host(tmp_path / "host", DAFORMER)
    code, _, errors = status(capsys, DAFORMER, "--host", str(root), "--keep", str(root))
    assert code == 2
    assert "new or empty folder" in errors


def test_a_gpu_that_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    root = write_host(tmp_path / "host", DAFORMER)
    code, _, errors = status(capsys, DAFORMER, "--host", str(root), "--device", "cuda")
    assert code == 2
    assert "--device cpu" in errors


@pytest.mark.parametrize(("holds", "expected"), [(True, 0), (False, 1), (None, 0)])
def test_exit_status_and_one_line_a_check(
    holds: Optional[bool], expected: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = laboratory(tmp_path)

    def check(name: str, lab: Laboratory) -> Result:
        return Result(holds if name == "rounds" else True, f"figures of {name}")

    assert command.verify(lab, ["off-is-host", "rounds"], check) == expected
    lines = [line for line in capsys.readouterr().out.splitlines() if "figures of" in line]
    assert [line.split()[-1] for line in lines] == ["off-is-host", "rounds"]
    assert lines[1].startswith({True: "PASS", False: "FAIL", None: "    "}[holds])


def test_a_host_that_cannot_run_fails_by_its_last_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_host(tmp_path / "host", DAFORMER)
    keep = tmp_path / "kept"
    only = ["--only", "host-repeats", "--keep", str(keep)]
    code, printed, _ = status(capsys, DAFORMER, "--host", str(root), *only)
    assert code == 1
    line = next(line for line in printed.splitlines() if line.startswith("FAIL"))
    assert "Error" in line
    assert (keep / "process" / "host.txt").read_text().strip()


@pytest.mark.parametrize("program", ["examples.daformer.verify", "examples.mic.seg.verify"])
def test_the_command_is_run_from_a_clone_whatever_else_is_installed(program: str, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("raise RuntimeError('tests of another package')\n")
    done = subprocess.run(
        [sys.executable, "-m", program, "--host", str(tmp_path)],
        cwd=str(runs.REPOSITORY),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 2, done.stdout.decode()
    assert done.stdout.decode().startswith(f"{program}: the host is another repository")


# ------------------------------------------------------------------------------------------------- the host's process


def module(name: str, **content: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(content)
    return made


def test_a_newer_mmcv_is_accepted_while_the_host_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mmcv = module("mmcv", __version__="1.7.2")
    monkeypatch.setitem(sys.modules, "mmcv", mmcv)
    monkeypatch.delitem(sys.modules, "mmseg", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mmseg.py").write_text("import mmcv\nassert mmcv.__version__ == '1.4.0'\n")
    assert host_process.newer_mmcv_is_accepted()
    assert mmcv.__version__ == "1.7.2"
    mmcv.__version__ = "1.3.7"
    assert not host_process.newer_mmcv_is_accepted()
    del sys.modules["mmseg"]


def test_batches_on_the_cpu_keep_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scatter:
        @staticmethod
        def forward(devices: List[int], batch: List[Tensor]) -> Any:
            return tuple(tensor.unsqueeze(0) for tensor in batch)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("mmcv", "mmcv.parallel"):
        monkeypatch.setitem(sys.modules, name, module(name))
    monkeypatch.setitem(sys.modules, "mmcv.parallel._functions", module("mmcv.parallel._functions", Scatter=Scatter))
    assert host_process.on_cpu_batches_keep_their_shape()
    assert Scatter.forward([-1], [torch.zeros(2, 3)])[0].shape == (2, 3)
    assert not host_process.on_cpu_batches_keep_their_shape()


def test_on_a_gpu_the_host_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.nn.Module.cuda
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "mmcv", module("mmcv"))
    runner = module("mmcv.runner", IterBasedRunner=type("IterBasedRunner", (), {"resume": None}))
    monkeypatch.setitem(sys.modules, "mmcv.runner", runner)
    assert not host_process.on_cpu_modules_stay()
    assert not host_process.on_cpu_checkpoints_resume()
    assert torch.nn.Module.cuda is cuda
    assert runner.IterBasedRunner.resume is None
