"""The runs that checks compare: each is the host's own command in a process, when a check first asks for it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

from examples.vfm_uda.teacher import read_checkpoint
from tests.hosts.segmentation.host import Host
from tests.hosts.segmentation.runs import RunFailed

from .data import write_data

REPOSITORY = Path(__file__).resolve().parents[3]
OURS = REPOSITORY / "examples" / "vfm_uda"
STEPS, SAVED = 6, 3
"""Of a run, and after which a checkpoint is written that another run resumes."""

VFM_UDA = Host(
    name="VFM-UDA",
    url="https://github.com/tue-mps/vfm-uda",
    commit="e154d8f",
    models={"vit": "uda_vit_vanilla.yaml"},
    ours="configs/gta2cs_*.yaml",
    has=("main.py", "training/uda_vit/uda_vit_generic.py", "uda_vit_vanilla.yaml"),
)
VFM_UDA_PLUSPLUS = Host(
    name="VFM-UDA++",
    url="https://github.com/tue-mps/vfm-uda-plusplus",
    commit="effbb03",
    models={"vit": "cfgs/vfmudaplusplus_base_gta2city.yaml"},
    ours="configs/plusplus_*.yaml",
    has=("main.py", "training/uda/uda.py", "cfgs/vfmudaplusplus_base_gta2city.yaml"),
)

_TINY = f"""
trainer:
  accelerator: cpu
  devices: 1
  strategy: auto
  precision: 32
  max_steps: {STEPS}
  val_check_interval: 1.0
  limit_val_batches: 0
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        dirpath: DIRPATH
        filename: "{{step}}"
        every_n_train_steps: {SAVED}
        save_top_k: -1
model:
  init_args:
    warmup_iters: 2
data:
  init_args:
    batch_size: 2
    train_num_workers: 1
    val_num_workers: 0
    img_size: 64
    in_img_scale: 0.0625
"""
_TRUSTING = """
from clda_core import CollaborativeLearner, Never, Schedule
from clda_core.lead import FixedTrust
from clda_core.update import MaskedDistillation
from clda_vfm_uda.{module} import {name}


class Trusting({name}):
    def make_learner(self, teacher, student):
        schedule = Schedule(warmup=0, interval=self.clda.interval) if self.clda.rounds else Never()
        update = MaskedDistillation(learning_rate=self.clda.learning_rate)
        return CollaborativeLearner(teacher, student, update=update, schedule=schedule, trust=FixedTrust())
"""
_SEGFORMER = (
    '{"hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1], '
    '"decoder_hidden_size": 16}'
)


@dataclass(frozen=True)
class Run:
    """What a finished run left behind.

    Attributes:
        folder: Of its checkpoints.
        output: Everything it printed.
        found: What each rank reported.
        ours: The modules of ours that it imported.
    """

    folder: Path
    output: str
    found: Sequence[Mapping[str, Any]]
    ours: Sequence[str]

    def checkpoint(self, step: int = STEPS) -> Mapping[str, Any]:
        """Load the host's checkpoint of a step."""
        return read_checkpoint(str(self.folder / f"step={step}.ckpt"))


@dataclass
class Laboratory:
    """Makes data, configs and runs in one folder, laid out like the host's.

    Attributes:
        host: The repository.
        root: Its folder.
        folder: Where everything is written.
        shims: What had to be mended in this environment, once something has run.
        model: What the networks are.
        device: Where they are trained.
    """

    host: Host
    root: Path
    folder: Path
    shims: List[str] = field(default_factory=list)
    model: str = "toy ViTs"
    device: str = "cpu"
    _runs: Dict[str, Any] = field(default_factory=dict)
    _server: Any = None

    def recipes(self) -> List[Path]:
        """Return our configs for this host; the first is the one that is checked in full."""
        found = sorted((self.folder / "clda_vfm_uda").glob(self.host.ours))
        return sorted(found, key=lambda path: not path.stem.endswith("to_vits"))

    def run(self, name: str) -> Run:
        """Return a run by its name in :meth:`_plan`, made first if it has not been yet.

        Raises:
            RunFailed: If the host's process ends with an error.
        """
        if name not in self._runs:
            try:
                self._runs[name] = self._make(name)
            except RunFailed as error:
                self._runs[name] = error
        found = self._runs[name]
        if isinstance(found, RunFailed):
            raise found
        return found  # type: ignore[no-any-return]

    def command(self, title: str, module: str, arguments: List[str]) -> str:
        """Run a module from the layout's folder as a user does; return what it printed."""
        with _told(title):
            done = subprocess.run(
                [sys.executable, "-m", module, *arguments],
                cwd=str(self.folder),
                env={**os.environ, **self._environment(True, {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        output = done.stdout.decode(errors="replace")
        if done.returncode != 0:
            raise RunFailed(f"{title!r} ended with status {done.returncode}: {_last(output)}")
        return output

    def _trusting(self) -> str:
        """Return the class path of the host's class with ours, whose rounds trust the student whatever its lead.

        A toy student does not lead a toy teacher, and rounds would change nothing.
        """
        module, name = ("plugin", "CLDAUDAVITGeneric") if self.host is VFM_UDA else ("plugin_plusplus", "CLDAUDA")
        (self.folder / "trusting.py").write_text(_TRUSTING.format(module=module, name=name))
        return "trusting.Trusting"

    def set_up(self) -> None:
        """Lay out the folder: data, statistics of the source, our plug-in as a user copies it."""
        write_data(self.folder / "data", self.folder / "datasets" / "rcs_stats")
        ignored = shutil.ignore_patterns("verify.py", "__pycache__")
        shutil.copytree(str(OURS), str(self.folder / "clda_vfm_uda"), ignore=ignored)
        (self.folder / ".gitignore").touch()  # the host's command reads it
        shutil.copy(str(Path(__file__).with_name("vfm_process.py")), str(self.folder / "vfm_process.py"))

    def _plan(self, name: str) -> Tuple[Any, List[str]]:
        """Return the recipe of a run, ``None`` for the host alone, and further arguments."""
        clda, trainer = "--model.init_args.clda.", "--trainer."
        on = [f"{clda}interval=2", f"{clda}learning_rate=1e-3"]
        # Attention of VFM-UDA++ in PyTorch takes many minutes in bf16 on a CPU.
        bf16 = [f"{trainer}precision=bf16-mixed"] if self.host is VFM_UDA else []
        first = self.recipes()[0]
        teacher = "--model.init_args.network.init_args.model_name=dinov2_vitl14"
        student = "--model.init_args.network.init_args.model_name=dinov2_vits14"
        plans: Dict[str, Tuple[Any, List[str]]] = {
            "teacher": (None, [teacher, f"{trainer}max_steps={SAVED}"]),
            "host": (None, [student]),
            "host again": (None, [student]),
            "off": (first, [f"{clda}enabled=false", f"{clda}checkpoint=none.ckpt"]),
            "without weight": (first, [*on, f"{clda}weight=0"]),
            "frozen": (first, [f"{clda}rounds=false"]),
            "on": (first, on),
            "resumed": (first, [*on, "--ckpt_path", str(self.folder / "runs" / "on" / f"step={SAVED}.ckpt")]),
            "masked view, bf16": (first, [*on, f"{clda}view=masked", *bf16]),
            "two processes": (
                first,
                [*on, f"{trainer}devices=2", f"{trainer}strategy=ddp_find_unused_parameters_true"],
            ),
            "two, resumed": (
                first,
                [
                    *(*on, f"{trainer}devices=2", f"{trainer}strategy=ddp_find_unused_parameters_true"),
                    *("--ckpt_path", str(self.folder / "runs" / "on" / f"step={SAVED}.ckpt")),
                ],
            ),
        }
        for recipe in self.recipes()[1:]:
            small = [f"--model.init_args.network.init_args.config={_SEGFORMER}"] if "segformer" in recipe.stem else []
            plans[recipe.stem] = (recipe, [*on, *small])
        return plans[name]

    def _make(self, name: str) -> Run:
        slug = name.replace(" ", "_").replace(",", "")
        recipe, arguments = self._plan(name)
        tiny = self.folder / f"{slug}.yaml"
        text = _TINY.replace("DIRPATH", str(self.folder / "runs" / slug))
        if recipe is not None:
            text = text.replace("\nmodel:\n", f"\nmodel:\n  class_path: {self._trusting()}\n")
        tiny.write_text(text)
        configs = [self.root / self.host.models["vit"], *([] if recipe is None else [recipe]), tiny]
        if recipe is not None and not any("clda.checkpoint" in argument for argument in arguments):
            checkpoint = self.run("teacher").folder / f"step={SAVED}.ckpt"
            arguments = [f"--model.init_args.clda.checkpoint={checkpoint}", *arguments]
        command = [argument for config in configs for argument in ("-c", str(config))]
        return self.host_command(name, "fit", [*command, *arguments], ours=recipe is not None)

    def host_command(self, title: str, subcommand: str, arguments: List[str], *, ours: bool) -> Run:
        """Run the host's own ``main.py``.

        Raises:
            RunFailed: If it ends with an error.
        """
        slug = title.replace(" ", "_").replace(",", "")
        report = self.folder / f"{slug}.json"
        if title == "teacher":  # the first run of all is the host's student
            self.run("host")
        settings = {"host": str(self.root), "batches": str(self.folder / "batches.pt"), "report": str(report)}
        job = {
            "arguments": [subcommand, *arguments, "--root", str(self.folder / "data")],
            "environment": self._environment(ours, settings),
            "path": [str(REPOSITORY)] if ours else [],
            "output": str(self.folder / f"{slug}.txt"),
        }
        with _told(title):
            server = self._serving()
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            status = server.stdout.readline().strip()
        output = Path(job["output"]).read_text(errors="replace") if os.path.exists(job["output"]) else ""
        if status != "0" or not report.exists():
            raise RunFailed(f"the run {title!r} ended with status {status or 'unknown'}: {_last(output)}")
        found = json.loads(report.read_text())
        self.shims = found["shims"]
        ranks = [json.loads(path.read_text()) for path in sorted(self.folder.glob(f"{slug}.json.*"))]
        return Run(self.folder / "runs" / slug, output, ranks, found["ours"])

    def close(self) -> None:
        """End the process that runs are forked from."""
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait()

    def _serving(self) -> Any:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(self.folder / "vfm_process.py"), "serve"],
                cwd=str(self.folder),
                env={**os.environ, **self._environment(False, {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                universal_newlines=True,
            )
        return self._server

    def _environment(self, ours: bool, settings: Mapping[str, Any]) -> Dict[str, str]:
        return {
            "PYTHONPATH": os.pathsep.join([str(self.root), *([str(REPOSITORY)] if ours else [])]),
            "PYTHONDONTWRITEBYTECODE": "1",  # the host's checkout stays as it is
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "WANDB_MODE": "disabled",
            "CLDA_VERIFY": json.dumps(settings),
        }


@contextlib.contextmanager
def _told(title: str) -> Iterator[None]:
    print(f"      running {title} ...", end="", file=sys.stderr, flush=True)
    started = time.time()
    yield
    print(f" {time.time() - started:.0f} s", file=sys.stderr)


def _last(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
    return ([line for line in lines if "Fix:" in line] or lines)[-1].strip()
