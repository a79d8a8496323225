"""Checkpoints of a stage of training: written whole or not at all, and refused if they belong to another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

import torch

from clda_core import CldaError
from clda_core.checkpoint import atomically, read


class CheckpointError(Exception):
    """A checkpoint that does not fit the run; the message says how to go on."""


class Checkpoint:
    """One file that holds where a stage stands.

    Args:
        path: The file.
        run: Plain data that names the run; :meth:`load` refuses a file in which it differs.
    """

    def __init__(self, path: Path, run: Dict[str, Any]) -> None:
        self.path = path
        self.run = run

    def save(self, state: Dict[str, Any]) -> None:
        """Replace the file by ``state``."""
        with atomically(self.path) as unfinished:
            torch.save({"run": self.run, "state": state}, unfinished)

    def load(self) -> Optional[Dict[str, Any]]:
        """Return the state last saved, on the CPU, or ``None`` if there is none.

        Raises:
            CheckpointError: If the file cannot be read or belongs to another run.
        """
        if not self.path.exists():
            return None
        try:
            stored = read(self.path)
            run, state = stored["run"], stored["state"]
        except (CldaError, OSError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}); start anew without --resume") from error
        differing = sorted(key for key in {*run, *self.run} if run.get(key) != self.run.get(key))
        if differing:
            was = ", ".join(f"{key}={run.get(key)!r}" for key in differing)
            now = ", ".join(f"{key}={self.run.get(key)!r}" for key in differing)
            raise CheckpointError(
                f"{self.path} belongs to another run ({was}; now {now}); use that run's settings, another --output, "
                "or start anew without --resume"
            )
        return state
