"""Fonts to real handwriting: train a big teacher by UDA, then a small student four ways, and compare them.

    python -m examples.classification.digits --seed 0
    torchrun --nproc-per-node 2 examples/classification/digits.py   # each process takes half of every batch

The students start from the same weights and see the same batches: UDA alone, with knowledge distillation (KD) from the
frozen teacher, with CLDA, which updates the teacher meanwhile, and with CLDA in two turns: the student of the frozen
teacher teaches it, and a second student is trained of that. A second process trains two of the four meanwhile. The
target's labels are used to evaluate only; see ``digits_data.py``. ``runs/digits`` then holds ``results.json``,
``figure.png`` and the checkpoints.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a file: the imports below start at the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clda_core import CldaError, CollaborativeLearner, Never, teach
from examples.classification import ranks
from examples.classification.arguments import a_device, a_folder, an_integer
from examples.classification.checkpoint import Checkpoint, CheckpointError
from examples.classification.digits_data import SOURCE_IMAGES, LabelledImages, source_digits, target_digits
from examples.classification.digits_models import BIG, SMALL, residual_network
from examples.classification.digits_report import OVER_TEN_SEEDS, TOLERANCE, save_figure, save_json, table, versions
from examples.classification.digits_training import MakeLearner, Stage, Task, train
from examples.classification.self_training import SelfTraining


@dataclass(frozen=True)
class Config:
    """One run of the job; equal configurations give equal figures on one machine.

    Attributes:
        seed: Of the source's rendering, both networks' starts, and the order of the data.
        steps: Optimizer steps of each training.
        device: Where the networks run.
        threads: CPU threads of torch; the last digits of the figures may depend on it.
        teacher_blocks: Residual blocks of the teacher, by stage.
        student_blocks: The same of the student.
        source_images: Digits rendered.
        evaluations: Points on the accuracy curve, each also a checkpoint.
        host: Settings of the UDA that every network goes through.
        progress: Whether to show progress bars.
    """

    seed: int = 0
    steps: int = 600
    device: str = "cpu"
    threads: int = 2
    teacher_blocks: Tuple[int, ...] = BIG
    student_blocks: Tuple[int, ...] = SMALL
    source_images: int = SOURCE_IMAGES
    evaluations: int = 6
    host: Any = field(default_factory=SelfTraining)
    progress: bool = True


@dataclass
class Results:
    """What a run measured: the teacher's training, and each student's by its title."""

    config: Config
    teacher: Stage
    students: Dict[str, Stage]

    def to_dict(self) -> Dict[str, Any]:
        """Return everything as plain data."""
        return {
            "config": asdict(self.config),
            "versions": versions(),
            "seeds": _seeds(self.config.seed),
            "teacher": asdict(self.teacher),
            "students": {title: asdict(stage) for title, stage in self.students.items()},
        }


UDA_ALONE, FROZEN_KD, CLDA = "UDA alone", "UDA + KD from the frozen teacher", "UDA + CLDA"
IN_TURNS = "UDA + CLDA in two turns"
MEANWHILE = (UDA_ALONE, CLDA)
"""What a second process trains while the first trains the student of the frozen teacher and that of the next turn."""
TEACHING_ROUNDS = 40  # at most; the teacher is at the student's level after ten or twenty


def learners() -> Dict[str, MakeLearner]:
    """Return the ways that differ in one argument: no learner, KD without rounds, and the defaults."""
    return {
        UDA_ALONE: lambda teacher, student: CollaborativeLearner(teacher, student, enabled=False),
        FROZEN_KD: lambda teacher, student: CollaborativeLearner(teacher, student, schedule=Never()),
        CLDA: CollaborativeLearner,
    }


def run(
    config: Config,
    *,
    make_learners: Optional[Mapping[str, MakeLearner]] = None,
    train: Callable[..., Stage] = train,
    folder: Optional[Path] = None,
    resume: bool = False,
    teacher_file: Optional[Path] = None,
    processes: int = 1,
) -> Results:
    """Train the teacher, then a student for each learner, every one with its own copy of that teacher.

    Where one of them is frozen-teacher KD, its student then teaches its teacher, of which a second one is trained.

    Args:
        config: The run.
        make_learners: By title, a function from teacher and student to a learner; those of :func:`learners` by default.
        train: The host's training of one network, with the signature of ``digits_training.train``.
        folder: Where to keep checkpoints; ``None`` keeps none.
        resume: Whether to go on from the checkpoints in ``folder``, instead of starting anew.
        teacher_file: Checkpoint of the teacher's training, used if it is there and written if not, so that many runs
            can share one teacher; in ``folder`` by default.
        processes: With 2, another process trains the students of ``MEANWHILE``, of :func:`learners`, and leaves them in
            ``folder``. The figures are the same: a stage depends on no other but the teacher's.

    Raises:
        CheckpointError: If a checkpoint to go on from is broken or belongs to another run.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            chosen = learners() if make_learners is None else make_learners
            ahead = MEANWHILE if processes > 1 and make_learners is None and folder is not None else ()
            return _run(config, chosen, train, folder, resume, teacher_file, ahead)
    finally:
        torch.set_num_threads(threads)


def main(arguments: Optional[List[str]] = None, config: Optional[Config] = None) -> int:
    """Run the job from the command line, which overrides ``config``; return the exit status."""
    parser = options_of("digits", "Fonts to handwritten digits: a teacher, and a student trained four ways.")
    parser.set_defaults(threads=1)  # which gives the same sums on every number of cores
    parser.add_argument(
        "--processes",
        type=an_integer(1, 3),
        default=min(2, ranks.cores()),
        help="1 or 2 processes (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in the output folder")
    options = parser.parse_args(arguments)
    return run_command(
        "digits",
        options,
        config or Config(),
        if_interrupted="the same command with --resume goes on from here",
        beside=f"{OVER_TEN_SEEDS}\n{TOLERANCE}",
        processes=1 if ranks.count() > 1 or options.device != "cpu" else options.processes,
        folder=options.output / "checkpoints",
        resume=options.resume,
    )


def options_of(program: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every example on this data has."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--seed", type=an_integer(0, 2**31), default=0, help="seed of everything random (default: 0)")
    parser.add_argument(
        "--steps",
        type=an_integer(1),
        default=Config.steps,
        help="optimizer steps per training (default: %(default)s)",
    )
    parser.add_argument(
        "--device", type=a_device, default="cpu", help="torch device, e.g. cpu or cuda:0 (default: cpu)"
    )
    parser.add_argument(
        "--threads",
        type=an_integer(1),
        default=min(2, ranks.cores()),
        help="CPU threads a process (default: %(default)s)",
    )
    parser.add_argument("--output", type=a_folder, default=Path("runs") / program, help="folder (default: %(default)s)")
    return parser


def run_command(
    program: str,
    options: argparse.Namespace,
    config: Config,
    *,
    if_interrupted: str = "",
    beside: str = "",
    **run_options: Any,
) -> int:
    """Run ``config`` with the command line's options, leave the results in the output folder, and print them.

    Args:
        program: Named in messages.
        options: Parsed by :func:`options_of`.
        config: What the options do not say.
        if_interrupted: Said to whoever stops the run.
        beside: Said below the results of one seed.
        run_options: Passed to :func:`run`.

    Returns:
        The exit status.
    """
    with ranks.joined():
        return _run_command(program, options, config, if_interrupted, beside, run_options)


def _run_command(
    program: str,
    options: argparse.Namespace,
    config: Config,
    if_interrupted: str,
    beside: str,
    run_options: Dict[str, Any],
) -> int:
    given = {name: getattr(options, name) for name in ("seed", "steps", "device", "threads")}
    try:
        config = replace(config, **given, progress=config.progress and ranks.first())
        results = run(config, **run_options).to_dict()
    except (CheckpointError, CldaError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: {'; '.join(filter(None, ('interrupted', if_interrupted)))}", file=sys.stderr)
        return 130
    if not ranks.first():
        return 0
    save_json(results, options.output / "results.json")
    save_figure(results, options.output / "figure.png")
    print("\n\n".join(filter(None, (_summary(results), beside))))
    print(f"\nwritten: {options.output / 'results.json'}, {options.output / 'figure.png'}")
    return 0


def _run(
    config: Config,
    chosen: Mapping[str, MakeLearner],
    train: Callable[..., Stage],
    folder: Optional[Path],
    resume: bool,
    teacher_file: Optional[Path],
    ahead: Sequence[str],
) -> Results:
    task = _task(config)
    seeds = _seeds(config.seed)
    identity = {key: value for key, value in asdict(config).items() if key not in ("device", "threads", "progress")}
    if ranks.count() > 1:
        identity["ranks"] = ranks.count()
    files = {
        title: None if folder is None else folder / f"{_slug(title)}.pt" for title in ("teacher", *chosen, IN_TURNS)
    }
    if not resume:
        for path in files.values():
            if path is not None and path.exists() and ranks.first():
                path.unlink()
        ranks.wait()
    if teacher_file is not None:
        files["teacher"] = teacher_file

    def checkpoint(title: str) -> Optional[Checkpoint]:
        path = files[title]
        if path is None:
            return None
        irrelevant = "student_blocks" if title == "teacher" else ""
        return Checkpoint(path, {"stage": title, **{key: identity[key] for key in identity if key != irrelevant}})

    trained = residual_network(config.teacher_blocks, seed=seeds["teacher"]).to(config.device)
    of_teacher = train("teacher", trained, task, seed=seeds["teacher batches"], checkpoint=checkpoint("teacher"))

    def of_student(title: str, teacher: nn.Module, make_learner: MakeLearner) -> Tuple[nn.Module, Stage]:
        student = residual_network(config.student_blocks, seed=seeds["student"]).to(config.device)
        # A learner that draws random numbers must find the same state however many stages came before.
        torch.manual_seed(seeds["student"])
        stage = train(
            title,
            student,
            task,
            seed=seeds["student batches"],
            teacher=teacher,
            make_learner=make_learner,
            checkpoint=checkpoint(title),
        )
        return student, stage

    def from_the_trained_teacher(title: str) -> Tuple[nn.Module, nn.Module]:
        teacher = residual_network(config.teacher_blocks, seed=seeds["teacher"]).to(config.device)
        teacher.load_state_dict(trained.state_dict())
        student, students[title] = of_student(title, teacher, chosen[title])
        return teacher, student

    students: Dict[str, Stage] = {}
    with _meanwhile(config, folder, ahead) as wait:
        for title in chosen:
            if title not in (*ahead, FROZEN_KD):
                from_the_trained_teacher(title)
        if FROZEN_KD in chosen:
            teacher, student = from_the_trained_teacher(FROZEN_KD)
            teach(teacher, student, _target_batches(task, seeds["first teaching"]))
            student, second = of_student(IN_TURNS, teacher, chosen[FROZEN_KD])
            teach(teacher, student, _target_batches(task, seeds["second teaching"]))
            first = students[FROZEN_KD]
            students[IN_TURNS] = replace(
                second,
                teacher_before=first.teacher_before,
                teacher_after=task.evaluation.accuracy(teacher),
                seconds={part: first.seconds[part] + second.seconds[part] for part in second.seconds},
            )
        wait()
        for title in ahead:  # from its last checkpoint; nothing is left to train unless the other process was stopped
            from_the_trained_teacher(title)
    return Results(config, of_teacher, {title: students[title] for title in (*chosen, IN_TURNS) if title in students})


@contextmanager
def _meanwhile(config: Config, folder: Optional[Path], titles: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Train students in another process; yield what waits for it, and end it if this one fails or is interrupted."""
    if not titles:
        yield lambda: None
        return
    other = multiprocessing.get_context("spawn").Process(
        target=_train_ahead, args=(config, folder, titles), daemon=True
    )
    other.start()
    try:
        yield other.join
    finally:
        other.terminate()
        other.join()


def _train_ahead(config: Config, folder: Path, titles: Sequence[str]) -> None:
    """Go on from the trained teacher's checkpoint, in a process that shows nothing."""
    with suppress(KeyboardInterrupt):
        quiet = replace(config, progress=False)
        run(quiet, make_learners={title: learners()[title] for title in titles}, folder=folder, resume=True)


def _target_batches(task: Task, seed: int) -> Iterator[Tensor]:
    images, generator = task.target.images, torch.Generator().manual_seed(seed)
    for _ in range(min(TEACHING_ROUNDS, task.steps)):
        yield images[torch.randint(len(images), (task.host.batch,), generator=generator).to(images.device)]


def _task(config: Config) -> Task:
    device = torch.device(config.device)
    source = source_digits(_seeds(config.seed)["source"], config.source_images)
    target, evaluation = target_digits(device)
    on_device = LabelledImages(source.images.to(device), source.labels.to(device))
    return Task(
        source=on_device,
        target=target,
        evaluation=evaluation,
        host=config.host,
        steps=config.steps,
        evaluate_every=max(1, config.steps // config.evaluations),
        progress=config.progress,
    )


def _seeds(seed: int) -> Dict[str, int]:
    """Spread one seed over everything random; the students share theirs."""
    names = ("source", "teacher", "teacher batches", "student", "student batches")
    of_training = {name: seed * len(names) + index for index, name in enumerate(names)}
    return {**of_training, "first teaching": 2**31 + 2 * seed, "second teaching": 2**31 + 2 * seed + 1}


def _slug(title: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in title.lower()).split())


def _summary(results: Mapping[str, Any]) -> str:
    tables = [
        f"{title}: {stage['table']}" for title, stage in results["students"].items() if stage["report"].get("rounds")
    ]
    title = f"Accuracy on the 1,797 handwritten digits, in %, seed {results['config']['seed']}"
    return "\n\n".join([*tables, f"{title}\n{table(results)}"])


if __name__ == "__main__":
    sys.exit(main())
