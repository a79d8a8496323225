"""Check CLDA against a real checkout of MIC in this environment, on a tiny data set drawn here: one line per check.

    python -m examples.mic.cls.verify --host PATH/TO/MIC/cls

The exit status is 0 only if all hold. Takes some minutes on a CPU; nothing is downloaded, and nothing is written
to the checkout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from torch import nn

from clda_core import CldaError, CollaborativeLearner, Schedule
from clda_core.lead import FixedTrust

from . import compatibility, host
from .plugin import first_output
from .synthetic import write_visda
from .teacher import load_checkpoint

TEACHER, STUDENT = "resnet34", "resnet18"


def eager_learner(teacher: nn.Module, student: nn.Module) -> CollaborativeLearner:
    """Build a learner that changes the teacher soon and whoever leads, so that there is something to check."""
    return CollaborativeLearner(
        teacher,
        student,
        trust=FixedTrust(),
        schedule=Schedule(warmup=2, interval=2),
        extract=first_output,
    )


class Verification:
    """Runs the host with and without CLDA and judges what it finds.

    Args:
        folder: The checkout's ``cls`` folder.
        work: Where data, logs and checkpoints go.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, folder: Path, work: Path, device: str) -> None:
        self.folder, self.work, self.device = folder, work, device
        self.missing = compatibility.apply()
        self.passed = True

    def check(self, name: str, passed: bool, figure: str) -> None:
        """Print one line."""
        self.passed = self.passed and passed
        print(f"{'PASS' if passed else 'FAIL'}  {name}: {figure}", flush=True)

    def run(self) -> bool:
        """Make all runs and checks; return whether all passed."""
        names = ", ".join(self.missing) or "nothing"
        print(
            f"python {sys.version.split()[0]}, torch {torch.__version__}, {self.device}; put back: {names}", flush=True
        )
        write_visda(self.work / "data")
        teacher = self._alone("teacher", "-a", TEACHER, "--lr", "0.002", "--epochs", "2", "-i", "8")
        self.check("the host alone trains the teacher here", "test_acc1" in teacher, _accuracy(teacher))
        training = ["-a", STUDENT, "--lr", "0.005", "--epochs", "4", "-i", "4"]
        alone = self._alone("alone", *training)
        if self.device == "cuda":
            self._alone("again", *training)
            self._compare("the host alone repeats itself bitwise (else no equality can be seen below)", "again")
        off = self._ours("off", ["--clda-off"], training)
        self._compare("off is bitwise equal to the unmodified host", "off")
        self.check("off builds no teacher", "rounds" not in off and not self._files("off"), "no file of ours")
        checkpoint = ["--clda-teacher", str(self._checkpoint("teacher", "latest")), "--clda-teacher-arch", TEACHER]
        self._ours("zero", [*checkpoint, "--clda-weight", "0", "--clda-no-rounds"], training)
        self._compare("KD weight 0 without rounds is bitwise equal too", "zero")
        kd = self._ours("kd", [*checkpoint, "--clda-no-rounds"], training)
        self._judge_kd()
        learner = ["--clda-learner", f"{_package()}.verify:eager_learner"]
        on = self._ours("on", [*checkpoint, *learner], training)
        self._judge_losses(off, on)
        self._judge_teacher(on)
        self._judge_files()
        self._judge_resume(learner)
        self._judge_test_command(_accuracy(alone))
        self._judge_cost(off, kd, on)
        return self.passed

    # ------------------------------------------------------------------------------------------------------ checks

    def _compare(self, name: str, other: str) -> None:
        kinds = ("latest", "best")
        pairs = [[load_checkpoint(self._checkpoint(run, kind)) for run in ("alone", other)] for kind in kinds]
        differing = [key for ours, theirs in pairs for key in ours if not equal(ours[key], theirs.get(key))]
        same_names = all(list(ours) == list(theirs) for ours, theirs in pairs)
        figure = f"{len(differing)} of {sum(len(ours) for ours, _ in pairs)} tensors of latest.pth and best.pth differ"
        self.check(name, same_names and not differing, figure)

    def _judge_losses(self, off: Mapping[str, Any], on: Mapping[str, Any]) -> None:
        first = {run: facts["first_iteration"] for run, facts in (("off", off), ("on", on))}
        figures = ", ".join(f"{name} {value!r}" for name, value in first["on"].items())
        self.check("the host's losses of the first iteration are its own", first["off"] == first["on"], figures)

    def _judge_kd(self) -> None:
        losses, without = (self._report(run)["kd_losses"] for run in ("kd", "zero"))
        falling = all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
        figure = " -> ".join(f"{loss:.3f}" for loss in losses)
        figures = f"{figure} by epoch, teacher frozen (with weight 0: {without[-1]:.3f} at the end)"
        self.check("the KD loss is finite and falls", falling, figures)

    def _judge_teacher(self, on: Mapping[str, Any]) -> None:
        rounds = on["rounds"]
        updated = sorted({layer for record in rounds for layer in record["updated"]})
        reported = self._report("on")["report"]["rounds"]
        steps = [record["step"] for record in rounds]
        self.check(
            "rounds happen and are reported", bool(steps) and len(reported) == len(steps), f"after steps {steps}"
        )
        strangers = [name for name, layer in on["teacher_changed"].items() if layer not in updated]
        figure = f"{len(on['teacher_changed'])} tensors in {', '.join(updated)}; {len(strangers)} others"
        self.check("only reported layers of the teacher change", bool(updated) and not strangers, figure)
        outside = on["student_in_optimizer"] and not on["teacher_in_optimizer"]
        self.check("the teacher is not in the host's optimizer", outside, "all of the student's parameters are")
        frozen = not on["teacher_trains"] and not on["teacher_requires_grad"]
        self.check("the teacher is frozen and in eval mode after the training", frozen, "all parameters and modules")
        same = on["teacher_device"] == on["student_device"] and on["teacher_device"].startswith(self.device)
        self.check("the teacher is where the student is", same, on["teacher_device"])
        self.check("no hook is left on the student", on["student_hooks"] == 0, f"{on['student_hooks']} hooks")

    def _judge_files(self) -> None:
        alone, on = (load_checkpoint(self._checkpoint(run, "latest")) for run in ("alone", "on"))
        figure = f"{len(on)} entries, as without CLDA"
        self.check("the host's checkpoint holds the student alone", list(alone) == list(on), figure)
        names = sorted(path.name for path in self._files("on") if path.suffix == ".pt")
        self.check("ours is beside each", names == ["best.clda.pt", "latest.clda.pt"], ", ".join(names))

    def _judge_resume(self, learner: Sequence[str]) -> None:
        saved = self._ours_file("on", "latest")
        options = ["--clda-resume", str(saved), "--clda-teacher-arch", TEACHER, *learner]
        self._ours("resumed", options, ["-a", STUDENT, "--epochs", "1", "-i", "0"])
        before, after = load_checkpoint(saved), load_checkpoint(self._ours_file("resumed", "latest"))
        differing = [key for key in before if not equal(before[key], after.get(key))]
        figure = f"{len(differing)} of {len(before)} parts differ after saving again"
        self.check("save, resume restores teacher and learner bitwise", not differing, figure)
        students = [load_checkpoint(self._checkpoint(run, "latest")) for run in ("on", "resumed")]
        self.check("... and the student, which the host itself cannot resume", equal(*students), "latest.pth")
        told = "cannot resume a training" in self._output("resumed")
        self.check("... and says what the host loses", told, "optimizer, schedules, epoch, host EMA, discriminator")

    def _judge_test_command(self, without: str) -> None:
        training = _accuracy(self._output("on"))
        output = self._alone("on", "-a", STUDENT, "--phase", "test")
        found = re.findall(r"\* Acc@1 ([\d.]+)", output)
        same = bool(found) and f"{float(found[-1]):3.1f}" == training.split()[-1]
        figure = f"Acc@1 {found[-1] if found else 'missing'}, after the training {training} (without CLDA {without})"
        self.check("the student's checkpoint loads in the host's test command without CLDA", same, figure)

    def _judge_cost(self, off: Mapping[str, Any], kd: Mapping[str, Any], on: Mapping[str, Any]) -> None:
        unit = "s" if self.device == "cuda" else "s of CPU time"
        for name, facts in (("KD alone", kd), ("a round every 2 steps", on)):
            seconds = (
                f"{facts['seconds']:.2f} {unit} an iteration, {facts['seconds'] / off['seconds']:.2f} x the host's"
            )
            memory = f"peak {facts['peak_mib']:.0f} MiB, {facts['peak_mib'] / off['peak_mib']:.2f} x"
            self.check(f"cost, {name}", math.isfinite(facts["seconds"]), f"{seconds}; {memory}")

    # -------------------------------------------------------------------------------------------------------- runs

    def _alone(self, name: str, *arguments: str) -> str:
        command = [host.SCRIPT] if not self.missing else ["-m", f"{_package()}.compatibility", host.SCRIPT]
        output = self._python([*command, *self._common(name), *arguments], self.folder / "examples", name)
        if "test_acc1" not in output and "--phase" not in arguments:
            raise CldaError(f"the host alone does not train here, see below\n{output[-3000:]}")
        return output

    def _ours(self, name: str, options: Sequence[str], training: Sequence[str]) -> Dict[str, Any]:
        facts = self.work / f"{name}.json"
        command = ["-m", f"{_package()}.inspection", str(facts), "--host", str(self.folder), *options, "--"]
        output = self._python([*command, *self._common(name), *training], self.work, name)
        if not facts.is_file():
            raise CldaError(f"the run '{name}' failed, see below\n{output[-3000:]}")
        return json.loads(facts.read_text(encoding="utf-8"))

    def _common(self, name: str) -> List[str]:
        return [
            str(self.work / "data"),
            *("-d", "VisDA2017", "-s", "Synthetic", "-t", "Real"),
            *("--train-resizing", "res.", "--val-resizing", "res.", "--resize-size", "32", "--scratch"),
            *("-b", "12", "-j", "0", "-p", "1", "--seed", "1", "--alpha", "0.9", "--mask_block_size", "8"),
            *("--log", str(self.work / name), "--gpu", "0" if self.device == "cuda" else ""),
        ]

    def _python(self, arguments: Sequence[str], folder: Path, name: str) -> str:
        root = Path(__file__).resolve().parents[_package().count(".") + 1]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "WANDB_MODE": "disabled"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=str(folder),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,  # the host alone exits with status 120 after a complete training
        )
        (self.work / f"{name}.txt").write_text(done.stdout, encoding="utf-8")
        return done.stdout

    # ------------------------------------------------------------------------------------------------------- files

    def _checkpoint(self, run: str, kind: str) -> Path:
        return self.work / run / "checkpoints" / f"{kind}.pth"

    def _ours_file(self, run: str, kind: str) -> Path:
        return self.work / run / "checkpoints" / f"{kind}.clda.pt"

    def _files(self, run: str) -> List[Path]:
        return list((self.work / run).rglob("*clda*"))

    def _report(self, run: str) -> Dict[str, Any]:
        return json.loads((self.work / run / "clda.json").read_text(encoding="utf-8"))

    def _output(self, run: str) -> str:
        return (self.work / f"{run}.txt").read_text(encoding="utf-8")


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run from the command line; return 0 only if every check passed."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.verify", description=__doc__)
    parser.add_argument("--host", type=Path, required=True, metavar="DIR", help="MIC's cls folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep data, logs and checkpoints in this folder")
    options = parser.parse_args(arguments)
    try:
        folder = host.find(options.host)
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            passed = Verification(folder, options.keep.absolute(), options.device).run()
        else:
            with tempfile.TemporaryDirectory() as work:
                passed = Verification(folder, Path(work), options.device).run()
    except CldaError as error:
        print(f"FAIL  {error}")
        passed = False
    print("all checks hold" if passed else "NOT all checks hold")
    return 0 if passed else 1


def _package() -> str:
    return str(__package__)


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        same_keys = isinstance(second, Mapping) and list(first) == list(second)
        return same_keys and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def _accuracy(output: str) -> str:
    found = re.findall(r"test_acc1 = +([\d.]+)", output)
    return f"test_acc1 {found[-1]}" if found else "no test_acc1"


if __name__ == "__main__":
    sys.exit(main())
