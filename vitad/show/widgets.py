"""Interactive parts of the notebooks.

Everything that a widget can show is computed when the notebook runs and stored with it, and a link between two
properties in the browser chooses what is seen. So it also works in the published page, where there is no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets
import numpy as np
from numpy.typing import ArrayLike


def slider_over(
    frames: Sequence[str | widgets.Widget], labels: Sequence[str], description: str, start: int = 0
) -> widgets.VBox:
    """A slider that chooses among HTML texts, or among further widgets, such as sliders.

    Parameters
    ----------
    frames
        HTML or widget of each position.
    labels
        Name of each position; shown in the frame's first line.
    description
        Name of the slider.
    start
        Position that is shown first.
    """
    wide = widgets.Layout(width="100%", max_width="560px")
    slider = widgets.IntSlider(
        value=start,
        min=0,
        max=len(frames) - 1,
        description=description,
        readout=False,
        layout=wide,
    )
    children = []
    for label, frame in zip(labels, frames, strict=True):
        if isinstance(frame, widgets.Widget):
            children.append(widgets.VBox([widgets.HTML(f"<b>{label}</b>"), frame], layout=wide))
        else:
            children.append(widgets.HTML(f"<b>{label}</b><br>{frame}", layout=wide))
    stack = widgets.Stack(children=children, selected_index=start, layout=wide)
    widgets.jslink((slider, "value"), (stack, "selected_index"))
    return widgets.VBox([slider, stack])


def bars(heights: Sequence[float], label: str) -> str:
    """SVG of non-negative numbers as bars, for the frames of a slider; the axis names the largest."""
    step, top = 450 / len(heights), max(heights) or 1
    path = "".join(f"M{40 + i * step:.1f} 100v-{90 * h / top:.1f}h{0.8 * step:.1f}V100z" for i, h in enumerate(heights))
    return (
        f'<svg viewBox="0 0 500 112" style="width:100%;max-width:560px" role="img" aria-label="{label}">'
        f'<path d="{path}" fill="#4477aa"/><path d="M40 100H490" stroke="currentColor" stroke-width="0.5"/>'
        f'<g font-size="10" fill="currentColor" text-anchor="end"><text x="36" y="103">0</text>'
        f'<text x="36" y="15">{top:.2g}</text></g></svg>'
    )


def threshold_explorer(scores: ArrayLike, labels: ArrayLike, steps: int = 41) -> widgets.VBox:
    """Slider over the threshold on the image score: which good images raise an alarm, which defects are missed.

    scores (N,), labels (N,) with 1 = defective. An image at or above the threshold is called defective.
    """
    scores, labels = np.asarray(scores, float), np.asarray(labels)
    thresholds = np.linspace(scores.min(), scores.max(), steps)
    frames = [_confusion(scores, labels, t) for t in thresholds]
    names = [f"threshold {t:.3g}" for t in thresholds]
    return slider_over(frames, names, "threshold", start=int(np.searchsorted(thresholds, np.median(scores))))


def _confusion(scores: np.ndarray, labels: np.ndarray, threshold: float) -> str:
    alarm = scores >= threshold
    cells = [[int(((labels == truth) & (alarm == said)).sum()) for said in (True, False)] for truth in (1, 0)]
    (hit, missed), (false_alarm, passed) = cells
    low, high = scores.min(), scores.max()

    def x(value: float) -> float:
        return 80 + 410 * (value - low) / (high - low or 1)  # right of the words

    dots = "".join(
        f'<circle cx="{x(s):.1f}" cy="{34 if label else 74}" r="5" fill="{"#ee6677" if label else "#4477aa"}" '
        f'fill-opacity="0.45"/>'
        for s, label in zip(scores, labels, strict=True)
    )
    row = '<tr><td style="padding:2px 14px 2px 0">{}</td><td style="padding:2px 14px">{}</td><td>{}</td></tr>'
    return (
        '<svg viewBox="0 0 500 100" style="width:100%;max-width:560px" role="img" aria-label="image scores">'
        '<g font-size="11" fill="currentColor"><text x="10" y="38">defective</text><text x="10" y="78">good</text></g>'
        f'{dots}<line x1="{x(threshold):.1f}" x2="{x(threshold):.1f}" y1="4" y2="96" stroke="currentColor" '
        'stroke-width="2" stroke-dasharray="4 3"/></svg>'
        "<table>"
        + row.format("", "called defective", "called good")
        + row.format("defective images", f"<b>{hit}</b>", f"{missed} missed")
        + row.format("good images", f"{false_alarm} false alarm{'s' * (false_alarm != 1)}", f"<b>{passed}</b>")
        + "</table>"
    )
