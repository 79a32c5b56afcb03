"""The papers' tables run again: which runs a table needs, what they cost, and every cell reported and reproduced.

A table is asked for by name, on the paper's data or on other data, and becomes a list of `Request`s. Settings are
resolved when asked for, so that a changed preset or default is another run.
"""

import hashlib
import json
import re
import traceback
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from vitad import data, methods, reported, runs
from vitad.data import toy
from vitad.data.download import SOURCES
from vitad.errors import UserError, unknown
from vitad.files import atomic_write
from vitad.methods import vitmem
from vitad.settings import as_json, parse_overrides, resolve
from vitad.tables import METRIC_NAMES, markdown

PRESETS = {"toy": "demo", "mt": "small", ("mala", "mt"): "small_dinov2"}  # of the book's own records
FAITHFUL = ("paper", "legacy")  # presets whose figures can be held against a paper's,
FILES = {"textures"}  # also with these settings, which say where something lies
EACH = "each"  # as a category: one model for each
AVERAGE = "average"


@dataclass(frozen=True)
class Table:
    """A printed table and which of its columns can be run.

    `dataset` is what the methods are trained on, as in `data.load`, `split` the paper's own. `source` is the name of
    the printed figures in `reported`, and `printed_data` their data set. `ours` says how a printed column (or row, of
    an ablation) is run: {printed name: (method, overrides)}; the other columns are shown as reported.
    """

    paper: str
    place: str
    dataset: str
    source: str | None
    printed_data: str
    metrics: tuple[str, ...]
    ours: dict
    split: str | None = None
    others: bool = True  # off: of the printed columns, only those that are run
    ahead: tuple[str, ...] = ()  # two columns: in how many categories the first is above the second
    note: str = ""


_MEMORY = {"Ours": ("vitmem", {})}
_MALA = {"Ours": ("mala", {})}
_TOKENS = {"Ours": ("ssltok", {})}
_CONVOLUTIONS = {"AnoViT": ("anovit", {}), "L2-CAE": ("l2cae", {})}
_ABLATION = {
    "Base": ("vitmem", vitmem.VARIANTS["base"]),
    "Base + M": ("vitmem", vitmem.VARIANTS["base_m"]),
    "Base + CA": ("vitmem", vitmem.VARIANTS["base_ca"]),
    "Base + M + CA (Ours)": ("vitmem", {}),
}
_IMAGE, _LOCAL, _BOTH = ("image_auroc",), ("pixel_auroc", "pro"), ("image_auroc", "pixel_auroc")
_ALL = ("image_auroc", "pixel_auroc", "pro")
_YANG, _CHEN, _KIM, _LEE = "yang_guo_2024", "chen_2023_mala", "kim_kwon_2024", "lee_kang_2022_anovit"
_TEXTURES = "The paper paints textures of DTD; without --set textures=FOLDER they are procedural here."
_T3, _ABSTRACTS = "yang2024_table3_mvtec_image_auroc", "abstract_numbers"
_ONE_MODEL = "mvtec+visa"  # Chen et al., sec. IV-C: one model for the categories of both

TABLES = {
    "yang2024-3": Table(_YANG, "Table 3", "mvtec", _T3, "mvtec_ad", _IMAGE, _MEMORY | _CONVOLUTIONS),
    "yang2024-4": Table(_YANG, "Table 4", "mvtec", "yang2024_table4_mvtec_localization", "mvtec_ad", _LOCAL, _MEMORY),
    "yang2024-5": Table(_YANG, "Table 5", "btad", "yang2024_table5_btad", "btad", _ALL, _MEMORY),
    "yang2024-6": Table(_YANG, "Table 6", "mvtec", "yang2024_table6_ablation", "mvtec_ad", _ALL, _ABLATION),
    "mala2023-1": Table(
        _CHEN, "Table 1", _ONE_MODEL, "mala2023_table1_mvtec_multiclass", "mvtec_ad", _BOTH, _MALA, note=_TEXTURES
    ),
    "mala2023-3": Table(_CHEN, "Table 3", _ONE_MODEL, "mala2023_table3_visa", "visa", _BOTH, _MALA, note=_TEXTURES),
    "mala2023-mt": Table(
        _CHEN,
        "sec. IV-D-3",
        "mt",
        None,
        "mt",
        _BOTH,
        _MALA,
        split="mala100",
        note="The levels stood in Table 5, which is lost. The text gives differences in pixel AUROC only: 1.1 points "
        "above CFLOW, 5.6 above DFR.",
    ),
    "mala2023-ksdd2": Table(
        _CHEN, "Abstract", "ksdd2", _ABSTRACTS, "kolektorsdd2", ("pixel_auroc",), _MALA, note=_TEXTURES
    ),
    "anovit-mvtec": Table(
        _LEE,
        "Abstract",
        "mvtec",
        _T3,
        "mvtec_ad",
        _IMAGE,
        _CONVOLUTIONS,
        others=False,
        ahead=("AnoViT", "L2-CAE"),
        note="The abstract gives a count alone: above the convolutional baseline in 10 of 15 categories. The levels "
        "are those of Table 3 of Yang & Guo 2024, second-hand and in whole percents.",
    ),
    "kimkwon-mvtec": Table(_KIM, "Abstract", "mvtec", _ABSTRACTS, "mvtec_ad", _IMAGE, _TOKENS),
    "kimkwon-btad": Table(_KIM, "Abstract", "btad", _ABSTRACTS, "btad", _IMAGE, _TOKENS),
}


@dataclass(frozen=True)
class Request:
    """What `runs.run` is asked for. Category and split are filled in as `run` would, with no data at hand.

    Raises `UserError` for unknown names, as `run` does.
    """

    method: str
    dataset: str
    category: str | None = None
    split: str | None = None
    preset: str = "demo"
    seed: int = 0
    overrides: dict = field(default_factory=dict, hash=False)
    weights: str = "auto"  # as in `run`; a file is known by its path as it is given

    def __post_init__(self):
        category = self.category or getattr(methods.get(self.method), "CATEGORY", None)
        category, split = data.part(self.dataset, category, self.split)
        for key, value in {"category": category, "split": split, "seed": runs.check_seed(self.seed)}.items():
            object.__setattr__(self, key, value)
        self.settings()

    def settings(self):
        """All settings of the method as a dict, with preset and overrides."""
        return _settings(self.method, self.preset, self.overrides)

    @cached_property
    def digest(self):
        """Hash of all that decides about the result; the same for a record of this run, see `digest`."""
        asked = {k: getattr(self, k) for k in ASKED}
        return digest({**asked, "settings": self.settings(), "weights": {"asked": str(self.weights)}})

    @cached_property
    def name(self):
        """Name of the run's folder, such as `vitmem-base_m-mvtec-bottle-paper-s0`: safe anywhere and of no other run.

        Variants have their name in the method's `VARIANTS`; other changed settings are named with a hash.
        """
        plain, settings = _settings(self.method, self.preset, {}), self.settings()
        changed, label = [k for k in settings if settings[k] != plain[k]], None
        if changed:
            variants = getattr(methods.get(self.method), "VARIANTS", {})
            named = [v for v, own in variants.items() if _settings(self.method, self.preset, own) == settings]
            label = named[0] if named else f"{'_'.join(changed)[:40]}_{_hash(settings)[:8]}"
        words = (self.method, label, _label(self.weights), self.dataset, self.category, self.split, self.preset)
        plain = "-".join(filter(None, (*words, f"s{self.seed}")))
        safe = re.sub(r"[^a-z0-9_.+-]", "_", plain)
        return safe if safe == plain else f"{safe}-{self.digest[:8]}"

    @property
    def folder(self):
        """Name of the run's folder where older runs may lie: `name` with a hash of the settings, as defaults change."""
        return f"{self.name}-{self.digest[:8]}"

    def command(self, out, data_root=None):
        """The words of the `vitad run` that makes it, as a list of str."""
        words = ["vitad", "run", self.method, "--dataset", self.dataset]
        for option in ("category", "split"):
            if value := getattr(self, option):
                words += [f"--{option}", value]
        words += ["--preset", self.preset, "--seed", str(self.seed)]
        if self.overrides:
            words += ["--set", *(f"{key}={_word(value)}" for key, value in self.overrides.items())]
        if self.weights != "auto":
            words += ["--weights", str(self.weights)]
        if data_root is not None:
            words += ["--data-root", str(data_root)]
        return [*words, "--out", str(out)]


ASKED = ("method", "dataset", "category", "split", "seed")


def digest(record):
    """Hash of what a run record was asked for: equal to that of the `Request` which asks for this run."""
    asked = {key: record[key] for key in ASKED} | {"settings": runs.settings_of(record)}
    if (weights := record["weights"]["asked"]) != "auto":
        asked["weights"] = weights
    return _hash(asked)


def _hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _label(weights):
    """Name of weights in names of runs and of files; those that a method takes by itself have none."""
    if weights == "auto":
        return None
    return f"{Path(weights).stem}_{hashlib.sha256(str(weights).encode()).hexdigest()[:8]}"


def table(name):
    """The `Table` of that name."""
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    return TABLES[name]


def usual_preset(method, dataset):
    """The preset of the book's own records of a method on a data set; `paper` where there are none."""
    return PRESETS.get((method, dataset)) or PRESETS.get(dataset, "paper")


def requests(name, dataset=None, category=None, split=None, preset=None, seeds=3, weights="auto", overrides=None):
    """The runs that a table needs, as a list of `Request`, none twice.

    Args:
        name: one of `TABLES`.
        dataset: the paper's by default; any other re-runs the same methods and variants there.
        category: one, or several with commas between, or `each`. By default each of a published data set, and that
            of `data.part` elsewhere; a method that takes all categories in one model, such as `mala`, does so.
        split: of `mt`; by default the paper's, or that of the data set.
        preset: by default `usual_preset`.
        seeds: how many, from 0.
        weights: of the backbone, as in `runs.run`.
        overrides: further settings of all runs, beside those that make the columns.
    """
    options = (dataset, category, split, preset, seeds, weights, overrides)
    return list({r.digest: r for column in table(name).ours for r in _column(name, column, *options)}.values())


def _column(name, column, dataset, category, split, preset, seeds, weights, overrides):
    """The runs of one printed column."""
    asked = table(name)
    method, own = asked.ours[column]
    given = parse_overrides(overrides)
    if clash := sorted(own.keys() & given):
        raise UserError(f"{clash[0]}={given[clash[0]]}: the columns of {name} differ in {clash[0]}. Leave it out.")
    dataset = dataset or asked.dataset
    if dataset == asked.dataset:
        split = split or asked.split
    if not str(seeds).isdecimal() or int(seeds) < 1:
        raise UserError(f"seeds={seeds} is not usable. Give a whole number from 1.")
    preset = preset or usual_preset(method, dataset)
    return [
        Request(method, dataset, trained_on, split, preset, seed, {**own, **given}, weights)
        for trained_on in _models(method, dataset, category)
        for seed in range(int(seeds))
    ]


def _models(method, dataset, category):
    """Categories for which a model each is trained; [None] for the default of the method or the data set."""
    data.part(dataset, data.ALL)  # an unknown data set is said so first
    if category is not None and category != EACH:
        return category.split(",")
    if category is None and (methods.get(method).CATEGORY or dataset == "toy"):
        return [None]
    return [None] if "+" in dataset else data.categories(dataset)


def combinations(blocks):
    """The runs of a sweep, as a list of `Request`, none twice.

    Args:
        blocks: list of dicts with fields of `Request`, each one value or a list of them, of which all combinations are
            taken. Categories are given as in `requests`.
    """
    if not (isinstance(blocks, list) and blocks and all(isinstance(b, dict) for b in blocks)):
        raise UserError("runs have to be a list of blocks, each with a method, a dataset and what else is asked for.")
    names, found = [f.name for f in fields(Request)], []
    for block in blocks:
        for key in block:
            if key not in names:
                raise unknown("field of a run", key, names)
        for values in product(*(v if isinstance(v, list) else [v] for v in block.values())):
            asked = {k: v for k, v in zip(block, values, strict=True) if v is not None}
            if not {"method", "dataset"} <= asked.keys():
                raise UserError(f"the runs of {block} need a method and a dataset.")
            if "overrides" in asked:
                asked["overrides"] = parse_overrides(asked["overrides"])
            category = str(asked["category"]) if "category" in asked else None
            for one in _models(asked["method"], asked["dataset"], category):
                found.append(Request(**asked | {"category": one}))
    return list({r.digest: r for r in found}.values())


def existing(folder=None):
    """{digest: record} of the runs at hand: those of the book and those below `folder`, which come first.

    Other JSON files of that name are passed over.
    """
    own = runs.read_records(folder) if folder is not None and Path(folder).is_dir() else []
    return {digest(r): r for r in [*runs.committed(), *own] if "asked" in r.get("weights", {})}


def run_missing(asked, found, folder, data_root=None, device="auto", say=print):
    """Run what is not among `found` and add it there; each run goes to `folder/<its own>`, where it resumes.

    A run that fails is told, with its traceback where it is not a user's mistake, and the others go on.

    Returns:
        {name: message} of those that failed.
    """
    missing, failed = [r for r in asked if r.digest not in found], {}
    for k, request in enumerate(missing, 1):
        say(f"[{k}/{len(missing)}] {request.name}{_left(missing[k - 1 :], found.values(), device)}")
        try:
            found[request.digest] = runs.run(
                request.method,
                request.dataset,
                request.category,
                request.split,
                data_root,
                request.preset,
                request.seed,
                device,
                request.overrides,
                request.weights,
                out=Path(folder) / request.folder,
            )
        except Exception as e:  # whatever it is, it is this run's
            failed[request.name] = str(e) if isinstance(e, UserError) else traceback.format_exc().rstrip()
            say(f"failed: {failed[request.name]}")
    return failed


def _left(asked, records, device):
    seconds = [estimate(request, records, device)[0] for request in asked]
    known = [s for s in seconds if s is not None]
    more = f", and {len(asked) - len(known)} runs of unknown length" if len(known) < len(asked) else ""
    return f", about {duration(sum(known))} left{more}" if known else ""


def data_missing(dataset, data_root=None):
    """Where to get a data set whose folder is not at hand, as text; None where it is."""
    try:
        root = data.locate(dataset, data_root)
        absent = [one for one in dataset.split("+") if not (root / one if "+" in dataset else root).is_dir()]
        place = f" in {root}"
    except UserError:
        absent, place = dataset.split("+"), ""
    lines = []
    for one in absent:
        lines.append(f"data: '{one}' is not at hand{place}. Give its folder with --data-root DIR.")
        if source := SOURCES.get(one):
            get = f"vitad data download {one} --root DIR" if source.url else f"git clone {source.page} DIR"
            lines.append(f"  page {source.page}, licence {source.licence}")
            lines.append(f"  {get}{'/' + one if '+' in dataset else ''}{' --accept-licence' if source.url else ''}")
    return "\n".join(lines) or None


# --- time --------------------------------------------------------------------------------------------------------


def estimate(request, records, device="auto"):
    """(seconds, basis) that a run takes by the records of such runs; (None, reason) where there are none.

    Such runs have the same method, preset and image size; those of a machine like this one count before others. Their
    time until the end of training is scaled by training images and epochs, the rest by test images, and the median
    taken. A method that stops early, or trains on a share of the images, takes less.
    """
    settings = request.settings()
    kind = (request.method, request.preset, settings["image_size"])
    same = [r for r in records if (r["method"], r["preset"], r["settings"]["image_size"]) == kind]
    if not same:
        once = "".join(f" {k}=1" for k in settings if k.endswith("epochs"))
        words = f"vitad run {request.method} --preset {request.preset}{once and ' --set'}{once}"
        return None, f"an epoch on toy gives a basis: {words} --out runs/pace-{request.method}"
    counts = _images(request, records)
    if counts is None:
        return None, f"the number of images of {request.dataset} is not known before the first run"
    e = runs.environment(runs.find_device(device))
    machines = Counter(_machine(r["environment"]) for r in same)
    like_this = [m for m in machines if m.startswith(_machine(e, threads=False))]
    machine = max(like_this or machines, key=machines.get)
    seconds = []
    for r in same:
        if _machine(r["environment"]) == machine:
            times, n = r["timings"], r["counts"]
            fit = (times["prepare_s"] + times["train_s"]) / n["train"] / max(_epochs(r["settings"]), 1)
            test = (times["load_s"] + times["score_s"] + times["evaluate_s"]) / (n["test_good"] + n["test_defective"])
            seconds.append(fit * max(_epochs(settings), 1) * counts[0] + test * counts[1])
    return float(np.median(seconds)), f"{len(seconds)} run{'s' * (len(seconds) > 1)} on {machine}"


def duration(seconds):
    """Seconds in words, to two digits: "40 s", "12 min", "3.5 h", "2.1 days"."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds / 86400:.3g} days"


def _machine(e, threads=True):
    return f"{e['device']}, {e['device_name']}, " + (f"{e['threads']} thread(s)" if threads else "")


def _epochs(settings):
    """Of all stages."""
    return sum(v for k, v in settings.items() if k.endswith("epochs"))


def _images(request, records=()):
    """(train, test) numbers of images: as published, as generated, or as in a run on the same data; None: unknown."""
    train, test = 0, 0
    for one in request.dataset.split("+"):
        chosen = data.categories(one) if request.category == data.ALL else [request.category]
        if one == "toy":
            train += toy.N_TRAIN * len(chosen)
            test += sum(toy.N_GOOD + toy.N_DEFECT * len(toy.DEFECTS[c]) for c in chosen)
            continue
        published = data.LAYOUTS[one].PUBLISHED
        if not all(("train", "good") in published.get(c, ()) for c in chosen):
            where = ("dataset", "category", "split")
            same = (r["counts"] for r in records if all(r[k] == getattr(request, k) for k in where))
            return next(((n["train"], n["test_good"] + n["test_defective"]) for n in same), None)
        for c in chosen:
            train += published[c]["train", "good"]
            test += sum(n for (part, _), n in published[c].items() if part == "test")
    return train, test


# --- cells -------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("category", "column", "metric", "method", "reported", "step", "recomputed", "reproduced", "spread", "seeds"),
    *("difference", "tolerance", "verdict", "tier", "fill"),
)


def cells(name, found, dataset=None, category=None, split=None, preset=None, seeds=3, weights="auto", overrides=None):
    """A table cell by cell, in percent.

    Args:
        name, dataset, category, split, preset, seeds, weights, overrides: as in `requests`.
        found: {digest: record}, as `existing` gives.

    Returns:
        DataFrame, one row for each category, printed column and metric:

        * `reported`: as printed. `step`: unit of the last digit that is printed in this column. `recomputed`: for an
          average, the mean of the printed rows, where there are rows.
        * `reproduced`, `spread`, `seeds`: mean, standard deviation and number of the seeds. An average is taken seed
          by seed, and only of seeds for which all categories are there.
        * `difference`: reproduced minus recomputed, or minus reported where nothing is recomputed.
        * `tolerance`: how far from the mean of n seeds one more run may lie (95 %, Student's t), which is
          t(0.975, n-1) * spread * sqrt(1 + 1/n), and half a `step`. None for one seed.
        * `verdict`: `agrees` within the tolerance, else `above` or `below`. `one seed` has no spread to judge by;
          `other data` is not the paper's data set, or not all of its images, and has neither difference nor tolerance;
          `other settings` are not those of `paper`; `other weights` start at random what the method's settings have
          pretrained, such as MALA's decoder without MAE's file; with `nothing printed` there is nothing to judge.
        * `tier`: preset and hardware. `fill`: what would fill a cell that is empty.
    """
    asked, own = table(name), dataset in (None, table(name).dataset)
    printed = _printed(asked)
    options = (dataset, category, split, preset, seeds, weights, overrides)
    needed = {column: _column(name, column, *options) for column in asked.ours}
    changed = bool(parse_overrides(overrides).keys() - FILES)
    rows = _rows(printed, next(iter(needed.values())), own)
    lines = []
    for column in dict.fromkeys([*asked.ours, *printed["column"]]):
        step = _step(printed[printed["column"] == column]["value"].dropna())
        for metric in asked.metrics:
            here = printed[(printed["column"] == column) & (printed["metric"] == metric)]
            figures = dict(zip(here["category"], here["value"], strict=True))
            for row, tested in rows.items():
                has_rows = row == AVERAGE and len(figures) > 1
                line = {
                    "category": row,
                    "column": column,
                    "metric": metric,
                    "reported": figures.get(row),
                    "step": step,
                    "recomputed": np.mean([v for c, v in figures.items() if c != AVERAGE]) if has_rows else None,
                    "fill": None if column in asked.ours else "not in this library",
                }
                if column in asked.ours:
                    line |= _reproduced(line, needed[column], tested, metric, found, own, changed)
                if column in asked.ours or row in figures:
                    lines.append(line)
    frame = pd.DataFrame(lines, columns=COLUMNS)
    numbers = ["reported", "step", "recomputed", "reproduced", "spread", "difference", "tolerance"]
    return frame.astype(dict.fromkeys(COLUMNS, object) | dict.fromkeys(numbers, float) | {"seeds": "Int64"})


def _printed(asked):
    """DataFrame `category, column, metric, value` of what the paper prints."""
    if asked.source is None:
        return pd.DataFrame(columns=["category", "column", "metric", "value"])
    rows = reported.table(asked.source)
    rows = rows[(rows["dataset"] == asked.printed_data) & rows["metric"].isin(asked.metrics)]
    if asked.source == _ABSTRACTS:
        rows = rows[rows["paper"] == asked.paper]
    if not asked.others:
        rows = rows[rows["method"].isin(list(asked.ours))]
    rows = rows.rename(columns={"method": "column", "value_percent": "value"})
    return rows.assign(category=rows["category"].replace("all", AVERAGE))


def _rows(printed, needed, own):
    """{row of the table: the categories whose mean it is}.

    On the paper's data the printed rows, as far as they are asked for, and their average if all are. On other data the
    categories there, and their average, beside which the printed one stands.
    """
    tested = list(dict.fromkeys(c for request in needed for c in _tested(request)))
    if not own:
        return ({c: [c] for c in tested} if len(tested) > 1 else {}) | {AVERAGE: tested}
    in_rows = [c for c in printed["category"].unique() if c != AVERAGE]
    all_of_them = in_rows or [c for one in needed[0].dataset.split("+") for c in data.categories(one)]
    rows = {c: [c] for c in in_rows if c in tested}
    if set(all_of_them) <= set(tested):
        return rows | {AVERAGE: all_of_them}
    return rows or {c: [c] for c in tested}


def _tested(request):
    if request.category == data.ALL:
        return [c for one in request.dataset.split("+") for c in data.categories(one)]
    return [request.category]


def _figures(record):
    """{category: metrics} of a run; of a model of several categories, of each."""
    several = record.get("metrics_by_category", {})
    return {c.split("/")[-1]: m for c, m in several.items()} or {record["category"]: record["metrics"]}


def _reproduced(line, needed, tested, metric, found, own, changed):
    """What the runs say: the columns of `cells` from `method` on."""
    needed = [r for r in needed if set(_tested(r)) & set(tested)]
    records = [found[r.digest] for r in needed if r.digest in found]
    by_seed = {}
    for record in records:
        by_seed.setdefault(record["seed"], {}).update({c: m[metric] for c, m in _figures(record).items()})
    complete = [f for f in by_seed.values() if all(f.get(c) is not None for c in tested)]
    values = np.array([np.mean([100 * f[c] for c in tested]) for f in complete])
    missing = [r.name for r in needed if r.digest not in found]
    cell = {"method": needed[0].method, "seeds": len(values)}
    if missing:
        cell["fill"] = f"{len(missing)} of {len(needed)} runs: {missing[0]}" + (", ..." if len(missing) > 1 else "")
    if not len(values):
        return cell | ({} if missing else {"fill": "data without masks have no such figure"})
    target = line["reported"] if line["recomputed"] is None else line["recomputed"]
    cell |= {"reproduced": values.mean(), "tier": " + ".join(sorted({_tier(r) for r in records}))}
    if len(values) > 1:
        cell["spread"] = values.std(ddof=1)
    pairs = [(r, found[r.digest]) for r in needed if r.digest in found]
    if not own or not all(_all_images(request, record) for request, record in pairs):
        return cell | {"verdict": "other data"}
    if target is not None:
        cell["difference"] = values.mean() - target
        if len(values) > 1:
            t = stdtrit(len(values) - 1, 0.975)
            cell["tolerance"] = t * cell["spread"] * (1 + 1 / len(values)) ** 0.5 + line["step"] / 2
    if changed or any(r.preset not in FAITHFUL for r in needed):
        verdict = "other settings"
    elif not all(_as_pretrained(r) for r in records):
        verdict = "other weights"
    elif target is None:
        verdict = "nothing printed"
    elif len(values) == 1:
        verdict = "one seed"
    elif abs(cell["difference"]) <= cell["tolerance"]:
        verdict = "agrees"
    else:
        verdict = "above" if cell["difference"] > 0 else "below"
    return cell | {"verdict": verdict}


def _step(values):
    """Unit of the last printed digit of a column, all its figures together; None where it has none."""
    steps = (step for step in (1, 0.1, 0.01) if all(abs(v / step - round(v / step)) < 1e-6 for v in values))
    return next(steps) if len(values) else None


def _as_pretrained(record):
    """Whether nothing started at random that the method's settings have pretrained, in whole or in part."""
    return not (record["settings"].get("pretrained") and record["weights"]["source"].endswith("random"))


def _all_images(request, record):
    """Whether the run had as many images as are published."""
    counts = record["counts"]
    return _images(request, [record]) == (counts["train"], counts["test_good"] + counts["test_defective"])


def _tier(record):
    e = record["environment"]
    return f"{record['preset']}; {e['device']}, {e['device_name']}"


# --- what is shown -----------------------------------------------------------------------------------------------


def contents(found, **options):
    """DataFrame of all tables: `table, paper, place, data, preset, runs, there`; `options` as in `requests`."""
    lines = []
    for name, asked in TABLES.items():
        needed = requests(name, **options)
        there = sum(r.digest in found for r in needed)
        paper = methods.get(next(iter(asked.ours.values()))[0]).PAPER
        where = " ".join(filter(None, (needed[0].dataset, needed[0].split)))
        lines.append({"table": name, "paper": paper, "place": asked.place, "data": where})
        lines[-1] |= {"preset": needed[0].preset, "runs": len(needed), "there": there}
    return pd.DataFrame(lines)


def overview(asked, found, device="auto"):
    """What a list of requests has and lacks, one line for those that differ in the seed only.

    Returns:
        (DataFrame `runs, seeds there, missing, time each`, seconds of all that is missing or None, basis as text)
    """
    groups = {}
    for request in asked:
        groups.setdefault("".join(request.name.rpartition(f"-s{request.seed}")[::2]), []).append(request)
    lines, left, bases = [], 0.0, []
    for stem, group in groups.items():
        seconds, basis = estimate(group[0], found.values(), device)
        there = [r for r in group if r.digest in found]
        missing = [r for r in group if r.digest not in found]
        seeds = {k: " ".join(str(r.seed) for r in v) for k, v in {"seeds there": there, "missing": missing}.items()}
        lines.append({"runs": stem, **seeds, "time each": "" if seconds is None else duration(seconds)})
        if missing:
            left = None if left is None or seconds is None else left + seconds * len(missing)
            bases.append(basis)
    return pd.DataFrame(lines), left, "\n  ".join(dict.fromkeys(bases))


def title(name, asked):
    """One line: the table, the paper, its data, and what it is run on where that differs."""
    printed = table(name)
    here = " ".join(filter(None, (asked[0].dataset, asked[0].split)))
    on = "" if asked[0].dataset == printed.dataset else f", run on {here}"
    return f"{name}: {methods.get(asked[0].method).PAPER}; {printed.place}, data {printed.dataset}{on}"


def stem(name, asked, category=None, overrides=None):
    """Name of the table's files, without suffix."""
    given = parse_overrides(overrides)
    label = f"{'_'.join(given)[:40]}_{_hash(given)[:8]}" if given else None
    words = (name, asked[0].dataset, category, asked[0].split, asked[0].preset, _label(asked[0].weights), label)
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", "-".join(filter(None, words)))


def shown(frame):
    """`cells` as text, for Markdown."""

    def words(name, form):
        return ["" if pd.isna(x) else format(x, form) for x in frame[name]]

    digits = abs(np.log10(frame["step"]))  # as many as the column is printed with
    return pd.DataFrame(
        {
            "category": frame["category"],
            "column": frame["column"],
            "figure": frame["metric"].map(METRIC_NAMES),
            "reported": [
                "" if pd.isna(x) else f"{x:.{n:.0f}f}" for x, n in zip(frame["reported"], digits, strict=True)
            ],
            "recomputed mean": words("recomputed", ".2f"),
            "reproduced": [
                f"{mean} ± {spread}" if spread else mean
                for mean, spread in zip(words("reproduced", ".1f"), words("spread", ".1f"), strict=True)
            ],
            "seeds": [f"{n}" if n else "" for n in frame["seeds"].fillna(0)],
            "difference": words("difference", "+.1f"),
            "tolerance": words("tolerance", ".1f"),
            "verdict": frame["verdict"].fillna(""),
            "tier": frame["tier"].fillna(""),
            "what would fill it": frame["fill"].fillna(""),
        }
    )


def text(frame, width=120):
    """`cells` for a terminal: for each figure a table, and below it the columns that are only reported.

    Categories are lines and columns stand beside each other; a table with one line, as of an ablation, is turned.
    """
    words = shown(frame).assign(judged=lambda w: (w["difference"] + " " + w["verdict"]).str.strip())
    words["ran"], blocks = frame["method"].notna(), []
    for figure, part in words.groupby("figure", sort=False):
        ours, others = part[part["ran"]], part[~part["ran"]]
        if ours["category"].nunique() == 1:
            all_of_it = ["reported", "recomputed mean", "reproduced", "seeds", "difference", "tolerance", "verdict"]
            wide = ours.set_index("column")[all_of_it].rename_axis(None)
            wide = wide.loc[:, [c in ("reported", "reproduced") or any(wide[c] != "") for c in wide]]
        else:
            means = ours[ours["recomputed mean"] != ""]
            means = means.assign(category="recomputed", reported=means["recomputed mean"], reproduced="", judged="")
            ours = pd.concat([ours, means])
            wide = _pivot(ours, ["reported", "reproduced", "judged"])
        blocks.append(f"{figure}, percent\n{wide.to_string(line_width=width)}")
        if len(others):
            wide = _pivot(others, ["reported"]).droplevel(1, axis=1)
            blocks[-1] += f"\nreported only\n{wide.to_string(line_width=width)}"
    tiers = list(dict.fromkeys(frame["tier"].dropna()))
    if tiers:
        blocks.append("reproduced with (preset; hardware): " + "\n  and ".join(tiers))
    empty = frame["method"].notna() & frame["reproduced"].isna()
    if empty.any():
        blocks.append(f"{empty.sum()} cells are empty; the files say for each which runs would fill it")
    return "\n\n".join(blocks)


def _pivot(words, fields):
    """Category x (column, field), in the order of the lines."""
    wide = words.pivot(index="category", columns="column", values=fields).swaplevel(axis=1).fillna("")
    columns = [(column, field) for column in words["column"].unique() for field in fields]
    return (
        wide.reindex(index=words["category"].unique(), columns=columns)
        .rename_axis(None)
        .rename_axis([None, None], axis=1)
    )


def remarks(name, frame):
    """What is to be said beside the cells, as a list of lines."""
    asked, lines = table(name), []
    if asked.note:
        lines.append(asked.note)
    if asked.ahead:
        for kind in ("reported", "reproduced"):
            wide = frame[frame["category"] != AVERAGE].pivot(index="category", columns="column", values=kind)
            wide = wide.reindex(columns=asked.ahead).dropna()
            first, second = (wide[c] for c in asked.ahead)
            count = f"above {second.name} in {(first > second).sum()} of {len(wide)} categories"
            count += f", equal in {(first == second).sum()}"
            lines.append(f"{first.name} as {kind}: {count if len(wide) else 'no categories to count'}.")
    return lines


def write(frame, name, heading, stem):
    """`stem.csv` with the figures as they are, `stem.md` with a heading and text; each whole or not at all."""
    with atomic_write(f"{stem}.csv") as aside:
        frame.to_csv(aside, index=False)
    with atomic_write(f"{stem}.md") as aside:
        lines = [f"# {name}", heading, *remarks(name, frame), "Percent; mean and standard deviation over seeds."]
        aside.write_text("\n\n".join([*lines, markdown(shown(frame))]) + "\n")


def _settings(method, preset, overrides):
    module = methods.get(method)
    return as_json(resolve(module.Settings, module.PRESETS, preset, overrides))


def _word(value):
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
