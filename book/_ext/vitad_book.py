"""Sphinx extension: claims in the pages of the book, no marks of the tests, and no script of another host.

A comment in a page under book/ is replaced while the book is built:

    <!-- claims -->                                      all claims of the book; a fallen one is an error
    <!-- claims chapter=comparison dataset=mvtec+mt -->  those of a chapter that rest on these data sets alone
"""

import re
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx.errors import SphinxError

from vitad import claims, runs
from vitad.data.dataset import JOIN
from vitad.runs.request import hash_of

MARKER = re.compile(r"<!-- claims((?: \w+=[\w.+-]+)*) -->")
MARK = "# NBVAL_CHECK_OUTPUT\n"


def expand(app, docname, source):
    root = Path(app.srcdir)

    def replacement(match):
        return list_of_claims(root, **dict(pair.split("=") for pair in match[1].split()))

    if docname.startswith("book/"):
        source[0] = MARKER.sub(replacement, source[0])


def list_of_claims(root, chapter=None, dataset=None):
    """All claims by chapter, or those of one chapter that rest on some data sets alone, joined with +, as Markdown."""
    found = checked_claims(root / "notebooks")
    if chapter:
        records = runs.committed(results=root / "results")
        of_data = {hash_of(r) for r in records if r["dataset"] in dataset.split(JOIN)}
        chosen = [c for c in found if c.chapter == chapter and c.evidence.rests_on <= of_data]
        return "\n".join(map(as_item, chosen))
    lines = []
    for name in dict.fromkeys(c.chapter for c in found):
        lines.append(f"\n## [{name}](../notebooks/{name}.ipynb)\n")
        lines += [as_item(c) + f" *Before:* {c.before}" * bool(c.before) for c in found if c.chapter == name]
    return "\n".join(lines)


def as_item(claim):
    return f"* {claim.sentence} <span class='evidence'>({claim.evidence.numbers})</span>"


@cache  # several pages list them
def checked_claims(folder):
    """All claims of the notebooks; an error names those that the records do not support."""
    found = claims.of_the_book(folder)
    if fallen := [c for c in found if not c.evidence.holds]:
        lines = [f"{c.chapter}: {c.sentence} ({c.evidence.numbers})" for c in fallen]
        raise SphinxError("\n".join(["the records do not support:", *lines]))
    return found


def without_thebe(app, pagename, templatename, context, doctree):
    """Remove Thebe's loader, which Jupyter Book adds to every page although nothing uses it. It names another host."""
    scripts = context["script_files"]
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s.filename}{s.attributes.get('body')}".lower()]


def without_marks(app, doctree):
    """Remove the first line of the cells that nbval compares. It means nothing to a reader."""
    for block in doctree.findall(nodes.literal_block):
        text = block.astext()
        if text.startswith(MARK):
            block[:] = [nodes.Text(text.removeprefix(MARK))]
            block.rawsource = block.astext()


def setup(app):
    app.connect("doctree-read", without_marks)
    app.connect("source-read", expand)
    app.connect("html-page-context", without_thebe, priority=900)
    return {"parallel_read_safe": True}
