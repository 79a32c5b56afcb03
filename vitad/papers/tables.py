"""The papers' tables that can be run again: which runs fill each of them, on the paper's data or on other data."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from vitad import data, methods, runs
from vitad.errors import UserError, unknown
from vitad.methods import vitmem
from vitad.methods.rivals import draem
from vitad.papers.estimates import time_left
from vitad.papers.printed import ABSTRACTS
from vitad.runs import Request
from vitad.runs.record import Record
from vitad.runs.request import AUTO, digest, weights_label
from vitad.settings import parse_overrides

USUAL_PRESETS = {  # of the book's own records, by data set, or by method and data set
    "toy": "demo",
    "mt": "small",
    ("mala", "mt"): "small_dinov2",
}
# Presets whose settings are the source's, so that their metrics can be held against printed ones. AnoViT's `paper` has
# another output range than the published code. The other methods have none: of L2-CAE the layers are unknown, and much
# of its schedule is ours. So is that of AE-SSIM, whose source sees crops, and of the VAE, whose layers no paper says.
# VT-ADL has another score here and Patch SVDD another number of pairs in a step; f-AnoGAN stands for AnoGAN.
FAITHFUL = {
    "vitmem": ("paper", "sec34"),
    "mala": ("paper",),
    "anovit": ("legacy",),
}
IN_THE_MANNER_OF = {"ssltok"}  # too little is public for a reproduction
OTHER_NETWORKS = {"padim", "mkd", "dfr", "cflow", "uniad"}  # methods whose backbone is no ViT
EACH, ALL = "each", "all"  # as a category: one model for each, one of all
Column = tuple[str, Mapping[str, Any]]  # method and overrides


@dataclass(frozen=True)
class Table:
    """A printed table and which of its columns can be run.

    `paper` is its name in the printed numbers. `dataset` is what the methods are trained on, as in `vitad.data.load`,
    and `split` the paper's own. `printed` names the file of printed numbers, if it is not that of the table, and
    `tested` the data set of these numbers, if it is not `dataset`. `category` is what all columns train a model on,
    where that is not the default of their methods. `columns` says how a printed column (or a row of an ablation) is
    run. The other columns are shown as reported.
    """

    paper: str
    place: str
    dataset: str
    metrics: tuple[str, ...]
    columns: Mapping[str, Column]
    printed: str | None = None
    tested: str | None = None
    split: str | None = None
    category: str | None = None
    others: bool = True  # False: of the printed columns, only those that are run
    dtd: bool = False  # the paper paints textures of DTD, which do not come with vitad
    ahead: tuple[str, ...] = ()  # two columns: in how many categories the first is above the second
    note: str = ""


_VITMEM: dict[str, Column] = {"Ours": ("vitmem", {})}
_MALA: dict[str, Column] = {"Ours": ("mala", {})}
_DRAEM: dict[str, Column] = {"DRAEM": ("draem", {})}
_FEATURES: dict[str, Column] = {"PaDim": ("padim", {}), "UniAD": ("uniad", {})}
_SSLTOK: dict[str, Column] = {"Ours": ("ssltok", {})}
_CONVOLUTIONS: dict[str, Column] = {"AnoViT": ("anovit", {}), "L2-CAE": ("l2cae", {})}
_MKD: dict[str, Column] = {"MKD": ("mkd", {})}
_RIVALS: dict[str, Column] = {"AnoGAN": ("fanogan", {}), "AE_SSIM": ("aessim", {}), "VAE": ("vae", {})} | _MKD
_ABLATION: dict[str, Column] = {
    "Base": ("vitmem", vitmem.VARIANTS["base"]),
    "Base + M": ("vitmem", vitmem.VARIANTS["base_m"]),
    "Base + CA": ("vitmem", vitmem.VARIANTS["base_ca"]),
    "Base + M + CA (Ours)": ("vitmem", {}),
}
_IMAGE, _LOCAL, _BOTH = ("image_auroc",), ("pixel_auroc", "pro"), ("image_auroc", "pixel_auroc")
_ALL = ("image_auroc", "pixel_auroc", "pro")
_TEXTURES = "The paper paints textures of DTD; without --set textures=FOLDER they are procedural here."
_JOINT = "mvtec+visa"  # Chen et al., sec. IV-C: one model for the categories of both

TABLES = {
    "yang2024-3": Table("yang2024", "Table 3", "mvtec", _IMAGE, _VITMEM | _CONVOLUTIONS | _RIVALS),
    "yang2024-4": Table("yang2024", "Table 4", "mvtec", _LOCAL, _VITMEM | _RIVALS | {"VT_ADL": ("vtadl", {})}),
    "yang2024-5": Table(
        "yang2024",
        "Table 5",
        "btad",
        _ALL,
        _VITMEM
        | {"P-SVDD": ("psvdd", {}), "VT-ADL": ("vtadl", {}), "SSPCAB": ("draem", draem.VARIANTS["sspcab"])}
        | _DRAEM,
    ),
    "yang2024-6": Table("yang2024", "Table 6", "mvtec", _ALL, _ABLATION),
    "mala2023-1": Table(
        "mala2023",
        "Table 1",
        _JOINT,
        _BOTH,
        _MALA | _FEATURES | _DRAEM | _MKD,
        tested="mvtec",
        category=ALL,
        dtd=True,
        note=_TEXTURES,
    ),
    "mala2023-3": Table(
        "mala2023",
        "Table 3",
        _JOINT,
        _BOTH,
        _MALA | _FEATURES,
        tested="visa",
        category=ALL,
        dtd=True,
        note=_TEXTURES,
    ),
    "mala2023-mt": Table(
        "mala2023",
        "sec. IV-D-3",
        "mt",
        _BOTH,
        _MALA,
        printed="",
        split="mala100",
        dtd=True,
        note="The numbers stood in Table 5, which is lost. The text gives differences in pixel AUROC only: 1.1 points "
        "above CFLOW, 5.6 above DFR.",
    ),
    "mala2023-ksdd2": Table(
        "mala2023", "Abstract", "ksdd2", ("pixel_auroc",), _MALA, printed=ABSTRACTS, dtd=True, note=_TEXTURES
    ),
    "anovit-mvtec": Table(
        "anovit2022",
        "Abstract",
        "mvtec",
        _IMAGE,
        _CONVOLUTIONS,
        printed="yang2024-3",
        others=False,
        ahead=("AnoViT", "L2-CAE"),
        note="The abstract gives a count alone: above the convolutional baseline in 10 of 15 categories. The "
        "printed numbers are those of Table 3 of Yang & Guo 2024, second-hand and in whole percents.",
    ),
    "kimkwon-mvtec": Table("kimkwon2024", "Abstract", "mvtec", _IMAGE, _SSLTOK, printed=ABSTRACTS),
    "kimkwon-btad": Table("kimkwon2024", "Abstract", "btad", _IMAGE, _SSLTOK, printed=ABSTRACTS),
}


@dataclass(frozen=True)
class Reproduction:
    """A printed table that somebody wants to run again: which runs that takes.

    Parameters
    ----------
    name
        One of `TABLES`.
    dataset
        The paper's by default. Any other re-runs the same methods and variants there.
    category
        One, or several with commas between, or `each`. By default each of a published data set, and the default
        of the data set elsewhere. A method that takes all categories in one model, such as `mala`, does so.
    split
        Of `mt`; by default the paper's, or that of the data set.
    preset
        By default `usual_preset`. Where that is `paper`, runs of others may stand in, see `vitad.papers.nearest`.
    seeds
        How many, from 0.
    weights
        Of the backbone, as in `Request`, of the methods with a ViT; `OTHER_NETWORKS` look for their own.
    overrides
        Further settings of the runs, beside those that make the columns; of each method those that it has.
    data_root, device
        As in `Request`.

    Raises
    ------
    UserError
        Unknown names, and overrides that the columns themselves differ in.

    Examples
    --------
    >>> table = Reproduction("yang2024-6", dataset="toy", seeds=2)
    >>> len(table.requests), table.requests[0].name
    (8, 'vitmem-base-toy-gear-demo-s0')
    """

    name: str
    dataset: str | None = None
    category: str | None = None
    split: str | None = None
    preset: str | None = None
    seeds: int = 3
    weights: str = AUTO
    overrides: dict[str, Any] = field(default_factory=dict)
    data_root: str | Path | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if not str(self.seeds).isdecimal() or int(self.seeds) < 1:
            raise UserError(f"seeds={self.seeds} is not usable. Give a whole number from 1.")
        filled = {
            "dataset": self.dataset or self.table.dataset,
            "seeds": int(self.seeds),
            "overrides": parse_overrides(self.overrides),
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        if self.on_the_papers_data and self.split is None:
            object.__setattr__(self, "split", self.table.split)

    @property
    def table(self) -> Table:
        """The printed table."""
        if self.name not in TABLES:
            raise unknown("table", self.name, TABLES)
        return TABLES[self.name]

    @property
    def on_the_papers_data(self) -> bool:
        """Whether the data set is the paper's own."""
        return self.dataset == self.table.dataset

    @cached_property
    def columns(self) -> dict[str, list[Request]]:
        """{printed column: its runs}."""
        return {column: self._runs_of(*how) for column, how in self.table.columns.items()}

    @cached_property
    def requests(self) -> list[Request]:
        """All runs of the table, none twice."""
        return list(dict.fromkeys(request for column in self.columns.values() for request in column))

    def _runs_of(self, method: str, overrides: Mapping[str, Any]) -> list[Request]:
        assert self.dataset is not None
        if clash := sorted(overrides.keys() & self.overrides):
            value = self.overrides[clash[0]]
            raise UserError(f"{clash[0]}={value}: the columns of {self.name} differ in {clash[0]}. Leave it out.")
        models = models_of(method, self.dataset, self.category or self.table.category)
        first = Request(
            method,
            self.dataset,
            split=self.split,
            category=models[0],
            preset=self._preset_of(method),
            overrides={**overrides, **self._settings_of(method)},
            weights=AUTO if method in OTHER_NETWORKS else self.weights,
            data_root=self.data_root,
            device=self.device,
        )
        return [replace(first, category=category, seed=seed) for category in models for seed in range(self.seeds)]

    def _preset_of(self, method: str) -> str:
        """The preset asked for, or the usual one of a method that lacks it. One that none has stays, and is refused."""
        assert self.dataset is not None
        has = {name: methods.get(name).PRESETS for name, _ in self.table.columns.values()}
        if self.preset and (self.preset in has[method] or not any(self.preset in presets for presets in has.values())):
            return self.preset
        return usual_preset(method, self.dataset)

    def _settings_of(self, method: str) -> dict[str, Any]:
        """Those of the overrides that a method has. What none of the table's methods has stays, and is refused."""
        has = {name: {f.name for f in fields(methods.get(name).Settings)} for name, _ in self.table.columns.values()}
        return {k: v for k, v in self.overrides.items() if k in has[method] or not any(k in h for h in has.values())}

    @property
    def title(self) -> str:
        """One line: the table, the paper, its data, and what it is run on where that differs."""
        first = self.requests[0]
        on = "" if self.on_the_papers_data else f", run on {' '.join(filter(None, (first.dataset, first.split)))}"
        paper = methods.get(first.method).PAPER
        return f"{self.name}: {paper}; {self.table.place}, data {self.table.dataset}{on}"

    @property
    def stem(self) -> str:
        """Name of the table's files, without suffix."""
        first = self.requests[0]
        label = f"{'_'.join(self.overrides)[:40]}_{digest(self.overrides)[:8]}" if self.overrides else None
        words = (
            self.name,
            first.dataset,
            self.category,
            first.split,
            first.preset,
            weights_label(first.weights),
            label,
        )
        return re.sub(r"[^A-Za-z0-9_.+-]", "_", "-".join(filter(None, words)))


def usual_preset(method: str, dataset: str) -> str:
    """The preset of the book's own records of a method on a data set; `paper` where there are none."""
    return USUAL_PRESETS.get((method, dataset)) or USUAL_PRESETS.get(dataset, "paper")  # type: ignore[call-overload]


def models_of(method: str, dataset: str, category: str | None) -> list[str | None]:
    """Categories for which a model each is trained; [None] for the default of the method or the data set.

    `category` is one, or several with commas between, or `each`; by default each of a data set that has no default.
    """
    described = data.get(dataset)  # an unknown data set is said so first
    if category is not None and category != EACH:
        return list(category.split(","))
    if category is None and (methods.get(method).CATEGORY or described.default_category):
        return [None]
    return described.categories()


def combinations(blocks: list[dict[str, Any]]) -> list[Request]:
    """The runs of a sweep, none twice.

    Parameters
    ----------
    blocks
        Dicts with fields of `Request`, each one value or a list of them, of which all combinations are taken.
        Categories are given as in `Reproduction`.
    """
    if not (isinstance(blocks, list) and blocks and all(isinstance(b, dict) for b in blocks)):
        raise UserError("runs have to be a list of blocks, each with a method, a dataset and what else is asked for.")
    names, requests = [f.name for f in fields(Request)], []
    for block in blocks:
        for key in block:
            if key not in names:
                raise unknown("field of a run", key, names)
        for values in product(*(v if isinstance(v, list) else [v] for v in block.values())):
            chosen = {k: v for k, v in zip(block, values, strict=True) if v is not None}
            if not {"method", "dataset"} <= chosen.keys():
                raise UserError(f"the runs of {block} need a method and a dataset.")
            category = str(chosen["category"]) if "category" in chosen else None
            for model in models_of(chosen["method"], chosen["dataset"], category):
                requests.append(Request(**chosen | {"category": model}))
    return list(dict.fromkeys(requests))


def run_missing(
    requests: list[Request], records: dict[str, Record], folder: str | Path, say: Callable[[str], None] = print
) -> dict[str, str]:
    """Run what is not among `records` and add it there; each run goes to a folder of its own, where it resumes.

    A run that fails is told, with its traceback where it is not a user's mistake, and the others go on.

    Parameters
    ----------
    requests
        The runs.
    records
        {hash: record}, as `vitad.runs.by_hash` gives them.
    folder
        Of the folders of the runs.
    say
        Called with lines of text.

    Returns
    -------
    {name: message} of the runs that failed.
    """
    missing, failed = [r for r in requests if r.hash not in records], {}
    for k, request in enumerate(missing):
        say(f"[{k + 1}/{len(missing)}] {request.name}{time_left(missing[k:], records.values())}")
        try:
            records[request.hash] = runs.run(request, out=Path(folder) / request.folder)
        except Exception as e:  # whatever it is, it is this run's
            failed[request.name] = str(e) if isinstance(e, UserError) else traceback.format_exc().rstrip()
            say(f"failed: {failed[request.name]}")
    return failed


def contents(records: Mapping[str, Record], **options: Any) -> pd.DataFrame:
    """All tables: `table, paper, place, data, preset, runs, there`; `options` as in `Reproduction`."""
    lines = []
    for name, table in TABLES.items():
        requests = Reproduction(name, **options).requests
        first = requests[0]
        lines.append(
            {
                "table": name,
                "paper": methods.get(next(iter(table.columns.values()))[0]).PAPER,
                "place": table.place,
                "data": " ".join(filter(None, (first.dataset, first.split))),
                "preset": first.preset,
                "runs": len(requests),
                "there": sum(r.hash in records for r in requests),
            }
        )
    return pd.DataFrame(lines)
