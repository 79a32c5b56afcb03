"""A figure that the reader moves: all is computed here, and a short script in the page chooses what is seen."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import label

from vitad.metrics import EIGHT_CONNECTED

if TYPE_CHECKING:
    from IPython.display import HTML

STEPS = 100
COLOURS = {"found": "#0072b2", "missed": "#f0a078", "false alarm": "#e0c020"}
CURVES = {
    "ROC": ("false-positive rate", "recall"),
    "PR": ("recall", "precision"),
    "PRO": ("false-positive rate", "mean overlap"),
}


def rates(scores: ArrayLike, mask: ArrayLike, thresholds: ArrayLike) -> dict[str, np.ndarray]:
    """What each threshold does to one map.

    Parameters
    ----------
    scores, mask
        A map (H,W), and its mask with at least one anomalous and one good pixel.
    thresholds
        From this score on a pixel is called anomalous.

    Returns
    -------
    dict
        `false-positive rate`, `recall`, `precision` and `mean overlap` of the regions, one value for each threshold.
        Precision is 1 where nothing is called anomalous.
    """
    scores, mask, steps = np.asarray(scores), np.asarray(mask, bool), np.asarray(thresholds)
    regions, count = label(mask, EIGHT_CONNECTED)
    called = scores[None] >= steps[:, None, None]  # (T,H,W)
    found, alarms = called[:, mask].sum(1), called[:, ~mask].sum(1)
    overlaps = [called[:, regions == k].mean(1) for k in range(1, count + 1)]
    return {
        "false-positive rate": alarms / (~mask).sum(),
        "recall": found / mask.sum(),
        "precision": np.where(found + alarms > 0, found / np.maximum(found + alarms, 1), 1.0),
        "mean overlap": np.mean(overlaps, axis=0),
    }


def thresholds_of(scores: ArrayLike, mask: ArrayLike, steps: int = STEPS) -> np.ndarray:
    """Thresholds from above the highest score down to the lowest, close together where few good pixels pass."""
    background = np.asarray(scores)[~np.asarray(mask, bool)]
    shares = np.linspace(0, 1, steps - 1) ** 2  # false-positive rates
    above = np.max(np.asarray(scores)) + 1e-6
    return np.concatenate([[above], np.quantile(background, 1 - shares)])


def one_map(scores: ArrayLike, mask: ArrayLike, image: ArrayLike, name: str, limit: float = 0.3) -> HTML:
    """A slider over the threshold of one map (H,W): the picture, and the point on the ROC, the PR and the PRO curve.

    `image` (H,W) in 0..1 lies below the colours, `name` is that of the detector, `limit` that of PRO.
    """
    from IPython.display import HTML

    scores, mask = np.asarray(scores), np.asarray(mask, bool)
    thresholds = thresholds_of(scores, mask)
    curves = rates(scores, mask, thresholds)
    first = (scores[None] < thresholds[:, None, None]).sum(0)  # step from which a pixel is called anomalous
    H, W = scores.shape
    data = {
        "H": H,
        "W": W,
        "t": np.round(thresholds, 2).tolist(),
        "rates": {key: np.round(values, 4).tolist() for key, values in curves.items()},
        "first": _bytes(first),
        "mask": _bytes(mask),
        "grey": _bytes(255 * np.clip(np.asarray(image), 0, 1)),
        "axes": {key: list(axes) for key, axes in CURVES.items()},
    }
    start = int(np.searchsorted(curves["false-positive rate"], 0.05))
    key = "live-" + "".join(c for c in name if c.isalnum())
    plots = "".join(_plot(key, title, curves, limit) for title in CURVES)
    legend = "".join(
        f'<span style="white-space:nowrap;margin-right:1em"><span style="display:inline-block;width:0.9em;height:0.9em;'
        f'background:{colour};margin-right:0.3em"></span>{words}</span>'
        for words, colour in COLOURS.items()
    )
    markup = f"""<div id="{key}" style="max-width:760px;margin:1em 0">
<label for="{key}-slider"><b>{name}</b>: threshold, from high to low</label>
<input id="{key}-slider" type="range" min="0" max="{len(thresholds) - 1}" value="{start}" style="width:100%">
<div id="{key}-words" aria-live="polite" style="min-height:3em"></div>
<div style="display:flex;flex-wrap:wrap;gap:12px;align-items:flex-start">
<div style="flex:1 1 140px;max-width:200px"><canvas id="{key}-map" width="{W}" height="{H}" role="img"
 aria-label="the map of the detector {name} above the threshold: found, missed and false alarms"
 style="width:100%;image-rendering:pixelated;border:1px solid currentColor"></canvas>
<div style="font-size:0.8em">{legend}</div></div>{plots}</div></div>"""
    return HTML(markup + f"<script>{_script(key, data)}</script>")


def _bytes(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(np.uint8).tobytes()).decode()


def _plot(key: str, title: str, curves: dict[str, np.ndarray], limit: float) -> str:
    """SVG of one curve with its point; the unit square lies at (34, 18), 120 wide."""
    across, up = CURVES[title]
    points = " ".join(
        f"{34 + 120 * a:.1f},{138 - 120 * b:.1f}" for a, b in zip(curves[across], curves[up], strict=True)
    )
    line = f'<path d="M{34 + 120 * limit:.1f} 18V138" stroke="currentColor" stroke-dasharray="3 3"/>' * (title == "PRO")
    return (
        f'<svg viewBox="0 0 160 172" style="flex:1 1 140px;max-width:200px" role="img" fill="currentColor" '
        f'aria-label="{title} curve: {up} against {across}, with the point of the threshold">'
        f'<text x="94" y="12" font-size="12" text-anchor="middle" font-weight="bold">{title}</text>'
        f'<path d="M34 18V138H154" fill="none" stroke="currentColor"/>{line}'
        f'<polyline points="{points}" fill="none" stroke="#3388cc" stroke-width="2"/>'
        f'<circle id="{key}-{title}" r="5" fill="#d55e00"/><g font-size="10">'
        '<text x="30" y="24" text-anchor="end">1</text><text x="30" y="141" text-anchor="end">0</text>'
        f'<text x="154" y="150" text-anchor="end">1</text><text x="94" y="164" text-anchor="middle">{across}</text>'
        f'<text transform="translate(12 78) rotate(-90)" text-anchor="middle">{up}</text></g></svg>'
    )


def _script(key: str, data: dict) -> str:
    rgb = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS.values()]
    return (
        "(function(){"
        f"const d={json.dumps(data)},rgb={json.dumps(rgb)},at=n=>document.getElementById('{key}-'+n);"
        """
const raw=s=>Uint8Array.from(atob(s),c=>c.charCodeAt(0));
const first=raw(d.first),mask=raw(d.mask),grey=raw(d.grey),pen=at('map').getContext('2d');
const picture=pen.createImageData(d.W,d.H),share=x=>(100*x).toFixed(x<0.1?1:0)+'\u00a0%';
function draw(){
  const k=+at('slider').value;
  for(let i=0;i<first.length;i++){
    const called=first[i]<=k,c=mask[i]?rgb[called?0:1]:called?rgb[2]:[grey[i],grey[i],grey[i]];
    for(let j=0;j<3;j++)picture.data[4*i+j]=c[j];
    picture.data[4*i+3]=255;
  }
  pen.putImageData(picture,0,0);
  for(const [name,[a,b]] of Object.entries(d.axes)){
    at(name).setAttribute('cx',34+120*d.rates[a][k]);at(name).setAttribute('cy',138-120*d.rates[b][k]);
  }
  const r=n=>share(d.rates[n][k]);
  at('words').textContent='Threshold '+d.t[k]+': false-positive rate '+r('false-positive rate')+', recall '+r('recall')
    +', precision '+r('precision')+', mean overlap '+r('mean overlap')+'.';
}
at('slider').addEventListener('input',draw);draw();})();"""
    )
