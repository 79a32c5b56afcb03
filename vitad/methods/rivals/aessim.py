"""AE-SSIM: the convolutional autoencoder of `l2cae`, which looks at structure in place of single pixels.

Bergmann et al. 2019, "Improving Unsupervised Defect Segmentation by Applying Structural Similarity to Autoencoders"
(VISAPP, arXiv 1807.02011). There is no code of the authors; *code* below is the third-party version of plutoyuxie. The
paper trains on crops of grey images. Here the whole frame is seen, in colour: similarity is the mean of the channels.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitad.blocks import gaussian_blur, ssim_map
from vitad.methods.rivals import l2cae

PAPER = "Bergmann et al. 2019, AE-SSIM, VISAPP, 372-380, arXiv 1807.02011"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the source that each line names."""

    image_size: int = 256  # code, for objects; 128 for texture crops
    latent: int = 100  # code: 100 for textures, 500 for objects
    epochs: int = 200  # code, over 10,000 crops; ours: over the images
    batch_size: int = 16  # ours; code: 128
    lr: float = 2e-4  # code
    weight_decay: float = 0.0  # code
    sigma: float = 4.0  # ours, px: smoothing of the map
    amp: bool = True  # ours: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "textures": {"epochs": 1000},  # as many steps as the code takes, with its latent vector: see l2cae
    "objects": {"latent": 500, "epochs": 1000},
    "small": {"image_size": 128, "epochs": 60, "lr": 1e-3},
    "demo": {"image_size": 128, "epochs": 60, "lr": 1e-3, "sigma": 2.0},
    "smoke": {"image_size": 64, "latent": 16, "epochs": 2, "sigma": 1.0, "amp": False},
}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}}


class Model(l2cae.Model):
    """The network, score and training of `l2cae`, whose settings have the same names; the loss and the map are here."""

    def dissimilarity(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> 1 - SSIM of each and its reconstruction, at every pixel, (B,S,S) in 0 to 2."""
        return (1 - ssim_map(images, self.reconstruct(images), data_range=1.0))[:, 0].clamp_min(0)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The dissimilarity, mean over pixels."""
        return {"ssim": self.dissimilarity(batch["image"]).mean()}

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): the dissimilarity, smoothed; the paper has no score."""
        return gaussian_blur(self.dissimilarity(images), self.settings.sigma)
