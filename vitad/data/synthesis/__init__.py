"""Synthetic damage, for methods that learn from normal images only.

The kind `perlin` is DRAEM's recipe (`draem.py`). The others are ours: five after what real surfaces have
(`surface.py`), and `anything` for those who do not know what to expect (`anything.py`).

A kind of damage is a function (settings, rng, images, rows, within) -> (pixels, paint). Its images are `images[rows]`,
K of them; `within` (K,H,W) says where damage is allowed, None: everywhere. It returns the list of pixels that the
damage covers (`pixels.py`) and a function that paints them.

Random numbers are drawn on the host from (seed, step). So damage depends neither on earlier calls nor on the device,
and a resumed run sees what an unbroken one would have seen. No file is read after the first call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vitad.data.synthesis.anything import anything
from vitad.data.synthesis.draem import perlin, turned
from vitad.data.synthesis.foreground import foreground_mask, foregrounds
from vitad.data.synthesis.noise import perlin_noise
from vitad.data.synthesis.pixels import Paint, Pixels, keep, look_up, pick, pixels_above, places, to_device
from vitad.data.synthesis.recolouring import Recolouring, shift_hue
from vitad.data.synthesis.surface import crack, fray, paste, patch, pit
from vitad.data.synthesis.textures import TextureBank, procedural_textures, texture_bank, textures_used
from vitad.errors import UserError, unknown

__all__ = [
    "KINDS",
    "Recolouring",
    "Synthesis",
    "TextureBank",
    "foreground_mask",
    "foregrounds",
    "perlin",
    "perlin_noise",
    "pixels_above",
    "procedural_textures",
    "shift_hue",
    "texture_bank",
    "textures_used",
    "turned",
]

TRIES = 10  # for an image that has to be damaged; about one draw in twenty leaves no pixel
LOCAL_SHARE = {"global": 0.0, "local": 1.0, "both": 0.5}  # of the images, damage that keeps to the foreground


@dataclass(frozen=True)
class Synthesis:
    """Damages batches of normal images: `synthesis(images, seed, step)`. The defaults are DRAEM's.

    Raises
    ------
    UserError
        A kind or mode is unknown, or a number is out of range.

    Examples
    --------
    >>> damage = Synthesis(kinds=("crack", "pit"), probability=1)
    >>> batch = damage(torch.full((4, 3, 64, 64), 0.5), seed=0, step=0)
    >>> batch["image"].shape, batch["mask"].shape, batch["label"].tolist()
    (torch.Size([4, 3, 64, 64]), torch.Size([4, 1, 64, 64]), [1, 1, 1, 1])
    """

    kinds: tuple[str, ...] = ("perlin",)  # one is drawn for each image; a name given twice is drawn twice as often
    probability: float = 0.5  # that an image is damaged
    mode: Literal["global", "local", "both"] = "global"  # MALA: local keeps to the foreground; both: an even chance
    textures: str = "procedural"  # or a folder of images, at any depth; DRAEM: that of DTD
    scales: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # a and b are drawn from these; the lattice has 2^a by 2^b cells
    threshold: float = 0.5  # of the noise
    beta_max: float = 0.8  # share of the image that shines through: b ~ U(0, beta_max)
    keep_grey: bool = False  # ours: paint no colour on grey images; DRAEM does

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown("kind of damage", kind, KINDS)
        if not self.kinds:
            raise UserError(f"kinds of damage: none given. Choose from: {', '.join(KINDS)}.")
        if self.mode not in LOCAL_SHARE:
            raise unknown("mode of damage", self.mode, LOCAL_SHARE)
        for name in ("probability", "beta_max"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} of the damage is out of range: it lies in 0 to 1.")
        if not self.scales or not all(0 <= a <= 8 for a in self.scales):
            raise UserError(f"scales={self.scales} of the Perlin noise: give whole numbers from 0 to 8.")

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        seed: int,
        step: int,
        foreground: Tensor | None = None,
        which: np.ndarray | None = None,
    ) -> dict[str, Tensor]:
        """Damage a batch.

        Parameters
        ----------
        images : Tensor (B,3,H,W) in [0,1]
            Of any size, on any device; not changed.
        seed, step : int
            The same two give the same damage; any other step gives other damage.
        foreground : Tensor (B,1,H,W) bool, optional
            For the modes `local` and `both`: what `foreground_mask(images)` gives, which is computed here if missing.
        which : array (B,) bool, optional
            The images that are damaged, instead of each with `probability`. Damage that covers no pixel is drawn again.

        Returns
        -------
        dict
            `image` (B,3,H,W); `mask` (B,1,H,W) bool, exactly the pixels that differ from the given ones; `label` (B,),
            1 where there is any.
        """
        B, _, H, W = images.shape
        rng = np.random.default_rng([seed, step])
        result = {
            "image": images.clone(memory_format=torch.contiguous_format),
            "mask": torch.zeros(B, 1, H, W, dtype=torch.bool, device=images.device),
            "label": torch.zeros(B, dtype=torch.long, device=images.device),
        }
        if foreground is None and self.mode != "global":
            foreground = foreground_mask(images)
        if which is None:
            self._damage(result, rng, foreground, None)
            return result
        for _ in range(TRIES):
            missing = which & (result["label"] == 0).cpu().numpy()
            if not missing.any():
                break
            self._damage(result, rng, foreground, missing)
        return result

    def _damage(
        self,
        result: dict[str, Tensor],
        rng: np.random.Generator,
        foreground: Tensor | None,
        which: np.ndarray | None,
    ) -> None:
        """Draw damage for the images `which`, or for each with `probability`, and paint it into `result`."""
        damaged, mask, label = result["image"], result["mask"], result["label"]
        B, device = len(damaged), damaged.device
        kind_of = rng.integers(len(self.kinds), size=B)
        drawn = rng.random(B) < self.probability
        kind_of[~(drawn if which is None else which)] = -1  # not damaged
        local = rng.random(B) < LOCAL_SHARE[self.mode]
        allowed = None  # (B,H,W); None: everywhere
        if local.any() and foreground is not None:
            allowed = foreground[:, 0] | ~to_device(local, device, bool)[:, None, None]
        with torch.autocast(device.type, enabled=False):  # half precision would make steps in the noise
            for k in np.unique(kind_of[kind_of >= 0]):
                rows = to_device(np.flatnonzero(kind_of == k), device, int)
                within = None if allowed is None else allowed[rows]
                pixels, paint = KINDS[self.kinds[k]](self, rng, damaged, rows, within)
                if within is not None:
                    pixels = keep(pixels, within[pixels].nonzero()[:, 0])
                s, y, x = pixels

                row = pick(rows, s)  # s counts the images of this kind, row those of the batch
                colours = places(damaged, row, y, x)  # (3,P)
                before = look_up(damaged, colours)
                after = paint(s, y, x, before)
                damaged.view(-1).index_copy_(0, colours.flatten(), after.flatten())
                differs = (after != before).any(0)
                mask.view(-1).index_copy_(0, places(mask, row, y, x)[0], differs)
                label.scatter_reduce_(0, row, differs.long(), "amax")


Kind = Callable[[Synthesis, np.random.Generator, Tensor, Tensor, Tensor | None], tuple[Pixels, Paint]]
KINDS: dict[str, Kind] = {
    "perlin": perlin,
    "crack": crack,
    "pit": pit,
    "patch": patch,
    "fray": fray,
    "paste": paste,
    "anything": anything,
}
