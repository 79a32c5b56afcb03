"""Where in an image the object is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter
from scipy.ndimage import label as components
from torch import Tensor

from vitad.data.records import UNREADABLE, one_channel
from vitad.errors import UserError

if TYPE_CHECKING:
    from vitad.data.samples import ImageSet

OTSU = "otsu"


def foreground_mask(images: Tensor) -> Tensor:
    """Separate the object from its background.

    No paper says how MALA does it; this way is ours. Otsu's threshold splits the blurred grey image. The foreground is
    the side that covers less of the image's border; it is closed, opened, and loses parts below 1 % of the image. Where
    less than 5 % or more than 95 % of the image remain, all of it is foreground.

    Parameters
    ----------
    images : Tensor (B,3,H,W) in [0,1]

    Returns
    -------
    Tensor (B,1,H,W) bool
        Each mask depends on its image only, so it can be computed once and kept.
    """
    levels = (255 * images.float().mean(1)).round().byte().cpu().numpy()
    masks = np.stack([_foreground(level) for level in levels])
    return torch.from_numpy(masks).to(images.device)[:, None]


def foregrounds(images: ImageSet, indices: np.ndarray, source: str = OTSU) -> Tensor:
    """The foregrounds of images of a data set, (n,1,H,W) bool on the host.

    Parameters
    ----------
    images, indices
        The data set, and which of its images.
    source
        `otsu`: everything where a material fills the picture, elsewhere what `foreground_mask` finds. Or a folder of
        masks, which are named like the images, with the suffix `.png`, and white where the object is.

    Raises
    ------
    UserError
        A mask is missing or cannot be read.
    """
    H, W = images.size
    found = torch.ones(len(indices), 1, H, W, dtype=torch.bool)
    for k, i in enumerate(indices):
        if source != OTSU:
            found[k, 0] = torch.from_numpy(_read(Path(source).expanduser() / str(images.paths[i]), (W, H)))
        elif not images.textures[i]:
            found[k] = foreground_mask(images.batch([i])["image"])[0]
    return found


def _read(image: Path, size: tuple[int, int]) -> np.ndarray:
    path = image.with_suffix(".png")
    if not path.is_file():
        raise UserError(f"foreground {path} is missing. Put it there, or use foreground={OTSU}.")
    try:
        with Image.open(path) as mask:
            return np.asarray(one_channel(mask).resize(size, Image.Resampling.NEAREST)) > 0
    except UNREADABLE as e:
        raise UserError(f"cannot read foreground {path}: {e}. Replace it, or use foreground={OTSU}.") from e


def _foreground(level: np.ndarray) -> np.ndarray:
    """(H,W) uint8 -> (H,W) bool."""
    level = gaussian_filter(level, 1.1, truncate=2)  # 5 x 5
    mask = level > _otsu(level)
    border = np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]])
    mask ^= border.mean() > 0.5
    mask = minimum_filter(maximum_filter(mask, 5), 5)  # closed
    mask = maximum_filter(minimum_filter(mask, 5), 5)  # opened
    parts, _ = components(mask, np.ones((3, 3)))
    large = np.bincount(parts.ravel()) >= 0.01 * mask.size
    large[0] = False  # number 0 is the background
    mask = large[parts]
    return mask if 0.05 <= mask.mean() <= 0.95 else np.ones_like(mask)


def _otsu(level: np.ndarray) -> int:
    """The level (uint8) that splits an image into two classes whose means differ most, weighted by their sizes."""
    share = np.bincount(level.ravel(), minlength=256) / level.size
    below = share.cumsum()
    moment = (share * np.arange(256)).cumsum()
    between = (moment[-1] * below - moment) ** 2 / (below * (1 - below)).clip(1e-9)  # variance between the classes
    return int(between.argmax())
