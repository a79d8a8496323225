"""The digits job, of small networks, started by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from examples.classification import digits

ROOT = Path(digits.__file__).resolve().parents[2]

if tuple(map(int, torch.__version__.split(".")[:2])) < (1, 10):
    pytest.skip("torchrun came with torch 1.10", allow_module_level=True)


def test_two_ranks_show_and_write_one_result(tmp_path: Path) -> None:
    # The option with hyphens came with torch 2.0, which still takes this one.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = [str(ROOT / "tests" / "distributed" / "digits_job.py"), "--steps=20", f"--output={tmp_path}"]
    done = subprocess.run(
        [*torchrun, *job],
        cwd=str(tmp_path),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=600,
        check=True,
        text=True,
    )
    assert done.stdout.count("Accuracy on the 1,797 handwritten digits") == 1
    assert done.stdout.count("written: ") == 1
    assert done.stderr.count("UDA alone: 100%") == 1
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert set(results["students"]) == {digits.UDA_ALONE, digits.FROZEN_KD, digits.CLDA, digits.IN_TURNS}
    rounds = results["students"][digits.CLDA]["report"]["rounds"]
    assert [made["step"] for made in rounds] == [7, 14], "a short run has rounds too"
    assert results["config"]["threads"] == max(1, min(2, (os.cpu_count() or 1) // 2)), "the ranks share the cores"
    assert (tmp_path / "checkpoints" / "teacher.pt").exists()
