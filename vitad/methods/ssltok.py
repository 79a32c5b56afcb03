"""Tokens of a frozen self-supervised ViT, predicted without the anomaly by one network, compared by another.

In the manner of Kim & Kwon 2024, "Unsupervised Visual Anomaly Detection Using Self-Supervised Pre-Trained Transformer",
IEEE Access 12, 127604-127613, DOI 10.1109/ACCESS.2024.3454753.

    image -> tokenizer T (frozen) -> tokens t_a
    t_a -> reconstruction R -> tokens t_hat as they would be without anomaly;  t_a -> memory -> t_m, the nearest normal
    anomaly map = how far t_a is from t_hat and t_m, where the segmentation G marks what it sees of the three

Each token is predicted twice: once R sees all tokens, once it does not see the token itself.

The paper's, from its abstract, all that is public to us: the frozen self-supervised ViT as image tokenizer, the masked
language model as model, R that predicts anomaly-free patch tokens, G that segments from both kinds of tokens, and
that only R and G are trained. Ours: the memory, every layer, number, loss and kind of damage below, in short a DRAEM
(Zavrtanik et al. 2021) whose images are tokens, beside a PatchCore (Roth et al. 2022). It is no reproduction. The file
is long because the training pairs are cached: the frozen tokens of the images, and of a pool of damaged ones.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
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
from vitad.processes import drawn
from vitad.randomness import fixed_order, generator, next_seed, seed_of, seeded
from vitad.training import Phase, autocast, warm_up_then_cosine
from vitad.transfer import to_device

PAPER = "in the manner of Kim & Kwon 2024, IEEE Access 12, 127604-127613"
CATEGORY = None
CACHE_BYTES = 8 * 2**30  # of tokens and masks kept in the host's memory
EPS = 1e-5  # probabilities stay this far from 0 and 1 in the loss
CHUNK = 8192  # tokens of the bank that are compared at a time, as in patchknn
AREA = 1e-3  # share of an image below which its damage weighs less in the loss


@dataclass(frozen=True)
class Settings:
    """Everything but the kind of tokenizer is ours. experiments/select_ssltok.py compares candidates for it."""

    tokenizer: str = DINOV2_S14  # abstract: a self-supervised ViT
    pretrained: bool = True  # abstract
    image_size: int = 224
    blocks: tuple[int, ...] = (4, 6, 8)  # mean of their outputs, each after the encoder's final norm
    # damage, see data/synthesis/
    damage: float = 0.5  # probability of an image to be damaged
    kinds: tuple[str, ...] = ("anything",)  # the kind that is made for no data set
    mode: Literal["global", "local", "both"] = "both"  # global: anywhere; local: on the object; both: by chance
    textures: str = "procedural"
    keep_grey: bool = True  # a camera without colour sees no coloured damage
    pool: int = 3  # fixed damaged versions of each image, whose tokens are cached too; 0: drawn anew in every step
    # memory
    remember: bool = True
    bank_size: int = 40_000  # tokens of normal images that are kept, as in patchknn's small; all if there are fewer
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
    # training
    epochs: int = 100
    min_steps: int = 5000  # more epochs where `epochs` make fewer steps
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.05  # biases and norms do not decay
    warm_up: float = 0.05  # share of the steps in which the learning rate rises from 0
    # score
    hidden_parts: int = 4  # the tokens are hidden in so many parts in turn, and predicted unseen; 0: never
    sigma: float = 4.0  # smoothing of the map, px
    top: float = 0.01  # share of the map whose mean is the image score
    amp: bool = True  # mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # For two cores: narrow subnetworks and few steps.
    "small": {"width": 192, "depth": 2, "heads": 6, "seg_width": 64, "epochs": 10, "min_steps": 600},
    # The same on smaller images, for less than a minute.
    "demo": {
        "image_size": 168,
        "width": 192,
        "depth": 2,
        "heads": 6,
        "seg_width": 64,
        "epochs": 10,
        "min_steps": 200,
        "batch_size": 8,
        "sigma": 3.0,
    },
    "smoke": {
        "tokenizer": "test_vit",
        "pretrained": False,
        "image_size": 64,
        "blocks": (2, 4),
        "pool": 1,
        "bank_size": 200,
        "width": 32,
        "depth": 1,
        "heads": 2,
        "seg_width": 32,
        "epochs": 2,
        "min_steps": 0,
        "hidden_parts": 2,
        "sigma": 1.0,
        "amp": False,
    },
}

# Each takes one idea away.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no_seg": {"segment": False},  # the map is the distance of t_a from t_hat and t_m
    "no_rec": {"reconstruct": False},  # the memory and G, without t_hat
    "no_mem": {"remember": False},  # R and G, without t_m
    "no_mask": {"mask_max": 0.0, "hidden_parts": 0},  # without masks in training, hidden tokens cannot be predicted
    "no_synth": {"damage": 0.0, "segment": False},  # masking alone; without damage G has nothing to learn from
}


class Model(Method):
    """Tokenizer, memory, training pairs, losses and score, in that order; the two subnetworks follow below.

    `weights` is the source of the tokenizer's weights, as in `backbones.vit`; without `pretrained` it is not used.
    """

    settings: Settings
    revision = 2
    mean: Tensor
    std: Tensor
    bank: Tensor

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
        self.register_buffer("bank", torch.zeros(0, D))  # of the memory
        self.synthesis = Synthesis(s.kinds, 1.0, s.mode, s.textures, keep_grey=s.keep_grey)
        self.reconstruction: Reconstruction | None = None
        self.segmentation: Segmentation | None = None
        if s.reconstruct:
            with seeded(self.seed, "reconstruction"):
                self.reconstruction = Reconstruction(D, math.prod(grid), s.width, s.depth, s.heads, s.dropout)
        if s.segment:
            parts = 1 + 2 * s.reconstruct + s.remember  # t_a, t_hat, and how far t_a is from t_hat and from t_m
            with seeded(self.seed, "segmentation"):
                self.segmentation = Segmentation(parts * D, grid, s.seg_width, s.image_size)
        # From prepare():
        self.clean: Tensor | None = None  # (n,N,D) half: tokens of the training images
        self.pool: dict[str, Tensor] = {}  # `tokens` (pool,n,N,D) half and `mask` (pool,n,S,S): the damaged versions
        self.nearest: Tensor | None = None  # (1+pool,n,N): row of the bank nearest to each token, of another item
        self.items, self.owners = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        self.epochs = s.epochs
        self.protocol = {
            "normalisation": "imagenet",
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": f"mean of the highest {s.top:.1%} of the map",
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
        """Each channel by its mean and standard deviation over the training images."""
        return (tokens - self.mean) / self.std

    def train(self, mode: bool = True) -> Self:
        """As usual, but the tokenizer stays in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    # --- memory ---

    @torch.no_grad()
    def look_up(self, tokens: Tensor, items: Tensor | None = None) -> Tensor:
        """Raw tokens (B,N,D) -> (B,N): row of the bank with the highest cosine similarity to each.

        With `items` (B,) tokens of the same item are passed over, so that a training image does not find itself.
        """
        with torch.autocast(tokens.device.type, enabled=False):  # half precision cannot tell cosines near 1 apart
            tokens = F.normalize(tokens.float(), dim=-1)
            best = tokens.new_full(tokens.shape[:2], -torch.inf)
            row = torch.zeros_like(best, dtype=torch.long)
            for first, part in zip(range(0, len(self.bank), CHUNK), self.bank.split(CHUNK), strict=True):
                similarity = tokens @ F.normalize(part, dim=-1).T  # (B,N,CHUNK)
                if items is not None:
                    same = items[:, None, None] == self.owners[first : first + CHUNK]  # (B,1,CHUNK)
                    similarity.masked_fill_(same.to(tokens.device), -torch.inf)
                highest, index = similarity.max(-1)
                row = torch.where(highest > best, index + first, row)
                best = torch.maximum(highest, best)
            return row

    def _fill_bank(self) -> None:
        """Keep tokens of the training images, drawn evenly."""
        assert self.clean is not None, "the tokens are there"
        n, N, D = self.clean.shape
        size = min(self.settings.bank_size, n * N)
        chosen = torch.randperm(n * N, generator=generator(self.seed, "bank"))[:size].sort().values
        self.bank = self.clean.view(-1, D)[chosen].to(self.bank)
        self.owners = self.items[chosen // N]
        if self.owners.eq(self.owners[0]).all():
            raise UserError(
                f"remember=True: the {size} tokens that are kept are all of one item, which may not find itself. Train "
                "on images of other items as well, raise bank_size, or set remember to false."
            )

    def fill_for_timing(self) -> None:
        """Fill the bank with random tokens, and the caches with a pair of images."""
        s, N, D = self.settings, self.tokenizer.patch_embed.num_patches, len(self.mean)
        if s.remember:
            self.bank = torch.randn(s.bank_size, D, device=self.bank.device)
        with torch.device("cpu"):  # as the caches are
            self.items, self.owners = torch.zeros(1, dtype=torch.long), torch.full((len(self.bank),), -1)
            self.clean = torch.randn(1, N, D, dtype=torch.half)
            self.pool = {
                "tokens": torch.randn(s.pool, 1, N, D, dtype=torch.half),
                "mask": torch.zeros(s.pool, 1, s.image_size, s.image_size, dtype=torch.bool),
            }
            if s.remember and s.pool:
                self.nearest = torch.zeros(1 + s.pool, 1, N, dtype=torch.int32)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if (bank := state.get(prefix + "bank")) is not None:
            self.bank = torch.empty_like(bank, device=self.bank.device)  # its size depends on the data
        super()._load_from_state_dict(state, prefix, *rest)

    # --- training pairs ---

    def size_up(self, categories: ndarray) -> None:
        """More epochs where there are few images."""
        self.epochs = max(self.settings.epochs, math.ceil(self.settings.min_steps / self._steps(len(categories))))

    @torch.no_grad()
    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Cache the tokens of the training images, and of the pool of damaged ones, in half precision on the host.

        The damage depends on the model's seed, the version and the images, so a resumed run has the same cache.
        """
        s = self.settings
        N, D = self.tokenizer.patch_embed.num_patches, len(self.mean)
        self.size_up(images.categories)
        pool = s.pool if s.damage else 0  # without damage nothing reads the damaged versions
        per_image = 2 * N * D + pool * (2 * N * D + s.image_size**2) + 4 * (1 + pool) * N  # bytes
        if pool and len(images) * per_image > CACHE_BYTES:
            raise UserError(
                f"pool={s.pool}: the tokens of {len(images)} images and of their damaged versions take "
                f"{len(images) * per_image / 2**30:.1f} GiB, more than {CACHE_BYTES / 2**30:.1f}. Lower pool, "
                "or set it to 0."
            )
        n = min(len(images), CACHE_BYTES // per_image)  # further images are tokenized whenever they come
        self.items = torch.from_numpy(np.unique(images.groups, return_inverse=True)[1])
        self.clean = torch.empty(n, N, D, dtype=torch.half)
        self.pool = {
            "tokens": torch.empty(pool, n, N, D, dtype=torch.half),
            "mask": torch.empty(pool, n, s.image_size, s.image_size, dtype=torch.bool),
        }
        for i in tqdm(range(0, n, s.batch_size), "tokens", unit="batch", leave=False):
            batch = images.batch(range(i, min(i + s.batch_size, n)), device)["image"]
            part = slice(i, i + len(batch))
            self.clean[part] = self._raw_tokens(batch)
            foreground = self._foreground(batch, images.textures[part])
            for version in range(pool):
                damaged = self.synthesis(batch, seed_of(self.seed, "pool", version), i, foreground)
                self.pool["tokens"][version, part] = self._raw_tokens(damaged["image"])
                self.pool["mask"][version, part] = damaged["mask"][:, 0]
        self._measure(self.clean)
        if s.remember:
            self._fill_bank()
        if s.remember and s.pool:  # drawn anew, damage is looked up in every step
            versions = [self.clean, *self.pool["tokens"]]
            self.nearest = torch.empty(len(versions), n, N, dtype=torch.int32)
            for i in tqdm(range(0, n, s.batch_size), "memory", unit="batch", leave=False):
                part = slice(i, min(i + s.batch_size, n))
                for row, tokens in zip(self.nearest, versions, strict=True):
                    row[part] = self.look_up(tokens[part].to(device), self.items[part])
        if s.damage:
            self.protocol["textures"] = textures_used(s.textures, images.size)

    def _steps(self, n_images: int) -> int:
        """Steps of an epoch."""
        return math.ceil(n_images / self.settings.batch_size)

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
    def pairs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """t of clean images, t_a of the same, some damaged, their t_m, (B,N,D) each, and the mask M (B,S,S).

        In training t_m is of other items. It is None without the memory.
        """
        s, x, seed = self.settings, batch["image"], next_seed()
        index: Any = batch["index"] if self.training else None
        cached = index is not None and self.clean is not None and int(index.max()) < len(self.clean)
        # The caches hold only training images, and not always all of them.
        raw = (
            to_device(self.clean[index], x.device).float() if cached and self.clean is not None else self._raw_tokens(x)
        )
        t = self._standard(raw)
        M = torch.zeros_like(x[:, 0], dtype=torch.bool)
        draws = drawn(batch, lambda B: torch.rand(B, generator=generator(seed, "damaged")))
        chosen = (draws < s.damage).nonzero()[:, 0]  # places in the batch of those to be damaged
        row = torch.zeros(len(x), dtype=torch.long)  # 0: clean, else one more than the version
        if cached and s.pool:
            version = drawn(batch, lambda B: torch.randint(s.pool, (B,), generator=generator(seed, "version")))[chosen]
            places = to_device(chosen, x.device)
            raw[places] = to_device(self.pool["tokens"][version, index[chosen]], x.device).float()
            M[places] = to_device(self.pool["mask"][version, index[chosen]], x.device)
            row[chosen] = version + 1
        elif s.damage and "share" in batch:
            raise UserError(
                f"damage that is made in a step, with pool={s.pool}, is that of one process. "
                "Start one, or let pool hold the damaged versions of all images."
            )
        elif len(chosen):
            foreground = self._foreground(x[chosen], batch["texture"][chosen].numpy())
            damaged = self.synthesis(x[chosen], seed_of(seed, "damage"), 0, foreground)
            raw[chosen] = self._raw_tokens(damaged["image"])
            M[chosen] = damaged["mask"][:, 0]
        t_m = None
        if s.remember:
            if cached and s.pool and self.nearest is not None:
                nearest = to_device(self.nearest[row, index], x.device).long()
            else:
                nearest = self.look_up(raw, None if index is None else self.items[index])
            t_m = self._standard(self.bank[nearest])
        return t, self._standard(raw), t_m, M

    def _foreground(self, images: Tensor, textures: ndarray) -> Tensor | None:
        """Where damage may lie (B,1,S,S), for images of which some are filled by a material; None: everywhere."""
        if self.settings.mode == "global":
            return None
        return foreground_mask(images) | torch.from_numpy(textures).to(images.device)[:, None, None, None]

    # --- losses ---

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Of R: distances of t_hat from the clean tokens t. Of G, which does not reach R: how well it marks M."""
        s, losses, t_hat = self.settings, {}, None
        t, t_a, t_m, M = self.pairs(batch)
        if self.reconstruction:
            random = generator(next_seed(), "masked")
            N = t.shape[1]
            share = drawn(batch, lambda B: torch.rand(B, 1, generator=random)) * s.mask_max  # of each image's tokens
            masked = drawn(batch, lambda B: torch.rand(B, N, generator=random)) < share  # (B,N)
            t_hat = self.reconstruction(t_a, to_device(masked, t.device))
            losses["cosine"] = (1 - F.cosine_similarity(t_hat, t, dim=-1)).mean()
            losses["smooth_l1"] = 0.5 * F.smooth_l1_loss(t_hat, t)
        if self.segmentation:
            p = self.segment(t_a, None if t_hat is None else t_hat.detach(), t_m)  # (B,S,S)
            p_true = torch.where(M, p, 1 - p).clamp(EPS, 1 - EPS)
            area = M.float().mean((1, 2), keepdim=True)  # (B,1,1); half of the loss is for the damage
            weight = torch.where(M, 0.5 / area.clamp_min(AREA), 0.5 / (1 - area).clamp_min(AREA))
            losses["segmentation"] = (weight * -p_true.log()).mean()
        return losses

    def segment(self, t_a: Tensor, t_hat: Tensor | None, t_m: Tensor | None) -> Tensor:
        """Tokens (B,N,D) -> probability (B,S,S) of being anomalous, from G. t_hat or t_m is None where it is off."""
        assert self.segmentation is not None, "segment is on"
        parts = [t_a]
        if t_hat is not None:
            parts += [t_hat, (t_a - t_hat).abs()]
        if t_m is not None:
            parts.append((t_a - t_m).abs())
        logits = self.segmentation(torch.cat(parts, -1))  # (B,2,S,S)
        return logits.float().softmax(1)[:, 1]

    def phases(self) -> list[Phase]:
        """One phase for both networks."""
        s = self.settings
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            Phase(
                "train",
                trained,
                self.epochs,
                s.batch_size,
                s.lr,
                torch.optim.AdamW,
                weight_decay=s.weight_decay,
                decay_vectors=False,
                schedule=warm_up_then_cosine(s.warm_up),
            )
        ]

    # --- score ---

    def predict(self, images: Tensor) -> dict[str, Any]:
        """Images (B,3,S,S) -> the tokens and the maps that the score is made of, none of them smoothed.

        Returns
        -------
        t_a, t_hat, unseen, t_m
            Given tokens, tokens predicted with all in view and unseen, remembered tokens, (B,N,D) each. None where R,
            `hidden_parts` or the memory is off.
        distances
            {name: map (B,S,S)}: 1 - cosine of t_a and each of the other three that is there. For t_m both are as the
            tokenizer gives them, not standardised, as in the look-up.
        distance
            Their geometric mean (B,S,S).
        segmented
            Probability that G gives (B,S,S); None without G.
        map
            (B,S,S): `segmented` times `distance`, or the one that is there.
        """
        return self._predict(self._raw_tokens(images), images.shape[-2:])

    def _predict(self, raw: Tensor, size: torch.Size) -> dict[str, Any]:
        t_a = self._standard(raw)
        normal: dict[str, Tensor] = {}  # what the tokens would be without anomaly
        distances: dict[str, Tensor] = {}
        if self.reconstruction:
            normal["t_hat"] = self.reconstruction(t_a)
            if self.settings.hidden_parts:
                normal["unseen"] = self.unseen(t_a)
            distances = {name: self._distance(t_a, tokens, size) for name, tokens in normal.items()}
        if self.settings.remember:
            near = self.bank[self.look_up(raw)]
            normal["t_m"] = self._standard(near)
            distances["t_m"] = self._distance(raw, near, size)  # as it was looked up
        factors = [math.prod(distances.values()).clamp_min(0) ** (1 / len(distances))] if distances else []
        found = {"t_a": t_a, **dict.fromkeys(("t_hat", "unseen", "t_m")), **normal, "distances": distances}
        found["distance"] = factors[0] if factors else None
        found["segmented"] = None
        if self.segmentation:
            found["segmented"] = self.segment(t_a, found["t_hat"], found["t_m"])
            factors.append(found["segmented"])
        return found | {"map": math.prod(factors)}

    def unseen(self, t_a: Tensor) -> Tensor:
        """Tokens (B,N,D), each predicted while a random part of all tokens, itself among them, is hidden from R."""
        assert self.reconstruction is not None, "reconstruct is on"
        B, N, _ = t_a.shape
        order = fixed_order(N).to(t_a.device)
        predicted = torch.empty_like(t_a)
        for part in order.chunk(self.settings.hidden_parts):
            masked = torch.zeros(B, N, dtype=torch.bool, device=t_a.device)
            masked[:, part] = True
            predicted[:, part] = self.reconstruction(t_a, masked)[:, part]
        return predicted

    def _distance(self, tokens: Tensor, others: Tensor, size: torch.Size) -> Tensor:
        """1 - cosine of tokens (B,N,D), for each pixel (B,S,S), interpolated."""
        distance = 1 - F.cosine_similarity(tokens, others, dim=-1)
        grid = distance.view(-1, 1, *self.tokenizer.patch_embed.grid_size)
        return F.interpolate(grid, size, mode="bilinear", align_corners=False)[:, 0]

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): the map of `predict`, smoothed."""
        return gaussian_blur(self.predict(images)["map"], self.settings.sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): mean of the highest pixels."""
        return top_mean(maps, self.settings.top)

    @torch.no_grad()
    def observe(self, images: ImageSet, device: torch.device) -> dict[str, int | float]:
        """Size of the caches, number of steps, and images per second with the tokenizer and without it."""
        s = self.settings
        x = images.batch(range(min(s.batch_size, len(images))), device)["image"]
        tokens = self._raw_tokens(x)
        assert self.clean is not None, "prepare() was called"
        cached = [self.clean, *self.pool.values()] + ([] if self.nearest is None else [self.nearest])

        def per_second(function: Callable[[], Tensor]) -> float:
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                function().amax().item()  # waits for the device
                seconds.append(time.perf_counter() - began)
            return round(len(x) / min(seconds), 2)

        with autocast(x.device, s.amp):
            return {
                "train_steps": self.epochs * self._steps(len(images)),
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
    if s.remember and s.bank_size < 1:
        raise UserError(f"bank_size={s.bank_size} has to be at least 1, or set remember to false.")
    if not s.heads or s.width % s.heads:
        raise UserError(f"width={s.width} cannot be split between heads={s.heads}.")
