"""PaDiM: a Gaussian at every place of the image, over the features of a CNN, with nothing trained.

Defard et al. 2020, "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization", ICPR
workshops, arXiv 2011.08785. There is no code of the authors; *code* below is that of xiahaifeng1995, which is widely
used. The paper itself was not read. Offline the CNN is EfficientNet-Lite0, a substitute that the record names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vitad.backbones import LITE0, cnn
from vitad.blocks import gaussian_blur
from vitad.data.samples import ImageSet
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.randomness import generator
from vitad.training import autocast

PAPER = "Defard et al. 2020, PaDiM, ICPR workshops, arXiv 2011.08785"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the widely used code; *ours* marks what differs."""

    backbone: str = "resnet18.tv_in1k"  # code; it offers wide_resnet50_2 as well, with 550 channels
    pretrained: bool = True  # code
    image_size: int = 224  # code: the centre of 256 px; ours: the whole frame
    strides: tuple[int, ...] = (4, 8, 16)  # code: layers 1 to 3
    grid: int = 4  # code: px of a place, those of layer 1
    channels: int = 100  # code: drawn at random from all, once
    ridge: float = 0.01  # code: added to the variances
    shared: bool = False  # ours; True: one Gaussian for all places, for objects that lie anyhow
    sigma: float = 4.0  # code: smoothing of the map, px
    batch_size: int = 16
    amp: bool = False  # ours: mixed precision costs the covariances their digits


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"backbone": LITE0, "grid": 8},
    "demo": {"backbone": LITE0, "grid": 8},
    "smoke": {
        "backbone": "test_resnet",
        "pretrained": False,
        "image_size": 64,
        "grid": 8,
        "channels": 20,
        "sigma": 1.0,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "shared": {"shared": True},
}
CHUNK = 64  # places whose covariances are factorised at a time, which limits the memory


class Model(Method):
    """Features, Gaussians, distance, in that order. `weights` is the source of the CNN's, as in `backbones.cnn`."""

    settings: Settings
    chosen: Tensor  # (C,): the channels that are kept
    mean: Tensor  # (P,C); P = 1 where all places share a Gaussian
    whiten: Tensor  # (P,C,C): inverse of the Cholesky factor of each covariance
    spread: Tensor  # mean variance of a channel, beside which `ridge` is small or not

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        self.backbone, self.weights = cnn(s.backbone, s.strides, weights if s.pretrained else "random")
        there = sum(self.backbone.channels)
        if not 1 <= s.channels <= there:
            raise UserError(f"channels={s.channels}: the maps of {s.backbone} have {there} in all.")
        if s.grid < 1 or s.image_size % s.grid:
            raise UserError(f"grid={s.grid} does not divide image_size={s.image_size}.")
        self.side = s.image_size // s.grid
        places = 1 if s.shared else self.side**2
        chosen = torch.randperm(there, generator=generator(self.seed, "channels"))[: s.channels].sort().values
        self.register_buffer("chosen", chosen)
        self.register_buffer("mean", torch.zeros(places, s.channels))
        self.register_buffer("whiten", torch.zeros(places, s.channels, s.channels))
        self.register_buffer("spread", torch.zeros(()))
        self.protocol = {
            "normalisation": self.backbone.normalisation,
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": "maximum of the map",
            "checkpoint": "nothing is trained",
        }
        if s.backbone != Settings.backbone:
            self.protocol["substitute"] = f"{s.backbone} for {Settings.backbone}"

    def features(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> (P,B,C), or (1,B·P,C) where all places share a Gaussian.

        Each map is brought to the grid: a coarser one repeats its cells, of a finer one the cells are averaged.
        """
        with autocast(images.device, self.settings.amp):
            maps = self.backbone(images)
        grid = torch.cat([F.adaptive_avg_pool2d(m.float(), self.side) for m in maps], 1)[:, self.chosen]  # (B,C,h,w)
        x = grid.flatten(2)  # (B,C,P)
        return x.mT.flatten(0, 1)[None] if self.settings.shared else x.permute(2, 0, 1)

    @torch.no_grad()
    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Mean and covariance of the training images, divisor n - 1, a batch at a time (Chan et al. 1979)."""
        s, n = self.settings, 0
        mean, scatter = torch.zeros_like(self.mean), torch.zeros_like(self.whiten)
        for i in tqdm(range(0, len(images), s.batch_size), "Gaussians", unit="batch", leave=False):
            x = self.features(images.batch(range(i, min(i + s.batch_size, len(images))), device)["image"])  # (P,m,C)
            m = x.shape[1]
            centre = x.mean(1)  # (P,C)
            step = (n * m / (n + m)) ** 0.5 * (centre - mean)  # what the two means differ in counts as one more row
            rows = torch.cat([x - centre[:, None], step[:, None]], 1)  # (P,m+1,C)
            scatter.baddbmm_(rows.mT, rows)
            mean += m / (n + m) * (centre - mean)
            n += m
        if n < 2:
            raise UserError("one training image has no covariance: padim needs two at least.")
        covariance = scatter / (n - 1)
        self.mean, self.spread = mean, covariance.diagonal(dim1=1, dim2=2).mean()
        ridge = s.ridge * torch.eye(s.channels, device=device)
        for part, out in zip(covariance.split(CHUNK), self.whiten.split(CHUNK), strict=True):
            factor, failed = torch.linalg.cholesky_ex(part + ridge)
            if failed.any():
                raise UserError(f"ridge={s.ridge} leaves covariances of {n} samples singular. Raise it.")
            out.copy_(torch.linalg.solve_triangular(factor, torch.eye(s.channels, device=device), upper=False))

    def observe(self, images: ImageSet, device: torch.device) -> dict[str, int | float]:
        """Mean variance of a channel, to hold `ridge` against."""
        return {"mean_variance": float(self.spread)}

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): Mahalanobis distance at each place, upsampled, smoothed."""
        B = len(images)
        with torch.autocast(images.device.type, enabled=False):
            centred = self.features(images) - self.mean[:, None]  # (P,B,C)
            distance = (centred @ self.whiten.mT).norm(dim=-1)  # sqrt((f - mu)^T Sigma^-1 (f - mu))
        rows = distance.view(B, -1) if self.settings.shared else distance.T
        grid = rows.reshape(B, 1, self.side, self.side)
        maps = F.interpolate(grid, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return gaussian_blur(maps, self.settings.sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): the maximum."""
        return maps.amax((1, 2))
