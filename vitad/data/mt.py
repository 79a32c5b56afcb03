"""Magnetic Tile defects (Huang, Qiu and Yuan): 952 defect-free and 392 defective photographs.

Layout: `MT_<kind>/Imgs/exp<E>_num_<ID>.jpg` with the mask `.png` of the same stem beside it. No split is
published. One physical tile was photographed at up to six exposures within a few dozen frames, and <ID> is
the frame counter, so a split by image puts the same tile on both sides. The splits here:

* `grouped` (default): tiles, not images, are split; about 80 % of the defect-free tiles train.
* `differnet`: the public list of 761 training names (`differnet_train.txt` in the data folder).
* `mala100`: 100 defect-free images train, as many as MALA uses.

All 392 defective images are tested in every split.
"""

import hashlib
import re

from vitad.data.samples import Record, image_files
from vitad.errors import UserError

SPLITS = ("grouped", "differnet", "mala100")
KINDS = ("Blowhole", "Break", "Crack", "Fray", "Uneven")
SAME_TILE = 120  # frames: a larger jump of the counter starts a new tile
DIFFERNET_LIST = "differnet_train.txt"
DEFAULT_SPLIT = SPLITS[0]
# Counted at commit cc4eb53 of the repository.
PUBLISHED = {
    None: {
        ("all", "good"): 952,
        ("all", "Blowhole"): 115,
        ("all", "Break"): 85,
        ("all", "Crack"): 57,
        ("all", "Fray"): 32,
        ("all", "Uneven"): 103,
    }
}
KNOWN = {"empty masks": 4, "good images whose mask marks something": 0, "duplicate images": 0}


def scan(root, category=None):
    """See `folder.scan`; the part is `all`, since no split is published."""
    found = []
    for kind in ("Free", *KINDS):
        folder = root / f"MT_{kind}" / "Imgs"
        files = image_files(folder) if folder.is_dir() else []
        label, defect = (0, "good") if kind == "Free" else (1, kind)
        masks = {m.stem: m for m in files if m.suffix.lower() == ".png"}
        images = [p for p in files if p.suffix.lower() == ".jpg"]
        found += [Record(p, label, defect, masks.pop(p.stem, None)) for p in images]
        found += [Record(None, label, defect, m) for m in masks.values()]
    return {"all": found}


def records(root, split):
    """(train, test) lists of `Record`."""
    free = _kind(root, "Free")
    train_names = _training_names(root, [p.name for p in free], split)
    train = [Record(p, 0, "good") for p in free if p.name in train_names]
    test = [Record(p, 0, "good") for p in free if p.name not in train_names]
    for kind in KINDS:
        for p in _kind(root, kind):
            if not p.with_suffix(".png").is_file():
                raise UserError(f"mask {p.with_suffix('.png')} is missing. Fetch the data set anew.")
            test.append(Record(p, 1, kind, p.with_suffix(".png")))
    return train, test


def tiles(names):
    """Group file names by physical tile: sorted by frame counter, split where it jumps by more than 120."""
    names = sorted(names, key=frame)
    groups = []
    for name in names:
        if not groups or frame(name) - frame(groups[-1][-1]) > SAME_TILE:
            groups.append([])
        groups[-1].append(name)
    return groups


def frame(name):
    """Frame counter of `exp<E>_num_<ID>.jpg`."""
    match = re.fullmatch(r"exp\d+_num_(\d+)\.jpg", name)
    if not match:
        raise UserError(f"file name {name} is not of the form exp<E>_num_<ID>.jpg. Fetch the data set anew.")
    return int(match[1])


def _training_names(root, names, split):
    if split == "grouped":
        groups = _shuffled(tiles(names), key=lambda g: g[0])
        return {name for group in groups[: round(0.8 * len(groups))] for name in group}
    if split == "mala100":
        return set(_shuffled(names)[:100])
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


def _shuffled(items, key=str):
    """A fixed pseudo-random order that depends on names only, not on a generator's version."""
    return sorted(items, key=lambda item: hashlib.sha256(key(item).encode()).digest())


def _kind(root, kind):
    folder = root / f"MT_{kind}" / "Imgs"
    files = sorted(folder.glob("*.jpg")) if folder.is_dir() else []
    if not files:
        raise UserError(
            f"{folder} holds no .jpg images. Point --data-root or VITAD_MT_ROOT to a clone of "
            "https://github.com/abin24/Magnetic-tile-defect-datasets."
        )
    return files
