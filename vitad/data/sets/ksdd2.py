"""KolektorSDD2 (Božič et al. 2021): one surface, 3,335 tall images of many sizes.

{train,test}/<five digits>.png with the mask <five digits>_GT.png beside it, for good images too.

There are no folders by label: an image is anomalous where its mask holds anything but zero. The published split is
made for supervised training and has 246 anomalous images in `train`; those are left out. Names that are not five
digits, such as the archive's `10301 (copy).png`, are not images of the data set.
"""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from vitad.data.dataset import Dataset, Records, Scan, Source
from vitad.data.records import UNKNOWN, UNREADABLE, LooseMask, Record, image_files, one_channel
from vitad.errors import UserError

DEFECT = {0: "good", 1: "defect", UNKNOWN: "unknown"}  # by label


class KSDD2(Dataset):
    """Its one category is called as the data set is."""

    name = "ksdd2"
    textures = frozenset({None})
    title = "KolektorSDD2"
    source = Source(
        page="https://www.vicos.si/resources/kolektorsdd2/",
        licence="CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): not for commercial use",
        url="https://data.vicos.si/datasets/KSDD/KolektorSDD2.zip",
        checksum="md5:1ed0f628122776ace4965afa30dfe316",  # no sha256 is published
        citation="Božič, Tabernik, Skočaj: Mixed supervision for surface-defect detection: From weakly to fully "
        "supervised learning. Computers in Industry 129, 2021",
    )
    default_category = "ksdd2"
    published = {
        "ksdd2": {
            ("train", "good"): 2085,
            ("train", "defect"): 246,
            ("test", "good"): 894,
            ("test", "defect"): 110,
        }
    }

    def scan(self, root: Path, category: str | None = None) -> Scan:
        """All pairs, as published; the label is `UNKNOWN` where the mask is missing or cannot be read."""
        return {part: _pairs(root / part) for part in ("train", "test")}

    def records(self, root: Path, category: str | None = None, split: str | None = None) -> Records:
        """The training and test images; decodes all masks, since they hold the labels."""
        return [r for r in _complete(root / "train") if r.label == 0], _complete(root / "test")


def _complete(folder: Path) -> list[Record]:
    """The records of one part; `UserError` where an image or a mask is missing."""
    pairs = _pairs(folder)
    if not pairs:
        raise UserError(
            f"{folder} holds no images of five digits. Point --data-root to the folder of KolektorSDD2 with "
            "'train' and 'test'."
        )
    records = []
    for r in pairs:
        if isinstance(r, LooseMask):
            raise UserError(f"mask {r.mask} has no image. Unpack the data set again.")
        if r.label == UNKNOWN:
            raise UserError(f"image {r.path} has no readable mask, which holds its label. Unpack the data set again.")
        records.append(r if r.label else replace(r, mask=None))
    return records


def _pairs(folder: Path) -> list[Record | LooseMask]:
    files = image_files(folder)
    masks = {m.stem[:5]: m for m in files if re.fullmatch(r"\d{5}_GT", m.stem, re.I)}
    pairs: list[Record | LooseMask] = []
    for path in files:
        if re.fullmatch(r"\d{5}", path.stem):
            mask = masks.pop(path.stem, None)
            label = _label(mask, mask.stat().st_mtime_ns) if mask else UNKNOWN
            pairs.append(Record(path, label, DEFECT[label], mask))
    return pairs + [LooseMask(m, "defect") for m in masks.values()]


@cache
def _label(mask: Path, modified: int) -> int:
    """1 where any pixel is not zero, 0 where none is; `UNKNOWN` where the file cannot be read.

    The answer is kept for the process, until the time when the file was `modified` changes.
    """
    try:
        with Image.open(mask) as image:
            return int(np.asarray(one_channel(image)).any())
    except UNREADABLE:
        return UNKNOWN


DATASET = KSDD2()
