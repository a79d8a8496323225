"""What is published: one version, one owner, a README that PyPI shows whole, workflows and forms for issues."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Tuple

import pytest

import clda_core

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
OWNER = re.compile(r"(?:github|githubusercontent)\.com/([\w-]+)/clda-core|//([\w-]+)\.github\.io/clda-core")
RELATIVE = re.compile(r"\]\((?![a-z]+:|#)[^)]*\)|(?:src|srcset|href)=\"(?![a-z]+:|#)[^\"]*\"")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, str(ROOT / ".ci" / f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(version: str) -> Tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_version_citation_and_changelog_agree() -> None:
    """Between releases the version is the next one with ``.dev0``, and the changelog begins with what is unreleased."""
    version = clda_core.__version__
    assert re.search(r"^version: (.+)$", read("CITATION.cff"), re.M)[1] == version
    sections = re.findall(r"^## \[([^\]]+)\](.*)$", read("CHANGELOG.md"), re.M)
    released = [name for name, _ in sections if name != "Unreleased"]
    assert released == sorted(released, key=numbers, reverse=True)
    if version.endswith(".dev0"):
        assert sections[0][0] == "Unreleased"
        assert numbers(version[: -len(".dev0")]) > numbers(released[0])
    else:
        assert released[0] == version
        assert script("check_tag").notes(f"v{version}", version, read("CHANGELOG.md"))


def test_a_tag_is_refused_unless_it_is_the_version_and_the_changelog_tells_of_it() -> None:
    notes = script("check_tag").notes
    changelog = "# Changelog\n\n## [1.2.0] - 2030-01-31\n\n### Added\n\n- This.\n\n## [1.1.0]\n\n- That.\n"
    assert notes("v1.2.0", "1.2.0", changelog) == "### Added\n\n- This."
    for tag, version, said in (
        ("v1.2.0", "1.2.1", "the version in clda_core/__init__.py is 1.2.1"),
        ("v1.1.0", "1.1.0", "no section '## .1.1.0. - YEAR-MONTH-DAY'"),
        ("v1x2.0", "1x2.0", "no section"),
    ):
        with pytest.raises(SystemExit, match=said):
            notes(tag, version, changelog)


def test_the_owner_is_one_and_stands_where_make_owner_looks() -> None:
    """It is a placeholder until the repository is published; ``make owner NAME=...`` then replaces it everywhere."""
    named = {}
    for path in [path for path in ROOT.iterdir() if path.is_file() and path.suffix in {".md", ".toml", ".cff", ".yml"}]:
        named[path.name] = OWNER.findall(path.read_text(encoding="utf-8"))
    for folder in ("docs", ".github", "clda_core", "examples", "benchmarks"):
        texts = [
            path.read_text(encoding="utf-8")
            for kind in ("md", "yml", "py")
            for path in (ROOT / folder).rglob(f"*.{kind}")
        ]
        named[folder] = OWNER.findall("\n".join(texts))
    looked_in = set(re.search(r"^OWNED := (.+)$", read("Makefile"), re.M)[1].split())
    assert {place for place, found in named.items() if found} == {
        place for place in looked_in if (ROOT / place).exists()
    }
    assert len({"".join(owner) for found in named.values() for owner in found}) == 1


def test_no_relative_link_is_left_in_what_pypi_shows() -> None:
    pytest.importorskip("hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme")
    command = [sys.executable, "-m", "hatchling", "metadata", "readme"]
    shown = subprocess.run(command, cwd=str(ROOT), check=True, stdout=subprocess.PIPE).stdout.decode()
    code = re.compile(r"^```.*?^```", re.M | re.S)
    assert RELATIVE.findall(code.sub("", read("README.md")))  # there are some, which work in a clone
    assert not RELATIVE.findall(code.sub("", shown))
    assert code.findall(shown) == code.findall(read("README.md"))
    rewritten = re.findall(r"clda-core/(?:blob/)?main/([^)#\"\s]+)", shown)
    assert [path for path in rewritten if not (ROOT / path).exists()] == []


@pytest.fixture
def yaml() -> Any:
    if not GITHUB.exists():
        pytest.skip("a source distribution has no workflows")
    return pytest.importorskip("yaml")


def test_workflows_run_what_is_there(yaml: Any) -> None:
    for path in (GITHUB / "workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        jobs = yaml.safe_load(text)["jobs"]
        assert all({"runs-on", "timeout-minutes", "steps"} <= set(job) for job in jobs.values()), path.name
        assert [name for name in re.findall(r"\.ci/[\w.-]+", text) if not (ROOT / name).exists()] == []


def test_what_builds_without_isolation_installs_what_the_build_needs(yaml: Any) -> None:
    (requires,) = re.findall(r"^requires = \[(.+)\]$", read("pyproject.toml"), re.M)
    needed = set(re.findall(r'"([\w-]+)', requires))
    building = [path.read_text(encoding="utf-8") for path in (GITHUB / "workflows").glob("*.yml")]
    building = [text for text in building if "build --no-isolation" in text]
    assert len(building) == 2
    for text in building:
        (installed,) = re.findall(r"pip install --constraint \S+ (.+)\n.*build --no-isolation", text)
        assert needed - set(installed.split()) == set()


def test_the_release_checks_what_make_wheel_checks(yaml: Any) -> None:
    release = (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")
    recipe = re.search(r"^wheel:.*\n((?:\t.*\n)+)", read("Makefile"), re.M)[1]
    commands = [re.sub(r"^\$\(BIN\)/", "", line.strip()) for line in recipe.splitlines()[1:]]
    assert len(commands) == 4
    for command in commands:
        assert f"run: {command.replace(' >/dev/null', '')}\n" in release


def test_every_issue_form_asks_for_the_information(yaml: Any) -> None:
    forms = [path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert forms
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form)
        names = [field["id"] for field in form["body"]]
        assert len(names) == len(set(names))
        assert any("`python -m clda_core.info`" in field["attributes"]["label"] for field in form["body"]), path.name
