"""Kinds of damage after what real surfaces have: crack, pit, patch, fray, paste. They are not from a paper.

Lengths in px are those for an image whose shorter side is 224 px; they grow with the image.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitad.data.synthesis.pixels import Paint, Pixels, look_up, pick, pixels_above, places, to_device, uniform
from vitad.data.synthesis.shapes import blob, frame, somewhere, stamp

if TYPE_CHECKING:
    from vitad.data.synthesis import Synthesis


def crack(
    settings: Synthesis, rng: np.random.Generator, images: Tensor, rows: Tensor, within: Tensor | None
) -> tuple[Pixels, Paint]:
    """A thin line that wanders, 1 to 3 px wide and 30 to 200 px long, darker or lighter than its surroundings."""
    K, Q = len(rows), 256  # points along the line
    px = min(images.shape[-2:]) / 224

    step = rng.uniform(30, 200, (K, 1)) / Q * px
    wander = rng.normal(size=(K, Q)) * rng.uniform(0.01, 0.12, (K, 1))
    kinks = rng.normal(0, 0.7, (K, Q)) * (rng.random((K, Q)) < 0.02)
    heading = rng.uniform(0, 2 * math.pi, (K, 1)) + np.cumsum(wander + kinks, 1)
    path = np.cumsum(np.stack([np.sin(heading), np.cos(heading)]) * step, 2)  # (2,K,Q): y and x
    path -= path[..., Q // 2, None]  # its middle is where the crack is placed
    taper = np.sin(np.linspace(0.1, math.pi - 0.1, Q)) ** 0.5
    width = rng.uniform(1, 3, (K, 1)) * px * taper

    middle = somewhere(rng, images, rows, within)
    y, x = (at[:, None] + to_device(offset, images.device) for at, offset in zip(middle, path, strict=True))
    half = to_device(width, images.device)[..., None] / 2

    def line(dy: Tensor, dx: Tensor) -> Tensor:
        return (half + 0.5 - torch.hypot(dy, dx)).clamp(0, 1)

    return _shaded(rng, stamp(images, (y, x), 1.5 * px + 0.5, line), (0.4, 0.9))


def pit(
    settings: Synthesis, rng: np.random.Generator, images: Tensor, rows: Tensor, within: Tensor | None
) -> tuple[Pixels, Paint]:
    """One to four small holes: discs and ellipses of 1.5 to 8 px radius with a soft rim."""
    K, Q = len(rows), 4  # most holes in an image
    px = min(images.shape[-2:]) / 224

    centres = [somewhere(rng, images, rows, within) for _ in range(Q)]
    y, x = (torch.stack(c, 1) for c in zip(*centres, strict=True))  # (K,Q)
    long = rng.uniform(1.5, 8, (K, Q, 1)) * px
    short = long * rng.uniform(0.4, 1, (K, Q, 1))
    angle = rng.uniform(0, math.pi, (K, Q, 1))
    exists = np.arange(Q)[None, :, None] < rng.integers(1, Q + 1, (K, 1, 1))
    a, b, sin, cos, there = (to_device(v, images.device) for v in (long, short, np.sin(angle), np.cos(angle), exists))

    def ellipse(dy: Tensor, dx: Tensor) -> Tensor:
        radius = torch.hypot((cos * dx + sin * dy) / a, (cos * dy - sin * dx) / b)  # 1 at the outline
        return ((1 - radius) * b / 1.5 + 0.5).clamp(0, 1) * there

    return _shaded(rng, stamp(images, (y, x), 8 * px + 1, ellipse), (0.4, 0.95))


def patch(
    settings: Synthesis, rng: np.random.Generator, images: Tensor, rows: Tensor, within: Tensor | None
) -> tuple[Pixels, Paint]:
    """A spot of 12 to 60 px radius with soft edges, a little darker or lighter: wear, uneven coating, a stain."""
    centre = somewhere(rng, images, rows, within)
    shape = blob(rng, images, centre, radius=(12, 60), wobble=0.5, soft=(0.2, 0.6))
    return _shaded(rng, shape, (0.08, 0.35))


def fray(
    settings: Synthesis, rng: np.random.Generator, images: Tensor, rows: Tensor, within: Tensor | None
) -> tuple[Pixels, Paint]:
    """A ragged bite of 6 to 40 px radius out of the border of the foreground, or of the image."""
    inside = torch.ones_like(images[rows, 0]).bool() if within is None else within  # (K,H,W)
    padded = F.pad(inside, (1, 1, 1, 1))  # nothing lies beyond the image
    above, below = padded[:, :-2, 1:-1], padded[:, 2:, 1:-1]
    left, right = padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]
    border = inside & ~(above & below & left & right)

    centre = somewhere(rng, images, rows, border)
    shape = blob(rng, images, centre, radius=(6, 40), wobble=1.0, soft=(0.05, 0.15))
    return _shaded(rng, shape, (0.3, 0.9))


def paste(
    settings: Synthesis, rng: np.random.Generator, images: Tensor, rows: Tensor, within: Tensor | None
) -> tuple[Pixels, Paint]:
    """A rectangle from elsewhere in the image, a little brighter or darker (after CutPaste, Li et al. 2021, CVPR)."""
    K, (H, W), device = len(rows), images.shape[-2:], images.device
    sides = rng.uniform(10, 70, (2, K, 1, 1)) * min(H, W) / 224
    angle = rng.uniform(0, math.pi, (K, 1, 1))
    y, x = frame(images, somewhere(rng, images, rows, within))
    sin, cos, height, width = (to_device(v, device) for v in (np.sin(angle), np.cos(angle), *sides))
    depth = torch.minimum(  # distance to the nearest side, negative outside
        width / 2 - (cos * x + sin * y).abs(),
        height / 2 - (cos * y - sin * x).abs(),
    )
    shift = to_device(rng.uniform(0.15, 0.85, (2, K)) * [[H], [W]], device, int)  # to the place copied from
    gain = uniform(rng, 0.75, 1.25, K, device)

    def paint(s: Tensor, y: Tensor, x: Tensor, before: Tensor) -> Tensor:
        down, right = pick(shift, s)
        source = places(images, pick(rows, s), (y + down) % H, (x + right) % W)
        return (look_up(images, source) * pick(gain, s)).clamp_(0, 1)

    return pixels_above(depth, 0), paint


def _shaded(rng: np.random.Generator, shape: Tensor, strength: tuple[float, float]) -> tuple[Pixels, Paint]:
    """Make the image darker or lighter in the shape (K,H,W), whichever shows on the surface below it.

    `strength` is the range of the opacity where the shape is 1.
    """
    K, device = len(shape), shape.device
    darken = to_device(rng.random(K) < 0.65, device, bool)
    opacity = uniform(rng, *strength, K, device)

    def paint(s: Tensor, y: Tensor, x: Tensor, before: Tensor) -> Tensor:
        level = (255 * before.mean(0)).round_().long()  # whole numbers: their sum does not depend on the order
        count, total = torch.zeros(2, K, dtype=torch.long, device=device)
        total.index_add_(0, s, level)
        count.index_add_(0, s, torch.ones_like(level))
        surface = total / count.clamp(1) / 255  # (K,): mean grey of the pixels to be painted
        dark = (darken & (surface > 0.1)) | (surface > 0.9)
        tone = torch.where(dark, 0, (2 * surface).clamp(0.5, 1))  # as far away on either side
        return torch.lerp(before, pick(tone, s).expand(3, -1), pick(opacity, s) * shape[s, y, x])

    return pixels_above(shape, 0.1), paint  # the outermost part of a soft rim cannot be seen and is no damage
