"""A printed table, cell by cell: what the paper reports, what its rows give, and what the runs here give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from vitad import data
from vitad.data.synthesis.textures import DTD
from vitad.evidence import NOT_COMPARABLE, against_printed
from vitad.papers import printed
from vitad.papers.estimates import n_images
from vitad.papers.nearest import Runs, candidates, nearest, tested
from vitad.papers.tables import FAITHFUL, IN_THE_MANNER_OF, Reproduction, Table
from vitad.runs import Request
from vitad.runs.record import Record

PATHS = {"textures"}  # settings that say where something lies
AVERAGE = "average"
OTHER_DATA = "other data"
COLUMNS = (
    *("category", "column", "metric", "method", "reported", "step", "recomputed", "reproduced", "spread", "seeds"),
    *("difference", "low", "high", "verdict", "reason", "tier", "fill"),
)
NUMBERS = ("reported", "step", "recomputed", "reproduced", "spread", "difference", "low", "high")


def cells(table: Reproduction, records: Mapping[str, Record]) -> pd.DataFrame:
    """A table cell by cell, in percent.

    Parameters
    ----------
    table
        Which runs fill it. Where they are missing, those of `vitad.papers.nearest` stand in.
    records
        {hash: record}, as `vitad.runs.by_hash` gives them.

    Returns
    -------
    DataFrame, one row for each category, printed column and metric:

    * `reported`: as printed. `step`: unit of the last digit that is printed in this column. `recomputed`: for an
      average, the mean of the printed rows, where there are rows.
    * `reproduced`, `spread`, `seeds`: mean, standard deviation and number of the seeds. An average is taken seed
      by seed, and only of seeds for which all categories are there.
    * `difference`: reproduced minus recomputed, or minus reported where nothing is recomputed. `low`, `high`: its
      interval, see `vitad.evidence.against_printed`; none for one seed.
    * `verdict`: `reproduced`, `differs` or `undecided` by the margins of `vitad.evidence.MARGINS`, else
      `not comparable`.
    * `reason`, for want of a verdict. `other data` is not the paper's data set, or not all of its images, and has no
      difference. `in the manner of` is no reproduction of the paper's method. `substitute network` has another
      pretrained network in place of the method's own. `model of 3 of 27 categories` was trained
      on fewer than the paper's, which is one model of all. `other settings` are not the source's.
      `other weights` start at random what the method's settings have pretrained, such as MALA's decoder without MAE's
      file. `nothing printed` leaves nothing to judge. `one seed` has no spread to judge by and is `undecided`.
    * `tier`: preset and hardware. `fill`: which of the runs that the table asks for are missing.
    """
    numbers = printed_numbers(table)
    runs = candidates(table, records)
    there = {c for ways in runs.values() for way in ways for request, _ in way for c in tested(request)}
    rows = _rows(table, numbers, there)
    filled = {row: nearest(table, runs, categories) for row, categories in rows.items()}
    lines = []
    for column in dict.fromkeys([*table.table.columns, *numbers["column"]]):
        step = _step(numbers[numbers["column"] == column]["value"].dropna())
        for metric in table.table.metrics:
            same = numbers[(numbers["column"] == column) & (numbers["metric"] == metric)]
            reported = dict(zip(same["category"], same["value"], strict=True))
            for row, categories in rows.items():
                has_rows = row == AVERAGE and len(reported) > 1
                line = {
                    "category": row,
                    "column": column,
                    "metric": metric,
                    "reported": reported.get(row),
                    "step": step,
                    "recomputed": np.mean([v for c, v in reported.items() if c != AVERAGE]) if has_rows else None,
                    "fill": None if column in table.columns else "not in this library",
                }
                if column in table.columns:
                    line |= _reproduced(line, table, categories, filled[row][column], records)
                if column in table.columns or row in reported:
                    lines.append(line)
    frame = pd.DataFrame(lines, columns=COLUMNS)
    return frame.astype(dict.fromkeys(COLUMNS, object) | dict.fromkeys(NUMBERS, float) | {"seeds": "Int64"})


def printed_numbers(table: Reproduction) -> pd.DataFrame:
    """What the paper prints: `category, column, metric, value`."""
    described: Table = table.table
    name = table.name if described.printed is None else described.printed
    if not name:
        return pd.DataFrame(columns=["category", "column", "metric", "value"])
    rows = printed.table(name)
    rows = rows[(rows["dataset"] == (described.tested or described.dataset)) & rows["metric"].isin(described.metrics)]
    if name == printed.ABSTRACTS:
        rows = rows[rows["paper"] == described.paper]
    if not described.others:
        rows = rows[rows["method"].isin(list(described.columns))]
    rows = rows.rename(columns={"method": "column", "value_percent": "value"})
    return rows.assign(category=rows["category"].replace("all", AVERAGE))


def _rows(table: Reproduction, numbers: pd.DataFrame, there: set[str | None]) -> dict[str | None, list[str | None]]:
    """{row of the table: the categories whose mean it is}.

    On the paper's data the printed rows, as far as they are asked for, and their average if all are. Where only an
    average is printed and some of its categories are `there`, these stand above it. On other data the categories there,
    and their average, beside which the printed one stands.
    """
    requests = next(iter(table.columns.values()))
    categories = list(dict.fromkeys(c for request in requests for c in tested(request)))
    each: dict[str | None, list[str | None]] = {c: [c] for c in categories}
    if not table.on_the_papers_data:
        return (each if len(each) > 1 else {}) | {AVERAGE: categories}
    in_rows = [c for c in numbers["category"].unique() if c != AVERAGE]
    all_of_them = in_rows or data.get(requests[0].dataset).categories()
    rows = {c: [c] for c in in_rows if c in each}
    if set(all_of_them) <= set(each):
        some = {} if set(all_of_them) <= there else {c: [c] for c in each if c in there}
        return (rows or some) | {AVERAGE: all_of_them}
    return rows or each


def _metrics_by_category(record: Record) -> dict[str | None, dict[str, float | None]]:
    """{category: metrics} of a run; of a model of several categories, of each."""
    several = record.get("metrics_by_category", {})
    return {c.split("/")[-1]: m for c, m in several.items()} or {record["category"]: record["metrics"]}


def _reproduced(
    line: dict[str, Any], table: Reproduction, categories: list[str | None], runs: Runs, records: Mapping[str, Record]
) -> dict[str, Any]:
    """What the runs say: the columns of `cells` from `method` on."""
    metric = line["metric"]
    by_seed: dict[int, dict[str | None, float | None]] = {}
    for _, record in runs:
        values = {c: m.get(metric) for c, m in _metrics_by_category(record).items()}
        by_seed.setdefault(record["seed"], {}).update(values)
    whole = [v for v in by_seed.values() if set(categories) <= v.keys()]
    complete = [v for v in whole if all(v[c] is not None for c in categories)]
    means = np.array([np.mean([100 * v[c] for c in categories]) for v in complete])  # type: ignore[operator]
    asked = [r for r in table.columns[line["column"]] if set(tested(r)) & set(categories)]
    missing = [r.name for r in asked if r.hash not in records]
    cell: dict[str, Any] = {"method": asked[0].method, "seeds": len(means)}
    if missing:
        cell["fill"] = f"{len(missing)} of {len(asked)} runs: {missing[0]}" + (", ..." if len(missing) > 1 else "")
    if not len(means):
        return cell | ({"fill": "data without masks have no such metric"} if whole else {})
    target = line["reported"] if line["recomputed"] is None else line["recomputed"]
    cell |= {"reproduced": means.mean(), "tier": " + ".join(sorted({_tier(r) for _, r in runs}))}
    if len(means) > 1:
        cell["spread"] = means.std(ddof=1)
    reason = _not_comparable(table, asked[0], runs)
    if reason == OTHER_DATA or target is None:
        return cell | {"verdict": NOT_COMPARABLE, "reason": reason or "nothing printed"}
    verdict, low, high = against_printed(means / 100, target / 100, len(categories), metric, comparable=not reason)
    cell |= {"difference": means.mean() - target, "verdict": verdict, "reason": reason}
    if len(means) == 1:
        return cell | {"reason": reason or "one seed"}
    return cell | {"low": 100 * low, "high": 100 * high}


def _not_comparable(table: Reproduction, asked: Request, runs: Runs) -> str | None:
    """Why runs cannot be held against what is printed; None if they can."""
    method, overrides = asked.method, table.overrides.keys()
    if not table.on_the_papers_data or not all(_has_all_images(*run) for run in runs):
        return OTHER_DATA
    if method in IN_THE_MANNER_OF:
        return "in the manner of"
    if any("substitute" in record["protocol"] for _, record in runs):
        return "substitute network"
    n, of = len(tested(runs[0][0])), len(tested(asked))
    if n < of:
        return f"model of {n} of {of} categories"
    faithful = all(request.preset in FAITHFUL.get(method, ()) for request, _ in runs)
    with_dtd = all(record["protocol"].get("textures", "").startswith(DTD) for _, record in runs)
    if not faithful or overrides - PATHS or (table.table.dtd and not with_dtd):
        return "other settings"
    return None if all(_as_pretrained(record) for _, record in runs) else "other weights"


def _step(values: pd.Series) -> float | None:
    """Unit of the last printed digit of a column, all its numbers together; None where it has none."""
    steps = (step for step in (1, 0.1, 0.01) if all(abs(v / step - round(v / step)) < 1e-6 for v in values))
    return next(steps) if len(values) else None


def _as_pretrained(record: Record) -> bool:
    """Whether nothing started at random that the method's settings have pretrained, in whole or in part."""
    return not (record["settings"].get("pretrained") and record["weights"]["source"].endswith("random"))


def _has_all_images(request: Request, record: Record) -> bool:
    """Whether the run had as many images as are published."""
    counts = record["counts"]
    return n_images(request, [record]) == (counts["train"], counts["test_good"] + counts["test_defective"])


def _tier(record: Record) -> str:
    e = record["environment"]
    return f"{record['preset']}; {e['device']}, {e['device_name']}"
