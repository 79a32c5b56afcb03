"""What a run is asked for: one object, made once from a user's words, with the one hash that identifies the run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vitad import data, methods
from vitad.errors import UserError, unknown
from vitad.files import sha256_once
from vitad.settings import as_json, parse_overrides, resolve

AUTO = "auto"  # weights that a method finds by itself
# What the hash covers. Records of before there were revisions have the first.
IDENTITY = ("method", "dataset", "category", "split", "seed", "settings", "weights", "revision")


@dataclass(frozen=True, eq=False)
class Request:
    """A run that somebody asks for. Two requests are equal if they ask for the same run.

    Category and split are filled in, and names are checked, without looking at any data. The fields from `data_root`
    on say where and how to run. They are no part of the identity.

    Parameters
    ----------
    method
        Name in `vitad.methods.METHODS`.
    dataset, category, split
        As in `vitad.data.load`. Without a category, the method's default comes before that of
        the data set: `mala` takes all categories in one model.
    preset, overrides
        See `vitad.settings.resolve`. Overrides may be text, as on the command line.
    seed
        Decides initial weights, order of the images and every other random choice.
    weights
        Of the backbone, see `vitad.backbones.vit`: `auto`, `random` or a file. A file counts by its contents.
    data_root
        Folder of the data set.
    device
        `auto` (CUDA where there is one), `cpu` or `cuda`.
    skip_bad
        Leave unreadable images out instead of stopping.
    tf32, compile
        For speed on a GPU; results change by rounding, and the record says so. TF32 rounds what products of float32
        take in to 10 bits; `torch.compile` fuses the operations of transformer blocks.
    deterministic
        Only operations whose result is the same at every call, so that a resumed run is equal to an unbroken one on a
        GPU, too. On the CPU it is anyway.

    Raises
    ------
    UserError
        A name is unknown, a setting has a wrong type or is out of range, the seed is not a whole number.

    Examples
    --------
    >>> request = Request("patchknn", "toy", preset="smoke", overrides={"sigma": "2"})
    >>> request.category, request.overrides, request.settings["sigma"]
    ('gear', {'sigma': 2.0}, 2.0)
    >>> request == Request("patchknn", preset="smoke", overrides=["sigma=2.0"])
    True
    >>> request.name
    'patchknn-sigma_20cbd473-toy-gear-smoke-s0'
    """

    method: str
    dataset: str = "toy"
    category: str | None = None
    split: str | None = None
    preset: str = "demo"
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    weights: str = AUTO
    data_root: str | Path | None = None
    device: str = "auto"
    skip_bad: bool = False
    tf32: bool = False
    compile: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        module = methods.get(self.method)
        overrides = parse_overrides(self.overrides)
        settings = as_json(resolve(module.Settings, module.PRESETS, self.preset, overrides))
        category, split = data.get(self.dataset).resolve(self.category or module.CATEGORY, self.split)
        filled = {
            "category": category,
            "split": split,
            "seed": check_seed(self.seed),
            "overrides": {key: settings[key] for key in overrides},
            "weights": str(self.weights),
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)

    @classmethod
    def make(cls, request: Request | str, **changes: Any) -> Request:
        """A request as it is or with changed fields; from the name of a method, a new one.

        Raises `UserError` for a field that does not exist; the nearest one is named.
        """
        known = [f.name for f in fields(cls)]
        for name in changes:
            if name not in known:
                raise unknown("field of a run", name, known)
        return replace(request, **changes) if isinstance(request, Request) else cls(request, **changes)

    def override(self, **settings: Any) -> Request:
        """The same request with further settings, which come before those it has."""
        return replace(self, overrides={**self.overrides, **settings})

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings of the method, with preset and overrides, as JSON holds them."""
        return self.settings_with(self.overrides)

    def settings_with(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """All settings of the method and preset with these overrides instead."""
        module = methods.get(self.method)
        return as_json(resolve(module.Settings, module.PRESETS, self.preset, overrides))

    @property
    def revision(self) -> int:
        """That of the method: settings mean the same thing within one revision."""
        return methods.get(self.method).Model.revision

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes two runs the same."""
        return identity({name: getattr(self, name) for name in IDENTITY} | {"weights": {"asked": self.weights}})

    @cached_property
    def hash(self) -> str:
        """The hash of `identity`; `hash_of` gives the same for a record of this run."""
        return digest(self.identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Request) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @cached_property
    def name(self) -> str:
        """Name of the run's folder, such as `vitmem-base_m-mvtec-bottle-paper-s0`. No other run has it.

        Variants carry their name in the method's `VARIANTS`. Other changed settings are named with a hash.
        """
        plain, label = self.settings_with({}), None
        if changed := [key for key in self.settings if self.settings[key] != plain[key]]:
            variants = methods.get(self.method).VARIANTS
            same = [name for name, overrides in variants.items() if self.settings_with(overrides) == self.settings]
            label = same[0] if same else f"{'_'.join(changed)[:40]}_{digest(self.settings)[:8]}"
        words = (self.method, label, weights_label(self.weights), self.dataset, self.category, self.split, self.preset)
        name = "-".join(filter(None, (*words, f"s{self.seed}")))
        safe = re.sub(r"[^a-z0-9_.+-]", "_", name)
        return safe if safe == name else f"{safe}-{self.hash[:8]}"

    @property
    def folder(self) -> str:
        """Name of the run's folder where older runs may lie: `name` and the hash, since defaults change."""
        return f"{self.name}-{self.hash[:8]}"

    def load(self) -> data.Split:
        """The images of the run, at its size."""
        where = (self.dataset, self.data_root, self.category, self.split)
        return data.load(*where, image_size=self.settings["image_size"], skip_bad=self.skip_bad)

    def command(self, out: str | Path) -> list[str]:
        """The words of the `vitad run` that makes it."""
        words = ["vitad", "run", self.method, "--dataset", self.dataset]
        for option in ("category", "split"):
            if value := getattr(self, option):
                words += [f"--{option}", value]
        words += ["--preset", self.preset, "--seed", str(self.seed)]
        if self.overrides:
            words += ["--set", *(f"{key}={_word(value)}" for key, value in self.overrides.items())]
        if self.weights != AUTO:
            words += ["--weights", self.weights]
        if self.data_root is not None:
            words += ["--data-root", str(self.data_root)]
        return [*words, "--out", str(out)]


def identity(described: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs the same, of a request or a record: `IDENTITY`, with `weights` as a record has them.

    No category and all categories are one thing: a data set without categories has only itself.
    """
    found = {name: described[name] for name in ("method", "dataset", "split", "seed")}
    found["category"] = described["category"] if described["category"] != data.ALL else None
    found["settings"] = settings_of(described)
    if described.get("revision", 1) > 1:
        found["revision"] = described["revision"]
    weights = described["weights"]
    if weights["asked"] != AUTO:
        found["weights"] = weights.get("sha256") or weights_identity(weights["asked"])
    return found


def hash_of(record: Mapping[str, Any]) -> str:
    """The hash of the run that a record is of: that of the `Request` which asks for it."""
    return digest(identity(record))


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's settings. A setting that is newer than the record has its default, which is what was done before."""
    return as_json(methods.get(record["method"]).Settings()) | record["settings"]


def digest(value: Any) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def weights_identity(weights: str) -> str:
    """`auto` and `random` are themselves. A file is the hash of its contents, or its path where it is not at hand."""
    path = Path(weights).expanduser()
    return sha256_once(path) if weights not in (AUTO, "random") and path.is_file() else weights


def weights_label(weights: str) -> str | None:
    """Name of weights in the names of folders and files; those that a method finds by itself have none."""
    return None if weights == AUTO else f"{Path(weights).stem}_{digest(weights_identity(weights))[:8]}"


def check_seed(seed: Any) -> int:
    """`seed` as a whole number from 0; `UserError` for anything else."""
    try:
        number = int(seed)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < 2**32 or (number != seed and str(number) != str(seed)):
        raise UserError(f"seed {seed!r} is not usable. Give a whole number from 0.")
    return number


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
