"""Patch SVDD: an encoder of patches learns where two of them lie; a patch unlike all training patches is anomalous.

Yi & Yoon 2020, "Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation", ACCV, arXiv 2006.16067. *Code*
below is that of the authors, nuclearboy95/Anomaly-Detection-PatchSVDD-PyTorch. The paper itself was not read.

    two patches that nearly cover each other -> near one another
    two patches side by side                 -> a classifier says on which of eight sides the second one lies
    after training: distance of each patch to the nearest training patch, at two sizes of patches; maps multiplied
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vitad.data.samples import ImageSet, to_device
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.processes import drawn
from vitad.randomness import generator, next_seed, seeded
from vitad.training import Phase

PAPER = "Yi & Yoon 2020, Patch SVDD, ACCV, arXiv 2006.16067"
CATEGORY = None


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the authors' code; *ours* marks what differs."""

    image_size: int = 256  # code
    widths: tuple[int, ...] = (32, 64, 128, 128, 64, 32, 32, 64)  # code: channels by layer; a patch has 32 px
    strides: tuple[int, int] = (4, 16)  # code, px: between patches of the test image, small and large ones
    lambda_svdd: float = 1e-3  # code, read-me: weight of the distance of near patches; the authors tune it by category
    jitter: float = 0.02  # code: standard deviation of a colour shift of a patch, and of noise on its pixels
    pairs: int = 8  # code: 100 a category and image in an epoch; here 8 in a step
    bank_size: int = 0  # code: 0, all training patches; else so many, drawn from all, at each size
    epochs: int = 3750  # code: 300 epochs with 100 pairs of patches from each image; ours have 8 pairs
    batch_size: int = 8  # code: 64 pairs, here eight of each image
    lr: float = 1e-4  # code
    amp: bool = False  # ours; True: mixed precision where it is faster


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # For two cores: half the size, half the widths, few pairs.
    "small": {
        "image_size": 128,
        "widths": (16, 32, 64, 64, 32, 16, 16, 64),
        "strides": (8, 16),
        "lambda_svdd": 0.01,
        "bank_size": 20_000,
        "epochs": 12,
        "lr": 1e-3,
    },
    "demo": {
        "image_size": 128,
        "widths": (16, 32, 64, 64, 32, 16, 16, 64),
        "strides": (8, 16),
        "lambda_svdd": 0.01,
        "bank_size": 10_000,
        "epochs": 40,
        "lr": 1e-3,
    },
    "smoke": {
        "image_size": 64,
        "widths": (8, 8, 8, 16),
        "strides": (4, 8),
        "pairs": 4,
        "bank_size": 200,
        "epochs": 2,
        "lr": 1e-3,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}}
SIDES = torch.tensor([[-1, -1], [-1, 0], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 0], [1, 1]])  # rows, columns
CHUNK = 8192  # patches of the bank that are compared at a time


class Model(Method):
    """Encoder, losses, bank, map. Nothing here is pretrained, so that `weights` has no effect."""

    settings: Settings
    mean: Tensor  # (3,S,S), of the training images
    small_bank: Tensor  # (M,D)
    large_bank: Tensor

    def __init__(self, settings: Settings, weights: str | Path = "auto"):
        super().__init__()
        self.settings = s = settings
        self.weights = {"source": "random"}
        small = 4 * len(s.widths)
        self.sizes = (small, 2 * small)  # px of a patch
        if s.image_size < 2 * self.sizes[1]:
            raise UserError(f"image_size={s.image_size}: {len(s.widths)} widths need {2 * self.sizes[1]} px at least.")
        for size, stride in zip(self.sizes, s.strides, strict=True):
            if stride < 2 or stride % 2 or (s.image_size - size) % stride:
                raise UserError(
                    f"strides={s.strides}: {stride} has to be even and to divide {s.image_size - size}, what "
                    f"patches of {size} px leave of image_size={s.image_size}."
                )
        if s.pairs < 1 or s.bank_size < 0:
            raise UserError(f"pairs={s.pairs} has to be at least 1, bank_size={s.bank_size} at least 0, all patches.")
        with seeded(self.seed, "encoder"):
            self.encoder = Encoder(s.widths)
        with seeded(self.seed, "classifiers"):
            self.classifiers = nn.ModuleList(classifier(s.widths[-1]) for _ in self.sizes)
        self.register_buffer("mean", torch.zeros(3, s.image_size, s.image_size))
        for name in ("small", "large"):
            self.register_buffer(f"{name}_bank", torch.zeros(0, s.widths[-1]))
        self.protocol = {
            "normalisation": "unit, less the mean training image",
            "smoothing": "none",
            "image_score": "maximum of the map",
            "checkpoint": "last epoch",  # code: tested on the test set after each epoch
        }

    @torch.no_grad()
    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """The mean of the training images."""
        self.mean.zero_()
        for i in range(0, len(images), self.settings.batch_size):
            some = range(i, min(i + self.settings.batch_size, len(images)))
            self.mean += images.batch(some, device)["image"].sum(0) / len(images)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """At both sizes: distance of near patches, times lambda, and cross-entropy of the side."""
        s, images = self.settings, batch["image"] - self.mean
        found: dict[str, Tensor] = {}
        for number, size in enumerate(self.sizes):
            at, noise = self.draws(batch, size)
            one, near, first, second = (crops(images, at[:, k : k + 2], size) for k in (0, 2, 4, 6))
            pair = torch.cat([first, second]) + s.jitter * noise
            patches = torch.cat([one, near, pair])
            h_one, h_near, h_first, h_second = self.encoder(patches, number).float().flatten(1).chunk(4)
            apart = (h_one - h_near).norm(dim=1).mean()
            side = F.cross_entropy(self.classifiers[number](h_first - h_second), at[:, 8])
            name = ("small", "large")[number]
            found |= {f"near_{name}": s.lambda_svdd * apart, f"side_{name}": side}
        return found

    def draws(self, batch: dict[str, Any], size: int) -> tuple[Tensor, Tensor]:
        """Where the patches of a batch lie, (B*pairs,9), and what the colours of the last two change, as one batch."""
        pairs, device = self.settings.pairs, batch["image"].device
        where, colours = generator(next_seed(), "patches"), generator(next_seed(), "colours")

        def noise(B: int) -> Tensor:  # a shift of each patch, and noise on its pixels
            shift = torch.randn(B, pairs, 2, 3, 1, 1, generator=colours)
            return shift + torch.randn(B, pairs, 2, 3, size, size, generator=colours)

        side = self.settings.image_size
        at = drawn(batch, lambda B: places(B * pairs, side, size, where).view(B, pairs, -1))
        changes = to_device(drawn(batch, noise), device)
        return to_device(at, device).flatten(0, 1), torch.cat([changes[:, :, 0], changes[:, :, 1]]).flatten(0, 1)

    @torch.no_grad()
    def finish(self, images: ImageSet, device: torch.device) -> None:
        """Keep training patches, of all or of a random choice at each size."""
        self.eval()
        n, step = len(images), self.settings.batch_size
        for number, name in enumerate(("small", "large")):
            each = self.grid(images.batch([0], device)["image"], number).flatten(2).shape[-1]
            total = n * each
            size = min(self.settings.bank_size or total, total)
            kept = torch.randperm(total, generator=generator(self.seed, "bank", name))[:size].sort().values
            parts = []
            for i in tqdm(range(0, n, step), f"bank of {name} patches", unit="batch", leave=False):
                some = range(i, min(i + step, n))
                found = self.grid(images.batch(some, device)["image"], number).flatten(2).mT.flatten(0, 1)
                low, high = torch.searchsorted(kept, torch.tensor([i * each, i * each + len(found)])).tolist()
                parts.append(found[(kept[low:high] - i * each).to(device)])
            setattr(self, f"{name}_bank", torch.cat(parts))

    def fill_for_timing(self) -> None:
        """Fill the banks with random vectors, as many as of a hundred images where all are kept."""
        for number, name in enumerate(("small", "large")):
            side = (self.settings.image_size - self.sizes[number]) // self.settings.strides[number] + 1
            bank = torch.randn(self.settings.bank_size or 100 * side**2, self.settings.widths[-1])
            setattr(self, f"{name}_bank", bank.to(self.mean.device))

    def grid(self, images: Tensor, number: int) -> Tensor:
        """Images (B,3,S,S) -> embeddings (B,D,h,w) of all patches of one of the two sizes, at its stride."""
        return self.encoder(images - self.mean, number, self.settings.strides[number]).float()

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S): product over both sizes of the mean distance of the patches at a pixel."""
        return self.distances(images, 0) * self.distances(images, 1)

    def distances(self, images: Tensor, number: int) -> Tensor:
        """Images (B,3,S,S) -> (B,S,S): distance to the nearest training patch, mean over the patches at a pixel."""
        bank = (self.small_bank, self.large_bank)[number]
        embedded = self.grid(images, number)
        B, D, h, w = embedded.shape
        with torch.autocast(images.device.type, enabled=False):
            x = embedded.permute(0, 2, 3, 1).reshape(-1, D)
            nearest = [torch.cdist(x, part).amin(1) for part in bank.split(CHUNK)]
            distance = torch.stack(nearest).amin(0).view(B, 1, h, w)
            size, stride = self.sizes[number], self.settings.strides[number]
            ones = distance.new_ones(1, 1, size, size)
            total = F.conv_transpose2d(distance, ones, stride=stride)
            return (total / F.conv_transpose2d(torch.ones_like(distance), ones, stride=stride))[:, 0]

    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,): the maximum."""
        return maps.amax((1, 2))

    @torch.no_grad()
    def observe(self, images: ImageSet, device: torch.device) -> dict[str, int | float]:
        """Share of sides that are told right, and how far near patches are beside any two: 1 where all is one point."""
        self.eval()
        s = self.settings
        counts: dict[str, int | float] = {}
        shown = images.batch(range(min(64, len(images))), device)["image"] - self.mean
        for number, name in enumerate(("small", "large")):
            at = places(len(shown) * s.pairs, s.image_size, self.sizes[number], generator(0, name)).to(device)
            one, near, first, second = (
                self.encoder(crops(shown, at[:, k : k + 2], self.sizes[number]), number).float().flatten(1)
                for k in (0, 2, 4, 6)
            )
            told = self.classifiers[number](first - second).argmax(1) == at[:, 8]
            others = (one - one.roll(len(one) // 2, 0)).norm(dim=1).mean()
            counts |= {
                f"sides_{name}": round(told.float().mean().item(), 4),
                f"near_{name}": round(((one - near).norm(dim=1).mean() / others.clamp_min(1e-12)).item(), 4),
            }
        return counts

    def phases(self) -> list[Phase]:
        """One phase of a fixed number of epochs."""
        s = self.settings
        return [Phase("train", list(self.parameters()), s.epochs, s.batch_size, s.lr)]

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name in ("small_bank", "large_bank"):
            if (bank := state.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(bank, device=self.mean.device))  # its size depends on the data
        super()._load_from_state_dict(state, prefix, *rest)


class Encoder(nn.Module):
    """Patches to embeddings: convolutions without padding, the first of stride 2; large patches by their quadrants.

    Nothing is padded, so that one pass over an image gives the embeddings of all its patches, as of each alone.
    """

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        layers: list[nn.Module] = []
        for k, (before, after) in enumerate(zip((3, *widths), widths, strict=False)):
            layers += [nn.Conv2d(before, after, 3, stride=1 if k else 2), nn.LeakyReLU(0.1)]
        layers[-1] = nn.Tanh()
        self.small = nn.Sequential(*layers)
        width, self.size = widths[-1], 4 * len(widths)  # px of a small patch
        self.quadrants = nn.Conv2d(width, 2 * width, 2, dilation=2 * len(widths))
        self.head = nn.Sequential(nn.LeakyReLU(0.1), nn.Conv2d(2 * width, width, 1), nn.Tanh())

    def forward(self, x: Tensor, number: int, stride: int = 2) -> Tensor:
        """Images (B,3,H,W) -> embeddings (B,D,h,w) of the patches of a size, 0 small or 1 large, each `stride` px."""
        step = stride // 2  # the first convolution has stride 2
        if number == 0:
            return self.small(x)[..., ::step, ::step]
        if x.shape[-1] == 2 * self.size:  # one patch each: its quadrants alone, half the work of all places between
            x = x.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(0, 2, 4, 1, 3, 5)  # (B,2,2,3,size,size)
            embedded = self.small(x.flatten(0, 2)).view(len(x), 2, 2, -1).permute(0, 3, 1, 2)
            return self.head(F.conv2d(embedded, self.quadrants.weight, self.quadrants.bias))
        return self.head(self.quadrants(self.small(x))[..., ::step, ::step])


def classifier(width: int) -> nn.Sequential:
    """Differences (n,D) of two embeddings -> which of eight sides (n,8)."""
    return nn.Sequential(
        nn.Linear(width, 128), nn.LeakyReLU(0.1), nn.Linear(128, 128), nn.LeakyReLU(0.1), nn.Linear(128, 8)
    )


def places(n: int, side: int, size: int, random: torch.Generator) -> Tensor:
    """(n,9) int: rows and columns of four patches of `size` px in an image of `side` px, and the number of a side.

    The second patch is up to 1/32 of its size away from the first, one pixel at least (code). The fourth lies on one
    of eight `SIDES` of the third: 3/4 of its size away or more, less than all of it. All of them lie inside.
    """
    reach, least = max(1, size // 32), 3 * size // 4
    one = torch.randint(0, side - size + 1, (n, 2), generator=random)
    near = (one + torch.randint(-reach, reach + 1, (n, 2), generator=random)).clamp(0, side - size)
    number = torch.randint(0, 8, (n, 1), generator=random)
    move = SIDES[number[:, 0]] * torch.randint(least, size, (n, 2), generator=random)
    low, high = (-move).clamp_min(0), side - size - move.clamp_min(0)  # where the third may begin
    first = low + (torch.rand(n, 2, generator=random) * (high - low + 1)).long()
    return torch.cat([one, near, first, first + move, number], 1)


def crops(images: Tensor, at: Tensor, size: int) -> Tensor:
    """Images (B,3,S,S) -> patches (B*k,3,size,size) with their upper left corners `at` (B*k,2), k of each image."""
    k = len(at) // len(images)
    offset = torch.arange(size, device=images.device)
    rows = (at[:, :1] + offset)[:, None, :, None]  # (B*k,1,size,1)
    columns = (at[:, 1:] + offset)[:, None, None, :]
    image = torch.arange(len(images), device=images.device).repeat_interleave(k)[:, None, None, None]
    return images[image, torch.arange(3, device=images.device)[None, :, None, None], rows, columns]
