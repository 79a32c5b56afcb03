"""patchknn: nearest neighbours among the patches of normal images, with nothing trained.

In the manner of PatchCore (Roth et al. 2022, CVPR, arXiv 2106.08265) with the tokens of a frozen DINOv2, as in
AnomalyDINO (Damm et al. 2025, WACV, arXiv 2405.14529). It shows what frozen features give without any learning, so it
is the reference for every trained method of the book.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vitad.backbones import DINOV2_S14, intermediate, normalise, vit
from vitad.blocks import gaussian_blur, top_mean
from vitad.data.samples import ImageSet
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.randomness import generator
from vitad.training import autocast

PAPER = "patchknn in the manner of Roth et al. 2022, PatchCore, and Damm et al. 2025, AnomalyDINO"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of AnomalyDINO; *ours* marks what differs."""

    backbone: str = DINOV2_S14  # AnomalyDINO
    pretrained: bool = True
    image_size: int = 448  # AnomalyDINO: shorter side; a square here
    blocks: tuple[int, ...] = (4, 6, 8)  # ours: middle blocks keep the detail that the last ones give up
    bank_size: int = 40_000  # ours: patches kept; all of them if there are fewer
    sampling: Literal["random", "coreset"] = "random"  # PatchCore: coreset, the greedy k-centre choice
    score: Literal["top1", "max"] = "top1"  # AnomalyDINO: mean of the highest 1 %; PatchCore: max
    sigma: float = 4.0  # both: smoothing of the map, px
    batch_size: int = 8
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"image_size": 224},
    "demo": {"image_size": 224, "bank_size": 10_000},
    "smoke": {
        "backbone": "test_vit",
        "pretrained": False,
        "image_size": 64,
        "blocks": (2, 4),
        "bank_size": 500,
        "amp": False,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}}
CHUNK = 8192  # patches of the bank that are compared at a time: limits the memory, keeps the matrix product large


class Model(Method):
    """Frozen features, memory bank and score, in that order.

    `weights` is the source of the backbone's weights, as in `backbones.vit`; without `pretrained` it is not used.
    """

    settings: Settings
    bank: Tensor  # (M,D), unit vectors

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        self.backbone, self.weights = vit(s.backbone, s.image_size, weights if s.pretrained else "random")
        self.backbone.requires_grad_(False)
        depth = len(self.backbone.blocks)
        if not s.blocks or not all(1 <= b <= depth for b in s.blocks):
            raise UserError(f"blocks={s.blocks}: {s.backbone} has blocks 1 to {depth}.")
        if s.bank_size < 1:
            raise UserError(f"bank_size={s.bank_size} has to be at least 1.")
        self.register_buffer("bank", torch.zeros(0, self.backbone.embed_dim))
        self.protocol = {
            "normalisation": "imagenet",
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": {"top1": "mean of the highest 1 % of the map", "max": "maximum of the map"}[s.score],
            "checkpoint": "nothing is trained",
        }

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> features (B,N,D) of unit length.

        The mean of the tokens of the chosen blocks, each after the last layer norm.
        """
        self.backbone.eval()
        with autocast(images.device, self.settings.amp):
            tokens = intermediate(self.backbone, normalise(images), sorted(self.settings.blocks))
        mean = torch.stack(tokens).float().mean(0)  # (B,N,D)
        return F.normalize(mean, dim=-1)

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Fill the bank with patches of the training images."""
        s, n = self.settings, len(images)
        patches = []
        for i in tqdm(range(0, n, s.batch_size), "memory bank", unit="batch", leave=False):
            batch = images.batch(range(i, min(i + s.batch_size, n)), device)
            patches.append(self.features(batch["image"]).flatten(0, 1))
        every = torch.cat(patches)  # (n * N, D)
        size, random = min(s.bank_size, len(every)), generator(self.seed, "bank")
        if s.sampling == "random":
            chosen = torch.randperm(len(every), generator=random)[:size].sort().values.to(device)
        else:
            chosen = greedy_coreset(every, size, random)
        self.bank = every[chosen]

    def fill_for_timing(self) -> None:
        """Fill the bank with random unit vectors."""
        bank = torch.randn(self.settings.bank_size, self.bank.shape[1], device=self.bank.device)
        self.bank = F.normalize(bank)

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): cosine distance to the nearest patch of the bank, upsampled, smoothed."""
        tokens = self.features(images)
        B, N, D = tokens.shape
        with torch.autocast(images.device.type, enabled=False):  # half precision cannot tell cosines near 1 apart
            nearest = [(tokens @ part.T).amax(-1) for part in self.bank.split(CHUNK)]  # (B,N) in each part
            cosine = torch.stack(nearest).amax(0)  # (B,N)
        distance = (1 - cosine).reshape(B, 1, *self.backbone.patch_embed.grid_size)
        maps = F.interpolate(distance, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return gaussian_blur(maps, self.settings.sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,)."""
        if self.settings.score == "max":
            return maps.amax((1, 2))
        return top_mean(maps, 0.01)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if (bank := state.get(prefix + "bank")) is not None:
            self.bank = torch.empty_like(bank, device=self.bank.device)  # its size depends on the data
        super()._load_from_state_dict(state, prefix, *rest)


def greedy_coreset(points: Tensor, size: int, random: torch.Generator, width: int = 128) -> Tensor:
    """Indices (size,) among the points (M,D), each of them the farthest from those before (PatchCore, algorithm 1).

    Distances are computed after a random projection to `width` dimensions, as in the paper.
    """
    projection = torch.randn(points.shape[1], width, generator=random).to(points)
    flat = points @ projection / width**0.5  # (M,width)
    chosen = torch.zeros(size, dtype=torch.long, device=points.device)
    chosen[0] = torch.randint(len(points), (), generator=random)
    distance = torch.full((len(points),), torch.inf, device=points.device)
    for k in tqdm(range(1, size), "coreset", leave=False):
        to_previous = (flat - flat[chosen[k - 1]]).square().sum(1)
        distance = torch.minimum(distance, to_previous)  # (M,): to the nearest of the chosen ones
        chosen[k] = distance.argmax()
    return chosen
