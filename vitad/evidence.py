"""How sure a number is: what to expect of one more run, and differences between runs of the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from vitad.metrics import METRICS
from vitad.runs.record import Record

LEVEL = 0.999  # so rarely does a run that is as it should be miss `expected`


def expected(records: Sequence[Record], metric: str = "image_auroc") -> tuple[float, float, int]:
    """(mean, tolerance, n) of a metric: where one more run is expected, from n runs of the same request.

    The runs differ in their seeds, and in the processors that they were made on. Other rounding of the last digit sends
    a training on another way, as another seed does, so all count as draws of one distribution. One more lies within
    t * s * sqrt(1 + 1/n) of their mean in 999 of 1,000 cases (Student's t with n - 1 degrees of freedom, standard
    deviation s). (nan, nan, 0) where no record has the metric; a single one gives no tolerance.
    """
    values = np.array([r["metrics"][metric] for r in records if r["metrics"].get(metric) is not None], float)
    n = len(values)
    if n < 2:
        return float(values[0]) if n else float("nan"), float("nan"), n
    t = stdtrit(n - 1, (1 + LEVEL) / 2)
    return float(values.mean()), float(t * values.std(ddof=1) * (1 + 1 / n) ** 0.5), n


def check_expected(record: Record, same: Sequence[Record], metric: str = "image_auroc") -> str:
    """One line that says that a run lies where others of the same request do; nothing where fewer than two are known.

    Raises
    ------
    AssertionError
        The run lies outside of the tolerance.
    """
    mean, tolerance, n = expected(same, metric)
    if n < 2:
        return ""
    value = record["metrics"][metric]
    line = f"{METRICS[metric]} {value:.3f}, expected {mean:.3f} ± {tolerance:.3f} from {n} runs"
    assert abs(value - mean) <= tolerance, f"{line}: outside of what the book's own runs gave"
    return line


def contrast(
    variants: Mapping[str, Sequence[Record]], weights: Mapping[str, float], metric: str = "image_auroc"
) -> dict[str, Any]:
    """A weighted sum of variants, such as `{"full": 1, "base": -1}`, with its 95 % confidence interval over seeds.

    The sum is taken seed by seed (Student's t).

    Returns
    -------
    dict `difference, plus_minus, seeds, verdict`. The verdict is "above 0", "below 0", or "undecided" where the
        interval holds 0 or a single seed gives none.
    """
    values = {
        name: {r["seed"]: r["metrics"][metric] for r in variants[name] if r["metrics"].get(metric) is not None}
        for name in weights
    }
    seeds = sorted(set.intersection(*(set(v) for v in values.values())))
    sums = np.array([sum(w * values[name][seed] for name, w in weights.items()) for seed in seeds])
    n, mean = len(sums), float(sums.mean()) if len(sums) else float("nan")
    half = float(stdtrit(n - 1, 0.975) * sums.std(ddof=1) / n**0.5) if n > 1 else float("inf")
    verdict = "undecided" if not abs(mean) > half else "above 0" if mean > 0 else "below 0"
    return {"difference": round(mean, 4), "plus_minus": round(half, 4), "seeds": n, "verdict": verdict}


def contrasts(
    variants: Mapping[str, Sequence[Record]],
    weights: Mapping[str, Mapping[str, float]],
    metrics: Sequence[str] = ("image_auroc", "pixel_auroc", "pro"),
    printed: Mapping[str, Mapping[str, float]] | None = None,
) -> pd.DataFrame:
    """One line for each `contrast` of `weights = {name: {variant: weight}}` and metric, beside the printed one."""
    lines = []
    for name, weighting in weights.items():
        for metric in metrics:
            line = {"contrast": name, "metric": METRICS[metric], **contrast(variants, weighting, metric)}
            if printed:
                line["printed"] = round(sum(w * printed[v][metric] for v, w in weighting.items()) / 100, 4)
            lines.append(line)
    return pd.DataFrame(lines).set_index(["contrast", "metric"])
