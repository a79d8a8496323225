"""Check that the built wheel holds the package, its marker, the examples and the licence, and nothing else.

twine and check-wheel-contents judge what every wheel must have; this is about ours.
"""

from __future__ import annotations

import re
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ["numpy>=1.19", "torch>=1.7.1", "typing-extensions>=3.7.4.3"]


def check(wheel: Path) -> None:
    """Exit with a message at the first thing that is wrong."""
    version = re.search(r'__version__ = "(.+)"', (ROOT / "clda_core/__init__.py").read_text(encoding="utf-8"))[1]
    if wheel.name != f"clda_core-{version}-py3-none-any.whl":
        sys.exit(f"{wheel.name}: not a pure-Python wheel of version {version}")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"clda_core-{version}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "clda_core").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    examples = {
        f"clda_core/_shipped/{path.relative_to(ROOT).as_posix()}"
        for path in [ROOT / "tests/__init__.py", *(ROOT / "examples").rglob("*"), *(ROOT / "tests/hosts").rglob("*")]
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("test_")
    }
    expected = package | examples | {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    if names != expected:
        sys.exit(f"{wheel.name}: missing {sorted(expected - names)}, unexpected {sorted(names - expected)}")
    if "clda_core/py.typed" not in names:
        sys.exit(f"{wheel.name}: py.typed is missing")
    required = sorted(line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line)
    if required != REQUIREMENTS:
        sys.exit(f"{wheel.name}: requires {required}, expected {REQUIREMENTS}")
    if metadata["License-Expression"] != "Apache-2.0" or metadata["Requires-Python"] != ">=3.8":
        sys.exit(f"{wheel.name}: wrong licence or Python version in the metadata")
    print(
        f"{wheel.name}: {len(package)} files of the package, {len(examples)} of examples, licence, metadata: all there"
    )


if __name__ == "__main__":
    check(Path(sys.argv[1]))
