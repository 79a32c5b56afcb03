"""Several processes, each with a GPU of its own, that train one model and score its test images.

    accelerate launch --num_processes 4 -m vitad run mala --dataset mvtec --preset paper --out runs/mala

Batches are the settings' own. Each process computes its rows of a batch; gradients and losses are sums over the
processes. What is drawn at random, the damage, and the statistics of batch norm are those of the whole batch. So the
number of processes changes results by rounding alone, as another GPU does, and is no part of what identifies a run.
The first process writes; the others have to see its folder when a run is resumed.

One process needs none of this and does not import `accelerate` (extra `multi`), which starts the processes, gives each
its device and connects them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from numpy import ndarray
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from vitad.errors import UserError

if TYPE_CHECKING:
    from vitad.training import Phase

NUMBER, RANK, LOCAL_RANK = "WORLD_SIZE", "RANK", "LOCAL_RANK"  # variables that `accelerate launch` and `torchrun` set
PATIENCE = timedelta(hours=6)  # for the first process, which evaluates and writes alone


@dataclass(frozen=True)
class Share:
    """The rows of a batch that a process computes, of `total`; the means over them count `weight` in those over all."""

    first: int
    last: int  # one past the last
    total: int
    weight: float

    @property
    def rows(self) -> slice:
        """They, of the whole batch."""
        return slice(self.first, self.last)


def is_first() -> bool:
    """Whether this is the only process, or the first of several."""
    return os.environ.get(RANK, "0") == "0"


def drawn(batch: dict[str, Any], draw: Callable[[int], Tensor]) -> Tensor:
    """`draw(B)`, random numbers for the B images of a whole batch: of these the rows that are in `batch`."""
    share = batch.get("share")
    return draw(share.total)[share.rows] if share else draw(len(batch["image"]))


@dataclass(eq=False)
class Processes:
    """The processes of a run, seen from one of them; alone, it has nothing to do."""

    device: torch.device
    number: int = 1
    rank: int = 0  # from 0, the one that writes
    share: Share | None = None  # of the batch that is computed now

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Connect with the other processes, if this one was started as one of several; gives each a GPU of its own.

        Raises
        ------
        UserError
            `accelerate` is missing, or there are fewer GPUs than processes.
        """
        number, local = int(os.environ.get(NUMBER, 1)), int(os.environ.get(LOCAL_RANK, 0))
        if number == 1:
            return cls(device)
        try:
            from accelerate import PartialState
        except ImportError:
            raise UserError(
                f"{number} processes were started, but accelerate is missing. Install it with: pip install vitad[multi]"
            ) from None
        if device.type == "cuda" and local >= (gpus := torch.cuda.device_count()):
            raise UserError(
                f"more processes than GPUs: torch sees {gpus}. Start as many with --num_processes {gpus}, "
                "or use --device cpu."
            )
        state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        return cls(state.device, state.num_processes, state.process_index)

    @property
    def writes(self) -> bool:
        """Whether this is the first process, which alone writes files and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.number > 1:
            distributed.barrier()

    @contextmanager
    def one_after_another(self) -> Iterator[None]:
        """The block is run by the first process, then by the others, who find in the cache what it put there."""
        if not self.writes:
            self.wait()
        yield
        if self.writes:
            self.wait()

    # --- training ---

    def check(self, phases: Iterable[Phase]) -> None:
        """Raises `UserError` where the processes cannot have equal shares of a batch."""
        for phase in phases:
            B = phase.batch_size
            if B % self.number:
                fits = ", ".join(str(n) for n in range(1, min(B, self.number) + 1) if B % n == 0)
                raise UserError(
                    f"{self.number} processes cannot share the batches of phase {phase.name} evenly: they hold {B} "
                    f"images. Start as many as divide that, such as {fits}, with --num_processes."
                )

    def share_of(self, total: int) -> Share | None:
        """What this process takes of a batch; None is all, of one process.

        The last batch of an epoch may be uneven. If it has fewer images than there are processes, each takes them all.
        """
        if self.number == 1:
            return None
        if total < self.number:
            return Share(0, total, total, 1 / self.number)
        first, last = (total * rank // self.number for rank in (self.rank, self.rank + 1))
        return Share(first, last, total, (last - first) / total)

    def take(self, batch: dict[str, Any], share: Share | None) -> dict[str, Any]:
        """The batch, made known as this share of a whole one."""
        self.share = share
        return batch if share is None else batch | {"share": share}

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses whose sums over the processes are those of the whole batch; each is a mean over images."""
        return losses if self.share is None else {name: loss * self.share.weight for name, loss in losses.items()}

    def add_up(self, *tensors: Tensor | None) -> None:
        """Replace each tensor by its sum over the processes. No host waits for a GPU."""
        if self.number > 1:
            _as_one([t for t in tensors if t is not None], distributed.all_reduce)

    @contextmanager
    def joined(self, model: nn.Module) -> Iterator[None]:
        """Within, all processes have the numbers of the first, and layers that look at other rows see the whole batch.

        These are batch norm and dropout. They keep their class, their parameters and their names.
        """
        if self.number == 1:
            yield
            return
        numbers = [t for t in model.state_dict().values() if t.is_floating_point()]
        _as_one(numbers, partial(distributed.broadcast, src=0))
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.forward = _WholeBatchNorm(layer, self)  # type: ignore[method-assign]
            elif isinstance(layer, nn.Dropout) and layer.p:
                layer.forward = _WholeDropout(layer, self)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in model.modules():
                vars(layer).pop("forward", None)

    # --- scoring ---

    def hand_round(self, arrays: Sequence[ndarray], owner: int) -> None:
        """Fill arrays in all processes with what is in those of `owner`."""
        if self.number > 1:
            for array in arrays:
                tensor = torch.from_numpy(array).to(self.device)
                distributed.broadcast(tensor, owner)
                array[...] = tensor.cpu().numpy()


@torch.no_grad()
def _as_one(tensors: Sequence[Tensor], exchange: Callable[[Tensor], Any]) -> None:
    """Exchange tensors of one type in one go, since each exchange takes its time; it needs a copy of all of them."""
    flat = torch.cat([t.flatten() for t in tensors])
    exchange(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class _Sum(torch.autograd.Function):
    """Sum over the processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Sum.forward(ctx, gradient.contiguous())


@dataclass(eq=False)
class _WholeBatchNorm:
    """The `forward` of a batch norm that takes its mean and variance over the images of all processes.

    Ioffe & Szegedy 2015 over the whole batch, as in torch's `SyncBatchNorm`, which needs a GPU.
    """

    layer: Any
    processes: Processes

    def __call__(self, x: Tensor) -> Tensor:
        layer, share = self.layer, self.processes.share
        if not layer.training or share is None or share.last - share.first == share.total:
            return type(layer).forward(layer, x)
        size = x.shape
        with torch.autocast(x.device.type, enabled=False):
            z = x.float().flatten(2) if x.ndim > 2 else x.float()[..., None]  # (B,C,n)
            n = z[:, 0].numel() // len(z) * share.total
            mean = _Sum.apply(z.sum((0, 2))) / n
            z = z - mean[:, None]
            variance = _Sum.apply(z.square().sum((0, 2))) / n
            z = z * (variance + layer.eps).rsqrt()[:, None]
            if layer.affine:
                z = z * layer.weight[:, None] + layer.bias[:, None]
        if layer.track_running_stats:
            with torch.no_grad():
                layer.num_batches_tracked.add_(1)
                layer.running_mean.lerp_(mean, layer.momentum)
                layer.running_var.lerp_(variance * (n / (n - 1)), layer.momentum)
        return z.view(size).to(x.dtype)


@dataclass(eq=False)
class _WholeDropout:
    """The `forward` of a dropout that draws for the whole batch, as one process does, and takes its own rows."""

    layer: Any
    processes: Processes

    def __call__(self, x: Tensor) -> Tensor:
        layer, share = self.layer, self.processes.share
        if not layer.training or share is None:
            return F.dropout(x, layer.p, layer.training)
        factor = F.dropout(x.new_ones(share.total, *x.shape[1:]), layer.p)
        return x * factor[share.rows]
