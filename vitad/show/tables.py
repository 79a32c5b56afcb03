"""Tables of the book, made of run records: nothing here is typed.

A metric that a record does not have, since it was added later, is shown as "not measured". One that is not defined for
the data, as pixel metrics without masks, is shown as a dash.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from vitad.evidence import compare, estimate, expected
from vitad.metrics import METRICS, auroc
from vitad.runs import Request, committed_seeds, on_other_processors
from vitad.runs.record import Record

NOT_MEASURED, NOT_DEFINED = "not measured", "–"


def by_run(records: Sequence[Record]) -> pd.DataFrame:
    """One line a run: what was run, its metrics and its minutes."""
    rows = [
        {
            "method": r["method"],
            "data": _data(r),
            "preset": ", ".join([r["preset"], *(f"{k}={v}" for k, v in r["overrides"].items() if k != "image_size")]),
            "px": r["protocol"]["image_size"][0],
            "seed": r["seed"],
            **{title: r["metrics"].get(metric) for metric, title in METRICS.items()},
            "minutes": sum(r["timings"][k] for k in ("load_s", "prepare_s", "train_s", "score_s")) / 60,
        }
        for r in records
    ]
    columns = ["method", "data", "preset", "px", "seed", *METRICS.values(), "minutes"]
    return pd.DataFrame(rows, columns=columns)


def over_seeds(records: Sequence[Record]) -> pd.DataFrame:
    """One line for each set of runs that differ in the seed only: number of seeds, mean and standard deviation.

    A single seed has no spread and shows none.
    """
    keys = ["data", "method", "preset", "px"]
    frame = by_run(records)
    frame["settings"] = [json.dumps([r["settings"], r["weights"]], sort_keys=True) for r in records]
    rows = []
    for key, members in frame.groupby([*keys, "settings"]).groups.items():
        metrics = [records[i]["metrics"] for i in members]
        rows.append(dict(zip(keys, key, strict=False)) | {"seeds": len(metrics)} | _means(metrics))
    return pd.DataFrame(rows, columns=[*keys, "seeds", *METRICS.values()])


def by_category(records: Iterable[Record]) -> pd.DataFrame:
    """One line for each category and kind of run: its metrics, mean and standard deviation over seeds.

    A run over one category stands beside those that one model of all categories gives.
    """
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for r in records:
        trained_on = "/".join(filter(None, (r["dataset"], r["category"])))
        for category, metrics in r.get("metrics_by_category", {trained_on: r["metrics"]}).items():
            groups.setdefault((category, r["method"], trained_on), []).append(metrics)
    index = pd.MultiIndex.from_tuples(groups, names=["category", "method", "trained on"])
    return pd.DataFrame([{"seeds": len(m)} | _means(m) for m in groups.values()], index=index)


def by_defect(records: Iterable[Record], category: str | None = None) -> pd.DataFrame:
    """Image AUROC of each kind of defect against all good images, mean and standard deviation over seeds.

    From `scores.csv` beside the records; runs without one are left out. Of runs over several categories only the
    images of `category`, their first folder, are counted, or all.
    """
    rows = []
    for r in records:
        if (r["folder"] / "scores.csv").exists():
            of_run = {"method": r["method"], "px": r["protocol"]["image_size"][0]}
            rows += [of_run | {"defect": kind, "value": value} for kind, value in by_kind(r, category).items()]
    columns = ["method", "px", "defect", "value"]
    groups = pd.DataFrame(rows, columns=columns).groupby(columns[:3])["value"]
    return groups.agg(_mean_and_spread).unstack("defect")


def by_kind(record: Record, category: str | None = None) -> dict[str, float | None]:
    """{kind of defect: image AUROC against all good images} of one run, from its `scores.csv`; see `by_defect`."""
    scores = pd.read_csv(record["folder"] / "scores.csv")
    if category and "metrics_by_category" in record:
        scores = scores[scores["image"].str.startswith(f"{category}/")]
    values, defects, anomalous = scores["score"].to_numpy(), scores["defect"].to_numpy(), scores["label"].to_numpy(bool)
    found = {}
    for kind in sorted(set(defects[anomalous])):
        part = ~anomalous | (defects == kind)
        found[kind] = auroc(values[part], anomalous[part])
    return found


def across_splits(records: Sequence[Record], honest: str, other: str) -> pd.DataFrame:
    """What another split does to each method, metric by metric: the means over seeds on both, and the gain."""
    frame = by_run(records).assign(split=[r["split"] for r in records])
    keys = ["method", "preset", "px"]
    long = frame.melt([*keys, "split"], list(METRICS.values()), "metric").dropna(subset="value")
    means = long.assign(value=long["value"].astype(float)).pivot_table("value", [*keys, "metric"], "split", sort=False)
    means = means.reindex(columns=[honest, other]).dropna().round(3)
    means = means.sort_index(level=keys, sort_remaining=False, kind="stable")
    return means.assign(gain=(means[other] - means[honest]).round(3)).reset_index().rename_axis(columns=None)


def panels(rows: Mapping[str, Sequence[Record]]) -> tuple[dict[str, dict], dict[str, dict]]:
    """What `plots.dots` draws of several kinds of run: the values of all metrics, and their intervals.

    Parameters
    ----------
    rows
        {row: records of its seeds}.

    Returns
    -------
    {title of a metric: {row: values of the seeds}}, and {title: {row: (low, high)}} over seeds and test images; without
    the metrics that no record has.
    """
    values, intervals = {}, {}
    for metric, title in METRICS.items():
        panel = {row: [r["metrics"][metric] for r in records if _has(r, metric)] for row, records in rows.items()}
        if any(panel.values()):
            estimates = {row: estimate(rows[row], metric) for row in panel if panel[row]}
            values[title] = panel
            intervals[title] = {row: (e.low, e.high) for row, e in estimates.items()}
    return values, intervals


def intervals(rows: Mapping[tuple[str, ...], Sequence[Record]]) -> pd.DataFrame:
    """One line a kind of run: number of seeds, and each metric as `mean [low, high]` with its interval of 95 %.

    The interval counts what other seeds, where there are several, and other test images would change; one without the
    latter is marked with `*`. Where neither is known there is none. A metric that guessing would give as well is said
    to be *at chance*: the interval holds 0.5 for an AUROC, and half of its limit for PRO (random scores give a straight
    line of slope 1). Pixel AP has no such mark, since its chance level is the share of defective pixels in the images.

    Parameters
    ----------
    rows
        {keys: records of its seeds}; the keys become the index.
    """
    lines = [
        {"seeds": len(records)} | {title: _with_interval(records, metric) for metric, title in METRICS.items()}
        for records in rows.values()
    ]
    return pd.DataFrame(lines, index=pd.MultiIndex.from_tuples(rows), columns=["seeds", *METRICS.values()])


def differences(pairs: Mapping[tuple[str, ...], tuple[Sequence[Record], Sequence[Record]]]) -> pd.DataFrame:
    """One line a pair: seeds in common, and for each metric first minus second as `difference [low, high] verdict`.

    The interval of 95 % is without correction. The verdict, above, below or undecided, is with Holm's correction over
    the whole table; one seed decides nothing. `*` as in `intervals`.

    Parameters
    ----------
    pairs
        {keys: (records, records)}; the keys become the index.
    """
    found = compare({str(k): pair for k, pair in enumerate(pairs.values())})
    lines = []
    for k in range(len(pairs)):
        of_pair = found.loc[str(k)]
        line: dict[str, Any] = {"seeds": of_pair["seeds"].max()}
        for metric, title in METRICS.items():
            d = of_pair.loc[metric]
            bounds = f" {interval_text(d['low'], d['high'], '+.3f')}" if np.isfinite(d["low"]) else ""
            mark = "" if d["complete"] or d["seeds"] == 1 else "\u00a0*"
            verdict = f"{d['verdict']}: one seed" if d["seeds"] == 1 else d["verdict"]
            line[title] = f"{d['value']:+.3f}{bounds}{mark}, {verdict}" if d["seeds"] else NOT_DEFINED
        lines.append(line)
    return pd.DataFrame(lines, index=pd.MultiIndex.from_tuples(pairs), columns=["seeds", *METRICS.values()])


def interval_text(low: float, high: float, digits: str = ".3f") -> str:
    """`[low, high]`, with a space that no line breaks at."""
    return f"[{low:{digits}},\u00a0{high:{digits}}]"


def costs(rows: Mapping[tuple[str, ...], Sequence[Record]]) -> pd.DataFrame:
    """One line a kind of run: parameters in millions, weights that it needs, `core_minutes` and the processor.

    Parameters
    ----------
    rows
        As in `intervals`.
    """
    lines = []
    for records in rows.values():
        first = records[0]
        source = first["weights"]["source"]
        lines.append(
            {
                "parameters": first["counts"]["parameters"] / 1e6,
                "trained": first["counts"]["trained_parameters"] / 1e6,
                "pre-trained weights": "none" if source == "random" else source,
                "minutes": core_minutes(records),
                "processor": fastest(records)["environment"]["device_name"],
            }
        )
    return pd.DataFrame(lines, index=pd.MultiIndex.from_tuples(rows))


def core_minutes(records: Sequence[Record]) -> float:
    """Minutes of one core that a run takes, from loading the images to the last test image.

    That is its time, times its threads. The shortest of the seeds counts, since other work on a machine only adds.
    """
    return float(_core_minutes(records).min())


def fastest(records: Sequence[Record]) -> Record:
    """The run that `core_minutes` counts."""
    return records[int(_core_minutes(records).argmin())]


def _core_minutes(records: Sequence[Record]) -> pd.Series:
    return by_run(records)["minutes"] * [r["environment"]["threads"] for r in records]


def ablation(
    variants: Mapping[str, Sequence[Record]], printed: Mapping[str, Mapping[str, float]] | None = None
) -> pd.DataFrame:
    """One line a variant: number of seeds, mean and standard deviation of each metric.

    Parameters
    ----------
    variants
        {name: records of its seeds}.
    printed
        {name: {metric: percent}} as the paper prints it, shown beside.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, records in variants.items():
        rows[name] = {"seeds": len(records)}
        for metric, title in METRICS.items():
            rows[name] |= _means([r["metrics"] for r in records], metric)
            if printed and metric in printed.get(name, {}):
                rows[name][f"{title}, printed"] = f"{printed[name][metric] / 100:.3f}"
    return pd.DataFrame(rows).T


def expectation(request: Request) -> pd.DataFrame:
    """How a paper's chapter opens: the command, the metrics to expect with their tolerance, the time, the hardware.

    Only committed runs of the same request count, for the metrics also those on other processors.
    """
    same = committed_seeds(request)
    every = same + on_other_processors(request)
    rows = {"command": " ".join(request.command(f"runs/{request.method}"))}
    for metric, title in METRICS.items():
        mean, tolerance, n = expected(every, metric)
        spread = f" ± {tolerance:.3f}" if n > 1 else ""
        rows[title] = f"{mean:.3f}{spread} ({n} runs)" if n else "never run so far"
    if same:
        machine = same[0]["environment"]
        rows["time"] = f"{by_run(same)['minutes'].mean():.1f} min"
        rows["hardware"] = f"{machine['device']}, {machine['device_name']}, {machine['threads']} thread(s)"
    return pd.DataFrame({"": rows})


def markdown(frame: pd.DataFrame) -> str:
    """A DataFrame as a Markdown table, without its index."""
    cells = [
        [f"{cell:.3f}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in row]
        for row in frame.to_numpy(object)
    ]
    rows = [list(frame.columns), ["---"] * len(frame.columns), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows).replace(" ± ", "\u00a0±\u00a0")


def _has(record: Record, metric: str) -> bool:
    return record["metrics"].get(metric) is not None


def _data(record: Record) -> str:
    return " ".join(filter(None, (record["dataset"], record["category"], record["split"])))


def _with_interval(records: Sequence[Record], metric: str) -> str:
    """A cell of `intervals`."""
    if not all(metric in r["metrics"] for r in records):
        return NOT_MEASURED
    found = estimate(records, metric)
    if not found.n_seeds:
        return NOT_DEFINED
    if found.sd_seeds is None and found.sd_test is None:
        return f"{found.value:.3f}"
    pro_limit = records[0]["protocol"]["pro_limit"]
    chance = {"image_auroc": 0.5, "pixel_auroc": 0.5, "pro": pro_limit / 2}.get(metric, -1.0)
    word = ", below chance" if found.high < chance else ", at chance" if found.low <= chance else ""
    mark = "\u00a0*" if found.sd_test is None else ""
    return f"{found.value:.3f} {interval_text(found.low, found.high)}{mark}{word}"


def _means(metrics: Sequence[Mapping[str, Any]], *names: str) -> dict[str, str]:
    """{title: mean and spread} of all metrics, or of those named, over records' `metrics`."""
    return {
        METRICS[name]: _mean_and_spread([m[name] for m in metrics]) if all(name in m for m in metrics) else NOT_MEASURED
        for name in names or METRICS
    }


def _mean_and_spread(values: Sequence[float | None]) -> str:
    numbers = np.array([v for v in values if v is not None], float)
    if len(numbers) < len(values):
        return NOT_DEFINED
    spread = f"\u00a0±\u00a0{numbers.std(ddof=1):.3f}" if len(numbers) > 1 else ""
    return f"{numbers.mean():.3f}{spread}"
