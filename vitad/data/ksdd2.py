"""KolektorSDD2 (Božič et al. 2021): one surface, 3,335 tall images of many sizes.

{train,test}/<five digits>.png with the mask <five digits>_GT.png beside it, for good images too.

There are no folders by label: an image is anomalous where its mask holds anything but zero. The published split is
made for supervised training and has 246 anomalous images in `train`; those are left out here. Names that are not five
digits, such as the archive's `10301 (copy).png`, are not images of the data set.
"""

import re
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image

from vitad.data.samples import UNREADABLE, Record, image_files, one_channel
from vitad.errors import UserError

PUBLISHED = {
    "ksdd2": {
        ("train", "good"): 2085,
        ("train", "defect"): 246,
        ("test", "good"): 894,
        ("test", "defect"): 110,
    }
}
KNOWN = {}


def scan(root, category=None):
    """See `folder.scan`; where the mask is missing or unreadable, the label is None and the kind `unknown`."""
    return {part: _pairs(root / part) for part in ("train", "test")}


def records(root, category=None):
    """(train, test) lists of `Record`; decodes all masks, since they hold the labels."""
    found = scan(root)
    for part, pairs in found.items():
        if not pairs:
            raise UserError(
                f"{root / part} holds no images of five digits. Point --data-root to the folder of KolektorSDD2 with "
                "'train' and 'test'."
            )
        for r in pairs:
            if r.path is None:
                raise UserError(f"mask {r.mask} has no image. Unpack the data set anew.")
            if r.label is None:
                raise UserError(
                    f"image {r.path} has no readable mask, which holds its label. Unpack the data set anew."
                )
    train, test = ([r if r.label else replace(r, mask=None) for r in pairs] for pairs in found.values())
    return [r for r in train if r.label == 0], test


def _pairs(folder):
    files = image_files(folder) if folder.is_dir() else []
    masks = {m.stem[:5]: m for m in files if re.fullmatch(r"\d{5}_GT", m.stem, re.I)}
    found = []
    for path in files:
        if re.fullmatch(r"\d{5}", path.stem):
            mask = masks.pop(path.stem, None)
            label = _marked(mask, mask.stat().st_mtime_ns) if mask else None
            defect = {0: "good", 1: "defect", None: "unknown"}[label]
            found.append(Record(path, label, defect, mask))
    return found + [Record(None, 1, "defect", m) for m in masks.values()]


@cache
def _marked(mask, modified):
    """1 where any pixel is not zero, 0 where none is, None where the file cannot be read. Kept for the process."""
    try:
        with Image.open(mask) as image:
            return int(np.asarray(one_channel(image)).any())
    except UNREADABLE:
        return None
