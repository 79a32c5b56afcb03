"""The MVTec layout: a user's own images, the embedded data set, and published ones that keep to it.

<root>/[<category>/]train/good/*            test/good/*, test/<defect>/*
<root>/[<category>/]ground_truth/<defect>/<stem>[_mask].*     (the whole folder may be missing)
"""

from vitad.data.samples import Record, image_files
from vitad.errors import UserError, unknown

PUBLISHED = {}  # images by category, then by part and kind: nothing is published of a user's own
KNOWN = {"duplicate images": 0}  # what `vitad.data.verify` has to find


def categories(root, good="good"):
    """Folders below `root` that hold `train/good`."""
    return sorted(d.name for d in root.iterdir() if (d / "train" / good).is_dir())


def scan(root, category=None, good="good"):
    """What lies there, complete or not: {"train": records, "test": records}.

    A mask without an image has the path None. `good` is the name of the folders of defect-free images.
    """
    base = root / category if category else root
    truth, test = base / "ground_truth", []
    for kind in sorted({d.name for part in (base / "test", truth) if part.is_dir() for d in part.iterdir()}):
        images = _files(base / "test" / kind)
        if kind == good:
            test += [Record(p, 0, "good") for p in images]
            continue
        # By stem, since suffixes may differ (BTAD); where a stem has a .bmp and a .png, the .png counts.
        masks = {m.stem.removesuffix("_mask"): m for m in _files(truth / kind)}
        test += [Record(p, 1, kind, masks.get(p.stem)) for p in images]
        test += [Record(None, 1, kind, masks[stem]) for stem in sorted(masks.keys() - {p.stem for p in images})]
    return {"train": [Record(p, 0, "good") for p in _files(base / "train" / good)], "test": test}


def records(root, category=None, good="good"):
    """(train, test) lists of `Record` of one category, checked for completeness."""
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist. Check --data-root.")
    found = categories(root, good)
    if category is None and not (root / "train").is_dir():
        if found:
            raise UserError(f"{root} holds several categories: {', '.join(found)}. Choose one with --category.")
        raise UserError(
            f"{root} has no folder 'train/good'. Expected the MVTec layout: train/good, test/good, "
            "test/<defect> and, if there are masks, ground_truth/<defect>."
        )
    if category is not None and not found:
        raise UserError(
            f"{root} has no folder '{category}/train/{good}'. Point --data-root to the folder of the categories."
        )
    if category is not None and category not in found:
        raise unknown(f"category in {root}:", category, found)

    base = root / category if category else root
    train, test = scan(root, category, good).values()
    if not train:
        raise UserError(f"{base / 'train' / good} holds no images. One-class training needs good images there.")
    if not any(r.path for r in test):
        raise UserError(f"{base / 'test'} holds no images. Put images into test/{good} and test/<defect>.")
    if (base / "ground_truth").is_dir():
        _check_masks(base, test)
    return train, test


def _check_masks(base, test):
    for r in test:
        if r.path:
            continue
        if not any(other.path for other in test if other.defect == r.defect):
            raise UserError(
                f"{r.mask.parent} holds masks, but there are no images test/{r.defect}. "
                "Add the images or remove the masks."
            )
        stem = r.mask.stem.removesuffix("_mask")
        raise UserError(f"mask {r.mask} has no image test/{r.defect}/{stem}.*. Add the image or remove the mask.")
    bare = [r for r in test if r.label and not r.mask]
    if bare:
        kind = bare[0].defect
        lack, of = (sum(r.defect == kind for r in group) for group in (bare, test))
        raise UserError(
            f"image {bare[0].path} has no mask in {base / 'ground_truth' / kind} ({lack} of {of} lack one). "
            "Add it, or remove the whole folder ground_truth to run without masks."
        )


def _files(folder):
    return image_files(folder) if folder.is_dir() else []
