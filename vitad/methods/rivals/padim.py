"""PaDiM: a Gaussian of pretrained features at each place, and how far a test image is from it; nothing is trained.

Defard et al. 2021, "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization" (ICPR 2020
workshops, arXiv 2011.08785). No official code exists; the settings are those of the widely used third-party code by
xiahaifeng1995. What departs from it: the whole image is seen, not its middle, and maps are not scaled by the test set.
Another network than the paper's, as where there is no model hub, is named a substitute in the record.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vitad.backbones import IMAGENET_MEAN, IMAGENET_STD, LITE0, cnn, normalise, pyramid, stages, substitute
from vitad.blocks import gaussian_blur
from vitad.data.samples import ImageSet
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.randomness import generator, seeded
from vitad.training import autocast

PAPER = "Defard et al. 2021, PaDiM, ICPR 2020 workshops, 475-489"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the third-party code; *ours* marks what differs."""

    backbone: str = "resnet18.tv_in1k"  # third-party code: ResNet-18, or WideResNet-50-2 as in the preset `wide`
    pretrained: bool = True  # third-party code
    image_size: int = 224  # third-party code, of 256 px the middle; ours: the whole image
    strides: tuple[int, ...] = (4, 8, 16)  # third-party code: outputs of the layers 1 to 3
    grid_stride: int = 4  # third-party code: places are those of layer 1
    channels: int = 100  # third-party code: drawn at random, once, of 448; 550 of 1792 with WideResNet-50-2
    shared: bool = False  # third-party code: a Gaussian for each place; ours: true, one for all places
    ridge: float = 0.01  # third-party code: added to the variances
    relative: bool = False  # third-party code; ours: true, `ridge` is a share of the mean variance of the features
    sigma: float = 4.0  # third-party code: smoothing of the map, px
    batch_size: int = 8  # ours
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "wide": {"backbone": "wide_resnet50_2.tv_in1k", "channels": 550},
    # With a substitute that a package index carries, whose features have another scale.
    "small": {"backbone": LITE0, "grid_stride": 8, "relative": True},
    "demo": {"backbone": LITE0, "image_size": 128, "relative": True, "sigma": 2.0},
    "smoke": {
        "backbone": "test_resnet",
        "pretrained": False,
        "image_size": 64,
        "channels": 20,
        "sigma": 1.0,
        "amp": False,
    },
}
# Whether the place tells what is normal, as where objects are aligned.
VARIANTS: dict[str, dict[str, Any]] = {"full": {}, "shared": {"shared": True}}
NETWORKS = ("resnet18", "wide_resnet50_2")  # third-party code
HELD_BYTES = 8 * 2**30  # limit of the covariances
CHUNK = 64  # places whose covariances are factored at a time: limits the memory


class Model(Method):
    """Frozen features, a Gaussian at each of P places of the grid, and score, in that order.

    `weights` is the source of the backbone's weights, as in `backbones.cnn`; without `pretrained` it is not used.
    """

    settings: Settings
    channels: Tensor  # (C,): which of the features are kept
    mean: Tensor  # (P,C)
    factor: Tensor  # (P,C,C): L of the covariance L Lᵀ, lower triangular

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        with seeded(self.seed, "backbone"):
            self.backbone, self.weights = cnn(s.backbone, weights if s.pretrained else "random")
        self.backbone.requires_grad_(False)
        known = stages(self.backbone)
        if not s.strides or not known.keys() >= {*s.strides}:
            raise UserError(f"strides={s.strides}: {s.backbone} has {', '.join(map(str, known))}.")
        self.strides = sorted(set(s.strides))
        total = sum(known[stride] for stride in self.strides)
        if not 1 <= s.channels <= total:
            raise UserError(f"channels={s.channels}: {s.backbone} has 1 to {total} at strides={s.strides}.")
        if s.grid_stride not in self.strides:
            raise UserError(f"grid_stride={s.grid_stride} has to be one of strides={s.strides}.")
        if s.image_size % self.strides[-1]:
            raise UserError(f"image_size={s.image_size} is not a multiple of the largest stride, {self.strides[-1]}.")
        self.side = s.image_size // s.grid_stride  # of the grid
        P, C = 1 if s.shared else self.side**2, s.channels
        if (size := 4 * P * C * C) > HELD_BYTES:
            raise UserError(
                f"channels={C}: covariances at {P} places take {size / 2**30:.1f} GiB, more than "
                f"{HELD_BYTES / 2**30:.1f}. Lower channels or image_size, or raise grid_stride."
            )
        chosen = torch.randperm(total, generator=generator(self.seed, "channels"))[:C].sort().values
        self.register_buffer("channels", chosen)
        self.register_buffer("mean", torch.zeros(P, C))
        self.register_buffer("factor", torch.zeros(P, C, C))
        card: Any = self.backbone.pretrained_cfg
        self.scale = tuple(card["mean"]), tuple(card["std"])
        self.protocol = {
            "normalisation": "imagenet"
            if self.scale == (IMAGENET_MEAN, IMAGENET_STD)
            else f"mean {self.scale[0]}, std {self.scale[1]}",
            "backbone": substitute(s.backbone, NETWORKS),
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": "maximum of the map",
            "checkpoint": "nothing is trained",
        }

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> features (P,B,C) at each place; with `shared` (1,places*B,C).

        Maps that are coarser than the grid are repeated (third-party code), finer ones averaged (ours).
        """
        self.backbone.eval()
        with autocast(images.device, self.settings.amp):
            maps = pyramid(self.backbone, normalise(images, *self.scale), self.strides)
        grid = [F.adaptive_avg_pool2d(m.float(), self.side) for m in maps]  # (B,C_i,side,side) each
        x = torch.cat(grid, 1)[:, self.channels].flatten(2).permute(2, 0, 1)  # (places,B,C)
        return x.flatten(0, 1)[None] if self.settings.shared else x

    @torch.no_grad()
    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Fit the Gaussians in one pass over the training images; only the sums are held.

        Sums are of differences from the running mean, so that nothing cancels. Raises `UserError`
        where there are too few images, or a covariance has no Cholesky factor.
        """
        s, n = self.settings, 0  # features seen at each place
        self.mean.zero_()
        scatter = self.factor.zero_()  # (P,C,C): sum of (f - mean)(f - mean)ᵀ, turned into L at the end
        for i in tqdm(range(0, len(images), s.batch_size), "Gaussians", unit="batch", leave=False):
            batch = images.batch(range(i, min(i + s.batch_size, len(images))), device)["image"]
            x = self.features(batch)  # (P,b,C)
            b, mean = x.shape[1], x.mean(1, keepdim=True)
            step = mean - self.mean[:, None]  # (P,1,C)
            x = torch.cat([x - mean, (n * b / (n + b)) ** 0.5 * step], 1)
            scatter.baddbmm_(x.mT, x)
            n += b
            self.mean += step[:, 0] * b / n
        if n < 2:
            raise UserError("a covariance needs at least two training images.")
        scatter /= n - 1
        ridge = s.ridge * (scatter.diagonal(dim1=1, dim2=2).mean() if s.relative else torch.ones((), device=device))
        for part in scatter.split(CHUNK):
            part.diagonal(dim1=1, dim2=2).add_(ridge)
            L, failed = torch.linalg.cholesky_ex(part.double())
            if failed.any():
                raise UserError(f"ridge={s.ridge} leaves a covariance of {n} features singular. Raise it.")
            part.copy_(L)

    def fill_for_timing(self) -> None:
        """The standard normal distribution at each place."""
        self.factor.diagonal(dim1=1, dim2=2).fill_(1)

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): Mahalanobis distance at each place, upsampled, smoothed."""
        x = self.features(images)
        with torch.autocast(images.device.type, enabled=False):  # half precision is too coarse for it
            white = torch.linalg.solve_triangular(self.factor, (x - self.mean[:, None]).mT, upper=False)  # (P,C,B)
        distance = white.norm(dim=1).reshape(-1, len(images)).T  # (B,places)
        grid = distance.reshape(-1, 1, self.side, self.side)
        maps = F.interpolate(grid, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return gaussian_blur(maps, self.settings.sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): the maximum."""
        return maps.amax((1, 2))
