"""MKD: a small network imitates a pretrained one on normal images, at several depths; elsewhere the two disagree.

Salehi et al. 2021, "Multiresolution Knowledge Distillation for Anomaly Detection" (CVPR, arXiv 2011.11108); *code* is
rohban-lab/Knowledge_Distillation_AD. Offline EfficientNet-Lite0 takes the place of VGG-16, and the record says so. Its
maps may be negative, which a network that ends in ReLU cannot imitate: they pass a ReLU too, as those of VGG-16 have.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitad.backbones import LITE0, cnn
from vitad.blocks import gaussian_blur
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.randomness import seeded
from vitad.training import Phase

PAPER = "Salehi et al. 2021, MKD, CVPR, 14902-14912, arXiv 2011.11108"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the authors' code."""

    backbone: str = "vgg16.tv_in1k"  # code
    pretrained: bool = True  # code
    strides: tuple[int, ...] = (2, 4, 8, 16)  # code: of the maps that are pooled; the first is left out of the score
    image_size: int = 128  # code
    width: int = 16  # code: channels of the cloner within a stage
    lambda_mse: float = 0.5  # code: of the squared error, beside the cosine; on MVTec AD
    map: Literal["guided", "gradients", "features"] = "guided"  # code
    epochs: int = 601  # code
    batch_size: int = 64  # code
    lr: float = 1e-3  # code
    sigma: float = 4.0  # code, px: smoothing of the map
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # Guided gradients are made for a plain chain of convolutions and ReLUs, which Lite0 is not.
    "small": {"backbone": LITE0, "map": "features", "epochs": 60, "batch_size": 16},
    "demo": {"backbone": LITE0, "map": "features", "epochs": 30, "batch_size": 16},
    "smoke": {
        "backbone": "test_resnet",
        "pretrained": False,
        "strides": (2, 4, 8),
        "image_size": 64,
        "width": 8,
        "map": "features",
        "epochs": 2,
        "batch_size": 16,
        "sigma": 1.0,
        "amp": False,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}, "gradients": {"map": "gradients"}}


class Model(Method):
    """Source, cloner, disagreement. `weights` is the source of the CNN's weights, as in `backbones.cnn`."""

    settings: Settings

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        if len(s.strides) < 2 or s.strides[0] < 2 or any(b != 2 * a for a, b in pairwise(s.strides)):
            raise UserError(f"strides={s.strides} have to begin at 2 or more and double, such as (2, 4, 8, 16).")
        if s.image_size % (2 * s.strides[-1]):
            raise UserError(
                f"image_size={s.image_size} has to be a multiple of {2 * s.strides[-1]} with these strides."
            )
        self.source, self.weights = cnn(s.backbone, s.strides, weights if s.pretrained else "random")
        with seeded(self.seed, "cloner"):
            self.cloner = Cloner(self.source.channels, s.strides[0], s.width)
        for layer in self.source.modules():
            if hasattr(layer, "inplace"):
                layer.inplace = False  # the gradient of a ReLU that overwrites its input cannot be guided
        self.protocol = {
            "normalisation": self.source.normalisation,
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": "mean of the map",
            "checkpoint": "last epoch",
        }
        if s.backbone != Settings.backbone:
            self.protocol["substitute"] = f"{s.backbone} for {Settings.backbone}"

    def pairs(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Images (B,3,S,S) -> maps of the source and of the cloner, (B,C,h,w) each, by descending side."""
        target = [F.max_pool2d(F.relu(m), 2).float() for m in self.source(images)]
        return list(zip(target, [m.float() for m in self.cloner(images)], strict=True))

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """1 - cosine of the flattened maps, and the squared error, summed over depths."""
        pairs = self.pairs(batch["image"])
        cosine, mse = (torch.stack(terms, 1).sum(1).mean() for terms in zip(*map(disagreement, pairs), strict=True))
        return {"cosine": cosine, "mse": self.settings.lambda_mse * mse}

    def score(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> (B,): the loss of each image, without the first depth."""
        terms = [disagreement(pair) for pair in self.pairs(images)[1:]]
        return torch.stack([cosine + self.settings.lambda_mse * mse for cosine, mse in terms]).sum(0)

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S), smoothed."""
        with torch.autocast(images.device.type, enabled=False):
            maps = self.by_place(images) if self.settings.map == "features" else self.by_gradient(images)
        return gaussian_blur(maps, self.settings.sigma)

    def by_place(self, images: Tensor) -> Tensor:
        """1 - cosine and squared error of each place, upsampled and summed over depths (ours)."""
        maps = torch.zeros_like(images[:, :1])
        for source, clone in self.pairs(images)[1:]:
            mse = self.settings.lambda_mse * (source - clone).square().mean(1, keepdim=True)
            place = 1 - F.cosine_similarity(source, clone, dim=1)[:, None] + mse
            maps = maps + F.interpolate(place, images.shape[-2:], mode="bilinear", align_corners=False)
        return maps[:, 0].clamp_min(0)

    def by_gradient(self, images: Tensor) -> Tensor:
        """abs(d score / d image), summed over channels, scaled so that its mean is the score: the paper's image score.

        Guided, no ReLU lets a negative gradient back. The code scales each image's map to 0-1 in place of this.
        """
        hooks = []
        if self.settings.map == "guided":
            relus = [m for m in self.modules() if isinstance(m, nn.ReLU | nn.ReLU6)]
            hooks = [m.register_full_backward_hook(lambda _, into, __: (into[0].clamp_min(0),)) for m in relus]
        with torch.enable_grad():
            x = images.detach().clone().requires_grad_(True)
            score = self.score(x)
            score.sum().backward(inputs=[x])  # and not grad(), which what counts operations cannot follow
        for hook in hooks:
            hook.remove()
        assert x.grad is not None, "the score depends on it"
        maps = x.grad.abs().sum(1)
        mean = maps.mean((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        return maps / mean * score.detach()[:, None, None]

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): the mean."""
        return maps.mean((1, 2))

    def phases(self) -> list[Phase]:
        """One phase of a fixed number of epochs."""
        s = self.settings
        return [Phase("train", list(self.cloner.parameters()), s.epochs, s.batch_size, s.lr)]


class Cloner(nn.Module):
    """A thin copy of VGG-16: images (B,3,S,S) -> maps with the given channels, each half as large as the one before."""

    def __init__(self, channels: list[int], stride: int, width: int):
        super().__init__()
        self.stages = nn.ModuleList()
        before = 3
        blocks = [[width] * 2]
        blocks += [[width] * 2] * (stride.bit_length() - 2)  # until the maps have the stride of the first one
        wide = [[*[width] * (1 if i == 0 else 2), c] for i, c in enumerate(channels)]
        for block in [*blocks, *wide]:
            layers: list[nn.Module] = []
            for i, c in enumerate(block):
                layers.append(nn.Conv2d(before, c, 3, padding=1, bias=False))
                nn.init.xavier_uniform_(layers[-1].weight)
                if i + 1 < len(block):
                    layers.append(nn.BatchNorm2d(c))
                layers.append(nn.ReLU())
                before = c
            self.stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        self.first = len(blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The outputs of the last stages, one for each of the channels."""
        x, found = images, []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found[self.first :]


def disagreement(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two maps (B,C,h,w) -> 1 - cosine of them, flattened, and their mean squared error: (B,) each."""
    source, clone = (m.flatten(1) for m in pair)
    return 1 - F.cosine_similarity(source, clone, dim=1), (source - clone).square().mean(1)
