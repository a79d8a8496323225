"""The updated teacher out of a run's checkpoint, as a checkpoint that the host's ``validate`` loads.

    python -m clda_vfm_uda.export RUN.ckpt TEACHER.ckpt

Run it from the host's folder, and pass the file as ``--model.network.ckpt_path`` with the teacher's config.
"""

from __future__ import annotations

import argparse
import sys
from typing import List, Optional

import torch

from clda_core import CldaError
from clda_core.errors import problem

from .teacher import read_checkpoint

KEY = "Collaboration"
"""Under which Lightning keeps the state of our callback."""


def export(run: str, checkpoint: str) -> int:
    """Write the teacher of a run's checkpoint under the names that the host gives the network it trains.

    Returns:
        The number of tensors.

    Raises:
        CldaError: If the file is missing or has no teacher.
    """
    saved = read_checkpoint(run)
    states = saved.get("callbacks", {}) if isinstance(saved, dict) else {}
    if KEY not in states:
        raise problem(
            "the checkpoint holds no teacher",
            expected="a checkpoint that a run with clda.enabled has written",
            received=f"{run}, with states of {', '.join(map(str, states)) or 'no callbacks'}",
            fix="name one whose config has model.init_args.clda",
        )
    teacher = states[KEY]["teacher"]
    torch.save({"state_dict": {f"network.{name}": value for name, value in teacher.items()}}, checkpoint)
    return len(teacher)


def main(arguments: Optional[List[str]] = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", help="a checkpoint of a run with CLDA")
    parser.add_argument("checkpoint", help="the file to write")
    options = parser.parse_args(arguments)
    try:
        count = export(options.run, options.checkpoint)
    except CldaError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(f"written: {options.checkpoint}, {count} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
