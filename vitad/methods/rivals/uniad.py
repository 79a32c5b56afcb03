"""UniAD: a transformer rebuilds the features of a CNN, and is kept from copying them.

You et al. 2022, "A Unified Model for Multi-class Anomaly Detection", NeurIPS, arXiv 2206.03687. *Code* below is that of
the authors, zhiyuanyou/UniAD. Offline the CNN is EfficientNet-Lite0, a substitute that the record names.

    image -> frozen CNN -> features at one grid -> encoder -> decoder, from learned queries -> features, rebuilt
    anomaly map = distance of what was seen and what was rebuilt

Three things prevent a copy: no place attends to its own neighbourhood, each layer of the decoder starts from queries
that do not depend on the image, and the features that go in are jittered while those to be rebuilt are not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vitad.backbones import LITE0, cnn
from vitad.data.samples import ImageSet
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.processes import drawn
from vitad.randomness import generator, next_seed, seeded
from vitad.training import Phase, autocast
from vitad.transfer import to_device

PAPER = "You et al. 2022, UniAD, NeurIPS, arXiv 2206.03687"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the authors' code; *ours* marks what differs."""

    backbone: str = "tf_efficientnet_b4.aa_in1k"  # code: EfficientNet-B4; ours: which of its weights
    pretrained: bool = True  # code
    image_size: int = 224  # code
    strides: tuple[int, ...] = (2, 4, 8, 16)  # code: stages 1 to 4, 272 channels in all
    grid: int = 14  # code: places along a side
    standardise: bool = False  # ours; True: each channel by its spread over the training images
    width: int = 256  # code
    depth: int = 4  # code: layers of the encoder, and as many of the decoder
    heads: int = 8  # code
    dropout: float = 0.1  # code
    window: int = 7  # code: a place does not attend to so many rows and columns around itself
    jitter: float = 20.0  # code: noise that is added to the features
    cache: bool = False  # ours; True: keep the features of the training images
    epochs: int = 1000  # code
    batch_size: int = 8  # code: on each GPU
    lr: float = 1e-4  # code: AdamW; a tenth of it from 80 % of the steps
    weight_decay: float = 1e-4  # code
    clip: float = 0.1  # code: largest norm of the gradient
    pool: int = 16  # code: the score is the maximum of the map's mean over so many px
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # For two cores: a small CNN, whose features are kept, a quarter of the transformer, few epochs.
    "small": {
        "backbone": LITE0,
        "standardise": True,
        "width": 128,
        "depth": 2,
        "window": 5,
        "cache": True,
        "epochs": 100,
        "batch_size": 16,
        "lr": 4e-4,
    },
    "demo": {
        "backbone": LITE0,
        "standardise": True,
        "width": 128,
        "depth": 2,
        "window": 5,
        "cache": True,
        "epochs": 60,
        "lr": 1e-3,
    },
    "smoke": {
        "backbone": "test_resnet",
        "pretrained": False,
        "image_size": 64,
        "strides": (4, 8, 16),
        "grid": 8,
        "standardise": True,
        "width": 32,
        "depth": 1,
        "heads": 2,
        "window": 3,
        "cache": True,
        "epochs": 2,
        "pool": 4,
        "amp": False,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no_mask": {"window": 0},
    "no_jitter": {"jitter": 0.0},
}
CACHE_BYTES = 8 * 2**30  # limit of the features that are kept in the host's memory


class Model(Method):
    """Features, losses and score, in that order. `weights` is the source of the CNN's, as in `backbones.cnn`."""

    settings: Settings
    mean: Tensor
    std: Tensor

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        with seeded(self.seed, "backbone"):
            self.backbone, self.weights = cnn(s.backbone, s.strides, weights if s.pretrained else "random")
        C = sum(self.backbone.channels)
        if not s.heads or s.width % (2 * s.heads):
            raise UserError(f"width={s.width} has to be a multiple of twice the number of heads={s.heads}.")
        if s.window and (not s.window % 2 or s.window >= s.grid):  # else the middle has nothing to attend to
            raise UserError(f"window={s.window} has to be odd and below grid={s.grid}, or 0.")
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("std", torch.ones(C))
        with seeded(self.seed, "transformer"):
            self.transformer = Transformer(C, s.grid, s.width, s.depth, s.heads, s.dropout, s.window)
        self.cache: Tensor | None = None  # (n,N,C) half, from prepare()
        self.protocol = {
            "normalisation": self.backbone.normalisation,
            "smoothing": "none",
            "image_score": f"maximum of the map's mean over {s.pool} x {s.pool} px",
            "checkpoint": "last epoch",
        }
        if s.backbone != Settings.backbone:
            self.protocol["substitute"] = f"{s.backbone} for {Settings.backbone}"

    def features(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> features (B,N,C) of all maps at one grid, standardised where asked."""
        return (self._raw(images) - self.mean) / self.std

    @torch.no_grad()
    def _raw(self, images: Tensor) -> Tensor:
        side = (self.settings.grid, self.settings.grid)
        with autocast(images.device, self.settings.amp):
            maps = self.backbone(images)
        maps = [F.interpolate(m.float(), side, mode="bilinear", align_corners=True) for m in maps]
        return torch.cat(maps, 1).flatten(2).mT

    @torch.no_grad()
    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Measure the channels, and keep the features of the training images, as far as these are asked for."""
        s, n, C = self.settings, len(images), len(self.mean)
        self.cache = None
        if not (s.cache or s.standardise):
            return
        keep = s.cache and 2 * n * s.grid**2 * C <= CACHE_BYTES
        kept, total, squares = [], torch.zeros(C, dtype=torch.double), torch.zeros(C, dtype=torch.double)
        for i in tqdm(range(0, n, s.batch_size), "features", unit="batch", leave=False):
            raw = self._raw(images.batch(range(i, min(i + s.batch_size, n)), device)["image"]).cpu()
            total += raw.double().sum((0, 1))
            squares += raw.double().square().sum((0, 1))
            kept += [raw.half()] if keep else []
        if s.standardise:
            mean = total / (n * s.grid**2)
            self.mean.copy_(mean)
            self.std.copy_((squares / (n * s.grid**2) - mean.square()).clamp_min(1e-6).sqrt())
        self.cache = torch.cat(kept) if keep else None

    def fill_for_timing(self) -> None:
        """Keep random features of one image."""
        if self.settings.cache:
            with torch.device("cpu"):  # as the cache is
                self.cache = torch.randn(1, self.settings.grid**2, len(self.mean), dtype=torch.half)

    def noise(self, f: Tensor, batch: dict[str, Any]) -> Tensor:
        """N(0,1) for each number of the features (B,N,C)."""
        random = generator(next_seed(), "jitter")
        return to_device(drawn(batch, lambda B: torch.randn(B, *f.shape[1:], generator=random)), f.device)

    def jittered(self, f: Tensor, batch: dict[str, Any]) -> Tensor:
        """Features (B,N,C) with noise: its spread at a place is the length of the vector there, / C, times `jitter`."""
        return f + self.noise(f, batch) * f.norm(dim=-1, keepdim=True) / f.shape[-1] * self.settings.jitter

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Squared error of the features that are rebuilt from jittered ones."""
        if self.training and self.cache is not None:
            raw = to_device(self.cache[batch["index"]], batch["image"].device).float()
            f = (raw - self.mean) / self.std
        else:
            f = self.features(batch["image"])
        given = self.jittered(f, batch) if self.training and self.settings.jitter else f
        return {"mse": F.mse_loss(self.transformer(given).float(), f)}

    def phases(self) -> list[Phase]:
        """One phase, for the transformer."""
        s = self.settings
        return [
            Phase(
                "train",
                list(self.transformer.parameters()),
                s.epochs,
                s.batch_size,
                s.lr,
                torch.optim.AdamW,
                weight_decay=s.weight_decay,
                clip=s.clip,
                schedule=lambda done: 1.0 if done < 0.8 else 0.1,
            )
        ]

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): distance of the features and the rebuilt ones, upsampled."""
        f, side = self.features(images), self.settings.grid
        distance = (f - self.transformer(f).float()).norm(dim=-1)  # (B,N)
        grid = distance.view(-1, 1, side, side)
        return F.interpolate(grid, images.shape[-2:], mode="bilinear", align_corners=True)[:, 0]

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): maximum of the mean over a window."""
        return F.avg_pool2d(maps[:, None], self.settings.pool, 1).amax((1, 2, 3))


class Transformer(nn.Module):
    """Features (B,N,C) -> features, rebuilt. Norms come after each part, positions are added to queries and keys."""

    blind: Tensor  # (N,N) bool

    def __init__(self, channels: int, grid: int, width: int, depth: int, heads: int, dropout: float, window: int):
        super().__init__()
        self.project = nn.Linear(channels, width)
        self.rows = nn.Parameter(torch.empty(grid, width // 2))
        self.columns = nn.Parameter(torch.empty(grid, width // 2))
        self.encoder = nn.ModuleList(Layer(width, heads, dropout) for _ in range(depth))
        self.decoder = nn.ModuleList(Layer(width, heads, dropout, grid**2) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        self.register_buffer("blind", neighbours(grid, window), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, f: Tensor) -> Tensor:
        grid = len(self.rows)
        rows, columns = self.rows[:, None].expand(-1, grid, -1), self.columns.expand(grid, -1, -1)
        place = torch.cat([rows, columns], -1).flatten(0, 1)  # (N,width)
        seen = self.project(f)
        for layer in self.encoder:
            seen = layer([seen], place, self.blind)
        x = seen
        for layer in self.decoder:
            x = layer([seen, x], place, self.blind)
        return self.head(x)


class Layer(nn.Module):
    """Tokens (B,N,D) attend to each other; in the decoder learned ones, as many as `queries`, to two others in turn."""

    def __init__(self, width: int, heads: int, dropout: float, queries: int = 0):
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width)) if queries else None
        n = 2 if queries else 1
        attend = (nn.MultiheadAttention(width, heads, dropout, batch_first=True) for _ in range(n))
        self.attention = nn.ModuleList(attend)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(n + 1))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, others: list[Tensor], place: Tensor, blind: Tensor) -> Tensor:
        x = others[0] if self.query is None else self.query.expand_as(others[0])
        for attend, norm, other in zip(self.attention, self.norms, others, strict=False):
            found, _ = attend(x + place, other + place, other, attn_mask=blind, need_weights=False)
            x = norm(x + self.dropout(found))
        return self.norms[-1](x + self.dropout(self.mlp(x)))


def neighbours(grid: int, window: int) -> Tensor:
    """(N,N) bool: whether two places of a grid are so near that one lies in the window around the other."""
    place = torch.arange(grid)
    near = (place[:, None] - place).abs() <= window // 2 if window else torch.zeros(grid, grid, dtype=torch.bool)
    return (near[:, None, :, None] & near[None, :, None, :]).reshape(grid**2, grid**2)
