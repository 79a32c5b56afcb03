"""Tables of the book, made of run records: nothing here is typed."""

import json

import numpy as np
import pandas as pd
from scipy import stats

from vitad.runs import committed_seeds
from vitad.settings import parse_overrides

METRIC_NAMES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP", "pro": "PRO"}


def by_run(records):
    """One line a run: a pandas DataFrame of what was run and its four figures."""
    rows = [
        {
            "method": r["method"],
            "data": " ".join(filter(None, (r["dataset"], r["category"], r["split"]))),
            "preset": ", ".join([r["preset"], *(f"{k}={v}" for k, v in r["overrides"].items() if k != "image_size")]),
            "px": r["protocol"]["image_size"][0],
            "seed": r["seed"],
            **{METRIC_NAMES[k]: v for k, v in r["metrics"].items()},
            "minutes": sum(r["timings"][k] for k in ("load_s", "prepare_s", "train_s", "score_s")) / 60,
        }
        for r in records
    ]
    columns = ["method", "data", "preset", "px", "seed", *METRIC_NAMES.values(), "minutes"]
    return pd.DataFrame(rows, columns=columns)


def over_seeds(records):
    """One line for each set of runs that differ in the seed only: number of seeds, mean and standard deviation.

    A single seed has no spread and shows none.
    """
    names, keys = list(METRIC_NAMES.values()), ["data", "method", "preset", "px"]
    settings = [json.dumps([r["settings"], r["weights"]], sort_keys=True) for r in records]
    groups = by_run(records).assign(settings=settings).groupby([*keys, "settings"])
    result = groups[names].agg(_mean_and_spread)
    result.insert(0, "seeds", groups.size())
    return result.reset_index().drop(columns="settings")


def across_splits(records, honest, other):
    """What changing the split does to each method: image AUROC on both (mean over seeds), and the gain."""
    runs_ = by_run(records).assign(split=[r["split"] for r in records])
    means = runs_.pivot_table("image AUROC", ["method", "preset", "px"], "split")
    means = means.reindex(columns=[honest, other]).dropna().round(3)
    return means.assign(gain=(means[other] - means[honest]).round(3)).reset_index().rename_axis(columns=None)


def ablation(variants, printed=None):
    """One line a variant: number of seeds, mean and standard deviation of each figure.

    Args:
        variants: {name: records of its seeds}.
        printed: {name: {metric: percent}} as the paper prints it, shown beside.
    """
    rows = {}
    for name, records in variants.items():
        rows[name] = {"seeds": len(records)}
        for metric, title in METRIC_NAMES.items():
            rows[name][title] = _mean_and_spread(pd.Series([r["metrics"][metric] for r in records], dtype=float))
            if printed and metric in printed.get(name, {}):
                rows[name][f"{title}, printed"] = f"{printed[name][metric] / 100:.3f}"
    return pd.DataFrame(rows).T


def contrast(variants, weights, metric="image_auroc"):
    """A weighted sum of variants, such as `{"full": 1, "base": -1}`, with its 95 % confidence interval over seeds.

    Runs of the same seed share initial weights and order of the images, so the sum is taken seed by seed
    (Student's t). Returns a dict `difference, plus_minus, seeds, verdict`; the verdict is "above 0", "below 0", or
    "undecided" where the interval holds 0 or a single seed gives none.
    """
    values = {name: {r["seed"]: r["metrics"][metric] for r in variants[name]} for name in weights}
    seeds = sorted(set.intersection(*(set(v) for v in values.values())))
    sums = np.array([sum(w * values[name][seed] for name, w in weights.items()) for seed in seeds])
    n, mean = len(sums), float(sums.mean()) if len(sums) else float("nan")
    half = float(stats.t.ppf(0.975, n - 1) * sums.std(ddof=1) / n**0.5) if n > 1 else float("inf")
    verdict = "undecided" if not abs(mean) > half else "above 0" if mean > 0 else "below 0"
    return {"difference": round(mean, 4), "plus_minus": round(half, 4), "seeds": n, "verdict": verdict}


def contrasts(variants, weights, metrics=("image_auroc", "pixel_auroc", "pro"), printed=None):
    """One line for each `contrast` of `weights = {name: {variant: weight}}` and metric, beside the printed one."""
    lines = []
    for name, weighting in weights.items():
        for metric in metrics:
            line = {"contrast": name, "figure": METRIC_NAMES[metric], **contrast(variants, weighting, metric)}
            if printed:
                line["printed"] = round(sum(w * printed[v][metric] for v, w in weighting.items()) / 100, 4)
            lines.append(line)
    return pd.DataFrame(lines).set_index(["contrast", "figure"])


def expectation(method, seed=0, **request):
    """How a paper's chapter opens: the command, the figures to expect with their tolerance, the time, the hardware.

    `request` holds further arguments of `run`, of which only runs with the same ones count.
    """
    same = committed_seeds(method, **request)
    options = {k.replace("_", "-"): v for k, v in request.items() if v and k != "overrides"} | {"seed": seed}
    changed = "".join(f" --set {k}={v}" for k, v in parse_overrides(request.get("overrides") or {}).items())
    words = " ".join(f"--{k} {v}" for k, v in options.items())
    rows = {"command": f"vitad run {method} {words}{changed} --out runs/{method}"}
    for metric, name in METRIC_NAMES.items():
        mean, tolerance, n = expected(same, metric)
        rows[name] = f"{mean:.3f} ± {tolerance:.3f} ({n} seeds)" if n else "never run so far"
    if same:
        machine = same[0]["environment"]
        rows["time"] = f"{by_run(same)['minutes'].mean():.1f} min"
        rows["hardware"] = f"{machine['device']}, {machine['device_name']}, {machine['threads']} thread(s)"
    return pd.DataFrame({"": rows})


def expected(records, metric="image_auroc"):
    """(mean, tolerance, n) of a figure over the seeds of committed runs.

    The tolerance is ours: three standard deviations of the seeds, and at least 0.02. (nan, nan, 0) without runs.
    """
    values = np.array([r["metrics"][metric] for r in records], float)
    if not len(values):
        return float("nan"), float("nan"), 0
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return float(values.mean()), float(max(3 * spread, 0.02)), len(values)


def markdown(frame):
    """A DataFrame as a Markdown table, without its index."""
    cells = [
        [f"{cell:.3f}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in row]
        for row in frame.to_numpy(object)
    ]
    rows = [list(frame.columns), ["---"] * len(frame.columns), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows).replace(" ± ", "\u00a0±\u00a0")


def _mean_and_spread(values):
    if values.isna().any():
        return "–"
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"
