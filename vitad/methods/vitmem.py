"""A ViT autoencoder whose features pass through a memory of normal patches and coordinate attention.

Yang & Guo 2024, "An Unsupervised Method for Industrial Image Anomaly Detection with Vision Transformer-Based
Autoencoder", Sensors 24(8), 2440, DOI 10.3390/s24082440.

    image -> ViT -> patch tokens on their grid -> memory -> coordinate attention -> transposed convolutions -> image
    anomaly map = smoothed sum of squared error, dissimilarity (1 - SSIM) and entropy of the memory's weights

Equation and section numbers are the paper's. "Ours" marks what it leaves open, and what it misprints.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitad.backbones import vit
from vitad.blocks import gaussian_blur, ssim_map, top_mean
from vitad.data.samples import ImageSet
from vitad.errors import UserError, unknown
from vitad.methods import anovit
from vitad.methods.base import Method
from vitad.randomness import seeded
from vitad.training import Phase

PAPER = "Yang & Guo 2024, Sensors 24(8), 2440"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are the paper's; *ours* marks what it leaves open."""

    encoder: str = "vit_base_patch16_384"  # sec. 4.2: patches of 16 px, width 768
    heads: int = 8  # sec. 4.2
    depth: int = 12  # ours: L is not given; that of ViT-B
    pretrained: bool = False  # sec. 4.2: from scratch
    image_size: int = 384  # sec. 4.2
    input_range: Literal["minus1_1", "unit"] = "minus1_1"  # ours: the range of the closing tanh
    # memory
    memory: bool = True  # Table 6, "M"
    items: int = 100  # ours: N is not given
    similarity: Literal["cosine", "dot"] = "cosine"  # Eq. 7; the dot product is MemAE's code
    temperature: float = 1.0  # Eq. 8 has none
    shrink: float = 1.0  # sec. 3.2: lambda = shrink / N
    # coordinate attention
    coord_att: bool = True  # Table 6, "CA"
    ca_position: Literal["after_memory", "before_memory"] = "after_memory"  # caption of Fig. 2
    ca_reduction: int = 32  # Hou et al.'s code
    # decoder
    decoder: Literal["anovit", "exact"] = "anovit"  # ours: sec. 3.4 gives six layers, not their strides
    decoder_norm: Literal["batch", "instance"] = "batch"  # sec. 3.4: "normalizes small batches"
    # losses
    l2: Literal["mean", "sum"] = "mean"  # ours: over the channels; Eq. 11 sums them, its text says "mean squared error"
    lambda_recon: float = 1.0  # sec. 4.2
    lambda_ssim: float = 1.0  # ours: the lambda of Eq. 13 is not given
    lambda_ent: float = 1e-3  # sec. 4.2
    entropy: Literal["corrected", "printed"] = "corrected"  # ours: Eq. 14 lacks its minus sign
    # training
    epochs: int = 200  # sec. 4.2
    batch_size: int = 8  # sec. 4.2
    lr: float = 2e-4  # sec. 4.2, Adam
    betas: tuple[float, ...] = (0.5, 0.999)  # ours: AnoViT's
    val_fraction: float = 0.0  # ours: no validation split is mentioned, so the last epoch counts
    # score
    score_terms: tuple[str, ...] = ("l2", "ssim", "entropy")  # sec. 1 names the three losses, no formula
    sigma: float = 4.0  # ours, px: sec. 4.2 smooths with a Gaussian of unknown width
    image_top: float = 0.0  # ours: share of the map whose mean is the image score; 0 is the maximum
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # Sec. 3.4 read to the letter: six layers that lead to the image without a resize, each with norm and ReLU but the
    # last. Whole strides cannot let all six grow, from 24 to 384: the last two keep the size.
    "sec34": {"decoder": "exact"},
    # For two cores: a narrower encoder of half the depth, a third of the resolution, a tenth of the epochs.
    "small": {
        "encoder": "vit_tiny_patch16_224",
        "depth": 6,
        "image_size": 128,
        "epochs": 20,
        "lr": 1e-3,
        "sigma": 1.5,
    },
    # An hour on two cores: the paper's depth, length and learning rate. A quarter of the width and a third of the
    # resolution are left.
    "near": {"encoder": "vit_tiny_patch16_224", "image_size": 128, "sigma": 1.5},
    "demo": {
        "encoder": "vit_tiny_patch16_224",
        "depth": 6,
        "image_size": 96,
        "epochs": 20,
        "lr": 1e-3,
        "sigma": 1.5,
    },
    "smoke": {
        "encoder": "test_vit",
        "depth": 6,
        "image_size": 64,
        "items": 20,
        "epochs": 1,
        "sigma": 1.0,
        "amp": False,
    },
}

# The rows of Table 6.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"memory": False, "coord_att": False},
    "base_m": {"memory": True, "coord_att": False},
    "base_ca": {"memory": False, "coord_att": True},
    "full": {"memory": True, "coord_att": True},
}


class Model(Method):
    """Encoder, memory, coordinate attention, decoder, losses and score, in that order.

    `weights` is the source of the encoder's weights, as in `backbones.vit`; without `pretrained` it is not used.
    """

    settings: Settings

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        if len(s.betas) != 2 or max(s.betas) >= 1:
            raise UserError(f"betas={s.betas}: Adam takes two numbers below 1.")
        if s.image_top > 1:
            raise UserError(f"image_top={s.image_top} is a share of the pixels: from 0 to 1.")
        wrong = set(s.score_terms) - {"l2", "ssim", "entropy"}
        if wrong or not s.score_terms:
            raise unknown("score_terms", ",".join(wrong), ("l2", "ssim", "entropy"))
        source = weights if s.pretrained else "random"
        with seeded(self.seed, "encoder"):
            self.encoder, self.weights = vit(s.encoder, s.image_size, source, num_heads=s.heads, depth=s.depth)
        width = self.encoder.embed_dim
        with seeded(self.seed, "memory"):
            self.memory = Memory(width, s.items, s.similarity, s.temperature, s.shrink) if s.memory else None
        with seeded(self.seed, "coord_att"):
            self.coord_att = CoordinateAttention(width, s.ca_reduction) if s.coord_att else nn.Identity()
        self.decoder: nn.Sequential
        with seeded(self.seed, "decoder"):
            if s.decoder == "anovit":
                self.decoder = anovit.Decoder(width, (256, 128, 64, 32, 16, 3), s.image_size, s.decoder_norm, "none")
            else:
                self.decoder = exact_decoder(width, self.encoder.patch_embed.patch_size[0], s.decoder_norm)
        self.protocol = {
            "normalisation": s.input_range,
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": f"mean of the highest {s.image_top:.1%} of the map" if s.image_top else "maximum of the map",
            "checkpoint": "lowest validation loss on held-out normal images" if s.val_fraction else "last epoch",
        }

    def encode(self, x: Tensor) -> Tensor:
        """Images (B,3,S,S) -> features F (B,D,g,g): Eq. 4 to 6, patch tokens back in their places.

        Eq. 4 is printed without the class token, which its N+1 positions and the text have.
        """
        tokens = self.encoder.forward_features(x)
        tokens = tokens[:, self.encoder.num_prefix_tokens :]  # (B,N,D): without the class token
        B, N, D = tokens.shape
        return tokens.transpose(1, 2).reshape(B, D, *self.encoder.patch_embed.grid_size)

    def recall(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """F (B,D,g,g) -> (F'' (B,D,g,g), w_hat (B,g,g,N) or None): memory and coordinate attention, in their order."""
        if self.memory is None:
            return self.coord_att(features), None
        if self.settings.ca_position == "before_memory":
            return self.memory(self.coord_att(features))
        recalled, w_hat = self.memory(features)  # F'
        return self.coord_att(recalled), w_hat

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images (B,3,S,S) in [0,1] -> (x, x_hat, w_hat), the first two in the model's range."""
        x = images * 2 - 1 if self.settings.input_range == "minus1_1" else images
        features, w_hat = self.recall(self.encode(x))
        return x, self.decoder(features).float(), w_hat

    def redraw(self, images: Tensor) -> Tensor:
        """The reconstruction, in [0,1]."""
        _, x_hat, _ = self.reconstruct(images)
        return (x_hat + 1) / 2 if self.settings.input_range == "minus1_1" else x_hat

    def error_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B,3,S,S) -> the maps `l2, ssim, entropy`, (B,S,S) each, not smoothed, weighted as in the loss.

        Their means are the losses of Eq. 11 to 15: one definition for training and for the score (ours; sec. 1
        only names the three). Without a memory there is no entropy.
        """
        s = self.settings
        x, x_hat, w_hat = self.reconstruct(images)
        data_range = 2.0 if s.input_range == "minus1_1" else 1.0
        squared = (x - x_hat).square()
        l2 = squared.mean(1) if s.l2 == "mean" else squared.sum(1)  # Eq. 11
        ssim = 1 - ssim_map(x, x_hat, data_range)[:, 0]  # Eq. 12 with its missing brackets
        maps = {"l2": s.lambda_recon * l2, "ssim": s.lambda_recon * s.lambda_ssim * ssim}  # Eq. 13, 15
        if w_hat is not None:
            sign = 1 if s.entropy == "corrected" else -1
            H = sign * entropy(w_hat)  # Eq. 14, (B,g,g)
            H = F.interpolate(H[:, None], x.shape[-2:], mode="bilinear")[:, 0]  # (B,S,S)
            maps["entropy"] = s.lambda_ent * H
        return maps

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The means of the three error maps."""
        return {name: error.mean() for name, error in self.error_maps(batch["image"]).items()}

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): the chosen error maps, summed and smoothed."""
        maps = self.error_maps(images)
        total = torch.zeros_like(images[:, 0])
        for term in self.settings.score_terms:
            if term in maps:
                total = total + maps[term]
        return gaussian_blur(total, self.settings.sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): mean of the highest pixels, or the maximum."""
        return top_mean(maps, self.settings.image_top)

    def phases(self) -> list[Phase]:
        """One phase; the last epoch counts, or where images are held out the best one."""
        s = self.settings
        return [
            Phase(
                "train",
                list(self.parameters()),
                s.epochs,
                s.batch_size,
                s.lr,
                betas=s.betas,
                val_fraction=s.val_fraction,
            )
        ]

    @torch.no_grad()
    def observe(self, images: ImageSet, device: torch.device) -> dict[str, int | float]:
        """How the patches of the training images use the memory: counts for the run record."""
        if self.memory is None:
            return {}
        N = self.settings.items
        queries, empty = 0, 0
        kept = torch.zeros(N, dtype=torch.long, device=device)  # look-ups in which the item survives
        first = torch.zeros(N, dtype=torch.long, device=device)  # look-ups in which it weighs most
        for i in range(0, len(images), 32):
            x = images.batch(range(i, min(i + 32, len(images))), device)["image"]
            _, _, w_hat = self.reconstruct(x)
            assert w_hat is not None, "there is a memory"
            w_hat = w_hat.flatten(0, 2)  # (queries, N)
            has_items = w_hat.amax(1) > 0
            heaviest = w_hat[has_items].argmax(1)
            queries += len(w_hat)
            empty += int((~has_items).sum())
            kept += (w_hat > 0).sum(0)
            first += torch.bincount(heaviest, minlength=N)
        return {
            "memory_queries": queries,
            "memory_empty": empty,  # look-ups that shrinkage left without any item
            "memory_kept": round(float(kept.sum() / queries), 2),  # items that survive, mean over the look-ups
            "memory_in_use": int((kept > 0).sum()),  # items that survive for some patch
            "memory_first": int((first > 0).sum()),  # items that weigh most for some patch
        }


class Memory(nn.Module):
    """Sec. 3.2: every location of a feature map is rebuilt from N learned items.

    F (B,D,g,g) -> (F' (B,D,g,g), w_hat (B,g,g,N)). There is no way around it: what the items cannot express is lost.
    """

    def __init__(
        self, width: int, items: int, similarity: str = "cosine", temperature: float = 1.0, shrink: float = 1.0
    ):
        super().__init__()
        if items < 1:
            raise UserError(f"items={items}: the memory needs at least 1.")
        if temperature <= 0:
            raise UserError(f"temperature={temperature} has to be above 0.")
        bound = width**-0.5
        self.items = nn.Parameter(torch.empty(items, width).uniform_(-bound, bound))  # as in MemAE's code
        self.similarity, self.temperature, self.threshold = similarity, temperature, shrink / items

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(features.device.type, enabled=False):  # Eq. 10 subtracts numbers that are nearly equal
            z = features.float().permute(0, 2, 3, 1)  # (B,g,g,D): one query for each location
            w = self.address(z)  # (B,g,g,N)
            w_hat = shrunk(w, self.threshold)
            recalled = w_hat @ self.items  # Eq. 9 with w_hat, (B,g,g,D)
            return recalled.permute(0, 3, 1, 2), w_hat

    def address(self, z: Tensor) -> Tensor:
        """Queries (...,D) -> softmax weights w (...,N)."""
        items: Tensor = self.items
        if self.similarity == "cosine":  # Eq. 7
            z, items = F.normalize(z, dim=-1), F.normalize(items, dim=-1)
        d = z @ items.T  # of all queries with all items
        return (d / self.temperature).softmax(-1)  # Eq. 8


def shrunk(w: Tensor, threshold: float) -> Tensor:
    """Eq. 10 and the normalisation after it: weights up to the threshold become 0, the others are kept, sum 1.

    Where none is left the look-up is empty: all zero, and so is what it recalls.
    """
    w_hat = F.relu(w - threshold) * w / ((w - threshold).abs() + 1e-12)  # Eq. 10
    return w_hat / w_hat.sum(-1, keepdim=True).clamp_min(1e-12)


def entropy(w_hat: Tensor) -> Tensor:
    """Weights (...,N) -> (...): Eq. 14 with the minus sign that makes its minimum a single item."""
    return -(w_hat * (w_hat + 1e-12).log()).sum(-1)


class CoordinateAttention(nn.Module):
    """Sec. 3.3, after Hou et al. 2021: weights for every row and every column of each channel. Keeps (B,D,H,W)."""

    def __init__(self, width: int, reduction: int = 32):
        super().__init__()
        if reduction < 1:
            raise UserError(f"ca_reduction={reduction} has to be at least 1.")
        middle = max(8, width // reduction)
        self.squeeze = nn.Sequential(nn.Conv2d(width, middle, 1), nn.BatchNorm2d(middle), nn.Hardswish())
        self.to_h, self.to_w = nn.Conv2d(middle, width, 1), nn.Conv2d(middle, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a_h, a_w = self.attention(x)
        return x * a_h * a_w

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B,D,H,W) -> a_h (B,D,H,1) and a_w (B,D,1,W), each in 0..1."""
        B, D, H, W = x.shape
        rows = x.mean(3, keepdim=True)  # (B,D,H,1)
        columns = x.mean(2, keepdim=True).transpose(2, 3)  # (B,D,W,1)
        squeezed = self.squeeze(torch.cat([rows, columns], 2))  # (B,D',H+W,1): rows and columns share these weights
        h, w = squeezed.split([H, W], 2)
        return self.to_h(h).sigmoid(), self.to_w(w.transpose(2, 3)).sigmoid()


def exact_decoder(width: int, patch: int, norm: str) -> nn.Sequential:
    """(B,D,g,g) -> (B,3,S,S): six transposed convolutions that reach S without a resize (ours).

    log2(patch) layers double the side, the others keep it; from a grid of 24: 48, 96, 192, 384, 384, 384.
    """
    doublings = patch.bit_length() - 1
    if 2**doublings != patch or doublings > 6:
        raise UserError(f"decoder=exact doubles the side; a patch of {patch} px is not a power of two up to 64.")
    norms = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}
    channels = (512, 256, 128, 64, 32, 3)
    layers: list[nn.Module] = []
    for i, c_out in enumerate(channels):
        c_in = channels[i - 1] if i else width
        kernel, stride = (4, 2) if i < doublings else (3, 1)
        layers.append(nn.ConvTranspose2d(c_in, c_out, kernel, stride, 1))
        if i < 5:
            layers += [norms[norm](c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Tanh())
