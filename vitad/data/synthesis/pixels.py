"""Lists of pixels, and random numbers moved from the host to the device.

Damage covers few pixels. Only its shape is computed for whole images; colours are computed for a list of pixels. Such
a list is a tuple (s, y, x) of int64 tensors of one length P: row y and column x of the image number s.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Pixels = tuple[Tensor, Tensor, Tensor]  # (s, y, x), each (P,)
Paint = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (s, y, x, colours (3,P) before) -> colours (3,P) after


def pixels_above(values: Tensor, threshold: float) -> Pixels:
    """List the pixels of `values` (K,H,W) that exceed the threshold."""
    _, H, W = values.shape
    if values.device.type == "cpu":  # NumPy is four times as fast as torch at this
        flat = torch.from_numpy(np.flatnonzero(values.numpy() > threshold))
    else:
        flat = (values > threshold).flatten().nonzero()[:, 0]
    row = flat // W  # of all K images stacked
    s = row // H
    return s, row - s * H, flat - row * W


def keep(pixels: Pixels, chosen: Tensor) -> Pixels:
    """Shorten the list to those at the positions `chosen`."""
    s, y, x = pixels
    return pick(s, chosen), pick(y, chosen), pick(x, chosen)


def places(images: Tensor, s: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Positions (C,P) of the pixels' C channels in the flattened images (N,C,H,W)."""
    _, C, H, W = images.shape
    first_channel = (s * C * H + y) * W + x
    return first_channel + H * W * torch.arange(C, device=s.device)[:, None]


def look_up(values: Tensor, positions: Tensor) -> Tensor:
    """`values.flatten()[positions]`, three times as fast on the host."""
    return values.view(-1).index_select(0, positions.flatten()).view(positions.shape)


def pick(values: Tensor, indices: Tensor) -> Tensor:
    """`values[..., indices]`, three times as fast on the host."""
    return values.index_select(-1, indices)


def is_grey(images: Tensor) -> Tensor:
    """(B,) bool: the images (B,3,H,W) without colour."""
    sample = images[:, :, ::8, ::8]  # enough to tell them apart
    return (sample == sample[:, :1]).flatten(1).all(1)


def to_device(array: np.ndarray, device: torch.device | str, kind: type = float) -> Tensor:
    """Move a host array to the device, as float32, int64 or bool (`kind` is float, int or bool)."""
    dtype = {float: np.float32, int: np.int64, bool: np.bool_}[kind]
    return torch.from_numpy(np.ascontiguousarray(array, dtype)).to(device, non_blocking=True)


def uniform(
    rng: np.random.Generator, low: float, high: float, shape: int | Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Draw uniform numbers on the host and move them to the device."""
    return to_device(rng.uniform(low, high, shape), device)
