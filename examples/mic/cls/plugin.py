"""Where CLDA joins the host: its SAM, its host EMA, its student's forward pass and its checkpoints.

One iteration of the host, and what happens at each point:

    teacher(x_t)                    the host EMA is called: the iteration's target images
    model(cat(x_s, x_t))
    model(masked x_t)  .backward()  the masked images are the second view of them
    optimizer.first_step()          SAM climbs, with the host's losses alone
    model(cat(x_s, x_t))            the KD loss of the target half; its gradient is added to that of these logits
    .backward()                     ... in the host's own backward pass
    optimizer.second_step()         learner.observe(), the host's step, learner.after_step()
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional
from unittest import mock

import torch
from torch import Tensor, nn

from clda_core import CollaborativeLearner
from clda_core.checkpoint import atomically, pack, read, unpack
from clda_core.errors import problem

from .host import Modules
from .teacher import keeping_random_state, load_checkpoint

STATE_FORMAT = 1


def first_output(output: Any) -> Tensor:
    """Read the logits of the host's classifier: it returns features too in train mode, logits alone in eval mode."""
    return output[0] if isinstance(output, tuple) else output


class Plugin:
    """Joins a learner to one training of the host.

    Args:
        make_teacher: Builds the frozen teacher, given the student.
        make_learner: Builds the learner, given teacher and student.
        weight: Factor of the KD loss, >= 0; 0 leaves the student to the host.
        resume: A file of ours, ``latest.clda.pt``, to go on from; the host's ``latest.pth`` beside it gives the
            student's weights.
        settings: Plain data for the report.
    """

    def __init__(
        self,
        make_teacher: Callable[[nn.Module], nn.Module],
        make_learner: Callable[[nn.Module, nn.Module], CollaborativeLearner],
        *,
        weight: float = 1.0,
        resume: Optional[Path] = None,
        settings: Optional[Dict[str, Any]] = None,
    ) -> None:
        self.weight = weight
        self.settings = dict(settings or {})
        self.learner: Optional[CollaborativeLearner] = None
        self.optimizer: Any = None
        self._make_teacher, self._make_learner, self._resume = make_teacher, make_learner, resume
        self._hook: Any = None
        # Of the iteration in the making: its target images, their masked view, and whether the student's next output
        # is to be distilled.
        self._images: Optional[Tensor] = None
        self._view: Optional[Tensor] = None
        self._awaiting = False
        # KD losses since the last save, and their mean by save (the host saves once an epoch).
        self._losses: List[Tensor] = []
        self._kd_losses: List[float] = []

    @contextlib.contextmanager
    def plugged_into(self, modules: Modules) -> Iterator[None]:
        """Wrap the methods below while the host's script runs.

        The methods and not the classes: the host's ``super(SAM, self)`` looks the class up by its name.
        """
        sam, host_ema = modules.sam.SAM, modules.teacher.EMATeacher
        with contextlib.ExitStack() as stack:
            stack.callback(self._unplug)
            for owner, name, around in (
                (host_ema, "__init__", self._around_ema_init),
                (host_ema, "forward", self._around_ema_forward),
                (sam, "first_step", self._around_first_step),
                (sam, "second_step", self._around_second_step),
                (torch, "save", self._around_save),
                (shutil, "copy", self._around_copy),
            ):
                original = getattr(owner, name)
                stack.enter_context(mock.patch.object(owner, name, _wrapped(around, original)))
            yield

    # ------------------------------------------------------------------------------------------ points of the host

    def _around_ema_init(self, original: Any, ema: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._before_ema(model)
        original(ema, model, *args, **kwargs)
        self._attach(model)

    def _around_ema_forward(self, original: Any, ema: Any, target_img: Tensor) -> Any:
        self._begin(target_img)
        return original(ema, target_img)

    def _around_first_step(self, original: Any, optimizer: Any, zero_grad: bool = False) -> None:
        original(optimizer, zero_grad=zero_grad)
        self._awaiting = True

    def _around_second_step(self, original: Any, optimizer: Any, zero_grad: bool = False) -> None:
        self._before_step(optimizer)
        original(optimizer, zero_grad=zero_grad)
        self._after_step()

    def _around_save(self, original: Any, state: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        original(state, file, *args, **kwargs)
        if self.learner is not None and isinstance(file, (str, os.PathLike)) and str(file).endswith(".pth"):
            self._save(Path(file), original)

    def _around_copy(self, original: Any, source: Any, target: Any, **kwargs: Any) -> Any:
        result = original(source, target, **kwargs)
        ours = beside(Path(source))
        if str(source).endswith(".pth") and ours.is_file():
            with atomically(beside(Path(target))) as unfinished:
                original(str(ours), unfinished)
        return result

    def _before_ema(self, student: nn.Module) -> None:
        # Before the host EMA copies the student, for the copy starts from the same weights.
        if self._resume is not None:
            student.load_state_dict(load_checkpoint(student_beside(self._resume)))

    def _attach(self, student: nn.Module) -> None:
        with keeping_random_state(next(student.parameters()).device):
            teacher = self._make_teacher(student)
            learner = self._make_learner(teacher, student)
        if not isinstance(learner, CollaborativeLearner):
            raise problem(
                "--clda-learner returned something else",
                expected="a CollaborativeLearner",
                received=type(learner).__name__,
                fix="return CollaborativeLearner(teacher, student, ...) from the function",
            )
        if self._resume is not None:
            self._restore(learner, read(self._resume))
        self.learner = learner
        # After the copy too: a hook would be copied along.
        self._hook = student.register_forward_hook(self._on_forward)

    def _begin(self, images: Tensor) -> None:
        if self._images is not None:
            raise _unlike("second_step() after the host EMA was called", "another call of the host EMA")
        self._images, self._view, self._awaiting = images, None, False

    def _on_forward(self, student: nn.Module, inputs: Any, output: Any) -> None:
        if self._images is None or not student.training:
            return
        if self._awaiting:
            self._awaiting = False
            self._distill(output, self._images, self._view)
        elif inputs[0].shape == self._images.shape:  # not source and target together
            self._view = inputs[0]

    def _distill(self, output: Any, images: Tensor, view: Optional[Tensor]) -> None:
        if not isinstance(output, tuple) or len(output[0]) != 2 * len(images):
            received = [tuple(part.shape) for part in output] if isinstance(output, tuple) else type(output).__name__
            raise _unlike(f"(logits, features) of 2 x {len(images)} images, source then target", str(received))
        # Leaves of our own: the KD loss is differentiated here, and what it gives for the outputs is added when the
        # host's backward pass gets there. No second pass of the student, and no graph kept alive.
        target = tuple(part.detach()[len(images) :].requires_grad_() for part in output)
        learner = self._learner()
        loss = learner.distill(target, images, view=view)
        self._losses.append(loss.detach())
        if self.weight == 0:
            return
        (self.weight * loss).backward()
        for part, leaf in zip(output, target):
            if leaf.grad is not None:
                part.register_hook(_adding(leaf.grad, len(images)))

    def _before_step(self, optimizer: Any) -> None:
        if self._images is None or self._awaiting:
            raise _unlike(
                "the host EMA, first_step(), a forward pass of the student, second_step()", "second_step() without them"
            )
        self.optimizer = optimizer
        self._learner().observe()

    def _after_step(self) -> None:
        self._images = self._view = None
        self._learner().after_step(optimizer=self.optimizer)

    def _learner(self) -> CollaborativeLearner:
        if self.learner is None:
            raise _unlike("the host EMA built before the training", "a training without it")
        return self.learner

    def _unplug(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    # ------------------------------------------------------------------------------------------------ files

    def _save(self, checkpoint: Path, save: Callable[[Any, str], None]) -> None:
        learner = self._learner()
        if self._losses:
            self._kd_losses.append(float(torch.stack(self._losses).mean()))
            self._losses = []
        state = pack(learner, format=STATE_FORMAT, kd_losses=self._kd_losses)
        with atomically(beside(checkpoint)) as unfinished:
            save(state, unfinished)
        report = {
            "settings": self.settings,
            "kd_losses": self._kd_losses,
            "metrics": learner.metrics(),
            "report": learner.report().to_dict(),
        }
        text = json.dumps(report, indent=1)
        with atomically(checkpoint.parent.parent / "clda.json") as unfinished:
            Path(unfinished).write_text(text, encoding="utf-8")

    def _restore(self, learner: CollaborativeLearner, state: Any) -> None:
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise problem(
                "the file to resume from is not ours",
                expected=f"latest.clda.pt, format {STATE_FORMAT}",
                received=f"{self._resume}",
                fix="pass --clda-resume LOG/checkpoints/latest.clda.pt",
            )
        self._kd_losses = [float(loss) for loss in unpack(learner, state)["kd_losses"]]


def beside(checkpoint: Path) -> Path:
    """Return our file beside a checkpoint of the host."""
    return checkpoint.with_name(f"{checkpoint.stem}.clda.pt")


def student_beside(ours: Path) -> Path:
    """Return the host's checkpoint beside our file."""
    return ours.with_name(ours.name.replace(".clda.pt", ".pth"))


def _wrapped(around: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    return method


def _adding(extra: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        total = gradient.clone()
        total[count:] += extra
        return total

    return hook


def _unlike(expected: str, received: str) -> Exception:
    return problem(
        "the host's iteration is not the known one",
        expected=expected,
        received=received,
        fix="run the unmodified script of the known version (see host.py), or adapt plugin.py and run verify",
    )
