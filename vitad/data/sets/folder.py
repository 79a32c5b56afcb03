"""The MVTec layout: a user's own images, the embedded data set, and published ones that keep to it.

<root>/[<category>/]train/good/*            test/good/*, test/<defect>/*
<root>/[<category>/]ground_truth/<defect>/<stem>[_mask].*     (the whole folder may be missing)
"""

from pathlib import Path

from vitad.data.dataset import Dataset, Records, Scan
from vitad.data.records import LooseMask, Record, image_files
from vitad.errors import UserError, unknown


class MVTecLayout(Dataset):
    """A data set in the MVTec layout; `good` is the name of the folders of defect-free images."""

    good = "good"

    def categories(self, root: Path | None = None) -> list[str | None]:
        """The published ones, else the folders below `root` that hold `train/good`; [None] where there are none."""
        return list(self.published) or [*(self._folders(root) if root else [])] or [None]

    def scan(self, root: Path, category: str | None = None) -> Scan:
        """All images and masks of one category, complete or not, as the parts `train` and `test`."""
        base = root / category if category else root
        parts = [part for part in (base / "test", base / "ground_truth") if part.is_dir()]
        test: list[Record | LooseMask] = []
        for kind in sorted({folder.name for part in parts for folder in part.iterdir()}):
            images = image_files(base / "test" / kind)
            if kind == self.good:
                test += [Record(p, 0, "good") for p in images]
                continue
            # By stem, since suffixes may differ (BTAD); where a stem has a .bmp and a .png, the .png counts.
            masks = {m.stem.removesuffix("_mask"): m for m in image_files(base / "ground_truth" / kind)}
            test += [Record(p, 1, kind, masks.get(p.stem)) for p in images]
            test += [LooseMask(masks[stem], kind) for stem in sorted(masks.keys() - {p.stem for p in images})]
        return {"train": [Record(p, 0, "good") for p in image_files(base / "train" / self.good)], "test": test}

    def records(self, root: Path, category: str | None = None, split: str | None = None) -> Records:
        """The training and test images of one category.

        Raises
        ------
        UserError
            For a folder that is missing, has another layout or lacks images; and, where there is a folder
            `ground_truth`, for an image without a mask and a mask without an image.
        """
        base = root / category if category else root
        self._check_folder(root, category)
        scanned = self.scan(root, category)
        train = [r for r in scanned["train"] if isinstance(r, Record)]
        test = [r for r in scanned["test"] if isinstance(r, Record)]
        if not train:
            raise UserError(
                f"{base / 'train' / self.good} holds no images. One-class training needs good images there."
            )
        if not test:
            raise UserError(f"{base / 'test'} holds no images. Put images into test/{self.good} and test/<defect>.")
        if (base / "ground_truth").is_dir():
            _check_masks(base, test, [r for r in scanned["test"] if isinstance(r, LooseMask)])
        return train, test

    def _folders(self, root: Path) -> list[str]:
        """The categories that are in `root`."""
        return sorted(d.name for d in root.iterdir() if (d / "train" / self.good).is_dir()) if root.is_dir() else []

    def _check_folder(self, root: Path, category: str | None) -> None:
        if not root.is_dir():
            raise UserError(f"data folder {root} does not exist. Check --data-root.")
        folders = self._folders(root)
        if category is None and not (root / "train").is_dir():
            if folders:
                raise UserError(f"{root} holds several categories: {', '.join(folders)}. Choose one with --category.")
            raise UserError(
                f"{root} has no folder 'train/good'. Expected the MVTec layout: train/good, test/good, "
                "test/<defect> and, if there are masks, ground_truth/<defect>."
            )
        if category is not None and not folders:
            raise UserError(
                f"{root} has no folder '{category}/train/{self.good}'. "
                "Point --data-root to the folder of the categories."
            )
        if category is not None and category not in folders:
            raise unknown(f"category in {root}:", category, folders)


def _check_masks(base: Path, test: list[Record], loose: list[LooseMask]) -> None:
    """Refuse masks without an image and anomalous images without a mask."""
    if loose:
        mask, kind = loose[0].mask, loose[0].defect
        if not any(r.defect == kind for r in test):
            raise UserError(
                f"{mask.parent} holds masks, but there are no images test/{kind}. Add the images or remove the masks."
            )
        stem = mask.stem.removesuffix("_mask")
        raise UserError(f"mask {mask} has no image test/{kind}/{stem}.*. Add the image or remove the mask.")
    bare = [r for r in test if r.label and not r.mask]
    if bare:
        kind = bare[0].defect
        n_bare, n_all = (sum(r.defect == kind for r in records) for records in (bare, test))
        raise UserError(
            f"image {bare[0].path} has no mask in {base / 'ground_truth' / kind} ({n_bare} of {n_all} lack one). "
            "Add it, or remove the whole folder ground_truth to run without masks."
        )


class Folder(MVTecLayout):
    """A user's own images."""

    name = "folder"
    title = "your own images, in the MVTec layout"
    known = {"duplicate images": 0}


DATASET = Folder()
