"""Small trees in the layouts of the published data sets, with their quirks, for tests that need no download."""

import csv

import numpy as np
import pytest
from PIL import Image

from vitad import data
from vitad.data.sets import visa
from vitad.errors import UserError


def needs_real(name, category=None):
    """Mark of tests that need the published data set itself, or one of its categories."""
    try:
        folder = data.get(name).locate()
    except UserError as e:
        return pytest.mark.skipif(True, reason=f"needs the real data set: {e}")
    lacks = category is not None and not (folder / category).is_dir()
    return pytest.mark.skipif(lacks, reason=f"needs the real data set: {folder} has no folder '{category}'.")


SIZE = 24, 16  # width and height of an image


def picture(path, seed=0, mode="RGB", size=SIZE):
    """An image of noise, another one for each path and seed."""
    rng = np.random.default_rng([seed, *path.as_posix().encode()[-40:]])
    save(path, rng.integers(0, 256, (*size[::-1], 3)[: 2 if mode == "L" else 3], dtype=np.uint8))


def mask(path, value=255, size=SIZE):
    """A square of `value` on zeros; nothing where it is 0."""
    array = np.zeros(size[::-1], np.uint8)
    array[4:10, 4:10] = value
    save(path, array)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def mvtec(root):
    """metal_nut in colour, grid grey; a licence beside the folders."""
    for category, mode, kinds in (("metal_nut", "RGB", ("bent", "flip")), ("grid", "L", ("glue",))):
        base = root / category
        for part, count in {"train/good": 3, "test/good": 2}.items():
            for n in range(count):
                picture(base / part / f"{n:03}.png", mode=mode)
        for kind in kinds:
            for n in range(2):
                picture(base / "test" / kind / f"{n:03}.png", mode=mode)
                mask(base / "ground_truth" / kind / f"{n:03}_mask.png")
        (base / "license.txt").write_text("not an image")


def btad(root):
    """01: .bmp with .png masks and a gap; 02: a small value and an empty mask; 03: not square, upper-case suffixes."""
    for product, suffix, mask_suffix, size in (
        ("01", "bmp", "png", (16, 16)),
        ("02", "png", "png", (16, 16)),
        ("03", "BMP", "bmp", (32, 24)),
    ):
        base = root / product
        for part, count in {"train/ok": 4, "test/ok": 2}.items():
            for n in range(count):
                picture(base / part / f"{n:04}.{suffix}", size=size)
        for n, value in ((25, 255), (26, 1), (28, 0 if product == "02" else 255)):
            picture(base / "test" / "ko" / f"{n:04}.{suffix}", size=size)
            mask(base / "ground_truth" / "ko" / f"{n:04}.{mask_suffix}", value, size)


def visa_raw(root):
    """Two categories; which of the normal images are for testing is in the split file alone."""
    rows = []
    for category in ("candle", "pipe_fryum"):
        for n in range(5):
            image = f"{category}/Data/Images/Normal/{n:04}.JPG"
            picture(root / image)
            rows.append((category, "test" if n in (0, 3) else "train", "normal", image, ""))
        for n in range(3):
            image, truth = f"{category}/Data/Images/Anomaly/{n:03}.JPG", f"{category}/Data/Masks/Anomaly/{n:03}.png"
            picture(root / image)
            mask(root / truth, n + 1)  # the id of the kind of defect
            rows.append((category, "test", "anomaly", image, truth))
    write_split(root, rows)


def write_split(root, rows):
    path = root / visa.SPLIT_FILE
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([visa.COLUMNS, *rows])


def visa_converted(raw, root):
    """What its prepare_data.py makes of the raw tree: folders by label, masks of 0 and 255."""
    with open(raw / visa.SPLIT_FILE, newline="") as file:
        for row in csv.DictReader(file):
            kind = "good" if row["label"] == "normal" else "bad"
            source, base = raw / row["image"], root / row["object"]
            target = base / row["split"] / kind / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            if row["mask"]:
                with Image.open(raw / row["mask"]) as image:
                    save(base / "ground_truth" / "bad" / f"{source.stem}.png", (np.asarray(image) > 0) * np.uint8(255))


def ksdd2(root):
    """Tall images of several sizes, two defects for training and two for testing, and the copy in the archive."""
    for part, first, defects in (("train", 10300, {10302: 255, 10304: 1}), ("test", 20000, {20001: 255, 20003: 7})):
        for n in range(first, first + 6):
            size = (20 + n % 3, 60 + n % 2)
            picture(root / part / f"{n}.png", size=size)
            mask(root / part / f"{n}_GT.png", defects.get(n, 0), size)
    for name in ("10301", "10301_GT"):
        (root / "train" / f"{name} (copy).png").write_bytes((root / "train" / f"{name}.png").read_bytes())


def dtd(root):
    """Two classes of two images."""
    for name in ("banded", "polka-dotted"):
        for n in range(2):
            picture(root / "images" / name / f"{name}_{n:04}.jpg")
    (root / "labels").mkdir()
    (root / "labels" / "train1.txt").write_text("banded/banded_0000.jpg\n")


# What the functions above write, in the form of `Dataset.published`.
COUNTS = {
    "mvtec": {
        "metal_nut": {("train", "good"): 3, ("test", "good"): 2, ("test", "bent"): 2, ("test", "flip"): 2},
        "grid": {("train", "good"): 3, ("test", "good"): 2, ("test", "glue"): 2},
    },
    "btad": {p: {("train", "good"): 4, ("test", "good"): 2, ("test", "ko"): 3} for p in ("01", "02", "03")},
    "visa": {c: {("train", "good"): 3, ("test", "good"): 2, ("test", "anomaly"): 3} for c in ("candle", "pipe_fryum")},
    "ksdd2": {"ksdd2": {("train", "good"): 4, ("train", "defect"): 2, ("test", "good"): 4, ("test", "defect"): 2}},
    "dtd": {None: {("all", "banded"): 2, ("all", "polka-dotted"): 2}},
}
WRITE = {"mvtec": mvtec, "btad": btad, "visa": visa_raw, "ksdd2": ksdd2, "dtd": dtd}
