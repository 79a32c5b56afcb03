"""How sure a number is: intervals over seeds and test images, paired differences, and verdicts in fixed words.

Two sources of doubt: *seeds*, what another run of the same command gives, and the *test set*, what other images would
give (`vitad.resampling`). All numbers are fractions in 0..1. Intervals are of 95 %.

* Between runs of ours, both sources count. A difference is *above*, *below* or *undecided*, and a family of
  comparisons is corrected by Holm's method.
* Against a printed number, the test images are the same. Only seeds count, and the number is taken as one more run with
  the same spread: *reproduced*, *differs* or *undecided* by a margin that was fixed beforehand, else *not comparable*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy import ndarray
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit

from vitad.metrics import METRICS
from vitad.runs.folder import read_resamples
from vitad.runs.record import Record

LEVEL = 0.05  # intervals are of 1 - LEVEL
ABOVE, BELOW, UNDECIDED = "above", "below", "undecided"
REPRODUCED, DIFFERS, NOT_COMPARABLE = "reproduced", "differs", "not comparable"
MARGINS = {  # what still counts as equal to a printed number: for a mean over several categories, and for one category
    "image_auroc": (0.01, 0.02),
    "pixel_auroc": (0.01, 0.02),
    "pixel_ap": (0.02, 0.04),  # ours: that of PRO
    "pro": (0.02, 0.04),
}
EXPECTED = 0.99  # share of the runs as they should be that lie within `expected`


def expected(records: Sequence[Record], metric: str = "image_auroc") -> tuple[float, float, int]:
    """(mean, tolerance, n) of a metric: where one more run is expected, from n runs of the same request.

    The runs differ in their seeds, and in the processors that they were made on. Other rounding of the last digit sends
    a training on another way, as another seed does, so all count as draws of one distribution. One more lies within
    t * s * sqrt(1 + 1/n) of their mean in 99 of 100 cases (Student's t with n - 1 degrees of freedom, standard
    deviation s). (nan, nan, 0) where no record has the metric; a single one gives no tolerance.
    """
    values = np.array([r["metrics"][metric] for r in records if r["metrics"].get(metric) is not None], float)
    n = len(values)
    if n < 2:
        return float(values[0]) if n else float("nan"), float("nan"), n
    t = stdtrit(n - 1, (1 + EXPECTED) / 2)
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


# --- one metric -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """The mean of a metric over seeds with its interval.

    Attributes
    ----------
    value, low, high
        As fractions; the interval is cut at 0 and 1.
    n_seeds
        Number of runs.
    sd_seeds
        Standard deviation of the seeds; None for one seed.
    sd_test
        Standard deviation of the mean over resamples of the test set; None where a record has no resamples.
    """

    value: float
    low: float
    high: float
    n_seeds: int
    sd_seeds: float | None
    sd_test: float | None

    @property
    def complete(self) -> bool:
        """Whether the interval holds both sources of doubt; else what is missing is not in it."""
        return self.sd_seeds is not None and self.sd_test is not None


def estimate(records: Sequence[Record], metric: str) -> Estimate:
    """The metric of one kind of run, over its seeds and over test images.

    The half-width is sqrt((1.96 sd_test)^2 + (t(0.975, k-1) sd_seeds / sqrt(k))^2) for k seeds, without the part that
    is not known. Where neither is, the interval is all of 0..1.

    Parameters
    ----------
    records
        Of runs that differ in the seed only, with their `folder` where they have resamples.
    metric
        Name in `METRICS`. Where no record has it, all numbers are NaN.
    """
    spread = _spread({"runs": records}, {"runs": 1.0}, metric)
    half = spread.half_width()
    low, high = (float(np.clip(spread.mean + sign * half, 0, 1)) for sign in (-1, 1))
    return Estimate(spread.mean, low, high, spread.n, spread.sd_seeds, spread.sd_test)


def of_category(record: Record, category: str) -> Record:
    """The record of a model of several categories as if it had been tested on one of them.

    The resamples in its `folder` are of the mean over all categories, so it has those of the category in its place.
    """
    resamples = read_resamples(record["folder"], category) if "folder" in record else {}
    rest = {k: v for k, v in record.items() if k != "folder"}
    return rest | {"metrics": record["metrics_by_category"][category], "resamples": resamples}


# --- differences between runs of ours -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A difference, or another weighted sum, of the same metric of several kinds of run.

    Attributes
    ----------
    value, low, high
        Its mean over seeds and its interval.
    p
        The level at which the interval just reaches 0; NaN where there is no verdict for want of seeds.
    n_seeds
        Number of seeds that all kinds of run have.
    verdict
        `above`, `below` or `undecided` at 95 %, without correction. One seed decides nothing.
    complete
        Whether the interval holds both sources of doubt.
    """

    value: float
    low: float
    high: float
    p: float
    n_seeds: int
    verdict: str
    complete: bool


def difference(first: Sequence[Record], second: Sequence[Record], metric: str) -> Difference:
    """First minus second, paired: seed by seed, and on the same resamples of the test set.

    The half-width is that of `estimate`, with the standard deviations of the differences. Two test sets with the same
    defective images share the resamples of these, and of the good images likewise. The p-value takes the normal and
    Student's t distribution from the same formula, so it is below 0.05 exactly if the interval leaves out 0.
    """
    return contrast({"first": first, "second": second}, {"first": 1, "second": -1}, metric)


def contrast(variants: Mapping[str, Sequence[Record]], weights: Mapping[str, float], metric: str) -> Difference:
    """A weighted sum of variants, such as `{"full": 1, "base": -1}`, as `difference` of two."""
    spread = _spread(variants, weights, metric)
    half, p = spread.half_width(), spread.p_value()
    complete = spread.sd_seeds is not None and spread.sd_test is not None
    return Difference(spread.mean, spread.mean - half, spread.mean + half, p, spread.n, _word(spread.mean, p), complete)


def holm(p_values: Sequence[float] | ndarray) -> ndarray:
    """P-values adjusted by Holm's method for all of them together; NaN stays NaN and does not count.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])
    array([0.03, 0.06, 0.06])
    """
    p = np.asarray(p_values, float)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN come last
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1)
    return adjusted


def compare(
    pairs: Mapping[str, tuple[Sequence[Record], Sequence[Record]]], metrics: Sequence[str] = tuple(METRICS)
) -> pd.DataFrame:
    """Several differences with Holm's correction over all of them and all metrics.

    Parameters
    ----------
    pairs
        {name: (records, records)}: first minus second.
    metrics
        Names in `METRICS`.

    Returns
    -------
    DataFrame
        A line for each `name, metric` (the index) with `value, low, high, p, p_adjusted, seeds, complete, verdict`. The
        interval is without correction, the verdict with it.
    """
    found = {(name, metric): difference(*pair, metric) for name, pair in pairs.items() for metric in metrics}
    return _family(found, ["name", "metric"])


def contrasts(
    variants: Mapping[str, Sequence[Record]],
    weights: Mapping[str, Mapping[str, float]],
    metrics: Sequence[str] = tuple(METRICS),
    printed: Mapping[str, Mapping[str, float]] | None = None,
) -> pd.DataFrame:
    """As `compare`, for weighted sums of variants, to be shown: by the titles of the metrics.

    Parameters
    ----------
    variants
        {variant: records of its seeds}.
    weights
        {name of the contrast: {variant: weight}}.
    metrics
        Names in `METRICS`.
    printed
        {variant: {metric: percent}} as a paper prints it; adds the column `printed`.

    Returns
    -------
    DataFrame
        A line for each `contrast, metric` with `difference, low, high, p_adjusted, seeds, complete, verdict`.
    """
    found = {(name, metric): contrast(variants, w, metric) for name, w in weights.items() for metric in metrics}
    frame = _family(found, ["contrast", "metric"]).drop(columns="p").rename(columns={"value": "difference"})
    if printed:
        frame["printed"] = [
            sum(w * printed[v].get(metric, math.nan) for v, w in weights[name].items()) / 100
            for name, metric in frame.index
        ]
    return frame.rename(index=METRICS, level="metric")


def _family(found: Mapping[tuple[str, str], Difference], names: list[str]) -> pd.DataFrame:
    adjusted = holm([d.p for d in found.values()])
    rows = [
        {
            **{name: getattr(d, name) for name in ("value", "low", "high", "p")},
            "p_adjusted": p,
            "seeds": d.n_seeds,
            "complete": d.complete,
            "verdict": _word(d.value, p),
        }
        for d, p in zip(found.values(), adjusted, strict=True)
    ]
    return pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(found, names=names))


def _word(value: float, p: float) -> str:
    if not p < LEVEL:
        return UNDECIDED
    return ABOVE if value > 0 else BELOW


# --- against a printed number ---------------------------------------------------------------------------------------


def against_printed(
    runs: Sequence[Record] | Sequence[float] | ndarray,
    printed: float,
    categories: int = 1,
    metric: str = "image_auroc",
    comparable: bool = True,
) -> tuple[str, float, float]:
    """How runs of ours stand to a number of a paper.

    Parameters
    ----------
    runs
        Records of k seeds, or their values as fractions.
    printed
        The number, as a fraction.
    categories
        Number of categories whose mean both are.
    metric
        Name in `METRICS`; decides the margin in `MARGINS`.
    comparable
        Whether data, settings and weights are the paper's.

    Returns
    -------
    verdict, low, high
        The interval of ours minus printed, d ± t(0.975, k-1) s_seeds sqrt(1 + 1/k); infinite for one seed. `reproduced`
        if all of it is within the margin, `differs` if all of it is outside, else `undecided`; `not comparable`.

    Examples
    --------
    >>> against_printed([0.938, 0.940, 0.942], 0.94)
    ('reproduced', -0.009..., 0.009...)
    """
    values = np.array([_value(run, metric) for run in runs], float)
    half = _half_width(LEVEL, None, _sd(values), len(values), 1 + 1 / len(values))
    d, margin = float(values.mean()) - printed, MARGINS[metric][0 if categories > 1 else 1]
    low, high = d - half, d + half
    if not comparable:
        verdict = NOT_COMPARABLE
    elif -margin <= low and high <= margin:
        verdict = REPRODUCED
    else:
        verdict = DIFFERS if low > margin or high < -margin else UNDECIDED
    return verdict, low, high


# --- what both rest on ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spread:
    """Mean and standard deviations of a weighted sum over n seeds."""

    mean: float
    n: int
    sd_seeds: float | None
    sd_test: float | None

    def half_width(self, level: float = LEVEL) -> float:
        return _half_width(level, self.sd_test, self.sd_seeds, self.n, 1 / max(self.n, 1))

    def p_value(self) -> float:
        """The level whose interval just reaches 0, to be found between 1e-15 and 1; NaN for one seed."""
        if self.sd_seeds is None:
            return math.nan

        def beyond(log_level: float) -> float:
            return self.half_width(math.exp(log_level)) - abs(self.mean)

        least = math.log(1e-15)
        if beyond(least) <= 0:
            return 0.0 if self.mean else 1.0
        return math.exp(brentq(beyond, least, 0.0))


def _half_width(level: float, sd_test: float | None, sd_seeds: float | None, n: int, scale: float) -> float:
    """Of an interval of 1 - level: normal for the test set, Student's t for `sd_seeds` times sqrt(`scale`)."""
    if sd_seeds is None and sd_test is None:
        return math.inf
    test = 0.0 if sd_test is None else -ndtri(level / 2) * sd_test
    seeds = 0.0 if sd_seeds is None else -stdtrit(n - 1, level / 2) * sd_seeds * math.sqrt(scale)
    return math.hypot(test, seeds)


def _spread(variants: Mapping[str, Sequence[Record]], weights: Mapping[str, float], metric: str) -> _Spread:
    """Of the weighted sum of variants, over the seeds that all of them have."""
    by_seed = {name: {r["seed"]: r for r in variants[name] if r["metrics"].get(metric) is not None} for name in weights}
    seeds = sorted(set.intersection(*(set(records) for records in by_seed.values())))
    if not seeds:
        return _Spread(math.nan, 0, None, None)
    pairs = [(w, by_seed[name][seed]) for name, w in weights.items() for seed in seeds]
    values = np.array([w * _value(r, metric) for w, r in pairs]).reshape(len(weights), len(seeds)).sum(0)
    resampled = [w * found[metric] for w, r in pairs if metric in (found := _resamples(r))]
    sd_test = None
    if len(resampled) == len(pairs):
        sd_test = float(np.nanstd(np.sum(resampled, 0, dtype=float) / len(seeds), ddof=1))
    return _Spread(float(values.mean()), len(seeds), _sd(values), sd_test)


def _resamples(record: Record) -> Mapping[str, ndarray]:
    """Those that the record has with it, of a part of its test set, or those beside it."""
    return record.get("resamples") or (read_resamples(record["folder"]) if "folder" in record else {})


def _value(run: Record | float, metric: str) -> float:
    return float(run["metrics"][metric] if isinstance(run, Mapping) else run)


def _sd(values: ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None
