"""patchknn: nearest neighbours among the patches of normal images, with nothing trained.

In the manner of PatchCore (Roth et al. 2022, CVPR, arXiv 2106.08265) with the tokens of a frozen DINOv2, as in
AnomalyDINO (Damm et al. 2025, WACV, arXiv 2405.14529). It shows what frozen features give without any learning, so it
is the reference for every trained method of the book. Two switches give it what AnomalyDINO has besides: turned copies
of the training images (`rotations`), and a background of the test images that does not count (`mask`).
"""

import math
from collections.abc import Iterator
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
    image_size: int = 448  # AnomalyDINO: shorter side; ours: a square
    blocks: tuple[int, ...] = (4, 6, 8)  # ours: middle blocks keep the detail that the last ones give up
    rotations: int = 1  # ours: training images as they are; AnomalyDINO: 8, turned in steps of 45 degrees as well
    bank_size: int = 40_000  # ours: patches drawn from all, turned ones included; AnomalyDINO: all of them
    sampling: Literal["random", "coreset"] = "random"  # PatchCore: coreset, the greedy k-centre choice
    mask: Literal["off", "pca"] = "off"  # ours; AnomalyDINO: pca where it looks right, 5 of 15 categories of MVTec AD
    score: Literal["top1", "max"] = "top1"  # AnomalyDINO: mean of the highest 1 %, of patches; PatchCore: max
    sigma: float = 4.0  # PatchCore and AnomalyDINO, px: smoothing of the map
    batch_size: int = 8
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # AnomalyDINO's code with all training images and its option "agnostic", which knows of a category only whether a
    # mask looks right. What stays ours: the image is a square and turned after it is resized; the score is that of
    # pixels of the smoothed map.
    "anomalydino": {
        "blocks": (12,),  # AnomalyDINO, code: the last block
        "rotations": 8,  # AnomalyDINO, code: "agnostic" turns the images of all categories
        "mask": "pca",  # AnomalyDINO, code: capsule, hazelnut, pill, screw, toothbrush; elsewhere set mask=off
        "bank_size": 4_000_000,  # AnomalyDINO, code: all; hazelnut, the largest of MVTec AD, has 391 x 8 x 1,024
    },
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
# Each adds one idea of AnomalyDINO to the presets that lack it.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "rotations": {"rotations": 8},  # in a bank of the same size, an eighth for each direction
    "rotations_x8": {"rotations": 8, "bank_size": 320_000},  # as many patches of each direction as `full` has of one
    "masking": {"mask": "pca"},
    "large": {"image_size": 448},
}
CHUNK = 8192  # patches of the bank that are compared at a time: limits the memory, keeps the matrix product large
HELD_BYTES = 8 * 2**30  # limit of the patches that are held at once while the bank is filled
FOREGROUND = 10.0  # AnomalyDINO, code: of the first principal component; suits the tokens of a DINOv2


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
        if s.rotations < 1:
            raise UserError(f"rotations={s.rotations} has to be at least 1, images as they are. AnomalyDINO has 8.")
        self.blocks = sorted(set(s.blocks))
        self.register_buffer("bank", torch.zeros(0, self.backbone.embed_dim))
        if s.mask == "pca":  # True where a material fills the training images, so that nothing is background
            self.register_buffer("everywhere", torch.tensor(False))
        self.protocol = {
            "normalisation": "imagenet",
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": {"top1": "mean of the highest 1 % of the map", "max": "maximum of the map"}[s.score],
            "checkpoint": "nothing is trained",
        }

    def features(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> features (B,N,D) of unit length.

        The mean of the tokens of the chosen blocks, each after the last layer norm.
        """
        return self._unit_mean(self._tokens(images, self.blocks))

    @torch.no_grad()
    def _tokens(self, images: Tensor, blocks: list[int]) -> list[Tensor]:
        """Images (B,3,S,S) -> tokens (B,N,D) of each of the given blocks, in ascending order."""
        self.backbone.eval()
        with autocast(images.device, self.settings.amp):
            tokens = intermediate(self.backbone, normalise(images), blocks)
        return [t.float() for t in tokens]

    def _unit_mean(self, tokens: list[Tensor]) -> Tensor:
        return F.normalize(torch.stack(tokens).mean(0), dim=-1)

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,S,S) -> features (B,N,D), and what is foreground (B,1,h,w) bool; each block is computed once."""
        tokens = self._tokens(images, sorted({*self.blocks, len(self.backbone.blocks)}))
        mask = foreground(tokens[-1], self.backbone.patch_embed.grid_size) | self.everywhere
        return self._unit_mean(tokens[: len(self.blocks)]), mask

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Fill the bank with patches of the training images and of their turned copies.

        A random choice is drawn before the patches are computed, so that the others take no memory. Raises `UserError`
        where those that have to be held at once take too much.
        """
        s, n, N, D = self.settings, len(images), self.backbone.patch_embed.num_patches, self.backbone.embed_dim
        total = s.rotations * n * N
        size, random = min(s.bank_size, total), generator(self.seed, "bank")
        held = torch.arange(total)  # numbers of patches; those of images as they are come first, as without copies
        if s.sampling == "random":
            held = torch.randperm(total, generator=random)[:size].sort().values
        if (taken := 4 * D * len(held)) > HELD_BYTES:
            lower = {"random": "Lower bank_size", "coreset": "Use sampling=random, or lower rotations or image_size"}
            raise UserError(
                f"bank_size={s.bank_size}, sampling={s.sampling}: {len(held)} patches have to be held at once, "
                f"{taken / 2**30:.1f} GiB, more than {HELD_BYTES / 2**30:.1f}. {lower[s.sampling]}."
            )
        patches = torch.empty(len(held), D, device=device)
        for i in tqdm(range(0, n, s.batch_size), "memory bank", unit="batch", leave=False):
            batch = images.batch(range(i, min(i + s.batch_size, n)), device)["image"]
            for k, turned in enumerate(turns(batch, s.rotations)):
                first = (k * n + i) * N  # number of the first patch of these images
                low, high = torch.searchsorted(held, torch.tensor([first, first + len(batch) * N])).tolist()
                chosen = (held[low:high] - first).to(device)
                patches[low:high] = self.features(turned).flatten(0, 1)[chosen]
        self.bank = patches if s.sampling == "random" else patches[greedy_coreset(patches, size, random)]
        if s.mask == "pca":  # one model for several categories cannot tell of which of them a test image is
            self.everywhere.fill_(bool(images.textures.any()))

    def observe(self, images: ImageSet, device: torch.device) -> dict[str, int | float]:
        """With a mask: the share of foreground in up to 32 training images, which is 1 where nothing is masked."""
        s, n = self.settings, len(images)
        if s.mask == "off":
            return {}
        some = range(0, n, math.ceil(n / 32))
        parts = [some[i : i + s.batch_size] for i in range(0, len(some), s.batch_size)]
        masks = [self._look(images.batch(part, device)["image"])[1] for part in parts]
        return {"foreground": round(torch.cat(masks).float().mean().item(), 4)}

    def fill_for_timing(self) -> None:
        """Fill the bank with random unit vectors."""
        bank = torch.randn(self.settings.bank_size, self.bank.shape[1], device=self.bank.device)
        self.bank = F.normalize(bank)

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): cosine distance to the nearest patch of the bank, upsampled, smoothed.

        Patches of the background have the distance 0.
        """
        features, mask = (self.features(images), 1) if self.settings.mask == "off" else self._look(images)
        B, N, D = features.shape
        with torch.autocast(images.device.type, enabled=False):  # half precision cannot tell cosines near 1 apart
            nearest = [(features @ part.T).amax(-1) for part in self.bank.split(CHUNK)]  # (B,N) in each part
            cosine = torch.stack(nearest).amax(0)  # (B,N)
        distance = (1 - cosine).reshape(B, 1, *self.backbone.patch_embed.grid_size) * mask
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


def turns(images: Tensor, rotations: int) -> Iterator[Tensor]:
    """Images (B,3,S,S), first as they are, then turned about their centre in `rotations` equal steps of a full turn.

    What a turn moves into the corners mirrors the image, as in the code of AnomalyDINO.
    """
    yield images
    for k in range(1, rotations):
        angle = 2 * math.pi * k / rotations
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = images.new_tensor([[cos, -sin, 0], [sin, cos, 0]]).expand(len(images), -1, -1)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=True)
        yield F.grid_sample(images, grid, padding_mode="reflection", align_corners=True)


def foreground(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B,N,D) of the last block -> where the object is, (B,1,h,w) bool, after the code of AnomalyDINO.

    A token is foreground where its first principal component, among the tokens of its image, is above `FOREGROUND`. The
    sign of a component has no meaning: the one that puts more of the image's centre into the foreground is taken.
    (AnomalyDINO changes the sign where that share is at most 35 %.) The mask is dilated and closed by 3 x 3 tokens, so
    that its rim is wider where the image is smaller. Ours: where less than 5 % of the centre is foreground, no object
    is found, and everything is foreground.
    """
    B, N, D = tokens.shape
    h, w = grid
    with torch.autocast(tokens.device.type, enabled=False):
        centred = tokens - tokens.mean(1, keepdim=True)
        _, axes = torch.linalg.eigh(centred.mT @ centred)  # (B,D,D), the last column is the first component
        component = (centred @ axes[..., -1:]).reshape(B, 1, h, w)
    both = torch.cat([component, -component], 1) > FOREGROUND  # (B,2,h,w)
    top, left = h // 5, w // 5
    centre = both[..., top : h - top, left : w - left].float().mean((2, 3))  # (B,2)
    share, sign = centre.max(1)
    mask = both[torch.arange(B, device=sign.device), sign, None].float()  # (B,1,h,w)
    mask = F.max_pool2d(mask, 5, 1, 2)  # dilated twice by 3 x 3: once, and once to close it
    mask = -F.max_pool2d(-mask, 3, 1, 1)  # eroded, which ends the closing
    return (mask > 0) | (share < 0.05)[:, None, None, None]
