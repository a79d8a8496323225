"""The tutorial notebook runs in a kernel of its own, and its committed outputs are those of a whole run."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any, Dict, List

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
CELLS: List[Dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def printed() -> str:
    """Return what the committed run printed."""
    return "".join("".join(output.get("text", ())) for cell in CODE for output in cell["outputs"])


@pytest.mark.filterwarnings("ignore")  # of the kernel's client; those of the notebook are in the kernel
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("nbformat", "nbclient", "ipykernel", "sklearn", "matplotlib"):
        pytest.importorskip(needed)
    spec = importlib.util.spec_from_file_location("tutorial", ROOT / ".ci" / "tutorial.py")
    assert spec is not None
    assert spec.loader is not None
    tutorial = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tutorial)
    monkeypatch.setenv("TUTORIAL_STEPS", "16")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = tutorial.executed(NOTEBOOK, str(tmp_path))
    assert [cell.cell_type for cell in notebook.cells] == [cell["cell_type"] for cell in CELLS]
    assert {path.name for path in tmp_path.iterdir()} == {"rounds.png", "student.pt", "teacher.pt"}
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "CLDA after 16 optimizer steps" in text


def test_the_committed_outputs_are_of_one_whole_run() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = {output["output_type"] for cell in CODE for output in cell["outputs"]}
    assert kinds <= {"stream", "execute_result", "display_data"}
    told = re.search(r"CLDA after (\d+) optimizer steps: \d+ rounds, (\d+) of them changed the teacher", printed())
    assert told is not None
    steps = re.search(r'"TUTORIAL_STEPS", "(\d+)"', "".join(CODE[0]["source"]))
    assert steps is not None
    assert told[1] == steps[1]
    assert int(told[2]) > 0  # a tutorial in which nothing happens shows nothing
    assert any("image/png" in output.get("data", {}) for cell in CODE for output in cell["outputs"])


def test_the_deployed_student_is_the_trained_one() -> None:
    trained = re.search(r"KD and rounds \(CLDA\) +([\d.]+)% +([\d.]+)%", printed())
    deployed = re.search(r"deployed student: ([\d.]+)%", printed())
    assert trained is not None
    assert deployed is not None
    assert deployed[1] == trained[2]


def test_the_notebook_is_small_and_names_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert not re.search(r"/(?:root|home|work|tmp)/\w", text)
    assert "metadata" in json.loads(text)
    assert all(cell["metadata"] == {} for cell in CELLS)


def test_links_of_the_notebook_resolve() -> None:
    written = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", written) if "://" not in target]
    assert targets
    assert [target for target in targets if not (NOTEBOOK.parent / target).exists()] == []
