"""What the hosts on digits hand the learner for its rounds."""

from __future__ import annotations

from typing import Any, List

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from clda_core import CollaborativeLearner, Schedule
from examples.classification import adversarial, digits, digits_report, digits_training, masked
from examples.classification.adversarial import Adversarial
from examples.classification.digits_models import residual_network
from examples.classification.masked import Masked
from examples.classification.self_training import Batches, SelfTraining
from tests.examples import host_loops

# torch 1.7 looks for a driver at the first backward pass; numpy 1.19 is older than the aliases others deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore:CUDA initialization:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

HOSTS = {
    "digits": (digits_training.train, SelfTraining(batch=8)),
    "masked": (masked.train, Masked(batch=8)),
    "adversarial": (adversarial.train, Adversarial(batch=8, hidden=16)),
}


@pytest.mark.parametrize(("train", "host"), HOSTS.values(), ids=HOSTS)
def test_the_host_hands_over_its_view_its_source_loss_and_its_learning_rate(
    train: Any, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: List[Any] = []
    calls: List[Any] = []
    drawn, distill = Batches.__getitem__, CollaborativeLearner.distill

    def watched(self: Any, output: Any, inputs: Any, **more: Any) -> Any:
        calls.append((inputs, more))
        return distill(self, output, inputs, **more)

    def kept(self: Any, step: int) -> Any:
        batches.append(drawn(self, step))
        return batches[-1]

    monkeypatch.setattr(CollaborativeLearner, "distill", watched)
    monkeypatch.setattr(Batches, "__getitem__", kept)
    learners: List[CollaborativeLearner] = []

    def make(teacher: Any, student: Any) -> CollaborativeLearner:
        learners.append(CollaborativeLearner(teacher, student, schedule=Schedule(interval=1, observe_every=1)))
        return learners[0]

    stage = host_loops.trained(train, host, make)
    network = residual_network((1, 1, 1), seed=1).eval()
    assert len(calls) == len(batches) == 5
    for batch, (inputs, more) in zip(batches, calls):
        assert torch.equal(inputs, batch.target)
        assert torch.equal(more["view"], batch.target_strong)
        assert more["view"].shape == inputs.shape
        assert torch.equal(more["source_loss"](network), F.cross_entropy(network(batch.images), batch.labels))
    assert learners[0].state_dict()["lead"]["of"] == "SoftConsistency"
    assert learners[0].state_dict()["peak"] > 0
    assert len(stage.report["rounds"]) == 5


def test_the_job_sets_no_warmup_and_its_figure_shows_the_lead(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = (residual_network((1, 1, 1), seed=seed) for seed in (1, 2))
    assert digits.learners()[digits.CLDA](teacher, student).schedule.warmup == 0
    figures: List[Any] = []

    class Watched(digits_report.Figure):
        def savefig(self, *arguments: Any, **options: Any) -> None:
            figures.append(self)
            super().savefig(*arguments, **options)

    monkeypatch.setattr(digits_report, "Figure", Watched)
    blocks = {"teacher_blocks": (1, 1, 1), "student_blocks": (1, 1, 1)}
    host = SelfTraining(batch=8)
    config = digits.Config(steps=4, threads=1, source_images=100, evaluations=1, host=host, progress=False, **blocks)
    often = Schedule(interval=2)
    clda = {"clda": lambda teacher, student: CollaborativeLearner(teacher, student, schedule=often)}
    results = digits.run(config, make_learners=clda).to_dict()
    digits_report.save_figure(results, tmp_path / "figure.png")
    of_rates, of_lead, of_trust, of_accuracy = figures[0].axes
    assert of_rates.get_title(loc="left") == "clda"
    assert [axes.get_ylabel() for axes in (of_lead, of_trust)] == ["student's lead", "trust (dashed)"]
    leads = [record["lead"] for record in results["students"]["clda"]["report"]["rounds"]]
    assert leads in [list(line.get_ydata()) for line in of_lead.lines]
    assert [text.get_text().split(":")[1].split()[0] for text in of_accuracy.texts] == ["student", "teacher"]
