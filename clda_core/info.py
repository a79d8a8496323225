"""What a bug report needs: versions, devices, which fast paths are used, and the strategies of each role.

    python -m clda_core.info

``import clda_core`` does not import this module, and nothing that is listed here is imported to be listed.
"""

from __future__ import annotations

import os
import platform
import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Dict, List

import torch

import clda_core

from ._host.compat import fast_paths
from .strategy import Strategy

_NEEDED = ("torch", "numpy", "typing-extensions")
_ENGINES = ("lightning", "pytorch-lightning", "transformers", "accelerate", "peft", "mmengine", "mmcv", "mmcv-full")
_ROLES = ("schedule", "saliency", "validation", "lead", "selection", "relation", "update", "distillation")


def sections() -> Dict[str, Dict[str, str]]:
    """Return everything as text, by section and name."""
    return {
        "versions": versions(),
        "devices": devices(),
        "fast paths": {name: "used" if there else "not in this torch" for name, there in fast_paths().items()},
        "strategies": {role: ", ".join(names) for role, names in strategies().items()},
    }


def versions() -> Dict[str, str]:
    """Return the versions of this package, of Python, of what it needs and of the engines that are installed."""
    found = {
        "clda-core": f"{clda_core.__version__}, {_where()}",
        "Python": f"{platform.python_version()} on {platform.platform()}",
    }
    found.update((name, _version(name)) for name in _NEEDED)
    found.update((name, _version(name)) for name in _ENGINES if _version(name) != "not installed")
    found["torch"] = torch.__version__  # with the build, which the metadata of some lack
    return found


def devices() -> Dict[str, str]:
    """Return what torch can compute on; no context is made on a GPU."""
    found = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 1.7 built for CUDA warns where there is no driver
        count = torch.cuda.device_count()
    for index in range(count):
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, CUDA {torch.version.cuda}"
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        found["mps"] = "available"
    return found


def strategies() -> Dict[str, List[str]]:
    """Return the names of this package's strategies by the module of their role."""
    offered = {role: import_module(f"clda_core.{role}") for role in _ROLES}
    return {
        role: [name for name in module.__all__ if _is_strategy(getattr(module, name))]
        for role, module in offered.items()
    }


def main() -> None:
    """Print everything, as it may be pasted into an issue."""
    for title, lines in sections().items():
        print(title)
        width = max(map(len, lines))
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in lines.items()))


def _where() -> str:
    above = Path(clda_core.__file__).resolve().parents[1]
    return "a checkout" if (above / "pyproject.toml").is_file() else "installed"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _is_strategy(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Strategy)


if __name__ == "__main__":
    main()
