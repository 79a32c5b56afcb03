"""The metrics on resamples of a test set: what other test images would have given.

Images of one group (photographs of one item) are drawn together or not at all, and good and defective groups apart. The
draws depend on the test set alone, so that all runs on it share them and their differences are paired.

A resample needs no pixels. Each image is reduced to counts in a few thousand bins of the scores, the same for all: its
defect-free pixels, its anomalous pixels, and these again, each weighted by 1 / size of its region. A resample is a
weighted sum of such rows, and all resamples are one matrix product. AUROC, AP and PRO come from the summed rows as in
`vitad.metrics`, with straight curves across a bin as across a tie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy import ndarray

from vitad.metrics import METRICS, _area_up_to, _defects

RESAMPLES = 1000
BINS = 1000  # quantiles of the defect-free pixels that part the bins; as many again of the anomalous ones
SAMPLE = 2**20  # pixels that are sorted to find these quantiles
CHUNK = 100  # resamples at a time: keeps the temporary arrays in the cache of the processor

Resamples: TypeAlias = dict[str, ndarray | None]  # a metric on each resample; None where it is not defined


def draw(
    paths: Sequence[str] | ndarray, groups: Sequence[str] | ndarray, labels: Sequence[int] | ndarray, n: int = RESAMPLES
) -> ndarray:
    """How often each image is in each resample.

    Of G groups of a label, G - 1 are drawn with replacement. So the variance over resamples of a mean is that of the
    mean over G groups without bias, where G draws give (G - 1) / G of it (Rao & Wu 1988). One group alone says nothing
    about others: its images have the weight NaN, and so has every metric.

    Parameters
    ----------
    paths, groups, labels : array (N,)
        Of the test images, in any order.
    n : int
        Number of resamples.

    Returns
    -------
    array (n, N) float32
        Fixed by the set of (path, group, label): for good and defective images each by the `fingerprint` of their own,
        so that two test sets with the same defective images share these draws.
    """
    path, item, anomalous = np.asarray(paths), np.asarray(groups), np.asarray(labels) != 0
    weights = np.empty((n, len(anomalous)), np.float32)
    for label in (False, True):
        members = np.flatnonzero(anomalous == label)
        names, group = np.unique(item[members], return_inverse=True)  # sorted: the order of the images has no effect
        G = len(names)
        if G < 2:
            weights[:, members] = np.nan
            continue
        seed = int(fingerprint(path[members], item[members], anomalous[members])[:16], 16)
        random = np.random.Generator(np.random.PCG64(seed)).random  # the same doubles in every version of numpy
        drawn = (random((n, G - 1)) * G).astype(int)
        counts = np.bincount((drawn + G * np.arange(n)[:, None]).ravel(), minlength=n * G).reshape(n, G)
        weights[:, members] = counts[:, group]
    return weights


def fingerprint(
    paths: Sequence[str] | ndarray, groups: Sequence[str] | ndarray, labels: Sequence[int] | ndarray
) -> str:
    """SHA-256 of the sorted list of (path, group, label): tells which test set resamples are of."""
    lines = sorted(f"{path}\t{group}\t{int(label)}\n" for path, group, label in zip(paths, groups, labels, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def resample(
    maps: ndarray,
    masks: ndarray | None,
    scores: ndarray,
    labels: ndarray,
    weights: ndarray,
    pro_limit: float = 0.3,
) -> Resamples:
    """All metrics on each resample, exact up to fine bins.

    Parameters
    ----------
    maps : array (N,H,W)
        Finite floats, higher is more anomalous.
    masks : array (N,H,W) of bool, or None
        An anomalous image with an empty mask is left out of the pixel metrics.
    scores, labels : array (N,)
        Of the images.
    weights : array (n, N)
        As from `draw`. A row of ones is the test set itself.
    pro_limit : float in (0, 1]
        As in `vitad.metrics.evaluate`.

    Returns
    -------
    dict
        An array (n,) float32 for each name of `METRICS`, None where the metric is not defined.

    Examples
    --------
    >>> scores, labels = np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])
    >>> resample(np.zeros((4, 1, 1)), None, scores, labels, np.array([[1, 1, 1, 1], [2, 0, 1, 1]]))["image_auroc"]
    array([0.75, 1.  ], dtype=float32)
    """
    anomalous = np.asarray(labels) != 0
    metrics: Resamples = dict.fromkeys(METRICS)
    if anomalous.any() and not anomalous.all():
        metrics["image_auroc"] = image_auroc(scores, anomalous, weights)
    if masks is not None and masks.any() and not masks.all():
        located = ~anomalous | masks.any((1, 2))
        metrics |= _pixel_metrics(maps[located], masks[located], weights[:, located], pro_limit)
    defined = {name: None if values is None or np.isnan(values).all() else values for name, values in metrics.items()}
    return {name: None if values is None else values.astype(np.float32) for name, values in defined.items()}


def mean_of(several: Sequence[Resamples]) -> Resamples:
    """The mean over categories on each resample. A metric that one of them does not have has no mean."""
    means: Resamples = {}
    for name in several[0]:
        column = [values for resamples in several if (values := resamples[name]) is not None]
        means[name] = np.mean(column, 0) if len(column) == len(several) else None
    return means


def intervals(metrics: Mapping[str, float | None], resamples: Resamples) -> dict[str, list[float] | None]:
    """95 % intervals of metrics for other test images: 1.96 standard deviations of the resamples, within 0..1."""
    found: dict[str, list[float] | None] = {}
    for name, value in metrics.items():
        values = resamples[name]
        if value is None or values is None:
            found[name] = None
            continue
        half = 1.96 * float(np.nanstd(values, ddof=1))
        found[name] = [max(value - half, 0.0), min(value + half, 1.0)]
    return found


def image_auroc(scores: ndarray, labels: ndarray, weights: ndarray) -> ndarray:
    """Image AUROC on each resample, (n,), exact; arguments as in `resample`."""
    distinct, which = np.unique(-np.asarray(scores), return_inverse=True)  # each score is a bin, the highest first
    rows = np.zeros((len(scores), len(distinct)), np.float32)
    rows[np.arange(len(scores)), which] = 1
    anomalous = np.asarray(labels) != 0
    return np.concatenate(
        [
            _auroc(w[:, ~anomalous] @ rows[~anomalous], w[:, anomalous] @ rows[anomalous])
            for w in _chunks(np.asarray(weights, np.float32))
        ]
    )


def _pixel_metrics(maps: ndarray, masks: ndarray, weights: ndarray, limit: float) -> Resamples:
    edges, is_tie = _edges(maps, masks)
    background = np.stack([_histogram(m[~mask], edges) for m, mask in zip(maps, masks, strict=True)])
    defective = masks.any((1, 2))
    anomalous, by_region, regions = _anomalous_rows(maps[defective], masks[defective], edges)

    found = []
    for w in _chunks(weights):
        of_defects = w[:, defective]
        B, A, W = w @ background, of_defects @ anomalous, of_defects @ by_region
        N = B.sum(1, keepdims=True)
        false_after = np.cumsum(B, 1, np.float64)
        f0, f1 = (false_after - B) / N, false_after / N
        with np.errstate(invalid="ignore"):  # a resample without an image that has a mask has no such metrics: NaN
            pro = np.sum(W * _area_up_to(limit, f0, f1, N), 1) / (of_defects @ regions) / limit
            found.append((_auroc(B, A), _average_precision(B, A, false_after, is_tie), pro))
    return dict(zip(("pixel_auroc", "pixel_ap", "pro"), map(np.concatenate, zip(*found, strict=True)), strict=True))


def _edges(maps: ndarray, masks: ndarray) -> tuple[ndarray, ndarray]:
    """Ascending edges of the bins, and for each bin, the highest first, whether it holds one value only.

    A value that is several quantiles at once is a tie. It gets a bin of its own, from itself to the next float.
    """
    step = max(1, maps.size // SAMPLE) | 1  # odd, so that no column of the maps is met again and again
    values, truth = maps.ravel()[::step], masks.ravel()[::step]
    anomalous = maps[masks]
    anomalous = anomalous[:: max(1, anomalous.size // SAMPLE)]
    quantiles = np.concatenate([_quantiles(values[~truth]), _quantiles(anomalous)])
    values, counts = np.unique(quantiles, return_counts=True)
    tied = values[counts > 1]
    edges = np.union1d(values, np.nextafter(tied, np.array(np.inf, tied.dtype)))
    return edges, np.append(np.isin(edges, tied)[::-1], False)


def _quantiles(values: ndarray) -> ndarray:
    ordered = np.sort(values)
    return ordered[np.linspace(0, len(ordered) - 1, BINS).round().astype(int)] if len(ordered) else ordered


def _histogram(values: ndarray, edges: ndarray) -> ndarray:
    """Counts in each bin, the highest first.

    The values are sorted and the edges looked up among them: a tenth of the time of looking up the values.
    """
    below = np.searchsorted(np.sort(values, axis=None), edges)
    return np.diff(below, prepend=0, append=values.size)[::-1].astype(np.float32)


def _anomalous_rows(maps: ndarray, masks: ndarray, edges: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Of each defective image: anomalous pixels in each bin, the same by share of their region, number of regions."""
    n_bins = len(edges) + 1
    counts = np.zeros((len(maps), n_bins), np.float32)
    shares = np.zeros((len(maps), n_bins), np.float32)
    regions = np.zeros(len(maps), np.float32)
    for i, (s, region, n) in enumerate(_defects(maps, masks)):
        bins = len(edges) - np.searchsorted(edges, s, "right")
        counts[i] = np.bincount(bins, minlength=n_bins)
        shares[i] = np.bincount(bins, 1 / np.bincount(region)[region], minlength=n_bins)
        regions[i] = n
    return counts, shares, regions


def _auroc(background: ndarray, anomalous: ndarray) -> ndarray:
    """Of counts (n, bins), the highest scores first."""
    false_after = np.cumsum(background, 1, np.float64)
    middle = false_after - background / 2
    return 1 - np.sum(anomalous * middle, 1) / (false_after[:, -1] * anomalous.sum(1, dtype=np.float64))


def _average_precision(background: ndarray, anomalous: ndarray, false_after: ndarray, is_tie: ndarray) -> ndarray:
    """Of counts (n, bins): the mean precision over the anomalous pixels, those of a bin at its middle.

    The pixels of a tie are all detected at once, so their precision is that at its end.
    """
    reached = np.where(is_tie, 1.0, 0.5)
    true_after = np.cumsum(anomalous, 1, np.float64)
    true = true_after - anomalous * (1 - reached)
    false = false_after - background * (1 - reached)
    precision = np.divide(true, true + false, out=np.zeros_like(true), where=anomalous > 0)
    return np.sum(anomalous * precision, 1) / true_after[:, -1]


def _chunks(weights: ndarray) -> Iterator[ndarray]:
    return (weights[start : start + CHUNK] for start in range(0, len(weights), CHUNK))
