"""The cells of a printed table as text: for a terminal, as CSV and as Markdown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from vitad.files import atomic_write
from vitad.metrics import METRICS
from vitad.papers.cells import AVERAGE
from vitad.papers.tables import Reproduction
from vitad.show.tables import markdown


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """`cells` with every number as text."""

    def words(name: str, form: str) -> list[str]:
        return ["" if pd.isna(x) else format(x, form) for x in frame[name]]

    digits = abs(np.log10(frame["step"]))  # as many as the column is printed with
    return pd.DataFrame(
        {
            "category": frame["category"],
            "column": frame["column"],
            "metric": frame["metric"].map(METRICS),
            "reported": [
                "" if pd.isna(x) else f"{x:.{n:.0f}f}" for x, n in zip(frame["reported"], digits, strict=True)
            ],
            "recomputed mean": words("recomputed", ".2f"),
            "reproduced": [
                f"{mean}\u00a0±\u00a0{spread}" if spread else mean
                for mean, spread in zip(words("reproduced", ".1f"), words("spread", ".1f"), strict=True)
            ],
            "seeds": [f"{n}" if n else "" for n in frame["seeds"].fillna(0)],
            "difference": words("difference", "+.1f"),
            "interval": [_interval(low, high) for low, high in zip(frame["low"], frame["high"], strict=True)],
            "verdict": [
                f"{verdict}: {reason}" if reason else verdict
                for verdict, reason in zip(frame["verdict"].fillna(""), frame["reason"].fillna(""), strict=True)
            ],
            "tier": frame["tier"].fillna(""),
            "what would fill it": frame["fill"].fillna(""),
        }
    )


def beside(frame: pd.DataFrame) -> pd.DataFrame:
    """Those of `cells` that some run fills, as text for a page: reported beside reproduced, without empty columns."""
    words = as_text(frame)
    words["preset"] = _preset(words["tier"])
    fields = ["reported", "reproduced", "seeds", "preset", "difference", "interval", "verdict"]
    words = words[words["reproduced"] != ""].set_index(["metric", "category", "column"])[fields]
    return words.loc[:, (words != "").any()]


def for_terminal(frame: pd.DataFrame, width: int = 120) -> str:
    """`cells` for a terminal: for each metric a table, and below it the columns that are only reported.

    Categories are lines and columns stand beside each other; a table with one line, as of an ablation, is turned.
    """
    words = as_text(frame).assign(judged=lambda w: (w["difference"] + " " + w["verdict"]).str.strip())
    words["ran"], words["preset"], blocks = frame["method"].notna(), _preset(words["tier"]), []
    preset = ["preset"] if len(set(words["preset"]) - {""}) > 1 else []  # where one is all, it stands below
    for metric, part in words.groupby("metric", sort=False):
        ours, others = part[part["ran"]], part[~part["ran"]]
        if ours["category"].nunique() == 1:
            numbers = ["reported", "recomputed mean", "reproduced", "seeds", "difference", "interval"]
            wide = ours.set_index("column")[[*numbers, *preset, "verdict"]].rename_axis(None)
            wide = wide.loc[:, [c in ("reported", "reproduced") or any(wide[c] != "") for c in wide]]
        else:
            means = ours[ours["recomputed mean"] != ""]
            means = means.assign(category="recomputed", reported=means["recomputed mean"])
            means[["reproduced", "preset", "judged"]] = ""
            ours = pd.concat([ours, means])
            wide = _pivot(ours, ["reported", "reproduced", *preset, "judged"])
        blocks.append(f"{metric}, percent\n{wide.to_string(line_width=width)}")
        if len(others):
            wide = _pivot(others, ["reported"]).droplevel(1, axis=1)
            blocks[-1] += f"\nreported only\n{wide.to_string(line_width=width)}"
    tiers = list(dict.fromkeys(frame["tier"].dropna()))
    if tiers:
        blocks.append("reproduced with (preset; hardware): " + "\n  and ".join(tiers))
    empty = frame["method"].notna() & frame["reproduced"].isna()
    if empty.any():
        blocks.append(f"{empty.sum()} cells are empty; the files say for each which runs would fill it")
    return "\n\n".join(blocks)


def _interval(low: float, high: float) -> str:
    """Its two ends, with as many digits as tell them apart, two at most."""
    if pd.isna(low):
        return ""
    form = "+.1f" if f"{low:+.1f}" != f"{high:+.1f}" else "+.2f"
    return f"{low:{form}}\u00a0to\u00a0{high:{form}}"


def _preset(tier: pd.Series) -> pd.Series:
    """The first part of each `tier`."""
    return tier.str.partition(";")[0]


def _pivot(words: pd.DataFrame, fields: list[str]) -> pd.DataFrame:
    """Category x (column, field), in the order of the lines."""
    wide = words.pivot(index="category", columns="column", values=fields).swaplevel(axis=1).fillna("")
    columns = [(column, field) for column in words["column"].unique() for field in fields]
    return (
        wide.reindex(index=words["category"].unique(), columns=columns)
        .rename_axis(None)
        .rename_axis([None, None], axis=1)
    )


def remarks(table: Reproduction, frame: pd.DataFrame) -> list[str]:
    """Lines that belong beside the cells."""
    printed, lines = table.table, []
    if printed.note:
        lines.append(printed.note)
    asked = table.requests[0].preset
    if others := set(_preset(frame["tier"].fillna(""))) - {asked, ""}:
        lines.append(f"Where runs of the preset {asked} are missing, others stand in: {', '.join(sorted(others))}.")
    if printed.ahead:
        for kind in ("reported", "reproduced"):
            wide = frame[frame["category"] != AVERAGE].pivot(index="category", columns="column", values=kind)
            wide = wide.reindex(columns=list(printed.ahead)).dropna()
            first, second = (wide[c] for c in printed.ahead)
            more, same = (first > second).sum(), (first == second).sum()
            count = f"above {second.name} in {more} of {len(wide)} categories, equal in {same}"
            if not len(wide):
                count = "no categories to count"
            lines.append(f"{first.name} as {kind}, by the higher number: {count}.")
    return lines


def write(table: Reproduction, frame: pd.DataFrame, folder: str | Path) -> Path:
    """Write `<folder>/<stem>.csv` with the numbers and `<stem>.md` with text; gives the path without suffix."""
    stem = Path(folder) / table.stem
    with atomic_write(f"{stem}.csv") as temporary:
        frame.to_csv(temporary, index=False)
    with atomic_write(f"{stem}.md") as temporary:
        lines = [f"# {table.name}", table.title, *remarks(table, frame)]
        lines += ["Percent; mean and standard deviation over seeds.", markdown(as_text(frame))]
        temporary.write_text("\n\n".join(lines) + "\n")
    return stem
