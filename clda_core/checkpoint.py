"""Saving a training with its learner and teacher to one file, which is written whole or not at all, and going on."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Union

import torch
from torch import nn

from ._compat import load_plain
from .errors import problem
from .learner import CollaborativeLearner

__all__ = ["atomically", "load", "save"]

_OURS = ("learner", "teacher", "student")


def save(path: Union[str, Path], learner: CollaborativeLearner, **beside: Any) -> None:
    """Save the learner, its teacher and its student to one file, with whatever else the training needs to go on.

    Args:
        path: The file; one that is there is replaced when the new one is complete.
        learner: The learner.
        beside: What else to save, by name: anything with ``state_dict()`` (optimizer, scaler, learning-rate
            scheduler), or tensors and plain Python data (the epoch, random states).

    Raises:
        CldaError: If a name in ``beside`` is taken by what is saved anyway.

    Note:
        On several ranks call it on one of them only.

    Example:
        >>> import tempfile
        >>> learner = CollaborativeLearner(nn.Linear(4, 3), nn.Linear(4, 3))
        >>> optimizer = torch.optim.SGD(learner.student.parameters(), lr=0.1)
        >>> path = os.path.join(tempfile.mkdtemp(), "last.pt")
        >>> save(path, learner, optimizer=optimizer, epoch=3)
        >>> load(path, learner, optimizer=optimizer)
        {'epoch': 3}
    """
    taken = sorted(set(beside) & set(_OURS))
    if taken:
        raise problem(
            f"{taken[0]} is saved anyway",
            expected=f"other names than {', '.join(_OURS)}",
            received=f"{taken[0]}=",
            fix="leave it out, or give it another name",
        )
    state = {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in beside.items()}
    state["learner"] = learner.state_dict()
    state["teacher"] = learner.teacher.state_dict()
    state["student"] = learner.student.state_dict()
    with atomically(path) as unfinished:
        torch.save(state, unfinished)


def load(path: Union[str, Path], learner: CollaborativeLearner, **beside: Any) -> Dict[str, Any]:
    """Restore what :func:`save` wrote into a learner, teacher and student that were built as they were then.

    Args:
        path: The file. Only tensors and plain Python types are read from it (from torch 1.13 on, which can check that).
        learner: The learner, whose models are restored too.
        beside: The objects with ``load_state_dict()`` that were saved beside it, by the same names.

    Returns:
        What else was saved beside it, on the CPU.

    Raises:
        CldaError: If the file was not written by :func:`save`, lacks something of ``beside``, or is of another
            architecture or configuration, or something of ``beside`` cannot be restored; the models and the learner are
            then as before.
    """
    state = load_plain(str(path))
    wanted = [*_OURS, *beside]
    if not isinstance(state, dict) or not set(wanted) <= set(state):
        raise problem(
            f"{path} does not hold this training",
            expected=f"a file that clda_core.checkpoint.save() wrote, with {', '.join(wanted)}",
            received=", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__,
            fix="load what was saved, under the same names",
        )
    for role, model in (("teacher", learner.teacher), ("student", learner.student)):
        _check_fits(role, model, state[role])
    for name, value in beside.items():
        _restore(name, value, state.pop(name))
    learner.load_state_dict(state.pop("learner"))
    learner.teacher.load_state_dict(state.pop("teacher"))
    learner.student.load_state_dict(state.pop("student"))
    return state


@contextmanager
def atomically(path: Union[str, Path]) -> Iterator[str]:
    """Yield the path of a temporary file to write, which then takes the place of ``path``.

    Whoever reads ``path`` finds the old file or the new one, whole, also if this process is killed or the machine stops
    meanwhile. After a kill the temporary file, ``.NAME.PID.unfinished``, is left over. The folder is made if need be.

    Args:
        path: The file to replace.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield str(unfinished)
        with open(unfinished, "rb+") as file:  # else the new name may reach the disk before what it stands for
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        if unfinished.exists():
            unfinished.unlink()


def _restore(name: str, value: Any, state: Any) -> None:
    try:
        value.load_state_dict(state)
    except Exception as error:
        raise problem(
            f"{name} cannot be restored",
            expected=f"an object with load_state_dict() that takes what was saved as {name}",
            received=f"{type(value).__name__}, which raised {type(error).__name__}: {error}",
            fix=f"build {name} as it was built when it was saved; plain data need not be passed, load() returns them",
        ) from error


def _check_fits(role: str, model: nn.Module, state: Mapping[str, Any]) -> None:
    def shapes(tensors: Mapping[str, Any]) -> Dict[str, Any]:
        return {name: tuple(getattr(value, "shape", ())) for name, value in tensors.items()}

    ours, theirs = shapes(model.state_dict()), shapes(state)
    if ours != theirs:
        name = next(name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name))
        raise problem(
            f"the saved {role} is of another architecture",
            expected=f"{name} of shape {ours[name]}" if name in ours else f"no {name}",
            received=f"shape {theirs[name]}" if name in theirs else "none",
            fix=f"build the {role} as it was built when it was saved",
        )
