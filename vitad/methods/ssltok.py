"""Tokens of a frozen self-supervised ViT, predicted without the anomaly by one network, compared by another.

In the manner of Kim & Kwon 2024, "Unsupervised Visual Anomaly Detection Using Self-Supervised Pre-Trained Transformer",
IEEE Access 12, 127604-127613, DOI 10.1109/ACCESS.2024.3454753.

    image -> tokenizer T (frozen) -> tokens t_a -> reconstruction R -> tokens t_hat as they would be without anomaly
    anomaly map = what the segmentation G makes of t_a and t_hat

The paper's, from its abstract, all that is public to us: the frozen self-supervised ViT as image tokenizer, the masked
language model as model, R that predicts anomaly-free patch tokens, G that segments from both kinds of tokens, and
that only R and G are trained. Ours: every layer, number, loss and kind of damage below, in short a DRAEM
(Zavrtanik et al. 2021) whose images are tokens. It is no reproduction. The file is long because the training pairs are
cached: the frozen tokens of the images, and of a pool of damaged ones.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vitad.backbones import DINOV2_S14, import_timm, intermediate, normalise, vit
from vitad.blocks import gaussian_blur, top_mean
from vitad.data.samples import ImageSet
from vitad.data.synthesis import Synthesis, foreground_mask, textures_used
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.randomness import generator, next_seed, seed_of, seeded
from vitad.training import Phase, autocast, warm_up_then_cosine

PAPER = "in the manner of Kim & Kwon 2024, IEEE Access 12, 127604-127613"
CATEGORY = None
CACHE_BYTES = 8 * 2**30  # of tokens and masks kept in the host's memory
EPS = 1e-5  # probabilities stay this far from 0 and 1 in the losses
AREA = 1e-3  # share of an image below which its damage weighs less in the balanced loss


@dataclass(frozen=True)
class Settings:
    """Everything but the kind of tokenizer is ours."""

    tokenizer: str = DINOV2_S14  # abstract: a self-supervised ViT
    pretrained: bool = True  # abstract
    image_size: int = 224
    blocks: tuple[int, ...] = (12,)  # mean of their outputs, each after the last layer norm
    standardise: bool = False  # each channel by mean and standard deviation over the training images
    # damage, see data/synthesis/
    damage: float = 0.5  # probability of an image to be damaged
    kinds: tuple[str, ...] = ("perlin",)
    mode: Literal["global", "local", "both"] = "global"
    textures: str = "procedural"
    keep_grey: bool = False
    pool: int = 0  # fixed damaged versions of each image, whose tokens are cached too; 0: drawn anew in every step
    # reconstruction
    reconstruct: bool = True
    mask_max: float = 0.5  # share of the tokens that are masked: U(0, mask_max) for each image
    width: int = 512
    depth: int = 6
    heads: int = 8
    dropout: float = 0.1  # of the input tokens, so that copying does not pay
    # segmentation
    segment: bool = True
    seg_width: int = 256
    seg_loss: Literal["focal", "balanced"] = "focal"  # balanced: half of it is for the damage
    use_diff: bool = True
    detach_rec: bool = False  # on: the segmentation loss does not reach R
    # training
    epochs: int = 100
    min_steps: int = 5000  # more epochs where 100 make fewer steps
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.05
    warm_up: float = 0.05  # share of the steps
    # score
    hidden_parts: int = 0  # the tokens are hidden in so many parts in turn, and predicted unseen; 0: all are seen
    product: bool = False  # map times the distance of given and predicted tokens: marked by both networks
    sigma: float = 4.0  # smoothing of the map, px
    score: Literal["window", "top"] = "window"  # window: highest mean over a square, as DRAEM; top: mean of the highest
    window: int = 21  # side of the square, px
    top: float = 0.01  # share of the map
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # For two cores: a pool of damage, narrow subnetworks, few steps; middle blocks keep what the last ones give up.
    # Chosen on synthetic damage of held-out tiles: see experiments/select_ssltok.json.
    "small": {
        "blocks": (4, 6, 8),
        "standardise": True,
        "kinds": ("crack", "crack", "crack", "pit", "pit", "pit", "patch", "patch", "patch", "fray", "fray")
        + ("perlin", "perlin", "paste"),
        "keep_grey": True,
        "pool": 3,
        "width": 192,
        "depth": 2,
        "heads": 6,
        "seg_width": 64,
        "seg_loss": "balanced",
        "detach_rec": True,
        "epochs": 10,
        "min_steps": 0,
        "lr": 1e-3,
        "product": True,
        "score": "top",
    },
    # Chosen on the toy data of another seed: a part out of place looks normal; it shows where tokens are hidden.
    "demo": {
        "blocks": (4, 6, 8),
        "image_size": 168,
        "standardise": True,
        "kinds": ("paste", "paste", "paste", "paste", "perlin", "crack", "pit", "patch"),
        "pool": 4,
        "width": 128,
        "depth": 2,
        "heads": 4,
        "seg_width": 64,
        "seg_loss": "balanced",
        "detach_rec": True,
        "epochs": 30,
        "min_steps": 0,
        "batch_size": 8,
        "lr": 1e-3,
        "hidden_parts": 4,
        "product": True,
        "sigma": 3.0,
        "score": "top",
    },
    "smoke": {
        "tokenizer": "test_vit",
        "pretrained": False,
        "image_size": 64,
        "blocks": (2, 4),
        "pool": 1,
        "width": 32,
        "depth": 1,
        "heads": 2,
        "seg_width": 32,
        "epochs": 2,
        "min_steps": 0,
        "sigma": 1.0,
        "window": 5,
        "amp": False,
    },
}

# Each takes one idea away.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no_seg": {"segment": False},  # the map is the cosine distance of t_a and t_hat
    "no_rec": {"reconstruct": False},  # G sees t_a alone
    "no_mask": {"mask_max": 0.0, "hidden_parts": 0},  # without masks in training, hidden tokens cannot be predicted
    "no_synth": {"damage": 0.0, "segment": False},  # masking alone; without damage G has nothing to learn from
}


class Model(Method):
    """Tokenizer, training pairs, losses and score, in that order; the two subnetworks follow below.

    `weights` is the source of the tokenizer's weights, as in `backbones.vit`; without `pretrained` it is not used.
    """

    settings: Settings
    mean: Tensor
    std: Tensor

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        _check(s)
        with seeded(self.seed, "tokenizer"):
            self.tokenizer, self.weights = vit(s.tokenizer, s.image_size, weights if s.pretrained else "random")
        self.tokenizer.requires_grad_(False)
        layers = len(self.tokenizer.blocks)
        if not s.blocks or not all(1 <= b <= layers for b in s.blocks):
            raise UserError(f"blocks={s.blocks}: {s.tokenizer} has blocks 1 to {layers}.")
        D, grid = self.tokenizer.embed_dim, self.tokenizer.patch_embed.grid_size
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("std", torch.ones(D))
        self.synthesis = Synthesis(s.kinds, 1.0, s.mode, s.textures, keep_grey=s.keep_grey)
        self.reconstruction: Reconstruction | None = None
        self.segmentation: Segmentation | None = None
        if s.reconstruct:
            with seeded(self.seed, "reconstruction"):
                self.reconstruction = Reconstruction(D, math.prod(grid), s.width, s.depth, s.heads, s.dropout)
        if s.segment:
            parts = 1 + s.reconstruct * (1 + s.use_diff)  # t_a, t_hat and their difference
            with seeded(self.seed, "segmentation"):
                self.segmentation = Segmentation(parts * D, grid, s.seg_width, s.image_size)
        # From prepare():
        self.clean: Tensor | None = None  # (n,N,D) half: tokens of the training images
        self.pool: dict[str, Tensor] = {}  # `tokens` (pool,n,N,D) half and `mask` (pool,n,S,S): the damaged versions
        self.epochs = s.epochs
        self.protocol = {
            "normalisation": "imagenet",
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": f"maximum of the map's mean over {s.window} x {s.window} px"
            if s.score == "window"
            else f"mean of the highest {s.top:.1%} of the map",
            "checkpoint": "last epoch",
        }

    # --- tokenizer ---

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [0,1] -> t (B,N,D), without class and register tokens."""
        return self._standard(self._raw_tokens(images))

    @torch.no_grad()
    def _raw_tokens(self, images: Tensor) -> Tensor:
        with autocast(images.device, self.settings.amp):
            outputs = intermediate(self.tokenizer, normalise(images), sorted(set(self.settings.blocks)))
        return torch.stack(outputs).float().mean(0)

    def _standard(self, tokens: Tensor) -> Tensor:
        return (tokens - self.mean) / self.std

    def train(self, mode: bool = True) -> Self:
        """As usual, but the tokenizer stays in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    # --- training pairs ---

    @torch.no_grad()
    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Cache the tokens of the training images, and of the pool of damaged ones, in half precision on the host.

        The damage depends on the model's seed, the version and the images, so a resumed run has the same cache.
        """
        s = self.settings
        N, D = self.tokenizer.patch_embed.num_patches, len(self.mean)
        self.epochs = max(s.epochs, math.ceil(s.min_steps / self._steps(images)))
        per_image = 2 * N * D + s.pool * (2 * N * D + s.image_size**2)  # bytes
        if s.pool and len(images) * per_image > CACHE_BYTES:
            raise UserError(
                f"pool={s.pool}: the tokens of {len(images)} images and of their damaged versions take "
                f"{len(images) * per_image / 2**30:.1f} GiB, more than {CACHE_BYTES / 2**30:.1f}. Lower pool, "
                "or set it to 0."
            )
        n = min(len(images), CACHE_BYTES // per_image)  # further images are tokenized whenever they come
        self.clean = torch.empty(n, N, D, dtype=torch.half)
        self.pool = {
            "tokens": torch.empty(s.pool, n, N, D, dtype=torch.half),
            "mask": torch.empty(s.pool, n, s.image_size, s.image_size, dtype=torch.bool),
        }
        for i in tqdm(range(0, n, s.batch_size), "tokens", unit="batch", leave=False):
            batch = images.batch(range(i, min(i + s.batch_size, n)), device)["image"]
            part = slice(i, i + len(batch))
            self.clean[part] = self._raw_tokens(batch)
            foreground = self._foreground(batch, images.textures[part])
            for version in range(s.pool):
                damaged = self.synthesis(batch, seed_of(self.seed, "pool", version), i, foreground)
                self.pool["tokens"][version, part] = self._raw_tokens(damaged["image"])
                self.pool["mask"][version, part] = damaged["mask"][:, 0]
        if s.standardise:
            self._measure(self.clean)
        if s.damage:
            self.protocol["textures"] = textures_used(s.textures, images.size)

    def _steps(self, images: ImageSet) -> int:
        """Steps of an epoch."""
        return math.ceil(len(images) / self.settings.batch_size)

    def _measure(self, tokens: Tensor) -> None:
        """Mean and standard deviation of each channel of (n,N,D), in single precision a few images at a time."""
        parts, n = tokens.split(64), len(tokens)
        sums = [part.mean((0, 1), dtype=torch.float) * len(part) for part in parts]
        mean = torch.stack(sums).sum(0) / n
        squares = [(part.float() - mean).square().mean(1).sum(0) for part in parts]
        std = (torch.stack(squares).sum(0) / n).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(1e-3))

    @torch.no_grad()
    def pairs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """t of the clean images, t_a of the images of which some are damaged, (B,N,D) both, and the mask M (B,S,S)."""
        s, x, seed = self.settings, batch["image"], next_seed()
        index: Any = batch["index"] if self.training else None
        if index is not None and self.clean is not None and int(index.max()) < len(self.clean):
            t = self._standard(self.clean[index].to(x.device).float())
            versions = s.pool
        else:  # the caches hold only training images, and not always all of them
            t = self.tokens(x)
            versions = 0
        t_a, M = t.clone(), torch.zeros_like(x[:, 0], dtype=torch.bool)
        draws = torch.rand(len(x), generator=generator(seed, "damaged"))
        chosen = (draws < s.damage).nonzero()[:, 0]  # places in the batch of those to be damaged
        if versions:
            version = torch.randint(versions, (len(x),), generator=generator(seed, "version"))[chosen]
            tokens = self.pool["tokens"][version, index[chosen]].to(x.device)
            t_a[chosen] = self._standard(tokens.float())
            M[chosen] = self.pool["mask"][version, index[chosen]].to(x.device)
        elif len(chosen):
            foreground = self._foreground(x[chosen], batch["texture"].numpy()[chosen])
            damaged = self.synthesis(x[chosen], seed_of(seed, "damage"), 0, foreground)
            t_a[chosen] = self.tokens(damaged["image"])
            M[chosen] = damaged["mask"][:, 0]
        return t, t_a, M

    def _foreground(self, images: Tensor, textures: ndarray) -> Tensor | None:
        """Where damage may lie (B,1,S,S), for images of which some are filled by a material; None: everywhere."""
        if self.settings.mode == "global":
            return None
        return foreground_mask(images) | torch.from_numpy(textures).to(images.device)[:, None, None, None]

    # --- losses ---

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Of R: distances of t_hat from the clean tokens t. Of G: how well it marks the damage M."""
        s, losses, t_hat = self.settings, {}, None
        t, t_a, M = self.pairs(batch)
        if self.reconstruction:
            random = generator(next_seed(), "masked")
            share = torch.rand(len(t), 1, generator=random) * s.mask_max  # of the tokens, for each image
            masked = torch.rand(t.shape[:2], generator=random) < share  # (B,N)
            t_hat = self.reconstruction(t_a, masked.to(t.device))
            losses["cosine"] = (1 - F.cosine_similarity(t_hat, t, dim=-1)).mean()
            losses["smooth_l1"] = 0.5 * F.smooth_l1_loss(t_hat, t)
        if self.segmentation:
            seen = t_hat.detach() if t_hat is not None and s.detach_rec else t_hat
            p = self.segment(t_a, seen)  # (B,S,S)
            p_true = torch.where(M, p, 1 - p).clamp(EPS, 1 - EPS)
            if s.seg_loss == "balanced":
                area = M.float().mean((1, 2), keepdim=True)  # (B,1,1)
                weight = torch.where(M, 0.5 / area.clamp_min(AREA), 0.5 / (1 - area).clamp_min(AREA))
                losses["segmentation"] = (weight * -p_true.log()).mean()
            else:
                losses["focal"] = ((1 - p_true).square() * -p_true.log()).mean()  # gamma 2, no alpha
                losses["l1"] = (p - M.float()).abs().mean()
        return losses

    def segment(self, t_a: Tensor, t_hat: Tensor | None) -> Tensor:
        """Tokens (B,N,D) -> probability (B,S,S) of being anomalous, from G."""
        assert self.segmentation is not None, "segment is on"
        parts = [t_a]
        if t_hat is not None:
            parts.append(t_hat)
            if self.settings.use_diff:
                parts.append((t_a - t_hat).abs())
        logits = self.segmentation(torch.cat(parts, -1))  # (B,2,S,S)
        return logits.float().softmax(1)[:, 1]

    def phases(self) -> list[Phase]:
        """One phase for both networks."""
        s = self.settings
        trained = [p for p in self.parameters() if p.requires_grad]
        schedule = warm_up_then_cosine(s.warm_up)
        return [
            Phase(
                "train",
                trained,
                self.epochs,
                s.batch_size,
                s.lr,
                torch.optim.AdamW,
                weight_decay=s.weight_decay,
                schedule=schedule,
            )
        ]

    # --- score ---

    def predict(self, images: Tensor) -> dict[str, Any]:
        """Images (B,3,S,S) -> the tokens and the maps that the score is made of, none of them smoothed.

        Returns
        -------
        t_a, t_hat
            Given and predicted tokens (B,N,D); `t_hat` is None without R.
        distance
            1 - cosine of the two (B,S,S); None without R.
        segmented
            Probability that G gives (B,S,S); None without G.
        map
            (B,S,S): `segmented`, times `distance` with the setting `product`; with one of them only, this one.
        """
        return self._predict(self.tokens(images), images.shape[-2:])

    def _predict(self, t_a: Tensor, size: torch.Size) -> dict[str, Any]:
        t_hat = distance = segmented = None
        if self.reconstruction:
            t_hat = self.reconstruct(t_a)
            distance = 1 - F.cosine_similarity(t_a, t_hat, dim=-1)  # (B,N)
            distance = distance.view(-1, 1, *self.tokenizer.patch_embed.grid_size)
            distance = F.interpolate(distance, size, mode="bilinear", align_corners=False)[:, 0]
        if self.segmentation:
            segmented = self.segment(t_a, t_hat)
        if segmented is None:
            map_ = distance
        elif distance is not None and self.settings.product:
            map_ = segmented * distance
        else:
            map_ = segmented
        return {"t_a": t_a, "t_hat": t_hat, "distance": distance, "segmented": segmented, "map": map_}

    def reconstruct(self, t_a: Tensor, parts: int | None = None) -> Tensor:
        """t_hat (B,N,D): from all tokens, or in so many random parts, each predicted while it is hidden.

        `parts` is the setting `hidden_parts` if it is None; 0 hides nothing.
        """
        assert self.reconstruction is not None, "reconstruct is on"
        B, N, _ = t_a.shape
        parts = self.settings.hidden_parts if parts is None else parts
        if not parts:
            return self.reconstruction(t_a)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(t_a.device)
        t_hat = torch.empty_like(t_a)
        for part in order.chunk(parts):
            masked = torch.zeros(B, N, dtype=torch.bool, device=t_a.device)
            masked[:, part] = True
            t_hat[:, part] = self.reconstruction(t_a, masked)[:, part]
        return t_hat

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): the map of `predict`, smoothed."""
        return gaussian_blur(self.predict(images)["map"], self.settings.sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): highest mean over a window, or mean of the highest pixels."""
        s = self.settings
        if s.score == "top":
            return top_mean(maps, s.top)
        means = F.avg_pool2d(maps[:, None], s.window, stride=1, padding=s.window // 2)  # (B,1,S,S)
        return means.amax((1, 2, 3))

    @torch.no_grad()
    def observe(self, images: ImageSet, device: torch.device) -> dict[str, int | float]:
        """Size of the caches, number of steps, and images per second with the tokenizer and without it."""
        s = self.settings
        x = images.batch(range(min(s.batch_size, len(images))), device)["image"]
        tokens = self.tokens(x)
        assert self.clean is not None, "prepare() was called"
        cached = [self.clean, *self.pool.values()]

        def per_second(function: Callable[[], Tensor]) -> float:
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                function().amax().item()  # waits for the device
                seconds.append(time.perf_counter() - began)
            return round(len(x) / min(seconds), 2)

        with autocast(x.device, s.amp):
            return {
                "train_steps": self.epochs * self._steps(images),
                "cache_mib": round(sum(c.numel() * c.element_size() for c in cached) / 2**20, 1),
                "images_per_s": per_second(lambda: self.anomaly_map(x)),
                "images_per_s_from_tokens": per_second(lambda: self._predict(tokens, x.shape[-2:])["map"]),
            }


class Reconstruction(nn.Module):
    """R: tokens (B,N,D) -> the anomaly-free tokens (B,N,D). Pre-norm transformer with learned positions."""

    def __init__(self, token_width: int, n_tokens: int, width: int, depth: int, heads: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.embed = nn.Linear(token_width, width)
        self.mask = nn.Parameter(0.02 * torch.randn(width))  # [MASK]
        self.positions = nn.Parameter(0.02 * torch.randn(n_tokens, width))
        Block = import_timm().models.vision_transformer.Block
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, token_width))

    def forward(self, tokens: Tensor, masked: Tensor | None = None) -> Tensor:
        """`masked` (B,N) bool: the tokens that [MASK] replaces."""
        x = self._embed(tokens, masked)  # (B,N,width)
        x = self.blocks(x)
        return self.head(x).float()

    def _embed(self, tokens: Tensor, masked: Tensor | None = None) -> Tensor:
        x = self.embed(self.dropout(tokens))
        if masked is not None:
            x = torch.where(masked[..., None], self.mask.to(x.dtype), x)
        return x + self.positions

    @torch.no_grad()
    def attention(self, tokens: Tensor, block: int = -1) -> Tensor:
        """Tokens (B,N,D) -> (B,heads,N,N): how a block spreads each token's attention (rows) over all tokens."""
        chosen: Any = self.blocks[block]
        x = self.blocks[:block](self._embed(tokens))  # the blocks before it
        attn = chosen.attn
        B, N, _ = x.shape
        qkv = attn.qkv(chosen.norm1(x)).view(B, N, 3, attn.num_heads, -1)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B,heads,N,width/heads) each
        return (q @ k.mT * attn.scale).softmax(-1)


class Segmentation(nn.Module):
    """G: what is known at each token (B,N,C) -> logits (B,2,S,S), normal and anomalous.

    Two residual blocks on the grid, then doublings of its side, at half the channels each, until S / 2 is reached.
    """

    def __init__(self, channels: int, grid: tuple[int, int], width: int, image_size: int):
        super().__init__()
        self.grid, self.image_size = grid, image_size
        self.residual = nn.ModuleList(nn.Sequential(*_conv(width, width), *_conv(width, width)) for _ in range(2))
        up: list[nn.Module] = []
        side, c_in = min(grid), width
        while side < image_size / 2:
            c_out = max(c_in // 2, 8)
            up += [nn.Upsample(scale_factor=2, mode="bilinear"), *_conv(c_in, c_out)]
            side, c_in = 2 * side, c_out
        self.up = nn.Sequential(*up, nn.Conv2d(c_in, 2, 1))
        self.embed = nn.Conv2d(channels, width, 1)  # drawn last: the other weights do not depend on what G sees

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.mT.unflatten(2, self.grid)  # (B,C,h,w)
        x = self.embed(x)
        for block in self.residual:
            x = x + block(x)
        size = (self.image_size, self.image_size)
        return F.interpolate(self.up(x), size, mode="bilinear", align_corners=False)


def _conv(c_in: int, c_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()


def _check(s: Settings) -> None:
    """Refuse settings that contradict each other or that have no meaning."""
    if not (s.reconstruct or s.segment):
        raise UserError("reconstruct and segment are both off: nothing is left that could be trained.")
    if s.segment and not s.damage:
        raise UserError("damage=0 leaves the segmentation nothing to learn from. Raise it, or set segment to false.")
    for name in ("damage", "mask_max", "dropout", "top"):
        if getattr(s, name) > 1:
            raise UserError(f"{name}={getattr(s, name)} is a share: from 0 to 1.")
    if s.warm_up >= 1:
        raise UserError(f"warm_up={s.warm_up} leaves no step after it: it has to be below 1.")
    if not s.heads or s.width % s.heads:
        raise UserError(f"width={s.width} cannot be split between heads={s.heads}.")
    if not s.window % 2:
        raise UserError(f"window={s.window}: give an odd number of pixels.")
