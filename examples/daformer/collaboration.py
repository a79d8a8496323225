"""Teacher and learner beside the host's decorator: all that CLDA does in an iteration, in a checkpoint, in a resume."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from clda_core import CollaborativeLearner
from clda_core.checkpoint import atomically, pack, read, unpack
from clda_core.errors import problem

from .options import Options
from .random_state import RandomStream
from .segmentor import Logits, keeping_batch_statistics

STATE_VERSION = 1
SUFFIX = ".clda.pth"
_VIEW = "segmentor."
"""What the learner's view of the teacher puts before its names, which our files do not have."""


View = Union[Tensor, Callable[[], Tensor], None]
"""A second view of a batch, or what makes it when a round wants it."""


class Distilled(NamedTuple):
    """A batch on which the teacher is distilled.

    Attributes:
        images: Shape ``(N, 3, H, W)``.
        view: The same images on another view, position for position, for rounds; ``None`` if there is none.
        mask: What counts, ``(N, H, W)``, or ``None`` for everything.
    """

    images: Tensor
    view: View = None
    mask: Optional[Tensor] = None


class Collaboration:
    """Holds the teacher where the host does not look: it is no module, so nothing of it reaches the host's optimizer,
    ``state_dict``, ``train()`` or distributed wrapper.

    Args:
        teacher: Frozen, in eval mode.
        options: The config's ``clda``.
    """

    def __init__(self, teacher: nn.Module, options: Options) -> None:
        self.teacher = teacher
        self.options = options
        self.random = RandomStream()
        # Whether the host's checkpoints are accompanied by ours; None until that is known.
        self.saved: Optional[bool] = None
        self._learner: Optional[CollaborativeLearner] = None
        self._loss: Optional[Tensor] = None

    def learner(self, student: nn.Module) -> CollaborativeLearner:
        """Return the learner; built, and the teacher moved, when the student is first at hand on its device."""
        if self._learner is None:
            self.teacher.to(_device(student))
            with self.random.active(_device(student)):
                self._learner = self.options.make_learner(Logits(self.teacher), Logits(student))
        return self._learner

    def steps(self, student: nn.Module) -> int:
        """Return how many optimizer steps the learner has counted, those before a resume included."""
        return self.learner(student).report().steps

    def distil(
        self, student: nn.Module, batches: Sequence[Distilled], source_loss: Optional[Callable[[nn.Module], Tensor]]
    ) -> None:
        """Add the gradient of the weighted KD loss to that of the host's losses, one batch of images after the other.

        The forward passes draw from our own random stream and leave BatchNorm's running statistics to the host.

        Args:
            student: The host's segmentor, in training mode.
            batches: What the teacher is distilled on.
            source_loss: The host's supervised loss on this iteration's source images, as a function of the network.
        """
        learner = self.learner(student)
        losses = []
        with self.random.active(_device(student)):
            for images, view, mask in batches:
                with keeping_batch_statistics(student):
                    output = learner.student(images)
                loss = learner.distill(output, images, mask=mask, view=view, source_loss=source_loss)
                (self.options.weight * loss / len(batches)).backward()
                losses.append(loss.detach())
        self._loss = torch.stack(losses).mean()

    def log(self) -> Dict[str, float]:
        """Return what goes into the host's log, with one synchronisation, as each of the host's own losses costs."""
        if self._learner is None or self._loss is None:
            return {}
        return {"clda.loss_kd": float(self._loss), "clda.rounds": float(self._learner.report().made)}

    def stepping(self, optimizer: Any, student: nn.Module) -> SteppingOptimizer:
        """Return the host's optimizer with a ``step()`` that goes through the learner."""
        return SteppingOptimizer(optimizer, self, student)

    # ------------------------------------------------------------------------------------------- beside checkpoints

    def save(self, path: str, student: nn.Module, local_iter: int) -> None:
        """Write the teacher and our state, whole or not at all."""
        beside = {"version": STATE_VERSION, "student": fingerprint(student), "local_iter": local_iter}
        state = pack(self.learner(student), random=self.random, **beside)
        state["teacher"] = {name[len(_VIEW) :]: value for name, value in state["teacher"].items()}
        with atomically(path) as unfinished:
            torch.save(state, unfinished)

    def resume(self, student: nn.Module, folder: str) -> Optional[Dict[str, Any]]:
        """Restore the state that was saved with the student's present weights.

        Args:
            student: The segmentor, as the host has just loaded it.
            folder: Where to look for it, unless ``clda.resume_from`` names the file.

        Returns:
            The state, or ``None`` with a warning if there is none.

        Raises:
            CldaError: If the named file is missing or belongs to other weights, a file is damaged, or the state is of
                another configuration; teacher, learner and random stream are then as before.
        """
        wanted = fingerprint(student)
        named = self.options.resume_from
        if named is not None and not os.path.isfile(named):
            raise problem(
                "the state to resume from is not there",
                expected=f"a file *{SUFFIX} as clda.resume_from",
                received=repr(named),
                fix="name the file that lies beside the checkpoint you resume",
            )
        candidates = [named] if named is not None else newest_first(folder)
        for path in candidates:
            state: Dict[str, Any] = read(path)
            if state.get("version") == STATE_VERSION and state["student"] == wanted:
                teacher = {f"{_VIEW}{name}": value for name, value in state["teacher"].items()}
                return unpack(self.learner(student), {**state, "teacher": teacher}, random=self.random)
        if named is not None:
            raise problem(
                "the state to resume from belongs to another checkpoint",
                expected="the state saved with the student's weights that were resumed",
                received=f"{named}, saved with others",
                fix="name the file that lies beside the checkpoint you resume",
            )
        warnings.warn(
            f"clda: resuming, but none of the {len(candidates)} files *{SUFFIX} in {folder} was saved with these "
            "weights: the teacher and the rounds start from the beginning. If the file is elsewhere, set "
            "clda.resume_from to it",
            stacklevel=2,
        )
        return None


class SteppingOptimizer:
    """The host's optimizer, except that ``step()`` is the learner's, which steps it and makes a round if one is due."""

    def __init__(self, optimizer: Any, collaboration: Collaboration, student: nn.Module) -> None:
        self._optimizer, self._collaboration, self._student = optimizer, collaboration, student

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        """Step the host's optimizer."""
        with self._collaboration.random.active(_device(self._student)):
            self._collaboration.learner(self._student).step(self._optimizer)


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's weights and buffers, by value, in their order."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def newest_first(folder: str) -> List[str]:
    """Return our state files in a folder."""
    files = sorted(Path(folder).glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [str(path) for path in files]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
