"""The sessions of `make test-matrix`, the public workflow and the page on versions name the same environments."""

import ast
import re
from pathlib import Path
from typing import Dict

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "test-matrix.yml"
SHOWN = ["torch", "numpy", "typing-extensions"]


def sessions() -> Dict[str, str]:
    """Return the Python of every session, read without importing nox, which only a developer has."""
    tree = ast.parse((ROOT / ".ci" / "noxfile.py").read_text(encoding="utf-8"))
    assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
    table = next(node.value for node in assignments if getattr(node.targets[0], "id", "") == "ENVIRONMENTS")
    return {ast.literal_eval(name): ast.literal_eval(call.args[0]) for name, call in zip(table.keys, table.values)}


def pins(session: str) -> Dict[str, str]:
    """Return the version of every package that a session pins."""
    lines = (ROOT / ".ci" / f"constraints-{session}.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_workflow_runs_every_session_on_its_python() -> None:
    if not WORKFLOW.exists():
        pytest.skip("a source distribution has no workflows")
    found = re.findall(r'session: ([\w-]+), python: "([\d.]+)"', WORKFLOW.read_text(encoding="utf-8"))
    assert dict(found) == sessions()


@pytest.mark.parametrize("session", sessions())
def test_page_on_versions_shows_what_a_session_pins(session: str) -> None:
    rows = re.findall(rf"^\| `{session}` \|.*", (ROOT / "docs" / "versions.md").read_text(encoding="utf-8"), re.M)
    pinned = pins(session)
    assert [row.split(" | ")[1:5] for row in rows] == [[sessions()[session], *(pinned[name] for name in SHOWN)]]


def test_every_file_of_pins_belongs_to_a_session() -> None:
    files = {path.stem for path in (ROOT / ".ci").glob("constraints-*.txt")}
    assert files == {f"constraints-{session}" for session in sessions()}
