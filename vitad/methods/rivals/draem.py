"""DRAEM: one network repairs damaged images, another compares damage and repair and marks the damage.

Zavrtanik, Kristan & Skočaj 2021, "DRAEM - A discriminatively trained reconstruction embedding for surface anomaly
detection", ICCV, 8330-8339, arXiv 2108.07610. *Code* below is that of the authors, VitjanZ/DRAEM. The damage is drawn
as in `vitad.data.synthesis`. Ours: images are not turned (the code turns three in ten by up to 90 degrees), and every
epoch shows each image once (the code draws as many at random).

The switch `sspcab` puts a block into the first network that has to predict each place from its surroundings: Ristea et
al. 2022, CVPR, arXiv 2111.09099.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F

from vitad.blocks import ssim_map
from vitad.data.samples import ImageSet
from vitad.data.synthesis import Synthesis, textures_used
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.randomness import next_seed, seeded
from vitad.training import Phase

PAPER = "Zavrtanik et al. 2021, DRAEM, ICCV, 8330-8339, arXiv 2108.07610"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the authors' code; *ours* marks what differs."""

    image_size: int = 256  # code
    width: int = 128  # code: channels of the first level of the reconstruction
    seg_width: int = 64  # code: channels of the first level of the segmentation
    damage: float = 0.5  # code: probability of an image to be damaged
    textures: str = "procedural"  # ours; code: the folder of DTD
    keep_grey: bool = False  # code: paints colour on grey images too
    sspcab: bool = False  # Ristea et al.: True; in place of the lowest level of the reconstruction, as in anomalib
    sspcab_weight: float = 0.1  # anomalib: weight of the prediction error of SSPCAB in the loss
    gamma: float = 2.0  # code: of the focal loss
    epochs: int = 700  # code
    max_steps: int = 0  # ours: training ends after so many steps, even if `epochs` asks for more; 0: no limit
    batch_size: int = 8  # code
    lr: float = 1e-4  # code: a fifth of it from 80 % of the steps, a twenty-fifth from 90 %
    window: int = 21  # code: the score is the maximum of the map's mean over so many px
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # For two cores: an eighth of the width, half of the side, few steps.
    "small": {"image_size": 128, "width": 16, "seg_width": 8, "lr": 1e-3, "epochs": 60, "max_steps": 900},
    "demo": {
        "image_size": 96,
        "width": 16,
        "seg_width": 8,
        "lr": 1e-3,
        "epochs": 60,
        "max_steps": 240,
        "window": 11,
    },
    "smoke": {  # with fewer steps the batch norms know too little, and the map is all but constant
        "image_size": 64,
        "width": 8,
        "seg_width": 8,
        "lr": 5e-4,
        "epochs": 6,
        "batch_size": 3,
        "window": 5,
        "amp": False,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "sspcab": {"sspcab": True},
}


class Model(Method):
    """Damage, losses and score, in that order. Nothing here is pretrained, so that `weights` has no effect."""

    settings: Settings

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        self.weights = {"source": "random"}
        if s.image_size % 32:
            raise UserError(f"image_size={s.image_size} has to be a multiple of 32.")
        if min(s.width, s.seg_width) < 1 or (s.sspcab and s.width % 2):
            raise UserError(f"width={s.width}, seg_width={s.seg_width}: at least 1, and width even with sspcab.")
        if not s.damage:
            raise UserError("damage=0 leaves the segmentation nothing to learn from. Raise it.")
        if not s.window % 2:
            raise UserError(f"window={s.window} has to be odd.")
        self.synthesis = Synthesis(("perlin",), s.damage, textures=s.textures, keep_grey=s.keep_grey)
        with seeded(self.seed, "reconstruction"):
            self.reconstruction = Reconstruction(s.width).apply(_initial)
        with seeded(self.seed, "segmentation"):
            self.segmentation = Segmentation(s.seg_width).apply(_initial)
        self.sspcab: SSPCAB | None = None
        if s.sspcab:
            with seeded(self.seed, "sspcab"):
                self.sspcab = SSPCAB(8 * s.width).apply(_initial)
            self.reconstruction.bottom = nn.Identity()
        self.epochs = s.epochs
        self.protocol = {
            "normalisation": "unit",
            "smoothing": "none",
            "image_score": f"maximum of the map's mean over {s.window} x {s.window} px",
            "checkpoint": "last epoch",
        }

    def size_up(self, categories: ndarray) -> None:
        """Fewer epochs where the steps have a limit."""
        s = self.settings
        limit = s.max_steps // math.ceil(len(categories) / s.batch_size)
        self.epochs = min(s.epochs, max(1, limit)) if s.max_steps else s.epochs

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Note which textures are painted, and how long the training lasts."""
        self.size_up(images.categories)
        self.protocol["textures"] = textures_used(self.settings.textures, images.size)

    def damaged(self, batch: dict[str, Any], seed: int | None = None) -> dict[str, Tensor]:
        """The images of a batch, of which some are damaged, and their masks. Without a seed others at every call."""
        return self.synthesis(batch["image"], next_seed() if seed is None else seed, 0)

    def repair(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,S,S) -> images (B,3,S,S) without the damage, and the squared error of SSPCAB, a scalar."""
        features = self.reconstruction.encode(images)
        if self.sspcab is None:
            return self.reconstruction.decode(features).float(), features.new_zeros(())
        predicted = self.sspcab(features)
        return self.reconstruction.decode(predicted).float(), F.mse_loss(predicted.float(), features.float())

    def redraw(self, images: Tensor) -> Tensor:
        """The image without the damage."""
        return self.repair(images)[0]

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Of the repaired image: squared error and SSIM. Of the marked damage: focal loss (Lin et al. 2017)."""
        s, x = self.settings, batch["image"]
        damaged = batch["damaged"] if "damaged" in batch else self.damaged(batch)
        x_hat, error = self.repair(damaged["image"])
        logits = self.segmentation(torch.cat([damaged["image"], x_hat], 1))  # (B,2,S,S)
        surprise = F.cross_entropy(logits, damaged["mask"][:, 0].long(), reduction="none")  # -log p of the true class
        losses = {
            "mse": F.mse_loss(x_hat, x),
            "ssim": (1 - ssim_map(x_hat, x, data_range=1)).mean(),
            "focal": ((1 - (-surprise).exp()) ** s.gamma * surprise).mean(),
        }
        return losses | ({"sspcab": s.sspcab_weight * error} if s.sspcab else {})

    def phases(self) -> list[Phase]:
        """One phase for both networks."""
        s = self.settings
        trained = list(self.parameters())
        return [
            Phase("train", trained, self.epochs, s.batch_size, s.lr, schedule=_two_drops, damage=self.damaged),
        ]

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): probability of being damaged."""
        x_hat, _ = self.repair(images)
        return self.segmentation(torch.cat([images, x_hat], 1)).softmax(1)[:, 1]

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): maximum of the mean over a window; beyond the edges are zeros."""
        k = self.settings.window
        return F.avg_pool2d(maps[:, None], k, 1, k // 2).amax((1, 2, 3))


class Reconstruction(nn.Module):
    """Images (B,3,S,S) -> images. Five levels, without connections between encoder and decoder."""

    def __init__(self, w: int):
        super().__init__()
        self.down = nn.ModuleList(_double(a, b) for a, b in ((3, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w)))
        self.bottom: nn.Module = _double(8 * w, 8 * w)
        widths = ((8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w), (w, w))
        self.up = nn.Sequential(*(nn.Sequential(_up(a, a), _double(a, a, b)) for a, b in widths))
        self.head = nn.Conv2d(w, 3, 3, padding=1)

    def encode(self, x: Tensor) -> Tensor:
        """(B,3,S,S) -> (B,8w,S/16,S/16)."""
        for level in self.down:
            x = F.max_pool2d(level(x), 2)
        return x

    def decode(self, x: Tensor) -> Tensor:
        """(B,8w,S/16,S/16) -> (B,3,S,S), not bounded."""
        return self.head(self.up(self.bottom(x)))


class Segmentation(nn.Module):
    """Damaged and repaired images (B,6,S,S) -> logits (B,2,S,S). A U-Net of six levels."""

    def __init__(self, v: int):
        super().__init__()
        widths = [6, v, 2 * v, 4 * v, 8 * v, 8 * v, 8 * v]
        self.down = nn.ModuleList(_double(a, b) for a, b in zip(widths, widths[1:], strict=False))
        sides = [8 * v, 8 * v, 4 * v, 2 * v, v, v]  # of what comes up; beside it lies what went down at that level
        self.up = nn.ModuleList(_up(a, b) for a, b in zip(sides, sides[1:], strict=False))
        self.join = nn.ModuleList(_double(b + beside, b) for b, beside in zip(sides[1:], widths[5:0:-1], strict=True))
        self.head = nn.Conv2d(v, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        levels: list[Tensor] = []
        for level in self.down:
            x = level(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        for up, join, beside in zip(self.up, self.join, levels[-2::-1], strict=True):
            x = join(torch.cat([up(x), beside], 1))
        with torch.autocast(x.device.type, enabled=False):  # half precision would tie most of a map's pixels
            return self.head(x.float())


class SSPCAB(nn.Module):
    """Features (B,C,h,w) -> features, each place predicted from the four places two steps away diagonally.

    Four 1 x 1 kernels at the corners of a window of 5 x 5, summed, ReLU, then squeeze and excitation with reduction 8.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.corners = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(4))
        self.weigh = nn.Sequential(
            nn.Linear(channels, channels // 8), nn.ReLU(), nn.Linear(channels // 8, channels), nn.Sigmoid()
        )

    def predict(self, x: Tensor) -> Tensor:
        """Sum of the four kernels, before the ReLU."""
        h, w = x.shape[2:]
        padded = F.pad(x, (2, 2, 2, 2))
        places = [(0, 0), (0, 4), (4, 0), (4, 4)]  # row and column of a corner, from the window's first
        return sum(
            kernel(padded[..., i : i + h, j : j + w]) for kernel, (i, j) in zip(self.corners, places, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.predict(x))
        return x * self.weigh(x.mean((2, 3)))[..., None, None]


def _double(*widths: int) -> nn.Sequential:
    """Two convolutions 3 x 3 with batch norm and ReLU: (in, out) or (in, between, out)."""
    first, last = widths[0], widths[-1]
    between = widths[1] if len(widths) == 3 else last
    return nn.Sequential(*_conv(first, between), *_conv(between, last))


def _conv(c_in: int, c_out: int) -> Sequence[nn.Module]:
    return nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()


def _up(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), *_conv(c_in, c_out))


def _initial(module: nn.Module) -> None:
    """Weights as the code draws them at first."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0, 0.02)
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


def _two_drops(done: float) -> float:
    return 1.0 if done < 0.8 else 0.2 if done < 0.9 else 0.04
