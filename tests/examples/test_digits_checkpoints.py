"""The trained pair that is shipped has the accuracies that it states, and is made by a command."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from examples.classification import digits_checkpoints
from examples.classification.digits_data import target_digits
from examples.classification.self_training import SelfTraining


def test_the_shipped_networks_have_the_accuracies_that_are_stated() -> None:
    trained = digits_checkpoints.load()
    evaluation = target_digits()[1]
    for name, stated in trained.accuracy.items():
        assert evaluation.accuracy(getattr(trained, name)) == pytest.approx(stated, abs=0.2), name
    assert trained.accuracy["student"] > trained.accuracy["teacher"] > 75.0
    assert not trained.teacher.training


def test_the_file_is_small() -> None:
    assert digits_checkpoints.FILE.stat().st_size < 1_500_000


def test_the_command_trains_both_and_writes_a_file_that_loads(tmp_path: Path) -> None:
    quick = {"steps": 2, "source_images": 50, "evaluations": 1, "host": SelfTraining(batch=8), "progress": False}
    made = digits_checkpoints.make(tmp_path / "new" / "pair.pt", **quick)
    again = digits_checkpoints.load(tmp_path / "new" / "pair.pt")
    assert made.accuracy == again.accuracy
    assert all(
        torch.equal(a, b) for a, b in zip(made.student.state_dict().values(), again.student.state_dict().values())
    )
    assert all(parameter.dtype == torch.float32 for parameter in made.teacher.parameters())
