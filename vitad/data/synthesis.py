"""Synthetic damage for methods that learn from normal images only.

The kind `perlin` is the recipe of DRAEM (Zavrtanik et al. 2021, ICCV, arXiv 2108.07610; what its paper leaves open,
from its code): thresholded Perlin noise M, a recoloured texture T, an opacity, I_a = (1 - M) I + M ((1 - b) T + b I).
The others are ours, shaped after what real surfaces have: `crack`, `pit`, `patch`, `fray`, `paste`.

A kind of damage is a function that returns an opacity (K,H,W), zero outside the damage, and the colours with which
to paint. Shapes are computed for the whole batch at once, colours only where the opacity is not zero. No file is
read after the first call. Random numbers are drawn on the host from (seed, step), so damage neither depends on earlier
calls nor on the device, and a resumed run sees what the unbroken one would have seen.
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
from scipy.ndimage import label as components
from torch.nn import functional as F

from vitad.data.samples import IMAGE_SUFFIXES, UNREADABLE
from vitad.errors import UserError, unknown

PROCEDURAL = 128  # textures made where none are given
TEXTURE_BYTES = 2**29  # decoded textures kept on the device; of more files, an evenly spread part
COARSE = 32  # side in px of the copy of a texture from which its histogram is taken


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
        rng = np.random.default_rng([seed, step])
        kind = rng.integers(len(self.kinds), size=B)
        kind[rng.random(B) >= self.probability] = -1
        local = rng.random(B) < {"global": 0, "local": 1, "both": 0.5}[self.mode]
        if local.any():
            foreground = foreground_mask(images) if foreground is None else foreground
            within_all = foreground[:, 0] | ~_tensor(local, images.device, bool)[:, None, None]

        damaged = images.clone(memory_format=torch.contiguous_format)
        mask = torch.zeros(B, H, W, dtype=torch.bool, device=images.device)
        with torch.autocast(images.device.type, enabled=False):  # half precision would make steps in the noise
            for k, name in enumerate(self.kinds):
                rows = np.flatnonzero(kind == k)
                if not rows.size:
                    continue
                rows_ = _tensor(rows, images.device, int)
                within = within_all[rows_] if local.any() else None
                opacity, colour = KINDS[name](self, rng, images[rows_], within)
                if within is not None:
                    opacity = opacity * within
                s, y, x = opacity.nonzero(as_tuple=True)
                at = rows_[s], slice(None), y, x
                before = damaged[at]  # (P,3)
                after = torch.lerp(before, colour(s, y, x, before), opacity[s, y, x, None])
                damaged[at] = after
                mask[rows_[s], y, x] = (after != before).any(1)
        return {"image": damaged, "mask": mask[:, None], "label": mask.flatten(1).any(1).long()}


# --- DRAEM's recipe ---------------------------------------------------------------------------------------


def perlin(settings, rng, images, within):
    """Blobs of thresholded Perlin noise, filled with a texture."""
    K, _, H, W = images.shape
    noise = perlin_noise(
        rng, rng.choice(settings.scales, (K, 2)), rng.uniform(-math.pi / 2, math.pi / 2, K), (H, W), images.device
    )
    opacity = 1 - settings.beta_max * _tensor(rng.random(K), images.device)
    bank = texture_bank(settings.textures, (H, W), images.device)
    which = rng.integers(len(bank.images), size=K)
    recolouring = Recolouring(rng, bank.coarse[which], images.device)
    which = _tensor(which, images.device, int)
    coarse = images[:, :, ::8, ::8]
    grey = (coarse == coarse[:, :1]).flatten(1).all(1) & settings.keep_grey

    def colour(s, y, x, before):
        texture = recolouring(bank.images, which, s, y, x)
        return torch.where(grey[s, None], texture.mean(1, keepdim=True), texture)

    return (noise > settings.threshold) * opacity[:, None, None], colour


def perlin_noise(rng, exponents, angles, size, device):
    """Perlin noise, turned about the image's centre; zero where the turned frame does not reach, as in DRAEM.

    exponents (n,2) of the lattices (2^a, 2^b), angles (n,) in radians -> (n,H,W), about -1 to 1.

    Unturned noise is a sum over lattice points, whose gradients are g: with the weights w = 1 - fade(t) of the
    point below and fade(t) of the one above, n(y,x) = sum_ij w_i(y) w_j(x) (g_ij . (y - i, x - j)). Both terms of
    the scalar product are matrix products: (w (y - i)) g^y w' + w g^x (w (x - j))'.
    """
    n, most = len(exponents), int(np.max(exponents))
    direction = _tensor(rng.uniform(0, 2 * math.pi, (n, 2**most + 1, 2**most + 1)), device)
    (wy, dy), (wx, dx) = (
        _lattice_weights(length, most, device)[:, _tensor(exponents[:, axis], device, int)]
        for axis, length in enumerate(size)
    )
    right = torch.cat([direction.sin() @ wx.mT, direction.cos() @ dx.mT], 1)
    noise = math.sqrt(2) * torch.cat([dy, wy], 2) @ right
    return F.grid_sample(noise[:, None], turned_grid(angles, size, device), align_corners=False)[:, 0]


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


def turned_grid(angles, size, device):
    """Sampling positions (n,H,W,2), as `grid_sample` takes them, of images turned by `angles` (n,) in radians."""
    H, W = size
    sin, cos = (_tensor(f(angles), device)[:, None, None] for f in (np.sin, np.cos))
    y = ((2 * torch.arange(H, device=device) + 1) / H - 1)[:, None]
    x = ((2 * torch.arange(W, device=device) + 1) / W - 1)[:, None]
    along_y = torch.cat([-sin * H / W * y, cos * y], -1)
    along_x = torch.cat([cos * x, sin * W / H * x], -1)
    return along_y[:, :, None] + along_x[:, None]


class Recolouring:
    """Three different ones of DRAEM's ten texture operations for each of K textures, drawn when it is made.

    Rotation and sharpness, which move or mix pixels, come first. The others are functions of a pixel's colour and
    follow in the order drawn: each but the shift of hue is a table of 256 levels, and tables compose. Histograms
    are taken from a coarse copy of the texture.
    """

    def __init__(self, rng, coarse, device):
        """`coarse` (K,3,h,w) uint8, on the host."""
        K = len(coarse)
        drawn = rng.permuted(np.tile(np.arange(10), (K, 1)), axis=1)[:, :3]
        self.angle = np.where((drawn == 9).any(1), rng.uniform(-math.pi / 4, math.pi / 4, K), 0)
        self.sharpness = np.where((drawn == 8).any(1), rng.uniform(0, 2, K), 1)
        self.shift = np.where((drawn == 7).any(1, keepdims=True), rng.uniform(-50, 50, (K, 2)), 0)  # hue, saturation
        identity = torch.arange(256.0).expand(K, 3, 256)
        coarse, self.first, table = coarse.flatten(2).long(), identity.clone(), identity.clone()
        for place in range(3):
            for number, operation in enumerate(OPERATIONS):
                rows = np.flatnonzero(drawn[:, place] == number)
                if rows.size:
                    table[rows] = operation(rng, table[rows], coarse[rows]).round_().clamp_(0, 255)
            rows = np.flatnonzero(drawn[:, place] == 7)
            if rows.size:  # what came before the shift goes to the first table
                self.first[rows], table[rows] = table[rows], identity[rows]
                levels = self.first[rows].gather(2, coarse[rows])
                hue, saturation = _tensor(self.shift[rows], "cpu").unsqueeze(-1).unbind(1)
                coarse[rows] = shift_hue(levels.mT, hue, saturation).mT.round().long()
        self.second = table
        self.device = device

    def __call__(self, bank, which, s, y, x):
        """Colours (P,3) in [0,1] at the pixels (y,x) of texture `which[s]` of `bank` (N,3,H,W) uint8."""
        device, (H, W) = self.device, bank.shape[-2:]
        sin, cos = (_tensor(f(self.angle), device)[s] for f in (np.sin, np.cos))
        down, right = y - (H - 1) / 2, x - (W - 1) / 2
        y = (cos * down + sin * right + (H - 1) / 2).round_().long()
        x = (cos * right - sin * down + (W - 1) / 2).round_().long()
        inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
        y, x = y.clamp_(0, H - 1), x.clamp_(0, W - 1)
        level = bank[which[s], :, y, x] * inside[:, None]

        sharpness = _tensor(self.sharpness, device)[s]
        p = (sharpness != 1).nonzero()[:, 0]
        around = torch.arange(-1, 2, device=device)
        ys = (y[p, None] + around.repeat_interleave(3)).clamp_(0, H - 1)
        xs = (x[p, None] + around.repeat(3)).clamp_(0, W - 1)
        block = bank[which[s[p], None], :, ys, xs].float()  # (P',9,3)
        centre = block[:, 4]
        smooth = (block.sum(1) + 4 * centre) / 13  # the kernel of PIL's SMOOTH
        sharp = torch.lerp(smooth, centre, sharpness[p, None]).round_().clamp_(0, 255)
        level[p] = (sharp * inside[p, None]).byte()

        channel = torch.arange(3, device=device)
        colour = self.first.to(device)[s[:, None], channel, level.long()]
        shift = _tensor(self.shift, device)[s]
        p = (shift != 0).any(1).nonzero()[:, 0]
        colour[p] = shift_hue(colour[p], *shift[p].unbind(1)).round_()
        return self.second.to(device)[s[:, None], channel, colour.long()] / 255


def _gamma(rng, table, _):
    return 255 * (table / 255) ** _uniform(rng, 0.5, 2, (len(table), 3, 1))


def _brightness(rng, table, _):
    K = len(table)
    return table * _uniform(rng, 0.8, 1.2, (K, 1, 1)) + _uniform(rng, -30, 30, (K, 1, 1))


def _solarise(rng, table, _):
    K = len(table)
    chosen = _tensor(rng.random((K, 1, 1)) < 0.5, "cpu", bool)
    return torch.where(chosen & (table >= _uniform(rng, 32, 128, (K, 1, 1))), 255 - table, table)


def _posterise(rng, table, _):
    return table - table % _tensor(2 ** rng.integers(0, 8, (len(table), 1, 1)), "cpu")  # 8 to 1 bits are kept


def _invert(rng, table, _):
    return 255 - table


def _autocontrast(rng, table, coarse):
    """Up to 20 % of the pixels at either end become black and white."""
    cutoff = _uniform(rng, 0, 0.2, (len(table), 1, 1))
    share = _histogram(table, coarse) / coarse.shape[-1]
    low = (share.cumsum(2) <= cutoff).sum(2, keepdim=True)
    high = 255 - (share.flip(2).cumsum(2) <= cutoff).sum(2, keepdim=True)
    return torch.where(high > low, (table - low) * 255 / (high - low).clamp(1), table)


def _equalise(rng, table, coarse):
    counts = _histogram(table, coarse)
    last = counts.gather(2, table.gather(2, coarse).amax(2, keepdim=True).long())
    step = (counts.sum(2, keepdim=True) - last) / 255
    level = (counts.cumsum(2) - counts + step / 2) / step.clamp(1e-6)
    return torch.where(step > 0, level.floor().gather(2, table.long()), table)


OPERATIONS = (_gamma, _brightness, _solarise, _posterise, _invert, _autocontrast, _equalise)


def _histogram(table, coarse):
    """(K,3,256) counts of the levels that `table` gives to the coarse pixels (K,3,Q)."""
    levels = table.gather(2, coarse).long()
    return torch.zeros_like(table).scatter_add_(2, levels, torch.ones(()).expand_as(levels))


def shift_hue(levels, hue, saturation):
    """Colours (...,3) in 0..255 with hue and saturation (...) moved by so many levels of 255, by way of HSV."""
    r, g, b = levels.unbind(-1)
    value = levels.amax(-1)
    chroma = value - levels.amin(-1)
    sixth = torch.where(value == r, g - b, torch.where(value == g, b - r, r - g)) / chroma.clamp(1e-6)
    sixth = sixth + torch.where(value == r, 0, torch.where(value == g, 2, 4)) + 6 * hue / 255
    amount = (chroma / value.clamp(1e-6) + saturation / 255).clamp_(0, 1)
    k = (sixth[..., None] + torch.tensor([5.0, 3.0, 1.0], device=levels.device)) % 6
    return value[..., None] * (1 - amount[..., None] * torch.minimum(k, 4 - k).clamp_(0, 1))


# --- textures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextureBank:
    images: torch.Tensor  # (N,3,H,W) uint8
    coarse: torch.Tensor  # (N,3,h,w) uint8 on the host


@lru_cache(maxsize=4)
def texture_bank(source, size, device):
    """Textures of `size` on the device: `procedural`, or every image below the folder `source`, decoded once.

    Raises `UserError` if the folder is missing or holds no image, or if an image is broken.
    """
    images = procedural_textures(PROCEDURAL, size, device) if source == "procedural" else _decode(source, size)
    rows, columns = (np.linspace(0, length - 1, COARSE).round() for length in size)
    coarse = images.cpu()[:, :, rows][:, :, :, columns]
    return TextureBank(images.to(device), coarse)


def _decode(source, size):
    root = Path(source).expanduser()
    if not root.is_dir():
        raise UserError(f"texture folder {root} does not exist. Name a folder of images, or use textures=procedural.")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
    if not files:
        raise UserError(f"texture folder {root} holds no images. Put some there, or use textures=procedural.")
    H, W = size
    most = min(len(files), max(1, TEXTURE_BYTES // (3 * H * W)))
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
    """Smooth noise at five scales with random weights, each channel its own or all alike in part."""
    total = 0
    for side in (4, 8, 16, 32, 64):
        knots = rng.normal(size=(n, 3, side, side)) + 2 * rng.random((n, 1, 1, 1)) * rng.normal(size=(n, 1, side, side))
        knots = _tensor(knots * rng.random((n, 1, 1, 1)) ** 2, y.device)
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


def crack(settings, rng, images, within):
    """A thin line that wanders, 1 to 3 px wide and 30 to 200 px long, darker or lighter than what is around it."""
    K, points, px = len(images), 256, min(images.shape[-2:]) / 224
    step = rng.uniform(30, 200, (K, 1)) / points * px
    wander = rng.normal(size=(K, points)) * rng.uniform(0.01, 0.12, (K, 1))
    kinks = rng.normal(0, 0.7, (K, points)) * (rng.random((K, points)) < 0.02)
    heading = rng.uniform(0, 2 * math.pi, (K, 1)) + np.cumsum(wander + kinks, 1)
    path = np.cumsum(np.stack([np.sin(heading), np.cos(heading)]) * step, 2)
    path -= path[..., points // 2, None]
    width = rng.uniform(1, 3, (K, 1)) * px * np.sin(np.linspace(0.1, math.pi - 0.1, points)) ** 0.5
    start = _somewhere(rng, images, within)
    y, x = (s[:, None] + _tensor(p, images.device) for s, p in zip(start, path, strict=True))
    half = _tensor(width, images.device)[..., None] / 2

    def line(dy, dx):
        return (half + 0.5 - torch.hypot(dy, dx)).clamp(0, 1)

    return _shaded(rng, _stamp(images, y, x, 1.5 * px + 0.5, line), (0.4, 0.9))


def pit(settings, rng, images, within):
    """One to four small holes: discs and ellipses of 1.5 to 8 px radius with a soft rim."""
    K, most, px = len(images), 4, min(images.shape[-2:]) / 224
    centres = [_somewhere(rng, images, within) for _ in range(most)]
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


def patch(settings, rng, images, within):
    """A spot of 12 to 60 px radius with soft edges, a little darker or lighter: wear, uneven coating, a stain."""
    shape = _blob(rng, images, _somewhere(rng, images, within), (12, 60), wobble=0.5, soft=(0.2, 0.6))
    return _shaded(rng, shape, (0.08, 0.35))


def fray(settings, rng, images, within):
    """A ragged bite of 6 to 40 px radius out of the border of the foreground, or of the image."""
    inside = torch.ones_like(images[:, 0], dtype=torch.bool) if within is None else within
    outside = F.pad((~inside).float(), (1, 1, 1, 1), value=1.0)
    border = inside & (F.max_pool2d(outside, 3, 1) > 0)
    shape = _blob(rng, images, _somewhere(rng, images, border), (6, 40), wobble=1.0, soft=(0.05, 0.15))
    return _shaded(rng, shape, (0.3, 0.9))


def paste(settings, rng, images, within):
    """A rectangle from elsewhere in the image, a little brighter or darker (after CutPaste, Li et al. 2021, CVPR)."""
    K, _, H, W = images.shape
    device, px = images.device, min(H, W) / 224
    side = rng.uniform(10, 70, (2, K, 1, 1)) * px
    angle = rng.uniform(0, math.pi, (K, 1, 1))
    y, x = _frame(images, _somewhere(rng, images, within))
    sin, cos, high, wide = (_tensor(v, device) for v in (np.sin(angle), np.cos(angle), *side))
    opacity = ((cos * x + sin * y).abs() < wide / 2) & ((cos * y - sin * x).abs() < high / 2)
    shift = _tensor(rng.uniform(0.15, 0.85, (2, K)) * [[H], [W]], device, int)
    gain = _uniform(rng, 0.75, 1.25, (K, 1), device)

    def colour(s, y, x, before):
        return (images[s, :, (y + shift[0, s]) % H, (x + shift[1, s]) % W] * gain[s]).clamp(0, 1)

    return opacity.float(), colour


KINDS = {"perlin": perlin, "crack": crack, "pit": pit, "patch": patch, "fray": fray, "paste": paste}


def _shaded(rng, shape, strength):
    """Opacity and colour of a shape (K,H,W) in [0,1] that darkens or lightens, so that it can be seen where it is."""
    K = len(shape)
    shape = shape * (shape > 0.1)  # the rim that nobody can see is no damage
    opacity = shape * _uniform(rng, *strength, (K, 1, 1), shape.device)
    darken = _tensor(rng.random(K) < 0.65, shape.device, bool)

    def colour(s, y, x, before):
        grey = before.mean(1)
        count = torch.zeros(K, device=grey.device).index_add_(0, s, torch.ones_like(grey)).clamp(1)
        around = torch.zeros_like(count).index_add_(0, s, grey) / count
        dark = (darken & (around > 0.1)) | (around > 0.9)
        return torch.where(dark, 0.0, 1.0)[s, None].expand(-1, 3)

    return opacity, colour


def _somewhere(rng, images, within):
    """A random pixel (y, x), each (K,) float, of the whole image or of `within` (K,H,W)."""
    K, _, H, W = images.shape
    share = _uniform(rng, 0, 1, (K, 1), images.device)
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
    K, _, H, W = images.shape
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
    K, device, size = len(images), images.device, images.shape[-2:]
    a, b = rng.uniform(*radius, (2, K, 1, 1)) * min(size) / 224
    angle = rng.uniform(0, math.pi, (K, 1, 1))
    a, b, sin, cos = (_tensor(v, device) for v in (a, b, np.sin(angle), np.cos(angle)))
    y, x = _frame(images, centre)
    noise = perlin_noise(rng, rng.integers(2, 5, (K, 2)), np.zeros(K), size, device)
    distance = torch.hypot((cos * x + sin * y) / a, (cos * y - sin * x) / b) + wobble * noise
    return ((1 - distance) / _uniform(rng, *soft, (K, 1, 1), device)).clamp_(0, 1)


# --- foreground -------------------------------------------------------------------------------------------


@torch.no_grad()
def foreground_mask(images):
    """Where the object is: (B,3,H,W) in [0,1] -> (B,1,H,W) bool. Depends on each image only, so it can be kept.

    No paper says how (ours): Otsu's threshold on the blurred grey image; foreground is the side that covers less of
    the border; closed, opened, without parts below 1 % of the image. All of the image where that leaves less than
    5 % or more than 95 %.
    """
    B, _, H, W = images.shape
    with torch.autocast(images.device.type, enabled=False):
        weight = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=images.device) / 16
        grey = F.pad(images.float().mean(1, keepdim=True), (2, 2, 2, 2), mode="reflect")
        grey = F.conv2d(F.conv2d(grey, weight.view(1, 1, 5, 1)), weight.view(1, 1, 1, 5))
    level = (grey[:, 0] * 255).round().long()
    mask = level > _otsu(level)[:, None, None]
    border = torch.cat([mask[:, 0], mask[:, -1], mask[:, 1:-1, 0], mask[:, 1:-1, -1]], 1)
    mask ^= (border.float().mean(1) > 0.5)[:, None, None]
    mask = _shrink(_grow(mask[:, None].float()))  # closed
    mask = _grow(_shrink(mask))[:, 0].bool()  # opened
    kept = np.stack([_large_parts(m) for m in mask.cpu().numpy()])
    share = kept.mean((1, 2))
    kept[(share < 0.05) | (share > 0.95)] = True
    return _tensor(kept[:, None], images.device, bool)


def _grow(mask):
    return F.max_pool2d(mask, 5, 1, 2)


def _shrink(mask):
    return -F.max_pool2d(-mask, 5, 1, 2)


def _otsu(level):
    """Threshold (B,) of levels (B,H,W) in 0..255 that separates the two classes' means best."""
    flat = level.flatten(1)
    share = torch.zeros(len(flat), 256, device=flat.device).scatter_add_(1, flat, torch.ones_like(flat).float())
    share /= flat.shape[1]
    below = share.cumsum(1)
    moment = (share * torch.arange(256, device=flat.device)).cumsum(1)
    between = (moment[:, -1:] * below - moment) ** 2 / (below * (1 - below)).clamp(1e-9)
    return between.argmax(1)


def _large_parts(mask):
    parts, _ = components(mask, np.ones((3, 3)))
    large = np.bincount(parts.ravel()) >= 0.01 * mask.size
    large[0] = False
    return large[parts]


def _tensor(array, device, dtype=float):
    """A host array as float32, int64 or bool tensor on `device`."""
    kind = {float: np.float32, int: np.int64, bool: np.bool_}[dtype]
    return torch.from_numpy(np.ascontiguousarray(array, kind)).to(device, non_blocking=True)


def _uniform(rng, low, high, shape, device="cpu"):
    return _tensor(rng.uniform(low, high, shape), device)
