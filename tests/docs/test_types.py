"""The strategies that docs/extend shows are typed as a user with ``mypy --strict`` would write them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_snippets import ROOT, snippets

pytest.importorskip("mypy")

EXTEND = sorted((ROOT / "docs" / "extend").glob("*.md"))


def code_of(page: Path) -> str:
    """Return a page's Python blocks as one module, each on the lines that it has on the page.

    Where the page has its heading, mypy is told that some of torch's own functions, ``backward`` for one, are untyped.
    """
    lines = ["# mypy: untyped-calls-exclude=torch"] + [""] * page.read_text(encoding="utf-8").count("\n")
    for snippet in snippets(page):
        code = snippet.code.splitlines()
        lines[snippet.line : snippet.line + len(code)] = code
    return "\n".join(lines) + "\n"


def test_what_a_user_writes_passes_mypy_strict(tmp_path: Path) -> None:
    files = []
    for page in EXTEND:
        files.append(tmp_path / f"extend_{page.stem}.py")
        files[-1].write_text(code_of(page), encoding="utf-8")
    # From the repository, with its configuration and its cache: `make types` has read the package and torch before.
    command = [sys.executable, "-m", "mypy", "--strict", *map(str, files)]
    done = subprocess.run(command, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.stdout.decode().replace(f"{tmp_path}/extend_", "docs/extend/").replace(".py:", ".md:")
    assert done.returncode == 0, said
