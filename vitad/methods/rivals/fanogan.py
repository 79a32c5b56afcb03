"""f-AnoGAN: a network that draws normal images, and an encoder that looks for the drawing nearest to a test image.

Schlegl et al. 2019, "f-AnoGAN: Fast unsupervised anomaly detection with generative adversarial networks", Medical Image
Analysis 54, 30-44. *Code* below is that of the authors, tSchlegl/f-AnoGAN. The paper itself was not read. Its
predecessor AnoGAN (Schlegl et al. 2017, IPMI, arXiv 1703.05921) has no encoder: it searches by gradient descent, here
`inference="search"`. Both were made for patches of medical images; here a whole image is resized (ours).

    1  generator and critic: latent vector -> drawing; the critic tells drawings from images (Wasserstein distance)
    2  encoder: image -> latent vector whose drawing is the image; generator and critic stay as they are
    anomaly map = difference of image and drawing
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vitad.blocks import gaussian_blur
from vitad.data.samples import to_device
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.processes import drawn
from vitad.randomness import generator, next_seed, seeded
from vitad.training import Phase

PAPER = "Schlegl et al. 2019, f-AnoGAN, Medical Image Analysis 54, 30-44"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the authors' code; *ours* marks what differs."""

    image_size: int = 64  # code: patches of this size; ours: the whole image
    latent: int = 128  # code
    width: int = 64  # code: channels near the image; eight times as many far from it
    n_critic: int = 5  # code: so many steps of the critic, then one of the generator; ours: by chance, on average
    penalty: float = 10.0  # code: weight of the gradient penalty
    gan_epochs: int = 2000  # ours: code has 7 epochs, each of very many patches
    gan_lr: float = 1e-4  # code: Adam, betas 0 and 0.9
    encoder_out: Literal["tanh", "linear"] = "tanh"  # code: so that it cannot name a vector outside of -1..1
    kappa: float = 1.0  # code: weight of the critic's features
    epochs: int = 2000  # ours: code has 50,000 steps of the encoder
    batch_size: int = 64  # code
    lr: float = 5e-5  # code, with RMSprop; ours: Adam
    inference: Literal["encoder", "search"] = "encoder"  # code; AnoGAN: search
    steps: int = 500  # AnoGAN, second-hand: steps of the search
    sigma: float = 1.0  # ours, px: smoothing of the map
    amp: bool = False  # the gradient of a gradient needs all digits


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # For two cores: an eighth of the channels, few steps.
    "small": {
        "latent": 64,
        "width": 8,
        "gan_epochs": 150,
        "gan_lr": 5e-4,
        "epochs": 80,
        "batch_size": 16,
        "lr": 5e-4,
        "steps": 100,
    },
    "demo": {
        "latent": 64,
        "width": 8,
        "gan_epochs": 300,
        "gan_lr": 5e-4,
        "epochs": 120,
        "batch_size": 16,
        "lr": 5e-4,
        "steps": 100,
    },
    "smoke": {
        "latent": 8,
        "width": 2,
        "n_critic": 2,
        "gan_epochs": 3,
        "epochs": 2,
        "batch_size": 4,
        "steps": 2,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}, "search": {"inference": "search"}}
FEATURES = 0.1  # AnoGAN, second-hand: share of the features in what the search makes small


class Model(Method):
    """Generator, critic, encoder, map. Nothing here is pretrained, so that `weights` has no effect."""

    settings: Settings

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        self.weights = {"source": "random"}
        if s.image_size < 8 or s.image_size & (s.image_size - 1):
            raise UserError(f"image_size={s.image_size} does not suit this generator. Choose 8, 16, 32, 64 or 128.")
        if min(s.latent, s.width, s.n_critic, s.steps) < 1:
            raise UserError(
                f"latent={s.latent}, width={s.width}, n_critic={s.n_critic}, steps={s.steps} have to be at least 1."
            )
        # 64, 128, 256, 512, 512 at the paper's size and width: from near the image to far from it
        widths = [s.width * min(8, 2**k) for k in range(int(math.log2(s.image_size)) - 1)]
        with seeded(self.seed, "generator"):
            self.generator = Generator(s.latent, widths)
        with seeded(self.seed, "critic"):
            self.critic = Reader(widths, 1, lambda channels: nn.GroupNorm(1, channels))  # one group: layer norm
        with seeded(self.seed, "encoder"):
            self.encoder = Reader(widths, s.latent, nn.BatchNorm2d)
        self.protocol = {
            "normalisation": "-1..1",
            "smoothing": f"Gaussian, sigma {s.sigma} px",
            "image_score": "mean of the map",  # ours; code: squared error of image and features
            "checkpoint": "last epoch",
        }

    def named(self, x: Tensor) -> Tensor:
        """Images (B,3,S,S) in -1..1 -> the latent vectors (B,latent) that the encoder names."""
        _, z = self.encoder(x)
        return z.tanh() if self.settings.encoder_out == "tanh" else z

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [0,1] -> drawings (B,3,S,S) in [0,1] that come near them."""
        x = 2 * images - 1
        z = self.named(x) if self.settings.inference == "encoder" else self.search(x)
        return (self.generator(z).float() + 1) / 2

    def latent(self, batch: dict[str, Any]) -> Tensor:
        """Latent vectors (B,latent) for a batch, N(0,1)."""
        random = generator(next_seed(), "latent")
        z = drawn(batch, lambda B: torch.randn(B, self.settings.latent, generator=random))
        return to_device(z, batch["image"].device)

    def gan_losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Wasserstein distance and gradient penalty for the critic alone, or in one step of six for the generator.

        What is not trained in a step gets no gradient, and an optimiser leaves alone what has none.
        """
        s, x = self.settings, 2 * batch["image"] - 1
        z, zero = self.latent(batch), x.new_zeros(())
        if next_seed() % (s.n_critic + 1) == 0:
            return {"critic": zero, "penalty": zero, "fake": -frozen(self.critic, self.generator(z))[1].mean()}
        with torch.no_grad():
            fake = self.generator(z).float()
        distance = self.critic(fake)[1].mean() - self.critic(x)[1].mean()
        random = generator(next_seed(), "between")
        share = to_device(drawn(batch, lambda B: torch.rand(B, 1, 1, 1, generator=random)), x.device)
        penalty = gradient_penalty(lambda x: self.critic(x)[1], torch.lerp(x, fake, share))
        return {"critic": distance, "penalty": s.penalty * penalty, "fake": zero}

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Squared error of the drawing that the encoder names, and of the critic's features (code: izi_f)."""
        x = 2 * batch["image"] - 1
        self.generator.eval()  # its running means stay as they are
        x_hat = frozen(self.generator, self.named(x))
        with torch.no_grad():
            seen, _ = self.critic(x)
        features = F.mse_loss(frozen(self.critic, x_hat)[0], seen)
        return {"mse": F.mse_loss(x_hat, x), "features": self.settings.kappa * features}

    def search(self, x: Tensor) -> Tensor:
        """Images (B,3,S,S) in -1..1 -> latent vectors (B,latent), the best of a descent from one start (AnoGAN)."""
        start = torch.randn(1, self.settings.latent, generator=generator(0, "start"))
        z = to_device(start, x.device).repeat(len(x), 1).requires_grad_(True)
        best, found = x.new_full((len(x),), torch.inf), z.detach().clone()
        optimizer = torch.optim.Adam([z], lr=0.05)
        seen = self.critic(x)[0].detach()
        for _ in range(self.settings.steps):
            with torch.enable_grad():
                value = self.distance(x, seen, z)
                z.grad = None
                value.sum().backward(inputs=[z])  # and not grad(), which what counts operations cannot follow
            better = value.detach() < best
            best = torch.where(better, value.detach(), best)
            found = torch.where(better[:, None], z.detach(), found)
            optimizer.step()
        return found

    def distance(self, x: Tensor, seen: Tensor, z: Tensor) -> Tensor:
        """(B,): what AnoGAN makes small, the absolute difference of the drawings of z, and of the critic's features."""
        drawing = self.generator(z)
        pixels = (x - drawing).abs().flatten(1).sum(1)
        features = (seen - self.critic(drawing)[0]).abs().sum(1)
        return (1 - FEATURES) * pixels + FEATURES * features

    def redraw(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) in [0,1] -> what the model draws again, (B,3,S,S)."""
        return self.reconstruct(images)

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): absolute difference, mean over channels, smoothed."""
        return gaussian_blur((images - self.reconstruct(images)).abs().mean(1), self.settings.sigma)

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): the mean."""
        return maps.mean((1, 2))

    def phases(self) -> list[Phase]:
        """Generator and critic, then the encoder; each for a fixed number of epochs."""
        s = self.settings
        both = [*self.generator.parameters(), *self.critic.parameters()]
        gan = Phase("gan", both, s.gan_epochs, s.batch_size, s.gan_lr, betas=(0.0, 0.9), losses=self.gan_losses)
        return [gan, Phase("encoder", list(self.encoder.parameters()), s.epochs, s.batch_size, s.lr)]


def frozen(module: nn.Module, x: Tensor) -> Any:
    """`module(x)`, whose gradient reaches x but none of the module's weights."""
    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, x)


def gradient_penalty(critic: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Mean of (n - 1)^2, where n is the length of the critic's gradient at each image of x (B,3,S,S)."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cycle, which ends here: x does not leave
        x = x.detach().requires_grad_(True)
        # and not grad(), which what counts operations cannot follow
        torch.autograd.backward(critic(x).sum(), inputs=[x], create_graph=True)
        assert x.grad is not None, "the critic looks at it"
        slope, x.grad = x.grad, None
        return (slope.flatten(1).norm(dim=1) - 1).square().mean()


class Generator(nn.Module):
    """Latent vectors (B,latent) -> drawings (B,3,S,S) in -1..1, through residual blocks that double the side."""

    def __init__(self, latent: int, widths: list[int]):
        super().__init__()
        self.first = nn.Linear(latent, widths[-1] * 16)
        pairs = pairwise(widths[::-1])
        self.blocks = nn.Sequential(*(Residual(before, after, nn.BatchNorm2d, up=True) for before, after in pairs))
        self.head = nn.Sequential(nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.Conv2d(widths[0], 3, 3, 1, 1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.blocks(self.first(z).unflatten(1, (-1, 4, 4))))


class Reader(nn.Module):
    """Images (B,3,S,S) -> features (B,F), and numbers (B,out): a critic, or an encoder."""

    def __init__(self, widths: list[int], out: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.first = nn.Conv2d(3, widths[0], 3, 1, 1)
        self.blocks = nn.Sequential(*(Residual(before, after, norm, up=False) for before, after in pairwise(widths)))
        self.head = nn.Linear(widths[-1] * 16, out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.blocks(self.first(x)).flatten(1)
        return features, self.head(features)


class Residual(nn.Module):
    """(B,C,h,w) -> (B,D,2h,2w), or of half the side: norm, ReLU and 3 x 3 convolution, twice, and a 1 x 1 shortcut."""

    def __init__(self, before: int, after: int, norm: Callable[[int], nn.Module], up: bool):
        super().__init__()
        middle = after if up else before
        resize = nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2)
        first = [norm(before), nn.ReLU(), *([resize] if up else []), nn.Conv2d(before, middle, 3, 1, 1, bias=False)]
        second = [norm(middle), nn.ReLU(), nn.Conv2d(middle, after, 3, 1, 1), *([] if up else [resize])]
        self.long = nn.Sequential(*first, *second)
        self.short = nn.Sequential(resize, nn.Conv2d(before, after, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.long(x) + self.short(x)
