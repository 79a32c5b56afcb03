"""Dinomaly: a decoder that is kept from learning too much rebuilds the middle layers of a frozen DINOv2.

Guo et al. 2025, "Dinomaly: The Less Is More Philosophy in Multi-Class Unsupervised Anomaly Detection" (CVPR, arXiv
2405.14325), with the settings of the authors' code (guojiajeremy/Dinomaly, commit c5c76d0).

    image -> encoder E (frozen) -> mean of 8 layers -> bottleneck with dropout -> decoder of 8 blocks -> 8 layers again
    anomaly map = how far the layers of the decoder are from those of E, group by group

What departs from the code: AdamW in place of StableAdamW; the whole image is seen, not its middle; maps keep the size
of the image. One model may serve several categories, as in the paper: `--category bottle+pill+screw`.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vitad.backbones import DINOV2_S14, intermediate, normalise, substitute, vit
from vitad.blocks import gaussian_blur, top_mean
from vitad.data.samples import ImageSet
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.randomness import seeded
from vitad.training import Phase, autocast, warm_up_then_cosine

PAPER = "Guo et al. 2025, Dinomaly, CVPR, 20405-20415"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the authors' code; *ours* marks what differs."""

    encoder: str = "vit_base_patch14_reg4_dinov2.lvd142m"  # authors' code
    pretrained: bool = True  # authors' code
    image_size: int = 392  # authors' code, of 448 px the middle; ours: the whole image
    blocks: tuple[int, ...] = (3, 4, 5, 6, 7, 8, 9, 10)  # authors' code, there counted from 0
    groups: int = 2  # authors' code: layers are compared as means of so many groups of neighbours
    dropout: float = 0.2  # authors' code: of the bottleneck
    depth: int = 8  # authors' code: blocks of the decoder
    attention: Literal["linear", "softmax"] = "linear"  # authors' code: of the decoder
    easy: float = 0.9  # authors' code: share of the tokens, the best rebuilt ones, whose gradient is held back
    easy_factor: float = 0.1  # authors' code: to this share of it
    easy_steps: int = 1000  # authors' code: `easy` grows from 0 over the first steps
    steps: int = 10_000  # authors' code, one model for all categories; see the preset `single`
    batch_size: int = 16  # authors' code
    lr: float = 2e-3  # authors' code
    lr_end: float = 2e-4  # authors' code: after a half cosine
    warm_up: int = 100  # authors' code: steps
    weight_decay: float = 1e-4  # authors' code
    clip: float = 0.1  # authors' code: largest norm of the gradient
    sigma: float = 6.0  # authors' code: 4 px of a map of 256 px; ours: the same of 392 px
    radius: int = 3  # authors' code: the smoothing takes 5 x 5 px of 256; ours: 7 x 7 of 392
    top: float = 0.01  # authors' code: share of the map whose mean is the image score
    amp: bool = True  # ours: mixed precision where it is faster


# For two cores: the smaller DINOv2 that a package index carries, as a substitute; smaller images, half of the decoder.
_TWO_CORES = {"encoder": DINOV2_S14, "depth": 4, "radius": 2}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "single": {"steps": 5000},  # authors' code: one model for each category
    "small": _TWO_CORES | {"image_size": 224, "easy_steps": 200, "steps": 600, "warm_up": 50, "sigma": 4.0},
    "demo": _TWO_CORES
    | {
        "image_size": 112,
        "easy_steps": 30,
        "steps": 100,
        "batch_size": 8,
        "warm_up": 10,
        "sigma": 2.0,
        "radius": 1,
    },
    "smoke": {
        "encoder": "test_vit",
        "pretrained": False,
        "image_size": 64,
        "blocks": (2, 3, 4, 5),
        "depth": 4,
        "easy_steps": 1,
        "steps": 2,
        "warm_up": 0,
        "sigma": 1.0,
        "radius": 2,
        "amp": False,
    },
}
# Each takes one of the ideas away that keep the decoder from rebuilding anomalies too.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no_dropout": {"dropout": 0.0},
    "focused": {"attention": "softmax"},
    "tight": {"groups": 4},  # nearer to a comparison layer by layer
    "all_points": {"easy": 0.0},  # no gradient is held back
}
NETWORKS = tuple(f"vit_{size}_patch14_reg4_dinov2" for size in ("base", "small", "large"))  # authors' code
CACHE_BYTES = 8 * 2**30  # limit of the tokens kept in the host's memory


class Model(Method):
    """Encoder, bottleneck and decoder, loss and score, in that order.

    `weights` is the source of the encoder's weights, as in `backbones.vit`; without `pretrained` it is not used.
    """

    settings: Settings
    step: Tensor  # steps trained so far; in the state, so that a resumed run holds back as an unbroken one does

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        with seeded(self.seed, "encoder"):
            self.encoder, self.weights = vit(s.encoder, s.image_size, weights if s.pretrained else "random")
        self.encoder.requires_grad_(False)
        _check(s, len(self.encoder.blocks))
        self.blocks = sorted(set(s.blocks))
        D, heads = self.encoder.embed_dim, self.encoder.blocks[0].attn.num_heads
        with seeded(self.seed, "bottleneck"):
            drop = partial(nn.Dropout, s.dropout)
            self.bottleneck = nn.Sequential(drop(), nn.Linear(D, 4 * D), nn.GELU(), drop(), nn.Linear(4 * D, D), drop())
            self.bottleneck.apply(_small_weights)
        with seeded(self.seed, "decoder"):
            self.decoder = nn.ModuleList(Block(D, heads, s.attention == "linear") for _ in range(s.depth))
            self.decoder.apply(_small_weights)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        # From prepare():
        self.cache: tuple[Tensor, Tensor] | None = None  # of the training images, half: (n,P+N,D) and (n,groups,N,D)
        self.epochs = s.steps  # of one step each
        self.protocol = {
            "normalisation": "imagenet",
            "backbone": substitute(s.encoder, NETWORKS),
            "smoothing": f"Gaussian, sigma {s.sigma} px, cut off after {s.radius} px",
            "image_score": f"mean of the highest {s.top:.1%} of the map",
            "checkpoint": "last step",
        }

    # --- networks ---

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,S,S) in [0,1] -> mean of the chosen layers (B,P+N,D), with P class and register tokens first;
        and of each group the mean (B,groups,N,D). No layer norm comes after them."""
        with autocast(images.device, self.settings.amp):
            outputs = intermediate(self.encoder, normalise(images), self.blocks, norm=False, prefix=True)
        layers = torch.stack(outputs, 1).float()  # (B,layers,P+N,D), from shallow to deep
        return layers.mean(1), self._grouped(layers)

    def decode(self, fused: Tensor) -> Tensor:
        """Mean of the layers (B,P+N,D) -> each group as the decoder rebuilds it (B,groups,N,D)."""
        x, outputs = self.bottleneck(fused), []
        for block in self.decoder:
            x = block(x)
            outputs.append(x)
        outputs.reverse()  # the first block answers to the deepest layer
        return self._grouped(torch.stack(outputs, 1).float())

    def _grouped(self, layers: Tensor) -> Tensor:
        """(B,layers,P+N,D) -> (B,groups,N,D): means of neighbouring layers, of the patches alone."""
        patches = layers[:, :, self.encoder.num_prefix_tokens :]
        return patches.unflatten(1, (self.settings.groups, -1)).mean(2)

    def train(self, mode: bool = True) -> Self:
        """As usual, but the encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    # --- training ---

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Keep what the encoder says of the training images, in half precision on the host, if it fits there."""
        s, n = self.settings, len(images)
        self.epochs = math.ceil(s.steps / math.ceil(n / s.batch_size))
        N, P, D = self.encoder.patch_embed.num_patches, self.encoder.num_prefix_tokens, self.encoder.embed_dim
        self.cache = None
        if 2 * n * (P + N + s.groups * N) * D > CACHE_BYTES:
            return  # images are encoded in every step
        fused, target = torch.empty(n, P + N, D, dtype=torch.half), torch.empty(n, s.groups, N, D, dtype=torch.half)
        for i in tqdm(range(0, n, s.batch_size), "tokens", unit="batch", leave=False):
            part = slice(i, min(i + s.batch_size, n))
            fused[part], target[part] = self.encode(images.batch(range(n)[part], device)["image"])
        self.cache = fused, target

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """1 - cosine between all that is rebuilt of a group and the group itself, each of them as one vector."""
        s, images = self.settings, batch["image"]
        if self.training and self.cache:
            fused, target = (kept[batch["index"]].to(images.device).float() for kept in self.cache)
        else:
            fused, target = self.encode(images)
        share = s.easy * (self.step / max(s.easy_steps, 1)).clamp(max=1)
        rebuilt = hold_back(self.decode(fused), target, share, s.easy_factor)
        if self.training:
            self.step += 1
        return {"cosine": (1 - F.cosine_similarity(rebuilt.flatten(2), target.flatten(2), dim=-1)).mean()}

    def phases(self) -> list[Phase]:
        """One phase for bottleneck and decoder. StableAdamW would also limit the size of each step."""
        s = self.settings
        return [
            Phase(
                "train",
                [*self.bottleneck.parameters(), *self.decoder.parameters()],
                self.epochs,
                s.batch_size,
                s.lr,
                partial(torch.optim.AdamW, amsgrad=True),
                weight_decay=s.weight_decay,
                clip=s.clip,
                schedule=warm_up_then_cosine(s.warm_up / s.steps, s.lr_end / s.lr),
            )
        ]

    def observe(self, images: ImageSet, device: torch.device) -> dict[str, int | float]:
        """The number of steps, whole epochs."""
        return {"train_steps": int(self.step)}

    # --- score ---

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): 1 - cosine of each token, mean over the groups, upsampled, smoothed."""
        fused, target = self.encode(images)
        distance = (1 - F.cosine_similarity(self.decode(fused), target, dim=-1)).mean(1).clamp_min(0)  # (B,N)
        grid = distance.unflatten(1, self.encoder.patch_embed.grid_size)[:, None]
        maps = F.interpolate(grid, images.shape[-2:], mode="bilinear", align_corners=True)[:, 0]
        return gaussian_blur(maps, self.settings.sigma, self.settings.radius)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): mean of the highest pixels."""
        return top_mean(maps, self.settings.top)


def hold_back(rebuilt: Tensor, target: Tensor, share: Tensor, factor: float) -> Tensor:
    """`rebuilt` (B,groups,N,D) unchanged, but the gradient of its easy tokens is multiplied by `factor`.

    Easy is the `share` (a scalar) of the tokens of a group that are nearest to `target`, in the whole batch.
    """
    known = rebuilt.detach()
    distance = 1 - F.cosine_similarity(known, target, dim=-1)  # (B,groups,N)
    limit = torch.quantile(distance.transpose(0, 1).flatten(1), share, dim=1)  # (groups,)
    weight = torch.where(distance < limit[:, None], factor, 1.0)[..., None]
    return known + weight * (rebuilt - known)


class Block(nn.Module):
    """A pre-norm transformer block, tokens (B,N,D) -> (B,N,D)."""

    def __init__(self, width: int, heads: int, linear: bool):
        super().__init__()
        self.heads, self.attention = heads, linear_attention if linear else F.scaled_dot_product_attention
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-8), nn.LayerNorm(width, 1e-8)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B,heads,N,d)
        x = x + self.proj(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (B,heads,N,d) -> (B,heads,N,d): v weighted by phi(q)ᵀphi(k), phi = elu + 1, in place of a softmax.

    Such weights cannot concentrate on few tokens. Sums over all tokens overflow in half precision.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = (x.relu() + x.clamp(max=0).exp() for x in (q.float(), k.float()))  # elu + 1, never rounded to 0
        return q @ (k.mT @ v.float()) / (q @ k.sum(2, keepdim=True).mT)


def _small_weights(module: nn.Module) -> None:
    """Authors' code: truncated normal weights with a standard deviation of 0.01."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def _check(s: Settings, n_blocks: int) -> None:
    """Refuse settings that contradict each other or that have no meaning."""
    if not s.blocks or not all(1 <= b <= n_blocks for b in s.blocks):
        raise UserError(f"blocks={s.blocks}: {s.encoder} has blocks 1 to {n_blocks}.")
    for what, n in (("blocks", len(set(s.blocks))), ("depth", s.depth)):
        if not s.groups or not n or n % s.groups:
            raise UserError(f"groups={s.groups} cannot share out {n} layers evenly ({what}).")
    for name in ("dropout", "easy", "easy_factor", "top"):
        if getattr(s, name) > 1:
            raise UserError(f"{name}={getattr(s, name)} is a share: from 0 to 1.")
    if s.warm_up >= s.steps:
        raise UserError(f"warm_up={s.warm_up} leaves none of steps={s.steps} after it. Lower it, or raise steps.")
    if not s.lr or s.lr_end > s.lr:
        raise UserError(f"lr_end={s.lr_end} has to be from 0 to lr={s.lr}, and lr above 0.")
