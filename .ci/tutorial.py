"""Run docs/tutorial.ipynb as a reader does, cell by cell, and keep what it prints and draws in the file.

python .ci/tutorial.py           # writes the outputs into the notebook
python .ci/tutorial.py --check   # only runs it
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tutorial.ipynb"


def executed(path: Path, folder: str) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of a run in a folder, without what differs from run to run."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": folder}}
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True, resources=resources
    ).execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main() -> None:
    """Run the notebook in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(NOTEBOOK, folder)
    if "--check" not in sys.argv[1:]:
        nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
