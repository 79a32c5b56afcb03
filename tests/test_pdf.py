"""The printed book, where there is a Chromium; and what is said where there is none."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pypdf import PdfReader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))
import browsers  # noqa: E402
import pdf  # noqa: E402

CONTENTS = {"root": "book/one", "parts": [{"chapters": [{"file": "book/two"}]}]}


def write(html):
    for name in ("one", "two"):
        page = html / "book" / f"{name}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f"<title>Page {name} &#8212; the book</title><svg><title>a drawing</title></svg><p>Text {name}")


@pytest.mark.skipif(not any(map(shutil.which, browsers.NAMES)), reason="needs Chromium: apt install chromium")
def test_every_page_is_printed_in_the_order_of_the_contents(tmp_path, capsys):
    write(tmp_path)
    pdf.main(browsers.browser(None), tmp_path, CONTENTS, tmp_path / "book.pdf")
    whole = PdfReader(tmp_path / "book.pdf")
    assert [page.extract_text().split() for page in whole.pages] == [["Text", "one"], ["Text", "two"]]
    assert [item.title for item in whole.outline] == ["Page one", "Page two"]
    assert "2 sheets" in capsys.readouterr().out


def test_a_page_that_is_not_there_and_a_browser_that_fails_are_named(tmp_path):
    with pytest.raises(SystemExit, match="one.html is missing. `make book` builds it"):
        pdf.main("true", tmp_path, CONTENTS, tmp_path / "book.pdf")
    write(tmp_path)
    with pytest.raises(SystemExit, match="true did not print"):
        pdf.main("true", tmp_path, CONTENTS, tmp_path / "book.pdf")
    assert not (tmp_path / "book.pdf").exists()


def test_without_chromium_it_says_where_to_get_it():
    words = [sys.executable, ROOT / "book" / "pdf.py", "CHROMIUM=no-such-browser"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "pdf: no no-such-browser here (Debian: apt install chromium)" in done.stderr
