"""Tables of the book, made of run records or measured: nothing here is typed."""

import json
import time

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtrit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vitad import methods
from vitad.errors import UserError
from vitad.metrics import auroc
from vitad.runs import committed_seeds, find_device
from vitad.settings import parse_overrides, resolve
from vitad.training import autocast

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


def by_category(records):
    """One line for each category and kind of run: the figures of that category, mean and standard deviation over seeds.

    A run over one category stands beside those that one model of all categories gives.
    """
    rows = []
    for r in records:
        own = "/".join(filter(None, (r["dataset"], r["category"])))
        for category, figures in r.get("metrics_by_category", {own: r["metrics"]}).items():
            rows.append({"category": category, "method": r["method"], "trained on": own, **figures})
    groups = pd.DataFrame(rows).groupby(["category", "method", "trained on"], sort=False)
    result = groups[list(METRIC_NAMES)].agg(_mean_and_spread).rename(columns=METRIC_NAMES)
    result.insert(0, "seeds", groups.size())
    return result


def by_defect(records, category=None):
    """Image AUROC of each kind of defect against all good images, mean and standard deviation over seeds.

    From `scores.csv` beside the records; runs without one are left out. Of runs over several categories only the
    images of `category`, their first folder, are counted, or all.
    """
    rows = []
    for r in records:
        if not (path := r["folder"] / "scores.csv").exists():
            continue
        found = pd.read_csv(path)
        if category and "metrics_by_category" in r:
            found = found[found["image"].str.startswith(f"{category}/")]
        for kind in sorted(set(found["defect"][found["label"] == 1])):
            part = found[(found["label"] == 0) | (found["defect"] == kind)]
            figure = auroc(part["score"].to_numpy(), part["label"].to_numpy(bool))
            rows.append({"method": r["method"], "px": r["protocol"]["image_size"][0], "defect": kind, "figure": figure})
    columns = ["method", "px", "defect", "figure"]
    groups = pd.DataFrame(rows, columns=columns).groupby(columns[:3])["figure"]
    return groups.agg(_mean_and_spread).unstack("defect")


def cost(names, image_size=256, preset="paper", device="auto"):
    """What a test image costs: parameters, multiply-adds and images a second here, one at a time, of each method.

    Weights are zero and nothing is trained, which changes none of it. Where patches do not divide `image_size`, the
    next smaller size that they do divide is taken.
    """
    device = find_device(device)
    rows = {}
    for name in names:
        model, px = _untrained(methods.get(name), image_size, preset)
        model = model.to(device).eval()
        if name == "patchknn":
            bank = torch.randn(model.settings.bank_size, model.bank.shape[1], device=device)
            model.bank = torch.nn.functional.normalize(bank)
        image, seconds = torch.rand(1, 3, px, px, device=device), []
        with torch.no_grad(), autocast(device, model.settings.amp):
            # The counter does not see fused attention. This round also warms up.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                model.anomaly_map(image)
            while len(seconds) < 10 and sum(seconds) < 0.4:
                began = time.perf_counter()
                float(model.anomaly_map(image).sum())  # waits for the device
                seconds.append(time.perf_counter() - began)
        rows[name] = {
            "px": px,
            "parameters, million": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
            "multiply-adds, billion": round(counter.get_total_flops() / 2e9, 1),
            "images a second": float(f"{1 / min(seconds):.2g}"),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _untrained(module, image_size, preset):
    """(model, side in px)"""
    untrained = {"pretrained": False} if hasattr(module.Settings, "pretrained") else {}
    for px in range(image_size, image_size - 16, -1):
        try:
            settings = resolve(module.Settings, module.PRESETS, preset, untrained | {"image_size": px})
            with _Zeros():
                return module.Model(settings, "random"), px
        except UserError as e:
            refused = e
    raise refused


class _Zeros(TorchFunctionMode):
    """New weights are zero: to draw those of a large ViT takes longer than to run it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


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
    half = float(stdtrit(n - 1, 0.975) * sums.std(ddof=1) / n**0.5) if n > 1 else float("inf")
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

    The tolerance is ours: three standard deviations of the seeds, and at least 0.04, which is twice what another
    processor was seen to change. (nan, nan, 0) without runs.
    """
    values = np.array([r["metrics"][metric] for r in records], float)
    if not len(values):
        return float("nan"), float("nan"), 0
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return float(values.mean()), float(max(3 * spread, 0.04)), len(values)


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
