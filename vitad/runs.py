"""A run and its record: what was asked, what came out, on which machine, from which commit."""

import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import vitad
from vitad import data, methods, plots
from vitad.errors import UserError
from vitad.files import atomic_write, read_safetensors, write_safetensors
from vitad.metrics import evaluate
from vitad.settings import as_json, parse_overrides, resolve
from vitad.training import autocast, train

PRO_LIMIT = 0.3
MASK_THRESHOLD = 0
WRITTEN = ("checkpoint.safetensors", "maps.npz", "scores.csv", "history.csv", "heatmaps.png")  # before the record


def run(
    method,
    dataset="toy",
    category=None,
    split=None,
    data_root=None,
    preset="demo",
    seed=0,
    device="auto",
    overrides=None,
    weights="auto",
    out="runs/latest",
    skip_bad=False,
    say=None,
):
    """Train and evaluate one method on one data set; returns the record.

    Writes `record.json`, `maps.npz`, `scores.csv`, `checkpoint.safetensors`, `heatmaps.png` and `history.csv` to
    `out`; where training has several phases, also `checkpoint-<phase>.safetensors` behind each but the last. The record
    comes last, so a folder that has one is finished. The same call again resumes, or returns at once.

    Args:
        method: name in `vitad.methods.METHODS`.
        dataset, category, split, data_root, skip_bad: as in `vitad.data.load`. Without a category a method takes its
            own default before that of the data set: `mala` takes all. Figures of several categories are their means.
        preset, overrides: see `vitad.settings.resolve`.
        seed: initial weights, order of the images, every random choice.
        device: `auto` (CUDA where there is one), `cpu` or `cuda`.
        weights: of the backbone, see `vitad.backbones.vit`.
        out: folder of the run.
        say: called with lines of text about the data and the weights, such as `print`.

    Raises:
        UserError: on bad input, before anything is written.
    """
    module = methods.get(method)
    overrides = parse_overrides(overrides)
    settings = resolve(module.Settings, module.PRESETS, preset, overrides)
    seed, device = check_seed(seed), find_device(device)
    category = category or getattr(module, "CATEGORY", None)
    root, category, split, train_records, test_records = data.find(dataset, data_root, category, split)

    out = Path(out).expanduser()
    asked = {
        "method": method,
        "dataset": dataset,
        "category": category,
        "split": split,
        "preset": preset,
        "seed": seed,
        "settings": as_json(settings),
    }
    fingerprint = _fingerprint(root, train_records, test_records)
    request = asked | {"weights_asked": str(weights), "data": fingerprint}
    finished = _claim(out, request)
    if finished:
        _tidy(out)
        return finished
    say = say or (lambda text: None)

    times = {"began": time.monotonic()}
    torch.manual_seed(seed)
    model = module.Model(settings, weights).to(device)
    if str(weights) not in ("auto", "random") and model.weights["source"] == "random":
        hint = " or add --set pretrained=true" if hasattr(settings, "pretrained") else ""
        raise UserError(f"--weights {weights} would not be used: this run starts untrained. Leave it out{hint}.")
    sets = data.load(
        dataset, data_root, category, split, settings.image_size, mask_threshold=MASK_THRESHOLD, skip_bad=skip_bad
    )
    say(data.describe(sets))
    say(f"weights: {model.weights['source']}")
    about = {"vitad_method": method, "settings": json.dumps(asked["settings"])}

    def keep(phase, weights):
        write_safetensors(weights, out / f"checkpoint-{phase}.safetensors", about)

    times["load"] = time.monotonic()
    with _unfinished(out, request) as state:
        if hasattr(model, "prepare"):
            model.prepare(sets.train, device)
        times["prepare"] = time.monotonic()
        history = train(model, sets.train, seed, device, settings.amp, state, keep)
        times["train"] = time.monotonic()
        maps, scores = score(model, sets.test, device, settings.batch_size, settings.amp)
        times["score"] = time.monotonic()

        test = sets.test
        # A defect whose mask is empty, as published or after the resize, would pass for background.
        located = (test.labels == 0) | test.masks.any((1, 2))
        by_category = {
            category: _figures(test, maps, scores, test.categories == category, located)
            for category in dict.fromkeys(test.categories.tolist())
        }
        metrics = _means(list(by_category.values()))
        times["evaluate"] = time.monotonic()
        observed = model.observe(sets.train, device) if hasattr(model, "observe") else {}

        write_safetensors(model.state_dict(), out / "checkpoint.safetensors", about)
        _write_maps(out / "maps.npz", test, maps, scores)
        _write_rows(out / "scores.csv", _score_rows(test.paths, test.defects, test.labels, scores))
        _write_rows(out / "history.csv", history)
        _draw_heatmaps(out / "heatmaps.png", test, maps, scores)
        record = {
            "method": method,
            "paper": module.PAPER,
            **asked,
            "overrides": {k: asked["settings"][k] for k in overrides},
            "protocol": {
                "image_size": list(test.size),
                "image_resize": "both sides, bilinear with anti-aliasing",
                "mask_resize": "nearest",
                "mask_threshold": MASK_THRESHOLD,
                "empty_masks": "left out of the pixel figures",
                "pro_limit": PRO_LIMIT,
                "pro_connectivity": 8,
                **model.protocol,
                "data_sha256": fingerprint,
            },
            "weights": {"asked": str(weights), **model.weights},
            "metrics": metrics,
            **({"metrics_by_category": by_category} if len(by_category) > 1 else {}),
            "counts": {
                "train": len(sets.train),
                "test_good": int((test.labels == 0).sum()),
                "test_defective": int((test.labels == 1).sum()),
                "empty_masks": int((~located).sum()) if test.has_masks else 0,
                "skipped": sets.train.skipped + test.skipped,
                "parameters": sum(p.numel() for p in model.parameters()),
                "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "epochs": len(history),
                **observed,
            },
            "timings": _timings(times, history, len(test)),
            "environment": environment(device, settings.amp),
            "git": git_state(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with atomic_write(out / "record.json") as aside:
            aside.write_text(json.dumps(record, indent=2) + "\n")
    return record


@torch.no_grad()
def score(model, images, device, batch_size, amp=True):
    """Anomaly maps (N,H,W) float32 and image scores (N,) of an `ImageSet`."""
    model.eval()
    maps, scores = np.empty((len(images), *images.size), np.float32), np.empty(len(images), np.float32)
    for i in tqdm(range(0, len(images), batch_size), "score", unit="batch", leave=False):
        chosen = slice(i, min(i + batch_size, len(images)))
        batch = images.batch(range(chosen.start, chosen.stop), device)["image"]
        with autocast(device, amp):
            part = model.anomaly_map(batch).float()
        maps[chosen], scores[chosen] = part.cpu().numpy(), model.image_score(part).cpu().numpy()
    return maps, scores


def load_model(folder, device="auto", phase=None):
    """The trained model of a finished run, in eval mode on `device`; as it was behind `phase`, or in the end."""
    record = read_record(folder)
    module = methods.get(record["method"])
    path = Path(folder) / (f"checkpoint-{phase}.safetensors" if phase else "checkpoint.safetensors")
    tensors, metadata = read_safetensors(path)
    found = metadata.get("vitad_method")
    if found != record["method"]:
        raise UserError(
            f"{path} is a checkpoint of {found or 'something else'}, but the record says "
            f"{record['method']}. Run it again into another folder."
        )
    settings = resolve(module.Settings, {"recorded": {}}, "recorded", record["settings"])
    model = module.Model(settings, "random").to(find_device(device))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:
        raise UserError(f"{path} does not fit: {str(e).splitlines()[-1].strip()}") from e
    return model.eval()


def read_record(folder):
    """`record.json` of a run folder, as a dict."""
    path = Path(folder) / "record.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no record.json: not a finished run. Give the --out folder of one.")
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is not readable ({e}). Run it again into another folder.") from e


def settings_of(record):
    """A record's settings. One that is newer than the record has its default, which has to be what was done before."""
    return as_json(methods.get(record["method"]).Settings()) | record["settings"]


def read_records(folder):
    """All records below a folder, sorted by path; each also holds its `folder`."""
    paths = sorted(Path(folder).rglob("record.json"))
    return [read_record(p.parent) | {"folder": p.parent} for p in paths]


def committed(dataset=None):
    """Records that come with the book, below `results/` of the source tree; [] where vitad was installed without it."""
    records = read_records(Path(vitad.__file__).parent.parent / "results")
    return [r for r in records if dataset in (None, r["dataset"])]


def committed_seeds(method, dataset="toy", category=None, split=None, data_root=None, preset="demo", overrides=None):
    """Committed records of the very run that `run` would make of these arguments, one for each seed.

    The data need not be there.
    """
    module = methods.get(method)
    settings = as_json(resolve(module.Settings, module.PRESETS, preset, parse_overrides(overrides)))
    category, split = data.part(dataset, category or getattr(module, "CATEGORY", None), split)
    asked = (method, category, split)
    found = [r for r in committed(dataset) if (r["method"], r["category"], r["split"]) == asked]
    return [r for r in found if settings_of(r) == settings]


def find_or_run(method, seed=0, device="auto", out="runs/latest", **request):
    """The committed record of this very run with this seed; where there is none, it is run now.

    `request` holds further arguments of `run`.
    """
    for record in committed_seeds(method, **request):
        if record["seed"] == seed:
            return record
    return run(method, seed=seed, device=device, out=out, **request)


def run_variants(method, variants, seeds, device="auto", out="runs/latest", overrides=None, **request):
    """An ablation: `{name: records of all seeds}` of the variants `{name: overrides}`, each by `find_or_run`.

    `overrides` hold for all variants alike; the runs go to `out/<name>-<seed>`.
    """
    return {
        name: [
            find_or_run(
                method,
                seed,
                device,
                f"{out}/{name.replace(' ', '-')}-{seed}",
                overrides={**(overrides or {}), **own},
                **request,
            )
            for seed in seeds
        ]
        for name, own in variants.items()
    }


def read_maps(folder):
    """`maps.npz` of a run: dict of arrays `maps, masks, scores, labels, paths, defects`."""
    try:
        with np.load(Path(folder) / "maps.npz") as file:
            return dict(file)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no maps.npz. Run it again: records that come with the book have none."
        ) from None


def read_history(folder):
    """`history.csv` of a run, numbers as floats; empty where nothing was trained."""
    path = Path(folder) / "history.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{k: v if k == "phase" else float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def compare(folders, out, data_root=None, per_kind=2, good=2):
    """Draw the same test images as several finished runs see them, one row a run, into the PNG file `out`.

    Good images and every kind of defect are there, spread evenly over the ranking by the mean of the runs' ranks, so
    that no run chooses. Each row has one colour scale of its own, since methods score on different scales.

    Args:
        folders: of the runs, with `record.json` and `maps.npz`; of one data set and one split.
        data_root: folder of the data set, as in `vitad.data.load`.
        per_kind, good: images of each kind of defect, and good ones.

    Raises:
        UserError: where runs have no maps, share no test image, or were tested on other data than `data_root`.
    """
    records, maps = [read_record(f) for f in folders], [read_maps(f) for f in folders]
    shared = set.intersection(*({str(p) for p in m["paths"]} for m in maps))
    if not shared or len({(r["dataset"], r["split"]) for r in records}) > 1:
        raise UserError("these runs share no test images. Give runs of one data set, one split and one category.")
    paths, rows = sorted(shared), []
    for m in maps:
        number = {str(p): i for i, p in enumerate(m["paths"])}
        rows.append(np.array([number[p] for p in paths]))
    labels, defects = (maps[0][k][rows[0]] for k in ("labels", "defects"))
    ranks = [m["scores"][i].argsort().argsort() for m, i in zip(maps, rows, strict=True)]
    chosen = plots.examples(labels, defects, per_kind, good, order=np.mean(ranks, 0))

    r, size = records[0], max(r["protocol"]["image_size"] for r in records)
    root, *_, test_records = data.find(r["dataset"], data_root, r["category"], r["split"])
    by_path = {t.path.relative_to(root).as_posix(): t for t in test_records}
    if absent := [paths[k] for k in chosen if paths[k] not in by_path]:
        raise UserError(f"{root} does not hold {absent[0]}, which these runs were tested on. Give their --data-root.")
    test = data.ImageSet([by_path[paths[k]] for k in chosen], root, size, mask_threshold=MASK_THRESHOLD)
    names = [f"{r['method']}\n{r['protocol']['image_size'][0]} px" for r in records]
    if len(set(names)) < len(names):
        names = [Path(f).resolve().name for f in folders]
    seen = {n: m["maps"][i[chosen]] for n, m, i in zip(names, maps, rows, strict=True)}
    limits = {n: plots.heat_range(m["maps"]) for n, m in zip(names, maps, strict=True)}
    images, titles = test.batch(range(len(test)))["image"].numpy(), [str(d) for d in defects[chosen]]
    plots.save(plots.heatmap_grid(images, test.masks, seen, titles, limits, 0.8 * len(chosen)), out, dpi=100)


def find_device(name):
    """`auto`, `cpu` or `cuda` as a torch device."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device '{name}'. Choose auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but torch sees no CUDA GPU. Use --device auto or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_seed(seed):
    """`seed` as a whole number from 0."""
    try:
        number = int(seed)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or number != seed and str(number) != str(seed) or number >= 2**32:
        raise UserError(f"seed {seed!r} is not usable. Give a whole number from 0.")
    return number


def environment(device=None, amp=None):
    """The machine and the versions, as the record keeps them."""
    device = device or find_device("auto")
    cuda = device.type == "cuda"
    with autocast(device, bool(amp)):
        precision = "bfloat16 autocast" if torch.is_autocast_enabled(device.type) else "float32"
    return {
        "vitad": vitad.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "device_name": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": precision,
    }


def describe_environment(device="auto", **settings):
    """What a notebook prints first: versions, device, and the parameters it runs with."""
    e = environment(find_device(device))
    print(f"vitad {e['vitad']} · python {e['python']} · torch {e['torch']} · timm {e['timm']} · numpy {e['numpy']}")
    print(f"device {e['device']}: {e['device_name']}, {e['threads']} threads")
    print(" · ".join(f"{k}={v!r}" for k, v in settings.items()))


def git_state():
    """Commit of the source tree that vitad is imported from, and whether it was changed; None outside of one."""
    here = Path(vitad.__file__).parent

    def git(*words):
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here.parent:
            return None
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", here))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _claim(out, request):
    """The record, if `out` holds this very run finished; None if it can be run there; `UserError` otherwise."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Give a folder with --out.")
    if not out.exists() or not any(out.iterdir()):
        return None
    if (out / "record.json").exists():
        record = read_record(out)
        there = record | {"weights_asked": record["weights"]["asked"], "data": record["protocol"]["data_sha256"]}
    elif (out / ".run" / "request.json").exists():
        record, there = None, json.loads((out / ".run" / "request.json").read_text())
    elif {p.name for p in out.iterdir()} == {".run"}:
        return None
    else:
        raise UserError(f"{out} holds files that are not a run. Give another folder with --out.")
    mine, theirs = ({**r, **settings_of(r), "settings": None} for r in (request, there))
    for key, value in mine.items():
        if theirs.get(key) != value:
            raise UserError(
                f"{out} holds another run: {key} is {theirs.get(key)!r} there and {value!r} here. "
                "Give another folder with --out."
            )
    return record


@contextmanager
def _unfinished(out, request):
    """Mark `out` as this run, unfinished; gives the path for its training state.

    The mark goes when the run is whole. A run that fails before there is a state worth resuming leaves nothing.
    """
    mark = out / ".run"
    state = mark / "state.pt"
    try:
        with atomic_write(mark / "request.json") as aside:
            aside.write_text(json.dumps(request))
        yield state
    except BaseException:
        if out.is_dir() and not state.exists():
            for written in [*(out / name for name in WRITTEN), *out.glob("checkpoint-*.safetensors")]:
                written.unlink(missing_ok=True)
            _tidy(out)
            if not any(out.iterdir()):
                out.rmdir()
        raise
    _tidy(out)


def _tidy(out):
    """Remove what is needed only until a run is finished, and what a killed one had begun to write."""
    shutil.rmtree(out / ".run", ignore_errors=True)
    for half in out.glob(".*.tmp"):
        half.unlink()


def _figures(test, maps, scores, here, located):
    """The four figures of one category: of the images `here`, and of the pixels of those that are also `located`."""
    has_masks = any(r.mask for r, chosen in zip(test.records, here, strict=True) if chosen)
    pixels = here & located
    masks = test.masks[pixels] if has_masks else None
    return evaluate(maps[pixels], masks, scores[here], test.labels[here], PRO_LIMIT)


def _means(figures):
    """Mean over categories; a figure that one of them does not have has none."""
    columns = {name: [f[name] for f in figures] for name in figures[0]}
    return {name: None if None in column else float(np.mean(column)) for name, column in columns.items()}


def _fingerprint(root, *lists):
    """Hash of the relative names and sizes of all files of the split, so that other data is another run."""
    digest = hashlib.sha256()
    for records in lists:
        for record in records:
            for path in filter(None, (record.path, record.mask)):
                digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _timings(times, history, n_test):
    seconds, previous = {}, times.pop("began")
    for name, moment in times.items():
        seconds[f"{name}_s"] = round(moment - previous, 3)
        previous = moment
    if history:  # of all sessions, where the run was resumed
        seconds["train_s"] = history[-1]["seconds"]
    seconds["test_images_per_s"] = round(n_test / max(seconds["score_s"], 1e-9), 2)
    return seconds


def _write_maps(path, test, maps, scores):
    named = dict(masks=test.masks, labels=test.labels, paths=test.paths, defects=test.defects)
    with atomic_write(path) as aside, open(aside, "wb") as file:
        np.savez(file, maps=maps, scores=scores, **named)


def _score_rows(paths, defects, labels, scores):
    found = zip(paths, defects, labels, scores, strict=True)
    return [dict(image=str(p), defect=str(d), label=int(y), score=f"{s:.6g}") for p, d, y, s in found]


def _write_rows(path, rows):
    if rows:
        with atomic_write(path) as aside, open(aside, "w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
            table.writeheader()
            table.writerows(rows)


def _draw_heatmaps(path, test, maps, scores):
    categories = dict.fromkeys(test.categories.tolist())
    each, chosen = 1 if len(categories) > 1 else 2, []
    for category in categories:
        here = np.flatnonzero(test.categories == category)
        few = plots.examples(test.labels[here], test.defects[here], per_kind=each, good=each, order=scores[here])
        chosen += here[few].tolist()
    images = test.batch(chosen)["image"].numpy()
    titles = [f"{test.defects[i]}\n{scores[i]:.3g}" for i in chosen]
    limits, width = plots.heat_range(maps), 1.1 * len(chosen)
    plots.save(plots.heatmap_grid(images, test.masks[chosen], maps[chosen], titles, limits, width), path, dpi=80)


def _cpu_name():
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
