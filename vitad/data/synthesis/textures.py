"""Textures that fill the damage: the images of a folder, or patterns computed here."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vitad.data.records import IMAGE_SUFFIXES, UNREADABLE
from vitad.data.sets.dtd import is_dtd
from vitad.data.synthesis.pixels import to_device
from vitad.errors import UserError

PROCEDURAL = 128  # number of textures that are computed where no folder is given
TEXTURE_BYTES = 2**31  # limit of what decoded textures take on the device; of more files, an evenly spread part is kept
DTD = "DTD"  # how `textures_used` begins where the folder holds it
COARSE = 24  # side in px of the copy of a texture from which its histogram is taken


@dataclass(frozen=True)
class TextureBank:
    """N textures of one size."""

    images: Tensor  # (N,3,H,W) uint8, on the device
    smooth: Tensor  # the same after PIL's filter SMOOTH, with which sharpness compares
    coarse: np.ndarray  # (N,3,Q) uint8: a coarse grid of the pixels of each, on the host


@lru_cache(maxsize=2)
def texture_bank(source: str, size: tuple[int, int], device: torch.device) -> TextureBank:
    """Textures on the device, decoded or computed at the first call only.

    Parameters
    ----------
    source : str
        `procedural`, or a folder: every image below it is used.
    size : (H, W)
    device : device

    Raises
    ------
    UserError
        The folder is missing or holds no image, or an image is broken.
    """
    images = procedural_textures(PROCEDURAL, size, device) if source == "procedural" else _decode(source, size)
    images = images.to(device)
    rows, columns = (torch.linspace(0, length - 1, COARSE, device=device).round().long() for length in size)
    coarse = images[:, :, rows[:, None], columns].flatten(2).cpu().numpy()
    smooth = torch.empty_like(images)
    for part, out in zip(images.split(16), smooth.split(16), strict=True):
        part = part.float()
        mean = F.avg_pool2d(F.pad(part, (1, 1, 1, 1), mode="replicate"), 3, 1)  # of 3 x 3 pixels
        out.copy_(((9 * mean + 4 * part) / 13).round_())  # SMOOTH counts the middle one five times
    return TextureBank(images, smooth, coarse)


def textures_used(source: str, size: tuple[int, int]) -> str:
    """What a texture bank is made of, for the run record: DTD, which is known by the files in it, or another folder.

    Examples
    --------
    >>> textures_used("procedural", (224, 224))
    'procedural'
    """
    if source == "procedural":
        return source
    files = _files(source)
    name = DTD if is_dtd(files) else "other images"
    return f"{name}, {len(_used(files, size)):,} of {len(files):,} files"


def _files(source: str) -> list[Path]:
    """The images below a folder."""
    root = Path(source).expanduser()
    if not root.is_dir():
        raise UserError(f"texture folder {root} does not exist. Name a folder of images, or use textures=procedural.")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
    if not files:
        raise UserError(f"texture folder {root} holds no images. Put some there, or use textures=procedural.")
    return files


def _used(files: list[Path], size: tuple[int, int]) -> list[Path]:
    """As many of the files as `TEXTURE_BYTES` allow, evenly spread."""
    H, W = size
    N = min(len(files), max(1, TEXTURE_BYTES // (6 * H * W)))  # 6: three channels, of the image and its smooth copy
    return [files[k * len(files) // N] for k in range(N)]


def _decode(source: str, size: tuple[int, int]) -> Tensor:
    """(N,3,H,W) uint8: the images below a folder."""
    H, W = size
    files = _used(_files(source), size)

    def decode(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                image.draft("RGB", (W, H))  # a JPEG is decoded at a size near the one wanted
                return np.asarray(image.convert("RGB").resize((W, H), Image.Resampling.BILINEAR))
        except UNREADABLE as e:
            raise UserError(f"cannot read texture {path}: {e}. Replace or remove it.") from e

    images = np.empty((len(files), 3, H, W), np.uint8)
    with ThreadPoolExecutor() as pool:
        for k, image in enumerate(pool.map(decode, files)):
            images[k] = image.transpose(2, 0, 1)
    return torch.from_numpy(images)


def procedural_textures(n: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """Compute n textures, the same at each call: a quarter each of coloured noise, stripes, checkers, Voronoi cells.

    Returns
    -------
    Tensor (n,3,H,W) uint8
    """
    rng = np.random.default_rng(0)
    H, W = size
    y, x = (torch.arange(length, device=device) / min(size) for length in size)  # in shares of the shorter side
    makers = (_noise_texture, _stripes, _checkers, _cells)
    textures = []
    for k, maker in enumerate(makers):
        count = len(range(k, n, len(makers)))
        made = maker(rng, count, y[:, None].expand(H, W), x.expand(H, W))  # (count,3,H,W), in about 0..1
        textures.append((255 * made).clamp(0, 255).byte())
    return torch.cat(textures)


def _noise_texture(rng: np.random.Generator, n: int, y: Tensor, x: Tensor) -> Tensor:
    """Smooth noise of five scales, weighted at random; its channels have more or less of it in common."""
    total = torch.zeros((), device=y.device)
    for side in (4, 8, 16, 32, 64):
        weight, common = rng.random((2, n, 1, 1, 1))
        knots = rng.normal(size=(n, 3, side, side)) + 2 * common * rng.normal(size=(n, 1, side, side))
        knots = to_device(weight**2 * knots, y.device)
        total = total + F.interpolate(knots, y.shape, mode="bicubic", align_corners=False)
    total = total / total.std((2, 3), keepdim=True)
    return to_device(rng.uniform(0.3, 0.7, (n, 3, 1, 1)), y.device) + 0.22 * total


def _stripes(rng: np.random.Generator, n: int, y: Tensor, x: Tensor) -> Tensor:
    return _between(rng, _wave(y, x, *_wave_draws(rng, n, y.device)))


def _checkers(rng: np.random.Generator, n: int, y: Tensor, x: Tensor) -> Tensor:
    angle, period, phase, sharpness = _wave_draws(rng, n, y.device)
    a = _wave(y, x, angle, period, phase, sharpness)
    b = _wave(y, x, angle + math.pi / 2, period, phase, sharpness)
    return _between(rng, a * b + (1 - a) * (1 - b))


def _wave_draws(rng: np.random.Generator, n: int, device: torch.device) -> tuple[Tensor, ...]:
    """Angle, period in shares of the shorter side, phase and sharpness of n patterns, each (n,1,1,1)."""
    angle = rng.uniform(0, math.pi, n)
    period = 0.02 * 15 ** rng.random(n)
    phase = rng.uniform(0, 2 * math.pi, n)
    sharpness = 0.5 * 20 ** rng.random(n)
    return tuple(to_device(draw, device)[:, None, None, None] for draw in (angle, period, phase, sharpness))


def _wave(y: Tensor, x: Tensor, angle: Tensor, period: Tensor, phase: Tensor, sharpness: Tensor) -> Tensor:
    """Stripes (n,1,H,W) in [0,1]."""
    wave = ((angle.cos() * x + angle.sin() * y) * 2 * math.pi / period + phase).sin()
    return (0.5 + sharpness * wave).clamp(0, 1)


def _between(rng: np.random.Generator, share: Tensor) -> Tensor:
    """Two random colours mixed by `share` (n,1,H,W)."""
    a, b = to_device(rng.random((2, len(share), 3, 1, 1)), share.device)
    return torch.lerp(a.expand(-1, -1, *share.shape[2:]), b, share)


def _cells(rng: np.random.Generator, n: int, y: Tensor, x: Tensor) -> Tensor:
    """Voronoi cells of 8 to 64 random sites, each in its own colour."""
    pixels = torch.stack([y.flatten(), x.flatten()], 1)  # (H*W,2)
    textures = []
    for count in rng.integers(8, 65, n):
        sites = to_device(rng.random((count, 2)), y.device) * pixels.amax(0)
        nearest = ((sites**2).sum(1) - 2 * pixels @ sites.T).argmin(1)  # |p|^2 is the same for all sites of a pixel
        colours = to_device(rng.random((3, count)), y.device)
        textures.append(colours[:, nearest].view(3, *y.shape))
    return torch.stack(textures)
