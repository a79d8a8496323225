"""``python -m clda_core.info`` says what a bug report needs, and nothing that would not run everywhere."""

import platform
import subprocess
import sys
from typing import Dict

import pytest
import torch

import clda_core
from clda_core import info
from tests.strategies import CASES


@pytest.fixture(scope="module")
def shown() -> Dict[str, Dict[str, str]]:
    return info.sections()


def test_versions_are_those_of_this_process(shown: Dict[str, Dict[str, str]]) -> None:
    versions = shown["versions"]
    assert versions["clda-core"].startswith(clda_core.__version__)
    assert versions["Python"].startswith(platform.python_version())
    assert versions["torch"] == torch.__version__
    assert {"numpy", "typing-extensions"} <= set(versions)


def test_engines_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "lightning":
            raise info.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(info.metadata, "version", version)
    versions = info.versions()
    assert "lightning" not in versions
    assert versions["accelerate"] == "1.2.3"


def test_every_public_strategy_is_listed_by_its_role(shown: Dict[str, Dict[str, str]]) -> None:
    listed = {name for names in shown["strategies"].values() for name in names.split(", ")}
    strategies = {name for name in CASES if name[0].isupper()}
    assert strategies <= listed
    assert "Taylor" in shown["strategies"]["saliency"]
    assert "Guard" in shown["strategies"]["update"]


def test_fast_paths_are_those_that_torch_has(shown: Dict[str, Dict[str, str]]) -> None:
    paths = shown["fast paths"]
    assert (paths["foreach copy"] == "used") == hasattr(torch, "_foreach_copy_")
    assert set(paths.values()) <= {"used", "not in this torch"}


def test_the_command_prints_every_section_and_warns_of_nothing() -> None:
    command = [sys.executable, "-W", "error", "-m", "clda_core.info"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode()
    assert [line for line in printed.splitlines() if not line.startswith(" ")] == list(info.sections())
    assert "cpu " in printed


def test_neither_command_is_imported_with_the_package() -> None:
    code = "import sys, clda_core; print([n for n in ('clda_core.info', 'clda_core.examples') if n in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout.decode().strip() == "[]"
    )
