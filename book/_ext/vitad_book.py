"""Sphinx extension: tables and figures from the run records in the book's own pages, and no script from elsewhere.

`<!-- results dataset=mt -->` becomes a table of every record under results/ that matches, one row a setting, with the
mean over its seeds; `<!-- figures dataset=mt seed=0 -->` shows the heatmap sheet of each such run that has one.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from vitad.runs import read_records

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP", "pro": "PRO"}
COLUMNS = ("method", "data set", "split", "preset", "pixels", "seeds", *METRICS.values())
MARKER = re.compile(r"<!-- (results|figures)((?: \w+=[\w.-]+)*) -->")


def name(record: dict) -> tuple[str, ...]:
    """What tells a run from others, its seed apart: method, data set, split, preset with overrides, image size."""
    data = "/".join(filter(None, (record["dataset"], record["category"])))
    preset = ", ".join([record["preset"], *(f"{key}={value}" for key, value in record["overrides"].items())])
    return record["method"], data, record["split"] or "–", preset, "×".join(map(str, record["protocol"]["image_size"]))


def spread(values: list) -> str:
    """Mean and, with several seeds, standard deviation; a dash where there are no masks to measure with."""
    if None in values:
        return "–"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def results(found: list[dict]) -> str:
    """A Markdown table; only runs that differ in nothing but the seed share a row."""
    rows = defaultdict(list)
    for r in found:
        rows[(*name(r), json.dumps([r["settings"], r["protocol"], r["weights"]], sort_keys=True))].append(r["metrics"])
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for (*key, _), runs in sorted(rows.items()):
        cells = [*key, str(len(runs)), *(spread([metrics[m] for metrics in runs]) for m in METRICS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figures(found: list[dict], root: Path) -> str:
    sheets = [(r, r["folder"] / "heatmaps.png") for r in found]
    return "\n\n".join(
        f"```{{figure}} /{sheet.relative_to(root).as_posix()}\n{', '.join(name(r))} pixels, seed {r['seed']}\n```"
        for r, sheet in sheets
        if sheet.exists()
    )


def expand(app, docname, source):
    root = Path(app.srcdir)

    def written(match):
        wanted = dict(pair.split("=") for pair in match[2].split())
        found = [r for r in read_records(root / "results") if all(str(r[k]) == v for k, v in wanted.items())]
        if not found:
            return "*No record of such a run has been committed yet.*"
        return results(found) if match[1] == "results" else figures(found, root)

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
