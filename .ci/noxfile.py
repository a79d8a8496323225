"""One session for each environment that is supported: the pinned ones of host codebases and the Pythons in between.

`make test-matrix` builds the wheel and runs all of them. A session sets up .nox/SESSION with exactly the versions of
.ci/constraints-SESSION.txt, checks that installing clda-core there moves none of them, then runs the tests. Arguments
after `--` go to pytest.
"""

from __future__ import annotations

import difflib
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import nox

ROOT = Path(__file__).resolve().parents[1]

nox.needs_version = ">=2024.4.15"
nox.options.envdir = str(ROOT / ".nox")
nox.options.default_venv_backend = "venv"  # virtualenv has given up Python 3.8
nox.options.reuse_venv = "yes"


class Environment(NamedTuple):
    """What a session stands for."""

    python: str
    about: str
    built_last: tuple[str, ...] = ()  # source packages whose setup.py imports torch
    tests: tuple[str, ...] = ()  # a part of the suite, where another session has the same torch


WHAT_MUST_HOLD = ("tests/test_must_hold.py", "tests/test_contracts.py", "tests/examples", "tests/hosts")
ENVIRONMENTS = {
    "oldest": Environment("3.8", "the oldest supported: torch 1.7.1"),
    "host-seg": Environment(
        "3.8", "DAFormer and MIC segmentation: torch 1.7.1, mmcv-full", ("mmcv-full==1.3.7",), WHAT_MUST_HOLD
    ),
    "host-cls": Environment("3.8", "MIC classification and SDAT: torch 1.9.1, timm"),
    "host-today": Environment(
        "3.11", "segmentation hosts on today's versions: torch 2.13, mmcv", ("mmcv==1.7.2",), WHAT_MUST_HOLD
    ),
    "integrations": Environment(
        "3.11",
        "Lightning, transformers, Accelerate, mmengine: torch 2.13",
        tests=(
            *("tests/integrations", "tests/docs/test_snippets.py"),
            *("tests/examples/test_huggingface_segmentation.py", "tests/examples/test_huggingface_classification.py"),
        ),
    ),
    "py39": Environment("3.9", "torch 1.12"),
    "py310": Environment("3.10", "torch 2.1"),
    "py312": Environment("3.12", "torch 2.5"),
    "py313": Environment("3.13", "torch 2.15"),
}


def interpreter(version: str) -> str:
    """Return a path of that Python, or its version, which nox reports as missing."""
    given = os.environ.get("PYTHON" + version.replace(".", ""))
    found = subprocess.run([ROOT / ".ci" / "find-python", version], stdout=subprocess.PIPE, text=True, check=False)
    return given or found.stdout.strip() or version


def packages(session: nox.Session) -> list[str]:
    """Return `name==version` of everything installed, without clda-core itself."""
    frozen = session.run("python", "-m", "pip", "freeze", "--all", silent=True) or ""
    return [line for line in frozen.splitlines() if not line.startswith(("clda-core", "clda_core"))]


def install_package(session: nox.Session) -> None:
    """Install what dist/ holds the way a user does, and fail if that changes any installed version."""
    files = [*(ROOT / "dist").glob("*.tar.gz"), *(ROOT / "dist").glob("*.whl")]
    if not files:
        session.error("dist/ is empty: run `make wheel` first")
    for file in files:
        session.run("python", "-m", "pip", "uninstall", "-q", "-y", "clda-core", silent=True)
        before = packages(session)
        # Without a cache: pip would take the wheel that it built of an earlier file of this name.
        session.run("python", "-m", "pip", "install", "-q", "--no-cache-dir", str(file))
        changes = difflib.unified_diff(before, packages(session), "before", "after", lineterm="", n=0)
        if changed := "\n".join(changes):
            session.error(f"installing {file.name} changed the environment:\n{changed}")
    with session.chdir(session.create_tmp()):  # away from the checkout, where the import would find its sources
        session.run("python", "-W", "error", "-c", "import clda_core; print(clda_core.__file__)")
    shown = ("torch", "torchvision", "numpy", "typing-extensions", "mmcv", "mmcv-full", "timm", "kornia")
    pins = [line for line in before if line.lower().replace("_", "-").split("==")[0] in shown]
    session.log(f"installing clda-core changed none of {len(before)} packages, among them {', '.join(pins)}")


def add_session(name: str, environment: Environment) -> None:
    """Make a session of an environment."""

    def run(session: nox.Session) -> None:
        session.chdir(ROOT)
        constraints = f".ci/constraints-{name}.txt"
        session.install("-q", "-r", constraints)
        if environment.built_last:
            session.install("-q", "--no-build-isolation", "-c", constraints, *environment.built_last)
        install_package(session)
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        session.run(
            "pytest", *(session.posargs or ["-n", "2", "--dist", "loadfile"]), *environment.tests, env=one_thread
        )

    run.__doc__ = f"Python {environment.python}; {environment.about}."
    nox.session(run, name=name, python=interpreter(environment.python))


for _name, _environment in ENVIRONMENTS.items():
    add_session(_name, _environment)
