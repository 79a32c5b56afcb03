"""Time all metrics of a test set, 100 maps of 256 x 256 px, beside other implementations on the same arrays.

    python benchmarks/metrics.py

Each line gives the shortest and the median time, the ratio of the shortest ones to ours, and the values, which should
agree. Where anomalib is not installed, its line is left out.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from sklearn.metrics import average_precision_score, roc_auc_score

from vitad.backbones import import_timm
from vitad.metrics import evaluate

N, SIDE = 100, 256


def test_set(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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


def seconds(function: Callable[[], dict], rounds: int) -> tuple[list[float], dict]:
    """The times of all rounds, in ascending order, and the last result."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return sorted(times), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        metavar="N",
        help="of ours; a third of that for the slow ones (default %(default)s)",
    )
    rounds = parser.parse_args().rounds
    slow_rounds = max(1, rounds // 3)
    maps, masks, scores, labels = test_set()

    def ours():
        return evaluate(maps, masks, scores, labels)

    def sklearn():
        truth, values = masks.ravel(), maps.ravel()
        return {
            "pixel_auroc": roc_auc_score(truth, values),
            "pixel_ap": average_precision_score(truth, values),
        }

    rows = {
        "vitad: all metrics": seconds(ours, rounds),
        "scikit-learn: pixel AUROC, AP": seconds(sklearn, slow_rounds),
    }
    absent = None
    import_timm()  # makes torchvision, and so anomalib, importable beside a CPU-only torch
    try:
        from anomalib.metrics.aupro import _AUPRO
        from anomalib.metrics.auroc import _AUROC
    except ImportError as e:
        absent = f"anomalib is not timed here ({e}); to add it: pip install 'anomalib==2.7.*'"
    else:
        tensors = torch.from_numpy(maps), torch.from_numpy(masks).int()

        def anomalib():
            metrics = {"pixel_auroc": _AUROC(), "pro": _AUPRO()}
            for metric in metrics.values():
                metric.update(*tensors)
            return {name: float(metric.compute()) for name, metric in metrics.items()}

        rows["anomalib: pixel AUROC, AUPRO"] = seconds(anomalib, slow_rounds)

    print(f"{N} maps of {SIDE} x {SIDE}, {masks.mean():.1%} of pixels anomalous; torch threads: ", end="")
    print(torch.get_num_threads())
    print(f"{'':31}{'min s':>8}{'median s':>10}{'ratio':>7}   metrics")
    fastest = rows["vitad: all metrics"][0][0]
    for name, (times, metrics) in rows.items():
        values = "  ".join(f"{k} {v:.6f}" for k, v in metrics.items())
        print(f"{name:31}{times[0]:8.3f}{times[len(times) // 2]:10.3f}{times[0] / fastest:7.1f}   {values}")
    if absent:
        print(absent)


if __name__ == "__main__":
    main()
