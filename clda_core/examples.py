"""Copies an example, for instance the plug-in for DAFormer, out of the installed package, or runs its checks.

    python -m clda_core.examples                                       # lists them
    python -m clda_core.examples daformer clda_daformer                # copies one into a new folder
    python -m clda_core.examples daformer --verify --host PATH/TO/IT   # runs its checks of your host

The examples are shipped as files; the package imports them in the last case only, as a program of their own.
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Set, Union

from .errors import CldaError, problem

_ALIASES = {"mic-seg": "daformer"}  # one plug-in serves both hosts
_ABSOLUTE = re.compile(r"^[ \t]*(?:from|import)[ \t]+examples\.(\w+)", re.M)
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc")


def available() -> Dict[str, str]:
    """Return what each example is about, by the name that :func:`copy` takes.

    Raises:
        CldaError: If the installation has no examples.
    """
    about = {name: _about(folder) for name, folder in _folders().items()}
    about.update((alias, f"the folder of {name}") for alias, name in _ALIASES.items() if name in about)
    return dict(sorted(about.items()))


def copy(name: str, destination: Union[str, Path]) -> List[Path]:
    """Copy an example into a new folder, and beside it whatever else of the examples it imports.

    Args:
        name: One of :func:`available`.
        destination: The folder to make. An example whose modules import each other as ``examples.NAME`` goes into a
            folder that ends in this path; the others may have any name that Python can import.

    Returns:
        The folders that were made, the example's own first.

    Raises:
        CldaError: If there is no such example, something is in the way, or the example could not be imported from
            there. Nothing is written then.
    """
    folders = _folders()
    known = _ALIASES.get(_plain(name), _plain(name))
    if known not in folders:
        raise problem("there is no such example", expected=", ".join(available()), received=repr(name), fix="name one")
    source, target = folders[known], Path(destination).absolute()
    if not target.name.isidentifier():
        raise problem(
            "the folder could not be imported",
            expected="a name of letters, digits and underscores",
            received=repr(target.name),
            fix=f"name it {re.sub('[^0-9a-zA-Z_]', '_', target.name)!r}",
        )
    if target.exists():
        raise problem(
            "there is something already",
            expected="a folder to make",
            received=str(target),
            fix="name another or move it",
        )
    wanted = {target: source, **_beside(known, source, target)}
    missing = {there: here for there, here in wanted.items() if not there.exists()}
    for there, here in missing.items():
        if here.is_dir():
            shutil.copytree(str(here), str(there), ignore=_NOT_COPIED)
        else:
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(here), str(there))
    return [there for there, here in missing.items() if here.is_dir()]


def verify(name: str, options: Sequence[str]) -> int:
    """Run the checks of an example as its own program; return the exit status.

    Args:
        name: Of an example that has a ``verify.py``.
        options: Of that program, for instance ``["--host", "PATH"]``.

    Raises:
        CldaError: If the example has no checks, or they need a package that is not installed.
    """
    root = _root()
    checks = {_plain(path.parent.relative_to(root).as_posix()): path for path in root.rglob("verify.py")}
    if _plain(name) not in checks:
        raise problem(
            "there are no such checks", expected=", ".join(sorted(checks)), received=repr(name), fix="name an example"
        )
    module = ".".join(("examples", *checks[_plain(name)].with_suffix("").relative_to(root).parts))
    path, program = list(sys.path), list(sys.argv)
    sys.path.insert(0, str(root.parent))  # before whatever else is named examples or tests
    sys.argv[1:] = options
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except ModuleNotFoundError as error:
        raise problem(
            "the checks need a package that is not here",
            expected="the host's environment",
            received=str(error),
            fix="run this where the host itself is run",
        ) from error
    finally:
        sys.path[:], sys.argv[:] = path, program
    return 0


def main(arguments: Optional[List[str]] = None) -> int:
    """List the examples or copy one, from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m clda_core.examples", description="List the examples, or copy one into a new folder."
    )
    parser.add_argument("name", nargs="?", help="of the example; without it all are listed")
    parser.add_argument("destination", nargs="?", metavar="DEST", help="the folder to make")
    parser.add_argument(
        "--verify", nargs=argparse.REMAINDER, help="run the example's checks; what follows are its options"
    )
    options = parser.parse_args(arguments)
    if options.name is not None and options.destination is None and options.verify is None:
        parser.error("name the folder to make: python -m clda_core.examples NAME DEST")
    try:
        if options.verify is not None:
            return verify(options.name or "", options.verify)
        if options.name is None:
            about = available()
            width = max(map(len, about))
            print("\n".join(f"{name:<{width}}  {text}" for name, text in about.items()))
            return 0
        made = copy(options.name, options.destination)
    except (CldaError, OSError) as error:
        print(f"clda_core.examples: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"made {path}" for path in made))
    if (made[0] / "README.md").is_file():
        print(f"read {made[0] / 'README.md'}")
    return 0


def _root() -> Path:
    """Return where the examples are: a wheel holds them, and their checks, laid out as in a checkout."""
    here = Path(__file__).resolve().parent
    if (here / "_shipped" / "examples").is_dir():
        return here / "_shipped" / "examples"
    if (here.parent / "examples").is_dir() and (here.parent / "pyproject.toml").is_file():
        return here.parent / "examples"
    raise problem(
        "the examples are not installed",
        expected=f"them in {here / '_shipped'}",
        received="no such folder",
        fix="install clda-core from its wheel, its source distribution or a clone",
    )


def _folders() -> Dict[str, Path]:
    """Return the examples by name: folders with modules, and those within a folder that only groups them."""
    found: Dict[str, Path] = {}
    root = _root()
    for folder in sorted(path.parent for path in root.glob("*/__init__.py")):
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        inner = [] if modules else sorted(path.parent for path in folder.glob("*/__init__.py"))
        for example in inner or [folder]:
            found[_plain(example.relative_to(root).as_posix())] = example
    return {name: path for name, path in found.items() if name not in _ALIASES}


def _beside(name: str, source: Path, target: Path) -> Dict[Path, Path]:
    """Return what must lie beside a copied example, by where, so that modules find each other as ``examples.NAME``."""
    imported = _imported(source)
    if not imported:
        return {}
    root = _root()
    own = source.relative_to(root)
    path = "examples" / own
    if target.parts[-len(path.parts) :] != path.parts:
        raise problem(
            "the example would not find its own modules",
            expected=f"a folder that ends in {path.as_posix()}",
            received=str(target),
            fix=f"python -m clda_core.examples {name} {path.as_posix()}",
        )
    top = target.parents[len(own.parts) - 1]
    return {top / other: root / other for other in sorted(imported - {own.parts[0]} | {"__init__.py"})}


def _plain(name: str) -> str:
    return name.strip("/").replace("_", "-").replace("/", "-")


def _about(folder: Path) -> str:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0].partition(": see")[0].rstrip(".") if text else ""


def _imported(folder: Path) -> Set[str]:
    """Return the folders that modules import by ``examples.NAME``, with those that modules of these import."""
    root, waiting = _root(), [folder]
    found: Set[str] = set()
    while waiting:
        for path in waiting.pop().rglob("*.py"):
            new = set(_ABSOLUTE.findall(path.read_text(encoding="utf-8"))) - found
            found |= new
            waiting += [root / name for name in new if (root / name).is_dir()]
    return found


if __name__ == "__main__":
    sys.exit(main())
