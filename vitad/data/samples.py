"""How image files become tensors.

An `ImageSet` decodes its records once, keeps them as uint8 and hands out batches. The preparation is the same for every
method: RGB, both sides resized (bilinear, anti-aliased), no crop; masks by nearest neighbour, then `> threshold`. On a
GPU the set lives in its memory where it fits, and batches are indexed there.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.utils.data
from numpy import ndarray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from vitad.data.records import UNREADABLE, Record, one_channel
from vitad.errors import UserError
from vitad.files import cache_dir
from vitad.processes import Share
from vitad.transfer import free_bytes, to_device

MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images a set may hold in memory; beyond, a cache file on disk
DEVICE_SHARE = 0.25  # of the free memory of a GPU that a set may take there; beyond, batches come from the host
AHEAD = 4  # batches that are made while a GPU computes, by as many threads
Damage = Callable[[int, dict[str, Tensor]], dict[str, Tensor]]  # number of a part, its samples -> damaged samples
_ONE_COPY = Lock()  # of a set on a device, whichever thread asks first


@dataclass(frozen=True)
class Split:
    """A data set as `vitad.data.load` returns it."""

    name: str
    category: str | None
    split: str | None
    train: "ImageSet"
    test: "ImageSet"


class ImageSet(torch.utils.data.Dataset):
    """Decoded images of one split.

    Items are dicts `image (3,H,W) float32 in [0,1], mask (1,H,W) bool, label int, path str, defect str`.

    Parameters
    ----------
    records : list of Record
        The images, in this order.
    root : path
        The folder to which `paths` are relative.
    image_size : int or (int, int)
        Side in px, or (H, W).
    mask_threshold : int
        Grey level above which a mask pixel is anomalous.
    skip_bad : bool
        Leave unreadable images out instead of raising.
    limit : int
        Bytes beyond which the decoded images are kept in a file of the cache.

    Attributes
    ----------
    labels, defects, paths, categories, groups, textures : ndarray (N,)
        Of each image. A category is written dataset/category. Images of one item are of one group; the group is the
        path where an image is the only one of its item. `textures` (bool) says where a material fills the picture.
    has_masks : bool
        False where no anomalous image has a mask file.
    skipped : list of str
        Unreadable files that `skip_bad` left out.
    """

    def __init__(
        self,
        records: Sequence[Record],
        root: str | Path,
        image_size: int | tuple[int, int],
        mask_threshold: int = 0,
        skip_bad: bool = False,
        limit: int = MEMORY_LIMIT,
    ):
        self.root, self.size = Path(root), check_image_size(image_size)
        self.mask_threshold, self.limit = mask_threshold, limit
        self._copies: dict[torch.device, tuple[Tensor, ...] | None] = {}  # see `_on`
        decoded = self._decode(records, skip_bad)
        self.records = [r for r, ok in zip(records, decoded, strict=True) if ok]
        self.skipped = [self._relative(r) for r, ok in zip(records, decoded, strict=True) if not ok]
        self.labels = np.array([r.label for r in self.records], dtype=np.int64)
        self.defects = np.array([r.defect for r in self.records], dtype=str)
        self.categories = np.array([r.category for r in self.records], dtype=str)
        self.paths = np.array([self._relative(r) for r in self.records], dtype=str)
        self.groups = np.array([r.group or self._relative(r) for r in self.records], dtype=str)
        self.textures = np.array([r.texture for r in self.records], dtype=bool)
        self.has_masks = any(r.mask for r in self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        batch = self.batch([i])
        return {
            "image": batch["image"][0],
            "mask": batch["mask"][0],
            "label": int(self.labels[i]),
            "path": str(self.paths[i]),
            "defect": str(self.defects[i]),
        }

    def batch(self, indices: Sequence[int] | ndarray, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The samples of the given indices, on `device`.

        Returns
        -------
        dict
            `image (B,3,H,W) float32`, `mask (B,1,H,W) bool`, `label (B,)`. On the CPU stay `index (B,)`, the indices
            themselves, for methods that keep something for each image, and `texture (B,) bool`, see `textures`.
        """
        chosen, device = np.asarray(indices), torch.device(device)
        if copies := self._on(device):
            places = to_device(torch.from_numpy(chosen), device)
            image, mask, label = (copy[places] for copy in copies)
        else:
            image, mask, label = (to_device(torch.from_numpy(array[chosen]), device) for array in self._arrays())
        return {
            "image": image.float().div_(255).expand(-1, 3, -1, -1),
            "mask": mask[:, None],
            "label": label,
            "index": torch.from_numpy(chosen),
            "texture": torch.from_numpy(self.textures[chosen]),
        }

    def _arrays(self) -> tuple[ndarray, ndarray, ndarray]:
        return self._images, self._masks, self.labels

    def _on(self, device: torch.device) -> tuple[Tensor, ...] | None:
        """Images, masks and labels on a device, copied there by the first call; None on the CPU, or if they do not fit.

        A copy stays for as long as the set does.
        """
        with _ONE_COPY:
            if device not in self._copies:
                size = sum(array.nbytes for array in self._arrays())
                fits = device.type != "cpu" and size <= DEVICE_SHARE * free_bytes(device)
                self._copies[device] = tuple(_copy(array, device) for array in self._arrays()) if fits else None
            return self._copies[device]

    @property
    def masks(self) -> ndarray:
        """All masks, (N,H,W) bool."""
        return self._masks

    def _relative(self, record: Record) -> str:
        return record.path.relative_to(self.root).as_posix()

    def _decode(self, records: Sequence[Record], skip_bad: bool) -> list[bool]:
        """Fill `_images` (N,C,H,W) uint8 and `_masks` (N,H,W) bool; return which records could be read."""
        H, W = self.size
        grey = all(_is_grey(r.path) for r in records)  # grey sets are kept in one channel
        shape = (len(records), 1 if grey else 3, H, W)
        cached, temporary = None, None
        target: ndarray | None = None  # what the images are decoded into; None where all are in the cache
        if int(np.prod(shape)) > self.limit:
            cached = self._cache_file(records, shape)
        if cached and cached.exists():
            self._images = np.load(cached, mmap_mode="r")
        elif cached:
            temporary = cached.with_suffix(f".{os.getpid()}.tmp")
            target = _new_file(temporary, shape)
        else:
            target = self._images = np.empty(shape, np.uint8)
        self._masks = np.zeros((len(records), H, W), bool)

        def decode_one(i: int) -> bool:
            record = records[i]
            try:
                with Image.open(record.path) as image:
                    ImageOps.exif_transpose(image, in_place=True)  # as a photograph is looked at
                    natural = image.size
                    if target is not None:
                        target[i] = _to_uint8(image, "L" if grey else "RGB", (W, H))
            except UNREADABLE as e:
                if skip_bad:
                    return False
                raise UserError(
                    f"cannot read image {record.path}: {e}. Replace it, or leave it out with --skip-bad."
                ) from e
            if record.mask:
                self._masks[i] = self._read_mask(record.path, record.mask, natural)
            return True

        try:
            few, decoded = len(records) < 200, []
            with ThreadPoolExecutor() as pool, tqdm(total=len(records), desc="decode", leave=False, disable=few) as bar:
                for ok in pool.map(decode_one, range(len(records))):
                    decoded.append(ok)
                    bar.update()
            if cached and temporary and isinstance(target, np.memmap):
                if all(decoded):
                    target.flush()
                    os.replace(temporary, cached)
                    self._images = np.load(cached, mmap_mode="r")
                else:  # a file with gaps must not be found by a later call
                    self._images = target
        finally:
            if temporary:
                temporary.unlink(missing_ok=True)
        if not all(decoded):
            self._images, self._masks = self._images[decoded], self._masks[decoded]
        return decoded

    def _read_mask(self, path: Path, mask_path: Path, natural: tuple[int, int]) -> ndarray:
        """(H,W) bool of the mask of an image whose file is `natural` (width, height) px."""
        try:
            with Image.open(mask_path) as mask:
                if mask.size != natural:
                    raise UserError(
                        f"mask {mask_path} is {mask.size[0]}x{mask.size[1]} but its image "
                        f"{path.name} is {natural[0]}x{natural[1]}. Make them the same size."
                    )
                small = one_channel(mask).resize(self.size[::-1], Image.Resampling.NEAREST)
                return np.asarray(small) > self.mask_threshold
        except UNREADABLE as e:
            raise UserError(f"cannot read mask {mask_path}: {e}. Replace it, or remove it and its image.") from e

    def _cache_file(self, records: Sequence[Record], shape: tuple[int, ...]) -> Path:
        stats = [(str(r.path), r.path.stat().st_size, r.path.stat().st_mtime_ns) for r in records]
        key = hashlib.sha256(repr((stats, shape, "upright")).encode()).hexdigest()[:24]
        return cache_dir() / "images" / f"{key}.npy"


def batches(
    images: ImageSet,
    parts: Sequence[Sequence[int] | ndarray],
    device: torch.device,
    damage: Damage | None = None,
    shares: Sequence[Share | None] | None = None,
) -> Iterator[dict[str, Any]]:
    """The samples of these lists of indices in turn, as `ImageSet.batch` gives them.

    On the CPU each is made when it is asked for. On another device threads make the next `AHEAD` on the host, so that
    the device does not wait for them.

    Parameters
    ----------
    damage
        Function of the number of a part and its samples on the host. It is not called on the CPU. Elsewhere the threads
        call it, and what it returns is on the device as `damaged` of the batch.
    shares
        Of each part, the rows that are wanted; None: all. Damage is made of a whole part, on the CPU as well: what an
        image gets depends on those before it.
    """

    def make(number: int) -> dict[str, Any]:
        part, share = parts[number], shares[number] if shares else None
        rows = share.rows if share else slice(None)
        batch: dict[str, Any] = images.batch(part[rows], device)
        if damage and (share or device.type != "cpu"):
            made = damage(number, images.batch(part))
            batch["damaged"] = {name: to_device(tensor[rows], device) for name, tensor in made.items()}
        return batch

    numbers = range(len(parts))
    return map(make, numbers) if device.type == "cpu" else _made_ahead(make, numbers)


def _made_ahead(make: Callable[[int], dict[str, Any]], numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(AHEAD) as threads:
        coming: deque[Future[dict[str, Any]]] = deque()
        for number in numbers:
            coming.append(threads.submit(make, number))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _copy(array: ndarray, device: torch.device) -> Tensor:
    """The array on a device, copied in blocks: one that lies on a disk is never in memory as a whole."""
    copy = torch.empty(array.shape, dtype=torch.from_numpy(array[:0].copy()).dtype, device=device)
    for i in range(0, len(array), 256):
        copy[i : i + 256] = torch.from_numpy(np.array(array[i : i + 256]))
    return copy


def _new_file(path: Path, shape: tuple[int, ...]) -> np.memmap:
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


def check_image_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """`size` as (H, W) in px; an int means a square. Raises `UserError` for what is not from 8 to 4096."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and 8 <= side <= 4096 for side in pair):
        raise UserError(f"image size {size!r} is not usable. Give a side in pixels from 8 to 4096.")
    return pair


def _is_grey(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.mode in ("L", "1", "I", "I;16", "LA")
    except UNREADABLE:
        return True  # unreadable files are reported when they are decoded


def _to_uint8(image: Image.Image, mode: str, size: tuple[int, int]) -> ndarray:
    """Array (C,H,W) of the image resized to (width, height); 16-bit greys are scaled to 8 bits instead of clipped."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    image = image.convert(mode).resize(size, Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if mode == "L" else array.transpose(2, 0, 1)
