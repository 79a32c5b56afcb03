"""The kind `anything`: damage for those who do not know what a defect will look like. It is not from a paper.

Each part is drawn evenly and by itself: a size, an elongation, an outline and a rim; a filling and its opacity. No
data set was looked at for it. Lengths in px are those for an image whose shorter side is 224 px.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitad.data.synthesis.noise import perlin_noise
from vitad.data.synthesis.pixels import Paint, Pixels, is_grey, look_up, pick, pixels_above, places, to_device, uniform
from vitad.data.synthesis.recolouring import Recolouring
from vitad.data.synthesis.shapes import frame, somewhere
from vitad.data.synthesis.textures import texture_bank

if TYPE_CHECKING:
    from vitad.data.synthesis import Synthesis

VISIBLE = 0.02  # a change of less than five grey levels is no damage
BLURS = (2, 3, 4, 5)  # px around a pixel over which a blur takes the mean, whatever the image's size

Fill = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (s, y, x, colours (3,P) before) -> colours (3,P)


def anything(
    settings: Synthesis, rng: np.random.Generator, images: Tensor, rows: Tensor, within: Tensor | None
) -> tuple[Pixels, Paint]:
    """A shape of any size with any filling."""
    K, device = len(rows), images.device
    shape = _shape(rng, images, somewhere(rng, images, rows, within))  # (K,H,W)
    makers = (_texture, _elsewhere, _tone, _gain, _blur)
    fills: list[Fill] = [maker(settings, rng, images, rows) for maker in makers]
    filling = to_device(rng.integers(len(fills), size=K), device, int)
    opacity = uniform(rng, 0.25, 1, K, device)

    def paint(s: Tensor, y: Tensor, x: Tensor, before: Tensor) -> Tensor:
        after = before.clone()
        for number, fill in enumerate(fills):
            part = (pick(filling, s) == number).nonzero()[:, 0]
            after.index_copy_(1, part, fill(s[part], y[part], x[part], pick(before, part)))
        after = torch.lerp(before, after, pick(opacity, s) * shape[s, y, x])
        return torch.where((after - before).abs().amax(0) < VISIBLE, before, after)

    return pixels_above(shape, 0.1), paint


def _shape(rng: np.random.Generator, images: Tensor, centre: tuple[Tensor, Tensor]) -> Tensor:
    """An ellipse or a box (K,H,W), turned, bent, its outline ragged; 1 inside, 0 outside, with a rim between."""
    K, (H, W), device = len(centre[0]), images.shape[-2:], images.device
    size = _log_uniform(rng, 2, 50, K)  # px: geometric mean of the half-axes
    elongation = _log_uniform(rng, 1, 16, K)
    px = min(H, W) / 224
    long = to_device(size * elongation**0.5 * px, device)
    short = to_device(np.maximum(size / elongation**0.5, 0.7) * px, device)
    angle = rng.uniform(0, math.pi, (K, 1, 1))
    sin, cos = to_device(np.sin(angle), device), to_device(np.cos(angle), device)
    bend = to_device(rng.normal(0, 0.15, (K, 1, 1)), device) / long
    power = to_device(np.where(rng.random((K, 1, 1)) < 2 / 3, 2, 8), device)  # 2: ellipse, 8: nearly a box
    raggedness = uniform(rng, 0, 0.8, (K, 1, 1), device)
    rim = to_device(_log_uniform(rng, 0.5, 6, K) * px, device)

    y, x = frame(images, centre)
    along, across = cos * x + sin * y, cos * y - sin * x
    across = across + bend * along.square()
    radius = ((along / long).abs() ** power + (across / short).abs() ** power) ** (1 / power)  # 1 at the outline
    noise = perlin_noise(rng, rng.integers(2, 6, (K, 2)), (H, W), device)
    beyond = (radius - 1 + raggedness * noise) * short  # px beyond the outline, roughly
    return (0.5 - beyond / rim).clamp_(0, 1)


def _texture(settings: Synthesis, rng: np.random.Generator, images: Tensor, rows: Tensor) -> Fill:
    """A texture, recoloured as DRAEM does."""
    bank = texture_bank(settings.textures, images.shape[-2:], images.device)
    chosen = rng.integers(len(bank.images), size=len(rows))
    recolouring, textures = Recolouring(rng, bank.coarse[chosen]), to_device(chosen, images.device, int)
    grey = _stays_grey(settings, images, rows)

    def fill(s: Tensor, y: Tensor, x: Tensor, before: Tensor) -> Tensor:
        texture = recolouring(bank, textures, s, y, x)
        return torch.where(pick(grey, s), texture.mean(0), texture)

    return fill


def _elsewhere(settings: Synthesis, rng: np.random.Generator, images: Tensor, rows: Tensor) -> Fill:
    """What another part of the image shows, mirrored or not."""
    K, (H, W), device = len(rows), images.shape[-2:], images.device
    mirrored = to_device(rng.random((2, K)) < 0.5, device, bool)
    shift = to_device(rng.uniform(0.1, 0.9, (2, K)) * [[H], [W]], device, int)

    def fill(s: Tensor, y: Tensor, x: Tensor, before: Tensor) -> Tensor:
        (upside_down, reversed_), (down, right) = pick(mirrored, s), pick(shift, s)
        y, x = torch.where(upside_down, H - 1 - y, y), torch.where(reversed_, W - 1 - x, x)
        return look_up(images, places(images, pick(rows, s), (y + down) % H, (x + right) % W))

    return fill


def _tone(settings: Synthesis, rng: np.random.Generator, images: Tensor, rows: Tensor) -> Fill:
    """One colour, or one grey."""
    K, device = len(rows), images.device
    colour, grey = uniform(rng, 0, 1, (3, K), device), uniform(rng, 0, 1, (1, K), device)
    coloured = to_device(rng.random(K) < 0.5, device, bool) & ~_stays_grey(settings, images, rows)
    tone = torch.where(coloured, colour, grey)  # (3,K)
    return lambda s, y, x, before: pick(tone, s)


def _gain(settings: Synthesis, rng: np.random.Generator, images: Tensor, rows: Tensor) -> Fill:
    """The image itself, darker or brighter."""
    K = len(rows)
    factor = np.where(rng.random(K) < 0.5, rng.uniform(0.3, 0.85, K), rng.uniform(1.15, 2, K))
    gain = to_device(factor, images.device)
    return lambda s, y, x, before: (before * pick(gain, s)).clamp_(0, 1)


def _blur(settings: Synthesis, rng: np.random.Generator, images: Tensor, rows: Tensor) -> Fill:
    """The image itself, out of focus."""
    drawn = to_device(rng.integers(len(BLURS), size=len(rows)), images.device, int)
    chosen = images[rows]
    blurred = torch.empty_like(chosen)
    for number, reach in enumerate(BLURS):
        part = drawn == number
        blurred[part] = F.avg_pool2d(chosen[part], 2 * reach + 1, 1, reach, count_include_pad=False)
    return lambda s, y, x, before: look_up(blurred, places(blurred, s, y, x))


def _stays_grey(settings: Synthesis, images: Tensor, rows: Tensor) -> Tensor:
    """(K,) bool: images on which no colour is painted."""
    return is_grey(images)[rows] & settings.keep_grey


def _log_uniform(rng: np.random.Generator, low: float, high: float, K: int) -> np.ndarray:
    """(K,1,1): every factor is as likely."""
    return low * (high / low) ** rng.random((K, 1, 1))
