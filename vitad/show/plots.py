"""Figures of the book. Every function draws from the data that it is given and returns the matplotlib figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from vitad.files import atomic_write

HEAT = "inferno"
Limits = tuple[float, float]  # of a colour scale
OUTLINE = "#00c2a8"  # ground truth; told apart from the heat scale by colour-blind readers too


def examples(
    labels: ArrayLike, defects: ArrayLike, per_kind: int = 1, good: int = 1, order: ArrayLike | None = None
) -> list[int]:
    """Indices of a few images: `good` normal ones, then `per_kind` of each kind of defect.

    `order` (scores, say) ranks within a kind, and picks are spread evenly over that ranking, so that the
    figure shows easy and hard cases alike; without it the first ones are taken.
    """
    labels, defects = np.asarray(labels), np.asarray(defects)
    picked: list[int] = []
    for kind in ["good", *sorted(set(defects[labels == 1]))]:
        members = np.flatnonzero(defects == kind)
        if order is not None:
            members = members[np.argsort(np.asarray(order)[members], kind="stable")]
        wanted = min(good if kind == "good" else per_kind, len(members))
        if order is not None:
            members = members[[int((k + 0.5) * len(members) / wanted) for k in range(wanted)]]
        picked += members[:wanted].tolist()
    return picked


def heat_range(maps: ArrayLike) -> Limits:
    """(low, high) of one colour scale for a whole test set: median of the pixels, 99.8th percentile."""
    pixels = np.asarray(maps, np.float32)
    low, high = np.percentile(pixels[:: max(1, len(pixels) // 100)], (50, 99.8))
    return float(low), float(max(high, low + 1e-9))


def heatmap_grid(
    images: np.ndarray,
    masks: np.ndarray | None,
    maps: np.ndarray | Mapping[str, np.ndarray],
    titles: Sequence[str],
    limits: Limits | Mapping[str, Limits | None] | None = None,
    width: float = 8.0,
) -> Figure:
    """Images with the true defect outlined above their anomaly maps, one column an image.

    images (n,3,H,W) in [0,1], masks (n,H,W) bool or None, maps (n,H,W) or {method: (n,H,W)}; `limits` is the
    colour scale (low, high) or {method: (low, high)}, one for all columns, so that columns can be compared. Maps may
    have another size than the images.
    """
    maps = {"anomaly map": maps} if isinstance(maps, np.ndarray) else dict(maps)
    limits = dict(limits) if isinstance(limits, Mapping) else {name: limits for name in maps}
    n = len(images)
    fig, axes = _grid(1 + len(maps), n, width)
    for j in range(n):
        show(axes[0, j], images[j], None if masks is None else masks[j])
        axes[0, j].set_title(titles[j], fontsize=8)
        for i, (name, stack) in enumerate(maps.items(), 1):
            low, high = limits[name] or heat_range(stack)
            H, W = images[j].shape[-2:]  # a map of another size is stretched over its image
            axes[i, j].imshow(stack[j], cmap=HEAT, vmin=low, vmax=high, extent=(-0.5, W - 0.5, H - 0.5, -0.5))
            outline(axes[i, j], None if masks is None else masks[j], "white", 0.6)
    for i, name in enumerate(["image", *maps]):
        axes[i, 0].set_ylabel(name, fontsize=8)
    return fig


def picture_rows(rows: Mapping[str, Callable[[Axes, int], None]], titles: Sequence[str], width: float = 6.4) -> Figure:
    """One row of pictures for each name, one column for each title: {name: draw(axis, j)}."""
    fig, axes = _grid(len(rows), len(titles), width)
    for i, (name, draw) in enumerate(rows.items()):
        for j in range(len(titles)):
            draw(axes[i, j], j)
        axes[i, 0].set_ylabel(name, fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    return fig


def contact_sheet(
    images: np.ndarray, masks: np.ndarray | None, titles: Sequence[str], columns: int = 8, width: float = 8.0
) -> Figure:
    """A sheet of images (n,3,H,W) with the true defects outlined."""
    rows = -(-len(images) // columns)
    fig, axes = _grid(rows, min(columns, len(images)), width)
    for k, axis in enumerate(axes.flat):
        if k < len(images):
            show(axis, images[k], None if masks is None else masks[k])
            axis.set_title(titles[k], fontsize=7)
        else:
            axis.set_visible(False)
    return fig


def training_curve(history: Sequence[Mapping[str, Any]], width: float = 6.0) -> Figure:
    """Mean loss an epoch, from the rows that `training.train` returns; validation dashed."""
    fig, axis = plt.subplots(figsize=(width, 2.8), layout="constrained")
    skip = {"phase", "epoch", "seconds"}
    for name in dict.fromkeys(k for row in history for k in row if k not in skip):
        epochs, values = zip(*((n, row[name]) for n, row in enumerate(history, 1) if name in row), strict=True)
        axis.plot(epochs, values, "--" if name == "val" else "-", label=name)
    axis.set(xlabel="epoch", ylabel="loss", yscale="log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves
    axis.spines[["top", "right"]].set_visible(False)
    return fig


def score_histogram(scores: ArrayLike, labels: ArrayLike, width: float = 6.0) -> Figure:
    """Image scores of good and defective images over each other."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    fig, axis = plt.subplots(figsize=(width, 2.4), layout="constrained")
    bins = np.linspace(scores.min(), scores.max(), 30)
    axis.hist(scores[labels == 0], bins, label="good", color="#4477aa", alpha=0.75)
    axis.hist(scores[labels == 1], bins, label="defective", color="#ee6677", alpha=0.75)
    axis.set(xlabel="image score", ylabel="images")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return fig


def dots(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    one_scale: bool = False,
    width: float = 7.0,
) -> Figure:
    """Metrics of several runs as dots, their means as bars, one panel a metric.

    Parameters
    ----------
    panels
        {metric: {row: values}}; `vitad.show.tables.panels` makes them of records. The first panel of a line names the
        rows, from the bottom up. Four panels or more stand in pairs.
    intervals
        {metric: {row: (low, high)}}, drawn as lines.
    one_scale
        The panels show the same metric.
    width
        Of the figure, in inches.
    """
    rows = list(next(iter(panels.values())))
    columns = len(panels) if len(panels) < 4 else 2
    lines = -(-len(panels) // columns)
    fig = plt.figure(figsize=(width, lines * (0.6 + 0.3 * len(rows))), layout="constrained")
    fig.get_layout_engine().set(hspace=0.08)  # a title is nearer to its panel than to the one above
    axes = fig.subplots(lines, columns, sharex=one_scale, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        for y, row in enumerate(rows):
            if intervals and row in intervals[title]:
                axis.hlines(y, *intervals[title][row], color="#bbbbbb", lw=2)
            if panel[row]:
                axis.plot(panel[row], [y] * len(panel[row]), "o", color="#4477aa", alpha=0.5, ms=5, mew=0)
                axis.plot(np.mean(panel[row]), y, "|", color="#222222", ms=13, mew=1.5)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color="#eeeeee")
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0, 0].set(yticks=range(len(rows)), yticklabels=rows, ylim=(-0.6, len(rows) - 0.4))
    return fig


def principal_components(tokens: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Tokens (B,N,D) as colour pictures (B,g,g,3) in [0,1]: their first three principal components.

    The components are common to the batch, so equal colours mean similar patches across its images.
    """
    B, N, D = tokens.shape
    flat = tokens.reshape(B * N, D).float().cpu().numpy()
    flat = flat - flat.mean(0)
    _, _, axes = np.linalg.svd(flat, full_matrices=False)
    axes = axes[:3] * np.sign(axes[:3].sum(1, keepdims=True))  # a sign convention: the same picture everywhere
    projected = flat @ axes.T
    low, high = np.percentile(projected, (1, 99), axis=0)
    return ((projected - low) / (high - low)).clip(0, 1).reshape(B, *grid, 3)


def show(axis: Axes, image: ArrayLike, mask: ArrayLike | None = None) -> None:
    """Draw an image (3,H,W) in [0,1] and the outline of its mask (H,W)."""
    axis.imshow(np.asarray(image).transpose(1, 2, 0))
    outline(axis, mask, OUTLINE, 1.0)


def outline(axis: Axes, mask: ArrayLike | None, colour: str, width: float) -> None:
    """Draw the border of a mask (H,W), if it has one."""
    mask = None if mask is None else np.asarray(mask)
    if mask is not None and mask.any() and not mask.all():
        axis.contour(mask, [0.5], colors=[colour], linewidths=width)


def save(fig: Figure, path: str | Path, dpi: int = 100) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    with atomic_write(path) as temporary:
        fig.savefig(temporary, format="png", dpi=dpi)
    plt.close(fig)


def _grid(rows: int, columns: int, width: float) -> tuple[Figure, np.ndarray]:
    """Axes (rows, columns) without ticks, squares of equal size."""
    side = width / max(columns, 1)
    fig: Figure = plt.figure(figsize=(width, rows * side + 0.25), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.xaxis.set_visible(False)  # the same picture, laid out and drawn in less time
        for spine in axis.spines.values():
            spine.set_visible(False)
    for axis in axes[:, 1:].flat:
        axis.yaxis.set_visible(False)  # the first column has labels
    return fig, axes
