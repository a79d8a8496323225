"""The updated teacher out of our state file, as a checkpoint of the host.

    python -m clda_daformer.export work_dirs/run/iter_40000.clda.pth work_dirs/run/teacher.pth

The file then loads in the host's ``tools/test.py`` with the config that the teacher was trained with.
"""

from __future__ import annotations

import argparse
import sys
from typing import List, Optional

import torch

from clda_core import CldaError
from clda_core.checkpoint import read
from clda_core.errors import problem

from .collaboration import SUFFIX


def export(state_file: str, checkpoint: str) -> int:
    """Write the teacher of a state file under the names that the host gives the network it trains.

    Returns:
        The number of tensors.

    Raises:
        CldaError: If the file is none of ours.
    """
    try:
        teacher = read(state_file)["teacher"]
    except (CldaError, OSError, KeyError, TypeError) as error:
        raise problem(
            "the state file cannot be read",
            expected=f"a file *{SUFFIX} that CLDACheckpointHook has written",
            received=f"{state_file}: {type(error).__name__}: {error}",
            fix="name the one beside the checkpoint whose teacher you want",
        ) from error
    torch.save({"meta": {}, "state_dict": {f"model.{name}": value for name, value in teacher.items()}}, checkpoint)
    return len(teacher)


def main(arguments: Optional[List[str]] = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("state", help=f"a file *{SUFFIX}")
    parser.add_argument("checkpoint", help="the file to write")
    options = parser.parse_args(arguments)
    try:
        count = export(options.state, options.checkpoint)
    except CldaError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(f"written: {options.checkpoint}, {count} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
