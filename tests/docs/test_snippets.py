"""Every Python block of README.md and docs/ runs, page by page, in order and in one namespace."""

import re
import sys
import textwrap
import types
from pathlib import Path
from typing import List, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# `<!-- not run: REASON -->` right above a block leaves it out, for one of these reasons only.
REASONS = {
    "needs a host codebase",
    "needs several processes",
    "needs a GPU",
    "needs a newer torch than the oldest supported",
    "is part of a class shown above",
}

FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<code>.*?)^(?P=indent)(?P=fence)[ \t]*$", re.M | re.S
)
NOT_RUN = re.compile(r"<!--\s*not run:\s*(?P<reason>[^>]*?)\s*-->\s*\Z")


class Snippet(NamedTuple):
    """One fenced Python block."""

    line: int
    code: str
    not_run: str


def snippets(page: Path) -> List[Snippet]:
    """Return a page's Python blocks in order, the reason for not running one or an empty string with it."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in FENCE.finditer(text):
        language = (block["info"].split() or [""])[0].strip("{}.").lower()
        assert language not in {"py", "python3", "pycon"}, f"{page.name}: name the language 'python', not {language!r}"
        if language == "python":
            reason = NOT_RUN.search(text[: block.start()])
            line = text.count("\n", 0, block.start("code"))
            found.append(Snippet(line, textwrap.dedent(block["code"]), reason["reason"] if reason else ""))
    return found


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
            if not snippet.not_run:
                # Blank lines in front make the line numbers of a traceback those of the page.
                exec(compile("\n" * snippet.line + snippet.code, str(page), "exec"), module.__dict__)
    finally:
        torch.set_num_threads(threads)


def test_every_reason_for_not_running_is_a_listed_one() -> None:
    given = {snippet.not_run for page in PAGES for snippet in snippets(page) if snippet.not_run}
    assert given <= REASONS


def test_readme_has_a_snippet_that_runs() -> None:
    assert any(not snippet.not_run for snippet in snippets(ROOT / "README.md"))


def test_blocks_are_found_with_their_line_indented_or_not(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n```python\nx = 1\n```\n\n=== tab\n\n    ``` python title='t'\n    y = 2\n    ```\n\n"
        "<!-- not run: needs a GPU -->\n\n```python\nz = 3\n```\n\n```bash\nls\n```\n",
        encoding="utf-8",
    )
    assert snippets(page) == [(2, "x = 1\n", ""), (8, "y = 2\n", ""), (14, "z = 3\n", "needs a GPU")]
