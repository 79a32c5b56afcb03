"""VisA (Zou et al. 2022, SPot-the-Difference): 12 categories, 10,821 images, the one-class split from its file.

As published::

    split_csv/1cls.csv with the columns object, split, label, image, mask
    <category>/Data/Images/{Normal,Anomaly}/*.JPG    <category>/Data/Masks/Anomaly/*.png

As its prepare_data.py converts it: the MVTec layout with the one kind `bad`.

The masks as published hold the small ids of kinds of defect, so they look black. Either layout gives the same
records but for their paths; the kind is called `anomaly`.
"""

import csv
from dataclasses import replace
from pathlib import Path

from vitad.data.dataset import Records, Scan, Source
from vitad.data.records import LooseMask, Record, image_files
from vitad.data.sets.folder import MVTecLayout
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


class VisA(MVTecLayout):
    """As published, or in the MVTec layout where the folder of a category holds `train`."""

    name = "visa"
    title = "VisA"
    source = Source(
        page="https://github.com/amazon-science/spot-diff",
        licence="CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)",
        url="https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
        checksum="sha256:2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
        citation="Zou, Jeong, Pemula, Zhang, Dabeer: SPot-the-Difference Self-Supervised Pre-training for Anomaly "
        "Detection and Segmentation. ECCV 2022",
    )
    published = {
        category: {("train", "good"): train, ("test", "good"): good, ("test", "anomaly"): 100}
        for category, (train, good) in _TRAIN_AND_GOOD.items()
    }
    split_by = SPLIT_FILE
    spellings = {"candles": "candle"}

    def scan(self, root: Path, category: str | None = None) -> Scan:
        """All files of one category; those that the split file names are included even where they are missing."""
        if _is_converted(root, category):
            return {part: _renamed(records) for part, records in super().scan(root, category).items()}
        scanned: Scan = {"train": [], "test": []}
        listed = set()
        for row in _rows(root):
            if row["object"] == category:
                bad = row["label"] != "normal"
                mask = root / row["mask"] if row["mask"] else None
                scanned[row["split"]].append(Record(root / row["image"], int(bad), "anomaly" if bad else "good", mask))
                listed.add(mask)
        masks = image_files(root / str(category) / "Data" / "Masks" / "Anomaly")
        scanned["test"] += [LooseMask(m, "anomaly") for m in masks if m not in listed]
        return scanned

    def records(self, root: Path, category: str | None = None, split: str | None = None) -> Records:
        """The training and test images of one category."""
        if _is_converted(root, category):
            train, test = super().records(root, category)
            return train, _renamed(test)
        if not root.is_dir():
            raise UserError(f"data folder {root} does not exist. Check --data-root.")
        train, test = (_complete(root, part) for part in self.scan(root, category).values())
        if not train or not test:
            raise UserError(
                f"{root / SPLIT_FILE} lists no training or no test images of '{category}'. Use the original file."
            )
        if any(r.label for r in train):
            raise UserError(f"{root / SPLIT_FILE} trains on anomalous images, so it is not the one-class split.")
        return train, test


def _is_converted(root: Path, category: str | None) -> bool:
    return (root / str(category) / "train").is_dir()


def _complete(root: Path, scanned: list[Record | LooseMask]) -> list[Record]:
    """The records of one part; `UserError` where a file or an entry is missing."""
    records = []
    for r in scanned:
        if isinstance(r, LooseMask):
            raise UserError(f"mask {r.mask} belongs to no image in {SPLIT_FILE}. Unpack the data set again.")
        missing = next((p for p in (r.path, r.mask) if p and not p.is_file()), None)
        if missing:
            raise UserError(f"{missing} is listed in {SPLIT_FILE} and missing. Unpack the data set again.")
        if r.label and not r.mask:
            raise UserError(f"{root / SPLIT_FILE} names no mask for {r.path}. Use the original file.")
        records.append(r)
    return records


def _rows(root: Path) -> list[dict[str, str]]:
    path = root / SPLIT_FILE
    if not path.is_file():
        raise UserError(
            f"{path} is missing, which holds the split. Point --data-root to the folder of the unpacked archive, "
            "or to one that its prepare_data.py has made."
        )
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        complete = all(row.get(c) is not None for c in COLUMNS) and row["split"] in ("train", "test")
        if not complete or any(Path(row[c]).is_absolute() or ".." in Path(row[c]).parts for c in ("image", "mask")):
            raise UserError(
                f"{path}, line {number}: expected {', '.join(COLUMNS)}, with paths below {root}. Use the original file."
            )
    return rows


def _renamed(records: list) -> list:
    """With the kind `anomaly` in place of `bad`."""
    return [r if r.defect == "good" else replace(r, defect="anomaly") for r in records]


DATASET = VisA()
