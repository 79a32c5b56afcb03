"""How long the four figures take for 100 maps of 256 x 256, beside other implementations on the same arrays.

python tests/bench_metrics.py
"""

import time

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from sklearn.metrics import average_precision_score, roc_auc_score

import vitad.backbones  # noqa: F401  (lets torchvision, and so anomalib, be imported beside a CPU-only torch)
from vitad.metrics import evaluate

N, SIDE = 100, 256


def test_set(seed=0):
    """Smooth float32 maps in 0..1 and blob-shaped defects, about 5 % of the pixels of 70 images."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((2, N, SIDE, SIDE), dtype=np.float32)
    maps = gaussian_filter(noise[0], (0, 4, 4))
    shape = gaussian_filter(noise[1], (0, 10, 10))
    masks = shape > np.quantile(shape, 0.95, axis=(1, 2), keepdims=True)
    masks[70:] = False
    maps += 1.5 * maps.std() * gaussian_filter(masks.astype(np.float32), (0, 4, 4))
    maps = (maps - maps.min()) / np.ptp(maps)
    return maps, masks, maps.max(axis=(1, 2)), masks.any(axis=(1, 2))


def seconds(function, repeats):
    """The times of all repeats, in ascending order, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return sorted(times), result


def main():
    maps, masks, scores, labels = test_set()

    def ours():
        return evaluate(maps, masks, scores, labels)

    def sklearn():
        truth, values = masks.ravel(), maps.ravel()
        return dict(pixel_auroc=roc_auc_score(truth, values), pixel_ap=average_precision_score(truth, values))

    rows = {
        "vitad: all four": seconds(ours, 9),
        "scikit-learn: pixel AUROC, AP": seconds(sklearn, 3),
    }
    try:
        from anomalib.metrics.aupro import _AUPRO
        from anomalib.metrics.auroc import _AUROC
    except ImportError as e:
        absent = f"anomalib is not timed here ({e}); to add it: pip install 'anomalib==2.7.*'"
    else:
        absent = None
        tensors = torch.from_numpy(maps), torch.from_numpy(masks).int()

        def anomalib():
            figures = dict(pixel_auroc=_AUROC(), pro=_AUPRO())
            for metric in figures.values():
                metric.update(*tensors)
            return {name: float(metric.compute()) for name, metric in figures.items()}

        rows["anomalib: pixel AUROC, AUPRO"] = seconds(anomalib, 3)

    print(f"{N} maps of {SIDE} x {SIDE}, {masks.mean():.1%} of pixels anomalous; torch threads: ", end="")
    print(torch.get_num_threads())
    print(f"{'':31}{'min s':>8}{'median s':>10}{'ratio':>7}   figures")
    fastest = rows["vitad: all four"][0][0]
    for name, (times, figures) in rows.items():
        values = "  ".join(f"{k} {v:.6f}" for k, v in figures.items())
        print(f"{name:31}{times[0]:8.3f}{times[len(times) // 2]:10.3f}{times[0] / fastest:7.1f}   {values}")
    if absent:
        print(absent)


if __name__ == "__main__":
    main()
