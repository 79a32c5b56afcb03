"""Figures of the foundations: each shows one tensor of a page as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from vitad.show.plots import HEAT, Limits, outline, show

BLUE, RED = "#4477aa", "#ee6677"
WIDTH = 7.2  # inches; the column of a page
MARK = "#00e5ff"


def style() -> None:
    """One look for the figures of a notebook: sharp on any screen, no frame that says nothing."""
    plt.rcParams.update(
        {
            "figure.dpi": 170,
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )


def blank(axis: Axes) -> None:
    """An axis without ticks and frame."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def patches(image: ArrayLike, patch: int, chosen: Sequence[int]) -> Figure:
    """An image (3,H,W) with its grid of patches; the chosen ones, counted row by row, are marked and shown enlarged."""
    picture = np.asarray(image)
    H, W = picture.shape[-2:]
    fig = plt.figure(figsize=(WIDTH, 3.4), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[1.15, 1])
    axis = left.subplots()
    show(axis, picture)
    for line in range(0, H + 1, patch):
        axis.axhline(line - 0.5, color="white", lw=0.4, alpha=0.7)
    for line in range(0, W + 1, patch):
        axis.axvline(line - 0.5, color="white", lw=0.4, alpha=0.7)
    axis.set_title(f"{H // patch} × {W // patch} patches of {patch} px")
    blank(axis)
    axes = right.subplots(2, -(-len(chosen) // 2), squeeze=False)
    for k, (small, number) in enumerate(zip(axes.flat, chosen, strict=True)):
        top, start = divmod(number, W // patch)
        mark(axis, number, W // patch, patch, str("abcd"[k]))
        show(small, picture[:, top * patch : (top + 1) * patch, start * patch : (start + 1) * patch])
        small.set_title(f"{'abcd'[k]}: patch {number}")
        blank(small)
    return fig


def mark(axis: Axes, number: int, columns: int, patch: float = 1, name: str = "") -> None:
    """Frame one patch, counted row by row, on a picture whose patches are `patch` wide."""
    row, column = divmod(number, columns)
    corner = (column * patch - 0.5, row * patch - 0.5)
    axis.add_patch(Rectangle(corner, patch, patch, fill=False, color="black", lw=2.6))
    axis.add_patch(Rectangle(corner, patch, patch, fill=False, color=MARK, lw=1.4))
    if name:
        look: dict[str, Any] = dict(
            color="black", fontsize=8, va="center", bbox=dict(boxstyle="round,pad=0.1", fc=MARK, ec="none")
        )
        axis.text(corner[0] + patch * 1.25, corner[1], name, **look)


def matrix(values: ArrayLike, xlabel: str, ylabel: str, title: str = "", limit: float | None = None) -> Figure:
    """A matrix as a picture: blue below zero, red above, white at zero."""
    shown = np.asarray(values)
    limit = limit or float(np.percentile(np.abs(shown), 99))
    fig, axis = plt.subplots(figsize=(WIDTH, 2.9), layout="constrained")
    drawn = axis.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    fig.colorbar(drawn, ax=axis, extend="both")
    return fig


def filters(weights: ArrayLike, columns: int = 12) -> Figure:
    """Rows of a patch embedding (n,3,P,P) as small colour pictures, each stretched to the range of colours."""
    rows = np.asarray(weights)
    fig, axes = plt.subplots(len(rows) // columns, columns, figsize=(WIDTH, 0.64 * len(rows) / columns))
    fig.subplots_adjust(0, 0, 1, 1, 0.08, 0.08)
    for axis, row in zip(axes.flat, rows, strict=True):
        top = np.abs(row).max()
        axis.imshow((0.5 + row / (2 * top)).transpose(1, 2, 0))
        blank(axis)
    return fig


def maps(
    panels: Mapping[str, ArrayLike],
    columns: int = 6,
    image: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    marked: Sequence[int | None] | int | None = None,
    grid: int | None = None,
    limits: Limits | None = None,
    cmap: str = HEAT,
    bar: str = "",
    width: float = WIDTH,
) -> Figure:
    """Small maps (g,g) or pictures (H,W,3), `columns` in a row.

    Parameters
    ----------
    panels
        {title: map}.
    columns
        Panels in a row.
    image, mask
        An image (3,H,W) as the first panel, with the outline of its mask.
    marked
        The patch that is framed: one for all panels, or one for each.
    grid
        Patches in a row of the image, to frame one in it.
    limits
        Of one colour scale for all maps, with a colour bar; without it each map has its own range.
    cmap, bar
        Colours, and what the colour bar shows.
    width
        Of the figure, in inches.
    """
    count = len(panels) + (image is not None)
    rows, columns = -(-count // columns), min(columns, count)
    side = width / columns
    bar_height = 0.6 if limits and rows == 1 else 0.1
    fig, axes = plt.subplots(
        rows, columns, figsize=(width, rows * (side + 0.2) + bar_height), layout="constrained", squeeze=False
    )
    cells = list(axes.flat)
    for axis in cells:
        blank(axis)
    if image is not None:
        axis = cells.pop(0)
        show(axis, image, mask)
        axis.set_title("image")
        if isinstance(marked, int) and grid:
            mark(axis, marked, grid, np.asarray(image).shape[-1] / grid)
    places = marked if isinstance(marked, Sequence) else [marked] * len(panels)
    drawn = None
    for axis, (title, values), place in zip(cells, panels.items(), places, strict=False):
        low, high = limits or (None, None)
        drawn = axis.imshow(np.asarray(values), cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
        axis.set_title(title)
        if place is not None:
            mark(axis, place, np.asarray(values).shape[1])
    for axis in cells[len(panels) :]:
        axis.set_visible(False)
    if limits and drawn is not None:
        fig.colorbar(drawn, ax=axes, label=bar, shrink=0.8, aspect=30, location="bottom" if rows == 1 else "right")
    return fig


def over_image(
    images: np.ndarray, heat: np.ndarray, masks: np.ndarray | None, titles: Sequence[str], bar: str, limits: Limits
) -> Figure:
    """Images (n,3,H,W) above their maps (n,g,g) on one colour scale; the true outline on both."""
    n, H, W = len(images), *images.shape[-2:]
    fig, axes = plt.subplots(2, n, figsize=(WIDTH, 2 * (WIDTH - 0.8) / n + 0.3), layout="constrained", squeeze=False)
    for j, title in enumerate(titles):
        mask = None if masks is None else masks[j]
        show(axes[0, j], images[j], mask)
        axes[0, j].set_title(title)
        extent = (-0.5, W - 0.5, H - 0.5, -0.5)
        drawn = axes[1, j].imshow(heat[j], HEAT, vmin=limits[0], vmax=limits[1], extent=extent)
        outline(axes[1, j], mask, "white", 0.7)
    for axis in axes.flat:
        blank(axis)
    fig.colorbar(drawn, ax=axes[1], label=bar, shrink=0.9, aspect=25)
    return fig


def reach(distances: ArrayLike, everywhere: float) -> Figure:
    """Mean distance (blocks, heads) that attention bridges, one dot a head, beside looking everywhere alike."""
    values = np.asarray(distances)
    fig, axis = plt.subplots(figsize=(WIDTH, 2.5), layout="constrained")
    for block, heads in enumerate(values, 1):
        axis.plot([block] * len(heads), heads, "o", color=BLUE, alpha=0.7, ms=5, mew=0)
    axis.axhline(everywhere, color="#555555", lw=1, ls="--")
    axis.annotate("everywhere\nalike", (1, everywhere), (6, 0), ("axes fraction", "data"), "offset points", va="center")
    axis.set(xlabel="block", ylabel="mean distance (patches)", xticks=range(1, len(values) + 1))
    axis.set_ylim(0, 1.1 * max(everywhere, values.max()))
    return fig


def rebuilt(
    rows: Mapping[str, np.ndarray],
    titles: Sequence[str],
    masks: np.ndarray | None = None,
    limits: Limits | Mapping[str, Limits] | None = (0.0, 0.05),
    bar: str = "squared error",
) -> Figure:
    """Rows of pictures (n,3,H,W) and of maps (n,h,w), one column an image.

    All maps share one colour scale, or each row has its own: `limits` is then {row: (low, high)}, or None for the
    lowest value and the highest but for 0.2 %.
    """
    if limits is None:
        limits = {name: (v.min(), float(np.quantile(v, 0.998))) for name, v in rows.items() if v.ndim == 3}
    n = len(titles)
    side = (WIDTH - 0.8) / n
    fig, axes = plt.subplots(len(rows), n, figsize=(WIDTH, len(rows) * side + 0.3), layout="constrained", squeeze=False)
    drawn = None
    for i, (name, values) in enumerate(rows.items()):
        for j in range(n):
            axis, mask = axes[i, j], None if masks is None else masks[j]
            H, W = values.shape[-2:] if mask is None else mask.shape
            if values.ndim == 4:
                show(axis, values[j].clip(0, 1), mask if i == 0 else None)
            else:
                low, high = limits[name] if isinstance(limits, Mapping) else limits
                extent = (-0.5, W - 0.5, H - 0.5, -0.5)  # a map may be smaller than its image
                drawn = axis.imshow(values[j], HEAT, vmin=low, vmax=high, extent=extent)
                outline(axis, mask, "white", 0.7)
            blank(axis)
        axes[i, 0].set_ylabel(name)
        if drawn is not None and isinstance(limits, Mapping):
            fig.colorbar(drawn, ax=axes[i], shrink=0.9, aspect=12, extend="max")
            drawn = None
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    if drawn is not None:
        fig.colorbar(drawn, ax=axes, label=bar, shrink=0.5, aspect=30, extend="max")
    return fig


def against(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, log: bool = False
) -> Figure:
    """Curves over the same values, each named at its right end."""
    fig, axis = plt.subplots(figsize=(WIDTH, 2.8), layout="constrained")
    for (name, values), colour, marker in zip(curves.items(), (BLUE, RED, "#228833", "#555555"), "os^d", strict=False):
        axis.plot(x, values, marker + "-", color=colour, ms=5, label=name)
    if log:
        axis.set_xscale("log")
    axis.set_xticks(list(x), [f"{v:g}" for v in x])
    axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def answers(queries: np.ndarray, items: np.ndarray, weights: np.ndarray, names: Sequence[str]) -> Figure:
    """What a memory answers: a row for each query (n,3,P,P), beside it its items as patches (n,k,3,P,P), with weights.

    weights (n,k) stand above the items.
    """
    n, k = weights.shape
    side = WIDTH / (k + 1)
    fig, axes = plt.subplots(n, k + 1, figsize=(WIDTH, n * (side + 0.2) + 0.2), layout="constrained", squeeze=False)
    for i, row in enumerate(axes):
        show(row[0], queries[i])
        row[0].set_ylabel(names[i])
        for axis, item, weight in zip(row[1:], items[i], weights[i], strict=True):
            show(axis, item)
            axis.set_title(f"{weight:.1%}")
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=True, color="#bbbbbb")
    axes[0, 0].set_title("patch")
    return fig


def strips(
    images: np.ndarray, rows: np.ndarray, columns: np.ndarray, masks: np.ndarray | None, titles: Sequence[str]
) -> Figure:
    """Images (n,3,S,S) with a weight for each row (n,g) at their right and for each column (n,g) below."""
    n, S = len(images), images.shape[-1]
    fig, axes = plt.subplots(1, n, figsize=(WIDTH, WIDTH / n + 0.5), layout="constrained", squeeze=False)
    gap, wide = 0.02 * S, 0.14 * S
    scale: dict[str, Any] = dict(
        vmin=min(rows.min(), columns.min()), vmax=max(rows.max(), columns.max()), cmap="viridis", aspect="auto"
    )
    for j, axis in enumerate(axes[0]):
        show(axis, images[j], None if masks is None else masks[j])
        axis.imshow(rows[j][:, None], extent=(S + gap, S + wide, S, 0), **scale)
        drawn = axis.imshow(columns[j][None], extent=(0, S, S + wide, S + gap), **scale)
        axis.set(xlim=(0, S + wide), ylim=(S + wide, 0), aspect="equal", title=titles[j])
        blank(axis)
    fig.colorbar(drawn, ax=axes, label="weight, mean over channels", shrink=0.6, aspect=30, location="bottom")
    return fig


def differences(found: pd.DataFrame) -> Figure:
    """Differences with their intervals, one panel a metric, from `vitad.evidence.contrasts`.

    Coloured: the interval excludes 0. Full dots: so it does after the correction. Crosses: printed differences.
    """
    rows = list(dict.fromkeys(found.index.get_level_values("contrast")))
    metrics = list(dict.fromkeys(found.dropna(subset="difference").index.get_level_values("metric")))
    fig, axes = plt.subplots(
        1, len(metrics), figsize=(WIDTH, 0.26 * len(rows) + 0.8), sharey=True, layout="constrained", squeeze=False
    )
    for axis, metric in zip(axes[0], metrics, strict=True):
        axis.axvline(0, color="#555555", lw=1, ls="--")
        for y, row in enumerate(rows):
            step = found.loc[(row, metric)]
            if np.isnan(step["difference"]):
                continue
            colour = BLUE if step["low"] > 0 or step["high"] < 0 else "#999999"
            inside = "white" if step["verdict"] == "undecided" else colour
            axis.hlines(y, step["low"], step["high"], color=colour, lw=2)
            axis.plot(step["difference"], y, "o", color=colour, mfc=inside, ms=5)
            axis.plot(step.get("printed", np.nan), y, "x", color=RED, ms=6)
        axis.set_title(metric)
        axis.tick_params(axis="x", labelsize=7)
        axis.locator_params(axis="x", nbins=3)
    axes[0, 0].set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
    return fig


def parts_of_a_sum(
    images: np.ndarray, masks: np.ndarray, parts: Mapping[str, np.ndarray], titles: Sequence[str], bar: str
) -> Figure:
    """Images (n,3,H,W), one a row, beside the parts (n,H,W) of a sum: blue lowers it, red raises it, on one scale.

    Each picture of a part counts from its own median.
    """
    n, columns = len(images), 1 + len(parts)
    side = (WIDTH - 0.7) / columns
    fig, axes = plt.subplots(n, columns, figsize=(WIDTH, n * side + 0.3), layout="constrained", squeeze=False)
    centred = {name: v - np.median(v, axis=(1, 2), keepdims=True) for name, v in parts.items()}
    limit = float(np.percentile(np.abs(np.stack(list(centred.values()))), 99.5))
    for j, title in enumerate(titles):
        show(axes[j, 0], images[j], masks[j])
        axes[j, 0].set_ylabel(title)
        for axis, (name, values) in zip(axes[j, 1:], centred.items(), strict=True):
            drawn = axis.imshow(values[j], "RdBu_r", vmin=-limit, vmax=limit)
            outline(axis, masks[j], "black", 0.6)
            axis.set_title(name if j == 0 else "")
    for axis in axes.flat:
        blank(axis)
    axes[0, 0].set_title("image")
    fig.colorbar(drawn, ax=axes, label=bar, shrink=0.6, aspect=30, extend="both")
    return fig


def histograms(values: Mapping[str, Sequence[float]], xlabel: str, limits: Limits, ylabel: str = "images") -> Figure:
    """Two sets of values as histograms over each other."""
    fig, axis = plt.subplots(figsize=(WIDTH, 2.4), layout="constrained")
    for (name, numbers), colour in zip(values.items(), (BLUE, RED), strict=True):
        axis.hist(numbers, np.linspace(*limits, 31), label=name, color=colour, alpha=0.75)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def arrows(noise: ArrayLike, angles: np.ndarray) -> Figure:
    """Perlin noise (S,S), and the directions (c + 1, c + 1) of the arrows at the points of its lattice."""
    values = np.asarray(noise)
    points = np.linspace(0, len(values), len(angles))
    fig, axis = plt.subplots(figsize=(4.4, 3.7), layout="constrained")
    drawn = axis.imshow(values, "RdBu_r", vmin=-1, vmax=1)
    for line in points:
        axis.axhline(line - 0.5, color="black", lw=0.4, alpha=0.5)
        axis.axvline(line - 0.5, color="black", lw=0.4, alpha=0.5)
    margin, length = 0.1 * len(values), 0.5 * points[1]
    for (i, j), angle in np.ndenumerate(angles):
        start = points[j], points[i]
        end = start[0] + length * np.cos(angle), start[1] + length * np.sin(angle)
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "lw": 1.4}, annotation_clip=False)
    axis.set(xlim=(-margin, len(values) + margin), ylim=(len(values) + margin, -margin))
    blank(axis)
    fig.colorbar(drawn, ax=axis, label="noise")
    return fig
