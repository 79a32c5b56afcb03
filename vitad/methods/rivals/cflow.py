"""CFLOW-AD: the likelihood of a CNN's features, place by place, under normalising flows that are told the place.

Gudovskiy et al. 2022, "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via Conditional Normalizing
Flows" (WACV, arXiv 2107.12571); *code* is gudovskiy/cflow-ad with the blocks of FrEIA. It picks the best epoch on the
test set, for each metric another; here it is the last. Offline EfficientNet-Lite0 takes the place of WideResNet-50, and
the record says so.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitad.backbones import LITE0, cnn
from vitad.blocks import gaussian_blur
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.randomness import seeded
from vitad.training import Phase, autocast, warm_up_then_cosine

PAPER = "Gudovskiy et al. 2022, CFLOW-AD, WACV, 98-107, arXiv 2107.12571"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the authors' code."""

    backbone: str = "wide_resnet50_2.tv_in1k"  # code
    pretrained: bool = True  # code
    strides: tuple[int, ...] = (8, 16, 32)  # code: layers 2 to 4, a flow for each
    image_size: int = 256  # code: 128, 256 or 512, for each category another
    couplings: int = 8  # code
    condition: int = 128  # code: numbers that say where a place is
    epochs: int = 200  # code: 25 times 8, with turns of up to 5 degrees; ours: without
    batch_size: int = 2  # ours: all places of these images in a step; code: 256 places of 32 images
    lr: float = 2e-4  # code
    warm_up: float = 0.08  # code: two of 25; share of the steps, then a cosine
    sigma: float = 4.0  # code, px: smoothing of the map
    amp: bool = False  # ours; True: mixed precision for the features


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "backbone": LITE0,
        "strides": (8, 16),
        "image_size": 224,
        "couplings": 4,
        "condition": 32,
        "epochs": 10,
        "lr": 1e-3,
    },
    "demo": {
        "backbone": LITE0,
        "strides": (8, 16),
        "image_size": 128,
        "couplings": 4,
        "condition": 32,
        "epochs": 15,
        "lr": 1e-3,
        "sigma": 2.0,
    },
    "smoke": {
        "backbone": "test_resnet",
        "pretrained": False,
        "strides": (8, 16),
        "image_size": 64,
        "couplings": 2,
        "condition": 8,
        "epochs": 2,
        "lr": 1e-2,  # in so few steps a smaller one leaves a map that is all but constant
        "sigma": 1.0,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}}


class Model(Method):
    """Features, flows, likelihood. `weights` is the source of the CNN's weights, as in `backbones.cnn`."""

    settings: Settings

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        if s.couplings < 1:
            raise UserError(f"couplings={s.couplings} has to be at least 1.")
        if s.condition < 4 or s.condition % 4:
            raise UserError(f"condition={s.condition} has to be a multiple of 4: sine and cosine of row and column.")
        self.backbone, self.weights = cnn(s.backbone, s.strides, weights if s.pretrained else "random")
        with seeded(self.seed, "flows"):
            self.flows = nn.ModuleList(Flow(C, s.condition, s.couplings) for C in self.backbone.channels)
        self.protocol = {
            "normalisation": self.backbone.normalisation,
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": "maximum of the map",
            "checkpoint": "last epoch",
        }
        if s.backbone != Settings.backbone:
            self.protocol["substitute"] = f"{s.backbone} for {Settings.backbone}"

    def surprise(self, images: Tensor) -> list[Tensor]:
        """Images (B,3,S,S) -> (B,h,w) at each stride: -log sigmoid(log p / C), above 0 and near it where p is high."""
        found = []
        with autocast(images.device, self.settings.amp):
            maps = [x.float() for x in self.backbone(images)]
        with torch.autocast(images.device.type, enabled=False):  # a likelihood needs all its digits
            for x, flow in zip(maps, self.flows, strict=True):
                B, C, h, w = x.shape
                where = places(h, w, self.settings.condition, x.device).repeat(B, 1)  # (B*h*w,condition)
                log_p = flow.log_likelihood(x.permute(0, 2, 3, 1).reshape(-1, C), where)
                found.append(-F.logsigmoid(log_p / C).view(B, h, w))
        return found

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean surprise of each flow."""
        surprise = self.surprise(batch["image"])
        return {f"flow{stride}": x.mean() for stride, x in zip(self.backbone.strides, surprise, strict=True)}

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): surprise, upsampled and summed over the strides, smoothed.

        Ours: the code takes exp(log p / C), scaled by its maximum over the test set.
        """
        up = [
            F.interpolate(x[:, None], images.shape[-2:], mode="bilinear", align_corners=False)
            for x in self.surprise(images)
        ]
        return gaussian_blur(torch.stack(up).sum(0)[:, 0], self.settings.sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): the maximum."""
        return maps.amax((1, 2))

    def phases(self) -> list[Phase]:
        """One phase of a fixed number of epochs, for all flows."""
        s, schedule = self.settings, warm_up_then_cosine(self.settings.warm_up)
        return [Phase("train", list(self.flows.parameters()), s.epochs, s.batch_size, s.lr, schedule=schedule)]


class Flow(nn.Module):
    """Coupling blocks in a row: an invertible map of rows (n,C), given conditions (n,c), onto the standard normal."""

    def __init__(self, channels: int, condition: int, couplings: int):
        super().__init__()
        self.blocks = nn.ModuleList(Coupling(channels, condition) for _ in range(couplings))

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """x (n,C) -> z (n,C) and log abs(det dz/dx) (n,)."""
        log_det = torch.zeros_like(x[:, 0])
        for block in self.blocks:
            x, more = block(x, condition)
            log_det = log_det + more
        return x, log_det

    def inverse(self, z: Tensor, condition: Tensor) -> Tensor:
        """z (n,C) -> x (n,C)."""
        for block in reversed(self.blocks):
            z = block.inverse(z, condition)
        return z

    def log_likelihood(self, x: Tensor, condition: Tensor) -> Tensor:
        """log p (n,) by change of variables: log N(z; 0, 1) + log abs(det dz/dx)."""
        z, log_det = self(x, condition)
        return -0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi) + log_det


class Coupling(nn.Module):
    """One half of the numbers says how the other is scaled and moved; then all are scaled, moved and turned.

    The form of FrEIA: the scale is clamped softly, the turn is a fixed random rotation.
    """

    turn: Tensor  # (C,C), orthogonal

    def __init__(self, channels: int, condition: int, clamp: float = 1.9):
        super().__init__()
        self.kept, self.clamp = channels // 2, clamp
        moved = channels - self.kept
        n = self.kept + condition
        self.subnet = nn.Sequential(nn.Linear(n, 2 * n), nn.ReLU(), nn.Linear(2 * n, 2 * moved))
        self.log_scale, self.shift = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        turn = torch.empty(channels, channels)
        self.register_buffer("turn", nn.init.orthogonal_(turn))

    def _affine(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of the second half, (n,C - C//2) each."""
        a, b = (0.1 * self.subnet(torch.cat([x, condition], 1))).chunk(2, 1)
        return self.clamp * a.tanh(), b

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """x (n,C) -> y (n,C) and log abs(det dy/dx) (n,)."""
        first, second = x[:, : self.kept], x[:, self.kept :]
        log_scale, shift = self._affine(first, condition)
        y = torch.cat([first, second * log_scale.exp() + shift], 1)
        return (y * self.log_scale.exp() + self.shift) @ self.turn, log_scale.sum(1) + self.log_scale.sum()

    def inverse(self, y: Tensor, condition: Tensor) -> Tensor:
        """y (n,C) -> x (n,C)."""
        x = (y @ self.turn.T - self.shift) * (-self.log_scale).exp()
        first, second = x[:, : self.kept], x[:, self.kept :]
        log_scale, shift = self._affine(first, condition)
        return torch.cat([first, (second - shift) * (-log_scale).exp()], 1)


def places(h: int, w: int, length: int, device: torch.device) -> Tensor:
    """(h*w,length): sines and cosines of the row and of the column, at wavelengths that grow from 2 pi to 20,000 pi."""
    n = length // 4
    rate = torch.exp(-math.log(10_000.0) * torch.arange(n, device=device) / n)
    rows, columns = torch.arange(h, device=device)[:, None] * rate, torch.arange(w, device=device)[:, None] * rate
    row, column = torch.cat([rows.sin(), rows.cos()], 1), torch.cat([columns.sin(), columns.cos()], 1)  # (h,2n), (w,2n)
    return torch.cat([row[:, None].expand(h, w, -1), column[None].expand(h, w, -1)], 2).reshape(h * w, length)
