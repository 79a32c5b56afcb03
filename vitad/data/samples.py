"""What a sample is, and how image files become tensors.

A *record* names an image file, its mask file and its label. An `ImageSet` decodes its records once, keeps
them as uint8 and hands out batches. Preparation follows the same steps for every method:
RGB, both sides resized (bilinear, anti-aliased), no crop; masks nearest neighbour, then `> threshold`.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from vitad.errors import UserError
from vitad.files import cache_dir

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on broken files
MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images a set may hold in memory; beyond, a cache file on disk


def image_files(folder):
    """Image files of one folder, sorted by name; suffixes in any case."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


@dataclass(frozen=True)
class Record:
    path: Path
    label: int  # 0 normal, 1 anomalous, from the folder or the split file, never from the mask
    defect: str  # "good" or the kind of defect
    mask: Path | None = None  # None: no anomalous pixel (normal images), or no mask known
    category: str = ""  # dataset/category, from `vitad.data.find`


@dataclass(frozen=True)
class Split:
    """A data set as `load` returns it."""

    name: str
    category: str | None
    split: str | None
    train: "ImageSet"
    test: "ImageSet"


class ImageSet(Dataset):
    """Decoded images of one split.

    Items are dicts `image (3,H,W) float32 in [0,1], mask (1,H,W) bool, label int, path str, defect str`;
    paths are relative to `root`. `has_masks` is False where no anomalous image has a mask file.
    `categories` has the key dataset/category of each. `skipped` lists the unreadable files that `skip_bad` left out.
    """

    def __init__(self, records, root, image_size, mask_threshold=0, skip_bad=False, limit=MEMORY_LIMIT):
        self.root, self.size = Path(root), check_image_size(image_size)
        self.mask_threshold, self.limit = mask_threshold, limit
        decoded = self._decode(records, skip_bad)
        self.records = [r for r, ok in zip(records, decoded, strict=True) if ok]
        self.skipped = [
            r.path.relative_to(self.root).as_posix() for r, ok in zip(records, decoded, strict=True) if not ok
        ]
        self.labels = np.array([r.label for r in self.records], dtype=np.int64)
        self.defects = np.array([r.defect for r in self.records], dtype=str)
        self.categories = np.array([r.category for r in self.records], dtype=str)
        self.paths = np.array([r.path.relative_to(self.root).as_posix() for r in self.records], dtype=str)
        self.has_masks = any(r.mask for r in self.records)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        batch = self.batch([i])
        return {
            "image": batch["image"][0],
            "mask": batch["mask"][0],
            "label": int(self.labels[i]),
            "path": str(self.paths[i]),
            "defect": str(self.defects[i]),
        }

    def batch(self, indices, device="cpu"):
        """`image (B,3,H,W) float32`, `mask (B,1,H,W) bool` and `label (B,)` of the given samples on `device`.

        Also `index (B,)`, which samples they are, on the host: for methods that keep something for each image.
        """
        indices = np.asarray(indices)
        image = torch.from_numpy(self._images[indices]).to(device, non_blocking=True)
        return {
            "image": image.float().div_(255).expand(-1, 3, -1, -1),
            "mask": torch.from_numpy(self._masks[indices]).to(device, non_blocking=True)[:, None],
            "label": torch.from_numpy(self.labels[indices]).to(device, non_blocking=True),
            "index": torch.from_numpy(indices),
        }

    @property
    def masks(self):
        """All masks, (N,H,W) bool."""
        return self._masks

    def _decode(self, records, skip_bad):
        """Fill `_images` (N,C,H,W) uint8 and `_masks` (N,H,W) bool; tell which records could be read."""
        H, W = self.size
        grey = all(_is_grey(r.path) for r in records)  # grey sets are kept in one channel
        shape = (len(records), 1 if grey else 3, H, W)
        path, aside, image_of = None, None, None
        if int(np.prod(shape)) > self.limit:
            path = self._cache_file(records, shape)
        if path and path.exists():
            self._images = np.load(path, mmap_mode="r")
        elif path:
            aside = path.with_suffix(f".{os.getpid()}.tmp")
            image_of = _new_file(aside, shape)
        else:
            image_of = self._images = np.empty(shape, np.uint8)
        self._masks = np.zeros((len(records), H, W), bool)

        def one(i):
            record = records[i]
            try:
                with Image.open(record.path) as image:
                    natural = image.size
                    if image_of is not None:
                        image_of[i] = _to_uint8(image, "L" if grey else "RGB", (W, H))
            except UNREADABLE as e:
                if skip_bad:
                    return False
                raise UserError(
                    f"cannot read image {record.path}: {e}. Replace it, or leave it out with --skip-bad."
                ) from e
            if record.mask:
                self._masks[i] = self._read_mask(record, natural)
            return True

        try:
            few, decoded = len(records) < 200, []
            with ThreadPoolExecutor() as pool, tqdm(total=len(records), desc="decode", leave=False, disable=few) as bar:
                for ok in pool.map(one, range(len(records))):
                    decoded.append(ok)
                    bar.update()
            if aside and all(decoded):
                image_of.flush()
                os.replace(aside, path)
                self._images = np.load(path, mmap_mode="r")
            elif aside:  # a cache that holds gaps must not be found again
                self._images = image_of
        finally:
            if aside:
                aside.unlink(missing_ok=True)
        if not all(decoded):
            self._images, self._masks = self._images[decoded], self._masks[decoded]
        return decoded

    def _read_mask(self, record, natural):
        try:
            with Image.open(record.mask) as mask:
                if mask.size != natural:
                    raise UserError(
                        f"mask {record.mask} is {mask.size[0]}x{mask.size[1]} but its image "
                        f"{record.path.name} is {natural[0]}x{natural[1]}. Make them the same size."
                    )
                small = one_channel(mask).resize(self.size[::-1], Image.Resampling.NEAREST)
                return np.asarray(small) > self.mask_threshold
        except UNREADABLE as e:
            raise UserError(f"cannot read mask {record.mask}: {e}. Replace it, or remove it and its image.") from e

    def _cache_file(self, records, shape):
        stats = [(str(r.path), r.path.stat().st_size, r.path.stat().st_mtime_ns) for r in records]
        key = hashlib.sha256(repr((stats, shape)).encode()).hexdigest()[:24]
        return cache_dir() / "images" / f"{key}.npy"


def _new_file(path, shape):
    """Array of uint8 in a new file.

    Its space is claimed at once, since a disk that fills up while the array is written would kill the process.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array
    except OSError as e:
        if path.exists():
            path.unlink()
        raise UserError(
            f"cannot keep decoded images in {path.parent}: {e.strerror or e}. "
            "Make room there, or name another folder with the variable VITAD_CACHE."
        ) from e


def one_channel(mask):
    """The mask with one level a pixel, of 8 bits or more; what is not 0 is anomalous."""
    return mask if mask.mode in ("L", "I;16", "I") else mask.convert("L")


def check_image_size(size):
    """`size` as (H, W); an int means a square."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(s, int) and 8 <= s <= 4096 for s in pair):
        raise UserError(f"image size {size!r} is not usable. Give a side in pixels from 8 to 4096.")
    return pair


def _is_grey(path):
    try:
        with Image.open(path) as image:
            return image.mode in ("L", "1", "I", "I;16", "LA")
    except UNREADABLE:
        return True  # unreadable files are reported when they are decoded


def _to_uint8(image, mode, size):
    """Array (C,H,W) of the resized image; 16-bit greys are scaled to 8 bits instead of clipped."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    image = image.convert(mode).resize(size, Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if mode == "L" else array.transpose(2, 0, 1)
