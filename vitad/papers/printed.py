"""The papers' printed numbers as data, exactly as printed, and what recounting them shows.

Nothing is corrected in the tables. `means`, `misprints`, `dataset_statements` and `vitad.papers.claims` say where a
paper contradicts itself, the data sets, or the works that it quotes. All numbers are percent.

A table is a file `csv/<paper>-<table>.csv`, and its name is that of the file everywhere: `yang2024-3` is Table 3 of
Yang & Guo 2024.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import pandas as pd

from vitad.errors import unknown

PAPERS = ("anovit2022", "yang2024", "mala2023", "kimkwon2024")  # in the order of the book
SIZES = "yang2024-1"  # a table of data sets, not of results
ABSTRACTS = "abstracts"  # numbers that stand in the papers' abstracts
IMAGE, PIXEL, PRO = METRICS_PRINTED = ("image_auroc", "pixel_auroc", "pro")
EPS = 1e-9  # differences of decimals are not exact


def table(name: str) -> pd.DataFrame:
    """A printed table: `paper, table, dataset, category, method, metric, value_percent`.

    The row `category == "average"` is the printed mean; compare with the mean of the rows.
    """
    return read(name)


def results() -> list[str]:
    """Names of the printed tables that have a number for each category, method and metric."""
    named = [name for name in _names() if re.fullmatch(r"\w+\d{4}-\w+", name) and name != SIZES]
    order = {paper: i for i, paper in enumerate(PAPERS)}
    return sorted(named, key=lambda name: order.get(name.split("-")[0], len(order)))


def means(paper: str | None = None, band: bool = False) -> pd.DataFrame:
    """Every printed mean beside the mean of its rows; of one paper or of all.

    Returns
    -------
    DataFrame `paper, table, method, metric, printed, recomputed, difference, verdict`. The difference is printed
        minus recomputed. `agrees`: within 0.05. `rounding`: can come from rounding the rows, and rounding or cutting
        off the mean. `not rounding`: cannot. With `band` also `least, most`, the differences that rounding can make.
    """
    rows = of_paper(paper, pd.concat([table(name) for name in results()]).dropna(subset="value_percent"))
    found = []
    for key, group in rows.groupby(["paper", "table", "method", "metric"], sort=False):
        values = group.set_index("category")["value_percent"]
        printed, cells = values["average"], values.drop("average")
        if len(cells):  # the ablation prints means only
            off = printed - cells.mean()
            about = (printed, round(cells.mean(), 3), round(off, 3), _verdict(off, printed, cells))
            found.append((*key, *about, *_band(printed, cells)))
    columns = ["paper", "table", "method", "metric", "printed", "recomputed", "difference", "verdict", "least", "most"]
    return pd.DataFrame(found, columns=columns)[columns if band else columns[:-2]]


def _verdict(off: float, printed: float, cells: pd.Series) -> str:
    least, most = _band(printed, cells)
    if abs(off) <= 0.05 + EPS:
        return "agrees"
    return "rounding" if least - EPS <= off <= most + EPS else "not rounding"


def _band(printed: float, cells: pd.Series) -> tuple[float, float]:
    """Rows rounded to a grid q shift their mean by q/2 at most; the mean's own grid p adds p/2, or p if cut off."""
    q = 1 if (cells % 1 == 0).all() else 0.1
    p = 1 if q == 1 and printed % 1 == 0 else 0.1
    return -(q / 2 + p), q / 2 + p / 2


def standing(name: str, metric: str) -> pd.DataFrame:
    """Where a paper's own method stands in its table: DataFrame `ours, best_other, by, gap`, one row a category.

    `by` names all methods that share the best other value. The gap is above 0 where ours is best alone, 0 at a tie.
    """
    wide = by_method(name, metric).drop("average")
    ours = wide.pop("Ours")
    best = wide.max(axis=1)
    by = wide.eq(best, axis=0).apply(lambda row: ", ".join(row.index[row]), axis=1)
    return pd.DataFrame({"ours": ours, "best_other": best, "by": by, "gap": (ours - best).round(1)})


def misprints(paper: str | None) -> pd.DataFrame:
    """Misprinted equations and wording: `place, printed, meant, here` of Markdown, LaTeX between dollars.

    `here` is what vitad does; it is empty where the method is not in the library. MALA was read from a machine's
    transcript, which may itself have lost a bar or a hat.
    """
    return of_paper(paper, read("misprints", dtype=str, keep_default_na=False)).drop(columns="paper")


def dataset_statements(paper: str | None) -> pd.DataFrame:
    """Wrong statements on data sets and on columns taken from elsewhere: `place, stated, true, source`."""
    return of_paper(paper, read("dataset-statements", dtype=str, keep_default_na=False)).drop(columns="paper")


def by_method(name: str, metric: str) -> pd.DataFrame:
    """Category x method, with the printed mean as row `average`; methods without this metric are left out."""
    rows = table(name)
    rows = rows[rows["metric"] == metric]
    return rows.pivot(index="category", columns="method", values="value_percent").dropna(axis=1, how="all")


def read(name: str, **options: Any) -> pd.DataFrame:
    """A file of `csv/`; `options` are pandas'. `UserError` for an unknown name."""
    if name not in _names():
        raise unknown("table", name, _names())
    with (_folder() / f"{name}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, **options)


def of_paper(paper: str | None, frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of one paper; None: all of them."""
    if paper is None:
        return frame
    if paper not in set(frame["paper"]):
        raise unknown("paper", paper, frame["paper"].unique())
    return frame[frame["paper"] == paper].reset_index(drop=True)


def _folder() -> Any:
    return files("vitad.papers") / "csv"


def _names() -> list[str]:
    return sorted(f.name.removesuffix(".csv") for f in _folder().iterdir() if f.name.endswith(".csv"))
