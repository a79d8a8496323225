"""The house: where a file stands, what it may import, and how long it may be."""

import ast
import functools
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

import pytest

import clda_core

PACKAGE = Path(clda_core.__file__).parent

FLOORS = [
    {"errors"},
    {"_host"},
    {"fits", "layers", "outputs", "strategy"},
    {"saliency", "distillation", "validation"},
    {"relation", "similarity", "selection", "schedule"},
    {"update"},
    {"history", "drawing", "report", "step", "running", "lead", "round"},
    {"state"},
    {"learner"},
    {"checkpoint", "integrations", "teaching"},
]
"""Files and folders of the package from the ground up: each imports from its own floor and from those below."""

COMMANDS = {"examples", "info"}
"""Run by ``python -m``, on the roof: they may import everything, and nothing imports them."""

MOST_LINES = 400
LONGER = {"learner": 500}
"""A third of the learner's are docstrings: they say what its methods promise."""


def floor_of(module: str) -> int:
    """Return the floor of a module by its name within the package; the package's own ``__init__`` is the roof."""
    name = module.split(".")[0]
    return next((floor for floor, names in enumerate(FLOORS) if name in names), len(FLOORS))


def files() -> Dict[str, Path]:
    """Return the package's files by module, named within the package: ``""``, ``"errors"``, ``"update.guard"``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(module: str, path: Path, modules: Set[str]) -> Iterator[str]:
    """Yield the package's modules that a file imports, those in functions and for type checkers included."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*(["clda_core", *above] if node.level else []), node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "clda_core":
                inner = name.partition(".")[2]
                yield inner if inner in modules else inner.rpartition(".")[0]


@functools.lru_cache(maxsize=None)
def graph() -> Dict[str, Tuple[str, ...]]:
    """Return what every module of the package imports of the package."""
    found = files()
    return {module: tuple(dict.fromkeys(imported(module, path, set(found)))) for module, path in found.items()}


def circles(edges: Dict[str, Tuple[str, ...]]) -> List[str]:
    """Return a circle of imports for every import that closes one."""
    found: List[str] = []
    done: Set[str] = set()

    def follow(module: str, trail: Tuple[str, ...]) -> None:
        if module in trail:
            found.append(" -> ".join((*trail[trail.index(module) :], module)))
        elif module not in done:
            for other in edges[module]:
                follow(other, (*trail, module))
            done.add(module)

    for module in edges:
        follow(module, ())
    return found


def test_no_import_runs_back_up() -> None:
    upwards = [
        f"{module or 'clda_core'} imports {other or 'clda_core'}"
        for module, others in graph().items()
        for other in others
        if floor_of(other) > floor_of(module)
    ]
    assert not upwards


def test_no_circle_of_imports() -> None:
    assert not circles(graph())


def test_no_integration_is_imported_with_the_package() -> None:
    importing = [name for name, others in graph().items() if any(other.startswith("integrations.") for other in others)]
    assert all(name.startswith("integrations.") for name in importing)


def test_nothing_imports_a_command() -> None:
    assert not [name for name, others in graph().items() if COMMANDS.intersection(others)]


def test_every_module_has_a_floor() -> None:
    """And no private module stands beside the concepts, but for the wing that touches what is the user's."""
    homeless = {module for module in graph() if module and floor_of(module) == len(FLOORS)}
    assert homeless == COMMANDS
    empty = [name for names in FLOORS for name in names if name not in graph()]
    assert not empty


@pytest.mark.parametrize("module", files())
def test_no_file_is_longer_than_a_reader_follows(module: str) -> None:
    lines = len(files()[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGER.get(module, MOST_LINES)


def test_the_parser_sees_imports_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "guard.py"
    path.write_text(
        "import clda_core.errors\n"
        "from .. import layers\n"
        "from ..saliency import Taylor\n"
        "from clda_core import Schedule\n"
        "from .base import Update\n"
        "import torch\n"
        "def late():\n    from ..learner import CollaborativeLearner\n"
    )
    modules = {"", "errors", "layers", "saliency", "update", "update.base", "learner"}
    found = sorted(imported("update.guard", path, modules))
    assert found == ["", "errors", "layers", "learner", "saliency", "update.base"]


def test_circles_are_found() -> None:
    assert circles({"a": ("b",), "b": ("c",), "c": ()}) == []
    assert circles({"a": ("b",), "b": ("c",), "c": ("a",)}) == ["a -> b -> c -> a"]
