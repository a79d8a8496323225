"""What both ranks of `test_huggingface_segmentation.py` do: one training, and the same interrupted and resumed."""

import os
import sys
from pathlib import Path
from typing import Any, List

import pytest
import torch

pytest.importorskip("accelerate")  # the collection of doctests imports this module too
pytest.importorskip("torchmetrics")
pytest.importorskip("transformers")

from accelerate.state import AcceleratorState, GradientState

from examples.huggingface import segmentation


def trained(given: List[str]) -> Any:
    """Return the states of student and teacher."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    args = segmentation.arguments(given)
    models = segmentation.train(args, segmentation.start(args.output, args.accumulate))
    return [None if model is None else model.state_dict() for model in models]


def interrupted(given: List[str], at: int) -> None:
    """Train, and stop before step ``at`` is whole."""
    share_buffers, calls = segmentation.share_buffers, []

    def raising(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        share_buffers(*arguments)

    segmentation.share_buffers = raising
    try:
        trained(given)
        raise AssertionError("it was not interrupted")
    except KeyboardInterrupt:
        pass
    finally:
        segmentation.share_buffers = share_buffers


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, given = Path(sys.argv[1]), sys.argv[2:]
    whole = trained([*given, f"--output={folder / 'whole'}"])
    interrupted([*given, f"--output={folder / 'again'}"], at=4)
    again = trained([*given, f"--output={folder / 'again'}", "--resume"])
    torch.save({"whole": whole, "again": again}, folder / f"rank{os.environ['RANK']}.pt")
