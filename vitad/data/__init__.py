"""Data sets: `load` gives `.train` (normal images only) and `.test` of any of them.

`toy` is generated; the others are read from `root` (`--data-root`; for `mt` also `VITAD_MT_ROOT`). A data set is a
module with `records` (what to train and test on), `scan` (what lies there, whole or not) and the published counts.
The category `all` takes those of a data set together, and `mvtec+visa` takes two data sets together, for one model.
`vitad.data.download` fetches published sets, `vitad.data.verify` checks them.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

from vitad.data import btad, folder, ksdd2, mt, mvtec, toy, visa
from vitad.data.samples import ImageSet, Record, Split
from vitad.errors import UserError, unknown
from vitad.files import cache_dir

__all__ = [
    "DATASETS",
    "ImageSet",
    "Record",
    "Split",
    "cache_dir",
    "categories",
    "describe",
    "find",
    "load",
    "locate",
    "part",
]
LAYOUTS = {"toy": folder, "mt": mt, "folder": folder, "mvtec": mvtec, "btad": btad, "visa": visa, "ksdd2": ksdd2}
DATASETS = tuple(LAYOUTS)
ALL = "all"
SPELLINGS = {"candles": "candle", "1": "01", "2": "02", "3": "03"}  # of categories, beyond case, blanks and hyphens


def find(name, root=None, category=None, split=None):
    """Resolve names to files without decoding images: `(root, category, split, train, test)` with record lists.

    Only the masks of `ksdd2` are decoded, since they hold the labels.

    Raises `UserError` for an unknown data set, category or split, and for a missing or incomplete folder.
    """
    category, split = part(name, category, split)
    root = locate(name, root)
    if name == "folder" and category == ALL and categories(name, root) == [None]:
        category = None
    train, test = [], []
    for one in name.split("+"):
        here = root / one if "+" in name else root
        for c in categories(one, here) if category == ALL else [category]:
            found = mt.records(here, split) if one == "mt" else LAYOUTS[one].records(here, c)
            for records, more in zip((train, test), found, strict=True):
                records += [replace(r, category=f"{one}/{c}" if c else one) for r in more]
    return root, category, split, train, test


def categories(name, root=None):
    """All of a data set; [None] where there are none. Only those of `folder` have to be looked for in `root`."""
    if name == "toy":
        return list(toy.DEFECTS)
    found = LAYOUTS[name].PUBLISHED or (folder.categories(root) if root and root.is_dir() else ())
    return list(found) or [None]


def locate(name, root=None):
    """Folder of a data set as an absolute path; `toy` is generated there first if need be.

    That of `mvtec+visa` holds the folders `mvtec` and `visa`.
    """
    if root is not None and "+" in name:
        for one in name.split("+"):
            locate(one, Path(root) / one)
    elif name == "toy":
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
    names = name.split("+")
    for one in names:
        if one not in DATASETS:
            raise unknown("dataset", one, DATASETS)
    if len(names) > 1:
        if category not in (None, ALL):
            raise UserError(f"'{name}' are several data sets, but category '{category}' was given. Leave it out.")
        category, split = ALL, part("mt" if "mt" in names else names[0], ALL, split)[1]
    elif name == "mt":
        category = None if category == ALL else category
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
    if category in (None, ALL):
        if len(choices) == 1:
            return choices[0]
        if category == ALL:
            return ALL
        raise UserError(
            f"dataset '{name}' has several categories: {', '.join(choices)}. Choose one with --category, or all."
        )
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
        name: one of `DATASETS`, or several joined by `+`, whose folders are in `root`.
        root: its folder; `toy` generates itself into the cache when None.
        category: as the folder is called, or as papers spell it; `toy` and `ksdd2` have a default, `mt` has none;
            `all` takes them together.
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
    train, test, rows = split.train, split.test, [("category", "part", "kind", "images", "with mask")]
    for category in dict.fromkeys(test.categories.tolist()):
        rows.append((category, "train", "good", int((train.categories == category).sum()), ""))
        here = test.categories == category
        for kind in sorted(set(test.defects[here]), key=lambda k: (k != "good", k)):
            chosen = here & (test.defects == kind)
            masks = f"{int(test.masks[chosen].any((1, 2)).sum())}" if test.has_masks and kind != "good" else ""
            rows.append((category, "test", kind, int(chosen.sum()), masks))
    if split.category != ALL:
        rows = [row[1:] for row in rows]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    aligned = ["<"] * (len(widths) - 2) + [">"] * 2
    lines = ["  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, aligned, widths, strict=True)).rstrip() for row in rows]
    name = " ".join(filter(None, (split.name, split.category, split.split)))
    skipped = train.skipped + test.skipped
    if skipped:
        lines.append(f"skipped {len(skipped)} unreadable: {', '.join(skipped[:3])}{' ...' if len(skipped) > 3 else ''}")
    return "\n".join([f"{name}, {test.size[0]}x{test.size[1]} px", *lines])
