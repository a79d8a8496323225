"""The command line of ``verify``, the same for both hosts."""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional

import torch

from clda_core import CldaError
from clda_core.errors import problem

from .checks import CHECKS, Result, run_check
from .host import Host, check_folder, version_of
from .runs import Laboratory

_MARKS = {True: "PASS", False: "FAIL", None: "    "}


def main(host: Host, program: str, arguments: Optional[List[str]] = None) -> int:
    """Check one host from the command line; return the exit status, 0 only if all checks hold."""
    options = _parser(host, program).parse_args(arguments)
    root = options.host.resolve()
    try:
        check_folder(host, root)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise problem("no GPU", expected="one", received="none that torch can use", fix="pass --device cpu")
        with folder_for(options.keep) as folder:
            return verify(
                Laboratory(host, root, folder.resolve(), options.model, options.device, options.iterations),
                options.only or list(CHECKS),
            )
    except CldaError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return 130


def verify(
    lab: Any, names: List[str], check: Callable[[str, Any], Result] = run_check, checks: Iterable[str] = CHECKS
) -> int:
    """Run checks in their order, print one line each, and a summary; return the exit status."""
    started = time.time()
    commit, warnings = version_of(lab.host, lab.root)
    python, where = platform.python_version(), torch.cuda.get_device_name() if lab.device == "cuda" else "CPU"
    print(f"{lab.host.name} at {commit}, model {lab.model}: Python {python}, torch {torch.__version__}, {where}")
    for warning in warnings:
        print(f"WARNING: {warning}")
    results: Dict[str, Result] = {}
    for name in checks:
        if name in names:
            results[name] = check(name, lab)
            print(f"{_MARKS[results[name].holds]}  {name:<17} {results[name].figures}", flush=True)
    print(f"shims for this environment: {', '.join(lab.shims) or 'none'}")
    failed = [name for name, result in results.items() if result.holds is False]
    judged = sum(result.holds is not None for result in results.values())
    outcome = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{judged - len(failed)} of {judged} checks hold{outcome} ({time.time() - started:.0f} s)")
    return 1 if failed else 0


def _parser(host: Host, program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=f"Train {host.name}, unmodified, for a few iterations with and without CLDA on made-up data, and "
        "check what must hold. Exit status 0: all of it does.",
    )
    parser.add_argument("--host", type=Path, required=True, help=f"folder of {host.name} ({host.url})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    models = list(host.models)
    parser.add_argument("--model", choices=models, default=models[0], help="of the host's (default: %(default)s)")
    parser.add_argument("--iterations", type=_iterations, default=30, help="of the longest run (default: 30)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep data, configs and runs in this new folder")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    return parser


def _iterations(text: str) -> int:
    if not text.isdigit() or int(text) < 12:
        raise argparse.ArgumentTypeError(f"expected an integer >= 12, so that there is a round, received {text!r}")
    return int(text)


@contextlib.contextmanager
def folder_for(keep: Optional[Path]) -> Iterator[Path]:
    """Make the new folder that runs are kept in; a temporary one if none is named.

    Raises:
        CldaError: If there is something in it already.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="clda-verify-") as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise problem(
            "there is something already where the runs are to be kept",
            expected="a new or empty folder as --keep",
            received=str(keep),
            fix="name another one",
        )
    keep.mkdir(parents=True, exist_ok=True)
    yield keep
