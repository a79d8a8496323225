"""Print the requirements of one of the package's extras, so that they can be installed without the package."""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib

if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    print("\n".join(project["project"]["optional-dependencies"][sys.argv[1]]))
