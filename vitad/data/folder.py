"""The MVTec layout, for the embedded data set and for a user's own images.

<root>/[<category>/]train/good/*            test/good/*, test/<defect>/*
<root>/[<category>/]ground_truth/<defect>/<stem>[_mask].*     (the whole folder may be missing)
"""

from vitad.data.samples import Record, image_files
from vitad.errors import UserError, unknown


def categories(root):
    """Folders below `root` that hold `train/good`."""
    return sorted(d.name for d in root.iterdir() if (d / "train" / "good").is_dir())


def records(root, category=None):
    """(train, test) lists of `Record` of one category, checked for completeness."""
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist. Check --data-root.")
    if category is None and not (root / "train").is_dir():
        found = categories(root)
        if found:
            raise UserError(f"{root} holds several categories: {', '.join(found)}. Choose one with --category.")
        raise UserError(
            f"{root} has no folder 'train/good'. Expected the MVTec layout: train/good, test/good, "
            "test/<defect> and, if there are masks, ground_truth/<defect>."
        )
    if category is not None and category not in categories(root):
        raise unknown(f"category in {root}:", category, categories(root) or ["(none found)"])
    base = root / category if category else root

    train = [Record(p, 0, "good") for p in _files(base / "train" / "good")]
    if not train:
        raise UserError(f"{base / 'train' / 'good'} holds no images. One-class training needs good images there.")
    kinds = sorted(d.name for d in (base / "test").iterdir() if d.is_dir()) if (base / "test").is_dir() else []
    test = []
    for kind in kinds:
        images = _files(base / "test" / kind)
        masks = _masks(base, kind, images) if kind != "good" else {}
        test += [Record(p, int(kind != "good"), kind, masks.get(p)) for p in images]
    if not test:
        raise UserError(f"{base / 'test'} holds no images. Put images into test/good and test/<defect>.")
    marked = sorted(d.name for d in (base / "ground_truth").iterdir()) if (base / "ground_truth").is_dir() else []
    for kind in marked:
        if kind not in (*kinds, "good") and _files(base / "ground_truth" / kind):
            raise UserError(
                f"{base / 'ground_truth' / kind} holds masks, but there are no images test/{kind}. "
                "Add the images or remove the masks."
            )
    return train, test


def _files(folder):
    return image_files(folder) if folder.is_dir() else []


def _masks(base, kind, images):
    """{image: mask} for one kind of defect. Matched by stem, since suffixes may differ (BTAD)."""
    truth = base / "ground_truth"
    if not truth.is_dir():
        return {}
    by_stem = {m.stem.removesuffix("_mask"): m for m in _files(truth / kind)}
    lost = set(by_stem) - {p.stem for p in images}
    if lost:
        raise UserError(
            f"mask {by_stem[min(lost)]} has no image test/{kind}/{min(lost)}.*. Add the image or remove the mask."
        )
    bare = [p for p in images if p.stem not in by_stem]
    if bare:
        raise UserError(
            f"image {bare[0]} has no mask in {truth / kind} ({len(bare)} of {len(images)} lack one). "
            "Add it, or remove the whole folder ground_truth to run without masks."
        )
    return {p: by_stem[p.stem] for p in images}
