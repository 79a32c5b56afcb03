"""Magnetic Tile defects (Huang, Qiu and Yuan): 952 defect-free and 392 defective photographs.

Layout: `MT_<kind>/Imgs/exp<E>_num_<ID>.jpg` with the mask `.png` of the same stem beside it. No split is
published. One physical tile was photographed at up to six exposures within a few dozen frames, and <ID> is
the frame counter, so a split by image puts the same tile on both sides. The splits here:

* `grouped` (default): tiles, not images, are split; about 80 % of the defect-free tiles train.
* `differnet`: the public list of 761 training names (`differnet_train.txt` in the data folder).
* `mala100`: 100 defect-free images train, as many as MALA uses.

All 392 defective images are tested in every split. The test images of one tile are one group, see `groups`.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

from vitad.data.dataset import Dataset, Records, Scan, Source
from vitad.data.records import LooseMask, Record, image_files
from vitad.errors import UserError

T = TypeVar("T")

SPLITS = ("grouped", "differnet", "mala100")
KINDS = ("Blowhole", "Break", "Crack", "Fray", "Uneven")
SAME_TILE = 120  # frames: a larger jump of the counter starts a new tile
DIFFERNET_LIST = "differnet_train.txt"
# Training and test images of each split, counted at commit cc4eb53 of the repository.
COUNTS = {"grouped": (762, 582), "differnet": (761, 583), "mala100": (100, 1244)}


class MagneticTiles(Dataset):
    """Has no categories; the part of `published` and of `scan` is `all`, since no split is published."""

    name = "mt"
    textures = frozenset({None})
    title = "Magnetic Tile defects"
    source = Source(
        page="https://github.com/abin24/Magnetic-tile-defect-datasets.",  # the dot belongs to the name
        licence="none is stated; the read-me asks to cite Huang, Qiu and Yuan, Surface defect saliency of magnetic "
        "tile",
        citation="Huang, Qiu, Yuan: Surface defect saliency of magnetic tile. The Visual Computer 36, 2020",
        commit="cc4eb53",
    )
    published = {
        None: {
            ("all", "good"): 952,
            ("all", "Blowhole"): 115,
            ("all", "Break"): 85,
            ("all", "Crack"): 57,
            ("all", "Fray"): 32,
            ("all", "Uneven"): 103,
        }
    }
    known = {"empty masks": 4, "good images whose mask marks something": 0, "duplicate images": 0}
    splits = SPLITS
    variable = "VITAD_MT_ROOT"

    def counts(self, category: str | None = None, split: str | None = None) -> tuple[int, int] | None:
        """(training images, test images) of a split."""
        _, split = self.resolve(category, split)
        return COUNTS[str(split)]

    def scan(self, root: Path, category: str | None = None) -> Scan:
        """All images and masks, as the part `all`."""
        scanned: list[Record | LooseMask] = []
        for kind in ("Free", *KINDS):
            files = image_files(root / f"MT_{kind}" / "Imgs")
            label, defect = (0, "good") if kind == "Free" else (1, kind)
            masks = {m.stem: m for m in files if m.suffix.lower() == ".png"}
            images = [p for p in files if p.suffix.lower() == ".jpg"]
            scanned += [Record(p, label, defect, masks.pop(p.stem, None)) for p in images]
            scanned += [LooseMask(m, defect) for m in masks.values()]
        return {"all": scanned}

    def records(self, root: Path, category: str | None = None, split: str | None = None) -> Records:
        """The training and test images of a split."""
        free = _images(root, "Free")
        in_training = _training_names(root, [p.name for p in free], split or SPLITS[0])
        train = [Record(p, 0, "good") for p in free if p.name in in_training]
        test = [Record(p, 0, "good") for p in free if p.name not in in_training]
        for kind in KINDS:
            for p in _images(root, kind):
                mask = p.with_suffix(".png")
                if not mask.is_file():
                    raise UserError(f"mask {mask} is missing. Fetch the data set again.")
                test.append(Record(p, 1, kind, mask))
        return self._grouped(root, train), self._grouped(root, test)

    def groups(self, paths: Sequence[str]) -> list[str]:
        """The tile that each image shows: its folder and the first of the tile's images among `paths`.

        Known: <ID> counts frames, and good images whose counters lie close together show one tile. Assumed: the rule of
        `tiles` holds within each kind of defect as well, where it gives 78 groups and limits of 90 to 150 frames give
        77 to 82; and photographs of different kinds show different tiles. Only `paths` count, so that the list of a
        run's scores gives the same groups as the data: on `differnet` 114 good ones, where all images would give 111.
        """
        by_folder: dict[str, list[str]] = {}
        for path in map(PurePosixPath, paths):
            by_folder.setdefault(str(path.parent), []).append(path.name)
        group_of = {
            f"{folder}/{name}": f"{folder}/{tile[0]}"
            for folder, names in by_folder.items()
            for tile in tiles(names)
            for name in tile
        }
        return [group_of[path] for path in paths]

    def _grouped(self, root: Path, records: list[Record]) -> list[Record]:
        groups = self.groups([r.path.relative_to(root).as_posix() for r in records])
        return [replace(r, group=group) for r, group in zip(records, groups, strict=True)]


def tiles(names: Iterable[str]) -> list[list[str]]:
    """Group file names by physical tile: sorted by frame counter, split where it jumps by more than 120."""
    groups: list[list[str]] = []
    for name in sorted(names, key=frame):
        if not groups or frame(name) - frame(groups[-1][-1]) > SAME_TILE:
            groups.append([])
        groups[-1].append(name)
    return groups


def frame(name: str) -> int:
    """Frame counter of `exp<E>_num_<ID>.jpg`."""
    match = re.fullmatch(r"exp\d+_num_(\d+)\.jpg", name)
    if not match:
        raise UserError(f"file name {name} is not of the form exp<E>_num_<ID>.jpg. Fetch the data set again.")
    return int(match[1])


def _training_names(root: Path, names: list[str], split: str) -> set[str]:
    if split == "grouped":
        groups = _shuffled(tiles(names), key=lambda group: group[0])
        return {name for group in groups[: round(0.8 * len(groups))] for name in group}
    if split == "mala100":
        return set(_shuffled(names, key=str)[:100])
    path = root / DIFFERNET_LIST
    if not path.is_file():
        raise UserError(
            f"split 'differnet' needs {path}: the list mtd_train_filenames.txt of the DifferNet code, "
            "one file name a line. Put it there, or use --split grouped."
        )
    listed = set(path.read_text().split())
    strange = listed - set(names)
    if strange:
        raise UserError(f"{path} lists {min(strange)}, which is not in MT_Free. Check the list and the data.")
    return listed


def _shuffled(items: list[T], key: Callable[[T], str]) -> list[T]:
    """A fixed pseudo-random order that depends on names only, not on a generator's version."""
    return sorted(items, key=lambda item: hashlib.sha256(key(item).encode()).digest())


def _images(root: Path, kind: str) -> list[Path]:
    folder = root / f"MT_{kind}" / "Imgs"
    files = sorted(folder.glob("*.jpg")) if folder.is_dir() else []
    if not files:
        raise UserError(
            f"{folder} holds no .jpg images. Point --data-root or VITAD_MT_ROOT to a clone of "
            "https://github.com/abin24/Magnetic-tile-defect-datasets."
        )
    return files


DATASET = MagneticTiles()
