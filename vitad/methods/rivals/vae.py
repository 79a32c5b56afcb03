"""VAE: a variational autoencoder, whose map is the error of its reconstruction, or what gradient descent has to repair.

Kingma & Welling 2014, "Auto-Encoding Variational Bayes" (ICLR, arXiv 1312.6114), with the layers of `l2cae`. With
`map=grad` it is the method of Dehaene et al. 2020, "Iterative energy-based projection on a normal data manifold for
anomaly localization" (ICLR, arXiv 2002.03734), known here second-hand: no code was found. The papers that print a
column "VAE" say neither layers nor settings.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitad.blocks import convolutional_autoencoder, gaussian_blur
from vitad.data.samples import to_device
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.processes import drawn
from vitad.randomness import generator, next_seed
from vitad.training import Phase

PAPER = "VAE after Kingma & Welling 2014, ICLR, and Dehaene et al. 2020, ICLR"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of l2cae where the source is silent."""

    image_size: int = 256  # ours: as l2cae
    latent: int = 100  # ours: as l2cae
    beta: float = 0.1  # ours: weight of the term that keeps the vector near a normal distribution
    epochs: int = 200  # ours: as l2cae
    batch_size: int = 16  # ours: as l2cae
    lr: float = 2e-4  # ours: as l2cae
    map: Literal["error", "grad"] = "error"  # ours: squared error; grad: Dehaene et al. 2020 (VAE-grad)
    steps: int = 100  # ours: steps of `grad`
    step_size: float = 0.5  # ours: alpha of `grad`
    sparsity: float = 0.05  # ours: lambda of `grad`, what a changed pixel costs
    sigma: float = 4.0  # ours, px: smoothing of the map
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"image_size": 128, "latent": 64, "epochs": 60, "lr": 1e-3, "steps": 20},
    "demo": {"image_size": 128, "latent": 64, "epochs": 60, "lr": 1e-3, "steps": 20, "sigma": 2.0},
    "smoke": {"image_size": 64, "latent": 16, "epochs": 2, "steps": 3, "sigma": 1.0, "amp": False},
}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}, "grad": {"map": "grad"}}


class Model(Method):
    """Encoder, decoder, loss and map. Nothing here is pretrained, so that `weights` has no effect."""

    settings: Settings

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        self.weights = {"source": "random"}
        if s.beta < 0:
            raise UserError(f"beta={s.beta} has to be at least 0.")
        if s.steps < 1:
            raise UserError(f"steps={s.steps} has to be at least 1.")
        self.encoder, self.decoder = convolutional_autoencoder(s.image_size, s.latent, statistics=2)
        self.protocol = {
            "normalisation": "unit",
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": "maximum of the map",
            "checkpoint": "last epoch",
        }

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,S,S) -> mean and log-variance of the latent vector, (B,latent,1,1) each."""
        mean, log_variance = self.encoder(images).float().chunk(2, 1)
        return mean, log_variance.clamp(-10, 10)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [0,1] -> images (B,3,S,S) in [0,1], of the mean latent vector."""
        return self.decoder(self.encode(images)[0]).float()

    def redraw(self, images: Tensor) -> Tensor:
        """The reconstruction, or the image that gradient descent has repaired."""
        return self.reconstruct(images) if self.settings.map == "error" else self.repair(images)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Squared error of one sample, and the divergence: with 2 sigma^2 = beta, -ELBO times beta / 3 S^2."""
        x, seed = batch["image"], next_seed()
        mean, log_variance = self.encode(x)
        noise = drawn(batch, lambda B: torch.randn(B, *mean.shape[1:], generator=generator(seed, "latent")))
        z = mean + (0.5 * log_variance).exp() * to_device(noise, x.device)
        divergence = kl(mean, log_variance).mean()
        weight = self.settings.beta / x[0].numel()
        return {"mse": F.mse_loss(self.decoder(z).float(), x), "kl": weight * divergence}

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): squared error, or how far each pixel was moved; smoothed."""
        if self.settings.map == "error":
            difference = (images - self.reconstruct(images)).square()
        else:
            difference = (images - self.repair(images)).abs()
        return gaussian_blur(difference.mean(1), self.settings.sigma)

    def repair(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> images near them that are reconstructed well.

        x <- x - alpha dE/dx (x - x')^2: the squared error of the reconstruction x' lets a pixel move where it is wrong.
        """
        x = images.detach().clone()
        with torch.enable_grad():
            for _ in range(self.settings.steps):
                x.requires_grad_(True)
                x_hat = self.reconstruct(x)
                (slope,) = torch.autograd.grad(self.energy(x, x_hat, images).sum(), x)
                x = (x - self.settings.step_size * slope * (x - x_hat).square()).detach()
        return x

    def energy(self, x: Tensor, x_hat: Tensor, images: Tensor) -> Tensor:
        """E (B,): squared error of the reconstruction, and what a move away from the images costs; over all pixels."""
        return (x - x_hat).square().sum((1, 2, 3)) + self.settings.sparsity * (x - images).abs().sum((1, 2, 3))

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): the maximum."""
        return maps.amax((1, 2))

    def phases(self) -> list[Phase]:
        """One phase of a fixed number of epochs."""
        s = self.settings
        return [Phase("train", list(self.parameters()), s.epochs, s.batch_size, s.lr)]


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Divergence of N(mean, variance) from N(0, 1), in nats: (B,...) twice -> (B,), summed over all numbers."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
