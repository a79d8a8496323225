"""What needs a GPU, in one command: the CUDA tests, the cost there, and one seed of street-large.

Each part takes less than ten minutes on an H100. The results are JSON lines in ``runs/gpu/``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional
from xml.etree import ElementTree

import torch

from benchmarks.evidence.runs import versions

RUNS = Path("runs/gpu")
NO_GPU = 2

PARTS: Dict[str, List[str]] = {
    "tests": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda", f"--junitxml={RUNS / 'tests.xml'}"],
    "cost": ["-m", "benchmarks.cost", "--device", "cuda", "--repeats", "5", "--record", str(RUNS / "cost.jsonl")],
    "street-large": [
        *("-m", "benchmarks.evidence", "street-large", "--seeds", "100", "--variants", "frozen-dist,clda"),
        *("--jobs", "1", "--records", str(RUNS)),
    ],
}


def main(arguments: Optional[List[str]] = None) -> int:
    """Run what is asked for; return 0, 1 if a part fails, and 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"with commas between, of {', '.join(PARTS)}")
    wanted = parser.parse_args(arguments).parts.split(",")
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no part; expected some of {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("gpu: torch finds no GPU, so nothing was run", file=sys.stderr)
        return NO_GPU
    RUNS.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in wanted:
        began = time.time()
        status = subprocess.run([sys.executable, *PARTS[name]], check=False).returncode
        record = {
            "part": name,
            "status": status,
            "seconds": round(time.time() - began),
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
            **(counted(RUNS / "tests.xml") if name == "tests" else {}),
        }
        with open(RUNS / "summary.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        failed += [name] if status else []
        print(f"gpu: {name}: {'failed' if status else 'ok'}, {record['seconds']} s", file=sys.stderr)
    return 1 if failed else 0


def counted(report: Path) -> Dict[str, int]:
    """Return how many tests passed, failed and were skipped, from pytest's XML; nothing if it wrote none."""
    if not report.exists():
        return {}
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for key in total:
            total[key] += int(suite.get(key, 0))
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


if __name__ == "__main__":
    sys.exit(main())
