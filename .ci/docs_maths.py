"""A MkDocs hook: LaTeX becomes MathML when the site is built, so that it shows without scripts from elsewhere."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.S)


def on_page_content(html_text: str, page: Any, **_: Any) -> str:
    """Replace every formula of a rendered page."""

    def replace(match: re.Match[str]) -> str:
        formula = html.unescape(match[3])
        try:
            return convert(formula, display="block" if match[2] == "[" else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: cannot read the formula {formula!r}: {error!r}") from error

    return FORMULA.sub(replace, html_text)
