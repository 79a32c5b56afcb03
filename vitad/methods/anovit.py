"""AnoViT: a Vision Transformer encoder with a transposed-convolution decoder.

Lee & Kang 2022, "AnoViT: Unsupervised Anomaly Detection and Localization with Vision Transformer-based
Encoder-Decoder", IEEE Access 10, 46717-46724, arXiv 2203.10808.

    image -> ViT -> patch tokens put back on their grid -> six transposed convolutions -> image
    anomaly map = smoothed squared error of the reconstruction

Only the abstract fixes the idea; layers and numbers follow public copies of the authors' code, and what neither
fixes is marked "ours".
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from vitad.backbones import DINOV2_S14, vit
from vitad.blocks import gaussian_blur
from vitad.errors import UserError
from vitad.training import Phase

PAPER = "Lee & Kang 2022, AnoViT, IEEE Access 10, 46717-46724"


@dataclass(frozen=True)
class Settings:
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


PRESETS = {
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
        "epochs": 2,
        "seg_sigma": 1.0,
        "det_sigma": 2.5,
        "amp": False,
    },
}


class Model(nn.Module):
    """Encoder, decoder, loss and score of AnoViT, in that order.

    Args:
        settings: `Settings`.
        weights: source of the encoder's weights, as in `backbones.vit`; not used where `pretrained` is off.
    """

    def __init__(self, settings, weights="auto"):
        super().__init__()
        self.settings = s = settings
        if s.det_sigma < s.seg_sigma:
            raise UserError(f"det_sigma={s.det_sigma} is below seg_sigma={s.seg_sigma}; it smooths the map further.")
        if len(s.betas) != 2 or max(s.betas) >= 1:
            raise UserError(f"betas={s.betas}: Adam takes two numbers below 1.")
        self.encoder, self.weights = vit(s.encoder, s.image_size, weights if s.pretrained else "random")
        self.encoder.requires_grad_(not s.freeze_encoder)
        self.decoder = Decoder(self.encoder.embed_dim, s.channels, s.image_size, s.decoder_norm, s.last_act)
        # minus1_1: (x - 1/2) / (1/2); dataset_stats: replaced by the training images' statistics in prepare()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.5))
        self.protocol = {
            "normalisation": s.norm,
            "smoothing": f"Gaussian, sigma {s.seg_sigma} px",
            "image_score": f"maximum of the error smoothed with sigma {s.det_sigma} px",
            "checkpoint": "lowest validation loss on held-out normal images",
        }

    def prepare(self, images, device):
        """`dataset_stats`: mean and standard deviation of the training images, per channel."""
        if self.settings.norm != "dataset_stats":
            return
        n, total, squares = 0, 0, 0
        for i in range(0, len(images), 32):
            x = images.batch(range(i, min(i + 32, len(images))), device)["image"].double()
            n += x[:, 0].numel()
            total, squares = total + x.sum((0, 2, 3)), squares + (x**2).sum((0, 2, 3))
        mean = total / n
        self.mean.copy_(mean[:, None, None])
        self.std.copy_((squares / n - mean**2).sqrt().clamp_min(1e-3)[:, None, None])

    def encode(self, x):
        """Normalised images (B,3,S,S) -> feature map (B,D,g,g): every patch embedding back in its place."""
        tokens = self.encoder.forward_features(x)[:, self.encoder.num_prefix_tokens :]  # class token dropped
        B, N, D = tokens.shape
        return tokens.transpose(1, 2).reshape(B, D, *self.encoder.patch_embed.grid_size)

    def reconstruct(self, images):
        """Images (B,3,S,S) in [0,1] -> (x, x_hat), both normalised."""
        x = (images - self.mean) / self.std
        return x, self.decoder(self.encode(x))

    def losses(self, batch):
        x, x_hat = self.reconstruct(batch["image"])
        return {"mse": F.mse_loss(x_hat.float(), x)}  # mean over batch, channels and pixels

    def anomaly_map(self, images):
        """(B,3,S,S) -> (B,S,S): squared error, mean over channels, smoothed."""
        x, x_hat = self.reconstruct(images)
        error = (x - x_hat.float()).square().mean(1)
        return gaussian_blur(error, self.settings.seg_sigma)

    def image_score(self, maps):
        """(B,S,S) -> (B,): maximum of the map at the wider smoothing.

        The map already carries seg_sigma; Gaussians compose, so the rest is sqrt(det^2 - seg^2).
        """
        s = self.settings
        return gaussian_blur(maps, (s.det_sigma**2 - s.seg_sigma**2) ** 0.5).amax((1, 2))

    def phases(self):
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

    def train(self, mode=True):
        super().train(mode)
        if self.settings.freeze_encoder:
            self.encoder.eval()
        return self


class Decoder(nn.Sequential):
    """(B,D,g,g) -> (B,3,S,S) in [-1,1]: six 3x3 transposed convolutions, then a bilinear resize and tanh.

    Three keep the resolution but for the border (stride 1, no padding: side + 2), three double it (stride 2,
    padding 1: 2 * side - 1). From a grid of 24: 26, 28, 30, 59, 117, 233, resized to 384.
    """

    def __init__(self, width, channels, image_size, norm, last_act):
        if len(channels) != 6 or channels[-1] != 3:
            raise UserError(f"channels={channels}: the decoder has six layers and ends in 3 channels.")
        norms = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d}  # InstanceNorm without affine, as published
        layers = []
        for i, (c_in, c_out) in enumerate(zip((width, *channels), channels, strict=False)):
            stride, padding = (1, 0) if i < 3 else (2, 1)
            layers.append(nn.ConvTranspose2d(c_in, c_out, 3, stride, padding))
            if i < 5 or last_act == "legacy_relu":
                layers += [norms[norm](c_out), nn.ReLU()]
        resize = nn.Upsample((image_size, image_size), mode="bilinear", align_corners=True)
        super().__init__(*layers, resize, nn.Tanh())
