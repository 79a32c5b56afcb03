"""VT-ADL: a Vision Transformer makes tokens; one vector of them is decoded, a mixture says how likely each is.

Mishra et al. 2021, "VT-ADL: A Vision Transformer Network for Image Anomaly Detection and Localization", ISIE, arXiv
2104.10036. *Code* below is that of the authors, pankajmishra000/VT-ADL. The paper itself was not read.

    image -> ViT -> tokens, with noise -> one vector -> transposed convolutions -> image
                    tokens -> mixture of Gaussians -> anomaly map = how unlikely each token is

The code calls the step to one vector a capsule layer with routing. Routing chooses among outputs. Here there is one
output, so that nothing is left to choose, and the layer is linear.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitad.backbones import import_timm
from vitad.blocks import gaussian_blur, ssim_map
from vitad.data.samples import ImageSet, to_device
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.processes import drawn
from vitad.randomness import generator, next_seed, seeded
from vitad.training import Phase

PAPER = "Mishra et al. 2021, VT-ADL, ISIE, arXiv 2104.10036"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the authors' code; *ours* marks what differs."""

    image_size: int = 512  # code: the centre of 550 px; ours: the whole frame
    patch: int = 64  # code, px
    width: int = 512  # code: numbers of a token
    depth: int = 6  # code: blocks
    heads: int = 8  # code
    noise: float = 0.2  # code: standard deviation of what is added to the tokens in training
    components: int = 10  # code: Gaussians of the mixture
    mixture: Literal["exact", "legacy"] = "exact"  # ours: -log of the sum; code: the sum of weighted -log
    detach: bool = False  # code; True: the mixture does not move the tokens
    epochs: int = 400  # code
    batch_size: int = 8  # code
    lr: float = 1e-4  # code
    weight_decay: float = 1e-4  # code
    sigma: float = 4.0  # code, px: smoothing of the map
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # For two cores: as many patches of a quarter of the size, a quarter of the width, fewer blocks. On bottles, 240
    # epochs bring the training loss of the mixture to within 1e-3 of the least possible one; 60 left it 3 % above.
    "small": {
        "image_size": 128,
        "patch": 16,
        "width": 128,
        "depth": 4,
        "components": 5,
        "epochs": 240,
        "batch_size": 16,
        "lr": 1e-3,
        "sigma": 2.0,
    },
    "demo": {
        "image_size": 128,
        "patch": 16,
        "width": 128,
        "depth": 4,
        "components": 5,
        "epochs": 60,
        "lr": 1e-3,
        "sigma": 2.0,
    },
    "smoke": {
        "image_size": 64,
        "patch": 8,
        "width": 32,
        "depth": 1,
        "heads": 2,
        "components": 2,
        "epochs": 2,
        "sigma": 1.0,
        "amp": False,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}, "no_noise": {"noise": 0.0}, "detached": {"detach": True}}
SUMMARY = 512  # numbers of the one vector, 8 x 8 x 8 for the decoder


class Model(Method):
    """Encoder, summary, decoder, mixture. Nothing here is pretrained, so that `weights` has no effect."""

    settings: Settings

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        self.weights = {"source": "random"}
        if s.patch < 1 or s.image_size % s.patch:
            raise UserError(f"patch={s.patch} does not divide image_size={s.image_size}.")
        if s.heads < 1 or s.width % s.heads:
            raise UserError(f"width={s.width} has to be a multiple of heads={s.heads}.")
        if s.components < 1:
            raise UserError(f"components={s.components} has to be at least 1.")
        self.side = s.image_size // s.patch
        with seeded(self.seed, "encoder"):
            self.encoder = encoder(s.image_size, s.patch, s.width, s.depth, s.heads)
        with seeded(self.seed, "summary"):
            self.summary = nn.Linear(self.side**2 * s.width, SUMMARY, bias=False)
            nn.init.normal_(self.summary.weight, std=0.01)
        with seeded(self.seed, "decoder"):
            self.decoder = decoder(s.image_size)
        with seeded(self.seed, "mixture"):
            self.mixture = Mixture(s.width, s.components)
        self.protocol = {
            "normalisation": "unit",
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            # Ours. The code adds error and SSIM of the reconstruction: at most 2, beside hundreds.
            "image_score": "maximum of the map",
            "checkpoint": "last epoch",  # ours; code: the epoch with the lowest training loss
        }

    def encode(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> tokens (B,N,D), without the class token."""
        return self.encoder.forward_features(images)[:, 1:].float()

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [0,1] -> images (B,3,S,S), of tokens without noise."""
        return self.decode(self.encode(images))

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B,N,D) -> images (B,3,S,S) in -1..1, as the code ends in tanh."""
        summary = squashed(self.summary(tokens.flatten(1)).float())  # (B,512)
        return self.decoder(summary.view(-1, 8, 8, 8)).float()

    def noise(self, tokens: Tensor, batch: dict[str, Any]) -> Tensor:
        """N(0,1) for each number of the tokens (B,N,D) of a batch."""
        random = generator(next_seed(), "noise")
        return to_device(drawn(batch, lambda B: torch.randn(B, *tokens.shape[1:], generator=random)), tokens.device)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Five times the squared error, half of 1 - SSIM, and -log p of the tokens, summed over an image."""
        s, x = self.settings, batch["image"]
        tokens = self.encode(x)
        if self.training and s.noise:
            tokens = tokens + s.noise * self.noise(tokens, batch)
        x_hat = self.decode(tokens)
        seen = tokens.detach() if s.detach else tokens
        return {
            "mse": 5 * F.mse_loss(x_hat, x),
            "ssim": 0.5 * (1 - ssim_map(x, x_hat, 1.0).mean()),
            "nll": self.mixture.nll(seen, s.mixture == "legacy").sum(1).mean(),
        }

    def redraw(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [0,1] -> what the model draws again, (B,3,S,S)."""
        return self.reconstruct(images)

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): -log p of each token above the least possible one, upsampled, smoothed."""
        tokens = self.encode(images)
        nll = self.mixture.nll(tokens, self.settings.mixture == "legacy") - self.mixture.least
        grid = nll.view(-1, 1, self.side, self.side)
        maps = F.interpolate(grid, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return gaussian_blur(maps, self.settings.sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): the maximum."""
        return maps.amax((1, 2))

    @torch.no_grad()
    def observe(self, images: ImageSet, device: torch.device) -> dict[str, int | float]:
        """Mean variance of a number of the tokens: near 0 where the mixture has pulled all tokens together."""
        self.eval()
        tokens = self.encode(images.batch(range(min(32, len(images))), device)["image"])
        return {"token_variance": float(tokens.flatten(0, 1).var(0).mean())}

    def phases(self) -> list[Phase]:
        """One phase of a fixed number of epochs."""
        s = self.settings
        return [Phase("train", list(self.parameters()), s.epochs, s.batch_size, s.lr, weight_decay=s.weight_decay)]


class Mixture(nn.Module):
    """Tokens (..., D) -> weights, means and variances of Gaussians, from the positive part of the same token."""

    def __init__(self, width: int, components: int):
        super().__init__()
        self.components = components
        self.weight = nn.Linear(width, components, bias=False)
        self.mean = nn.Linear(width, components * width, bias=False)
        self.variance = nn.Linear(width, components * width, bias=False)
        self.least = 0.5 * width * math.log(2 * math.pi)  # -log p where a mean is met: no variance is below 1

    def nll(self, tokens: Tensor, legacy: bool = False) -> Tensor:
        """Tokens (...,D) -> (...): -log of sum_k w_k N(token; mean_k, variance_k), or sum_k w_k -log N(...) of it."""
        with torch.autocast(tokens.device.type, enabled=False):  # sums of hundreds of terms
            tokens = tokens.float()
            seen = tokens.clamp_min(torch.finfo(torch.float64).eps)  # code
            shape = (*tokens.shape[:-1], self.components, tokens.shape[-1])
            mean = self.mean(seen).view(shape)
            log_variance = F.softplus(self.variance(seen)).view(shape)  # code: so that the variance is above 1
            log_weight = self.weight(seen).log_softmax(-1)
            square = (tokens[..., None, :] - mean).square() * (-log_variance).exp()
            log_p = -0.5 * (log_variance + square).sum(-1) - self.least  # (...,K)
            if legacy:
                return -(log_weight.exp() * log_p).sum(-1)
            return -(log_weight + log_p).logsumexp(-1)


def encoder(image_size: int, patch: int, width: int, depth: int, heads: int) -> Any:
    """Patches, class token, learned positions and pre-norm blocks, without a last norm and biases of the queries."""
    net = import_timm().models.VisionTransformer(
        image_size,
        patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=2,
        qkv_bias=False,
        num_classes=0,
        global_pool="",
        final_norm=False,
    )
    for block in net.blocks:
        block.attn.fused_attn, block.attn.scale = False, width**-0.5  # code: not that of a head
    return net


def squashed(x: Tensor) -> Tensor:
    """Vectors (B,D) in their direction, of length n^2 / (1 + n^2) where they had n."""
    square = x.square().sum(-1, keepdim=True)
    return square / (1 + square) * x / (square + 1e-12).sqrt()


def decoder(image_size: int) -> nn.Sequential:
    """(B,8,8,8) -> (B,3,S,S): the code's layers for 512 px, for other sizes as many as double the side each (ours)."""
    if image_size == 512:
        steps = [(16, 3, 2, 1), (32, 9, 3, 1), (32, 7, 5, 1), (16, 9, 2, 0), (8, 6, 1, 0), (3, 11, 1, 0)]
    else:
        n = round(math.log2(image_size / 8))
        if n < 1 or 8 * 2**n != image_size:
            raise UserError(f"image_size={image_size} does not suit the decoder. Choose 64, 128, 256 or 512.")
        steps = [(c, 4, 2, 1) for c in [16, 32, 32, 16, 8, 8][: n - 1]] + [(3, 4, 2, 1)]
    layers, before = nn.Sequential(), 8
    for channels, kernel, stride, padding in steps:
        layers.append(nn.ConvTranspose2d(before, channels, kernel, stride, padding))
        layers.extend([nn.BatchNorm2d(channels), nn.ReLU()] if channels > 3 else [nn.Tanh()])
        before = channels
    return layers
