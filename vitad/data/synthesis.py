"""Synthetic damage for methods that learn from normal images only.

The kind `perlin` is the recipe of DRAEM (Zavrtanik et al. 2021, ICCV, arXiv 2108.07610; what its paper leaves open,
from its code): thresholded Perlin noise M, a recoloured texture T, an opacity, I_a = (1 - M) I + M ((1 - b) T + b I).
The others are ours, shaped after what real surfaces have: `crack`, `pit`, `patch`, `fray`, `paste`.

A kind of damage is a function that returns the pixels (s,y,x) that it covers, s counting the images that it was given,
and a second function that paints them. Only the shapes are computed for whole images, all else for lists of pixels,
of which there are few. No file is read after the first call. Random numbers are drawn on the host from (seed, step),
so damage neither depends on earlier calls nor on the device, and a resumed run sees what the unbroken one would have.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter
from scipy.ndimage import label as components
from torch.nn import functional as F

from vitad.data.samples import IMAGE_SUFFIXES, UNREADABLE
from vitad.errors import UserError, unknown

PROCEDURAL = 128  # textures made where none are given
TEXTURE_BYTES = 2**30  # what decoded textures may take on the device; of more files, an evenly spread part
COARSE = 24  # side in px of the copy of a texture from which its histogram is taken


@dataclass(frozen=True)
class Synthesis:
    """Damages batches of normal images: `synthesis(images, seed, step)`. Defaults are DRAEM's.

    Raises:
        UserError: unknown kind or mode, number out of range.
    """

    kinds: tuple[str, ...] = ("perlin",)  # one is drawn for each image; a name given twice is drawn twice as often
    probability: float = 0.5  # of an image to be damaged
    mode: Literal["global", "local", "both"] = "global"  # MALA: local keeps to the foreground; both: an even chance
    textures: str = "procedural"  # or a folder of images, at any depth; DRAEM: that of DTD
    scales: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # a and b of the Perlin lattice (2^a, 2^b)
    threshold: float = 0.5  # of the noise
    beta_max: float = 0.8  # share of the image that shines through: b ~ U(0, beta_max)
    keep_grey: bool = False  # ours: paint no colour on grey images; DRAEM does

    def __post_init__(self):
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown("kind of damage", kind, KINDS)
        if not self.kinds:
            raise UserError(f"kinds of damage: none given. Choose from: {', '.join(KINDS)}.")
        if self.mode not in ("global", "local", "both"):
            raise unknown("mode of damage", self.mode, ("global", "local", "both"))
        for name in ("probability", "beta_max"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} of the damage is out of range: it lies in 0 to 1.")
        if not self.scales or not all(0 <= a <= 8 for a in self.scales):
            raise UserError(f"scales={self.scales} of the Perlin noise: give whole numbers from 0 to 8.")

    @torch.no_grad()
    def __call__(self, images, seed, step, foreground=None):
        """Damage a batch.

        Args:
            images: (B,3,H,W) in [0,1], of any size, on any device; not changed.
            seed, step: whole numbers; the same two give the same damage, any other step gives other damage.
            foreground: (B,1,H,W) bool for the modes `local` and `both`, from `foreground_mask`, which depends on
                the image only and can be kept; computed here if None.

        Returns:
            dict of `image (B,3,H,W)`, `mask (B,1,H,W) bool`, exactly the pixels that differ from the given ones, and
            `label (B,)`, 1 where there is any.
        """
        B, _, H, W = images.shape
        device = images.device
        rng = np.random.default_rng([seed, step])
        kind = rng.integers(len(self.kinds), size=B)
        kind[rng.random(B) >= self.probability] = -1
        local = rng.random(B) < {"global": 0, "local": 1, "both": 0.5}[self.mode]
        if local.any() and foreground is None:
            foreground = foreground_mask(images)

        damaged = images.clone(memory_format=torch.contiguous_format)
        mask = torch.zeros(B, 1, H, W, dtype=torch.bool, device=device)
        label = torch.zeros(B, dtype=torch.long, device=device)
        with torch.autocast(device.type, enabled=False):  # half precision would make steps in the noise
            for k in np.unique(kind[kind >= 0]):
                rows = _tensor(np.flatnonzero(kind == k), device, int)
                within = None
                if local.any():
                    within = foreground[rows, 0] | ~_tensor(local, device, bool)[rows, None, None]
                (s, y, x), paint = KINDS[self.kinds[k]](self, rng, damaged, rows, within)
                if within is not None:
                    inside = within[s, y, x].nonzero()[:, 0]
                    s, y, x = _pick(s, inside), _pick(y, inside), _pick(x, inside)
                row = _pick(rows, s)
                place = _places(damaged, row, y, x)
                before = _look_up(damaged, place)  # (3,P): colours of the P pixels
                after = paint(s, y, x, before)
                damaged.view(-1).index_copy_(0, place.flatten(), after.flatten())
                differs = (after != before).any(0)
                mask.view(-1).index_copy_(0, _places(mask, row, y, x)[0], differs)
                label.scatter_reduce_(0, row, differs.long(), "amax")
        return {"image": damaged, "mask": mask, "label": label}


# --- DRAEM's recipe ---------------------------------------------------------------------------------------


def perlin(settings, rng, images, rows, within):
    """Blobs of thresholded Perlin noise, filled with a texture."""
    K, size, device = len(rows), images.shape[-2:], images.device
    noise = perlin_noise(rng, rng.choice(settings.scales, (K, 2)), size, device)
    pixels = turned(pixels_above(noise, settings.threshold), rng.uniform(-math.pi / 2, math.pi / 2, K), size)
    beta = _tensor(rng.uniform(0, settings.beta_max, K), device)
    bank = texture_bank(settings.textures, size, device)
    which = rng.integers(len(bank.images), size=K)
    recolouring = Recolouring(rng, bank.coarse[which])
    which = _tensor(which, device, int)

    def paint(s, y, x, before):
        texture = recolouring(bank, which, s, y, x)
        if settings.keep_grey:
            coarse = images[:, :, ::8, ::8]
            grey = (coarse == coarse[:, :1]).flatten(1).all(1)
            texture = torch.where(grey[rows][s], texture.mean(0), texture)
        return torch.lerp(texture, before, _pick(beta, s))

    return pixels, paint


def perlin_noise(rng, exponents, size, device):
    """Perlin noise: exponents (n,2) of the lattices (2^a, 2^b) -> (n,H,W), about -1 to 1.

    It is a sum over lattice points with random gradients g. With the weights w = 1 - fade(t) of the point below a
    pixel and fade(t) of the one above, n(y,x) = sum_ij w_i(y) w_j(x) (g_ij . (y - i, x - j)). Both terms of the
    scalar product are matrix products: (w (y - i)) g^y w' + w g^x (w (x - j))'.
    """
    most = int(np.max(exponents))
    angle = rng.random((len(exponents), 2**most + 1, 2**most + 1), np.float32) * np.float32(2 * math.pi)
    gy, gx = (_tensor(math.sqrt(2) * f(angle), device) for f in (np.sin, np.cos))
    (wy, dy), (wx, dx) = (
        [table[_tensor(exponents[:, axis], device, int)] for table in _lattice_weights(length, most, device)]
        for axis, length in enumerate(size)
    )
    return torch.cat([dy, wy], 2) @ torch.cat([gy @ wx.mT, gx @ dx.mT], 1)


@lru_cache(maxsize=16)
def _lattice_weights(length, most, device):
    """(2, most + 1, length, 2^most + 1): for each exponent, w and w times the distance, at each pixel and point."""
    weights = torch.zeros(2, most + 1, length, 2**most + 1, dtype=torch.float64)
    pixel = torch.arange(length)
    for a in range(most + 1):
        position = pixel.double() * 2**a / length
        below = position.floor().long()
        t = position - below
        fade = 6 * t**5 - 15 * t**4 + 10 * t**3
        weights[0, a, pixel, below], weights[0, a, pixel, below + 1] = 1 - fade, fade
        weights[1, a, pixel, below], weights[1, a, pixel, below + 1] = (1 - fade) * t, fade * (t - 1)
    return weights.float().to(device)


def turned(pixels, angles, size):
    """Turn pixels (s,y,x) about the centre by `angles[s]` in (-pi/2, pi/2); those that leave the image are dropped.

    Three shears by whole pixels (Paeth 1986, Graphics Interface), so that no two land on the same place.
    """
    s, y, x = pixels
    slope, sine = _pick(_tensor(np.stack([np.tan(angles / 2), np.sin(angles)]), s.device), s)
    down, right = y - (size[0] - 1) / 2, x - (size[1] - 1) / 2
    right = right + (slope * down).round_()
    down = down - (sine * right).round_()
    right = right + (slope * down).round_()
    y, x = (down + (size[0] - 1) / 2).long(), (right + (size[1] - 1) / 2).long()
    inside = ((y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])).nonzero()[:, 0]
    return tuple(_pick(v, inside) for v in (s, y, x))


class Recolouring:
    """Three different ones of DRAEM's ten texture operations for each of K textures, drawn when it is made.

    Rotation and sharpness, which move or mix pixels, come first. The others are functions of a pixel's colour and
    follow in the order drawn: each but the shift of hue is a table of 256 levels, and tables compose. Histograms
    are taken from a coarse copy of the texture.
    """

    def __init__(self, rng, coarse):
        """`coarse` (K,3,Q): some pixels of each texture, levels in 0..255."""
        K = len(coarse)
        drawn = rng.permuted(np.tile(np.arange(10), (K, 1)), axis=1)[:, :3]
        self.applies = [torch.from_numpy((drawn == k).any(1)) for k in (9, 8, 7)]  # rotation, sharpness, shift of hue
        angle = rng.uniform(-math.pi / 4, math.pi / 4, K)
        self.rotation = _tensor(np.stack([np.sin(angle), np.cos(angle)]), "cpu")
        self.sharpness = _tensor(rng.uniform(0, 2, K), "cpu")
        self.shift = _tensor(rng.uniform(-50, 50, (2, K)), "cpu")  # of hue and saturation
        identity = np.tile(np.arange(256.0), (K, 3, 1))
        coarse, before_shift, table = coarse.astype(int), identity.copy(), identity.copy()
        for turn in drawn.T:
            for number, operation in enumerate(OPERATIONS):
                rows = np.flatnonzero(turn == number)
                if rows.size:
                    table[rows] = operation(rng, table[rows], coarse[rows]).round().clip(0, 255)
            rows = np.flatnonzero(turn == 7)
            if rows.size:
                before_shift[rows], table[rows] = table[rows], identity[rows]
                levels = _tensor(_through(before_shift[rows], coarse[rows]).swapaxes(0, 1), "cpu")
                coarse[rows] = shift_hue(levels, *self.shift[:, rows, None]).round().transpose(0, 1)
        self.before_shift, self.table = _tensor(before_shift, "cpu"), _tensor(table / 255, "cpu")

    def __call__(self, bank, which, s, y, x):
        """Colours (3,P) in [0,1] at the pixels (y,x) of the textures `which[s]` of the bank."""
        device, (H, W) = s.device, bank.images.shape[-2:]
        rotated, sharpened, shifted = (_pick(a.to(device), s).nonzero()[:, 0] for a in self.applies)

        sin, cos = _pick(self.rotation.to(device), _pick(s, rotated))
        down, right = _pick(y, rotated) - (H - 1) / 2, _pick(x, rotated) - (W - 1) / 2
        row = (cos * down + sin * right + (H - 1) / 2).round_().long()
        column = (cos * right - sin * down + (W - 1) / 2).round_().long()
        beyond = rotated[(row < 0) | (row >= H) | (column < 0) | (column >= W)]
        y = y.index_copy(0, rotated, row.clamp_(0, H - 1))
        x = x.index_copy(0, rotated, column.clamp_(0, W - 1))
        places = _places(bank.images, _pick(which, s), y, x)
        level = _look_up(bank.images, places).int()

        smooth = _look_up(bank.smooth, _pick(places, sharpened)).float()
        sharpness = _pick(self.sharpness.to(device), _pick(s, sharpened))
        sharp = torch.lerp(smooth, _pick(level, sharpened).float(), sharpness).round_().clamp_(0, 255)
        level.index_copy_(1, sharpened, sharp.int()).index_fill_(1, beyond, 0)  # black beyond the border

        entry = 3 * 256 * s.int() + 256 * torch.arange(3, dtype=torch.int32, device=device)[:, None]
        colour = _look_up(self.before_shift.to(device), _pick(entry, shifted) + _pick(level, shifted))
        shift = _pick(self.shift.to(device), _pick(s, shifted))
        level.index_copy_(1, shifted, shift_hue(colour, *shift).round_().int())
        return _look_up(self.table.to(device), entry + level)


# Tables (K,3,256) of levels in 0..255, one for each channel of K textures; rounded and clipped by the caller.


def _gamma(rng, table, coarse):
    return 255 * (table / 255) ** rng.uniform(0.5, 2, (len(table), 3, 1))


def _brightness(rng, table, coarse):
    return table * rng.uniform(0.8, 1.2, (len(table), 1, 1)) + rng.uniform(-30, 30, (len(table), 1, 1))


def _solarise(rng, table, coarse):
    chosen = rng.random((len(table), 1, 1)) < 0.5
    return np.where(chosen & (table >= rng.uniform(32, 128, chosen.shape)), 255 - table, table)


def _posterise(rng, table, coarse):
    return table.astype(int) & -(1 << rng.integers(0, 8, (len(table), 1, 1)))  # 8 to 1 bits are kept


def _invert(rng, table, coarse):
    return 255 - table


def _autocontrast(rng, table, coarse):
    """Up to 20 % of the pixels at either end become black and white."""
    cutoff = rng.uniform(0, 0.2, (len(table), 1, 1))
    share = _histogram(table, coarse) / coarse.shape[-1]
    low = (share.cumsum(2) <= cutoff).sum(2, keepdims=True)
    high = 255 - (share[..., ::-1].cumsum(2) <= cutoff).sum(2, keepdims=True)
    return np.where(high > low, (table - low) * 255 / np.maximum(high - low, 1), table)


def _equalise(rng, table, coarse):
    """PIL's formula: as many pixels as the highest level has are left out, so that it becomes 255."""
    counts = _histogram(table, coarse)
    highest = 255 - (counts[..., ::-1] > 0).argmax(2)[..., None]
    step = (coarse.shape[-1] - np.take_along_axis(counts, highest, 2)) / 255
    level = (counts.cumsum(2) - counts + step // 2) // np.maximum(step, 1e-9)
    return np.where(step > 0, _through(level, table.astype(int)), table)


OPERATIONS = (_gamma, _brightness, _solarise, _posterise, _invert, _autocontrast, _equalise)


def _through(table, levels):
    """The levels (K,3,Q) looked up in the table."""
    return np.take_along_axis(table, levels, 2)


def _histogram(table, coarse):
    """(K,3,256) counts of the levels that the table gives to the coarse pixels (K,3,Q)."""
    levels = _through(table, coarse).astype(int).reshape(-1, coarse.shape[-1])
    channel = np.arange(len(levels))[:, None]
    return np.bincount((256 * channel + levels).ravel(), minlength=256 * len(levels)).reshape(table.shape)


def shift_hue(levels, hue, saturation):
    """Colours (3,...) in 0..255 with hue and saturation (...) moved by so many levels of 255, by way of HSV."""
    r, g, b = levels
    value = levels.amax(0)
    chroma = value - levels.amin(0)
    sixth = torch.where(value == r, g - b, torch.where(value == g, b - r, r - g)) / chroma.clamp(1e-6)
    sixth = sixth + torch.where(value == r, 0, torch.where(value == g, 2, 4)) + 6 * hue / 255
    amount = (chroma / value.clamp(1e-6) + saturation / 255).clamp_(0, 1)
    turn = torch.stack([sixth + 3, sixth + 1, sixth - 1]) / 6  # how far from the complement of red, green and blue
    return value * (1 - amount * (2 - 6 * (turn - turn.round()).abs()).clamp_(0, 1))


# --- textures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextureBank:
    images: torch.Tensor  # (N,3,H,W) uint8
    smooth: torch.Tensor  # the same after PIL's filter SMOOTH, to which sharpness compares
    coarse: np.ndarray  # (N,3,Q) uint8: a coarse grid of each one's pixels, on the host


@lru_cache(maxsize=2)
def texture_bank(source, size, device):
    """Textures of `size` on the device: `procedural`, or every image below the folder `source`, decoded once.

    Raises `UserError` if the folder is missing or holds no image, or if an image is broken.
    """
    images = procedural_textures(PROCEDURAL, size, device) if source == "procedural" else _decode(source, size)
    images = images.to(device)
    rows, columns = (torch.linspace(0, length - 1, COARSE, device=device).round().long() for length in size)
    coarse = images[:, :, rows[:, None], columns].flatten(2).cpu().numpy()
    smooth = torch.empty_like(images)
    for part, out in zip(images.split(16), smooth.split(16), strict=True):
        part = part.float()
        around = F.avg_pool2d(F.pad(part, (1, 1, 1, 1), mode="replicate"), 3, 1)
        out.copy_(((9 * around + 4 * part) / 13).round_())
    return TextureBank(images, smooth, coarse)


def _decode(source, size):
    root = Path(source).expanduser()
    if not root.is_dir():
        raise UserError(f"texture folder {root} does not exist. Name a folder of images, or use textures=procedural.")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
    if not files:
        raise UserError(f"texture folder {root} holds no images. Put some there, or use textures=procedural.")
    H, W = size
    most = min(len(files), max(1, TEXTURE_BYTES // (6 * H * W)))
    files = [files[k * len(files) // most] for k in range(most)]

    def one(path):
        try:
            with Image.open(path) as image:
                image.draft("RGB", (W, H))  # a JPEG is decoded at a size near the one wanted
                return np.asarray(image.convert("RGB").resize((W, H), Image.Resampling.BILINEAR))
        except UNREADABLE as e:
            raise UserError(f"cannot read texture {path}: {e}. Replace or remove it.") from e

    images = np.empty((most, 3, H, W), np.uint8)
    with ThreadPoolExecutor() as pool:
        for k, image in enumerate(pool.map(one, files)):
            images[k] = image.transpose(2, 0, 1)
    return torch.from_numpy(images)


def procedural_textures(n, size, device):
    """(n,3,H,W) uint8, always the same: coloured noise, stripes, checkers and Voronoi cells, a quarter of each."""
    rng = np.random.default_rng(0)
    H, W = size
    makers = (_noise_texture, _stripes, _checkers, _cells)
    textures = []
    for k, maker in enumerate(makers):
        count = len(range(k, n, len(makers)))
        y, x = (torch.arange(length, device=device) / min(size) for length in size)
        textures.append((255 * maker(rng, count, y[:, None].expand(H, W), x.expand(H, W))).clamp(0, 255).byte())
    return torch.cat(textures)


def _noise_texture(rng, n, y, x):
    """Smooth noise at five scales, weighted at random; its channels have more or less of it in common."""
    total = 0
    for side in (4, 8, 16, 32, 64):
        weight, common = rng.random((2, n, 1, 1, 1))
        knots = rng.normal(size=(n, 3, side, side)) + 2 * common * rng.normal(size=(n, 1, side, side))
        knots = _tensor(weight**2 * knots, y.device)
        total = total + F.interpolate(knots, y.shape, mode="bicubic", align_corners=False)
    total = total / total.std((2, 3), keepdim=True)
    return _tensor(rng.uniform(0.3, 0.7, (n, 3, 1, 1)), y.device) + 0.22 * total


def _stripes(rng, n, y, x):
    return _between(rng, _wave(y, x, *_wave_draws(rng, n, y.device)))


def _checkers(rng, n, y, x):
    angle, *rest = _wave_draws(rng, n, y.device)
    a, b = _wave(y, x, angle, *rest), _wave(y, x, angle + math.pi / 2, *rest)
    return _between(rng, a * b + (1 - a) * (1 - b))


def _wave_draws(rng, n, device):
    """Angle, period in shares of the shorter side, phase and sharpness of n patterns."""
    draws = (
        rng.uniform(0, math.pi, n),
        0.02 * 15 ** rng.random(n),
        rng.uniform(0, 2 * math.pi, n),
        0.5 * 20 ** rng.random(n),
    )
    return (_tensor(d, device)[:, None, None, None] for d in draws)


def _wave(y, x, angle, period, phase, sharp):
    """Stripes (n,1,H,W) in [0,1]."""
    wave = ((angle.cos() * x + angle.sin() * y) * 2 * math.pi / period + phase).sin()
    return (0.5 + sharp * wave).clamp(0, 1)


def _between(rng, share):
    """Two random colours mixed by `share` (n,1,H,W)."""
    a, b = _tensor(rng.random((2, len(share), 3, 1, 1)), share.device)
    return torch.lerp(a.expand(-1, -1, *share.shape[2:]), b, share)


def _cells(rng, n, y, x):
    """Voronoi cells of 8 to 64 random sites, each in a colour of its own."""
    pixels = torch.stack([y.flatten(), x.flatten()], 1)
    textures = []
    for sites in rng.integers(8, 65, n):
        at = _tensor(rng.random((sites, 2)), y.device) * pixels.amax(0)
        nearest = ((at**2).sum(1) - 2 * pixels @ at.T).argmin(1)  # |p|^2 is the same for all sites
        textures.append(_tensor(rng.random((3, sites)), y.device)[:, nearest].view(3, *y.shape))
    return torch.stack(textures)


# --- damage as real surfaces have it (ours); lengths are for a shorter side of 224 px -----------------------


def crack(settings, rng, images, rows, within):
    """A thin line that wanders, 1 to 3 px wide and 30 to 200 px long, darker or lighter than what is around it."""
    K, points, px = len(rows), 256, min(images.shape[-2:]) / 224
    step = rng.uniform(30, 200, (K, 1)) / points * px
    wander = rng.normal(size=(K, points)) * rng.uniform(0.01, 0.12, (K, 1))
    kinks = rng.normal(0, 0.7, (K, points)) * (rng.random((K, points)) < 0.02)
    heading = rng.uniform(0, 2 * math.pi, (K, 1)) + np.cumsum(wander + kinks, 1)
    path = np.cumsum(np.stack([np.sin(heading), np.cos(heading)]) * step, 2)
    path -= path[..., points // 2, None]
    width = rng.uniform(1, 3, (K, 1)) * px * np.sin(np.linspace(0.1, math.pi - 0.1, points)) ** 0.5
    start = _somewhere(rng, images, rows, within)
    y, x = (s[:, None] + _tensor(p, images.device) for s, p in zip(start, path, strict=True))
    half = _tensor(width, images.device)[..., None] / 2

    def line(dy, dx):
        return (half + 0.5 - torch.hypot(dy, dx)).clamp(0, 1)

    return _shaded(rng, _stamp(images, y, x, 1.5 * px + 0.5, line), (0.4, 0.9))


def pit(settings, rng, images, rows, within):
    """One to four small holes: discs and ellipses of 1.5 to 8 px radius with a soft rim."""
    K, most, px = len(rows), 4, min(images.shape[-2:]) / 224
    centres = [_somewhere(rng, images, rows, within) for _ in range(most)]
    y, x = (torch.stack(c, 1) for c in zip(*centres, strict=True))
    long = rng.uniform(1.5, 8, (K, most, 1)) * px
    short = long * rng.uniform(0.4, 1, (K, most, 1))
    angle = rng.uniform(0, math.pi, (K, most, 1))
    exists = np.arange(most)[None, :, None] < rng.integers(1, most + 1, (K, 1, 1))
    long, short, sin, cos, exists = (
        _tensor(v, images.device) for v in (long, short, np.sin(angle), np.cos(angle), exists)
    )

    def ellipse(dy, dx):
        radius = torch.hypot((cos * dx + sin * dy) / long, (cos * dy - sin * dx) / short)
        return ((1 - radius) * short / 1.5 + 0.5).clamp(0, 1) * exists

    return _shaded(rng, _stamp(images, y, x, 8 * px + 1, ellipse), (0.4, 0.95))


def patch(settings, rng, images, rows, within):
    """A spot of 12 to 60 px radius with soft edges, a little darker or lighter: wear, uneven coating, a stain."""
    shape = _blob(rng, images, _somewhere(rng, images, rows, within), (12, 60), wobble=0.5, soft=(0.2, 0.6))
    return _shaded(rng, shape, (0.08, 0.35))


def fray(settings, rng, images, rows, within):
    """A ragged bite of 6 to 40 px radius out of the border of the foreground, or of the image."""
    inside = torch.ones_like(images[rows, 0]).bool() if within is None else within
    within_too = F.pad(inside, (1, 1, 1, 1))
    above, below = within_too[:, :-2, 1:-1], within_too[:, 2:, 1:-1]
    left, right = within_too[:, 1:-1, :-2], within_too[:, 1:-1, 2:]
    border = inside & ~(above & below & left & right)
    shape = _blob(rng, images, _somewhere(rng, images, rows, border), (6, 40), wobble=1.0, soft=(0.05, 0.15))
    return _shaded(rng, shape, (0.3, 0.9))


def paste(settings, rng, images, rows, within):
    """A rectangle from elsewhere in the image, a little brighter or darker (after CutPaste, Li et al. 2021, CVPR)."""
    K, (H, W), device = len(rows), images.shape[-2:], images.device
    side = rng.uniform(10, 70, (2, K, 1, 1)) * min(H, W) / 224
    angle = rng.uniform(0, math.pi, (K, 1, 1))
    y, x = _frame(images, _somewhere(rng, images, rows, within))
    sin, cos, high, wide = (_tensor(v, device) for v in (np.sin(angle), np.cos(angle), *side))
    inside = torch.minimum(wide / 2 - (cos * x + sin * y).abs(), high / 2 - (cos * y - sin * x).abs())
    shift = _tensor(rng.uniform(0.15, 0.85, (2, K)) * [[H], [W]], device, int)
    gain = _uniform(rng, 0.75, 1.25, K, device)

    def paint(s, y, x, before):
        down, right = _pick(shift, s)
        other = _look_up(images, _places(images, _pick(rows, s), (y + down) % H, (x + right) % W))
        return (other * _pick(gain, s)).clamp_(0, 1)

    return pixels_above(inside, 0), paint


KINDS = {"perlin": perlin, "crack": crack, "pit": pit, "patch": patch, "fray": fray, "paste": paste}


def _shaded(rng, shape, strength):
    """A shape (K,H,W) in [0,1] is made darker or lighter than it was, whichever shows where it lies."""
    K, device = len(shape), shape.device
    darken = _tensor(rng.random(K) < 0.65, device, bool)
    strength = _uniform(rng, *strength, K, device)

    def paint(s, y, x, before):
        level = (255 * before.mean(0)).round_().long()  # whole numbers: their sum does not depend on the order
        count, total = torch.zeros(2, K, dtype=torch.long, device=device)
        around = total.index_add_(0, s, level) / count.index_add_(0, s, torch.ones_like(level)).clamp(1) / 255
        dark = (darken & (around > 0.1)) | (around > 0.9)
        tone = torch.where(dark, 0, (2 * around).clamp(0.5, 1))  # as far away to either side
        return torch.lerp(before, _pick(tone, s).expand(3, -1), _pick(strength, s) * shape[s, y, x])

    return pixels_above(shape, 0.1), paint  # the outermost part of a soft rim cannot be seen and is no damage


def _somewhere(rng, images, rows, within):
    """A random pixel (y, x), each (K,) float, of the whole image or of `within` (K,H,W)."""
    H, W = images.shape[-2:]
    share = _uniform(rng, 0, 1, (len(rows), 1), images.device)
    if within is None:
        pixel = (share * (H * W)).long()
    else:
        count = within.flatten(1).cumsum(1)
        pixel = torch.searchsorted(count, (share * count[:, -1:]).long(), right=True)
    pixel = pixel[:, 0].clamp(max=H * W - 1)
    return (pixel // W).float(), (pixel % W).float()


def _frame(images, centre):
    """Coordinates (K,H,1) and (K,1,W) of the pixels relative to `centre`."""
    y, x = (torch.arange(length, device=images.device) for length in images.shape[-2:])
    return y[:, None] - centre[0][:, None, None], x - centre[1][:, None, None]


def _stamp(images, y, x, radius, profile):
    """(K,H,W): the greatest of the values that `profile(dy, dx)` gives around the centres y, x (K,P)."""
    K, (H, W) = len(y), images.shape[-2:]
    reach = torch.arange(-math.ceil(radius), math.ceil(radius) + 1, device=images.device)
    row = y.round().long()[..., None] + reach.repeat_interleave(len(reach))
    column = x.round().long()[..., None] + reach.repeat(len(reach))
    value = profile(row - y[..., None], column - x[..., None])
    value = value * ((row >= 0) & (row < H) & (column >= 0) & (column < W))
    place = row.clamp(0, H - 1) * W + column.clamp(0, W - 1)
    canvas = torch.zeros(K, H * W, device=images.device)
    return canvas.scatter_reduce_(1, place.flatten(1), value.flatten(1), "amax").view(K, H, W)


def _blob(rng, images, centre, radius, wobble, soft):
    """(K,H,W) in [0,1]: an ellipse whose outline is bent by Perlin noise; `soft` is the range of its edge's width."""
    K, device, size = len(centre[0]), images.device, images.shape[-2:]
    a, b = rng.uniform(*radius, (2, K, 1, 1)) * min(size) / 224
    angle = rng.uniform(0, math.pi, (K, 1, 1))
    a, b, sin, cos = (_tensor(v, device) for v in (a, b, np.sin(angle), np.cos(angle)))
    y, x = _frame(images, centre)
    noise = perlin_noise(rng, rng.integers(2, 5, (K, 2)), size, device)
    distance = torch.hypot((cos * x + sin * y) / a, (cos * y - sin * x) / b) + wobble * noise
    return ((1 - distance) / _uniform(rng, *soft, (K, 1, 1), device)).clamp_(0, 1)


# --- foreground -------------------------------------------------------------------------------------------


def foreground_mask(images):
    """Where the object is: (B,3,H,W) in [0,1] -> (B,1,H,W) bool. It depends on each image only: compute it once.

    No paper says how (ours): Otsu's threshold on the blurred grey image; foreground is the side that covers less of
    the border; closed, opened, without parts below 1 % of the image. All of the image where that leaves less than
    5 % or more than 95 %.
    """
    levels = (255 * images.float().mean(1)).round().byte().cpu().numpy()
    return torch.from_numpy(np.stack([_foreground(level) for level in levels])).to(images.device)[:, None]


def _foreground(level):
    """(H,W) uint8 -> (H,W) bool."""
    level = gaussian_filter(level, 1.1, truncate=2)  # 5 x 5
    mask = level > _otsu(level)
    border = np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]])
    mask ^= border.mean() > 0.5
    mask = minimum_filter(maximum_filter(mask, 5), 5)  # closed
    mask = maximum_filter(minimum_filter(mask, 5), 5)  # opened
    parts, _ = components(mask, np.ones((3, 3)))
    large = np.bincount(parts.ravel()) >= 0.01 * mask.size
    large[0] = False
    mask = large[parts]
    return mask if 0.05 <= mask.mean() <= 0.95 else np.ones_like(mask)


def _otsu(level):
    """The level (uint8) that splits an image into two classes whose means differ most, weighted by their sizes."""
    share = np.bincount(level.ravel(), minlength=256) / level.size
    below, moment = share.cumsum(), (share * np.arange(256)).cumsum()
    between = (moment[-1] * below - moment) ** 2 / (below * (1 - below)).clip(1e-9)
    return between.argmax()


# --- host and device --------------------------------------------------------------------------------------


def pixels_above(values, threshold):
    """Pixels (s,y,x) of (K,H,W) whose value exceeds the threshold."""
    _, H, W = values.shape
    if values.device.type == "cpu":  # NumPy is four times as fast as torch at this
        flat = np.flatnonzero(values.numpy() > threshold)
    else:
        flat = (values > threshold).flatten().nonzero()[:, 0]
    row = flat // W
    s = row // H
    return tuple(torch.as_tensor(v) for v in (s, row - s * H, flat - row * W))


def _places(images, s, y, x):
    """Where the channels of the pixels (s,y,x), each (P,), lie in the flattened (N,C,H,W): (C,P)."""
    _, C, H, W = images.shape
    return (s * C * H + y) * W + x + H * W * torch.arange(C, device=s.device)[:, None]


def _look_up(values, places):
    """`values.flatten()[places]`."""
    return values.view(-1).index_select(0, places.flatten()).view(places.shape)


def _pick(values, p):
    """`values[..., p]`, three times as fast on the host."""
    return values.index_select(-1, p)


def _tensor(array, device, dtype=float):
    """A host array as float32, int64 or bool tensor on `device`."""
    kind = {float: np.float32, int: np.int64, bool: np.bool_}[dtype]
    return torch.from_numpy(np.ascontiguousarray(array, kind)).to(device, non_blocking=True)


def _uniform(rng, low, high, shape, device="cpu"):
    return _tensor(rng.uniform(low, high, shape), device)
