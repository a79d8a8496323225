from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from clda_core import CollaborativeLearner, Never
from examples.classification import adversarial, digits
from examples.classification.adversarial import Adversarial, ReverseGradient, domain_discriminator, domain_loss
from examples.classification.digits_training import Stage
from tests.examples import host_loops
from tests.examples.host_loops import losses, with_rounds

# torch 1.7 looks for a driver at the first backward pass; numpy 1.19 is older than the aliases others deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore:CUDA initialization:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

HOSTS = {
    "dann": Adversarial(batch=8, hidden=16),
    "cdan+e": Adversarial(batch=8, hidden=16, conditional=True, entropy=True),
}


def quick(host: Adversarial) -> digits.Config:
    blocks = {"teacher_blocks": (1, 1, 1), "student_blocks": (1, 1, 1)}
    return digits.Config(steps=5, threads=1, source_images=100, evaluations=1, host=host, progress=False, **blocks)


def trained(host: Adversarial, make_learner: object = None) -> Stage:
    return host_loops.trained(adversarial.train, host, make_learner)


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_off_is_the_host_alone_and_clda_is_kd_until_its_first_round(host: Adversarial) -> None:
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


def test_gradient_is_reversed_and_weighted() -> None:
    features = torch.tensor([1.0, -2.0], requires_grad=True)
    passed = ReverseGradient.apply(features, 0.25)
    assert torch.equal(passed, features)
    (passed * torch.tensor([4.0, 8.0])).sum().backward()
    assert torch.equal(features.grad, torch.tensor([-1.0, -2.0]))


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_discriminator_learns_the_domains_that_the_features_unlearn(host: Adversarial) -> None:
    logits = torch.zeros(8, 10)
    shift = torch.ones(4, 6).requires_grad_()
    discriminator = domain_discriminator(6, host, seed=0)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=0.01)

    def loss() -> torch.Tensor:
        torch.manual_seed(0)
        return domain_loss(discriminator, torch.cat([torch.randn(4, 6), torch.randn(4, 6) + shift]), logits, host, 1.0)

    before = loss().item()
    assert before == pytest.approx(math.log(2.0), abs=0.2)
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    told_apart = loss()
    assert told_apart.item() < 0.5 * before
    shift.grad = None
    told_apart.backward()
    with torch.no_grad():
        shift.sub_(0.1 * shift.grad)
    assert loss().item() > told_apart.item()


def test_conditional_discriminator_sees_features_by_prediction() -> None:
    host = HOSTS["cdan+e"]
    one_hot = torch.eye(10)[[3, 3]] * 100.0
    seen = []
    discriminator = domain_discriminator(2, host, seed=0)
    discriminator[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    domain_loss(discriminator, torch.tensor([[5.0, 7.0], [1.0, 2.0]]), one_hot, host, 1.0)
    outer = seen[0].view(2, 2, 10)
    assert torch.allclose(outer[:, :, 3], torch.tensor([[5.0, 7.0], [1.0, 2.0]]))
    assert outer.abs().sum().item() == pytest.approx(15.0)


def test_weight_rises_from_zero_to_its_value() -> None:
    host = Adversarial(weight=0.5)
    assert host.weight_at(0, 100) == 0.0
    assert host.weight_at(100, 100) == pytest.approx(0.5, rel=1e-3)


def test_job_writes_table_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--conditional", "--steps", "2", "--seed", "100", "--threads", "1", "--output", str(tmp_path)]
    assert adversarial.main(arguments, quick(HOSTS["dann"])) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["host"]["conditional"] is True
    assert results["config"]["host"]["entropy"] is False
    assert results["config"]["steps"] == 2
    assert list(results["students"]) == [digits.UDA_ALONE, digits.FROZEN_KD, digits.CLDA, digits.IN_TURNS]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert f"{results['students'][digits.CLDA]['accuracy']:.1f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: expected an integer >= 1, received 0"),
        (["--output", __file__], "argument --output: expected a folder that can be written"),
        (["--resume"], "unrecognized arguments: --resume"),
    ],
)
def test_bad_arguments_are_named(arguments: list, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        adversarial.main(arguments)
    assert message in capsys.readouterr().err


def test_interruption_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adversarial, "domain_loss", interrupted)
    assert adversarial.main(["--steps", "1", "--threads", "1", "--output", str(tmp_path)], quick(HOSTS["dann"])) == 130
    assert "adversarial: interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_file_runs_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, adversarial.__file__, "--help"]
    shown = subprocess.run(command, cwd=str(tmp_path), capture_output=True, check=True)
    assert b"--conditional" in shown.stdout
