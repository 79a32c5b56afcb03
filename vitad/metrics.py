"""Image AUROC, pixel AUROC, pixel AP and PRO: exact, ties included.

All four are means over the *anomalous* pixels (or images). PRO gives each region the same weight, the others give it to
each pixel. Let `B` be the scores of the defect-free pixels and, for a score `s`,

    f0(s) = share of B above s,        f1(s) = share of B at or above s        (they differ by the ties with s).

A pixel with score `s` is first detected at a false-positive rate between f0 and f1. Across a tie every curve is
straight. So the pixel adds to the area under the ROC curve what lies to the right of the middle of [f0, f1], and to the
area under the PRO curve the same, cut at the limit. No curve is built and no threshold is chosen: `B` is sorted once,
and every anomalous pixel looks itself up.

Sources: AUROC as the Mann-Whitney statistic, Hanley & McNeil 1982; AP as the sum of precision times the step in recall
(scikit-learn's definition, no interpolation); PRO and its limit of 0.3, Bergmann et al. 2020 (Uninformed Students).
"""

from collections.abc import Iterator
from numbers import Real
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.ndimage import label

from vitad.errors import UserError

# The one list of metrics: name in records -> title in tables and figures. A new metric is an entry here and a value of
# that name in what `_image_metrics` or `_pixel_metrics` returns.
METRICS: dict[str, str] = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pro": "PRO",
}

EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)  # pixels that touch at a corner belong to one region

Arrays: TypeAlias = ArrayLike | torch.Tensor  # what `evaluate` takes


def evaluate(
    maps: Arrays, masks: Arrays | None, scores: Arrays, labels: Arrays, pro_limit: float = 0.3
) -> dict[str, float | None]:
    """Compute all metrics of a test set, as fractions in 0..1.

    N and M need not be equal: an image whose defect has no mask belongs in `scores` and `labels` but not in `maps`,
    where its defect would count as background. Tensors may have any float type and lie on any device. No argument is
    modified.

    Parameters
    ----------
    maps : array or tensor (N,H,W) or (N,1,H,W)
        Anomaly map of each image, higher is more anomalous. Any unit: only the order counts.
    masks : like `maps`, or None
        Non-zero where the image is anomalous.
    scores : array or tensor (M,)
        Anomaly score of each image.
    labels : array or tensor (M,)
        Non-zero for an anomalous image.
    pro_limit : float in (0, 1]
        False-positive rate up to which the PRO curve is integrated.

    Returns
    -------
    dict
        A float for each name of `METRICS`. It is None where the metric is not defined: those of pixels without masks,
        without an anomalous or without a defect-free pixel, those of images where `labels` hold one class only.

    Raises
    ------
    UserError
        Shapes do not agree, values are not finite, or the limit is out of range.

    Examples
    --------
    The defect covers the upper row. One of the four pairs of a good and an anomalous image is in the wrong order.

    >>> maps = [[[3, 3, 2, 2], [2, 2, 1, 1]]]
    >>> masks = [[[1, 1, 1, 1], [0, 0, 0, 0]]]
    >>> metrics = evaluate(maps, masks, scores=[0.1, 0.4, 0.35, 0.8], labels=[0, 0, 1, 1])
    >>> for name, value in metrics.items():
    ...     print(f"{METRICS[name]}: {value:.3f}")
    image AUROC: 0.750
    pixel AUROC: 0.875
    pixel AP: 0.833
    PRO: 0.650
    """
    anomaly_maps = _maps("maps", maps)
    image_scores, anomalous = _finite("scores", scores), _finite("labels", labels) != 0
    if image_scores.ndim != 1 or image_scores.shape != anomalous.shape:
        raise UserError(
            f"scores {image_scores.shape} and labels {anomalous.shape} disagree: "
            "give one score and one label per image."
        )
    if not isinstance(pro_limit, Real) or not 0 < pro_limit <= 1:
        raise UserError(f"pro_limit is {pro_limit!r}: it has to be a false-positive rate in (0, 1], such as 0.3.")

    metrics: dict[str, float | None] = dict.fromkeys(METRICS)  # not defined, until computed
    if anomalous.any() and not anomalous.all():
        metrics |= _image_metrics(image_scores, anomalous)
    if masks is not None:
        truth = _masks(masks, anomaly_maps)
        if truth.any() and not truth.all():
            metrics |= _pixel_metrics(anomaly_maps, truth, float(pro_limit))
    return metrics


def auroc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Probability that an anomalous image scores above a good one; a tie counts half.

    Parameters
    ----------
    scores : array (n,)
        Finite floats.
    labels : array (n,) of bool, or of 0 and 1
        True where anomalous.

    Returns
    -------
    float or None
        None where all labels are equal.

    Examples
    --------
    >>> auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
    0.875
    """
    labels = np.asarray(labels, bool)  # whole numbers would be taken for places
    if labels.all() or not labels.any():
        return None
    f0, f1 = _false_positive_rates(scores[labels], np.sort(scores[~labels]))
    return float(np.mean(1 - (f0 + f1) / 2))


def _image_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    return {"image_auroc": auroc(scores, labels)}


def _pixel_metrics(maps: np.ndarray, masks: np.ndarray, limit: float) -> dict[str, float]:
    """Of masks (N,H,W) that hold both kinds of pixel."""
    background = maps[~masks]
    anomalous = maps[masks]
    background.sort()  # values, in place: no index array, and numpy sorts floats with vector instructions
    anomalous.sort()
    P, N = anomalous.size, background.size

    roc_area = precision = pro_area = 0.0
    n_regions = 0
    for s, region, n in _defects(maps, masks):  # one image at a time, so that temporaries stay small
        ordered = np.sort(s)  # 2 to 3 times faster: successive look-ups in the long array share most of their path
        f0, f1 = _false_positive_rates(ordered, background)

        # AUROC = mean over anomalous pixels of the share of background below them.
        roc_area += np.sum(1 - (f0 + f1) / 2)

        # AP = sum of precision x step in recall; each anomalous pixel is a step of 1/P, taken at its own score.
        true_positives = P - np.searchsorted(anomalous, ordered, "left")
        precision += np.sum(true_positives / (true_positives + N * f1))

        # PRO = mean over regions of the mean over the region's pixels, divided by the limit.
        area = _area_up_to(limit, f0, f1, N)
        area = area[np.searchsorted(ordered, s)]  # back in the order of the pixels
        pro_area += np.sum(np.bincount(region, area) / np.bincount(region))
        n_regions += n

    return {
        "pixel_auroc": float(roc_area / P),
        "pixel_ap": float(precision / P),
        "pro": float(pro_area / n_regions / limit),
    }


def _false_positive_rates(s: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f0 and f1: the shares of the sorted `background` above `s` and at or above `s`, each in the shape of `s`."""
    below = np.searchsorted(background, s, "left")
    not_above = below.copy()
    tied = background[np.minimum(below, background.size - 1)] == s  # usually few; the others need no second look-up
    not_above[tied] = np.searchsorted(background, s[tied], "right")
    return 1 - not_above / background.size, 1 - below / background.size


def _area_up_to(limit: float, f0: np.ndarray, f1: np.ndarray, N: int) -> np.ndarray:
    """Area under one pixel's detection curve for false-positive rates from 0 to the limit L.

    The curve is 0 up to f0, a straight ramp from f0 to f1, then 1:

        L - (f0 + f1) / 2              if f1 <= L
        (L - f0)^2 / (2 (f1 - f0))     if f0 < L < f1
        0                              if L <= f0
    """
    a, b = np.minimum(f0, limit), np.minimum(f1, limit)
    ramp = np.maximum(f1 - f0, 1 / N)  # a tie holds at least one of N background pixels; without a tie a = b
    return (limit - b) + (b - a) ** 2 / (2 * ramp)


def _defects(maps: np.ndarray, masks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """For each image with a defect: the scores of its anomalous pixels, the region 0..n-1 of each of them, and n."""
    for anomaly_map, mask in zip(maps, masks, strict=True):
        if mask.any():
            regions, n = label(mask, EIGHT_CONNECTED)
            yield anomaly_map[mask], regions[mask] - 1, n


def pro_curve(maps: Arrays, masks: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Compute the exact PRO curve, for drawing.

    Each distinct anomalous score gives two points, where the curve starts and ends its rise. Between points it is
    straight, so the trapezoid rule up to the limit gives the metric `pro` exactly, once divided by the limit.

    Parameters
    ----------
    maps, masks : array or tensor (N,H,W) or (N,1,H,W)
        As in `evaluate`.

    Returns
    -------
    false-positive rates, mean overlaps of the regions : arrays (n,)
        Both rise from 0 to 1.

    Raises
    ------
    UserError
        `masks` hold anomalous or defect-free pixels only.
    """
    anomaly_maps = _maps("maps", maps)
    truth = _masks(masks, anomaly_maps)
    if truth.all() or not truth.any():
        raise UserError("the PRO curve needs both anomalous and defect-free pixels: masks hold one kind only.")
    all_scores, all_regions, n_regions = [], [], 0
    for s, region, n in _defects(anomaly_maps, truth):
        all_scores.append(s)
        all_regions.append(region + n_regions)  # numbered through all images
        n_regions += n
    s, region = np.concatenate(all_scores), np.concatenate(all_regions)

    thresholds, which = np.unique(s, return_inverse=True)
    weight = 1 / np.bincount(region)  # what a pixel adds to the overlap of its region
    gain = np.bincount(which, weight[region])  # of each score, over all regions
    overlap = np.cumsum(gain[::-1])  # thresholds fall, overlap rises
    overlap = overlap / overlap[-1]  # the number of regions, up to rounding
    f0, f1 = _false_positive_rates(thresholds[::-1], np.sort(anomaly_maps[~truth]))
    fpr = np.stack([f0, f1], axis=1).ravel()
    pro = np.stack([np.append(0, overlap[:-1]), overlap], axis=1).ravel()
    return np.concatenate([[0], fpr, [1]]), np.concatenate([[0], pro, [1]])


def _maps(name: str, x: Arrays) -> np.ndarray:
    """Check for finite values and for the shape (N,H,W); a channel axis of length 1 is dropped."""
    array = _finite(name, x)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3:
        raise UserError(f"{name} have shape {array.shape}: give (N,H,W) or (N,1,H,W).")
    return array


def _masks(masks: Arrays, maps: np.ndarray) -> np.ndarray:
    """(N,H,W) bool, of the same shape as the maps."""
    array = _maps("masks", masks)
    if array.shape != maps.shape:
        raise UserError(f"maps {maps.shape} and masks {array.shape} disagree: resize one to the other first.")
    return array != 0


def _finite(name: str, x: Arrays) -> np.ndarray:
    """Numbers as a numpy array, none NaN or infinite; half precision becomes float32 (exact, and sorted faster)."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.is_floating_point() and x.element_size() < 4 else x).numpy()
    try:
        array = np.asarray(x)
    except ValueError as e:
        raise UserError(f"{name} are not an array: {e}.") from None
    if array.dtype.kind not in "biuf":
        raise UserError(f"{name} are of type {array.dtype}: give an array or a tensor of numbers.")
    finite = np.isfinite(array)
    if not finite.all():
        raise UserError(f"{name} hold {array.size - finite.sum()} values that are NaN or infinite (of {array.size}).")
    return array.astype(np.float32) if array.dtype == np.float16 else array
