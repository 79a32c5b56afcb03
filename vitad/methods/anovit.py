"""AnoViT: a Vision Transformer encoder with a transposed-convolution decoder.

Lee & Kang 2022, "AnoViT: Unsupervised Anomaly Detection and Localization with Vision Transformer-based
Encoder-Decoder", IEEE Access 10, 46717-46724, arXiv 2203.10808.

    image -> ViT -> patch tokens put back on their grid -> six transposed convolutions -> image
    anomaly map = smoothed squared error of the reconstruction

Only the abstract fixes the idea; layers and numbers follow public copies of the authors' code, and what neither
fixes is marked "ours".
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitad.backbones import DINOV2_S14, vit
from vitad.blocks import gaussian_blur
from vitad.data.samples import ImageSet
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.randomness import seeded
from vitad.training import Phase

PAPER = "Lee & Kang 2022, AnoViT, IEEE Access 10, 46717-46724"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the authors' code; *ours* marks what neither code nor abstract fixes."""

    encoder: str = "vit_base_patch16_384"  # authors' code; ImageNet-21k, then ImageNet-1k
    pretrained: bool = True  # authors' code
    freeze_encoder: bool = False  # authors' code fine-tunes everything
    image_size: int = 384  # authors' code
    channels: tuple[int, ...] = (256, 128, 64, 32, 16, 3)  # decoder, authors' code
    decoder_norm: Literal["instance", "batch"] = "instance"  # authors' code
    last_act: Literal["none", "legacy_relu"] = "none"  # ours: a ReLU before tanh leaves only [0, 1)
    norm: Literal["minus1_1", "dataset_stats"] = "minus1_1"  # ours: the range of tanh
    epochs: int = 200  # training log that the authors' code comes with: at most
    patience: int = 12  # the same log
    val_fraction: float = 0.1  # ours; some part of the normal training images in the authors' code
    batch_size: int = 8  # ours
    lr: float = 2e-4  # a fork of the authors' code
    betas: tuple[float, ...] = (0.5, 0.999)  # the same fork
    seg_sigma: float = 6.0  # authors' code, px: smoothing of the localisation map
    det_sigma: float = 15.0  # authors' code, px: smoothing of the map whose maximum is the image score
    amp: bool = True  # mixed precision, the fork


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # The published code to the letter: the output lies in [0, 1), the standardised target does not.
    "legacy": {"last_act": "legacy_relu", "norm": "dataset_stats"},
    # For two cores: a smaller encoder and input, smoothing scaled with the input, far fewer epochs.
    "small": {
        "encoder": DINOV2_S14,
        "image_size": 140,
        "epochs": 12,
        "seg_sigma": 2.2,
        "det_sigma": 5.5,
    },
    # An hour on two cores: a larger input than `small`, and up to five times the epochs.
    "near": {
        "encoder": DINOV2_S14,
        "image_size": 224,
        "epochs": 60,
        "seg_sigma": 3.5,
        "det_sigma": 8.75,
    },
    "demo": {
        "encoder": "vit_tiny_patch16_224",
        "pretrained": False,
        "image_size": 96,
        "epochs": 30,
        "seg_sigma": 1.5,
        "det_sigma": 3.75,
    },
    "smoke": {
        "encoder": "test_vit",
        "pretrained": False,
        "image_size": 64,
        "epochs": 1,
        "seg_sigma": 1.0,
        "det_sigma": 2.5,
        "amp": False,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}}


class Model(Method):
    """Encoder, decoder, loss and score of AnoViT, in that order.

    `weights` is the source of the encoder's weights, as in `backbones.vit`; without `pretrained` it is not used.
    """

    settings: Settings
    mean: Tensor
    std: Tensor

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        if s.det_sigma < s.seg_sigma:
            raise UserError(f"det_sigma={s.det_sigma} is below seg_sigma={s.seg_sigma}; it smooths the map further.")
        if len(s.betas) != 2 or max(s.betas) >= 1:
            raise UserError(f"betas={s.betas}: Adam takes two numbers below 1.")
        with seeded(self.seed, "encoder"):
            self.encoder, self.weights = vit(s.encoder, s.image_size, weights if s.pretrained else "random")
        self.encoder.requires_grad_(not s.freeze_encoder)
        with seeded(self.seed, "decoder"):
            self.decoder = Decoder(self.encoder.embed_dim, s.channels, s.image_size, s.decoder_norm, s.last_act)
        # minus1_1: (x - 1/2) / (1/2). dataset_stats: prepare() puts the statistics of the training images here.
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.5))
        self.protocol = {
            "normalisation": s.norm,
            "smoothing": f"Gaussian, sigma {s.seg_sigma} px",
            "image_score": f"maximum of the error smoothed with sigma {s.det_sigma} px",
            "checkpoint": "lowest validation loss on held-out normal images",
        }

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """`dataset_stats`: mean and standard deviation of the training images, for each channel."""
        if self.settings.norm != "dataset_stats":
            return
        n_pixels = 0
        total = torch.zeros(3, dtype=torch.double, device=device)
        squares = torch.zeros(3, dtype=torch.double, device=device)
        for i in range(0, len(images), 32):
            x = images.batch(range(i, min(i + 32, len(images))), device)["image"].double()
            n_pixels += x[:, 0].numel()
            total += x.sum((0, 2, 3))
            squares += (x**2).sum((0, 2, 3))
        mean = total / n_pixels
        std = (squares / n_pixels - mean**2).sqrt()
        self.mean.copy_(mean[:, None, None])
        self.std.copy_(std.clamp_min(1e-3)[:, None, None])

    def encode(self, x: Tensor) -> Tensor:
        """Normalised images (B,3,S,S) -> feature map (B,D,g,g): every patch embedding back in its place."""
        tokens = self.encoder.forward_features(x)
        tokens = tokens[:, self.encoder.num_prefix_tokens :]  # (B,N,D): without the class token
        B, N, D = tokens.shape
        return tokens.transpose(1, 2).reshape(B, D, *self.encoder.patch_embed.grid_size)

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,S,S) in [0,1] -> (x, x_hat), both normalised."""
        x = (images - self.mean) / self.std
        return x, self.decoder(self.encode(x))

    def redraw(self, images: Tensor) -> Tensor:
        """The reconstruction, in [0,1]."""
        return self.reconstruct(images)[1] * self.std + self.mean

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The squared error of the reconstruction."""
        x, x_hat = self.reconstruct(batch["image"])
        return {"mse": F.mse_loss(x_hat.float(), x)}  # mean over batch, channels and pixels

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): squared error, mean over channels, smoothed."""
        x, x_hat = self.reconstruct(images)
        error = (x - x_hat.float()).square().mean(1)  # (B,S,S)
        return gaussian_blur(error, self.settings.seg_sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): maximum of the map at the wider smoothing.

        The map is already smoothed with seg_sigma, and the squares of the sigmas of two Gaussians add up.
        """
        s = self.settings
        rest = (s.det_sigma**2 - s.seg_sigma**2) ** 0.5
        return gaussian_blur(maps, rest).amax((1, 2))

    def phases(self) -> list[Phase]:
        """One phase; the epoch with the lowest error on held-out images counts."""
        s = self.settings
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            Phase(
                "train",
                trained,
                s.epochs,
                s.batch_size,
                s.lr,
                betas=s.betas,
                val_fraction=s.val_fraction,
                patience=s.patience,
            )
        ]

    def train(self, mode: bool = True) -> Self:
        """As usual, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.settings.freeze_encoder:
            self.encoder.eval()
        return self


class Decoder(nn.Sequential):
    """(B,D,g,g) -> (B,3,S,S) in [-1,1]: six 3x3 transposed convolutions, then a bilinear resize and tanh.

    Three keep the resolution but for the border (stride 1, no padding: side + 2), three double it (stride 2,
    padding 1: 2 * side - 1). From a grid of 24: 26, 28, 30, 59, 117, 233, resized to 384.
    """

    def __init__(self, width: int, channels: tuple[int, ...], image_size: int, norm: str, last_act: str):
        if len(channels) != 6 or channels[-1] != 3:
            raise UserError(f"channels={channels}: the decoder has six layers and ends in 3 channels.")
        norms = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d}  # InstanceNorm without affine, as published
        layers: list[nn.Module] = []
        for i, c_out in enumerate(channels):
            c_in = channels[i - 1] if i else width
            stride, padding = (1, 0) if i < 3 else (2, 1)
            layers.append(nn.ConvTranspose2d(c_in, c_out, 3, stride, padding))
            if i < 5 or last_act == "legacy_relu":
                layers += [norms[norm](c_out), nn.ReLU()]
        resize = nn.Upsample((image_size, image_size), mode="bilinear", align_corners=True)
        super().__init__(*layers, resize, nn.Tanh())
