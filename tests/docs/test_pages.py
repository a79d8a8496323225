"""Links resolve, public names are documented, and nothing names a path of somebody's machine."""

import ast
import inspect
import re
from pathlib import Path
from typing import Iterator, Tuple

import pytest

import clda_core
from clda_core import distillation, relation, saliency, selection, update, validation

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^([ \t]*)(`{3,}).*?^\1\2[ \t]*$|`[^`\n]*`", re.M | re.S)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")
MACHINE_PATH = re.compile(r"(?<![\w.~}*-])/(?:root|home|work|tmp|opt|mnt|Users)/\w")


def links(page: Path) -> Iterator[str]:
    """Yield where a page's links within the repository lead."""
    for match in LINK.finditer(CODE.sub("", page.read_text(encoding="utf-8"))):
        target = match[1] or match[2]
        if not re.match(r"[a-z]+:|#", target):
            yield target.partition("#")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    dead = [target for target in links(page) if not (page.parent / target).exists()]
    assert not dead


ADDED = re.compile(r"^\+\s*(from|import) (\S+)(?: import (.+))?$", re.M)
VARIABLES = {"checkpoint", "teacher", "student", "model", "loss", "optimizer", "args", "data", "update", "schedule"}
"""What hosts call their variables: in a function that assigns one, an import of this name is not seen."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_diff_imports_no_name_that_hosts_have(page: Path) -> None:
    diffs = re.findall(r"^```diff\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    imported = [
        name.strip() for diff in diffs for match in ADDED.finditer(diff) for name in (match[3] or "").split(",")
    ]
    assert not VARIABLES & set(imported)


def public() -> Iterator[Tuple[str, object]]:
    """Yield every public name of the package whose object carries its own docstring."""
    for name in getattr(clda_core, "__all__", ()):
        value = getattr(clda_core, name)
        if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
            yield name, value


def test_every_public_name_exists() -> None:
    missing = [name for name in getattr(clda_core, "__all__", ()) if not hasattr(clda_core, name)]
    assert not missing


def test_every_public_name_has_a_docstring() -> None:
    undocumented = [name for name, value in public() if not (getattr(value, "__doc__", None) or "").strip()]
    assert not undocumented


def test_every_public_method_has_a_docstring() -> None:
    undocumented = [
        f"{name}.{attribute}"
        for name, value in public()
        if inspect.isclass(value) and value.__module__.startswith("clda_core")
        for attribute, member in vars(value).items()
        if not attribute.startswith("_") and inspect.isroutine(member) and not inspect.getdoc(member)
    ]
    assert not undocumented


def test_no_file_names_a_path_of_a_machine() -> None:
    kinds = {".py", ".md", ".toml", ".txt", ".yml", ".cff", ".svg", ""}
    folders = ["clda_core", "docs", "examples", "benchmarks", "tests", ".ci", ".github"]
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if path.suffix in kinds and path.name not in {".git", ".coverage"} and "__pycache__" not in path.parts
        for match in MACHINE_PATH.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


FOLDERS = ("losses", "relation", "saliency", "selection", "update", "validation")
CARDS = sorted(card for folder in FOLDERS for card in (ROOT / "docs" / folder).glob("*.md"))
DEFAULT = re.compile(r"^\| `(\w+)` \| `?(-?[\d.]+(?:e-?\d+)?|None|True|False)`? \|", re.M)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_cards_defaults_are_those_of_the_code(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    modules = (distillation, relation, saliency, selection, update, validation)
    known = {name: getattr(module, name) for module in modules for name in module.__all__}
    signatures = [
        inspect.signature(each).parameters
        for name, each in known.items()
        if inspect.isclass(each) and re.search(rf"\b{name}\(", text)
    ]
    for option, told in DEFAULT.findall(text):
        defaults = [parameters[option].default for parameters in signatures if option in parameters]
        assert ast.literal_eval(told) in defaults, f"{card.name} says {told} for {option}, the code {defaults}"


def test_the_site_loads_nothing_from_another_host() -> None:
    config = (ROOT / ".mkdocs.yml").read_text(encoding="utf-8")
    loaded = re.findall(r"^extra_(?:css|javascript): \[(.*)\]$", config, re.M)
    files = [file for line in loaded for file in line.split(", ")]
    assert len(loaded) == 2
    assert not [file for file in files if not (ROOT / "docs" / file).is_file()]
    assert "  font: false" in config.splitlines()
