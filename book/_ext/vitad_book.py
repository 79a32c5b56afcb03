"""Sphinx extension: claims in the pages of the book, how to cite them, and their scripts.

A comment in a page under book/ is replaced while the book is built:

    <!-- claims -->                                      all claims of the book; a fallen one is an error
    <!-- claims chapter=comparison dataset=mvtec+mt -->  those of a chapter that rest on these data sets alone
    <!-- data sets -->                                   a table of the data sets with their licences

`vitad_facts` are those of book/facts.yml; every page then ends with how to cite it.
"""

import hashlib
import html
import re
import sys
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx.errors import SphinxError

from vitad import claims, runs
from vitad.data.dataset import JOIN
from vitad.runs.request import hash_of

INLINE, LARGE = re.compile(r"<script>(.*?)</script>", re.S), 100_000  # characters
MARKER = re.compile(r"<!-- claims((?: \w+=[\w.+-]+)*) -->")
MARK = "# NBVAL_CHECK_OUTPUT\n"


def expand(app, docname, source):
    root = Path(app.srcdir)

    def replacement(match):
        return list_of_claims(root, **dict(pair.split("=") for pair in match[1].split()))

    if docname.startswith("book/"):
        source[0] = MARKER.sub(replacement, source[0])
    if "<!-- data sets -->" in source[0]:
        sys.path.insert(0, str(root / "book"))
        from readme import dataset_table

        source[0] = source[0].replace("<!-- data sets -->", dataset_table())


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


def with_footer(app, pagename, templatename, context, doctree):
    """How to cite the page, which version it is, and the licences."""
    if not (f := app.config.vitad_facts):
        return
    title, version = re.sub("<[^>]+>", "", context.get("title", "")), f"version {f['version']}"
    commit = f["commit"][:7]
    if commit:
        shown = f'<a href="{f["repository"]}/tree/{f["commit"]}">{commit}</a>' if f["repository"] else commit
        version += f", commit {shown}"
    where = html.escape(f"{f['site']}/{pagename}.html") if f["site"] else ""
    where = f' <a href="{where}">{where}</a>.' if where else ""
    licences = f'<a href="{context["pathto"]("book/licences")}">Licences</a> of text, code and photographs.'
    cited = html.escape(html.unescape(title)) + "." * (not title.endswith("?"))
    context["theme_extra_footer"] = (
        f"<p>To cite this page: {', '.join(f['authors'])} ({f['year']}). {cited} In "
        f"<i>{html.escape(f['title'])}</i>, {version}.{where} {licences}</p>"
    )


def for_colab(app, pagename, templatename, context, doctree):
    """The button opens the notebook that begins by installing the library; it is published beside the pages."""
    f = app.config.vitad_facts
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if button.get("text") == "Colab":
                place = f["repository"].removeprefix("https://github.com/")
                name = f"colab/{pagename.removeprefix('notebooks/')}.ipynb"
                button["url"] = f"https://colab.research.google.com/github/{place}/blob/gh-pages/{name}"


def large_scripts_aside(app, pagename, templatename, context, doctree):
    """Scripts that a cell has put into the page become files, so that browsers load them beside the page, and once."""

    def aside(match):
        if len(match[1]) < LARGE:
            return match[0]
        name = f"{hashlib.sha256(match[1].encode()).hexdigest()[:12]}.js"
        folder = Path(app.outdir, "_static")
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(match[1])
        return f'<script src="{context["pathto"](f"_static/{name}", 1)}"></script>'

    if "body" in context:
        context["body"] = INLINE.sub(aside, context["body"])


def without_marks(app, doctree):
    """Remove the first line of the cells that nbval compares. It means nothing to a reader."""
    for block in doctree.findall(nodes.literal_block):
        text = block.astext()
        if text.startswith(MARK):
            block[:] = [nodes.Text(text.removeprefix(MARK))]
            block.rawsource = block.astext()


def setup(app):
    app.add_config_value("vitad_facts", {}, "env")
    app.connect("html-page-context", with_footer)
    app.connect("html-page-context", large_scripts_aside)
    app.connect("html-page-context", for_colab, priority=900)
    app.connect("doctree-read", without_marks)
    app.connect("source-read", expand)
    app.connect("html-page-context", without_thebe, priority=900)
    return {"parallel_read_safe": True}
