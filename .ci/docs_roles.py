"""A griffe extension: the reStructuredText roles of our docstrings, said in the Markdown that the site is made of."""

from __future__ import annotations

import html
import re
from typing import Any

import griffe

MATHS_BLOCK = re.compile(
    r"^(?P<indent> *)\.\. math:: *(?P<first>.*)(?P<rest>(?:\n(?P=indent) +\S.*|\n *(?=\n +))*)", re.M
)
MATHS = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod|obj):`([^`]+)`")


def in_markdown(text: str, obj: griffe.Object) -> str:
    """Return a docstring with its maths in dollars, its references as optional links and its example as code."""

    def block(match: re.Match[str]) -> str:
        formula = [line.strip() for line in (match["first"] + match["rest"]).splitlines() if line.strip()]
        lines = ["", "$$", *formula, "$$", ""]
        return "\n".join(match["indent"] + line if line else "" for line in lines)

    def link(match: re.Match[str]) -> str:
        target = match[1]
        shown = target.rpartition(".")[2] if target.startswith("~") else target
        name = target.lstrip("~")
        for scope in (obj, obj.parent):
            try:
                name = scope.resolve(name) if scope is not None else name
                break
            except griffe.NameResolutionError:
                continue
        return f'<autoref identifier="{html.escape(name)}" optional><code>{html.escape(shown)}</code></autoref>'

    text = re.sub("^Example:$", "Examples:", text, flags=re.M)
    text = MATHS_BLOCK.sub(block, text)
    text = MATHS.sub(lambda match: "$" + " ".join(match[1].split()) + "$", text)
    return ROLE.sub(link, text)


class Roles(griffe.Extension):
    """Rewrites every docstring as it is loaded, and leaves out the special methods that nobody calls by name."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one."""
        if re.fullmatch(r"__(?!call__)\w+__", obj.name):
            obj.public = False
        if obj.docstring is not None:
            obj.docstring.value = in_markdown(obj.docstring.value, obj)
