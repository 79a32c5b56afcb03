"""Data sets: `load` gives `.train` (normal images only) and `.test` of any of them.

`toy` is generated. The others are read from `root` (`--data-root`), or from the folder of their name below the one that
the environment variable `VITAD_DATA` names. The category `all` takes those of a data set together, and `mvtec+visa`
takes two data sets together, for one model. `vitad.data.download` fetches published sets, and `vitad.data.verify`
checks what is on the disk.

To add a data set, write a module in `vitad/data/sets/` with a subclass of `vitad.data.dataset.Dataset` and its instance
`DATASET`, and add the module's name to `DATASETS` below.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitad.data.dataset import ALL, JOIN, Dataset, Found, JoinedDataset
from vitad.data.records import Record
from vitad.errors import unknown
from vitad.files import cache_dir

if TYPE_CHECKING:
    from vitad.data.samples import ImageSet, Split

__all__ = [
    "ALL",
    "DATASETS",
    "TEXTURE_SETS",
    "Dataset",
    "Found",
    "ImageSet",
    "JoinedDataset",
    "Record",
    "Split",
    "cache_dir",
    "describe",
    "find",
    "get",
    "load",
]


def __getattr__(name: str) -> Any:
    """`ImageSet` and `Split`, which need torch, are imported when they are asked for."""
    if name not in ("ImageSet", "Split"):
        raise AttributeError(f"module 'vitad.data' has no attribute '{name}'")
    return getattr(import_module("vitad.data.samples"), name)


def _registered(*names: str) -> dict[str, Dataset]:
    return {name: import_module(f"vitad.data.sets.{name}").DATASET for name in names}


DATASETS = _registered(
    "toy",
    "mt",
    "folder",
    "mvtec",
    "btad",
    "visa",
    "ksdd2",
)
TEXTURE_SETS = _registered("dtd")  # nothing to train on: textures for synthetic damage


def get(name: str) -> Dataset:
    """The data set of that name; names joined by `+`, such as `mvtec+visa`, give a `JoinedDataset`.

    Raises
    ------
    UserError
        For an unknown name; it names the nearest.

    Examples
    --------
    >>> get("mvtec").resolve("Metal nut")
    ('metal_nut', None)
    """
    names = name.split(JOIN)
    for one in names:
        if one not in DATASETS:
            raise unknown("dataset", one, DATASETS)
    parts = [DATASETS[one] for one in names]
    return parts[0] if len(parts) == 1 else JoinedDataset(parts)


def find(name: str, root: str | Path | None = None, category: str | None = None, split: str | None = None) -> Found:
    """The files of a data set that a run needs, without decoding images; parameters as in `load`.

    Only the masks of `ksdd2` are decoded, since they hold the labels.

    Raises
    ------
    UserError
        For an unknown data set, category or split, and for a missing or incomplete folder.
    """
    return get(name).find(root, category, split)


def load(
    name: str,
    root: str | Path | None = None,
    category: str | None = None,
    split: str | None = None,
    image_size: int | tuple[int, int] = 224,
    mask_threshold: int = 0,
    skip_bad: bool = False,
) -> Split:
    """Load a data set.

    Parameters
    ----------
    name : str
        One of `DATASETS`, or several joined by `+`, whose folders are in `root`.
    root : path, optional
        Its folder. By default the one of its name below `VITAD_DATA`; `toy` is generated into the cache.
    category : str, optional
        As the folder is called, or as papers spell it. `toy` and `ksdd2` have a default, `mt` has none; `all` takes
        them together.
    split : str, optional
        For `mt`, one of `grouped`, `differnet`, `mala100`.
    image_size : int or (int, int)
        Side in px, or (H, W); both sides are resized.
    mask_threshold : int
        Grey level above which a mask pixel is anomalous.
    skip_bad : bool
        Leave unreadable images out (`.skipped` names them) instead of raising.

    Returns
    -------
    Split
        With `.train` and `.test`, each an `ImageSet`.

    Examples
    --------
    >>> split = load("toy", image_size=64)
    >>> len(split.train), len(split.test), split.test[0]["image"].shape
    (60, 52, torch.Size([3, 64, 64]))
    """
    return find(name, root, category, split).load(image_size, mask_threshold, skip_bad)


def describe(split: Split) -> str:
    """A table of what `load` read, as text: images and masks by kind, sizes, what was skipped."""
    train, test = split.train, split.test
    rows = [("category", "part", "kind", "images", "with mask")]
    for category in dict.fromkeys(test.categories.tolist()):
        rows.append((category, "train", "good", str((train.categories == category).sum()), ""))
        in_category = test.categories == category
        for kind in sorted(set(test.defects[in_category]), key=lambda kind: (kind != "good", kind)):
            chosen = in_category & (test.defects == kind)
            with_mask = str(test.masks[chosen].any((1, 2)).sum()) if test.has_masks and kind != "good" else ""
            rows.append((category, "test", kind, str(chosen.sum()), with_mask))
    columns = rows if len(set(test.categories)) > 1 else [row[1:] for row in rows]

    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    aligned = ["<"] * (len(widths) - 2) + [">"] * 2
    name = " ".join(filter(None, (split.name, split.category, split.split)))
    lines = [f"{name}, {test.size[0]}x{test.size[1]} px"]
    for row in columns:
        lines.append("  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, aligned, widths, strict=True)).rstrip())
    if skipped := train.skipped + test.skipped:
        more = " ..." if len(skipped) > 3 else ""
        lines.append(f"skipped {len(skipped)} unreadable: {', '.join(skipped[:3])}{more}")
    return "\n".join(lines)
