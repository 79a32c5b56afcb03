"""patchknn: nearest neighbours among the patches of normal images, with nothing trained.

In the manner of PatchCore (Roth et al. 2022, CVPR, arXiv 2106.08265) with the tokens of a frozen DINOv2, as in
AnomalyDINO (Damm et al. 2025, WACV, arXiv 2405.14529). What frozen features give without any learning: the
reference that every trained method of the book has to face.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from vitad.backbones import DINOV2_S14, intermediate, normalise, vit
from vitad.blocks import gaussian_blur, top_mean
from vitad.errors import UserError
from vitad.training import autocast

PAPER = "patchknn in the manner of Roth et al. 2022, PatchCore, and Damm et al. 2025, AnomalyDINO"


@dataclass(frozen=True)
class Settings:
    backbone: str = DINOV2_S14  # AnomalyDINO
    pretrained: bool = True
    image_size: int = 448  # AnomalyDINO: shorter side; a square here
    blocks: tuple[int, ...] = (4, 6, 8)  # ours: middle blocks keep the detail that the last ones give up
    bank_size: int = 40_000  # ours: patches kept; all of them if there are fewer
    sampling: Literal["random", "coreset"] = "random"  # PatchCore: coreset, the greedy k-centre choice
    score: Literal["top1", "max"] = "top1"  # AnomalyDINO: mean of the highest 1 %; PatchCore: max
    sigma: float = 4.0  # both: smoothing of the map, px
    batch_size: int = 8
    amp: bool = True


PRESETS = {
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
CHUNK = 8192  # bank rows compared at a time: bounds memory, keeps the matrix product large


class Model(nn.Module):
    """Frozen features, memory bank, score."""

    def __init__(self, settings, weights="auto"):
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
    def features(self, images):
        """(B,3,S,S) -> (B,N,D) of unit length: mean of the chosen blocks' tokens, each after the last layer norm."""
        self.backbone.eval()
        with autocast(images.device, self.settings.amp):
            tokens = intermediate(self.backbone, normalise(images), sorted(self.settings.blocks))
        return F.normalize(torch.stack(tokens).float().mean(0), dim=-1)

    def prepare(self, images, device):
        """Fill the bank with patches of the training images."""
        s = self.settings
        n, per_image = len(images), self.backbone.patch_embed.num_patches
        starts = tqdm(range(0, n, s.batch_size), "memory bank", unit="batch", leave=False)
        every = torch.cat(
            [
                self.features(images.batch(range(i, min(i + s.batch_size, n)), device)["image"]).flatten(0, 1)
                for i in starts
            ]
        )
        size = min(s.bank_size, n * per_image)
        if s.sampling == "random":
            chosen = torch.randperm(len(every))[:size].sort().values.to(device)
        else:
            chosen = greedy_coreset(every, size)
        self.bank = every[chosen]

    def anomaly_map(self, images):
        """(B,3,S,S) -> (B,S,S): cosine distance to the nearest patch of the bank, up-sampled, smoothed."""
        tokens = self.features(images)
        B, N, D = tokens.shape
        with torch.autocast(images.device.type, enabled=False):  # half precision cannot tell cosines near 1 apart
            nearest = torch.stack([(tokens @ part.T).amax(-1) for part in self.bank.split(CHUNK)]).amax(0)
        distance = (1 - nearest).reshape(B, 1, *self.backbone.patch_embed.grid_size)
        maps = F.interpolate(distance, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return gaussian_blur(maps, self.settings.sigma)

    def image_score(self, maps):
        return maps.amax((1, 2)) if self.settings.score == "max" else top_mean(maps, 0.01)

    def losses(self, batch):
        return {}

    def phases(self):
        return []

    def _load_from_state_dict(self, state, prefix, *rest):
        if (bank := state.get(prefix + "bank")) is not None:
            self.bank = torch.empty_like(bank, device=self.bank.device)  # its size is data-dependent
        super()._load_from_state_dict(state, prefix, *rest)


def greedy_coreset(points, size, width=128):
    """Indices of `size` of the points (M,D), each the farthest from those before (PatchCore, algorithm 1).

    Distances are taken after a random projection to `width` dimensions, as there.
    """
    flat = points @ torch.randn(points.shape[1], width).to(points) / width**0.5
    chosen = torch.zeros(size, dtype=torch.long, device=points.device)
    chosen[0] = torch.randint(len(points), ())
    distance = torch.full((len(points),), torch.inf, device=points.device)
    for k in tqdm(range(1, size), "coreset", leave=False):
        distance = torch.minimum(distance, (flat - flat[chosen[k - 1]]).square().sum(1))
        chosen[k] = distance.argmax()
    return chosen
