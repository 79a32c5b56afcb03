"""Print the pages that `make book` has built into one PDF with an outline: book/_build/book.pdf.

    python book/pdf.py [CHROMIUM=/path/to/chromium]

Chromium prints, one page of the book after another, since it shows mathematics and widgets as readers see them.
"""

import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import yaml
from browsers import browser
from build import pages_of
from execution import BUILD, ROOT, options
from pypdf import PdfWriter
from tqdm import tqdm

# No sandbox: in a container there is none, and only pages of our own are opened.
FLAGS = ("--headless=new", "--no-sandbox", "--no-pdf-header-footer", "--virtual-time-budget=20000")


class Title(HTMLParser):
    """The title of a page, without the name of the book."""

    def __init__(self, page: Path):
        super().__init__()
        self.inside, self.text = False, ""
        self.feed(page.read_text())
        self.text = self.text.partition(" — ")[0].strip()

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "title" and not self.text

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.text += data * self.inside


def main(chromium: str, html: Path, contents: dict, out: Path) -> None:
    """Print each page of the contents, in order, and write all of them at once."""
    pages = [html / f"{name}.html" for name in pages_of(contents)]
    if missing := [str(page) for page in pages if not page.exists()]:
        sys.exit(f"pdf: {missing[0]} is missing. `make book` builds it.")
    whole = PdfWriter()
    with tempfile.TemporaryDirectory() as folder:
        for number, page in enumerate(tqdm(pages, "pdf", unit="page")):
            printed = Path(folder, f"{number}.pdf")
            command = [chromium, *FLAGS, f"--print-to-pdf={printed}", page.as_uri()]
            done = subprocess.run(command, capture_output=True, text=True)
            if not printed.exists():
                sys.exit(f"pdf: {chromium} did not print {page}:\n{done.stderr[-2000:]}")
            whole.append(printed, outline_item=Title(page).text)
        whole.compress_identical_objects()
        new = out.with_suffix(".new")
        whole.write(new)
        new.replace(out)
    print(f"pdf: {len(whole.pages)} sheets, {out.stat().st_size / 2**20:.0f} MiB\n{out}")


if __name__ == "__main__":
    given = options("pdf", sys.argv[1:], {"chromium": str})
    contents = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    main(browser(given.get("chromium")), BUILD / "html", contents, BUILD / "book.pdf")
