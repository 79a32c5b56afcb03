"""MALA: a masked autoencoder learns what is normal; frozen, it then serves a decoder that paints the defect's mask.

Chen et al. 2023, "A Novel MAE-Based Self-Supervised Anomaly Detection and Localization Method", IEEE Access 11,
DOI 10.1109/ACCESS.2023.3332475.

    stage 1   image, a quarter of its patches -> encoder -> decoder -> image;  PLPM tells images from rebuilt ones
    stage 2   damaged image -> encoder, frozen -> decoder, and TBM over first, last and decoded tokens -> mask

Equation and section numbers are the paper's. "Ours" marks what it leaves open, and what it misprints. The file is long
because the paper trains two models one after the other, and because it reads MAE's files of weights.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vitad.backbones import DINOV2_S14, IMAGENET_MEAN, IMAGENET_STD, import_timm, vit
from vitad.blocks import ssim_map
from vitad.data.samples import ImageSet
from vitad.data.synthesis import Synthesis, foregrounds, textures_used
from vitad.errors import UserError
from vitad.files import read_safetensors, sha256
from vitad.methods.base import Method
from vitad.processes import drawn
from vitad.randomness import fixed_order, next_seed, seed_of, seeded
from vitad.training import Phase, in_parts, warm_up_then_cosine
from vitad.transfer import to_device

PAPER = "Chen et al. 2023, MALA, IEEE Access 11"
CATEGORY = "all"  # one model for all categories is the paper's point


@dataclass(frozen=True)
class Settings:
    """The defaults are the paper's; *ours* marks what it leaves open."""

    encoder: str = "vit_large_patch16_224.mae"  # sec. IV-C: 24 blocks, width 1024, a grid of 14 x 14, from MAE
    depth: int | None = None  # ours: only the first blocks of the encoder; all by default
    pretrained: bool = True  # sec. IV-C: ImageNet-1k, encoder and decoder
    image_size: int = 224  # sec. IV-C
    decoder_width: int = 512  # sec. IV-C
    decoder_depth: int = 8  # sec. IV-C
    decoder_heads: int = 16  # MAE's code
    pipeline: Literal["e2e", "recon"] = "e2e"  # sec. IV-E; recon: the map is the error of the reconstruction
    # stage 1
    stage1: bool = True  # sec. IV-E; off: weights as they come
    stage1_encoder: bool = True  # sec. III-A: on; ours, off: an encoder that no MAE made stays frozen
    stage1_images: int = 200  # sec. IV-C, of each category; 0 takes all
    resample_each_epoch: bool = False  # ours: sec. IV-C's "in each epoch" may mean other images each time
    stage1_epochs: int = 2000  # sec. IV-C
    stage1_batch_size: int = 128  # sec. IV-C
    micro_batch: int = 0  # ours: so many images of stage 1 at once (0: all); 16 need less than 11 GiB
    stage1_lr: float = 1e-3  # sec. IV-C: for 256 images, scaled with the size of the batch
    warm_up: float = 0.02  # ours: share of the steps in which the learning rate rises; MAE's 40 epochs, then its cosine
    mask_ratio: float = 0.75  # sec. III-A
    mask_fill: Literal["zeros", "mask_token"] = "zeros"  # sec. III-A; MAE's is a learned token
    plpm: Literal["adversarial", "joint", "off"] = "adversarial"  # ours: sec. III-A has "generative-adversarial", Eq. 3
    plpm_channels: tuple[int, ...] = (64, 128, 256, 512)  # ours: "convolutional layers"
    alpha: tuple[float, ...] = (1.0, 1.0, 0.01)  # ours: Eq. 3, L1, SSIM and CE
    # stage 2
    tbm: bool = True  # sec. IV-E; off: a linear layer over the decoder's tokens
    stage2_images: int = 80  # sec. IV-C, of each category; 0 takes all
    epochs: int = 700  # sec. IV-C
    batch_size: int = 32  # sec. IV-C
    lr: float = 1e-4  # ours: sec. IV-C has a fixed one
    damage: float = 0.8  # sec. IV-C: 64 of the 80 of each category, others in every epoch
    mode: Literal["global", "local", "both"] = "both"  # sec. III-B; ours: an even chance
    foreground: str = "otsu"  # ours: how the object is found; or a folder of masks, see `synthesis.foregrounds`
    textures: str = "procedural"  # ours where no folder is given; sec. IV-C: DTD, whose folder can be given here
    keep_grey: bool = False  # ours: paint no colour on grey images
    beta: tuple[float, ...] = (0.6, 0.4)  # ours: Eq. 6, L1 and focal; MemSeg's code
    gamma: float = 4.0  # ours: of the focal loss; MemSeg's code
    # both stages
    betas: tuple[float, ...] = (0.9, 0.95)  # sec. IV-C, AdamW; ours: also in stage 2
    weight_decay: float = 0.05  # sec. IV-C; biases and norms do not decay, as in MAE's code
    # score
    recon_passes: Literal["complementary", "unmasked"] = "complementary"  # ours: with pipeline=recon
    window: int = 21  # ours: the k of Eq. 7, px; DRAEM's code
    amp: bool = True  # ours: mixed precision where it is faster


# The first two thirds of DINOv2 ViT-S/14, as they come, in place of MAE's ViT-L, a smaller decoder and PLPM, and few
# epochs of small batches, over as many images as the paper takes. Left out, as in `demo`: an encoder that was made by
# MAE and adapts.
TWO_CORES: dict[str, Any] = {
    "encoder": DINOV2_S14,
    "depth": 8,
    "decoder_width": 256,
    "decoder_depth": 2,
    "decoder_heads": 8,
    "stage1_encoder": False,
    "stage1_epochs": 30,
    "stage1_batch_size": 8,
    "stage1_lr": 3.2e-2,
    "warm_up": 0.1,
    "plpm_channels": (16, 32, 64, 128),
    "epochs": 40,
    "batch_size": 8,
    "lr": 5e-4,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # For one GPU: the smallest of MAE's encoders, a twentieth of stage 1 and a fourteenth of stage 2.
    "small": {"encoder": "vit_base_patch16_224.mae", "stage1_epochs": 100, "epochs": 50},
    # What two cores can train, and tiles: they fill the picture (global) and are grey.
    "small_dinov2": TWO_CORES | {"mode": "global", "keep_grey": True},
    # The same with the paper's damage. One model of three categories of MVTec AD takes less than an hour.
    "near": TWO_CORES,
    # Half a minute on two cores: the first half of DINOv2 ViT-S/14, as it comes, in place of MAE's ViT-L; a quarter of
    # the pixels, a smaller decoder and PLPM, a hundredth of the epochs or less. MAE's own features and their adaptation
    # to the images, half of the paper's idea, are thus left out.
    "demo": {
        "encoder": DINOV2_S14,
        "depth": 6,
        "image_size": 112,
        "decoder_width": 192,
        "decoder_depth": 2,
        "decoder_heads": 6,
        "stage1_encoder": False,
        "stage1_epochs": 8,
        "stage1_batch_size": 8,
        "stage1_lr": 3.2e-2,
        "warm_up": 0.1,
        "plpm_channels": (8, 16, 32, 64),
        "stage2_images": 0,
        "epochs": 5,
        "batch_size": 8,
        "lr": 5e-4,
        "keep_grey": True,
        "window": 11,
    },
    "smoke": {
        "encoder": "test_vit",
        "pretrained": False,
        "image_size": 64,
        "decoder_width": 32,
        "decoder_depth": 1,
        "decoder_heads": 2,
        "stage1_epochs": 2,
        "stage1_batch_size": 16,
        "stage1_lr": 8e-3,
        "plpm_channels": (4, 8, 8, 8),
        "epochs": 2,
        "batch_size": 16,
        "lr": 1e-3,
        "window": 5,
        "amp": False,
    },
}

# Sec. IV-E: what each part is worth.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "recon": {"pipeline": "recon"},
    "no_stage1": {"stage1": False},
    "no_plpm": {"plpm": "off"},
    "no_tbm": {"tbm": False},
}


class Model(Method):
    """The parts, stage 1, stage 2 and the score, in that order.

    `weights` is `auto` (encoder as in `backbones.vit`, decoder random), `random`, or a file with MAE's names, see
    `load_mae`; without `pretrained` it is not used.
    """

    revision = 2  # biases and norms do not decay, the number of damaged images is exact, textures have no background
    settings: Settings
    mean: Tensor
    std: Tensor
    encoder: Any  # a VisionTransformer of timm
    plpm: Any  # nn.Sequential; None where it is off
    tbm: Any  # TokenBalance, or nn.Linear in its place; None with pipeline=recon

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        _check(s)
        source = str(weights) if s.pretrained else "random"
        with seeded(self.seed, "encoder"):
            self.encoder, self.weights = vit(s.encoder, s.image_size, source if source == "auto" else "random")
        if s.depth is not None and not 1 <= s.depth <= len(self.encoder.blocks):
            raise UserError(f"depth={s.depth}: {s.encoder} has 1 to {len(self.encoder.blocks)} blocks.")
        self.encoder.blocks = self.encoder.blocks[: s.depth]
        P, self.grid = self.encoder.patch_embed.patch_size[0], self.encoder.patch_embed.grid_size
        D_e, D_d = self.encoder.embed_dim, s.decoder_width
        positions = sincos(self.grid, D_e)
        if self.encoder.pos_embed.shape != positions.shape:
            raise UserError(f"encoder={s.encoder} has more or fewer than one token beside its patches.")
        if source == "auto":
            self.weights = self.weights | {"source": f"{self.weights['source']}, decoder random"}
        else:
            self.encoder.pos_embed.data = positions
        self.encoder.requires_grad_(s.stage1 and s.stage1_encoder)
        self.encoder.pos_embed.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])
        with seeded(self.seed, "decoder"):
            self.decoder = Decoder(self.grid, D_e, D_d, s.decoder_depth, s.decoder_heads, 3 * P * P, s.mask_fill)
        with seeded(self.seed, "plpm"):
            self.plpm = plpm(s.plpm_channels) if s.stage1 and s.plpm != "off" else None
        self.tbm = None
        if s.pipeline == "e2e":
            with seeded(self.seed, "tbm"):
                self.tbm = TokenBalance(D_e, D_d, 2 * P * P) if s.tbm else nn.Linear(D_d, 2 * P * P)
        if source not in ("auto", "random"):
            self.weights = load_mae(self, source)
        self.synthesis = Synthesis(("perlin",), s.damage, s.mode, s.textures, keep_grey=s.keep_grey)
        # From size_up() and prepare():
        self.chosen: dict[int, Any] = {1: None, 2: None}  # indices of the images of each stage; None: all
        self.drawn_anew: Callable[[np.random.Generator], ndarray] | None = None  # draws those of an epoch of stage 1
        self.foreground: Tensor | None = None  # (n,1,S,S), of the images of stage 2
        self.categories = np.empty(0, str)  # of the training images
        self.to_damage: ndarray | None = None  # indices of the images that get damage in this epoch of stage 2
        self.protocol = {
            "normalisation": "imagenet",
            "smoothing": "none",
            "image_score": f"maximum of the map's mean over {s.window} x {s.window} px",
            "checkpoint": "last epoch",
        }

    def normalised(self, images: Tensor) -> Tensor:
        """Images in [0,1] -> images with the mean and the standard deviation of ImageNet."""
        return (images - self.mean) / self.std

    def tokens(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (B,3,S,S) in [0,1] -> outputs of the first block and of the last, the last normed: (B,N,D_e) both.

        With `visible` (B,n), indices of patches, only these are computed, and come in that order: (B,n,D_e).
        """
        e = self.encoder
        z = e.patch_embed(self.normalised(images))
        z = z.flatten(1, -2)  # (B,N,D_e): some encoders keep the grid
        z = z + e.pos_embed[:, 1:]
        if visible is not None:
            z = z.gather(1, visible[..., None].expand(-1, -1, z.shape[2]))  # (B,n,D_e)
        z_cls = (e.cls_token + e.pos_embed[:, :1]).expand(z.shape[0], -1, -1)
        z = e.norm_pre(torch.cat([z_cls, z], 1))  # (B,1+n,D_e)
        first = e.blocks[0](z)
        last = e.norm(e.blocks[1:](first))  # Eq. 1
        return first[:, 1:], last[:, 1:]  # without the class token

    # --- stage 1: perceive normal patterns ---

    def random_visible(self, B: int, device: torch.device | str) -> Tensor:
        """Indices (B,n) of the patches that stay visible, drawn for each image."""
        N = self.encoder.patch_embed.num_patches
        n = n_visible(N, self.settings.mask_ratio)
        shuffled = torch.rand(B, N).argsort(1)  # each row a permutation of the N patches
        return to_device(shuffled[:, :n], torch.device(device))

    def reconstruct(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """X (B,3,S,S) in [0,1] -> X_bar (B,3,S,S), rebuilt from the visible patches or from all."""
        _, last = self.tokens(images, visible)
        decoded = self.decoder(last, visible)  # (B,N,D_d)
        pixels = self.decoder.pred(decoded).float()  # Eq. 2, (B,N,3PP)
        X_bar = unpatchify(pixels, self.grid, 3)
        return X_bar * self.std + self.mean

    def stage1_losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Eq. 3, its misprints corrected. Each loss is weighted and reaches only the parameters that it is for."""
        X = batch["image"]
        visible = drawn(batch, lambda B: self.random_visible(B, X.device))
        X_bar = in_parts(self.reconstruct, self.settings.micro_batch, X, visible)
        a1, a2, a3 = self.settings.alpha
        losses = {"l1": a1 * (X - X_bar).abs().mean(), "ssim": a2 * (1 - ssim_map(X, X_bar, 1.0)).mean()}
        if self.settings.plpm == "joint":  # all parts minimise it
            losses["plpm"] = a3 * self.label_loss(X, X_bar)
        elif self.settings.plpm == "adversarial":
            losses["plpm"] = self.label_loss(X, X_bar.detach())  # for PLPM alone
            fixed = {name: p.detach() for name, p in self.plpm.named_parameters()}
            lb_p = functional_call(self.plpm, fixed, (self.normalised(X_bar),)).float()
            losses["fool"] = a3 * F.softplus(lb_p).mean()  # -log[1 - sigma(lb_p)], for encoder and decoder alone
        return losses

    def label_loss(self, X: Tensor, X_bar: Tensor) -> Tensor:
        """L_CE of Eq. 3: originals are labelled 0, rebuilt images 1."""
        lb_o = self.plpm(self.normalised(X)).float()
        lb_p = self.plpm(self.normalised(X_bar)).float()
        of_originals = F.softplus(lb_o).mean()  # -log[1 - sigma(lb_o)]
        of_rebuilt = F.softplus(-lb_p).mean()  # -log sigma(lb_p)
        return (of_originals + of_rebuilt) / 2

    # --- stage 2: predict artificial anomaly maps ---

    def predict(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> logits of Y_hat (B,2,S,S): channel 0 anomalous, 1 normal. No gradient to the encoder."""
        with torch.no_grad():
            first, last = self.tokens(images)
        D_last = self.decoder(last)  # Eq. 4
        with torch.autocast(images.device.type, enabled=False):  # in 16 bits most pixels of a map would be equal
            first, last, D_last = first.float(), last.float(), D_last.float()
            Y_hat = self.tbm(first, last, D_last) if self.settings.tbm else self.tbm(D_last)
        return unpatchify(Y_hat, self.grid, 2)

    def stage2_losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Eq. 6."""
        self.encoder.eval()
        damaged = batch["damaged"] if "damaged" in batch else self.damaged(batch)
        Y = damaged["mask"][:, 0]
        logits = self.predict(damaged["image"])
        Y_hat = logits.softmax(1)
        b1, b2 = self.settings.beta
        l1 = (Y.float() - Y_hat[:, 0]).abs().mean()
        return {"l1": b1 * l1, "focal": b2 * focal(logits, Y, self.settings.gamma)}

    def damaged(self, batch: dict[str, Any], seed: int | None = None) -> dict[str, Tensor]:
        """The images of a batch, of which some are damaged, and their masks, as `Synthesis` gives them.

        Without a seed they are others at every call.
        """
        images, foreground, which = batch["image"], None, None
        if self.training and self.foreground is not None:
            row = np.searchsorted(self.chosen[2], batch["index"].numpy())
            foreground = to_device(self.foreground[row], images.device)
        if self.training and self.to_damage is not None:
            which = np.isin(batch["index"].numpy(), self.to_damage)
        return self.synthesis(images, next_seed() if seed is None else seed, 0, foreground, which)

    def stage2_epoch(self, random: np.random.Generator) -> ndarray:
        """The images of stage 2. Of each category the share `damage` is drawn that gets damage in this epoch."""
        chosen = self.chosen[2]
        of_category = self.categories[chosen]
        drawn = []
        for category in np.unique(of_category):
            members = chosen[of_category == category]
            drawn.append(random.choice(members, round(self.settings.damage * len(members)), replace=False))
        self.to_damage = np.concatenate(drawn)
        return chosen

    # --- training ---

    def size_up(self, categories: ndarray) -> None:
        """Draw the images of both stages, as many of each category."""
        s = self.settings
        for stage, most in {1: s.stage1_images, 2: s.stage2_images}.items():
            random = np.random.default_rng(seed_of(self.seed, "images", stage))
            self.chosen[stage] = draw(categories, most, random)
        self.categories = categories
        if s.resample_each_epoch:
            self.drawn_anew = lambda random: draw(categories, s.stage1_images, random)

    @torch.no_grad()
    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Draw the images, and find the foreground of those to be damaged."""
        s = self.settings
        self.size_up(images.categories)
        if s.pipeline == "e2e" and s.mode != "global":
            self.foreground = foregrounds(images, self.chosen[2], s.foreground)
        if s.pipeline == "e2e":
            self.protocol["textures"] = textures_used(s.textures, images.size)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of the last stage. In training each phase has its own."""
        if self.settings.pipeline == "e2e":
            return self.stage2_losses(batch)
        return self.stage1_losses(batch) if self.settings.stage1 else {}

    def phases(self) -> list[Phase]:
        """Stage 1, stage 2 or both."""
        s = self.settings
        adamw: dict[str, Any] = dict(
            optimizer=torch.optim.AdamW, betas=s.betas, weight_decay=s.weight_decay, decay_vectors=False
        )
        parts = [self.encoder, self.decoder, self.plpm] if self.plpm else [self.encoder, self.decoder]
        stage1 = Phase(
            "stage1",
            [p for part in parts for p in part.parameters() if p.requires_grad],
            s.stage1_epochs,
            s.stage1_batch_size,
            s.stage1_lr * s.stage1_batch_size / 256,
            schedule=warm_up_then_cosine(s.warm_up),
            losses=self.stage1_losses,
            indices=self.chosen[1],
            draw=self.drawn_anew,
            **adamw,
        )
        if s.pipeline == "recon":
            return [stage1] if s.stage1 else []
        stage2 = Phase(
            "stage2",
            [*self.decoder.parameters(), *self.tbm.parameters()],
            s.epochs,
            s.batch_size,
            s.lr,
            losses=self.stage2_losses,
            indices=self.chosen[2],
            draw=self.stage2_epoch if self.chosen[2] is not None else None,
            damage=self.damaged,
            **adamw,
        )
        return [stage1, stage2] if s.stage1 else [stage2]

    # --- score ---

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): Y_hat[0], or abs(X - X_bar)."""
        if self.settings.pipeline == "e2e":
            return self.predict(images).softmax(1)[:, 0]
        passes: list[Tensor | None] = [None]  # all patches visible at once
        if self.settings.recon_passes == "complementary":  # every patch is visible in one pass
            N = self.encoder.patch_embed.num_patches
            order = fixed_order(N).to(images.device)
            parts = order.split(n_visible(N, self.settings.mask_ratio))
            passes = [part.expand(images.shape[0], -1) for part in parts]  # (B,n) each
        errors = [(images - self.reconstruct(images, visible)).abs().mean(1) for visible in passes]
        return torch.stack(errors).mean(0)

    def image_score(self, maps: Tensor) -> Tensor:
        """Eq. 7: maps (B,S,S) -> scores (B,)."""
        k = self.settings.window
        means = F.avg_pool2d(maps[:, None], k, stride=1, padding=k // 2)  # (B,1,S,S)
        return means.amax((1, 2, 3))


class Decoder(nn.Module):
    """Tokens of the encoder, all or the visible ones, (B,n,D_e) -> tokens of all patches (B,N,D_d). `pred`: pixels."""

    pos_embed: Tensor

    def __init__(
        self, grid: tuple[int, int], width_in: int, width: int, depth: int, heads: int, width_out: int, mask_fill: str
    ):
        super().__init__()
        timm = import_timm()
        self.embed = nn.Linear(width_in, width)
        self.register_buffer("pos_embed", sincos(grid, width))
        Block = timm.models.vision_transformer.Block
        norm = timm.layers.LayerNorm  # eps 1e-6
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm = norm(width)
        self.pred = nn.Linear(width, width_out)
        self.mask_token = None  # drawn last: the other weights are the same with it and without
        if mask_fill == "mask_token":
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))

    def forward(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        z = self.embed(tokens)
        B, n, D = z.shape
        if visible is not None:
            N = self.pos_embed.shape[1] - 1
            filling = z.new_zeros(1, 1, D) if self.mask_token is None else self.mask_token.to(z.dtype)
            places = visible[..., None].expand(B, n, D)
            z = filling.expand(B, N, D).scatter(1, places, z)  # every token back in its place
        z = z + self.pos_embed[:, 1:]  # (B,N,D_d)
        return self.norm(self.blocks(z))


class TokenBalance(nn.Module):
    """Eq. 5, its brackets corrected: tokens of the encoder's first and last block and of the decoder -> (B,N,out)."""

    def __init__(self, width_encoder: int, width_decoder: int, out: int):
        super().__init__()
        self.lp1 = nn.Linear(2 * width_encoder, width_decoder)
        self.lp2 = nn.Linear(2 * width_decoder, out)

    def forward(self, first: Tensor, last: Tensor, decoded: Tensor) -> Tensor:
        of_encoder = self.lp1(torch.cat([first, last], -1))  # (B,N,D_d)
        return self.lp2(torch.cat([of_encoder, decoded], -1))


def plpm(channels: tuple[int, ...]) -> nn.Sequential:
    """Images (B,3,S,S) -> logits (B,): 0 original, 1 rebuilt. Ours, built like the usual discriminators."""
    layers: list[nn.Module] = []
    for i, c_out in enumerate(channels):
        c_in = channels[i - 1] if i else 3
        layers.append(nn.Conv2d(c_in, c_out, 4, 2, 1))
        if i:
            layers.append(nn.BatchNorm2d(c_out, track_running_stats=False))
        layers.append(nn.LeakyReLU(0.2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 1), nn.Flatten(0))


def focal(logits: Tensor, Y: Tensor, gamma: float) -> Tensor:
    """Logits (B,2,S,S), anomalous first, and mask Y (B,S,S) bool -> scalar. Lin et al. 2017, without alpha."""
    log_p = logits.log_softmax(1)
    log_p_true = torch.where(Y, log_p[:, 0], log_p[:, 1])
    return ((1 - log_p_true.exp()) ** gamma * -log_p_true).mean()


def n_visible(N: int, mask_ratio: float) -> int:
    """How many of N patches stay visible; at least one.

    Examples
    --------
    >>> from vitad.methods.mala import n_visible
    >>> n_visible(196, 0.75)
    49
    """
    return max(1, round(N * (1 - mask_ratio)))


def unpatchify(tokens: Tensor, grid: tuple[int, int], channels: int) -> Tensor:
    """Tokens (B,N,P*P*C), patches row by row, channels innermost -> images (B,C,S,S)."""
    P = round((tokens.shape[-1] / channels) ** 0.5)
    patches = tokens.unflatten(1, grid).unflatten(3, (P, P, channels))  # (B,h,w,P,P,C)
    patches = patches.permute(0, 5, 1, 3, 2, 4)  # (B,C,h,P,w,P)
    return patches.flatten(4, 5).flatten(2, 3)  # (B,C,hP,wP)


def sincos(grid: tuple[int, int], width: int) -> Tensor:
    """MAE's fixed positions (1,1+N,width): zeros for the class token, then sin and cos of column and row."""
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))  # frequencies
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")  # (h,w) both
    y = rows.flatten()[:, None] * omega  # (N,width/4)
    x = columns.flatten()[:, None] * omega
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1).float()
    return torch.cat([torch.zeros(1, width), table])[None]


def draw(categories: ndarray, most: int, random: np.random.Generator) -> ndarray:
    """Sorted indices of up to `most` random images of each category; of all images where `most` is 0."""
    chosen = []
    for category in np.unique(categories):
        members = np.flatnonzero(categories == category)
        chosen.append(random.permutation(members)[: most or None])
    return np.sort(np.concatenate(chosen))


def load_mae(model: Model, path: str | Path) -> dict[str, str]:
    """Load encoder and decoder of a model from a file with the names of MAE's visualisation checkpoints.

    The file is safetensors, or a .pth file that holds nothing but tensors: no object is ever unpickled. Positions are
    resampled. Where the file has no decoder, the model's stays random.

    Returns
    -------
    `source` and `sha256` for the run record.

    Raises
    ------
    UserError
        There is no such file, it cannot be read, tensors are missing, too many or of other shapes.
    """
    path = Path(path).expanduser()
    state = {_renamed(k): v for k, v in _read(path).items() if not k.startswith(("head.", "fc_norm."))}
    parts = nn.ModuleDict({"encoder": model.encoder})
    if with_decoder := any(k.startswith("decoder.") for k in state):
        parts["decoder"] = model.decoder
    if model.settings.mask_fill == "zeros":
        state.pop("decoder.mask_token", None)
    for name in ("encoder.pos_embed", "decoder.pos_embed"):
        if name in state:
            state[name] = import_timm().layers.resample_abs_pos_embed(state[name], list(model.grid))
    try:
        parts.load_state_dict(state)
    except RuntimeError as e:
        raise UserError(f"{path} does not fit: {shorten(str(e).splitlines()[1], 200)}") from e
    return {"source": f"file {path.name}{'' if with_decoder else ', decoder random'}", "sha256": sha256(path)}


def _renamed(name: str) -> str:
    """MAE's name of a tensor -> its name in `Model`."""
    if name == "mask_token":
        return "decoder.mask_token"
    return name.replace("decoder_", "decoder.", 1) if name.startswith("decoder_") else f"encoder.{name}"


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"weights file {path} does not exist.") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(f"{path} cannot be read as tensors alone. Other pickled files are not read.") from e
    return state.get("model", state)


def _check(s: Settings) -> None:
    """Refuse settings that contradict each other or that have no meaning."""
    if s.pipeline == "recon" and not (s.stage1 or s.pretrained):
        raise UserError("pipeline=recon without stage1 and without pretrained weights: nothing would ever be trained.")
    if s.pipeline == "e2e" and not s.damage:
        raise UserError("damage=0 leaves stage 2 nothing to learn from. Raise it, or take pipeline=recon.")
    for name, count in {"alpha": 3, "beta": 2, "betas": 2}.items():
        if len(getattr(s, name)) != count:
            raise UserError(f"{name}={getattr(s, name)}: give {count} numbers.")
    for name in ("mask_ratio", "warm_up"):
        if getattr(s, name) >= 1:
            raise UserError(f"{name}={getattr(s, name)} has to be below 1.")
    if max(s.betas) >= 1:
        raise UserError(f"betas={s.betas}: AdamW takes two numbers below 1.")
    for name in ("stage1_epochs", "stage1_batch_size"):
        if getattr(s, name) < 1:
            raise UserError(f"{name}={getattr(s, name)} has to be at least 1.")
    if not s.decoder_heads or s.decoder_width % s.decoder_heads or s.decoder_width % 4:
        raise UserError(
            f"decoder_width={s.decoder_width} has to be a multiple of 4 and of decoder_heads={s.decoder_heads}."
        )
    if not s.plpm_channels:
        raise UserError("plpm_channels is empty: give at least one number, or set plpm=off.")
    if not s.window % 2:
        raise UserError(f"window={s.window}: give an odd number of pixels.")
