"""L2-CAE: the convolutional autoencoder that AnoViT is compared with.

Its exact layers are unknown. Taken here are those of Bergmann et al. 2019, "Improving Unsupervised Defect
Segmentation by Applying Structural Similarity to Autoencoders" (VISAPP, arXiv 1807.02011), Table 1, with the
squared error as loss.
"""

from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F

from vitad.blocks import gaussian_blur
from vitad.errors import UserError
from vitad.training import Phase

PAPER = "L2-CAE after Bergmann et al. 2019, VISAPP, 372-380"


@dataclass(frozen=True)
class Settings:
    image_size: int = 256  # third-party version of Bergmann's code for objects; 128 for texture crops
    latent: int = 100  # 100 for textures, 500 for objects
    epochs: int = 200  # Bergmann et al.
    batch_size: int = 16  # ours
    lr: float = 2e-4  # Bergmann et al.
    weight_decay: float = 1e-5  # Bergmann et al.
    sigma: float = 4.0  # ours, px: smoothing of the map
    amp: bool = True


PRESETS = {
    "paper": {},
    "small": {"epochs": 30},  # for two cores: fewer epochs, nothing else
    "demo": {"image_size": 128, "epochs": 60, "lr": 1e-3, "sigma": 2.0},
    "smoke": {"image_size": 64, "latent": 16, "epochs": 2, "sigma": 1.0, "amp": False},
}


class Model(nn.Module):
    """Encoder, decoder, loss and score. `weights` is accepted for uniformity; nothing here is pretrained."""

    weights = {"source": "random"}

    def __init__(self, settings, weights="auto"):
        super().__init__()
        self.settings = s = settings
        stems = {64: 1, 128: 2, 256: 3, 512: 4}.get(s.image_size)
        if not stems:
            raise UserError(f"image_size={s.image_size} does not suit l2cae. Choose 64, 128, 256 or 512.")
        if s.latent < 1:
            raise UserError(f"latent={s.latent} has to be at least 1.")
        #          channels, kernel, stride; down to 8 x 8, then one 8 x 8 convolution to the latent vector
        layers = [(32, 4, 2)] * stems + [(32, 3, 1), (64, 4, 2), (64, 3, 1), (128, 4, 2), (64, 3, 1), (32, 3, 1)]
        self.encoder, self.decoder = nn.Sequential(), nn.Sequential()
        c_in = 3
        for c_out, kernel, stride in layers:
            self.encoder += nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, 1), nn.LeakyReLU(0.2))
            c_in = c_out
        self.encoder.append(nn.Conv2d(c_in, s.latent, 8))  # (B,latent,1,1), linear
        self.decoder += nn.Sequential(nn.ConvTranspose2d(s.latent, c_in, 8), nn.LeakyReLU(0.2))
        outs = [3] + [c for c, _, _ in layers[:-1]]
        for c_out, (c_in, kernel, stride) in zip(reversed(outs), reversed(layers), strict=True):
            self.decoder += nn.Sequential(nn.ConvTranspose2d(c_in, c_out, kernel, stride, 1), nn.LeakyReLU(0.2))
        self.decoder[-1] = nn.Sigmoid()
        self.protocol = {
            "normalisation": "unit",
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": "maximum of the map",
            "checkpoint": "last epoch",
        }

    def reconstruct(self, images):
        """(B,3,S,S) in [0,1] -> (B,3,S,S) in [0,1]."""
        return self.decoder(self.encoder(images))

    def losses(self, batch):
        return {"mse": F.mse_loss(self.reconstruct(batch["image"]).float(), batch["image"])}

    def anomaly_map(self, images):
        """(B,3,S,S) -> (B,S,S): squared error, mean over channels, smoothed."""
        error = (images - self.reconstruct(images).float()).square().mean(1)
        return gaussian_blur(error, self.settings.sigma)

    def image_score(self, maps):
        return maps.amax((1, 2))

    def phases(self):
        s = self.settings
        return [Phase("train", list(self.parameters()), s.epochs, s.batch_size, s.lr, weight_decay=s.weight_decay)]
