"""Check that a release's tag is the package's version and that the changelog has its section; print that section."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notes(tag: str, version: str, changelog: str) -> str:
    """Return what the changelog says of a tagged version, or exit with what is wrong."""
    if tag != f"v{version}":
        sys.exit(f"the tag is {tag}, the version in clda_core/__init__.py is {version}")
    section = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if section is None or not section[1].strip():
        sys.exit(f"CHANGELOG.md has no section '## [{version}] - YEAR-MONTH-DAY'")
    return section[1].strip()


if __name__ == "__main__":
    init = (ROOT / "clda_core" / "__init__.py").read_text(encoding="utf-8")
    print(
        notes(
            sys.argv[1],
            re.search('__version__ = "(.+)"', init)[1],
            (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        )
    )
