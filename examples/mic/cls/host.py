"""The host: an unmodified checkout of MIC's ``cls`` folder, found, checked and run."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import runpy
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Sequence, TextIO, Tuple

from clda_core.errors import CldaError, problem

SCRIPT = "cdan_mcc_sdat_masking.py"
VERSION = "lhoyer/MIC, commit 2f932a9"

_FILES = (
    f"examples/{SCRIPT}",
    "examples/utils.py",
    "common/utils/sam.py",
    "dalib/modules/teacher.py",
    "dalib/adaptation/cdan.py",
)

# What of the host is relied upon: object, then the parameters that its signature must have, in this order.
_SIGNATURES: Dict[str, Tuple[str, ...]] = {
    "common.utils.sam:SAM.first_step": ("self", "zero_grad"),
    "common.utils.sam:SAM.second_step": ("self", "zero_grad"),
    "dalib.modules.teacher:EMATeacher.__init__": ("self", "model", "alpha", "pseudo_label_weight"),
    "dalib.modules.teacher:EMATeacher.forward": ("self", "target_img"),
    "dalib.adaptation.cdan:ImageClassifier.__init__": ("self", "backbone", "num_classes", "bottleneck_dim"),
    "utils:get_model": ("model_name", "pretrain"),
}

# The script must take these from these modules, or putting ours in their place has no effect.
_IMPORTS = (
    "from common.utils.sam import SAM",
    "from dalib.modules.teacher import EMATeacher",
    "import shutil",
    "import torch",
)
_MODULES = ("common.utils.sam", "dalib.modules.teacher", "dalib.adaptation.cdan", "utils")


class Modules(NamedTuple):
    """The host's modules that CLDA touches."""

    sam: Any
    teacher: Any
    cdan: Any
    utils: Any


def find(folder: Path) -> Path:
    """Return the checkout's ``cls`` folder as an absolute path.

    Raises:
        CldaError: If it is not there, lacks a file that is relied upon, or its script imports something else.
    """
    folder = Path(os.path.abspath(str(folder.expanduser())))
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        nested = all((folder / "cls" / name).is_file() for name in _FILES)
        raise problem(
            "the host is not MIC's cls folder",
            expected=f"a checkout of {VERSION}, with {', '.join(_FILES)}",
            received=f"{folder} without {', '.join(missing)}" if folder.is_dir() else f"{folder}, which is no folder",
            fix=f"pass --host {folder / 'cls'}" if nested else "clone the repository and pass --host PATH/TO/MIC/cls",
        )
    lines = (folder / "examples" / SCRIPT).read_text(encoding="utf-8").splitlines()
    absent = [line for line in _IMPORTS if line not in lines]
    if absent:
        raise _unknown_version(f"the line {absent[0]!r} in examples/{SCRIPT}", "none")
    return folder


@contextlib.contextmanager
def entered(folder: Path) -> Iterator[Modules]:
    """Import the host's modules in its own working directory; undone at the end, streams included.

    Raises:
        CldaError: If a name or signature is not the known one.
    """
    directory, streams, path, arguments = os.getcwd(), (sys.stdout, sys.stderr), list(sys.path), sys.argv
    os.chdir(str(folder / "examples"))
    sys.path[:0] = [str(folder / "examples"), str(folder)]
    # The host's logger takes sys.stdout when it is imported and closes it when the training is done; that is why the
    # host alone exits with status 120.
    sys.stdout = _KeptOpen(sys.stdout)  # type: ignore[assignment]
    try:
        modules = {name: _import(name, folder) for name in _MODULES}
        for name, expected in _SIGNATURES.items():
            _check_signature(name, modules, expected)
        yield Modules(*modules.values())
    finally:
        sys.stdout, sys.stderr = streams
        sys.path[:], sys.argv = path, arguments
        os.chdir(directory)


def run(arguments: Sequence[str]) -> None:
    """Run the host's script as ``python cdan_mcc_sdat_masking.py ARGUMENTS`` does; inside :func:`entered`."""
    sys.argv = [SCRIPT, *arguments]
    runpy.run_path(SCRIPT, run_name="__main__")


class _KeptOpen:
    """A stream that others cannot close."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        self._stream.flush()


def _import(name: str, folder: Path) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise problem(
            f"the host's module {name} cannot be imported",
            expected="the host's own requirements installed",
            received=str(error),
            fix="pip install -r requirements.txt (and matplotlib, which it does not list) from the host's folder",
        ) from error
    file = os.path.abspath(str(module.__file__))
    if not file.startswith(str(folder) + os.sep):
        raise problem(
            f"another module {name} is in the way of the host's",
            expected=f"one under {folder}",
            received=file,
            fix="rename it, or start from a folder that does not hold it",
        )
    return module


def _check_signature(name: str, modules: Mapping[str, Any], expected: Sequence[str]) -> None:
    module, _, attributes = name.partition(":")
    found = modules[module]
    for attribute in attributes.split("."):
        found = getattr(found, attribute, None)
    received = list(inspect.signature(found).parameters) if callable(found) else None
    if received is None or received[: len(expected)] != list(expected):
        wanted = f"{attributes}({', '.join(expected)}) in {module}"
        raise _unknown_version(wanted, "no such name" if received is None else f"({', '.join(received)})")


def _unknown_version(expected: str, received: str) -> CldaError:
    return problem(
        "the host is of an unknown version",
        expected=expected,
        received=received,
        fix=f"check out {VERSION}, or adapt examples/mic/cls/host.py and plugin.py to yours and run verify",
    )
