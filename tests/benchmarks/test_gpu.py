"""The command for a GPU: what it says without one, and how it counts and reports its parts."""

import json
import subprocess
from pathlib import Path
from typing import Any, List

import pytest
import torch

pytest.importorskip("transformers", reason="the benchmarks need transformers, which is no dependency of the package")

from benchmarks import gpu


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == gpu.NO_GPU
    assert "torch finds no GPU" in capsys.readouterr().err


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "speed"])
    assert "'speed' is no part; expected some of tests, cost, street-large" in capsys.readouterr().err


def test_a_failed_part_is_reported_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made: List[str] = []

    def run(command: List[str], **_: Any) -> subprocess.CompletedProcess:
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, stdout="abc1234\n")
        made.append(command[2])
        if command[2] == "pytest":
            xml = '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>'
            (tmp_path / "tests.xml").write_text(xml)
        return subprocess.CompletedProcess(command, int(command[2] == "pytest"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "RUNS", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main(["--parts", "tests,cost"]) == 1
    assert made == ["pytest", "benchmarks.cost"]
    tests, cost = (json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines())
    assert (tests["passed"], tests["failed"], tests["skipped"], tests["status"]) == (5, 2, 2, 1)
    assert (cost["status"], cost["device"]) == (0, "a GPU")
    assert "gpu: tests: failed" in capsys.readouterr().err
