"""The walk through the pages: links that lead nowhere are found, the others are not."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))
from crawl import broken  # noqa: E402


def test_links_to_missing_files_and_places_are_named(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "index.html").write_text('<h1 id="top">Start</h1><a name="old place">here</a>')
    page = tmp_path / "notebooks" / "page.html"
    page.write_text(
        '<h2 id="here">Page</h2><a href="#here">a</a><a href="../index.html#top">b</a><a href="../#old%20place">c</a>'
        '<a href="https://elsewhere.org/x#y">d</a><a href="mailto:a@b.org">e</a><img src="data:image/png;base64,AA">'
        '<a href="#there">f</a><a href="../index.html#bottom">g</a><img src="../_images/a.png?v=1">'
        '<a href="../../x">h</a>'
    )
    assert broken(page, tmp_path) == [
        "#there: the page has no such place",
        "../index.html#bottom: the page has no such place",
        "../_images/a.png?v=1 is not there",
        "../../x is not there",
    ]
