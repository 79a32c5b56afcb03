"""Walk through the pages that `make book` has built, as a reader would who finds them below a path of some host.

    python book/crawl.py [BROWSER=firefox] [ONLY="anovit metrics"]

Every link and picture has to lead to a file, and to a place in it, that is there. Then a browser, Chromium where none
is named, opens each page on a wide window and on a phone. No page may ask another host, report a problem to the
console, or be wider than its window.
"""

import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from browsers import browser, opened, served
from execution import BUILD, options
from tqdm import tqdm

WIDTHS = (1280, 390)  # px
HARMLESS = "strict mode: use allowUnionTypes"  # the widget manager about its own schema
# A page may be a pixel wider than its window where lengths are rounded.
OVERFLOW = "document.documentElement.scrollWidth - innerWidth > 1"


class Links(HTMLParser):
    """What a page leads to, and the places in it."""

    def __init__(self, page: Path):
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.places |= {value for name in ("id", "name") if (value := found.get(name))}
        self.targets += [value for name in ("href", "src") if (value := found.get(name))]


@cache
def links(page: Path) -> Links:
    return Links(page)


def broken(page: Path, html: Path) -> list[str]:
    """Links of a page that lead to nothing on this site. Those to other sites are not followed."""
    wrong = []
    for target in dict.fromkeys(links(page).targets):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        path, fragment = urldefrag(target)
        file = (page.parent / unquote(urlsplit(path).path)).resolve() if path else page
        file = file / "index.html" if file.is_dir() else file
        if not file.is_relative_to(html) or not file.is_file():
            wrong.append(f"{target} is not there")
        elif fragment and file.suffix == ".html" and unquote(fragment) not in links(file).places:
            wrong.append(f"{target}: the page has no such place")
    return wrong


def main(program: str, html: Path, only: list[str]) -> None:
    pages = [p for p in sorted(html.rglob("*.html")) if not only or p.stem in only]
    if not pages:
        sys.exit("crawl: no page is there. `make book` builds them.")
    problems = [f"{p.relative_to(html)}: {text}" for p in pages for text in broken(p, html)]
    visited = [p for p in pages if p.relative_to(html).parts[0] in ("book", "notebooks")]
    server = served(html.parent)
    root = f"http://127.0.0.1:{server.server_port}/"
    with opened(program) as browser_window:
        for page in tqdm(visited, "crawl", unit="page"):
            name = page.relative_to(html)
            for width in WIDTHS:
                browser_window.open(f"{root}{html.name}/{name.as_posix()}", width)
                browser_window.evaluate("new Promise((done) => setTimeout(done, 500))")  # what starts after loading
                found = [f"asks {a}" for a in browser_window.requests if not a.startswith((root, "data:", "blob:"))]
                found += [f"console: {text}" for text in browser_window.problems if not text.startswith(HARMLESS)]
                found += ["is wider than its window"] * browser_window.evaluate(OVERFLOW)
                problems += [f"{name}, {width} px: {text}" for text in dict.fromkeys(found)]
    server.shutdown()
    print(*problems, f"crawl: {len(problems)} problems on {len(pages)} pages, {len(visited)} of them opened", sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    given = options("crawl", sys.argv[1:], {"browser": str, "only": str.split})
    main(browser(given.get("browser"), "BROWSER"), (BUILD / "html").resolve(), given.get("only", []))
