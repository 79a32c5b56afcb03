"""How a run is made: resolve, claim, load, prepare, train, score, evaluate, record.

The file is not called `run.py`, since the function `vitad.runs.run` would hide it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vitad import data, methods
from vitad.data import Found, ImageSet, Split
from vitad.errors import UserError
from vitad.files import write_safetensors
from vitad.methods.base import Method
from vitad.metrics import evaluate
from vitad.processes import Processes
from vitad.resampling import Resamples, draw, intervals, mean_of, resample
from vitad.runs import folder as run_folder
from vitad.runs.machine import arithmetic, compile_blocks, environment, find_device, git_state
from vitad.runs.record import Record, committed_seeds, read_record, write_record
from vitad.runs.request import AUTO, Request
from vitad.settings import resolve
from vitad.training import autocast, train

PRO_LIMIT = 0.3
MASK_THRESHOLD = 0


def run(
    request: Request | str, out: str | Path = "runs/latest", say: Callable[[str], None] | None = None, **fields: Any
) -> Record:
    """Train and evaluate one method on one data set; returns the record.

    Started as one of several processes, it shares the work with them, see `vitad.processes`; the first one writes.

    Writes `record.json`, `maps.npz`, `scores.csv`, `resamples.npz`, `checkpoint.safetensors`, `heatmaps.png` and
    `history.csv` to `out`; where training has several phases, also `checkpoint-<phase>.safetensors` after each but the
    last. The record comes last, so a folder that has one is finished. The same call again resumes, or returns at once.

    Parameters
    ----------
    request
        A `Request`, or the name of a method.
    out
        Folder of the run.
    say
        Called with lines of text about the data and the weights, such as `print`.
    fields
        Fields of `Request` that differ from those of `request`.

    Returns
    -------
    dict
        What `record.json` holds. Metrics of several categories are their means.

    Raises
    ------
    UserError
        On bad input, before anything is written.

    Examples
    --------
    >>> record = run("patchknn", preset="smoke", device="cpu", out=getfixture("tmp_path"))
    >>> sorted(record["metrics"])
    ['image_auroc', 'pixel_ap', 'pixel_auroc', 'pro']
    """
    request = Request.make(request, **fields)
    out = Path(out).expanduser()
    processes = Processes.join(find_device(request.device))
    device = processes.device
    say = say if say and processes.writes else lambda line: None
    with processes.one_after_another():
        found = data.find(request.dataset, request.data_root, request.category, request.split)
        if record := run_folder.claim(out, request, found):
            if processes.writes:
                run_folder.tidy(out)
            return record
        clock = Clock()
        model = _make_model(request, device)
        processes.check(model.phases())
        images = found.load(model.settings.image_size, MASK_THRESHOLD, request.skip_bad)
    say(data.describe(images))
    say(f"weights: {model.weights['source']}")
    clock.note("load")
    if request.compile:
        compile_blocks(model, device)
    with arithmetic(request, device), run_folder.unfinished(out, request, found, processes.writes) as state:
        model.prepare(images.train, device)
        clock.note("prepare")
        keep = _phase_writer(out, request)
        history = train(model, images.train, request.seed, device, model.settings.amp, state, keep, processes)
        model.finish(images.train, device)
        clock.note("train")
        maps, scores = score(model, images.test, device, model.settings.batch_size, model.settings.amp, processes)
        clock.note("score")
        if processes.writes:
            metrics, resamples = _evaluate(images.test, maps, scores)
            clock.note("evaluate")
            counts = _counts(model, images, history) | model.observe(images.train, device)

            write_safetensors(model.state_dict(), out / "checkpoint.safetensors", _checkpoint_metadata(request))
            run_folder.write_maps(out, images.test, maps, scores)
            run_folder.write_scores(out, images.test, scores)
            run_folder.write_resamples(out, images.test, resamples)
            run_folder.write_history(out, history)
            _draw_heatmaps(out / "heatmaps.png", images.test, maps, scores)
            record = _describe(request, found, model, images) | {
                **metrics,
                "counts": counts,
                "timings": _timings(clock, history, len(images.test)),
                "environment": environment(device, model.settings.amp, request, processes.number),
                "git": git_state(),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            write_record(record, out)
    processes.wait()
    return record or read_record(out)


def find_or_run(request: Request | str, out: str | Path = "runs/latest", **fields: Any) -> Record:
    """The committed record of this very run; where there is none, it is run now. Arguments as in `run`."""
    request = Request.make(request, **fields)
    same_seed = [r for r in committed_seeds(request) if r["seed"] == request.seed]
    return same_seed[0] if same_seed else run(request, out)


def run_variants(
    request: Request, variants: Mapping[str, Mapping[str, Any]], seeds: Iterable[int], out: str | Path = "runs/latest"
) -> dict[str, list[Record]]:
    """An ablation: for each variant the records of all seeds, found or made by `find_or_run`.

    Parameters
    ----------
    request
        What all runs have in common.
    variants
        {name: overrides on top of those of `request`}.
    seeds
        Of the runs of each variant.
    out
        The runs go to folders `<name>-<seed>` in it.
    """
    return {
        name: [
            find_or_run(
                replace(request, seed=seed).override(**overrides), Path(out) / f"{name.replace(' ', '-')}-{seed}"
            )
            for seed in seeds
        ]
        for name, overrides in variants.items()
    }


@torch.no_grad()
def score(
    model: Method,
    images: ImageSet,
    device: torch.device,
    batch_size: int,
    amp: bool = True,
    processes: Processes | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Anomaly maps (N,H,W) float32 and image scores (N,) of a set of images.

    Several `processes` take the batches in turn. The batches are the same, so the numbers are, and all get all of them.
    """
    processes = processes or Processes(device)
    model.eval()
    maps = np.empty((len(images), *images.size), np.float32)
    scores = np.empty(len(images), np.float32)
    starts = range(0, len(images), batch_size)
    mine = starts[processes.rank :: processes.number]
    for start in tqdm(mine, "score", unit="batch", leave=False, disable=not processes.writes):
        indices = range(start, min(start + batch_size, len(images)))
        batch = images.batch(indices, device)["image"]
        with autocast(device, amp):
            batch_maps = model.anomaly_map(batch).float()
        maps[indices] = batch_maps.cpu().numpy()
        scores[indices] = model.image_score(batch_maps).cpu().numpy()
    for n, start in enumerate(starts):
        part = slice(start, start + batch_size)
        processes.hand_round((maps[part], scores[part]), n % processes.number)
    return maps, scores


class Clock:
    """Seconds that the steps of a run take."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def note(self, step: str) -> None:
        """The step ends now."""
        now = time.monotonic()
        self.seconds[f"{step}_s"], self.last = round(now - self.last, 3), now


def _make_model(request: Request, device: torch.device) -> Method:
    module = methods.get(request.method)
    settings = resolve(module.Settings, module.PRESETS, request.preset, request.overrides)
    torch.manual_seed(request.seed)
    model = module.Model(settings, request.weights).to(device)
    if request.weights not in (AUTO, "random") and model.weights["source"] == "random":
        hint = " or add --set pretrained=true" if "pretrained" in request.settings else ""
        raise UserError(
            f"--weights {request.weights} would not be used: this run starts untrained. Leave it out{hint}."
        )
    return model


def _phase_writer(out: Path, request: Request) -> Callable[[str, Mapping[str, torch.Tensor]], None]:
    """A function that keeps the weights after a phase of training."""

    def write(phase: str, weights: Mapping[str, torch.Tensor]) -> None:
        write_safetensors(weights, out / f"checkpoint-{phase}.safetensors", _checkpoint_metadata(request))

    return write


def _checkpoint_metadata(request: Request) -> dict[str, str]:
    return {"vitad_method": request.method, "settings": json.dumps(request.settings)}


def _evaluate(test: ImageSet, maps: np.ndarray, scores: np.ndarray) -> tuple[dict[str, dict], dict[str, Resamples]]:
    """`metrics` and `intervals` of the record, `metrics_by_category` where there are several; resamples of each."""
    by_category, resamples = {}, {}
    for category in dict.fromkeys(test.categories.tolist()):
        chosen = test.categories == category
        pixels = chosen & _located(test)
        has_masks = any(r.mask for r, is_chosen in zip(test.records, chosen, strict=True) if is_chosen)
        masks = test.masks[pixels] if has_masks else None
        by_category[category] = evaluate(maps[pixels], masks, scores[chosen], test.labels[chosen], PRO_LIMIT)
        weights = draw(test.paths[chosen], test.groups[chosen], test.labels[chosen])
        masks = test.masks[chosen] if has_masks else None
        resamples[category] = resample(maps[chosen], masks, scores[chosen], test.labels[chosen], weights, PRO_LIMIT)
    means = _means(list(by_category.values()))
    found: dict[str, dict] = {"metrics": means, "intervals": intervals(means, mean_of(list(resamples.values())))}
    return found if len(by_category) == 1 else found | {"metrics_by_category": by_category}, resamples


def _located(test: ImageSet) -> np.ndarray:
    """(N,) bool. A defect whose mask is empty, as published or after the resize, would pass for background."""
    return (test.labels == 0) | test.masks.any((1, 2))


def _means(metrics: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Means over categories. A metric that one of them does not have has no mean."""
    columns = {name: [m[name] for m in metrics] for name in metrics[0]}
    return {name: None if None in column else float(np.mean(column)) for name, column in columns.items()}  # type: ignore


def _counts(model: Method, images: Split, history: list[dict]) -> dict[str, Any]:
    test = images.test
    return {
        "train": len(images.train),
        "test_good": int((test.labels == 0).sum()),
        "test_defective": int((test.labels == 1).sum()),
        "empty_masks": int((~_located(test)).sum()) if test.has_masks else 0,
        "skipped": images.train.skipped + test.skipped,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "epochs": len(history),
    }


def _describe(request: Request, found: Found, model: Method, images: Split) -> Record:
    """The first part of a record: what was asked for, and how it was measured."""
    described = run_folder.describe(request, found)
    names = ("revision", "dataset", "category", "split", "preset", "seed", "settings")
    return {
        "method": request.method,
        "paper": methods.get(request.method).PAPER,
        **{name: described[name] for name in names},
        "overrides": dict(request.overrides),
        "protocol": {
            "image_size": list(images.test.size),
            "image_resize": "both sides, bilinear with anti-aliasing",
            "mask_resize": "nearest",
            "mask_threshold": MASK_THRESHOLD,
            "empty_masks": "left out of the pixel metrics",
            "pro_limit": PRO_LIMIT,
            "pro_connectivity": 8,
            **model.protocol,
            "data_sha256": described["data"],
            "data_files": described["data_files"],
        },
        "weights": {**described["weights"], **model.weights},
    }


def _timings(clock: Clock, history: list[dict], n_test: int) -> dict[str, float]:
    seconds = dict(clock.seconds)
    if history:  # of all sessions, where the run was resumed
        seconds["train_s"] = history[-1]["seconds"]
    seconds["test_images_per_s"] = round(n_test / max(seconds["score_s"], 1e-9), 2)
    return seconds


def _draw_heatmaps(path: Path, test: ImageSet, maps: np.ndarray, scores: np.ndarray) -> None:
    from vitad.show import plots  # brings matplotlib, which nobody needs who only reads records

    categories = dict.fromkeys(test.categories.tolist())
    n_each, chosen = 1 if len(categories) > 1 else 2, []
    for category in categories:
        members = np.flatnonzero(test.categories == category)
        few = plots.examples(test.labels[members], test.defects[members], n_each, n_each, scores[members])
        chosen += members[few].tolist()
    images = test.batch(chosen)["image"].numpy()
    titles = [f"{test.defects[i]}\n{scores[i]:.3g}" for i in chosen]
    limits, width = plots.heat_range(maps), 1.1 * len(chosen)
    plots.save(plots.heatmap_grid(images, test.masks[chosen], maps[chosen], titles, limits, width), path, dpi=80)
