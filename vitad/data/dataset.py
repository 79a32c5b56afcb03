"""What a data set is: its folder, its categories and splits, its images, and what is published of it.

Each module of `vitad.data.sets` holds one subclass of `Dataset` with an instance `DATASET`, which `vitad.data`
registers. `mvtec+visa` is a `JoinedDataset`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitad.data.hashes import hash_files
from vitad.data.records import LooseMask, Record
from vitad.errors import UserError, unknown

if TYPE_CHECKING:
    from vitad.data.samples import Split

ALL = "all"  # as a category: all of them together, for one model
JOIN = "+"  # between categories, or data sets, that share one model
VARIABLE = "VITAD_DATA"  # names the folder that holds the data sets, each in a folder of its name

Records = tuple[list[Record], list[Record]]  # training, test
Scan = dict[str, list[Record | LooseMask]]  # by part


@dataclass(frozen=True)
class Source:
    """Where a published data set comes from, and under which terms."""

    page: str
    licence: str
    url: str | None = None  # of the archive; None: `page` is a repository to clone
    checksum: str | None = None  # of the archive, as algorithm:hex
    citation: str | None = None
    commit: str | None = None  # of the repository


class Dataset:
    """A data set; subclasses say how its folder is read.

    Attributes
    ----------
    name : str
        Name in code, on the command line, and of its folder below `VITAD_DATA`.
    title : str
        Name in prose.
    source : Source or None
        None for what is not published.
    published : dict
        `{category: {(part, kind): number of images}}`; {} where no counts are published. The category is None where
        the data set has none, the part is `all` where no split is published.
    known : dict
        `{check: number of files}`: what `vitad.data.verify` has to find, beyond what no data set may have.
    splits : tuple of str
        The first is the default; () where the files say what is for training.
    split_by : str
        What says so.
    default_category : str or None
        Taken where none is requested; None: the user has to choose, or there are none.
    spellings : dict
        Names of categories in papers (lower case, without blanks and hyphens) where the folder is called otherwise.
    textures : set of str
        Categories whose images are filled by a material, without an object on a background; None stands for the data
        set where it has no categories.
    variable : str or None
        Environment variable that names the folder.
    """

    name: str
    title: str
    source: Source | None = None
    published: Mapping[str | None, Mapping[tuple[str, str], int]] = {}
    known: Mapping[str, int] = {}
    splits: tuple[str, ...] = ()
    split_by: str = "its folders"
    default_category: str | None = None
    spellings: Mapping[str, str] = {}
    textures: frozenset[str | None] = frozenset()
    variable: str | None = None

    def records(self, root: Path, category: str | None = None, split: str | None = None) -> Records:
        """The training and test images of one category, checked for completeness."""
        raise NotImplementedError

    def scan(self, root: Path, category: str | None = None) -> Scan:
        """All files of one category, complete or not, by part: usually `train` and `test`."""
        raise NotImplementedError

    def categories(self, root: Path | None = None) -> list[str | None]:
        """All categories, [None] where there are none. Those of a user's images are looked up in `root`."""
        return list(self.published) or [None]

    def members(self, category: str | None, root: Path | None = None) -> list[str | None]:
        """The categories that a resolved name stands for: itself, all, or several that are joined with `+`."""
        if category == ALL:
            return self.categories(root)
        return list(category.split(JOIN)) if category and self.published else [category]

    def groups(self, paths: Sequence[str]) -> list[str]:
        """The item that each image shows, by their paths below the folder; here each image shows another one."""
        return list(paths)

    def resolve(self, category: str | None = None, split: str | None = None) -> tuple[str | None, str | None]:
        """Category and split with the defaults filled in; looks at no file.

        Categories of published sets come out as their folders are called: "Metal nut" as `metal_nut`. Several for one
        model are joined with `+` and come out in the order of the data set: "pill+Bottle" as `bottle+pill`.

        Raises
        ------
        UserError
            For a category or a split that the data set does not have.
        """
        return self._resolve_category(category), self._resolve_split(split)

    def locate(self, root: str | Path | None = None) -> Path:
        """The folder of the data set, absolute; it need not exist where `root` names it.

        Without `root` it is what the set's `variable` names, or the folder `name` below `VITAD_DATA`.
        """
        root = root or (self.variable and os.environ.get(self.variable)) or self._below_variable()
        if not root:
            alternative = f" or set {self.variable}," if self.variable else ""
            raise UserError(
                f"dataset '{self.name}' needs its folder: give --data-root{alternative} or set {VARIABLE} to the "
                f"folder that holds '{self.name}'{_value_now()}."
            )
        return Path(root).expanduser().resolve()

    def counts(self, category: str | None = None, split: str | None = None) -> tuple[int, int] | None:
        """(training images, test images), as published or generated; None where nobody has counted them."""
        category, split = self.resolve(category, split)
        published = [self.published.get(one, {}) for one in self.members(category)]
        if not all(("train", "good") in counts for counts in published):
            return None
        train = sum(counts["train", "good"] for counts in published)
        return train, sum(n for counts in published for (part, _), n in counts.items() if part == "test")

    def counts_by_category(
        self, category: str | None = None, split: str | None = None
    ) -> dict[str, tuple[int, int]] | None:
        """`counts` of each category, by the name that its images have in an `ImageSet`; None where one is not known."""
        category, split = self.resolve(category, split)
        counts = {self._label(one): self.counts(one, split) for one in self.members(category)}
        known = {label: pair for label, pair in counts.items() if pair}
        return known if len(known) == len(counts) else None

    def find(self, root: str | Path | None = None, category: str | None = None, split: str | None = None) -> Found:
        """The files that a run needs, without decoding images; see `vitad.data.find`."""
        category, split = self.resolve(category, split)
        folder = self.locate(root)
        if category == ALL and self.categories(folder) == [None]:
            category = None
        train, test = self.select(folder, category, split)
        return Found(self, folder, category, split, train, test)

    def select(self, root: Path, category: str | None, split: str | None) -> Records:
        """`records` of one category or of all, each with the `category` that it is from."""
        train: list[Record] = []
        test: list[Record] = []
        for one in self.members(category, root):
            label = self._label(one)
            for records, more in zip((train, test), self.records(root, one, split), strict=True):
                records += [replace(r, category=label, texture=one in self.textures) for r in more]
        return train, test

    def _label(self, category: str | None) -> str:
        return f"{self.name}/{category}" if category else self.name

    def where_to_get(self, root: str | Path | None = None) -> str | None:
        """Where to get the data set, as text; None where its folder exists."""
        try:
            folder = self.locate(root)
        except UserError:
            return self.how_to_get()
        return None if folder.is_dir() else self.how_to_get(f" in {folder}")

    def how_to_get(self, place: str = "", target: str = "DIR") -> str:
        """The text of `where_to_get` for a data set that is missing in `place` and has to go to `target`."""
        lines = [f"data: '{self.name}' is not at hand{place}. Give its folder with --data-root DIR."]
        if self.source:
            lines.append(f"  page {self.source.page}, licence {self.source.licence}")
            if self.source.url:
                lines.append(f"  vitad data download {self.name} --root {target} --accept-licence")
            else:
                lines.append(f"  git clone {self.source.page} {target}")
        return "\n".join(lines)

    def _resolve_category(self, category: str | None) -> str | None:
        choices = self.categories() if self.published else []
        if not choices:  # the folders of a user's images, which are not looked at now
            return category or self.default_category
        if choices == [None]:
            if category not in (None, ALL):
                raise UserError(
                    f"dataset '{self.name}' has no categories, but category '{category}' was given. Leave it out."
                )
            return None
        category = category if category is not None else self.default_category
        if category is None:
            raise UserError(
                f"dataset '{self.name}' has several categories: {', '.join(map(str, choices))}. "
                "Choose one with --category, or all."
            )
        if category == ALL:
            return ALL if len(choices) > 1 else choices[0]
        by_letters = {_letters(choice): choice for choice in choices}
        chosen = set()
        for one in str(category).split(JOIN):
            letters = self.spellings.get(_letters(one), _letters(one))
            if letters not in by_letters:
                raise unknown(f"category of {self.name}", one, choices)
            chosen.add(by_letters[letters])
        return ALL if 1 < len(chosen) == len(choices) else JOIN.join(str(c) for c in choices if c in chosen)

    def _resolve_split(self, split: str | None) -> str | None:
        if self.splits:
            split = split or self.splits[0]
            if split not in self.splits:
                raise unknown("split", split, self.splits)
        elif split is not None:
            raise UserError(
                f"dataset '{self.name}' is split by {self.split_by}, but split '{split}' was given. Leave it out."
            )
        return split

    def _below_variable(self) -> Path | None:
        place = data_folder()
        return place / self.name if place and (place / self.name).is_dir() else None


class JoinedDataset(Dataset):
    """Several data sets for one model, such as `mvtec+visa`: all categories of each, in the folders of their names.

    It has no `records` and no `scan`; `select` collects the records of its `parts`.
    """

    default_category = ALL

    def __init__(self, parts: list[Dataset]):
        self.parts = parts
        self.name = JOIN.join(part.name for part in parts)
        self.title = " and ".join(part.title for part in parts)
        self.splits = next((part.splits for part in parts if part.splits), ())

    def categories(self, root: Path | None = None) -> list[str | None]:
        """The categories of all parts, one part after the other."""
        return [one for part in self.parts for one in part.categories(root / part.name if root else None)]

    def locate(self, root: str | Path | None = None) -> Path:
        """The folder that holds those of the parts: `root`, or that of `VITAD_DATA` if all of them are in it."""
        place = data_folder()
        if not root and place and all((place / part.name).is_dir() for part in self.parts):
            root = place
        if not root:
            names = " and ".join(f"'{part.name}'" for part in self.parts)
            raise UserError(
                f"dataset '{self.name}' needs its folder: give --data-root or set {VARIABLE} to the folder that holds "
                f"{names}{_value_now()}."
            )
        for part in self.parts:
            part.locate(Path(root).expanduser() / part.name)  # where one is generated, it is generated now
        return Path(root).expanduser().resolve()

    def counts(self, category: str | None = None, split: str | None = None) -> tuple[int, int] | None:
        """The sums over the parts; None where one is not known."""
        _, split = self.resolve(category, split)
        counts = [part.counts(ALL, split if part.splits else None) for part in self.parts]
        known = [pair for pair in counts if pair]
        if len(known) < len(counts):
            return None
        return sum(train for train, _ in known), sum(test for _, test in known)

    def counts_by_category(
        self, category: str | None = None, split: str | None = None
    ) -> dict[str, tuple[int, int]] | None:
        """Those of all parts, one part after the other; None where one is not known."""
        _, split = self.resolve(category, split)
        counts = [part.counts_by_category(ALL, split if part.splits else None) for part in self.parts]
        known = [labelled for labelled in counts if labelled]
        return {k: v for labelled in known for k, v in labelled.items()} if len(known) == len(counts) else None

    def select(self, root: Path, category: str | None, split: str | None) -> Records:
        """The records of all parts, one part after the other."""
        selected = [part.select(root / part.name, ALL, split if part.splits else None) for part in self.parts]
        return [r for train, _ in selected for r in train], [r for _, test in selected for r in test]

    def where_to_get(self, root: str | Path | None = None) -> str | None:
        """Where to get the parts whose folders are missing, as text; None where all exist."""
        try:
            folder = self.locate(root)
        except UserError:
            place, absent = "", [part for part in self.parts if part.where_to_get()] or self.parts
        else:
            place, absent = f" in {folder}", [part for part in self.parts if not (folder / part.name).is_dir()]
        return "\n".join(part.how_to_get(place, f"DIR/{part.name}") for part in absent) or None

    def _resolve_category(self, category: str | None) -> str | None:
        if category not in (None, ALL):
            raise UserError(f"'{self.name}' are several data sets, but category '{category}' was given. Leave it out.")
        return ALL

    def _resolve_split(self, split: str | None) -> str | None:
        decides = next((part for part in self.parts if part.splits), self.parts[0])
        return decides.resolve(ALL, split)[1]


@dataclass(frozen=True)
class Found:
    """The files of one category (or of all) and one split of a data set."""

    dataset: Dataset
    root: Path
    category: str | None
    split: str | None
    train: list[Record]
    test: list[Record]

    @property
    def files(self) -> list[Path]:
        """All images, each followed by its mask, in the order of the records."""
        return [path for r in (*self.train, *self.test) for path in (r.path, r.mask) if path]

    def contents_sha256(self) -> str:
        """Hash of the relative names and the contents of all files, so that other data is another run.

        It also covers how many images are for training. Each file is read once; `vitad.data.hashes` keeps its hash.
        """
        files = self.files
        digest = hashlib.sha256(f"{len(self.train)} training images\n".encode())
        for path, contents in zip(files, hash_files(files, self.root), strict=True):
            digest.update(f"{path.relative_to(self.root).as_posix()} {contents}\n".encode())
        return digest.hexdigest()

    def names_sha256(self) -> str:
        """Hash of the relative names and sizes of all files, which older records hold."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.relative_to(self.root).as_posix()} {path.stat().st_size}\n".encode())
        return digest.hexdigest()

    def load(self, image_size: int | tuple[int, int] = 224, mask_threshold: int = 0, skip_bad: bool = False) -> Split:
        """Decode the images; the parameters are those of `vitad.data.load`.

        The last images stay in memory, so that an ablation decodes them once. Files that change are decoded again.
        """
        described = (self.dataset.name, self.category, self.split)
        stamps = tuple(_stamp(path) for path in self.files)
        size = tuple(image_size) if isinstance(image_size, list) else image_size
        return _load(described, self.root, tuple(self.train), tuple(self.test), stamps, size, mask_threshold, skip_bad)


@lru_cache(maxsize=1, typed=True)
def _load(
    described: tuple[str, str | None, str | None],
    root: Path,
    train: tuple[Record, ...],
    test: tuple[Record, ...],
    stamps: tuple[tuple[int, int] | None, ...],
    *how: Any,
) -> Split:
    from vitad.data.samples import ImageSet, Split  # torch is imported when images are decoded, not before

    sets = [ImageSet(part, root, *how) for part in (train, test)]
    for kind, records, images in zip(("training", "test"), (train, test), sets, strict=True):
        if not len(images):
            raise UserError(f"none of the {len(records)} {kind} images in {root} can be read.")
    return Split(*described, *sets)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of change; None for a file that cannot be read, which is reported when it is decoded."""
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except OSError:
        return None


def data_folder() -> Path | None:
    """The folder that the variable `VITAD_DATA` names, None where it is unset or empty."""
    value = os.environ.get(VARIABLE)
    return Path(value).expanduser() if value else None


def _value_now() -> str:
    value = os.environ.get(VARIABLE)
    return f" (now {value})" if value else ""


def _letters(text: str | None) -> str:
    return re.sub(r"[^a-z0-9]", "", str(text).lower())
