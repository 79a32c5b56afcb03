"""DFR: an autoencoder of the features of a CNN, place by place. What does not fit its bottleneck is anomalous.

Shi et al. 2021, "Unsupervised anomaly segmentation via deep feature reconstruction" (Neurocomputing 424, 9-22, arXiv
2012.07122); *code* is YoungGod/DFR. It stacks twelve maps of VGG-19; here it is the last map of each depth. Offline
EfficientNet-Lite0 takes the place of VGG-19, and the record says so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitad.backbones import LITE0, cnn
from vitad.blocks import gaussian_blur
from vitad.data.samples import ImageSet
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.randomness import generator, seeded
from vitad.training import Phase

PAPER = "Shi et al. 2021, DFR, Neurocomputing 424, 9-22, arXiv 2012.07122"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the authors' code."""

    backbone: str = "vgg19.tv_in1k"  # code
    pretrained: bool = True  # code
    strides: tuple[int, ...] = (1, 2, 4, 8)  # code: maps after each ReLU up to stride 8; ours: the last of a stride
    image_size: int = 256  # code
    grid: int = 4  # code: px of a place
    variance: float = 0.9  # code: share that the principal components hold whose number is the bottleneck's width
    epochs: int = 700  # code
    batch_size: int = 4  # code
    lr: float = 1e-4  # code
    sigma: float = 0.0  # code, px: the map is not smoothed
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "backbone": LITE0,
        "strides": (4, 8, 16),
        "image_size": 224,
        "grid": 8,
        "epochs": 40,
        "lr": 1e-3,
        "sigma": 4.0,
    },
    "demo": {
        "backbone": LITE0,
        "strides": (4, 8, 16),
        "image_size": 128,
        "grid": 8,
        "epochs": 30,
        "lr": 1e-3,
        "sigma": 2.0,
    },
    "smoke": {
        "backbone": "test_resnet",
        "pretrained": False,
        "strides": (4, 8),
        "image_size": 64,
        "grid": 8,
        "epochs": 2,
        "amp": False,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}}
LOOKED_AT = 10  # code: training images whose features have their principal components counted


class Model(Method):
    """Features, autoencoder, error. `weights` is the source of the CNN's weights, as in `backbones.cnn`."""

    settings: Settings

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        self.backbone, self.weights = cnn(s.backbone, s.strides, weights if s.pretrained else "random")
        if s.grid < 1 or s.image_size % s.grid:
            raise UserError(f"grid={s.grid} does not divide image_size={s.image_size}.")
        if not 0 < s.variance <= 1:
            raise UserError(f"variance={s.variance} has to be above 0 and at most 1.")
        self.side = s.image_size // s.grid
        self.channels = sum(self.backbone.channels)
        self.build(max(1, self.channels // 10))  # until `prepare` has counted
        self.protocol = {
            "normalisation": self.backbone.normalisation,
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": "maximum of the map",
            "checkpoint": "last epoch",
        }
        if s.backbone != Settings.backbone:
            self.protocol["substitute"] = f"{s.backbone} for {Settings.backbone}"

    def build(self, latent: int) -> None:
        """A new autoencoder of 1 x 1 convolutions with `latent` channels in the middle."""
        C = self.channels
        widths = [C, (C + 2 * latent) // 2, 2 * latent, latent, 2 * latent, (C + 2 * latent) // 2, C]
        with seeded(self.seed, "autoencoder"):
            layers: list[nn.Module] = []
            for number, (c_in, c_out) in enumerate(zip(widths, widths[1:], strict=False)):
                layers.append(nn.Conv2d(c_in, c_out, 1))
                if number not in (2, 5):  # the bottleneck and the output are linear
                    layers += [nn.BatchNorm2d(c_out), nn.ReLU()]
            self.autoencoder = nn.Sequential(*layers)
        self.latent = latent

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> (B,C,h,w): all maps brought to one grid, the finer ones averaged."""
        maps = [m.float() for m in self.backbone(images)]
        grid = [
            F.adaptive_avg_pool2d(m, self.side)
            if m.shape[-1] >= self.side
            else F.interpolate(m, (self.side, self.side), mode="bilinear", align_corners=False)
            for m in maps
        ]
        return torch.cat(grid, 1)

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Count the principal components of the features of a few training images, and build the autoencoder."""
        n = min(LOOKED_AT, len(images))
        some = torch.randperm(len(images), generator=generator(self.seed, "looked at"))[:n].sort().values
        x = self.features(images.batch(some.numpy(), device)["image"])
        self.build(components(x.transpose(0, 1).flatten(1).T.cpu(), self.settings.variance))
        self.autoencoder.to(device)

    def observe(self, images: ImageSet, device: torch.device) -> dict[str, int | float]:
        """Width of the bottleneck."""
        return {"latent": self.latent}

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The squared error of the features."""
        x = self.features(batch["image"])
        return {"mse": (self.autoencoder(x).float() - x).square().mean()}

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): squared error of each place, mean over channels, upsampled."""
        x = self.features(images)
        error = (self.autoencoder(x).float() - x).square().mean(1, keepdim=True)
        maps = F.interpolate(error, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return gaussian_blur(maps, self.settings.sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): the maximum."""
        return maps.amax((1, 2))

    def phases(self) -> list[Phase]:
        """One phase of a fixed number of epochs."""
        s = self.settings
        return [Phase("train", list(self.autoencoder.parameters()), s.epochs, s.batch_size, s.lr)]

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        widths = [v.shape[0] for k, v in state.items() if k.startswith(f"{prefix}autoencoder.") and v.ndim == 4]
        if widths and min(widths) != self.latent:  # its width depends on the data
            device = next(self.autoencoder.parameters()).device
            self.build(min(widths))
            self.autoencoder.to(device)
        super()._load_from_state_dict(state, prefix, *rest)


def components(x: Tensor, variance: float) -> int:
    """How many principal components of the rows of x (n,C) hold this share of their variance, at least one."""
    share = torch.linalg.eigvalsh(torch.cov(x.double().T)).clamp_min(0).flip(0).cumsum(0)
    return int((share < (variance - 1e-9) * share[-1]).sum()) + 1
