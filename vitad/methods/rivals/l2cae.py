"""L2-CAE: the convolutional autoencoder that AnoViT is compared with.

Its exact layers are unknown. This file takes those of Bergmann et al. 2019, "Improving Unsupervised Defect
Segmentation by Applying Structural Similarity to Autoencoders" (VISAPP, arXiv 1807.02011), Table 1, with the
squared error as loss.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vitad.blocks import convolutional_autoencoder, gaussian_blur
from vitad.methods.base import Method
from vitad.training import Phase

PAPER = "L2-CAE after Bergmann et al. 2019, VISAPP, 372-380"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the source that each line names."""

    image_size: int = 256  # third-party version of Bergmann's code for objects; 128 for texture crops
    latent: int = 100  # third-party version of Bergmann's code: 100 for textures, 500 for objects
    epochs: int = 200  # third-party version of Bergmann's code, over 10,000 crops; ours: over the images
    batch_size: int = 16  # ours; third-party version of Bergmann's code: 128
    lr: float = 2e-4  # Bergmann et al.
    weight_decay: float = 1e-5  # Bergmann et al.
    sigma: float = 4.0  # ours, px: smoothing of the map
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # As long as its source, and with its latent vector: 200 epochs of 10,000 crops in batches of 128 are 15,600 steps,
    # as many as 1,000 epochs of 250 images in batches of 16.
    "textures": {"epochs": 1000},
    "objects": {"latent": 500, "epochs": 1000},
    "small": {"epochs": 30},  # for two cores: fewer epochs, nothing else
    "demo": {"image_size": 128, "epochs": 60, "lr": 1e-3, "sigma": 2.0},
    "smoke": {"image_size": 64, "latent": 16, "epochs": 2, "sigma": 1.0, "amp": False},
}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}}


class Model(Method):
    """Encoder, decoder, loss and score. Nothing here is pretrained, so that `weights` has no effect."""

    settings: Settings

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        self.weights = {"source": "random"}
        self.encoder, self.decoder = convolutional_autoencoder(s.image_size, s.latent)
        self.protocol = {
            "normalisation": "unit",
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": "maximum of the map",
            "checkpoint": "last epoch",
        }

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [0,1] -> images (B,3,S,S) in [0,1]."""
        return self.decoder(self.encoder(images))

    def redraw(self, images: Tensor) -> Tensor:
        """The reconstruction."""
        return self.reconstruct(images)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The squared error of the reconstruction."""
        x = batch["image"]
        return {"mse": F.mse_loss(self.reconstruct(x).float(), x)}

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): squared error, mean over channels, smoothed."""
        error = (images - self.reconstruct(images).float()).square().mean(1)
        return gaussian_blur(error, self.settings.sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): the maximum."""
        return maps.amax((1, 2))

    def phases(self) -> list[Phase]:
        """One phase of a fixed number of epochs."""
        s = self.settings
        return [Phase("train", list(self.parameters()), s.epochs, s.batch_size, s.lr, weight_decay=s.weight_decay)]
