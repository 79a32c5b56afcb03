"""Parts that several methods share."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from vitad.errors import UserError


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing of maps (B,H,W) with standard deviation `sigma` in px, edges mirrored.

    Both passes are products with a banded matrix, which is exact at any ratio of sigma to image size.
    Equal to scipy's `gaussian_filter(mode="reflect", truncate=4)`.

    Examples
    --------
    >>> import torch
    >>> from vitad.blocks import gaussian_blur
    >>> gaussian_blur(torch.eye(3)[None], sigma=0.5)[0]
    tensor([[0.8089, 0.1793, 0.0119],
            [0.1793, 0.6415, 0.1793],
            [0.0119, 0.1793, 0.8089]])
    """
    if sigma == 0:
        return maps
    B, H, W = maps.shape
    radius = int(4 * sigma + 0.5)  # px; as scipy cuts the bell off
    rows = _blur_matrix(H, sigma, radius, True, maps.dtype, maps.device)
    columns = _blur_matrix(W, sigma, radius, True, maps.dtype, maps.device)
    with torch.autocast(maps.device.type, enabled=False):  # half precision would tie most of a map's pixels
        return rows @ maps @ columns.T


@lru_cache(maxsize=16)
def _blur_matrix(n: int, sigma: float, radius: int, mirror: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n,n): row i holds the weights with which pixel i collects its neighbours; beyond the edges is a mirror or 0."""
    offset = torch.arange(-radius, radius + 1)
    weight = torch.exp(-0.5 * (offset.double() / sigma) ** 2)
    weight /= weight.sum()
    position = torch.arange(n)[:, None] + offset  # (n, 2 radius + 1): the neighbours of each pixel
    weight = weight.expand(n, -1)
    if mirror:
        position = position % (2 * n)
        position = torch.where(position < n, position, 2 * n - 1 - position)  # ... c b a | a b c ... | c b a ...
    else:
        inside = (position >= 0) & (position < n)
        weight, position = weight * inside, position.clamp(0, n - 1)
    matrix = torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, position, weight)
    return matrix.to(device=device, dtype=dtype)


def ssim_map(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """Structural similarity of two batches of images at every pixel: (B,C,H,W) twice -> (B,1,H,W), at most 1.

    Wang et al. 2004: Gaussian window of 11 x 11 px, sigma 1.5 px; zeros beyond the edges; mean over channels.
    `data_range` is the largest difference that pixels can have: 2 for images in -1..1.
    """
    B, C, H, W = x.shape
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    with torch.autocast(x.device.type, enabled=False):  # variances are differences of nearly equal numbers
        x, y = x.float(), y.float()
        rows = _blur_matrix(H, 1.5, 5, False, x.dtype, x.device)
        columns = _blur_matrix(W, 1.5, 5, False, x.dtype, x.device)
        moments = rows @ torch.stack([x, y, x * x, y * y, x * y]) @ columns.T  # all windows at once
        mean_x, mean_y, xx, yy, xy = moments.unbind()
        var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
        ssim = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return ssim.mean(1, keepdim=True)


def top_mean(maps: Tensor, share: float) -> Tensor:
    """Mean of the highest `share` of each map's pixels, at least one: (B,H,W) -> (B,)."""
    flat = maps.flatten(1)
    n_highest = max(1, round(share * flat.shape[1]))
    return flat.topk(n_highest, dim=1).values.mean(1)


def convolutional_autoencoder(image_size: int, latent: int, statistics: int = 1) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder, images (B,3,S,S) -> (B,statistics * latent,1,1), and decoder, (B,latent,1,1) -> images in [0,1].

    Layers of Bergmann et al. 2019 (VISAPP, arXiv 1807.02011), Table 1. The decoder is the mirror of the encoder.
    Raises `UserError` for a size other than 64, 128, 256 and 512, and where nothing is left of the latent vector.
    """
    stems = {64: 1, 128: 2, 256: 3, 512: 4}.get(image_size)
    if not stems:
        raise UserError(f"image_size={image_size} does not suit this autoencoder. Choose 64, 128, 256 or 512.")
    if latent < 1:
        raise UserError(f"latent={latent} has to be at least 1.")
    # channels, kernel, stride: down to 8 x 8, then one 8 x 8 convolution to the latent vector
    layers = [(32, 4, 2)] * stems + [(32, 3, 1), (64, 4, 2), (64, 3, 1), (128, 4, 2), (64, 3, 1), (32, 3, 1)]
    encoder, decoder = nn.Sequential(), nn.Sequential()
    width = 3
    for channels, kernel, stride in layers:
        encoder.extend([nn.Conv2d(width, channels, kernel, stride, 1), nn.LeakyReLU(0.2)])
        width = channels
    encoder.append(nn.Conv2d(width, statistics * latent, 8))  # linear
    decoder.extend([nn.ConvTranspose2d(latent, width, 8), nn.LeakyReLU(0.2)])
    inputs = [3] + [channels for channels, _, _ in layers[:-1]]  # of the encoder's layers
    for c_out, (c_in, kernel, stride) in zip(reversed(inputs), reversed(layers), strict=True):
        decoder.extend([nn.ConvTranspose2d(c_in, c_out, kernel, stride, 1), nn.LeakyReLU(0.2)])
    decoder[-1] = nn.Sigmoid()
    return encoder, decoder
