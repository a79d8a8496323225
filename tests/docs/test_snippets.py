"""Every Python block of README.md and docs/ runs, page by page, in order and in one namespace."""

import importlib.util
import re
import sys
import textwrap
import types
import warnings
from pathlib import Path
from typing import List, NamedTuple, Tuple

import pytest
import torch
import torch.distributed as dist
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# `<!-- not run: REASON -->` right above a block leaves it out, for one of these reasons only.
REASONS = {
    "needs a host codebase",
    "needs a GPU",
}

# `<!-- needs: MODULE, MODULE>=VERSION -->` right above a block runs it only where these can be imported.
NEEDS = re.compile(r"<!--\s*needs:\s*(?P<modules>[\w., =><]+?)\s*-->\s*\Z")

FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<code>.*?)^(?P=indent)(?P=fence)[ \t]*$", re.M | re.S
)
NOT_RUN = re.compile(r"<!--\s*not run:\s*(?P<reason>[^<>]*?)\s*-->\s*\Z", re.S)


class Snippet(NamedTuple):
    """One fenced Python block."""

    line: int
    code: str
    not_run: str
    needs: Tuple[str, ...] = ()


def snippets(page: Path) -> List[Snippet]:
    """Return a page's Python blocks in order, the reason for not running one or an empty string with it."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in FENCE.finditer(text):
        language = (block["info"].split() or [""])[0].strip("{}.").lower()
        assert language not in {"py", "python3", "pycon"}, f"{page.name}: name the language 'python', not {language!r}"
        if language == "python":
            reason, needs = (comment.search(text[: block.start()]) for comment in (NOT_RUN, NEEDS))
            line = text.count("\n", 0, block.start("code"))
            modules = tuple(re.split(r",\s*", needs["modules"])) if needs else ()
            found.append(Snippet(line, textwrap.dedent(block["code"]), reason["reason"] if reason else "", modules))
    return found


def there(need: str) -> bool:
    """Return whether a module can be imported, and is as new as it has to be."""
    requirement = Requirement(need)
    if importlib.util.find_spec(requirement.name) is None:
        return False
    return not requirement.specifier or importlib.import_module(requirement.name).__version__ in requirement.specifier


PAGES_WITH_SNIPPETS = [page for page in PAGES if snippets(page)]


@pytest.mark.parametrize("page", PAGES_WITH_SNIPPETS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("snippets_of_" + page.stem.replace("-", "_"))
    module.__file__ = str(page)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        for snippet in snippets(page):
            if snippet.not_run or not all(map(there, snippet.needs)):
                continue
            with warnings.catch_warnings():
                if snippet.needs:  # engines warn of the machine, and of what they use themselves
                    warnings.simplefilter("ignore")
                # Blank lines in front make the line numbers of a traceback those of the page.
                exec(compile("\n" * snippet.line + snippet.code, str(page), "exec"), module.__dict__)
    finally:
        torch.set_num_threads(threads)
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def test_every_reason_for_not_running_is_a_listed_one() -> None:
    given = {snippet.not_run for page in PAGES for snippet in snippets(page) if snippet.not_run}
    assert given <= REASONS


def test_readme_has_a_snippet_that_runs() -> None:
    assert any(not snippet.not_run for snippet in snippets(ROOT / "README.md"))


def test_blocks_are_found_with_their_line_indented_or_not(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n```python\nx = 1\n```\n\n=== tab\n\n    ``` python title='t'\n    y = 2\n    ```\n\n"
        "<!-- not run: needs a GPU -->\n\n```python\nz = 3\n```\n\n```bash\nls\n```\n"
        "<!-- needs: torch>=1.7, no_such -->\n\n```python\nw = 4\n```\n",
        encoding="utf-8",
    )
    assert snippets(page) == [
        (2, "x = 1\n", "", ()),
        (8, "y = 2\n", "", ()),
        (14, "z = 3\n", "needs a GPU", ()),
        (23, "w = 4\n", "", ("torch>=1.7", "no_such")),
    ]


def test_a_need_is_of_a_module_and_its_version() -> None:
    assert [there(need) for need in ("torch", "torch>=1.7", "torch>=1000", "no_such")] == [True, True, False, False]
