"""What importing the package costs over importing torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Iterator

from benchmarks.cost.figures import Figure

_SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "import_time.py"


def imports(repeats: int) -> Iterator[Figure]:
    """Measure as ``make import-time`` does, in processor time, and judge the least of the repeats as it does."""
    script = _loaded()
    times = [script.both() for _ in range(repeats)]
    note = f"processor time, of each the least of {repeats} processes: what is above it is the machine"
    yield Figure("imports", "import clda_core", "", min(ours for ours, _ in times), unit="ms", note=note)
    yield Figure(
        "imports", "import clda_core / import torch", "", script.share(times), at_most=script.BUDGET, note=note
    )


def _loaded() -> Any:
    spec = importlib.util.spec_from_file_location("import_time", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
