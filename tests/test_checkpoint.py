import argparse
import collections
import datetime
import enum
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import numpy
import pytest
import torch
from torch import nn

from clda_core import CldaError, CollaborativeLearner, checkpoint
from clda_core.checkpoint import atomically
from clda_core.selection import AllLayers
from clda_core.update import Average
from tests.helpers import batch, bits, loaded, make_learner, networks, nothing_changed, saved, sgd, train, values

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
    with pytest.raises(CldaError, match="what cannot be saved"):
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


# ---------------------------------------------------------------------------------- in the checkpoint of something else


def test_learner_and_teacher_are_restored_from_a_checkpoint_of_an_engine() -> None:
    learner, optimizer = training()
    train(learner, optimizer, 2)
    packed = loaded(saved(checkpoint.pack(learner, optimizer=optimizer, epoch=3)))
    assert sorted(packed) == ["epoch", "learner", "optimizer", "teacher"]
    other, its_optimizer = training(seed=5)
    its_student = values(other.student)
    assert checkpoint.unpack(other, packed, optimizer=its_optimizer) == {"epoch": 3}
    assert bits(learner.state_dict()) == bits(other.state_dict())
    assert values(learner.teacher) == values(other.teacher)
    assert bits(optimizer.state_dict()) == bits(its_optimizer.state_dict())
    assert values(other.student) == its_student
    with pytest.raises(CldaError, match="teacher is saved anyway"):
        checkpoint.pack(learner, teacher={})


def test_learner_and_teacher_are_restored_both_or_neither() -> None:
    learner, optimizer = training()
    train(learner, optimizer, 2)
    packed = loaded(saved(checkpoint.pack(learner, first=WithState(1), second=WithState(1))))
    train(learner, optimizer, 1, start=2)
    first, second = WithState(5), WithState(6, fails=True)
    for broken, match in (
        (packed, "second cannot be restored.*half-way"),
        ({**packed, "teacher": nn.Linear(2, 2).state_dict()}, "the saved teacher is of another architecture"),
        ({**packed, "learner": {"version": 99}}, "newer clda-core"),
        ({"learner": packed["learner"]}, "the checkpoint does not hold this training.*received learner. Fix"),
        (None, "the checkpoint does not hold this training.*received NoneType"),
    ):
        with nothing_changed(learner, optimizer), pytest.raises(CldaError, match=match):
            checkpoint.unpack(learner, broken, first=first, second=second)
        assert (first.state, second.state) == (5, 6)


# ------------------------------------------------------------------------------------------------- what can be saved


class Level(enum.IntEnum):
    HIGH = 3


class Point(collections.namedtuple("Point", "x y")):
    pass


PLAIN: Dict[str, Tuple[Any, Any]] = {
    "numpy numbers": (
        [numpy.float64(0.5), numpy.float32(0.25), numpy.int64(3), numpy.bool_(True)],
        [0.5, 0.25, 3, True],
    ),
    "a numpy key": ({numpy.int64(3): 1}, {3: 1}),
    "a path": (Path("a") / "b", os.path.join("a", "b")),
    "a defaultdict": (collections.defaultdict(int, a=1), {"a": 1}),
    "an ordered dict": (collections.OrderedDict(a=1), {"a": 1}),
    "a named tuple": (Point(1, numpy.int32(2)), (1, 2)),
    "a torch.Size": (torch.Size([2, 3]), (2, 3)),
    "a member of an IntEnum": (Level.HIGH, 3),
    "a dtype": (torch.float16, torch.float16),
    "a device": (torch.device("cpu"), "cpu"),
    "nested": ({"a": [(numpy.float32(1.5), {"b": Path("c")})]}, {"a": [(1.5, {"b": "c"})]}),
}


def same_with_types(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same_with_types, one, other))
    if isinstance(one, dict):
        return type(other) is dict and all(map(same_with_types, [*one, *one.values()], [*other, *other.values()]))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("kind", PLAIN)
def test_what_equals_plain_data_is_saved_as_such(kind: str, tmp_path: Path) -> None:
    learner, _ = training()
    given, expected = PLAIN[kind]
    checkpoint.save(tmp_path / "last.pt", learner, what=given)
    assert same_with_types(loaded((tmp_path / "last.pt").read_bytes())["what"], expected)
    assert same_with_types(checkpoint.load(tmp_path / "last.pt", learner)["what"], expected)


def test_numpys_random_state_is_saved_and_restored(tmp_path: Path) -> None:
    learner, _ = training()
    generator = numpy.random.RandomState(3)
    generator.normal()
    checkpoint.save(tmp_path / "last.pt", learner, numpy=generator.get_state())
    expected = generator.normal(size=5)
    other = numpy.random.RandomState(0)
    other.set_state(checkpoint.load(tmp_path / "last.pt", learner)["numpy"])
    assert other.normal(size=5).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "uint16", "uint32", "bool", ">f4"])
def test_numpys_arrays_are_saved_as_tensors(dtype: str, tmp_path: Path) -> None:
    learner, _ = training()
    array = numpy.arange(6).reshape(2, 3)[:, ::-1].astype(dtype)
    checkpoint.save(tmp_path / "last.pt", learner, array=array)
    assert checkpoint.load(tmp_path / "last.pt", learner)["array"].tolist() == array.tolist()


def cycle() -> Any:
    value: Dict[str, Any] = {}
    value["self"] = [value]
    return value


class WithState:
    """Anything with a state, as a scheduler or a sampler is."""

    def __init__(self, state: Any = 0, fails: bool = False) -> None:
        self.state, self.fails = state, fails

    def state_dict(self) -> Any:
        return {"state": self.state}

    def load_state_dict(self, state: Any) -> None:
        if self.state != state["state"]:
            self.state = state["state"]
            if self.fails:
                raise ValueError("half-way")


REFUSED: Dict[str, Tuple[Callable[[], Any], str]] = {
    "a set": (lambda: {1, 2}, r"what cannot be saved.*received builtins.set. Fix: save sorted"),
    "a namespace": (lambda: argparse.Namespace(lr=0.1), r"received argparse.Namespace. Fix: save vars"),
    "a time": (lambda: datetime.datetime(2020, 1, 1), r"received datetime.datetime. Fix: save its isoformat"),
    "bytes": (lambda: b"ab", "received builtins.bytes. Fix: save list"),
    "a generator": (torch.Generator, "received torch.*Generator. Fix: save its state"),
    "a class": (lambda: WithState, "received builtins.type"),
    "times of numpy": (lambda: numpy.zeros(2, "datetime64[s]"), "received numpy.ndarray"),
    "a cycle": (cycle, r"what\['self'\]\[0\] cannot be saved.*contains itself. Fix: leave out what refers back"),
    "deep inside": (lambda: {"a": [0, {"b": {1}}]}, r"what\['a'\]\[1\]\['b'\] cannot be saved"),
    "keys that become equal": (lambda: {Path("a"): 1, "a": 2}, "received 'a' twice"),
    "in a state": (lambda: WithState({1}), r"what\['state'\] cannot be saved"),
    "a subclass of tensors": (
        lambda: torch.zeros(2).as_subclass(type("Mine", (torch.Tensor,), {})),
        "received .*Mine. Fix: save what.as_subclass",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_could_not_be_loaded_is_refused_when_saving(kind: str, tmp_path: Path) -> None:
    learner, optimizer = training()
    path = tmp_path / "last.pt"
    checkpoint.save(path, learner, what=1)
    before = path.read_bytes()
    make, match = REFUSED[kind]
    with nothing_changed(learner, optimizer), pytest.raises(CldaError, match=match):
        checkpoint.save(path, learner, optimizer=optimizer, what=make())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_strategys_state_and_figures_are_plain_or_refused() -> None:
    class Odd(Average):
        state: Any = numpy.float64(2)

        def state_dict(self) -> Dict[str, Any]:
            return {"state": self.state}

        def load_state_dict(self, state: Any) -> None:
            self.state = state["state"]

    class OfNumpy:
        due = observes = staticmethod(lambda step: True)
        strength = staticmethod(lambda step: numpy.float64(0.5))

    teacher, student = networks()
    learner = make_learner(teacher, student, update=Odd(decay=0.9), schedule=OfNumpy(), selection=AllLayers())
    train(learner, sgd(student), 1)
    state = loaded(saved(learner.state_dict()))
    assert type(state["history"][0]["strength"]) is float
    assert type(state["update"]["state"]) is float
    learner.update.state = {1}
    with pytest.raises(CldaError, match=r"the learner's state\['update'\]\['state'\] cannot be saved"):
        learner.state_dict()


# ----------------------------------------------------------------------------------------------- models in wrappers

WRAPPERS: Dict[str, Callable[[nn.Module], nn.Module]] = {"plain": lambda model: model, "parallel": nn.DataParallel}
if hasattr(torch, "compile"):
    WRAPPERS["compiled"] = lambda model: torch.compile(model, backend="eager")


def wrapped_training(wrapper: str, seed: int) -> Any:
    torch.manual_seed(seed)
    teacher, student = (
        WRAPPERS[wrapper](nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, 3)))
        for width in (9, 4)
    )
    return make_learner(teacher.eval(), student, update=Average(decay=0.9), selection=AllLayers())


@pytest.mark.parametrize("to", WRAPPERS)
@pytest.mark.parametrize("of", WRAPPERS)
def test_a_model_is_restored_whatever_wraps_it(of: str, to: str, tmp_path: Path) -> None:
    learner, other = wrapped_training(of, 1), wrapped_training(to, 2)
    ema, its_ema = WRAPPERS[of](nn.Linear(2, 2)), WRAPPERS[to](nn.Linear(2, 2))
    checkpoint.save(tmp_path / "last.pt", learner, ema=ema)
    checkpoint.load(tmp_path / "last.pt", other, ema=its_ema)
    pairs = ((learner.teacher, other.teacher), (learner.student, other.student), (ema, its_ema))
    for one, same in pairs:
        assert [bits(value) for value in one.state_dict().values()] == [bits(v) for v in same.state_dict().values()]


def test_a_wrappers_module_is_told_from_one_of_the_users_own(tmp_path: Path) -> None:
    def backbone_and_head(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Module()
        model.module, model.head = nn.Module(), nn.Linear(3, 3)
        model.module.head = nn.Linear(3, 3)
        return model

    for of, to in ((nn.DataParallel, lambda model: model), (lambda model: model, nn.DataParallel)):
        one, other = backbone_and_head(1), backbone_and_head(2)
        checkpoint.save(tmp_path / "last.pt", make_learner(*networks()), ema=of(one))
        checkpoint.load(tmp_path / "last.pt", make_learner(*networks()), ema=to(other))
        assert bits(one.state_dict()) == bits(other.state_dict())


def test_versions_of_modules_go_with_their_names(tmp_path: Path) -> None:
    """Without its version a BatchNorm would be taken for one from before it counted batches."""
    seen = []

    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            seen.append(metadata.get("version"))
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    learner, other = (
        make_learner(wrap(nn.Sequential(Versioned(5, 3))), nn.Linear(5, 3)) for wrap in (nn.DataParallel, lambda m: m)
    )
    checkpoint.save(tmp_path / "last.pt", learner)
    checkpoint.load(tmp_path / "last.pt", other)
    assert seen == [7]


# ------------------------------------------------------------------------------------------- files, and other errors


def damaged(data: bytes) -> Dict[str, bytes]:
    middle = len(data) // 2
    return {
        "empty": b"",
        "cut": data[:middle],
        "without its end": data[:-1],
        "one bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "text": b"no checkpoint",
        "a pickle of something else": saved(argparse.Namespace(lr=1)) if hasattr(torch, "compile") else b"\x80\x02.",
    }


@pytest.mark.parametrize("kind", damaged(b"ab"))
def test_a_damaged_file_is_a_clear_error_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    learner, optimizer = training()
    path = tmp_path / "last.pt"
    checkpoint.save(path, learner, optimizer=optimizer, filler=torch.zeros(100_000))
    path.write_bytes(damaged(path.read_bytes())[kind])
    train(learner, optimizer, 1)
    with nothing_changed(learner, optimizer), pytest.raises(
        CldaError, match=r"last.pt cannot be read.*Fix: go on from"
    ):
        checkpoint.load(path, learner, optimizer=optimizer)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "no.pt", training()[0])
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path / "no.pt")
    with pytest.raises(CldaError, match="cannot be replaced by a file.*received a folder"):
        checkpoint.save(tmp_path, training()[0])


def test_what_fails_half_way_takes_everything_back(tmp_path: Path) -> None:
    learner, optimizer = training()
    train(learner, optimizer, 1)
    path = tmp_path / "last.pt"
    checkpoint.save(path, learner, optimizer=optimizer, first=WithState(1), second=WithState(1))
    train(learner, optimizer, 2, start=1)
    first, second = WithState(5), WithState(6, fails=True)
    match = "second cannot be restored.*WithState, which raised ValueError: half-way"
    with nothing_changed(learner, optimizer), pytest.raises(CldaError, match=match):
        checkpoint.load(path, learner, optimizer=optimizer, first=first, second=second)
    assert (first.state, second.state) == (5, 6)


def test_a_model_that_fails_half_way_takes_everything_back(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        armed = False

        def _load_from_state_dict(self, *arguments: Any) -> None:
            super()._load_from_state_dict(*arguments)
            if self.armed:
                Extra.armed = False
                raise ValueError("half-way")

    teacher, student = networks()
    student.head = Extra(6, 3)
    learner, optimizer = make_learner(teacher, student, update=Average(decay=0.9), selection=AllLayers()), sgd(student)
    checkpoint.save(tmp_path / "last.pt", learner, optimizer=optimizer)
    train(learner, optimizer, 2)
    Extra.armed = True
    with nothing_changed(learner, optimizer), pytest.raises(CldaError, match="student cannot be restored.*half-way"):
        checkpoint.load(tmp_path / "last.pt", learner, optimizer=optimizer)


@pytest.mark.parametrize("length", [100, 240, 255])
def test_names_as_long_as_the_file_system_allows(length: int, tmp_path: Path) -> None:
    path = tmp_path / ("x" * (length - 3) + ".pt")
    learner, _ = training()
    checkpoint.save(path, learner, epoch=1)
    assert checkpoint.load(path, learner) == {"epoch": 1}
    assert len(os.listdir(tmp_path)) == 1


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    real, link = tmp_path / "runs" / "epoch_3.pt", tmp_path / "last.pt"
    link.symlink_to(Path("runs") / "epoch_3.pt")
    learner, _ = training()
    for epoch in (3, 4):  # first a link to nothing yet
        checkpoint.save(link, learner, epoch=epoch)
        assert link.is_symlink()
        assert checkpoint.load(real, learner) == {"epoch": epoch}
    assert os.listdir(tmp_path / "runs") == ["epoch_3.pt"]


def test_permissions_are_those_of_the_old_file_or_of_the_umask(tmp_path: Path) -> None:
    path, mode = tmp_path / "last.pt", lambda: stat.S_IMODE(path.stat().st_mode)
    before = os.umask(0o027)
    try:
        with atomically(path) as unfinished:
            Path(unfinished).write_bytes(b"1")
        assert mode() == 0o640
        for old in (0o600, 0o664, 0o444):
            path.chmod(old)
            with atomically(path) as unfinished:
                assert stat.S_IMODE(os.stat(unfinished).st_mode) & ~old & ~stat.S_IWUSR == 0, "never more open"
                Path(unfinished).write_bytes(b"2")
            assert mode() == old
    finally:
        os.umask(before)


def test_threads_and_processes_of_one_number_write_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers that share a folder number their processes alike."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "last.pt"
    together, errors = threading.Barrier(4), []

    def write(who: int) -> None:
        try:
            for _ in range(10):
                with atomically(path) as unfinished:
                    together.wait(10)
                    torch.save(torch.full((10_000,), float(who)), unfinished)
                assert len(torch.load(str(path)).unique()) == 1
        except BaseException as error:
            errors.append(error)
            together.abort()

    threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert os.listdir(tmp_path) == ["last.pt"]
