"""Data sets: `load` gives `.train` (normal images only) and `.test` of any of them.

`toy` is generated; the others are read from `root` (`--data-root`; for `mt` also `VITAD_MT_ROOT`). A data set is a
module with `records` (what to train and test on), `scan` (what lies there, whole or not) and the published counts.
`vitad.data.download` fetches published sets, `vitad.data.verify` checks them.
"""

import os
import re
from pathlib import Path

from vitad.data import btad, folder, ksdd2, mt, mvtec, toy, visa
from vitad.data.samples import ImageSet, Record, Split, cache_dir
from vitad.errors import UserError, unknown

__all__ = ["DATASETS", "ImageSet", "Record", "Split", "cache_dir", "describe", "find", "load", "locate", "part"]
LAYOUTS = {"toy": folder, "mt": mt, "folder": folder, "mvtec": mvtec, "btad": btad, "visa": visa, "ksdd2": ksdd2}
DATASETS = tuple(LAYOUTS)
SPELLINGS = {"candles": "candle", "1": "01", "2": "02", "3": "03"}  # of categories, beyond case, blanks and hyphens


def find(name, root=None, category=None, split=None):
    """Resolve names to files without decoding images: `(root, category, split, train, test)` with record lists.

    Only the masks of `ksdd2` are decoded, since they hold the labels.

    Raises `UserError` for an unknown data set, category or split, and for a missing or incomplete folder.
    """
    category, split = part(name, category, split)
    root = locate(name, root)
    train, test = mt.records(root, split) if name == "mt" else LAYOUTS[name].records(root, category)
    return root, category, split, train, test


def locate(name, root=None):
    """Folder of a data set as an absolute path; `toy` is generated there first if need be."""
    if name == "toy":
        root = toy.ensure(root)
    elif name == "mt":
        root = root or os.environ.get("VITAD_MT_ROOT")
    if root is None:
        hint = " or set VITAD_MT_ROOT" if name == "mt" else ""
        raise UserError(f"dataset '{name}' needs its folder: give --data-root{hint}.")
    return Path(root).expanduser().resolve()


def part(name, category=None, split=None):
    """`(category, split)` with the defaults of a data set filled in; looks at no file.

    Categories of published sets come out as their folders are called: "Metal nut" as `metal_nut`, "PCB1" as `pcb1`.

    Raises `UserError` for a data set or split that is unknown, and for one that the data set does not have.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    if name == "mt":
        if category is not None:
            raise UserError(f"dataset 'mt' has no categories, but category '{category}' was given. Leave it out.")
        split = split or mt.DEFAULT_SPLIT
        if split not in mt.SPLITS:
            raise unknown("split", split, mt.SPLITS)
    elif split is not None:
        by = visa.SPLIT_FILE if name == "visa" else "its folders"
        raise UserError(f"dataset '{name}' is split by {by}, but split '{split}' was given. Leave it out.")
    elif name == "toy":
        category = category or toy.DEFAULT_CATEGORY
    elif LAYOUTS[name].PUBLISHED:
        category = _as_published(name, category)
    return category, split


def _as_published(name, category):
    choices = list(LAYOUTS[name].PUBLISHED)
    if category is None:
        if len(choices) > 1:
            raise UserError(
                f"dataset '{name}' has several categories: {', '.join(choices)}. Choose one with --category."
            )
        return choices[0]
    by_letters = {_letters(c): c for c in choices}
    letters = _letters(category)
    if SPELLINGS.get(letters, letters) not in by_letters:
        raise unknown(f"category of {name}", category, choices)
    return by_letters[SPELLINGS.get(letters, letters)]


def _letters(text):
    return re.sub(r"[^a-z0-9]", "", str(text).lower())


def load(name, root=None, category=None, split=None, image_size=224, mask_threshold=0, skip_bad=False):
    """Load a data set.

    Args:
        name: one of `DATASETS`.
        root: its folder; `toy` generates itself into the cache when None.
        category: as the folder is called, or as papers spell it; `toy` and `ksdd2` have a default, `mt` has none.
        split: for `mt`, one of `grouped`, `differnet`, `mala100`.
        image_size: side in px, or (H, W); both sides are resized.
        mask_threshold: grey level above which a mask pixel is anomalous.
        skip_bad: leave unreadable images out (`.skipped` names them) instead of raising.

    Returns:
        `Split` with `.train` and `.test`, each an `ImageSet`.
    """
    root, category, split, train, test = find(name, root, category, split)
    options = dict(image_size=image_size, mask_threshold=mask_threshold, skip_bad=skip_bad)
    sets = ImageSet(train, root, **options), ImageSet(test, root, **options)
    if not len(sets[0]):
        raise UserError(f"none of the {len(train)} training images in {root} can be read.")
    if not len(sets[1]):
        raise UserError(f"none of the {len(test)} test images in {root} can be read.")
    return Split(name, category, split, *sets)


def describe(split):
    """Table of what `load` found, as text: images and masks by kind, sizes, what was skipped."""
    test = split.test
    rows = [("train", "good", len(split.train), "")]
    for kind in sorted(set(test.defects), key=lambda k: (k != "good", k)):
        chosen = test.defects == kind
        masks = f"{int(test.masks[chosen].any((1, 2)).sum())}" if test.has_masks and kind != "good" else ""
        rows.append(("test", kind, int(chosen.sum()), masks))
    rows = [("part", "kind", "images", "with mask"), *rows]
    widths = [max(len(str(row[i])) for row in rows) for i in range(4)]
    lines = [f"{p:<{widths[0]}}  {k:<{widths[1]}}  {n:>{widths[2]}}  {m:>{widths[3]}}".rstrip() for p, k, n, m in rows]
    name = " ".join(filter(None, (split.name, split.category, split.split)))
    skipped = split.train.skipped + test.skipped
    if skipped:
        lines.append(f"skipped {len(skipped)} unreadable: {', '.join(skipped[:3])}{' ...' if len(skipped) > 3 else ''}")
    return "\n".join([f"{name}, {test.size[0]}x{test.size[1]} px", *lines])
