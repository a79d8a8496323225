"""The runs that checks compare: each trains once, in the host's own process, when a check first asks for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import torch

from . import configs
from .configs import ROUND_EVERY, STUDENT, TEACHER
from .data import write_data
from .host import MIC_SEG, Host

REPOSITORY = Path(__file__).resolve().parents[3]
OURS = REPOSITORY / "examples" / "daformer"

SHORT = 6
TEACHER_ITERATIONS = 20
FIRST_SAVED_AFTER = 2

# The host's losses pull the student away from a teacher trained for so short a time; this much KD holds it.
KD_WEIGHT = 10.0


class RunFailed(Exception):
    """A process of the host ended with an error."""


@dataclass(frozen=True)
class Run:
    """What a finished training left behind.

    Attributes:
        folder: The host's work directory.
        output: Everything it printed.
        report: What ``host_process.py`` reported.
    """

    folder: Path
    output: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def saved(self) -> List[int]:
        """Iterations of the checkpoints, in order."""
        return sorted(
            int(path.stem.split("_")[1]) for path in self.folder.glob("iter_*.pth") if path.stem.count(".") == 0
        )

    def checkpoint(self, iteration: Optional[int] = None) -> Dict[str, Any]:
        """Load the host's checkpoint of an iteration, by default the last."""
        return _load(self.folder / f"iter_{iteration or self.saved[-1]}.pth", trusted=True)

    def state(self, iteration: Optional[int] = None) -> Dict[str, Any]:
        """Load what the adapter saved beside it: tensors and plain Python only, or it is refused."""
        return _load(self.folder / f"iter_{iteration or self.saved[-1]}.clda.pth", trusted=False)

    @property
    def log(self) -> List[Dict[str, Any]]:
        """The host's log, one entry per iteration; where it evaluated, an entry holds these figures too or instead."""
        files = sorted(self.folder.glob("*.log.json"))
        entries = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        return [entry for entry in entries if "mode" in entry]

    @property
    def losses(self) -> List[Dict[str, float]]:
        """The host's own losses, one entry per iteration."""
        own = [
            {name: value for name, value in entry.items() if "loss" in name and not name.startswith("clda")}
            for entry in self.log
        ]
        return [entry for entry in own if entry]


@dataclass(frozen=True)
class Plan:
    """How a run is trained.

    Attributes:
        iterations: How many.
        clda: The config's ``clda`` beside the teacher; ``None`` is the host alone.
        backbone: Of the model.
        save_every: Iterations between checkpoints; the last is always saved.
    """

    iterations: int = SHORT
    clda: Optional[Mapping[str, Any]] = None
    backbone: str = STUDENT
    save_every: int = 10**6


@dataclass
class Laboratory:
    """Makes data, configs and runs in one folder.

    Attributes:
        host: The repository.
        root: Its folder.
        folder: Where everything is written.
        model: Which of the host's models.
        device: ``"cpu"`` or ``"cuda"``.
        iterations: Of the long run.
        shims: What ``host_process.py`` had to mend in this environment, once something has run.
    """

    host: Host
    root: Path
    folder: Path
    model: str
    device: str = "cpu"
    iterations: int = 30
    shims: List[str] = field(default_factory=list)
    _runs: Dict[str, Any] = field(default_factory=dict)

    @property
    def resumed_at(self) -> int:
        """The iteration at which the long run is resumed: between two rounds, after at least one."""
        return ROUND_EVERY * max(1, self.iterations // (2 * ROUND_EVERY)) + 2

    def run(self, name: str) -> Run:
        """Return a run by its name in :meth:`plans`, training it first if it has not been yet.

        Raises:
            RunFailed: If the host's process ends with an error.
        """
        if name not in self._runs:
            try:
                self._runs[name] = self._train(name)
            except RunFailed as error:
                self._runs[name] = error
        found = self._runs[name]
        if isinstance(found, RunFailed):
            raise found
        return found

    def test(self, checkpoint: Path) -> Run:
        """Evaluate a checkpoint by the host's own test command, where nothing of ours can be imported."""
        config = self._config("host")
        return self._process("test", "tools.test", [str(config), str(checkpoint), "--eval", "mIoU"], alone=True)

    def ask_host(self) -> Dict[str, Any]:
        """Return what ``inside_host.py`` finds, in a folder laid out as a user's."""
        layout = self.folder / "layout"
        if not layout.exists():
            layout.mkdir(parents=True)
            (layout / "configs").symlink_to(self.root / "configs")
            shutil.copytree(
                str(OURS), str(layout / "clda_daformer"), ignore=shutil.ignore_patterns("verify.py", "__pycache__")
            )
        recipes = sorted(str(path) for path in (layout / "clda_daformer").glob(self.host.ours))
        found = self.folder / "found.json"
        if found.exists():
            return json.loads(found.read_text())  # type: ignore[no-any-return]
        arguments = [str(found), str(self._config("teacher")), *recipes]
        self._process("recipes", "tests.hosts.segmentation.inside_host", arguments, folder=layout)
        return json.loads(found.read_text())  # type: ignore[no-any-return]

    def plans(self) -> Dict[str, Plan]:
        """Return what each run is, by the name that checks ask for it."""
        on = {"weight": KD_WEIGHT}
        return {
            "host": Plan(),
            "host again": Plan(),
            "off": Plan(clda={"enabled": False}),
            "without weight": Plan(clda={"weight": 0.0, "learner": f"{configs.__name__}:hasty_learner"}),
            "frozen": Plan(clda={"rounds": False}),
            "on": Plan(self.iterations, clda=on, save_every=self.resumed_at),
            "resumed": Plan(self.resumed_at + ROUND_EVERY, clda=on, save_every=FIRST_SAVED_AFTER),
            "teacher": Plan(TEACHER_ITERATIONS, backbone=TEACHER),
        }

    def _config(self, name: str) -> Path:
        path = self.folder / "configs" / f"{_slug(name)}.py"
        if path.exists():
            return path
        if not (self.folder / "data").exists():
            write_data(self.folder / "data")
        plan = self.plans()[name]
        config = configs.tiny(
            self.folder / "data",
            iterations=plan.iterations,
            recipe=self.root / self.host.models[self.model],
            multi_resolution=self.model == "hrda",
            masking=self.host is MIC_SEG,
            backbone=plan.backbone,
            save_every=plan.save_every,
        )
        if plan.clda is not None:
            # Switched off, no teacher is there, and none must be missed.
            off = plan.clda.get("enabled") is False
            checkpoint = Path("none.pth") if off else self.run("teacher").folder / "latest.pth"
            added = configs.with_clda(Path("none.py") if off else self._config("teacher"), checkpoint, **plan.clda)
            config = configs.merged(config, added)
        return configs.write_config(path, config)

    def _train(self, name: str) -> Run:
        config = self._config(name)
        folder = self.folder / "runs" / _slug(name)
        arguments = [str(config), "--work-dir", str(folder)]
        if name == "resumed":
            folder.mkdir(parents=True)
            for suffix in (".pth", ".clda.pth"):
                saved = f"iter_{self.resumed_at}{suffix}"
                shutil.copy(str(self.run("on").folder / saved), str(folder / saved))
            arguments += ["--resume-from", str(folder / f"iter_{self.resumed_at}.pth")]
        plan = self.plans()[name]
        title = f"{name} ({plan.iterations} iterations)"
        return self._process(title, "tools.train", arguments, alone=plan.clda is None, work=folder)

    def _process(
        self,
        title: str,
        module: str,
        arguments: List[str],
        *,
        alone: bool = False,
        folder: Optional[Path] = None,
        work: Optional[Path] = None,
    ) -> Run:
        """Run a module in the host's process: with the host on the path alone, or with this repository too."""
        process = self.folder / "process"
        process.mkdir(parents=True, exist_ok=True)
        script, report = process / "host_process.py", process / f"{_slug(title)}.json"
        shutil.copy(str(Path(__file__).with_name("host_process.py")), str(script))
        paths = [str(self.root)] if alone else [str(self.root), str(REPOSITORY)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",  # the host's checkout stays as it is
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONWARNINGS": "default",  # the checks read what is warned of, whatever the user's shell says
            **({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}),
        }
        print(f"      running {title} ...", end="", file=sys.stderr, flush=True)
        started = time.time()
        done = subprocess.run(
            [sys.executable, str(script), str(report), module, *arguments],
            cwd=str(folder or self.root),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        print(f" {time.time() - started:.0f} s", file=sys.stderr)
        output = done.stdout.decode(errors="replace")
        (process / f"{_slug(title)}.txt").write_text(output)
        if done.returncode != 0 or not report.exists():
            last = ([line for line in output.splitlines() if line.strip()] or ["no output"])[-1]
            raise RunFailed(
                f"the run {title!r} ended with status {done.returncode}: {last.strip()} (all it said: --keep DIR, then "
                f"DIR/process/{_slug(title)}.txt)"
            )
        found = json.loads(report.read_text())
        self.shims = found["shims"]
        return Run(work or self.folder, output, found)


def _slug(name: str) -> str:
    return name.split(" (")[0].replace(" ", "_")


def _load(path: Path, *, trusted: bool) -> Dict[str, Any]:
    safe = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (1, 13)
    options = {"weights_only": not trusted} if safe else {}
    return torch.load(str(path), map_location="cpu", **options)  # type: ignore[no-any-return]
