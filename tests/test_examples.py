"""``python -m clda_core.examples``: what it lists, what it copies, and what it refuses."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import clda_core
from clda_core import CldaError, examples

ROOT = Path(__file__).resolve().parents[1]
NAMES = [name for name in examples.available() if name != "classification"]


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of small examples in the place of ours."""
    root = tmp_path / "shipped"
    for name, code in {
        "__init__": "",
        "alone/__init__": '"""Stands alone: see elsewhere."""',
        "alone/plugin": "from . import other",
        "group/__init__": '"""Only groups."""',
        "group/one_two/__init__": '"""One of two."""',
        "group/one_two/main": "",
        "together/__init__": '"""Uses another."""',
        "together/main": "def late():\n    from examples.together import other",
        "together/other": "import examples.lent.part",
        "lent/__init__": "",
        "lent/part": "",
    }.items():
        (root / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").write_text(code)
    (root / "alone" / "README.md").write_text("how")
    (root / "alone" / "__pycache__").mkdir()
    (root / "alone" / "__pycache__" / "plugin.cpython-38.pyc").write_bytes(b"")
    monkeypatch.setattr(examples, "_root", lambda: root)
    return root


def files_in(folder: Path) -> set:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_adapter_is_listed_with_what_it_is_about() -> None:
    about = examples.available()
    assert {"daformer", "mic-cls", "mic-seg", "classification"} <= set(about)
    assert all(about.values())
    assert "DAFormer" in about["daformer"]
    folders = {path.parent.name.replace("_", "-") for path in (ROOT / "examples").glob("*/__init__.py")}
    assert all(any(name.startswith(folder) for name in about) for folder in folders)


def test_names_are_found_in_any_spelling_and_folders_that_only_group_are_not(made_up: Path, tmp_path: Path) -> None:
    assert examples.available() == {
        "alone": "Stands alone",
        "group-one-two": "One of two",
        "lent": "",
        "together": "Uses another",
    }
    for index, name in enumerate(("group-one-two", "group/one_two", "group_one_two")):
        assert files_in(examples.copy(name, tmp_path / f"to{index}")[0]) == {"__init__.py", "main.py"}


def test_a_copy_has_the_readme_and_no_caches(made_up: Path, tmp_path: Path) -> None:
    assert examples.copy("alone", tmp_path / "new" / "mine") == [tmp_path / "new" / "mine"]
    assert files_in(tmp_path / "new") == {"mine/README.md", "mine/__init__.py", "mine/plugin.py"}


def test_what_an_example_imports_of_the_others_comes_along(made_up: Path, tmp_path: Path) -> None:
    made = examples.copy("together", tmp_path / "examples" / "together")
    assert [path.name for path in made] == ["together", "lent"]
    assert {"__init__.py", "lent/part.py", "together/other.py"} <= files_in(tmp_path / "examples")
    shutil.rmtree(str(made[0]))
    assert examples.copy("together", tmp_path / "examples" / "together") == made[:1]  # the other one is there already


@pytest.mark.parametrize(
    ("name", "destination", "message"),
    [
        ("alone", "there", "there is something already"),
        ("alone", "my-folder", "name it 'my_folder'"),
        ("nothing", "new", "expected alone, group-one-two, lent, together, received 'nothing'"),
        ("together", "new", "clda_core.examples together examples/together"),
    ],
)
def test_what_would_not_work_is_refused_and_writes_nothing(
    made_up: Path, tmp_path: Path, name: str, destination: str, message: str
) -> None:
    (tmp_path / "there").mkdir()
    before = files_in(tmp_path)
    with pytest.raises(CldaError, match=message):
        examples.copy(name, tmp_path / destination)
    assert files_in(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_an_installation_without_examples_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "__file__", str(tmp_path / "clda_core" / "examples.py"))
    with pytest.raises(CldaError, match="not installed.*install clda-core from its wheel"):
        examples.available()


def test_a_wheels_examples_are_beside_the_package_not_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "__file__", str(tmp_path / "clda_core" / "examples.py"))
    (tmp_path / "examples" / "foreign").mkdir(parents=True)
    (tmp_path / "examples" / "foreign" / "__init__.py").write_text("")
    with pytest.raises(CldaError, match="not installed"):  # another package's folder of that name
        examples.available()
    shutil.copytree(
        str(ROOT / "examples" / "daformer"), str(tmp_path / "clda_core" / "_shipped" / "examples" / "daformer")
    )
    assert set(examples.available()) == {"daformer", "mic-seg"}


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_module_imports_what_was_copied_with_it(name: str, tmp_path: Path) -> None:
    """By parsing: the hosts that the plug-ins import are not here."""
    target = tmp_path / "examples" / name.replace("mic-", "mic/").replace("-", "_")
    examples.copy(name, target)
    for path in target.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            if isinstance(node, ast.ImportFrom) and node.level:
                within = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
                assert within.is_dir() or within.with_suffix(".py").is_file(), f"{path.name}: {ast.dump(node)}"
                continue
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for imported in names:
                top, _, rest = imported.partition(".")
                assert top != "benchmarks", f"{path.name} imports {imported}"
                assert top != "tests" or path.name == "verify.py", f"{path.name} imports {imported}"
                if top == "examples":
                    within = tmp_path / "examples" / rest.replace(".", "/")
                    assert within.is_dir() or within.with_suffix(".py").is_file(), f"{path.name} imports {imported}"


def test_checks_run_whatever_else_is_named_like_their_folders(tmp_path: Path) -> None:
    for name in ("tests", "examples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('of another package')\n")
    done = run("mic-seg", "--verify", "--host", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("examples.mic.seg.verify: the host is not there"), done.stderr


def test_an_example_without_checks_is_told(made_up: Path, capsys: pytest.CaptureFixture) -> None:
    (made_up / "alone" / "verify.py").write_text("import sys\nsys.exit(len(sys.argv))\n")
    assert examples.main(["together", "--verify"]) == 2
    assert "there are no such checks: expected alone, received 'together'" in capsys.readouterr().err


def test_checks_outside_the_hosts_environment_are_told_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shipped = tmp_path / "examples" / "lacking"
    shipped.mkdir(parents=True)
    (shipped / "verify.py").write_text("import no_such_package\n")
    monkeypatch.setattr(examples, "_root", lambda: tmp_path / "examples")
    monkeypatch.setattr(examples.runpy, "run_module", lambda *_, **__: __import__("no_such_package"))
    path, program = list(sys.path), list(sys.argv)
    assert examples.main(["lacking", "--verify"]) == 2
    assert "No module named 'no_such_package'. Fix: run this where the host itself is run" in capsys.readouterr().err
    assert (sys.path, sys.argv) == (path, program)


def run(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "clda_core.examples", *arguments]
    environment = {"PYTHONPATH": str(Path(clda_core.__file__).parents[1]), "PATH": ""}
    return subprocess.run(command, cwd=str(cwd), env=environment, text=True, stdout=-1, stderr=-1)


def test_the_command_lists_copies_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert examples.main([]) == 0
    assert "daformer " in capsys.readouterr().out
    target = tmp_path / "clda_daformer"
    assert examples.main(["daformer", str(target)]) == 0
    assert f"read {target / 'README.md'}" in capsys.readouterr().out
    assert examples.main(["daformer", str(target)]) == 2
    assert "there is something already" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        examples.main(["daformer"])
    assert "NAME DEST" in capsys.readouterr().err
