"""Other packages that do part of the same: used where they are installed, missing from the table where not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Dict, List, Optional

import torch

PACKAGES = {"timm": "timm", "torch_pruning": "torch-pruning", "torchdistill": "torchdistill"}


def other(name: str) -> Optional[ModuleType]:
    """Return a package, or ``None`` if it is not installed or cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        return None


def missing(name: str) -> str:
    """Return what the table says in the place of a figure."""
    return f"{PACKAGES[name.partition('.')[0]]} is not installed"


def other_versions() -> Dict[str, str]:
    """Return the versions of those that are installed."""
    found = {}
    for package in PACKAGES.values():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def declare_operators() -> None:
    """Let torchvision be imported beside a torch that its compiled half was not built for.

    timm imports torchvision, and so does transformers where it is installed; its Python half looks for operators of
    the compiled half, which does not load beside a CPU build of torch. None of them is called here.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            _declared[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


_declared: List[torch.library.Library] = []
declare_operators()
