"""Perlin noise for a batch of images, computed as matrix products."""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vitad.data.synthesis.pixels import to_device


def perlin_noise(
    rng: np.random.Generator, exponents: np.ndarray, size: tuple[int, int], device: torch.device
) -> Tensor:
    """Draw n fields of Perlin noise.

    Each field is a sum over the points of a lattice, which have random gradients g. A pixel (y,x) has the weight
    1 - fade(t) for the lattice point before it and fade(t) for the one after it, along either axis. So

        noise(y,x) = sum_ij  w_i(y) w_j(x)  g_ij . (y - i, x - j)

    The two terms of the scalar product are the matrix products (w (y - i)) g^y w' and w g^x (w (x - j))'.

    Parameters
    ----------
    rng : Generator
    exponents : array (n,2)
        a and b of each field; its lattice divides the image into 2^a by 2^b cells.
    size : (H, W)
    device : device

    Returns
    -------
    Tensor (n,H,W)
        Values of about -1 to 1; 0 at the lattice points.
    """
    H, W = size
    finest = int(np.max(exponents))
    points = 2**finest + 1  # L, along an axis of the finest lattice; coarser ones use the first of them
    angle = rng.random((len(exponents), points, points), np.float32) * np.float32(2 * math.pi)
    gy = to_device(math.sqrt(2) * np.sin(angle), device)  # (n,L,L)
    gx = to_device(math.sqrt(2) * np.cos(angle), device)

    a, b = to_device(exponents.T, device, int)
    wy, dy = _lattice_weights(H, finest, device)[:, a]  # (n,H,L): weights, and weights times distances
    wx, dx = _lattice_weights(W, finest, device)[:, b]  # (n,W,L)
    along_y = torch.cat([dy, wy], 2)  # (n,H,2L)
    along_x = torch.cat([gy @ wx.mT, gx @ dx.mT], 1)  # (n,2L,W)
    return along_y @ along_x


@lru_cache(maxsize=16)
def _lattice_weights(length: int, finest: int, device: torch.device) -> Tensor:
    """(2,E,length,L): weight w of each lattice point at each pixel of an axis, and w times their distance.

    E = finest + 1 exponents, L = 2^finest + 1 points.
    """
    weights = torch.zeros(2, finest + 1, length, 2**finest + 1, dtype=torch.float64)
    pixel = torch.arange(length)
    for a in range(finest + 1):
        position = pixel.double() * 2**a / length  # in cells
        before = position.floor().long()
        t = position - before
        fade = 6 * t**5 - 15 * t**4 + 10 * t**3
        weights[0, a, pixel, before] = 1 - fade
        weights[0, a, pixel, before + 1] = fade
        weights[1, a, pixel, before] = (1 - fade) * t
        weights[1, a, pixel, before + 1] = fade * (t - 1)
    return weights.float().to(device)
