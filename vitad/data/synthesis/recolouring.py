"""DRAEM's ten operations on textures, for K textures at once and only at the pixels that are painted.

Seven operations map each level of a channel to another one. They are tables of 256 levels, and tables compose: looking
one table up in the other is a table again. The other three are the shift of hue and saturation, sharpness, rotation.
"""

import math

import numpy as np
import torch
from torch import Tensor

from vitad.data.synthesis.pixels import look_up, pick, places, to_device
from vitad.data.synthesis.textures import TextureBank

SHIFT_OF_HUE, SHARPNESS, ROTATION = 7, 8, 9  # numbers 0 to 6 are those of TABLES, below


class Recolouring:
    """Three different operations for each of K textures, drawn when the object is made.

    Rotation and sharpness, which move or mix pixels, come first. The operations on colours follow in the order drawn.
    Histograms are taken from a coarse copy of the texture.

    Parameters
    ----------
    rng : Generator
    coarse : array (K,3,Q)
        Q pixels of each texture, levels in 0..255.

    Attributes
    ----------
    applies : list of three Tensors (K,) bool
        Which textures are rotated, sharpened, shifted in hue.
    before_shift, table : Tensor (K,3,256)
        The tables that come before the shift of hue, levels in 0..255, and those that come after it, in 0..1.
    """

    def __init__(self, rng: np.random.Generator, coarse: np.ndarray):
        K = len(coarse)
        drawn = rng.permuted(np.tile(np.arange(10), (K, 1)), axis=1)[:, :3]
        self.applies: list[Tensor] = [
            torch.from_numpy((drawn == k).any(1)) for k in (ROTATION, SHARPNESS, SHIFT_OF_HUE)
        ]
        angle = rng.uniform(-math.pi / 4, math.pi / 4, K)
        self.rotation: Tensor = to_device(np.stack([np.sin(angle), np.cos(angle)]), "cpu")
        self.sharpness: Tensor = to_device(rng.uniform(0, 2, K), "cpu")
        self.shift: Tensor = to_device(rng.uniform(-50, 50, (2, K)), "cpu")  # of hue and of saturation
        before_shift, table = self._compose(rng, drawn, coarse.astype(int))
        self.before_shift: Tensor = to_device(before_shift, "cpu")
        self.table: Tensor = to_device(table / 255, "cpu")

    def _compose(
        self, rng: np.random.Generator, drawn: np.ndarray, coarse: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tables (K,3,256) before and after the shift of hue, from the operations `drawn` (K,3)."""
        identity = np.tile(np.arange(256.0), (len(drawn), 3, 1))
        before_shift, table = identity.copy(), identity.copy()
        for turn in drawn.T:  # first, second and third operation of every texture
            for number, operation in enumerate(TABLES):
                rows = np.flatnonzero(turn == number)
                if rows.size:
                    table[rows] = operation(rng, table[rows], coarse[rows]).round().clip(0, 255)

            rows = np.flatnonzero(turn == SHIFT_OF_HUE)
            if rows.size:  # the table so far comes before the shift; a new one begins after it
                before_shift[rows], table[rows] = table[rows], identity[rows]
                levels = to_device(_through(before_shift[rows], coarse[rows]).swapaxes(0, 1), "cpu")
                shifted = shift_hue(levels, *self.shift[:, rows, None]).round()
                coarse[rows] = shifted.transpose(0, 1)
        return before_shift, table

    def __call__(self, bank: TextureBank, textures: Tensor, s: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Colours of pixels of recoloured textures.

        Parameters
        ----------
        bank : TextureBank
        textures : Tensor (K,)
            Indices in the bank of the textures that were given as `coarse`.
        s, y, x : Tensor (P,)
            The pixels: row y and column x of the texture `textures[s]`.

        Returns
        -------
        Tensor (3,P) in [0,1]
        """
        device, (H, W) = s.device, bank.images.shape[-2:]
        rotated, sharpened, shifted = (pick(a.to(device), s).nonzero()[:, 0] for a in self.applies)

        # Rotation: look up where the pixel was before it.
        sin, cos = pick(self.rotation.to(device), pick(s, rotated))
        down = pick(y, rotated) - (H - 1) / 2
        right = pick(x, rotated) - (W - 1) / 2
        row = (cos * down + sin * right + (H - 1) / 2).round_().long()
        column = (cos * right - sin * down + (W - 1) / 2).round_().long()
        beyond = rotated[(row < 0) | (row >= H) | (column < 0) | (column >= W)]
        y = y.index_copy(0, rotated, row.clamp_(0, H - 1))
        x = x.index_copy(0, rotated, column.clamp_(0, W - 1))
        positions = places(bank.images, pick(textures, s), y, x)  # (3,P)
        level = look_up(bank.images, positions).int()

        # Sharpness: away from the smooth copy, or towards it.
        smooth = look_up(bank.smooth, pick(positions, sharpened)).float()
        sharpness = pick(self.sharpness.to(device), pick(s, sharpened))
        sharp = torch.lerp(smooth, pick(level, sharpened).float(), sharpness).round_().clamp_(0, 255)
        level.index_copy_(1, sharpened, sharp.int())
        level.index_fill_(1, beyond, 0)  # black beyond the border

        # Colours: a table, the shift of hue, another table.
        first_level = 3 * 256 * s.int() + 256 * torch.arange(3, dtype=torch.int32, device=device)[:, None]
        colour = look_up(self.before_shift.to(device), pick(first_level, shifted) + pick(level, shifted))
        hue, saturation = pick(self.shift.to(device), pick(s, shifted))
        level.index_copy_(1, shifted, shift_hue(colour, hue, saturation).round_().int())
        return look_up(self.table.to(device), first_level + level)


# Each operation changes tables (K,3,256), one for each channel of K textures. Levels lie in 0..255; the caller rounds
# and clips them.


def gamma(rng: np.random.Generator, table: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Contrast of each channel by a power of 0.5 to 2."""
    return 255 * (table / 255) ** rng.uniform(0.5, 2, (len(table), 3, 1))


def brightness(rng: np.random.Generator, table: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """All channels times 0.8 to 1.2, plus -30 to 30."""
    factor = rng.uniform(0.8, 1.2, (len(table), 1, 1))
    return table * factor + rng.uniform(-30, 30, (len(table), 1, 1))


def solarise(rng: np.random.Generator, table: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Invert the levels from a threshold of 32 to 128 on, in half of the textures."""
    chosen = rng.random((len(table), 1, 1)) < 0.5
    above = table >= rng.uniform(32, 128, chosen.shape)
    return np.where(chosen & above, 255 - table, table)


def posterise(rng: np.random.Generator, table: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Keep the highest 8 to 1 bits of a level."""
    dropped = rng.integers(0, 8, (len(table), 1, 1))
    return table.astype(int) & -(1 << dropped)


def invert(rng: np.random.Generator, table: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Dark becomes bright."""
    return 255 - table


def autocontrast(rng: np.random.Generator, table: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Stretch the levels; up to 20 % of the pixels at either end become black and white."""
    cutoff = rng.uniform(0, 0.2, (len(table), 1, 1))
    share = _histogram(table, coarse) / coarse.shape[-1]
    low = (share.cumsum(2) <= cutoff).sum(2, keepdims=True)
    high = 255 - (share[..., ::-1].cumsum(2) <= cutoff).sum(2, keepdims=True)
    return np.where(high > low, (table - low) * 255 / np.maximum(high - low, 1), table)


def equalise(rng: np.random.Generator, table: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Make all levels equally frequent, by PIL's formula.

    As many pixels as the highest level has are left out of the count, so that this level becomes 255.
    """
    counts = _histogram(table, coarse)
    highest = 255 - (counts[..., ::-1] > 0).argmax(2)[..., None]
    step = (coarse.shape[-1] - np.take_along_axis(counts, highest, 2)) / 255
    below = counts.cumsum(2) - counts
    level = (below + step // 2) // np.maximum(step, 1e-9)
    return np.where(step > 0, _through(level, table.astype(int)), table)


TABLES = (gamma, brightness, solarise, posterise, invert, autocontrast, equalise)


def _through(table: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Look the levels (K,3,Q) up in the table."""
    return np.take_along_axis(table, levels, 2)


def _histogram(table: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """(K,3,256) counts of the levels that the table gives to the coarse pixels (K,3,Q)."""
    levels = _through(table, coarse).astype(int).reshape(-1, coarse.shape[-1])
    channel = np.arange(len(levels))[:, None]
    return np.bincount((256 * channel + levels).ravel(), minlength=256 * len(levels)).reshape(table.shape)


def shift_hue(levels: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """Move hue and saturation of colours, by way of the HSV colour space.

    Parameters
    ----------
    levels : Tensor (3,...)
        Red, green and blue, levels in 0..255.
    hue, saturation : Tensor (...)
        By how much to move, in levels of 255. Hue is a circle; saturation is clipped.

    Returns
    -------
    Tensor (3,...)
    """
    r, g, b = levels
    value = levels.amax(0)
    chroma = value - levels.amin(0)
    difference = torch.where(value == r, g - b, torch.where(value == g, b - r, r - g))
    sector = torch.where(value == r, 0, torch.where(value == g, 2, 4))
    sixths = difference / chroma.clamp(1e-6) + sector + 6 * hue / 255  # hue in sixths of the circle
    amount = (chroma / value.clamp(1e-6) + saturation / 255).clamp_(0, 1)
    turn = torch.stack([sixths + 3, sixths + 1, sixths - 1]) / 6  # from the complements of red, green and blue
    distance = (turn - turn.round()).abs()  # 0 at the complement, 1/2 at the colour itself
    return value * (1 - amount * (2 - 6 * distance).clamp_(0, 1))
