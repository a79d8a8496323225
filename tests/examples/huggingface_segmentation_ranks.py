"""The segmentation script in two processes, too slow for the suite: one training, and the same interrupted and resumed.

pytest tests/examples/huggingface_segmentation_ranks.py
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

pytest.importorskip("accelerate")  # the collection of doctests imports this module too
pytest.importorskip("torchmetrics")
pytest.importorskip("transformers")
pytest.importorskip("scipy")

from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from benchmarks.street import folders
from examples.huggingface import segmentation
from tests.helpers import bits

ROOT = Path(__file__).resolve().parents[2]


def segformer(width: int, depth: int, labels: int = 19) -> SegformerForSemanticSegmentation:
    of_stages: Dict[str, Any] = {"hidden_sizes": [width] * 4, "depths": [depth] * 4, "num_attention_heads": [1] * 4}
    config = SegformerConfig(num_labels=labels, decoder_hidden_size=width, sr_ratios=[4, 2, 1, 1], **of_stages)
    return SegformerForSemanticSegmentation(config)


def street_with_networks(folder: Path) -> Path:
    """Write the three data sets, and networks as `save_pretrained` does."""
    folders.write(folder, frames=4, validation=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        segformer(8, 1).save_pretrained(folder / "student")
        segformer(16, 1).save_pretrained(folder / "teacher")
    return folder


def options_for(street: Path) -> List[str]:
    data = [f"--source={street / 'gta'}", f"--target={street / 'cityscapes'}"]
    networks = [f"--teacher={street / 'teacher'}", f"--student={street / 'student'}"]
    size = ["--crop=32", "--batch=2", "--workers=0", "--steps=4", "--save-every=2", "--interval=1"]
    return [*data, *networks, *size, "--warmup=2", "--rate=1e-3", "--head-rate=1"]


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


def test_two_processes_stay_equal_and_resume_bit_for_bit(tmp_path: Path) -> None:
    options = options_for(street_with_networks(tmp_path))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = [__file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *job, *options, "--accumulate=2"], env=environment, timeout=900, check=True)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert bits(first["whole"]) == bits(second["whole"])
    assert bits(first["again"]) == bits(second["again"]) == bits(first["whole"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    # The runs share one group: a second one may wait for ever for what the first left in the store.
    PartialState.destroy_process_group = lambda self, group=None: None
    folder, given = Path(sys.argv[1]), sys.argv[2:]
    whole = trained([*given, f"--output={folder / 'whole'}"])
    interrupted([*given, f"--output={folder / 'again'}"], at=4)
    again = trained([*given, f"--output={folder / 'again'}", "--resume"])
    torch.save({"whole": whole, "again": again}, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
