"""Sphinx extension: tables and figures from the run records in the book's own pages, and no script from elsewhere.

`<!-- results dataset=mt -->` becomes a table of every record under results/ that matches, one row a setting, with the
mean over its seeds; `<!-- figures dataset=mt -->` shows the heatmap sheet of each such run that has one.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP", "pro": "PRO"}
KEYS = ("method", "dataset", "category", "split", "preset")
MARKER = re.compile(r"<!-- (results|figures)((?: \w+=[\w.-]+)*) -->")


def records(root: Path, wanted: dict) -> list[tuple[Path, dict]]:
    """(folder, record) of each run under results/ whose record has the wanted values, in a fixed order."""
    found = [(path.parent, json.loads(path.read_text())) for path in sorted((root / "results").rglob("record.json"))]
    return [(folder, r) for folder, r in found if all(str(r[key]) == value for key, value in wanted.items())]


def spread(values: list) -> str:
    if None in values:
        return "–"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table(found: list[tuple[Path, dict]]) -> str:
    groups = defaultdict(list)
    for _, r in found:
        groups[(*(r[key] or "" for key in KEYS), r["protocol"]["image_size"])].append(r)
    rows = ["| " + " | ".join([*KEYS, "px", "seeds", *METRICS.values()]) + " |", "|" + "---|" * (len(KEYS) + 6)]
    for key, runs in sorted(groups.items()):
        figures = [spread([r["metrics"][name] for r in runs]) for name in METRICS]
        rows.append("| " + " | ".join(map(str, [*key, len(runs), *figures])) + " |")
    return "\n".join(rows)


def figures(found: list[tuple[Path, dict]], root: Path) -> str:
    blocks = []
    for folder, r in found:
        sheet = folder / "heatmaps.png"
        if sheet.exists():
            caption = ", ".join(str(r[key]) for key in KEYS if r[key])
            blocks.append(f"```{{figure}} /{sheet.relative_to(root).as_posix()}\n{caption}, seed {r['seed']}\n```")
    return "\n\n".join(blocks)


def expand(app, docname, source):
    root = Path(app.srcdir)

    def written(match):
        found = records(root, dict(pair.split("=") for pair in match[2].split()))
        if not found:
            return "*No record of such a run has been committed yet.*"
        return table(found) if match[1] == "results" else figures(found, root)

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
