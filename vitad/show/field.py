"""Figures of the field: the systems on one map, in time, and who compares with whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from vitad.papers.field import FEATURES, GOOD, PAINTED, PIXELS, System
from vitad.show.drawings import AMBER, BLUE, GREEN, RED, Drawing
from vitad.show.lessons import WIDTH

if TYPE_CHECKING:
    from IPython.display import HTML


def families(systems: Sequence[System]) -> HTML:
    """The field on one map: what a system compares, and what it learns from."""
    d = Drawing(760, 352)
    for column, compares in enumerate((PIXELS, FEATURES)):
        d.text(265 + 335 * column, 22, f"compares {compares}", 16, bold=True)
        for row, learns in enumerate((GOOD, PAINTED)):
            x, y, height = 102 + 335 * column, 34 + 198 * row, 184 if row == 0 else 112
            d.box(x, y, 322, height, colour=(BLUE, GREEN, AMBER, RED)[2 * row + column])
            here = [s for s in systems if (s.compares, s.learns) == (compares, learns)]
            own = [s for s in here if s.paper]
            others = [s for s in here if not s.paper]
            for k, system in enumerate(own):
                d.text(x + 161, y + 30 + 24 * k, f"{system.name} ({system.year})", 17, bold=True)
            top = y + 34 + 24 * len(own)
            for k, system in enumerate(others):
                d.text(x + 84 + 158 * (k % 2), top + 14 + 23 * (k // 2), f"{system.name} ({system.year})", 14)
    for row, words in enumerate(
        (("learns", "from good", "images"), ("learns", "from good", "images and", "painted", "damage"))
    ):
        for k, line in enumerate(words):
            d.text(92, 112 + 146 * row + 19 * k, line, 15, anchor="end", bold=True)
    quarters = [(compares, learns) for compares in (PIXELS, FEATURES) for learns in (GOOD, PAINTED)]
    alt = "A table of two columns and two rows. " + " ".join(
        f"{a.capitalize()}, {b}: {', '.join(s.name for s in systems if (s.compares, s.learns) == (a, b))}."
        for a, b in quarters
    )
    return d.show(alt, "The field on one map. The four papers of this book are in bold.")


def timeline(systems: Sequence[System]) -> HTML:
    """When the systems of the field were published, in two rows: what they compare."""
    years = range(min(s.year for s in systems), max(s.year for s in systems) + 1)
    step = 690 / len(years)
    d = Drawing(760, 190)
    d.parts.append('<path d="M40 85H755M40 107H755" stroke="currentColor" stroke-width="0.7"/>')
    for i, year in enumerate(years):
        x = 60 + step * (i + 0.5)
        d.text(x, 101, str(year), 14, bold=True)
        for compares, way, first in ((PIXELS, -1, 78), (FEATURES, 1, 124)):
            for k, s in enumerate([s for s in systems if (s.year, s.compares) == (year, compares)]):
                d.text(x, first + way * 20 * k, s.name, 13, bold=bool(s.paper))
    d.text(40, 46, PIXELS, 14, anchor="start", bold=True)
    d.text(40, 128, FEATURES, 14, anchor="start", bold=True)
    known = sorted({s.year for s in systems})
    alt = "A time line. " + " ".join(
        f"{year}: {', '.join(s.name for s in systems if s.year == year)}." for year in known
    )
    return d.show(
        alt,
        "The same systems in time. Above the years: those that compare pixels; below: features. Bold: the four papers.",
    )


def dot_table(rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> Figure:
    """Which of the `columns` each row holds, as dots."""
    fig, axis = plt.subplots(figsize=(WIDTH, 0.32 * len(rows) + 1.0), layout="constrained")
    for y, held in enumerate(rows.values()):
        places = [columns.index(name) for name in held]
        axis.plot(places, [y] * len(places), "o", color=BLUE, ms=8)
    axis.set_xticks(range(len(columns)), columns, rotation=50, ha="left", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.grid(color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    return fig
