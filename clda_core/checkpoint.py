"""Saving a training with its learner and teacher to one file, which is written whole or not at all, and going on."""

from __future__ import annotations

import os
import secrets
import stat
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Union

import torch
from torch import nn

from ._host.compat import load_plain
from ._host.plain import plain
from ._host.restoring import fitted, load_all
from .errors import CldaError, problem
from .learner import CollaborativeLearner

__all__ = ["LearnerAndTeacher", "atomically", "load", "pack", "read", "save", "unpack"]


def pack(learner: CollaborativeLearner, **beside: Any) -> Dict[str, Any]:
    """Return the states of learner and teacher, and of whatever else, for a checkpoint that something else writes.

    The teacher changes, so neither is of use without the other: an engine's checkpoint, or one of a host's own, holds
    what this returns, and :func:`unpack` restores it.

    Args:
        learner: The learner.
        beside: As for :func:`save`; the student's state may be among it.

    Returns:
        Tensors and plain Python types by name, ``"learner"`` and ``"teacher"`` among them. Tensors of models and
        optimizers are not copied.

    Raises:
        CldaError: As :func:`save` does.
    """
    if "teacher" in beside:
        raise _taken("teacher")
    state = {name: _state_of(name, value) for name, value in beside.items()}
    return {**state, "learner": learner.state_dict(), "teacher": _state_of("teacher", learner.teacher)}


def unpack(learner: CollaborativeLearner, packed: Any, **beside: Any) -> Dict[str, Any]:
    """Restore what :func:`pack` returned: all of it, or nothing.

    Args:
        learner: The learner; its teacher is restored too.
        packed: What was packed.
        beside: The objects with ``load_state_dict()`` that were packed, under the same names.

    Returns:
        Whatever else was packed and no object was passed for, by name.

    Raises:
        CldaError: As :func:`load` does.

    Example:
        >>> learner = CollaborativeLearner(nn.Linear(4, 3), nn.Linear(4, 3))
        >>> engines_checkpoint = {"epoch": 3, "clda": pack(learner)}
        >>> unpack(learner, engines_checkpoint["clda"])
        {}
    """
    return _unpacked("the checkpoint", learner, packed, beside)


class LearnerAndTeacher:
    """Learner and teacher as one object with a state, for what saves such objects: Accelerate's ``save_state()``.

    Args:
        learner: The learner.
    """

    def __init__(self, learner: CollaborativeLearner) -> None:
        self.learner = learner

    def state_dict(self) -> Dict[str, Any]:
        """Return what :func:`pack` returns."""
        return pack(self.learner)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore both, or neither, as :func:`unpack` does."""
        unpack(self.learner, state)


def save(path: Union[str, Path], learner: CollaborativeLearner, **beside: Any) -> None:
    """Save the learner, its teacher and its student to one file, with whatever else the training needs to go on.

    Args:
        path: The file; one that is there is replaced when the new one is complete.
        learner: The learner.
        beside: What else to save, by name: anything with ``state_dict()`` (optimizer, scaler, learning-rate
            scheduler), or tensors, numbers, strings, ``None``, and lists, tuples and dicts of these (the epoch, random
            states). NumPy's numbers become Python's, its arrays tensors, and paths strings.

    Raises:
        CldaError: If a name in ``beside`` is taken by what is saved anyway, or something is of a type that
            ``weights_only=True`` does not load; the message names the entry, and the file is as before.

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
    if "student" in beside:
        raise _taken("student")
    state = pack(learner, student=learner.student, **beside)
    with atomically(path) as unfinished:
        torch.save(state, unfinished)


def load(path: Union[str, Path], learner: CollaborativeLearner, **beside: Any) -> Dict[str, Any]:
    """Restore what :func:`save` wrote into a learner, teacher and student that were built as they were then.

    Models may be wrapped otherwise than they were (``torch.compile``, ``DataParallel`` and their kin): their tensors
    are found by the names that they have without wrappers.

    Args:
        path: The file. Only tensors and plain Python types are read from it (from torch 1.13 on, which can check that).
        learner: The learner; its teacher and student are restored too.
        beside: The objects with ``load_state_dict()`` that were saved, under the same names.

    Returns:
        Whatever else was saved and no object was passed for, by name; tensors are on the CPU.

    Raises:
        CldaError: If the file is damaged, is no such file or lacks something asked for, a model or the learner is of
            another architecture or configuration, or something of ``beside`` cannot be restored; the models, the
            learner and everything of ``beside`` are then as before.
        OSError: If there is no such file, or it cannot be opened.

    Note:
        Everything is checked before anything is restored, but an object of ``beside`` checks its state only while it
        takes it. If one raises, the objects restored before it are given the state that they had, by their own
        ``state_dict()`` and ``load_state_dict()``; what an object's ``load_state_dict()`` does beyond that cannot be
        taken back.
    """
    return _unpacked(str(path), learner, read(path), {**beside, "student": learner.student})


def _unpacked(what: str, learner: CollaborativeLearner, packed: Any, beside: Mapping[str, Any]) -> Dict[str, Any]:
    parts = {"learner": learner, **beside, "teacher": learner.teacher}
    if not isinstance(packed, Mapping) or not set(parts) <= set(packed):
        raise problem(
            f"{what} does not hold this training",
            expected=f"what clda_core.checkpoint saved, with {', '.join(parts)}",
            received=", ".join(map(str, packed)) if isinstance(packed, Mapping) else type(packed).__name__,
            fix="load what was saved, under the same names",
        )
    states = {
        name: fitted(name, part, packed[name]) if isinstance(part, nn.Module) else packed[name]
        for name, part in parts.items()
    }
    load_all([(name, part, states[name]) for name, part in parts.items()])
    return {name: value for name, value in packed.items() if name not in parts}


def read(path: Union[str, Path]) -> Any:
    """Return what a file of tensors and plain Python types holds, on the CPU.

    Args:
        path: A file that :func:`save`, or ``torch.save`` of what :func:`pack` returned, wrote.

    Raises:
        CldaError: If the file is damaged or of another kind.
        OSError: If there is no such file, or it cannot be opened.
    """
    with open(path, "rb"):  # a file that is missing or closed to us is none that is damaged
        pass
    try:
        damaged = _damaged_part(str(path))
        held = load_plain(str(path)) if damaged is None else None
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise _unreadable(path, f"{type(error).__name__}: {first_line}") from error
    if damaged is not None:
        raise _unreadable(path, f"{damaged} is not as it was written")
    return held


@contextmanager
def atomically(path: Union[str, Path]) -> Iterator[str]:
    """Yield the path of a temporary file to write, which then takes the place of ``path``.

    Whoever reads ``path`` finds the old file or the new one, whole, also if this process is killed or the machine stops
    meanwhile, and if several threads or processes write it: the last one stays. After a kill the temporary file, whose
    name ends in ``.unfinished``, is left over. The folder is made if need be. A symbolic link stays one, and the file
    that it names is replaced. The new file has the permissions of the old one, or those that the umask gives.

    Args:
        path: The file to replace.

    Raises:
        CldaError: If there is something at ``path`` that is no file.
    """
    target = Path(os.path.realpath(str(path)))
    if target.exists() and not target.is_file():
        raise problem(
            f"{path} cannot be replaced by a file",
            expected="the path of a file",
            received="a folder" if target.is_dir() else "a device or the like",
            fix="pass a name in a folder",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Unique on every machine that shares the folder, and short where the name is as long as the file system allows.
    unfinished = target.with_name(f".{target.name[:24]}.{secrets.token_hex(8)}.unfinished")
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    os.close(os.open(str(unfinished), flags, 0o666 if mode is None else mode | stat.S_IRUSR | stat.S_IWUSR))
    try:
        yield str(unfinished)
        with open(unfinished, "rb+") as file:  # else the new name may reach the disk before what it stands for
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(str(unfinished), mode)
        os.replace(unfinished, target)
    finally:
        if unfinished.exists():
            unfinished.unlink()


def _state_of(name: str, value: Any) -> Any:
    stateful = hasattr(value, "state_dict") and not isinstance(value, type)
    return plain(value.state_dict() if stateful else value, name)


def _taken(name: str) -> CldaError:
    return problem(
        f"{name} is saved anyway",
        expected="other names than learner, teacher and student",
        received=f"{name}=",
        fix="leave it out, or give it another name",
    )


def _unreadable(path: Union[str, Path], why: str) -> CldaError:
    return problem(
        f"{path} cannot be read",
        expected="a whole file of tensors and plain Python types, as clda_core.checkpoint.save() writes it",
        received=f"one that is damaged or of another kind ({why})",
        fix="go on from an earlier checkpoint",
    )


def _damaged_part(path: str) -> Optional[str]:
    """Return a part of the file that has another sum than it was written with, which torch does not look at."""
    options = getattr(torch.serialization, "get_crc32_options", None)
    if (options is not None and not options()) or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()
