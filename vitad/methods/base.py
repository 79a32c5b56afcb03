"""The interface of a method: all that the rest of the library asks of one."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor, nn

from vitad.data.samples import ImageSet
from vitad.randomness import next_seed
from vitad.training import Phase


class Method(nn.Module, ABC):
    """An anomaly detector. B images of S x S px have values in [0,1]; maps and scores are higher the more anomalous."""

    settings: Any  # the frozen dataclass `Settings` of the method's module
    weights: dict[str, str]  # where the weights came from, for the run record: `source`, and `sha256` of a file
    protocol: dict[str, str]  # for the run record: normalisation, smoothing, image_score, checkpoint
    revision = 1  # goes up by one where the same settings train otherwise than before; older records then stop counting

    def __init__(self) -> None:
        super().__init__()
        self.seed = next_seed()  # with the name of a part or a draw it seeds that one alone, see `vitad.randomness`

    @abstractmethod
    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B,3,S,S) -> maps (B,S,S)."""

    @abstractmethod
    def image_score(self, maps: Tensor) -> Tensor:
        """Maps (B,S,S) -> scores (B,)."""

    def redraw(self, images: Tensor) -> Tensor | None:
        """Images (B,3,S,S) -> the images (B,3,S,S) that the map compares them with; None without such."""
        return None

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Named scalars of a batch; training minimises their sum."""
        return {}

    def phases(self) -> list[Phase]:
        """What is trained and how, in order; a phase may have losses of its own."""
        return []

    def size_up(self, categories: ndarray) -> None:
        """Decide what the categories (n,) of the training images decide: which images a phase uses, how long it lasts.

        `prepare` begins with it; it needs no image, so that the length of a training is known beforehand.
        """

    def prepare(self, images: ImageSet, device: torch.device) -> None:
        """Look at the training images once before training."""

    def finish(self, images: ImageSet, device: torch.device) -> None:
        """Look at the training images once after training, to keep what test images are compared with."""

    def observe(self, images: ImageSet, device: torch.device) -> dict[str, int | float]:
        """Further counts for the run record, from the training images after training."""
        return {}

    def fill_for_timing(self) -> None:
        """Put random stand-ins where `prepare` would put what it finds, for timing and counting only.

        What every image is compared with has its usual size. What is kept for each training image is there for one.
        """
