"""Shapes of damage as maps (K,H,W) in [0,1], 0 outside; a soft rim lies between. Not from a paper.

Lengths in px are those for an image whose shorter side is 224 px; they grow with the image.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vitad.data.synthesis.noise import perlin_noise
from vitad.data.synthesis.pixels import to_device, uniform

Point = tuple[Tensor, Tensor]  # (y, x), each (K,) float: one pixel in each of K images


def somewhere(rng: np.random.Generator, images: Tensor, rows: Tensor, within: Tensor | None) -> Point:
    """Draw a pixel in each of the images `rows`, from the whole image or from the mask `within` (K,H,W)."""
    H, W = images.shape[-2:]
    share = uniform(rng, 0, 1, (len(rows), 1), images.device)  # (K,1)
    if within is None:
        pixel = (share * (H * W)).long()
    else:
        count = within.flatten(1).cumsum(1)  # (K,H*W): pixels of the mask so far
        pixel = torch.searchsorted(count, (share * count[:, -1:]).long(), right=True)
    pixel = pixel[:, 0].clamp(max=H * W - 1)  # beyond the last one where the mask is empty
    return (pixel // W).float(), (pixel % W).float()


def frame(images: Tensor, centre: Point) -> Point:
    """Coordinates y (K,H,1) and x (K,1,W) of all pixels relative to `centre`."""
    H, W = images.shape[-2:]
    y = torch.arange(H, device=images.device)[:, None]
    x = torch.arange(W, device=images.device)
    return y - centre[0][:, None, None], x - centre[1][:, None, None]


def stamp(images: Tensor, centres: Point, radius: float, profile: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Put a small shape at each of Q centres in K images; where shapes overlap, the greatest value stays.

    Parameters
    ----------
    images : Tensor (B,3,H,W)
        Gives the size and the device.
    centres : (y, x), each (K,Q)
    radius : float
        Distance in px of the image beyond which the shape is 0.
    profile : function of (dy, dx), each (K,Q,R)
        Value of the shape at R offsets from its centre, which need not be whole numbers.

    Returns
    -------
    Tensor (K,H,W)
    """
    y, x = centres
    K, (H, W) = len(y), images.shape[-2:]
    reach = torch.arange(-math.ceil(radius), math.ceil(radius) + 1, device=images.device)
    row = y.round().long()[..., None] + reach.repeat_interleave(len(reach))  # (K,Q,R)
    column = x.round().long()[..., None] + reach.repeat(len(reach))
    value = profile(row - y[..., None], column - x[..., None])
    value = value * ((row >= 0) & (row < H) & (column >= 0) & (column < W))
    position = row.clamp(0, H - 1) * W + column.clamp(0, W - 1)
    canvas = torch.zeros(K, H * W, device=images.device)
    return canvas.scatter_reduce_(1, position.flatten(1), value.flatten(1), "amax").view(K, H, W)


def blob(
    rng: np.random.Generator,
    images: Tensor,
    centre: Point,
    radius: tuple[float, float],
    wobble: float,
    soft: tuple[float, float],
) -> Tensor:
    """An ellipse (K,H,W) whose outline is bent by Perlin noise.

    Parameters
    ----------
    rng : Generator
    images : Tensor (B,3,H,W)
        Gives the size and the device.
    centre : (y, x), each (K,)
    radius : (low, high)
        Range in px from which both half-axes are drawn.
    wobble : float
        Weight of the noise, in shares of the radius.
    soft : (low, high)
        Range of the width of the rim, in shares of the radius.
    """
    K, (H, W), device = len(centre[0]), images.shape[-2:], images.device
    half_axes = rng.uniform(*radius, (2, K, 1, 1)) * min(H, W) / 224
    angle = rng.uniform(0, math.pi, (K, 1, 1))
    a, b, sin, cos = (to_device(v, device) for v in (*half_axes, np.sin(angle), np.cos(angle)))
    y, x = frame(images, centre)
    noise = perlin_noise(rng, rng.integers(2, 5, (K, 2)), (H, W), device)
    distance = torch.hypot((cos * x + sin * y) / a, (cos * y - sin * x) / b) + wobble * noise  # 1 at the outline
    return ((1 - distance) / uniform(rng, *soft, (K, 1, 1), device)).clamp_(0, 1)
