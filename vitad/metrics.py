"""Image AUROC, pixel AUROC, pixel AP and PRO: exact, ties included.

All four are means over the *anomalous* pixels (or images); PRO gives each region the same weight, the others each
pixel. Let `B` be the scores of the defect-free pixels and, for a score `s`,

    f0(s) = share of B above s,        f1(s) = share of B at or above s        (they differ by the ties with s).

A pixel with score `s` is first detected at a false-positive rate between f0 and f1; across a tie every curve runs
straight. So a pixel adds to the area under the ROC curve what lies to the right of the middle of [f0, f1], and to
the area under the PRO curve the same, cut at the limit. No curve is built and no threshold chosen: `B` is sorted
once and every anomalous pixel looks itself up.

Sources: AUROC as the Mann-Whitney statistic, Hanley & McNeil 1982; AP as the sum of precision times the step in recall
(scikit-learn's definition, no interpolation); PRO and its limit of 0.3, Bergmann et al. 2020 (Uninformed Students).
"""

from numbers import Real

import numpy as np
import torch
from scipy.ndimage import label

from vitad.errors import UserError

EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)  # pixels that touch at a corner belong to one region


def evaluate(maps, masks, scores, labels, pro_limit=0.3):
    """The four figures of a test set, as fractions in 0..1.

    maps      (N,H,W) or (N,1,H,W)  anomaly map of each image, higher is more anomalous; any unit, only order counts
    masks     like maps, or None    non-zero where the image is anomalous
    scores    (M,)                  anomaly score of each image
    labels    (M,)                  non-zero for an anomalous image
    pro_limit in (0, 1]             false-positive rate up to which the PRO curve is integrated

    M need not equal N: an image whose defect has no mask belongs in `scores` and `labels` but not among `maps`, where
    its defect would pass for background. Arrays and tensors of any float type do; they are not modified.

    Returns a dict of Python floats `image_auroc, pixel_auroc, pixel_ap, pro`. A figure that is not defined is None:
    the last three without masks, without an anomalous or without a defect-free pixel; the first where `labels` hold
    one class only. Raises `UserError` for shapes that do not agree, values that are not finite, a limit out of range.
    """
    maps = _maps("maps", maps)
    scores, labels = _finite("scores", scores), _finite("labels", labels) != 0
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise UserError(
            f"scores {scores.shape} and labels {labels.shape} disagree: give one score and one label per image."
        )
    if not isinstance(pro_limit, Real) or not 0 < pro_limit <= 1:
        raise UserError(f"pro_limit is {pro_limit!r}: it has to be a false-positive rate in (0, 1], such as 0.3.")

    figures = dict(image_auroc=auroc(scores, labels), pixel_auroc=None, pixel_ap=None, pro=None)
    if masks is not None:
        masks = _masks(masks, maps)
        if masks.any() and not masks.all():
            figures.update(_pixel_figures(maps, masks, float(pro_limit)))
    return figures


def auroc(scores, labels):
    """Probability that an anomalous image scores above a good one; a tie counts half. None where one sort is missing.

    Args:
        scores: (n,) floats.
        labels: (n,) bool, true where anomalous.
    """
    if labels.all() or not labels.any():
        return None
    f0, f1 = _false_positive_rates(scores[labels], np.sort(scores[~labels]))
    return float(np.mean(1 - (f0 + f1) / 2))


def _pixel_figures(maps, masks, limit):
    background = maps[~masks]
    anomalous = maps[masks]
    background.sort()  # values, in place: no index array, and numpy sorts floats with vector instructions
    anomalous.sort()
    P, N = anomalous.size, background.size

    roc_area = precision = pro_area = n_regions = 0
    for s, region, n in _defects(maps, masks):  # one image at a time, so that temporaries stay small
        ordered = np.sort(s)  # successive look-ups in the long array then share most of their path: 2 to 3 times faster
        f0, f1 = _false_positive_rates(ordered, background)

        # AUROC = mean over anomalous pixels of the share of background below them.
        roc_area += np.sum(1 - (f0 + f1) / 2)

        # AP = sum of precision x step in recall; each anomalous pixel is a step of 1/P, taken at its own score.
        true_positives = P - np.searchsorted(anomalous, ordered, "left")
        precision += np.sum(true_positives / (true_positives + N * f1))

        # PRO = mean over regions of the mean over the region's pixels, divided by the limit.
        area = _area_up_to(limit, f0, f1, N)[np.searchsorted(ordered, s)]  # back in the order of the pixels
        pro_area += np.sum(np.bincount(region, area) / np.bincount(region))
        n_regions += n

    return dict(
        pixel_auroc=float(roc_area / P),
        pixel_ap=float(precision / P),
        pro=float(pro_area / n_regions / limit),
    )


def _false_positive_rates(s, background):
    """Shares of the sorted `background` above `s` and at or above `s`, both of the shape of `s`."""
    below = np.searchsorted(background, s, "left")
    not_above = below.copy()
    tied = background[np.minimum(below, background.size - 1)] == s  # few, mostly: spare the others a look-up
    not_above[tied] = np.searchsorted(background, s[tied], "right")
    return 1 - not_above / background.size, 1 - below / background.size


def _area_up_to(limit, f0, f1, N):
    """Area under one pixel's detection curve for false-positive rates 0..limit.

    The curve is 0 up to f0, a straight ramp from f0 to f1, then 1:

        L - (f0 + f1) / 2              if f1 <= L
        (L - f0)^2 / (2 (f1 - f0))     if f0 < L < f1
        0                              if L <= f0
    """
    a, b = np.minimum(f0, limit), np.minimum(f1, limit)
    ramp = np.maximum(f1 - f0, 1 / N)  # a tie holds at least one of N background pixels; without one a = b
    return (limit - b) + (b - a) ** 2 / (2 * ramp)


def _defects(maps, masks):
    """For each image with a defect: its anomalous pixels' scores, their region 0..n-1, and n."""
    for anomaly_map, mask in zip(maps, masks, strict=True):
        if mask.any():
            regions, n = label(mask, EIGHT_CONNECTED)
            yield anomaly_map[mask], regions[mask] - 1, n


def pro_curve(maps, masks):
    """The exact PRO curve, for drawing: false-positive rates and mean region overlaps, both rising from 0 to 1.

    Arguments as in `evaluate`. A pair of points for each distinct anomalous score, where the curve starts and ends its
    rise; between them it is straight, so that the trapezoid rule up to a limit gives `pro` exactly.
    """
    maps = _maps("maps", maps)
    masks = _masks(masks, maps)
    if masks.all() or not masks.any():
        raise UserError("the PRO curve needs both anomalous and defect-free pixels: masks hold one kind only.")
    s, region, n_regions = [], [], 0
    for scores, ids, n in _defects(maps, masks):
        s.append(scores)
        region.append(ids + n_regions)
        n_regions += n
    s, region = np.concatenate(s), np.concatenate(region)

    values, which = np.unique(s, return_inverse=True)
    weight = 1 / np.bincount(region)  # what a pixel adds to the overlap of its region
    overlap = np.cumsum(np.bincount(which, weight[region])[::-1])  # thresholds fall, overlap rises
    overlap /= overlap[-1]  # the number of regions, but for rounding
    f0, f1 = _false_positive_rates(values[::-1], np.sort(maps[~masks]))
    fpr = np.stack([f0, f1], axis=1).ravel()
    pro = np.stack([np.append(0, overlap[:-1]), overlap], axis=1).ravel()
    return np.concatenate([[0], fpr, [1]]), np.concatenate([[0], pro, [1]])


def _maps(name, x):
    """Finite array (N,H,W); a channel axis of one is dropped."""
    x = _finite(name, x)
    if x.ndim == 4 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim != 3:
        raise UserError(f"{name} have shape {x.shape}: give (N,H,W) or (N,1,H,W).")
    return x


def _masks(masks, maps):
    masks = _maps("masks", masks)
    if masks.shape != maps.shape:
        raise UserError(f"maps {maps.shape} and masks {masks.shape} disagree: resize one to the other first.")
    return masks != 0


def _finite(name, x):
    """Numbers as a numpy array without NaN or infinity; half precision becomes float32 (exact, and sorted faster)."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.is_floating_point() and x.element_size() < 4 else x).numpy()
    try:
        x = np.asarray(x)
    except ValueError as e:
        raise UserError(f"{name} are not an array: {e}.") from None
    if x.dtype.kind not in "biuf":
        raise UserError(f"{name} are of type {x.dtype}: give an array or a tensor of numbers.")
    if not (finite := np.isfinite(x)).all():
        raise UserError(f"{name} hold {x.size - finite.sum()} values that are NaN or infinite (of {x.size}).")
    return x.astype(np.float32) if x.dtype == np.float16 else x
