"""Dinomaly: a decoder that is kept from copying rebuilds the middle layers of a frozen DINOv2.

Guo et al. 2025, "Dinomaly: The Less Is More Philosophy in Multi-Class Unsupervised Anomaly Detection", CVPR,
20405-20415, arXiv 2405.14325. *Code* below is that of the authors, guojiajeremy/Dinomaly.

    image -> frozen encoder -> tokens of eight layers -> mean -> noisy bottleneck -> decoder -> as many layers, rebuilt
    anomaly map = 1 - cosine of what was seen and what was rebuilt, layers averaged in groups

Three things keep the decoder from rebuilding an anomaly as well: dropout in the bottleneck, an attention that cannot
focus, and a loss on groups of layers in which easy places weigh little. Their DINOv2 has registers; offline DINOv2
ViT-S/14 without them stands in, a substitute that the record names.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vitad.backbones import DINOV2_S14, import_timm, normalise, vit
from vitad.blocks import gaussian_blur, top_mean
from vitad.data.samples import ImageSet
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.randomness import seeded
from vitad.training import Phase, autocast, warm_up_then_cosine
from vitad.transfer import to_device

PAPER = "Guo et al. 2025, Dinomaly, CVPR, 20405-20415, arXiv 2405.14325"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the authors' code for one model of all categories; *ours* marks what differs."""

    backbone: str = "vit_base_patch14_reg4_dinov2.lvd142m"  # code
    pretrained: bool = True  # code
    image_size: int = 392  # code: the centre of 448 px; ours: the whole frame
    blocks: tuple[int, ...] = (3, 4, 5, 6, 7, 8, 9, 10)  # code: counted from 1, without the last layer norm
    groups: int = 2  # code: as many averages of neighbouring layers are compared
    dropout: float = 0.2  # code: of the bottleneck; 0.4 on other data
    depth: int = 8  # code: blocks of the decoder
    linear_attention: bool = True  # code; False: with softmax, which can focus
    easy: float = 0.9  # code: share of the places, those rebuilt best, whose gradients are weakened
    easy_weight: float = 0.1  # code: what they are multiplied by
    easy_steps: int = 1000  # code: steps in which the share of places with a weakened gradient rises from 0
    steps: int = 10_000  # code: steps of training, over all categories together; 5,000 for one
    batch_size: int = 16  # code
    lr: float = 2e-3  # code: StableAdamW; ours: AdamW, with a limit on the length of the gradient
    lr_end: float = 2e-4  # code: by a half cosine
    warm_up: float = 0.01  # code: 100 of 10,000 steps
    weight_decay: float = 1e-4  # code
    clip: float = 0.1  # code: largest norm of the gradient
    cache: bool = False  # ours; True: keep the encoder's tokens of the training images
    sigma: float = 4.0  # code: px, smoothing of the map, cut at 2 px from the centre; ours: not cut
    top: float = 0.01  # code: share of the map whose mean is the image score
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "single": {"steps": 5000, "warm_up": 0.02},  # code: one model for each category
    # For two cores: a small encoder, whose tokens are kept, half of the decoder, few steps.
    "small": {
        "backbone": DINOV2_S14,
        "image_size": 224,
        "depth": 4,
        "easy_steps": 100,
        "steps": 300,
        "warm_up": 0.05,
        "cache": True,
    },
    "demo": {
        "backbone": DINOV2_S14,
        "image_size": 168,
        "depth": 4,
        "easy_steps": 40,
        "steps": 120,
        "warm_up": 0.05,
        "batch_size": 8,
        "cache": True,
        "sigma": 3.0,
    },
    "smoke": {
        "backbone": "test_vit",
        "pretrained": False,
        "image_size": 64,
        "blocks": (2, 3, 4, 5),
        "depth": 2,
        "easy_steps": 1,
        "steps": 2,
        "cache": True,
        "sigma": 1.0,
        "amp": False,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no_dropout": {"dropout": 0.0},
    "softmax": {"linear_attention": False},
    "no_mining": {"easy": 0.0},
}
CACHE_BYTES = 8 * 2**30  # limit of the tokens that are kept in the host's memory


class Model(Method):
    """Encoder, decoder, losses and score, in that order. `weights` is the source of the encoder's, as in `vit`."""

    settings: Settings
    done: Tensor  # steps of training so far

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        with seeded(self.seed, "backbone"):
            self.backbone, self.weights = vit(s.backbone, s.image_size, weights if s.pretrained else "random")
        self.backbone.requires_grad_(False)
        layers, D = len(self.backbone.blocks), self.backbone.embed_dim
        if not s.blocks or not all(1 <= b <= layers for b in s.blocks):
            raise UserError(f"blocks={s.blocks}: {s.backbone} has blocks 1 to {layers}.")
        if s.groups < 1 or len(s.blocks) % s.groups or s.depth % s.groups or not s.depth:
            raise UserError(f"groups={s.groups} has to divide depth={s.depth} and the number of blocks={s.blocks}.")
        if max(s.dropout, s.easy, s.easy_weight, s.top) > 1 or s.warm_up >= 1:
            raise UserError("dropout, easy, easy_weight, top and warm_up are shares: from 0 to 1.")
        noise = s.dropout
        with seeded(self.seed, "bottleneck"):
            self.bottleneck = nn.Sequential(
                *(nn.Dropout(noise), nn.Linear(D, 4 * D), nn.GELU(), nn.Dropout(noise)),
                *(nn.Linear(4 * D, D), nn.Dropout(noise)),
            ).apply(_small_weights)
        with seeded(self.seed, "decoder"):
            blocks = [_block(D, self.backbone.blocks[0].attn.num_heads, s.linear_attention) for _ in range(s.depth)]
            self.decoder = nn.ModuleList(blocks).apply(_small_weights)
        self.register_buffer("done", torch.zeros((), dtype=torch.long))
        self.epochs = s.steps
        # From prepare(), half precision: what the bottleneck is given (n,T,D) and the targets (n,groups,N,D)
        self.cache: tuple[Tensor, Tensor] | None = None
        self.protocol = {
            "normalisation": "imagenet",
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": f"mean of the highest {s.top:.1%} of the map",
            "checkpoint": "last step",
        }
        if s.backbone != Settings.backbone:
            self.protocol["substitute"] = f"{s.backbone} for {Settings.backbone}"

    def train(self, mode: bool = True) -> Self:
        """As usual, but the encoder stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    # --- what is seen, what is rebuilt ---

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,S,S) -> mean of the layers (B,T,D), with class and register tokens; group means (B,G,N,D)."""
        s = self.settings
        with autocast(images.device, s.amp):
            layers = self.backbone.forward_intermediates(
                normalise(images),
                indices=[b - 1 for b in sorted(set(s.blocks))],
                return_prefix_tokens=True,
                output_fmt="NLC",
                intermediates_only=True,
                stop_early=True,
            )
        patches = torch.stack([tokens.float() for tokens, _ in layers], 1)  # (B,L,N,D)
        others = torch.stack([prefix.float() for _, prefix in layers], 1)  # (B,L,T-N,D)
        return torch.cat([others, patches], 2).mean(1), self._group_means(patches)

    def decode(self, fused: Tensor) -> Tensor:
        """Mean of the layers (B,T,D) -> group means as the decoder rebuilds them (B,G,N,D)."""
        x, outputs = self.bottleneck(fused), []
        for block in self.decoder:
            x = block(x)
            outputs.append(x[:, -self.backbone.patch_embed.num_patches :].float())
        return self._group_means(torch.stack(outputs[::-1], 1))  # the first block answers to the deepest layers

    def _group_means(self, layers: Tensor) -> Tensor:
        return layers.unflatten(1, (self.settings.groups, -1)).mean(2)  # (B,L,N,D) -> (B,G,N,D)

    # --- training ---

    def size_up(self, categories: ndarray) -> None:
        """As many epochs as the steps need."""
        s = self.settings
        self.epochs = math.ceil(s.steps / math.ceil(len(categories) / s.batch_size))

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Keep what the encoder gives for the training images, if that is asked for and has room."""
        s, n = self.settings, len(images)
        self.size_up(images.categories)
        N, D = self.backbone.patch_embed.num_patches, self.backbone.embed_dim
        if not s.cache or 2 * n * D * (self.backbone.num_prefix_tokens + N + s.groups * N) > CACHE_BYTES:
            return
        parts = []
        for i in tqdm(range(0, n, s.batch_size), "tokens", unit="batch", leave=False):
            seen = self.encode(images.batch(range(i, min(i + s.batch_size, n)), device)["image"])
            parts.append([part.half().cpu() for part in seen])
        fused, targets = zip(*parts, strict=True)
        self.cache = torch.cat(fused), torch.cat(targets)

    def fill_for_timing(self) -> None:
        """Keep random tokens of one image."""
        if self.settings.cache:
            N, D = self.backbone.patch_embed.num_patches, self.backbone.embed_dim
            with torch.device("cpu"):  # as the cache is
                fused = torch.randn(1, self.backbone.num_prefix_tokens + N, D, dtype=torch.half)
                self.cache = fused, torch.randn(1, self.settings.groups, N, D, dtype=torch.half)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """1 - cosine of each image's whole maps, seen and rebuilt; places that are rebuilt well weigh less."""
        if self.training and self.cache:
            fused, targets = (to_device(kept[batch["index"]], batch["image"].device).float() for kept in self.cache)
        else:
            fused, targets = self.encode(batch["image"])
        rebuilt = self.decode(fused)
        if self.settings.easy:
            if "share" in batch:
                raise UserError(
                    "which places are easy is decided among those of one process. Start one, or set easy=0."
                )
            rebuilt = self.weaken(rebuilt, targets)
        if self.training:
            self.done += 1
        whole = F.cosine_similarity(rebuilt.flatten(2), targets.flatten(2), dim=-1)  # (B,G)
        return {"cosine": (1 - whole).mean()}

    def weaken(self, rebuilt: Tensor, targets: Tensor) -> Tensor:
        """The same (B,G,N,D), with a weaker gradient at the easy places: those of the batch with the lowest error.

        Their share rises with the steps that are done, from 0 to `easy`, and is taken for each group by itself.
        """
        s = self.settings
        error = 1 - F.cosine_similarity(rebuilt.detach(), targets, dim=-1)  # (B,G,N)
        rank = s.easy * (self.done / max(s.easy_steps, 1)).clamp(max=1) * error[:, 0].numel()
        rank = rank.long().clamp(max=error[:, 0].numel() - 1)
        ordered = error.transpose(0, 1).flatten(1).sort(1).values  # (G,B·N)
        limit = ordered.gather(1, rank.expand(s.groups, 1))  # (G,1): reading one number would wait for the device
        fixed = rebuilt.detach()
        return torch.where((error < limit)[..., None], fixed + s.easy_weight * (rebuilt - fixed), rebuilt)

    def phases(self) -> list[Phase]:
        """One phase, for bottleneck and decoder."""
        s = self.settings
        usual, end = warm_up_then_cosine(s.warm_up), s.lr_end / s.lr

        def schedule(done: float) -> float:
            return usual(done) if done < s.warm_up else end + (1 - end) * usual(done)

        return [
            Phase(
                "train",
                [*self.bottleneck.parameters(), *self.decoder.parameters()],
                self.epochs,
                s.batch_size,
                s.lr,
                torch.optim.AdamW,
                weight_decay=s.weight_decay,
                clip=s.clip,
                schedule=schedule,
            )
        ]

    # --- score ---

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): 1 - cosine at each place, mean over the groups, upsampled, smoothed."""
        fused, targets = self.encode(images)
        error = 1 - F.cosine_similarity(self.decode(fused), targets, dim=-1).mean(1)  # (B,N)
        grid = error.clamp_min(0).unflatten(1, self.backbone.patch_embed.grid_size)[:, None]
        maps = F.interpolate(grid, images.shape[-2:], mode="bilinear", align_corners=True)[:, 0]
        return gaussian_blur(maps, self.settings.sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): mean of the highest pixels."""
        return top_mean(maps, self.settings.top)


class LinearAttention(nn.Module):
    """Attention without softmax (Katharopoulos et al. 2020): its weights are spread, it cannot pick a single token.

    phi(q) (phi(k)^T v) / (phi(q) sum phi(k)) with phi = elu + 1. Takes the layers of an attention of timm.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.qkv, self.proj, self.num_heads = attention.qkv, attention.proj, attention.num_heads

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B,heads,N,d) each
        with torch.autocast(x.device.type, enabled=False):  # sums over all tokens are too long for half precision
            q, k, v = F.elu(q.float()) + 1, F.elu(k.float()) + 1, v.float()
            x = q @ (k.mT @ v) / (q @ k.sum(2)[..., None])
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


def _block(width: int, heads: int, linear: bool) -> nn.Module:
    """A pre-norm block of a transformer."""
    Block = import_timm().models.vision_transformer.Block
    block = Block(width, heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-8))
    if linear:
        block.attn = LinearAttention(block.attn)
    return block


def _small_weights(module: nn.Module) -> None:
    """Linear layers begin small, as in the code."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
