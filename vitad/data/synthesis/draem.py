"""The kind `perlin`: the recipe of DRAEM (Zavrtanik et al. 2021, ICCV, arXiv 2108.07610).

A mask M of thresholded Perlin noise, turned by a random angle, is filled with a recoloured texture T, through which a
share b of the image shines: I_a = (1 - M) I + M ((1 - b) T + b I). What the paper leaves open is from its code.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vitad.data.synthesis.noise import perlin_noise
from vitad.data.synthesis.pixels import Paint, Pixels, is_grey, keep, pick, pixels_above, to_device
from vitad.data.synthesis.recolouring import Recolouring
from vitad.data.synthesis.textures import texture_bank

if TYPE_CHECKING:
    from vitad.data.synthesis import Synthesis


def perlin(
    settings: Synthesis, rng: np.random.Generator, images: Tensor, rows: Tensor, within: Tensor | None
) -> tuple[Pixels, Paint]:
    """Blobs of thresholded Perlin noise, filled with a texture."""
    K, (H, W), device = len(rows), images.shape[-2:], images.device
    exponents = rng.choice(settings.scales, (K, 2))
    noise = perlin_noise(rng, exponents, (H, W), device)  # (K,H,W)
    angles = rng.uniform(-math.pi / 2, math.pi / 2, K)
    pixels = turned(pixels_above(noise, settings.threshold), angles, (H, W))
    beta = to_device(rng.uniform(0, settings.beta_max, K), device)

    bank = texture_bank(settings.textures, (H, W), device)
    chosen = rng.integers(len(bank.images), size=K)
    recolouring = Recolouring(rng, bank.coarse[chosen])
    textures = to_device(chosen, device, int)

    def paint(s: Tensor, y: Tensor, x: Tensor, before: Tensor) -> Tensor:
        texture = recolouring(bank, textures, s, y, x)  # (3,P)
        if settings.keep_grey:
            texture = torch.where(is_grey(images)[rows][s], texture.mean(0), texture)
        return torch.lerp(texture, before, pick(beta, s))

    return pixels, paint


def turned(pixels: Pixels, angles: np.ndarray, size: tuple[int, int]) -> Pixels:
    """Turn pixels about the centre of the image; those that leave it are dropped.

    Three shears by whole pixels (Paeth 1986, Graphics Interface) make a rotation, so no two pixels land on one place.

    Parameters
    ----------
    pixels : (s, y, x)
    angles : array (K,)
        Radians in (-pi/2, pi/2); the pixels of image s turn by `angles[s]`.
    size : (H, W)
    """
    (H, W), (s, y, x) = size, pixels
    slopes = np.stack([np.tan(angles / 2), np.sin(angles)])  # of the outer two shears and of the middle one
    outer, middle = pick(to_device(slopes, s.device), s)  # (P,)

    down = y - (H - 1) / 2  # from the centre
    right = x - (W - 1) / 2
    right = right + (outer * down).round_()
    down = down - (middle * right).round_()
    right = right + (outer * down).round_()

    y = (down + (H - 1) / 2).long()
    x = (right + (W - 1) / 2).long()
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return keep((s, y, x), inside.nonzero()[:, 0])
