"""Sphinx extension: tables from the run records in the book's own pages, and no script from elsewhere.

A comment in a page under book/ is replaced while the book is built; `key=value` pairs choose among the records:

    <!-- results dataset=mt -->                                    a table, one line a setting, mean over its seeds
    <!-- splits dataset=mt honest=grouped other=differnet -->      what changing the split does to each method
"""

import re
from pathlib import Path

from vitad import runs, tables

MARKER = re.compile(r"<!-- (results|splits)((?: \w+=[\w.-]+)*) -->")


def expand(app, docname, source):
    root = Path(app.srcdir)

    def written(match):
        wanted = dict(pair.split("=") for pair in match[2].split())
        splits = [wanted.pop(key) for key in ("honest", "other") if key in wanted]
        records = [r for r in runs.read_records(root / "results") if all(str(r[k]) == v for k, v in wanted.items())]
        records = [r for r in records if set(r["overrides"]) <= {"image_size"}]  # ablations have their own chapters
        if not records:
            return "*No record of such a run has been committed yet.*"
        return tables.markdown(tables.across_splits(records, *splits) if splits else tables.over_seeds(records))

    if docname.startswith("book/"):
        source[0] = MARKER.sub(written, source[0])


def without_thebe(app, pagename, templatename, context, doctree):
    """Jupyter Book adds Thebe's loader to every page, twice, although nothing here uses it; it names a foreign host."""
    scripts = context["script_files"]
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s.filename}{s.attributes.get('body')}".lower()]


def setup(app):
    app.connect("source-read", expand)
    app.connect("html-page-context", without_thebe, priority=900)
    return {"parallel_read_safe": True}
