"""Open every page of the built site in a browser, at two widths and in both colour schemes, and report what is wrong.

Reported are pages that are wider than their window, requests to other hosts, errors on the console, links to pages or
headings that do not exist, and words that the search does not find. Look at the screenshots yourself.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import threading
from collections import defaultdict
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Error, Page, sync_playwright

WIDTHS = (1400, 390)
SCHEMES = ("light", "dark")
TALLEST = 8000  # pixels of a screenshot; what follows looks alike
PATIENCE = 120_000  # milliseconds, for a machine that does other things too
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# What a user would type, and a page that has to be among the results.
SEARCHES = {
    "saliency": "saliency/",
    "LSR": "saliency/rates/",
    "DAFormer": "hosts/daformer/",
    "MIC": "hosts/mic-seg/",
    "mixed precision": "engines/",
    "resume": "engines/",
    "DDP": "distributed/",
    "learning rate": "update/masked-distillation/",
    "cost": "cost/",
    "Lightning": "integrations/",
    "LoRA": "layers/",
    "pretrained": "update/init-student/",
    "does it help": "when-not/",
}
# The widest element that sticks out of the window and lies in no box that scrolls.
TOO_WIDE = """() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width) return null;
    const scrolls = e => e && e !== document.body
        && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
    const out = [...document.querySelectorAll("article *")].filter(
        e => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement));
    const shown = out.slice(0, 3).map(e => e.outerHTML.slice(0, 80)).join(" | ");
    return `is ${document.documentElement.scrollWidth} px wide: ${shown}`;
}"""
LINKS = "() => [...document.querySelectorAll('a[href], img[src]')].map(e => e.href || e.src)"
ANCHORS = "() => [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name)"
FOUND = ".md-search-result__link"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the site without a line per request."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def serve(site: Path) -> str:
    """Serve the site from a thread and return its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


class Check:
    """The pages, what was found wrong with them, and where they link to."""

    def __init__(self, browser: Browser, base: str, shots: Path) -> None:
        self.browser, self.base, self.shots = browser, base, shots
        self.wrong: dict[str, list[str]] = defaultdict(list)
        self.links: dict[str, set[str]] = {}
        self.anchors: dict[str, set[str]] = {}

    def open(self, width: int, scheme: str) -> Page:
        """Return an empty page that reports what goes wrong on it."""
        page = self.browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        page.set_default_timeout(PATIENCE)

        def blame(text: str) -> None:
            self.wrong[page.url.replace(self.base, "/")].append(text)

        page.on("console", lambda message: blame(f"console: {message.text}") if message.type == "error" else None)
        page.on("pageerror", lambda error: blame(f"script: {error}"))
        page.on("response", lambda answer: blame(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)
        page.on(
            "request",
            lambda request: (
                blame(f"asks another host: {request.url}")
                if not request.url.startswith((self.base, "data:", "blob:"))
                else None
            ),
        )
        return page

    def look(self, page: Page, name: str, label: str) -> None:
        """Visit one page and keep a screenshot of it."""
        page.goto(self.base + name, wait_until="load")
        width = page.viewport_size["width"]
        page.evaluate("() => document.fonts.ready.then(() => null)")
        too_wide = page.evaluate(TOO_WIDE)
        if too_wide:
            self.wrong["/" + name].append(f"{label}: {too_wide}")
        self.links[name], self.anchors[name] = set(page.evaluate(LINKS)), set(page.evaluate(ANCHORS))
        file = self.shots / label / f"{name.strip('/').replace('/', '.') or 'index'}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        height = min(TALLEST, page.evaluate("() => document.documentElement.scrollHeight"))
        page.screenshot(path=file, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})

    def resolve(self, site: Path) -> None:
        """Find the links within the site that lead nowhere."""
        for name, links in self.links.items():
            for link in links:
                if not link.startswith(self.base):
                    continue
                target, anchor = urlsplit(link).path[1:], urlsplit(link).fragment
                if target in self.anchors:
                    if anchor and anchor not in self.anchors[target]:
                        self.wrong["/" + name].append(f"links to a heading that is not there: {target}#{anchor}")
                elif not (site / target).is_file():
                    self.wrong["/" + name].append(f"links to a page that is not there: {target}")

    def search(self) -> None:
        """Type the obvious words into the search."""
        page = self.open(WIDTHS[0], SCHEMES[0])
        page.goto(self.base, wait_until="load")
        for words, expected in SEARCHES.items():
            page.fill(".md-search__input", "")
            page.click(".md-search__input")
            page.type(".md-search__input", words)
            try:
                page.wait_for_selector(f'{FOUND}[href*="/{expected}"]', state="attached", timeout=PATIENCE / 10)
            except Error:
                self.wrong["search"].append(f"{words!r} does not find {expected}")


def main() -> int:
    """Check the site that the arguments name; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=Path("site"), help="what `make docs` built")
    parser.add_argument("--shots", type=Path, default=Path("runs/docs-check"), help="where the screenshots go")
    parser.add_argument("--pages", nargs="*", default=[], help="only pages whose address contains one of these")
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=SCHEMES)
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        print(
            f"no browser found: install one of {', '.join(CHROMIUM)} (Debian: apt-get install chromium)",
            file=sys.stderr,
        )
        return 1
    names = sorted(str(file.parent.relative_to(options.site)) + "/" for file in options.site.rglob("index.html"))
    names = ["" if name == "./" else name for name in names]
    names = [name for name in names if not options.pages or any(part in name for part in options.pages)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        check = Check(browser, serve(options.site), options.shots)
        for width in options.widths:
            for scheme in options.schemes:
                page = check.open(width, scheme)
                for name in names:
                    check.look(page, name, f"{width}-{scheme}")
                page.close()
        if not options.pages:
            check.resolve(options.site)
            check.search()
        browser.close()
    for name, complaints in sorted(check.wrong.items()):
        for complaint in sorted(set(complaints)):
            print(f"{name}: {complaint}")
    print(f"{len(names)} pages, {sum(map(len, check.wrong.values()))} complaints, screenshots in {options.shots}")
    return 1 if check.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
