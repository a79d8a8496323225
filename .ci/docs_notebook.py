"""A MkDocs hook: links from a notebook to other pages, as GitHub follows them, lead to pages of the site."""

from __future__ import annotations

import posixpath
import re
from typing import Any

from mkdocs.exceptions import PluginError

LINK = re.compile(r'href="(?!https?:|mailto:|#|/)([^"#]+\.(?:md|ipynb))')


def on_page_content(html: str, page: Any, files: Any, **_: Any) -> str:
    """Rewrite the links of a rendered notebook."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[1]))
        file = files.get_file_from_path(target)
        if file is None:
            raise PluginError(f"{page.file.src_uri}: there is no page {match[1]!r}")
        return f'href="{file.url_relative_to(page.file)}'

    return LINK.sub(link, html)
