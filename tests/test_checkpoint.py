import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Tuple

import pytest
import torch

from clda_core import CldaError, CollaborativeLearner, checkpoint
from clda_core.checkpoint import atomically
from clda_core.selection import AllLayers
from clda_core.update import Average
from tests.helpers import batch, bits, loaded, make_learner, networks, nothing_changed, sgd, train, values

ROOT = Path(__file__).resolve().parents[1]


def training(depth: int = 3, seed: int = 0) -> Tuple[CollaborativeLearner, Any]:
    teacher, student = networks(depth, seed=seed)
    update = Average(decay=0.9)
    return make_learner(teacher, student, update=update, selection=AllLayers()), sgd(student)


def test_everything_is_restored_and_the_rest_returned(tmp_path: Path) -> None:
    learner, optimizer = training()
    train(learner, optimizer, 2)
    checkpoint.save(tmp_path / "new" / "last.pt", learner, optimizer=optimizer, epoch=3, rng=torch.get_rng_state())
    other, its_optimizer = training(seed=5)
    rest = checkpoint.load(str(tmp_path / "new" / "last.pt"), other, optimizer=its_optimizer)
    assert sorted(rest) == ["epoch", "rng"]
    assert rest["epoch"] == 3
    assert torch.equal(rest["rng"], torch.get_rng_state())
    for one, same in ((learner.teacher, other.teacher), (learner.student, other.student)):
        assert bits(one.state_dict()) == bits(same.state_dict())
    assert bits(learner.state_dict()) == bits(other.state_dict())
    assert bits(optimizer.state_dict()) == bits(its_optimizer.state_dict())
    assert os.listdir(tmp_path / "new") == ["last.pt"]


def test_the_file_holds_tensors_and_plain_types_only(tmp_path: Path) -> None:
    learner, optimizer = training()
    train(learner, optimizer, 1)
    checkpoint.save(tmp_path / "last.pt", learner, optimizer=optimizer)
    assert sorted(loaded((tmp_path / "last.pt").read_bytes())) == ["learner", "optimizer", "student", "teacher"]


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_name_that_is_taken(name: str, tmp_path: Path) -> None:
    learner, _ = training()
    with pytest.raises(CldaError, match=f"{name} is saved anyway.*Fix: leave it out"):
        checkpoint.save(tmp_path / "last.pt", learner, **{name: {}})
    assert os.listdir(tmp_path) == []


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    learner, optimizer = training()
    train(learner, optimizer, 2)
    path = tmp_path / "last.pt"
    deeper, its_optimizer = training(4)
    train(deeper, its_optimizer, 1)

    def refused(match: str, **beside: Any) -> None:
        with nothing_changed(learner, optimizer), pytest.raises(CldaError, match=match):
            checkpoint.load(path, learner, **beside)

    checkpoint.save(path, deeper)
    refused("the saved teacher is of another architecture: expected no blocks.3.fc.weight")
    refused("does not hold this training.*optimizer.*Fix: load what was saved", optimizer=optimizer)
    checkpoint.save(path, learner, optimizer=optimizer, epoch=3)
    train(learner, optimizer, 1, start=2)
    refused("other_name.*Fix: load what was saved", other_name=optimizer)
    refused("epoch cannot be restored.*received int.*load\\(\\) returns them", epoch=3)
    other = sgd(learner.teacher)
    other.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    refused("optimizer cannot be restored.*received SGD, which raised ValueError", optimizer=other)
    torch.save({"state_dict": learner.teacher.state_dict()}, str(path))
    refused("does not hold this training: .*received state_dict")
    torch.save([1], str(path))
    refused("does not hold this training: .*received list")
    with atomically(path) as unfinished:
        state = {"learner": {**learner.state_dict(), "version": 99}}
        torch.save(
            {**state, "teacher": learner.teacher.state_dict(), "student": learner.student.state_dict()}, unfinished
        )
    refused("the state was written by a newer clda-core")


def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path: Path) -> None:
    learner, optimizer = training()
    path = tmp_path / "last.pt"
    checkpoint.save(path, learner)
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"pickle|local object"):
        checkpoint.save(path, learner, what=lambda: None)

    def half() -> None:
        with atomically(path) as unfinished:
            Path(unfinished).write_bytes(b"half")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        half()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


def exit_status(where: str, step: int, path: Path) -> int:
    """Run the worker in a process of its own, of one thread: their number changes the order of sums."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.checkpoint_worker", where, str(step), str(path)]
    done = subprocess.run(command, cwd=str(ROOT), env=environment, stderr=subprocess.PIPE, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode


def test_killed_even_while_saving_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.pt", tmp_path / "torn.pt"
    assert exit_status("after", 1, torn) == -signal.SIGKILL
    assert loaded(torn.read_bytes())["steps"] == 2
    assert exit_status("during", 3, torn) == -signal.SIGKILL
    assert loaded(torn.read_bytes())["steps"] == 3
    (left_over,) = [name for name in os.listdir(tmp_path) if name != "torn.pt"]
    assert left_over.endswith(".unfinished")
    with pytest.raises(Exception, match=r"."):  # half a file, which torn.pt never was
        loaded((tmp_path / left_over).read_bytes())
    for path in (torn, whole):
        assert exit_status("never", 0, path) == 0
    assert bits(loaded(torn.read_bytes())) == bits(loaded(whole.read_bytes()))
    assert loaded(whole.read_bytes())["learner"]["history"]


def test_killed_at_any_moment_the_file_is_whole(tmp_path: Path) -> None:
    """What is on the disk while another process replaces it as fast as it can, and after that was killed."""
    path = tmp_path / "state.pt"
    program = (
        "import itertools, sys, torch\n"
        "from clda_core.checkpoint import atomically\n"
        "for count in itertools.count():\n"
        "    with atomically(sys.argv[1]) as unfinished:\n"
        "        torch.save([torch.full((100_000,), float(count)) for _ in range(4)], unfinished)\n"
        "    print(count, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(10):
            assert len(torch.stack(torch.load(str(path))).unique()) == 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert len(torch.stack(torch.load(str(path))).unique()) == 1


def test_the_models_go_on_from_the_file_after_more_training(tmp_path: Path) -> None:
    learner, optimizer = training()
    checkpoint.save(tmp_path / "last.pt", learner, optimizer=optimizer)
    before = values(learner.teacher), values(learner.student)
    train(learner, optimizer, 2)
    assert values(learner.teacher) != before[0]
    checkpoint.load(tmp_path / "last.pt", learner, optimizer=optimizer)
    assert (values(learner.teacher), values(learner.student)) == before
    assert learner.report().steps == 0
    learner.distill(learner.student(batch()), batch())
