"""What ``examples.vfm_uda.verify`` is made of: its data as the hosts read them, and checks that can fail."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("lightning", reason="the plug-in that verify checks needs Lightning")

from PIL import Image

from examples.vfm_uda.export import KEY
from examples.vfm_uda.verify import main
from tests.hosts.segmentation.runs import RunFailed
from tests.hosts.vfm_uda import checks
from tests.hosts.vfm_uda.data import IDS, write_data
from tests.hosts.vfm_uda.runs import SAVED, STEPS, VFM_UDA, Laboratory


def pixels(archive: Path, name: str) -> np.ndarray:
    with zipfile.ZipFile(str(archive)) as file:
        return np.asarray(Image.open(io.BytesIO(file.read(name))))


def test_the_data_are_the_hosts_archives_and_statistics(tmp_path: Path) -> None:
    write_data(tmp_path / "data", tmp_path / "stats")
    ids = [pixels(tmp_path / "data" / f"{i:02}_labels.zip", f"labels/{i:05}.png") for i in range(1, 11)]
    assert all(set(np.unique(label)) <= set(IDS.values()) for label in ids)
    assert pixels(tmp_path / "data" / "01_images.zip", "images/00001.png").shape == (128, 256, 3)
    with zipfile.ZipFile(str(tmp_path / "data" / "leftImg8bit_trainvaltest.zip")) as file:
        names = [name.replace("leftImg8bit/", "gtFine/", 1) for name in file.namelist()]
    with zipfile.ZipFile(str(tmp_path / "data" / "gtFine_trainvaltest.zip")) as file:
        assert [name.replace("leftImg8bit", "gtFine_labelIds") for name in names] == file.namelist()
    stats = json.loads((tmp_path / "stats" / "gta5" / "samples_with_class.json").read_text())
    for train_id, samples in stats.items():
        assert [count for _, count in samples] == [int((label == IDS[int(train_id)]).sum()) for label in ids]
        assert max(count for _, count in samples) > 3000


class FakeRun:
    def __init__(self, value: float = 0.0, rounds: int = 0, teacher: float = 0.0, loss: float = 1.0) -> None:
        self.value, self.teacher = value, teacher
        self.found = [{"rounds": rounds, "losses": [{"loss": loss}], "student": value, "teacher": teacher}]
        self.ours: Any = []

    def checkpoint(self, step: int = STEPS) -> Dict[str, Any]:
        group = {"params": [0], "weight_decay": 0.01, "initial_lr": 0.1}
        return {
            "state_dict": {"network.w": torch.tensor(self.value), "network_ema.w": torch.tensor(self.value)},
            "optimizer_states": [{"state": {0: {"step": 1}}, "param_groups": [group]}],
            "callbacks": {KEY: {"teacher": {"w": torch.tensor(self.teacher)}}} if self.teacher else {},
            "hyper_parameters": {"clda": {}} if self.teacher else {},
        }


def lab(**runs: Any) -> Any:
    named = {name.replace("_", " "): run for name, run in runs.items()}
    return SimpleNamespace(run=named.__getitem__)


def test_checks_hold_where_runs_are_as_they_must_be() -> None:
    on, teacher = FakeRun(1.0, rounds=2, teacher=5.0), FakeRun(3.0)
    runs = lab(host=FakeRun(), on=on, teacher=teacher, frozen=FakeRun(1.0, teacher=3.0), resumed=on)
    for name in ("checkpoints", "rounds", "resume"):
        assert checks.run_check(name, runs).holds, name


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("host-repeats", {"host": FakeRun(), "host_again": FakeRun(loss=2.0)}),
        ("off-is-host", {"host": FakeRun(), "off": FakeRun(1.0)}),
        ("weight-0-is-host", {"host": FakeRun(), "without_weight": FakeRun(rounds=0)}),
        ("checkpoints", {"host": FakeRun(), "on": FakeRun()}),
        ("rounds", dict.fromkeys(("host", "teacher", "frozen", "on"), FakeRun(3.0, rounds=1, teacher=3.0))),
        ("resume", {"on": FakeRun(teacher=5.0), "resumed": FakeRun(teacher=6.0)}),
    ],
)
def test_a_check_fails_where_runs_are_not_as_they_must_be(name: str, runs: Dict[str, Any]) -> None:
    assert checks.run_check(name, lab(**runs)).holds is False


def test_a_run_that_failed_fails_the_check_with_its_reason() -> None:
    def run(name: str) -> Any:
        raise RunFailed("the run 'host' ended with status 1: no torchvision")

    found = checks.run_check("off-is-host", SimpleNamespace(run=run))
    assert found.holds is False
    assert "no torchvision" in found.figures


def test_the_first_recipe_is_the_one_that_is_checked_in_full(tmp_path: Path) -> None:
    found = Laboratory(VFM_UDA, tmp_path, tmp_path / "work")
    (tmp_path / "work").mkdir()
    found.set_up()
    assert [path.stem for path in found.recipes()][0] == "gta2cs_vitl_to_vits"
    assert not (tmp_path / "work" / "clda_vfm_uda" / "verify.py").exists()
    assert SAVED < STEPS


def test_another_folder_than_the_hosts_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--host", str(tmp_path)]) == 2
    assert "git clone https://github.com/tue-mps/vfm-uda" in capsys.readouterr().err
