"""Parts that several methods share."""

from functools import lru_cache

import torch


def gaussian_blur(maps, sigma):
    """Gaussian smoothing of maps (B,H,W) with standard deviation `sigma` in px, edges mirrored.

    Both passes are products with a banded matrix, which is exact at any ratio of sigma to image size.
    Equal to scipy's `gaussian_filter(mode="reflect", truncate=4)`.
    """
    if sigma == 0:
        return maps
    B, H, W = maps.shape
    rows, columns = (_blur_matrix(n, sigma, maps.dtype, maps.device) for n in (H, W))
    with torch.autocast(maps.device.type, enabled=False):  # half precision would tie most of a map's pixels
        return rows @ maps @ columns.T


@lru_cache(maxsize=16)
def _blur_matrix(n, sigma, dtype, device):
    """(n,n): row i holds the weights with which pixel i collects its neighbours."""
    radius = int(4 * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1)
    weight = torch.exp(-0.5 * (offset.double() / sigma) ** 2)
    weight /= weight.sum()
    position = (torch.arange(n)[:, None] + offset) % (2 * n)
    mirrored = torch.where(position < n, position, 2 * n - 1 - position)  # ... c b a | a b c ... | c b a ...
    matrix = torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, mirrored, weight.expand(n, -1))
    return matrix.to(device=device, dtype=dtype)


def top_mean(maps, share):
    """Mean of the highest `share` of each map's pixels: (B,H,W) -> (B,)."""
    flat = maps.flatten(1)
    return flat.topk(max(1, round(share * flat.shape[1])), dim=1).values.mean(1)
