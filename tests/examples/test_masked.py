from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from clda_core import CollaborativeLearner, Never
from examples.classification import digits, masked
from examples.classification.digits_training import Stage
from examples.classification.masked import Masked, Sam
from tests.examples import host_loops
from tests.examples.host_loops import losses, with_rounds

# torch 1.7 looks for a driver at the first backward pass; numpy 1.19 is older than the aliases others deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore:CUDA initialization:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def quick(**changes: object) -> digits.Config:
    blocks = {"teacher_blocks": (1, 1, 1), "student_blocks": (1, 1, 1)}
    settings = {"steps": 5, "threads": 1, "source_images": 100, "evaluations": 1, "progress": False}
    return digits.Config(**{**blocks, **settings, "host": Masked(batch=8), **changes})  # type: ignore[arg-type]


def trained(host: Masked, make_learner: object = None) -> Stage:
    return host_loops.trained(masked.train, host, make_learner)


def test_off_is_the_host_alone_and_clda_is_kd_until_its_first_round() -> None:
    host = Masked(batch=8, target_start=0.0)
    alone = trained(host)
    off = trained(host, lambda teacher, student: CollaborativeLearner(teacher, student, enabled=False))
    kd = trained(host, lambda teacher, student: CollaborativeLearner(teacher, student, schedule=Never()))
    clda = trained(host, with_rounds)
    assert alone.report == {}
    assert losses(off) == losses(alone)
    assert losses(kd)[0] > losses(alone)[0]
    assert losses(clda)[:4] == losses(kd)[:4]
    assert losses(clda)[4] != losses(kd)[4]
    assert kd.report["rounds"] == []
    assert [made["step"] for made in clda.report["rounds"]] == [4]
    assert clda.metrics["clda/steps"] == 5.0


def test_climb_changes_where_the_descent_leads() -> None:
    still, climbing = (losses(trained(Masked(batch=8, rho=rho))) for rho in (0.0, 0.5))
    assert climbing[1] != still[1]


def test_sam_descends_by_the_gradient_at_the_top_of_the_climb() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    sam = Sam([weight], torch.optim.SGD([weight], lr=0.1), rho=1.0)
    weight.pow(2).sum().backward()
    sam.first_step()
    assert torch.allclose(weight.detach(), torch.tensor([3.6, 4.8]))
    assert weight.grad is None or weight.grad.norm() == 0.0
    weight.pow(2).sum().backward()
    sam.second_step()
    assert torch.allclose(weight.detach(), torch.tensor([3.0, 4.0]) - 0.1 * 2.0 * torch.tensor([3.6, 4.8]))


def test_job_writes_table_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--steps", "2", "--seed", "100", "--threads", "1", "--output", str(tmp_path)]
    assert masked.main(arguments, quick()) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["host"]["rho"] == Masked().rho
    assert results["config"]["steps"] == 2
    assert list(results["students"]) == [digits.UDA_ALONE, digits.FROZEN_KD, digits.CLDA, digits.IN_TURNS]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert f"{results['students'][digits.CLDA]['accuracy']:.1f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "argument --seed: expected an integer >= 0"),
        (["--conditional"], "unrecognized arguments: --conditional"),
    ],
)
def test_bad_arguments_are_named(arguments: list, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        masked.main(arguments)
    assert message in capsys.readouterr().err


def test_file_runs_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, masked.__file__, "--help"]
    shown = subprocess.run(command, cwd=str(tmp_path), capture_output=True, check=True)
    assert b"--seed" in shown.stdout
