"""Sphinx extension: tables of the run records in the pages of the book, and no script of another host.

A comment in a page under book/ is replaced while the book is built. Its `key=value` pairs choose among the records:

    <!-- results dataset=mt -->                                    a table with a row for each setting: means over seeds
    <!-- splits dataset=mt honest=grouped other=differnet -->      what another split changes for each method
    <!-- claims -->                                                all claims of the chapters; a fallen one is an error
"""

import re
from pathlib import Path

from sphinx.errors import SphinxError

from vitad import claims, runs
from vitad.show import tables

MARKER = re.compile(r"<!-- (results|splits)((?: \w+=[\w.-]+)*) -->")


def expand(app, docname, source):
    root = Path(app.srcdir)

    def table(match):
        wanted = dict(pair.split("=") for pair in match[2].split())
        splits = [wanted.pop(key) for key in ("honest", "other") if key in wanted]
        records = [
            r for r in runs.committed(results=root / "results") if all(str(r[k]) == v for k, v in wanted.items())
        ]
        records = [r for r in records if set(r["overrides"]) <= {"image_size"}]  # ablations have their own chapters
        if not records:
            return "*No record of such a run has been committed yet.*"
        return tables.markdown(tables.across_splits(records, *splits) if splits else tables.over_seeds(records))

    if docname.startswith("book/"):
        source[0] = MARKER.sub(table, source[0])
    if "<!-- claims -->" in source[0]:
        source[0] = source[0].replace("<!-- claims -->", list_of_claims(root / "notebooks"))


def list_of_claims(folder):
    """All claims by chapter, as Markdown."""
    found = claims.of_the_book(folder)
    if fallen := [c for c in found if not c.evidence.holds]:
        lines = [f"{c.chapter}: {c.sentence} ({c.evidence.numbers})" for c in fallen]
        raise SphinxError("\n".join(["the records do not support:", *lines]))
    lines = []
    for chapter in dict.fromkeys(c.chapter for c in found):
        lines.append(f"\n## [{chapter}](../notebooks/{chapter}.ipynb)\n")
        for c in found:
            if c.chapter == chapter:
                before = f" *Before:* {c.before}" if c.before else ""
                lines.append(f"* {c.sentence} ({c.evidence.numbers}).{before}")
    return "\n".join(lines)


def without_thebe(app, pagename, templatename, context, doctree):
    """Remove Thebe's loader, which Jupyter Book adds to every page although nothing uses it. It names another host."""
    scripts = context["script_files"]
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s.filename}{s.attributes.get('body')}".lower()]


def setup(app):
    app.connect("source-read", expand)
    app.connect("html-page-context", without_thebe, priority=900)
    return {"parallel_read_safe": True}
