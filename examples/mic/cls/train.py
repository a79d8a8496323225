"""Train a student with MIC's own classification script, unmodified, and CLDA beside it.

    python -m examples.mic.cls.train --host PATH/TO/MIC/cls \
        --clda-teacher TEACHER_LOG/checkpoints/best.pth --clda-teacher-arch resnet101 \
        -- data/visda-2017 -d VisDA2017 -s Synthetic -t Real -a resnet50 ...

What follows ``--`` goes to the host's ``cdan_mcc_sdat_masking.py``, which runs in its own folder.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple

from torch import nn

from clda_core import CldaError, CollaborativeLearner, Never, Schedule
from clda_core.distillation import DISTDistillation
from clda_core.errors import check_number, problem

from . import compatibility, host
from .plugin import Plugin, first_output, student_beside
from .teacher import build_teacher, teacher_weights

_RESUMED = (
    "mic-cls: teacher, learner and student go on from the checkpoint. The host cannot resume a training: it starts "
    "anew with its optimizers, learning rates, epoch number, host EMA and domain discriminator."
)

MakeLearner = Callable[[nn.Module, nn.Module], CollaborativeLearner]


def run(options: argparse.Namespace, host_arguments: Sequence[str]) -> Optional[Plugin]:
    """Run the host's script with CLDA, and return what was plugged in.

    Returns:
        ``None`` where the host ran alone: with ``--clda-off``, and in its phases ``test`` and ``analysis``.

    Raises:
        CldaError: If something does not fit, before the training where possible.
    """
    folder = host.find(options.host)
    if options.clda_off or _phase(host_arguments) != "train":
        compatibility.apply()
        with host.entered(folder):
            host.run(host_arguments)
        return None
    check_number("--clda-weight", options.clda_weight, at_least=0)
    source = _teacher_file(options)
    teacher_weights(source)  # a wrong file is found before the data are read
    make_learner = learner_from(options)
    compatibility.apply()
    with host.entered(folder) as modules:

        def make_teacher(student: nn.Module) -> nn.Module:
            return build_teacher(
                source,
                options.clda_teacher_arch,
                student,
                utils=modules.utils,
                classifier_class=modules.cdan.ImageClassifier,
                pool=not options.clda_teacher_no_pool,
            )

        plugin = Plugin(
            make_teacher,
            make_learner,
            weight=options.clda_weight,
            resume=options.clda_resume,
            settings={**{name: _plain(value) for name, value in vars(options).items()}, "host": list(host_arguments)},
        )
        if options.clda_resume is not None:
            print(_RESUMED)
        with plugin.plugged_into(modules):
            host.run(host_arguments)
    return plugin


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run from the command line; return the exit status."""
    ours, theirs = split(list(sys.argv[1:] if arguments is None else arguments))
    options = parser().parse_args(ours)
    try:
        plugin = run(options, theirs)
    except CldaError as error:
        print(f"mic-cls: {error}", file=sys.stderr)
        return 2
    if plugin is not None and plugin.learner is not None:
        print(plugin.learner.report())
    return 0


def learner_from(options: argparse.Namespace) -> MakeLearner:
    """Return the function that builds the learner: the user's, or one of the options' temperature and schedule.

    Raises:
        CldaError: If the user's cannot be found, or comes with options that it would have to heed.
    """
    names = ("temperature", "warmup", "interval", "no_rounds")
    values = {name: getattr(options, f"clda_{name}") for name in names}
    given = [name for name, value in values.items() if value is not None and value is not False]  # 0 is given
    if options.clda_learner is not None:
        if given:
            raise problem(
                "--clda-learner decides about the learner alone",
                expected="no other option about it",
                received=", ".join(f"--clda-{name.replace('_', '-')}" for name in given),
                fix="build it in the function",
            )
        return _function(options.clda_learner)
    chosen = {name: getattr(options, f"clda_{name}") for name in ("warmup", "interval")}
    numbers = {name: value for name, value in chosen.items() if value is not None}
    schedule = Never() if options.clda_no_rounds else Schedule(**numbers)
    temperature = options.clda_temperature
    distillation = DISTDistillation() if temperature is None else DISTDistillation(temperature=temperature)
    return lambda teacher, student: CollaborativeLearner(
        teacher, student, distillation=distillation, schedule=schedule, extract=first_output
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of our own options."""
    result = argparse.ArgumentParser(
        prog=f"python -m {__package__}.train",  # the folder may be copied elsewhere
        usage="%(prog)s --host PATH/TO/MIC/cls --clda-teacher FILE [--clda-...] -- ARGUMENTS OF THE HOST'S SCRIPT",
        description="MIC classification with CLDA; the host's script runs unmodified, in its own examples folder.",
        allow_abbrev=False,
    )
    add = result.add_argument
    add("--host", type=Path, required=True, metavar="DIR", help="MIC's cls folder")
    add(
        "--clda-teacher", type=_path, metavar="FILE", help="the teacher: the host's best.pth, or a best.clda.pt of ours"
    )
    add("--clda-teacher-arch", default="resnet101", metavar="ARCH", help="its architecture (default: %(default)s)")
    add("--clda-teacher-no-pool", action="store_true", help="the teacher was trained with the host's --no-pool")
    add("--clda-weight", type=float, default=1.0, metavar="W", help="factor of the KD loss (default: %(default)s)")
    add("--clda-temperature", type=float, metavar="T", help="temperature of the KD loss (default: the library's)")
    add("--clda-warmup", type=int, metavar="N", help="optimizer steps without rounds (default: the library's)")
    add("--clda-interval", type=int, metavar="N", help="optimizer steps between rounds (default: the library's)")
    add("--clda-no-rounds", action="store_true", help="KD from a frozen teacher, the baseline to compare with")
    add("--clda-learner", metavar="MODULE:FUNCTION", help="builds the learner from (teacher, student) instead")
    add(
        "--clda-resume", type=_path, metavar="FILE", help="a latest.clda.pt: teacher, learner, student go on from there"
    )
    add("--clda-off", action="store_true", help="run the host alone")
    return result


def split(arguments: List[str]) -> Tuple[List[str], List[str]]:
    """Return what comes before ``--`` and what comes after it."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _phase(host_arguments: Sequence[str]) -> str:
    theirs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    theirs.add_argument("--phase", default="train")
    return str(theirs.parse_known_args(list(host_arguments))[0].phase)


def _teacher_file(options: argparse.Namespace) -> Path:
    if options.clda_resume is not None:
        student = student_beside(options.clda_resume)
        if student == options.clda_resume or not student.is_file():
            raise problem(
                "there is no student to resume",
                expected="latest.clda.pt and the host's latest.pth beside it",
                received=str(options.clda_resume),
                fix="pass --clda-resume LOG/checkpoints/latest.clda.pt",
            )
        return options.clda_resume
    if options.clda_teacher is None:
        raise problem(
            "there is no teacher",
            expected="--clda-teacher FILE",
            received="none",
            fix="train it with the host alone first (docs/hosts/mic-cls.md), or pass --clda-off",
        )
    return options.clda_teacher


def _function(name: str) -> MakeLearner:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise problem(
            "--clda-learner cannot be found",
            expected="module:function, importable from the current folder",
            received=f"{name!r} ({error})",
            fix="pass for example --clda-learner my_learner:make_learner",
        ) from error
    return function


def _path(text: str) -> Path:
    # The host runs in another folder, so a relative path is made absolute now.
    return Path(text).expanduser().absolute()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    sys.exit(main())
