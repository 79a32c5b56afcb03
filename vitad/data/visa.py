"""VisA (Zou et al. 2022, SPot-the-Difference): 12 categories, 10,821 images, the one-class split from its file.

As published:                        split_csv/1cls.csv with the columns object, split, label, image, mask
    <category>/Data/Images/{Normal,Anomaly}/*.JPG    <category>/Data/Masks/Anomaly/*.png
As its prepare_data.py converts it:  the MVTec layout with the one kind `bad`

The masks as published hold the small ids of kinds of defect, so they look black. Either layout gives the same
records but for their paths; the kind is called `anomaly`.
"""

import csv
from dataclasses import replace
from pathlib import Path

from vitad.data import folder
from vitad.data.samples import Record, image_files
from vitad.errors import UserError

SPLIT_FILE = "split_csv/1cls.csv"
COLUMNS = ("object", "split", "label", "image", "mask")
_TRAIN_AND_GOOD = {
    "candle": (900, 100),
    "capsules": (542, 60),
    "cashew": (450, 50),
    "chewinggum": (453, 50),
    "fryum": (450, 50),
    "macaroni1": (900, 100),
    "macaroni2": (900, 100),
    "pcb1": (904, 100),
    "pcb2": (901, 100),
    "pcb3": (905, 101),
    "pcb4": (904, 101),
    "pipe_fryum": (450, 50),
}
PUBLISHED = {
    category: {("train", "good"): train, ("test", "good"): good, ("test", "anomaly"): 100}
    for category, (train, good) in _TRAIN_AND_GOOD.items()
}
KNOWN = {}


def scan(root, category):
    """See `folder.scan`; files that the split names and that are not there are among the records."""
    if (root / category / "train").is_dir():
        return {part: _renamed(records) for part, records in folder.scan(root, category).items()}
    found = {"train": [], "test": []}
    for row in _rows(root):
        if row["object"] == category:
            bad = row["label"] != "normal"
            mask = root / row["mask"] if row["mask"] else None
            record = Record(root / row["image"], int(bad), "anomaly" if bad else "good", mask)
            found[row["split"]].append(record)
    listed = {r.mask for part in found.values() for r in part}
    masks = root / category / "Data" / "Masks" / "Anomaly"
    lone = [m for m in (image_files(masks) if masks.is_dir() else []) if m not in listed]
    found["test"] += [Record(None, 1, "anomaly", m) for m in lone]
    return found


def records(root, category):
    """(train, test) lists of `Record` of one category."""
    if (root / category / "train").is_dir():
        return tuple(map(_renamed, folder.records(root, category)))
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist. Check --data-root.")
    train, test = scan(root, category).values()
    if not train or not any(r.path for r in test):
        raise UserError(f"{root / SPLIT_FILE} lists no training or no test images of '{category}'. Take the original.")
    for r in (*train, *test):
        missing = next((p for p in (r.path, r.mask) if p and not p.is_file()), None)
        if missing:
            raise UserError(f"{missing} is listed in {SPLIT_FILE} and missing. Unpack the data set anew.")
        if r.path is None:
            raise UserError(f"mask {r.mask} belongs to no image in {SPLIT_FILE}. Unpack the data set anew.")
        if r.label and not r.mask:
            raise UserError(f"{root / SPLIT_FILE} names no mask for {r.path}. Take the original.")
    if any(r.label for r in train):
        raise UserError(f"{root / SPLIT_FILE} trains on anomalous images, so it is not the one-class split.")
    return train, test


def _rows(root):
    path = root / SPLIT_FILE
    if not path.is_file():
        raise UserError(
            f"{path} is missing, which holds the split. Point --data-root to the folder of the unpacked archive, "
            "or to one that its prepare_data.py has made."
        )
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        whole = all(row.get(c) is not None for c in COLUMNS) and row["split"] in ("train", "test")
        if not whole or any(Path(row[c]).is_absolute() or ".." in Path(row[c]).parts for c in ("image", "mask")):
            raise UserError(
                f"{path}, line {number}: expected {', '.join(COLUMNS)}, with paths below {root}. Take the original."
            )
    return rows


def _renamed(records):
    return [replace(r, defect="anomaly") if r.label else r for r in records]
