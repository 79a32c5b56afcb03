"""The only training loop.

A method says in `phases()` what is trained and how; this file does it. A run that is killed at any step and
started again ends with the same weights as an unbroken one: the order of the images depends only on the seed, the
phase and the epoch, the random numbers of a step only on these and its number, and all that changes is saved every
half minute. So phases do not disturb each other either: one that is left out changes nothing in the next but its start.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from vitad.data.samples import batches
from vitad.errors import UserError
from vitad.files import atomic_write
from vitad.processes import Processes
from vitad.randomness import next_seed, seed_of

if TYPE_CHECKING:
    from vitad.data.samples import ImageSet
    from vitad.methods.base import Method

SAVE_SECONDS = 30.0  # at least this long between two saves; and saving never takes more than a twentieth of the time
CHECK_STEPS = 25  # the losses stay on the device for this many steps, so that no step waits for it

Losses = Callable[[dict[str, Any]], dict[str, Tensor]]  # batch -> named scalars
Damage = Callable[[dict[str, Any], int], dict[str, Tensor]]  # batch, seed -> damaged batch


@dataclass(frozen=True)
class Phase:
    """One stage of training."""

    name: str
    parameters: list[nn.Parameter] = field(repr=False)
    epochs: int
    batch_size: int
    lr: float
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    decay_vectors: bool = True  # off: biases and norms, all that has one dimension, do not decay
    clip: float | None = None  # largest norm of the gradient
    schedule: Callable[[float], float] | None = field(default=None, repr=False)  # share done, 0 to 1 -> factor on lr
    val_fraction: float = 0.0  # share of the normal training images that is held out
    patience: int | None = None  # epochs without a better validation loss before stopping; needs val_fraction
    losses: Losses | None = field(default=None, repr=False)  # of this phase; None: `model.losses`
    indices: ndarray | None = field(default=None, repr=False)  # of the training images that it uses; None: all
    draw: Callable[[np.random.Generator], ndarray] | None = field(default=None, repr=False)  # other indices each epoch
    damage: Damage | None = field(default=None, repr=False)  # with a GPU: on the host, ahead of the losses, see `train`


@dataclass
class Progress:
    """How far the training has come, with its history and the best weights; part of the saved state."""

    phase: int = 0  # finished phases
    epoch: int = 0  # finished epochs of this phase
    step: int = 0  # finished steps of this epoch
    losses: list[Tensor] = field(default_factory=list)  # of each of these steps, in the order of their names
    best: dict[str, Any] | None = None  # `val`, `epoch` (from 0) and `weights` of the best epoch of this phase
    history: list[dict[str, Any]] = field(default_factory=list)  # a row for each finished epoch of all phases
    seconds: float = 0.0  # spent so far, in all sessions


def warm_up_then_cosine(warm_up: float) -> Callable[[float], float]:
    """Schedule of a `Phase`: linear from 0 to 1 over the share `warm_up` of the steps, then a half cosine down to 0."""

    def factor(done: float) -> float:
        if done < warm_up:
            return done / warm_up
        return 0.5 + 0.5 * math.cos(math.pi * (done - warm_up) / (1 - warm_up))

    return factor


def in_parts(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, computed for `size` rows at a time, so that less is held for the backward pass.

    Only inputs and results of a part are kept; the rest is computed once more for its gradients (Chen et al. 2016,
    arXiv 1604.06174). The losses see the whole batch. So they and their gradients stay the same, whatever they take a
    mean over and whichever statistics of the batch they use; sums of the gradients of parts would not.

    Parameters
    ----------
    function
        Tensors (B,...) -> Tensor (B,...); treats each row by itself and draws nothing at random.
    size
        Rows of a part; 0 takes all at once.
    """
    if not size:
        return function(*tensors)
    parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(function, *p, use_reentrant=False, preserve_rng_state=False) for p in parts])


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """bfloat16 autocast where it helps: on CUDA, and on CPUs that multiply faster in it. Elsewhere float32."""
    enabled = enabled and (device.type == "cuda" or _cpu_gains_from_bfloat16())
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@lru_cache
def _cpu_gains_from_bfloat16() -> bool:
    """Measured once: among CPUs that list AVX512-BF16 some take half the time of float32 and some twice.

    With ATEN_CPU_CAPABILITY below AVX512, torch refuses bfloat16 attention on a CPU with AMX.
    """
    if not torch.cpu._is_avx512_bf16_supported() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(512, 384, dtype=dtype), torch.ones(1536, 384, dtype=dtype)
        times = []
        for _ in range(6):
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def train(
    model: "Method",
    images: "ImageSet",
    seed: int,
    device: torch.device,
    amp: bool = True,
    state_path: Path | None = None,
    keep: Callable[[str, dict[str, Tensor]], None] | None = None,
    processes: Processes | None = None,
) -> list[dict[str, Any]]:
    """Train a model on normal images through all its phases, resuming from `state_path` if it exists.

    With a GPU, no step waits for it: batches, and what `damage` of a phase makes of them, are made ahead on the host,
    as `damaged` of a batch. On the CPU the losses damage the images themselves, with the same outcome.

    Parameters
    ----------
    amp
        Mixed precision, where `autocast` finds that it helps.
    state_path
        File for the state of an unfinished training; None saves nothing.
    keep
        Called with the name of a phase and the weights after it, for every phase but the last.
    processes
        Those that share the batches; None: this one is alone.

    Returns
    -------
    The history: a dict for each epoch with `phase`, `epoch` (from 1), the mean of each loss, `val` where images are
    held out, and `seconds` since the start.

    Raises
    ------
    UserError
        A loss is not finite; the message names the step and the settings.
    """
    processes = processes or Processes(device)
    saved = None
    if state_path and state_path.exists():
        saved = torch.load(state_path, map_location="cpu", weights_only=True)
    progress = Progress(**saved["at"]) if saved else Progress()
    with _Saver(state_path if processes.writes else None, progress) as save, processes.joined(model):
        phases = model.phases()
        for number in range(progress.phase, len(phases)):
            phase = phases[number]
            optimizer = _optimizer(phase)
            if saved:
                _restore(saved, progress, model, optimizer, device)
                saved = None
            losses_of = phase.losses or model.losses
            held_out, fit = _hold_out(phase, len(images), seed)
            steps = math.ceil(len(fit) / phase.batch_size)  # of an epoch
            total, done = phase.epochs * steps, progress.epoch * steps + progress.step
            mute = not processes.writes
            with tqdm(desc=phase.name, total=total, initial=done, unit="step", disable=mute) as bar:
                while progress.epoch < phase.epochs and not _out_of_patience(phase, progress):
                    model.train()
                    epoch = (phase.name, progress.epoch)
                    shown = phase.draw(_random(seed, "images", *epoch)) if phase.draw else fit
                    order = _random(seed, "order", *epoch).permutation(shown)
                    B, left = phase.batch_size, range(progress.step, steps)
                    seeds = [seed_of(seed, "step", *epoch, n) for n in left]  # of all that the losses draw
                    parts = [order[n * B : n * B + B] for n in left]
                    shares = [processes.share_of(len(part)) for part in parts]
                    made = batches(images, parts, device, _ahead(phase, seeds), shares)
                    for step_seed, own, batch in zip(seeds, shares, made, strict=True):
                        torch.manual_seed(step_seed)
                        batch = processes.take(batch, own)
                        optimizer.zero_grad(set_to_none=True)  # before the forward pass, which needs their memory
                        with autocast(device, amp):
                            losses = processes.weighted(losses_of(batch))
                        _sum(losses).backward()
                        of_step = torch.stack([x.detach().float() for x in losses.values()])
                        processes.add_up(of_step, *(p.grad for p in phase.parameters))
                        if phase.clip:
                            nn.utils.clip_grad_norm_(phase.parameters, phase.clip)
                        if phase.schedule:  # a function of the step alone, so that a resumed run has the same rate
                            share = (progress.epoch * steps + progress.step + 1) / total
                            for group in optimizer.param_groups:
                                group["lr"] = phase.lr * phase.schedule(share)
                        optimizer.step()
                        progress.losses.append(of_step)
                        progress.step += 1
                        bar.update()
                        if progress.step % CHECK_STEPS == 0 and progress.step < steps:
                            _check_finite(progress, phase, model)
                            save.if_due(model, optimizer)
                    _check_finite(progress, phase, model)
                    means = torch.stack(progress.losses).mean(0).tolist()
                    values = dict(zip(losses, means, strict=True))
                    if len(held_out):
                        torch.manual_seed(seed_of(seed, "validation", phase.name))  # in every epoch the same
                        values["val"] = val = _validate(
                            model, losses_of, images, held_out, phase, device, amp, processes
                        )
                        if not math.isfinite(val):
                            raise _diverged("validation loss", progress, phase, model)
                        if progress.best is None or val < progress.best["val"]:
                            weights = _on_host(model.state_dict())
                            progress.best = {"val": val, "epoch": progress.epoch, "weights": weights}
                    seconds = round(save.seconds(), 3)
                    row = {"phase": phase.name, "epoch": progress.epoch + 1, **values, "seconds": seconds}
                    bar.set_postfix(epoch=row["epoch"], **{name: f"{value:.4f}" for name, value in values.items()})
                    progress.history.append(row)
                    progress.epoch, progress.step, progress.losses = progress.epoch + 1, 0, []
                    save.if_due(model, optimizer)
            if progress.best:
                model.load_state_dict(progress.best["weights"])
            if keep and processes.writes and number + 1 < len(phases):
                keep(phase.name, model.state_dict())
            progress.phase, progress.epoch, progress.best = number + 1, 0, None
    return progress.history


class _Saver:
    """Writes the state of a training now and then, and counts its seconds in all sessions.

    Steps wait for the state to be copied to the host, not for the file: a thread writes it, one file at a time. What
    went wrong there is raised here, at the next occasion, and at the latest when the training ends.
    """

    def __init__(self, path: Path | None, progress: Progress):
        self.path, self.progress = path, progress
        self.began = time.monotonic() - progress.seconds
        self.last, self.took = time.monotonic(), 0.0
        self.thread = ThreadPoolExecutor(1, "save")
        self.writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.thread.shutdown()  # waits for the file
        if self.writing and not error:
            self.writing.result()

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def if_due(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.writing and self.writing.done():
            self.writing.result()
            self.writing = None
        if self.writing or not self.path or time.monotonic() - self.last < max(SAVE_SECONDS, 20 * self.took):
            return
        began = time.monotonic()
        self.progress.seconds = self.seconds()
        state = {"at": vars(self.progress), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        self.writing = self.thread.submit(self._write, self.path, _on_host(state), began)

    def _write(self, path: Path, state: dict[str, Any], began: float) -> None:
        with atomic_write(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as e:  # in place of an OSError when the disk is full
                raise OSError(f"torch could not save it, as on a full disk ({e})") from e
        self.last = time.monotonic()
        self.took = self.last - began


def _on_host(state: Any) -> Any:
    """A copy of nested dicts and lists, their tensors on the host, that further steps do not change."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _on_host(value) for name, value in state.items()}
    return [_on_host(value) for value in state] if isinstance(state, list) else state


def _optimizer(phase: Phase) -> torch.optim.Optimizer:
    parameters: list[Any] = phase.parameters
    if not phase.decay_vectors:
        parameters = [
            {"params": [p for p in phase.parameters if p.ndim > 1]},
            {"params": [p for p in phase.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    return phase.optimizer(parameters, lr=phase.lr, betas=phase.betas, weight_decay=phase.weight_decay)


def _restore(
    saved: dict[str, Any],
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> None:
    """Put a saved state back into what it was taken from."""
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    progress.losses = [x.to(device) for x in progress.losses]


def _random(seed: int, *purpose: str | int) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, *purpose))


def _ahead(phase: Phase, seeds: list[int]) -> Callable[[int, dict[str, Any]], dict[str, Tensor]] | None:
    """The damage of a phase in steps of these seeds, drawn from the number that the losses would draw first."""
    damage = phase.damage
    if not damage:
        return None

    def make(number: int, batch: dict[str, Any]) -> dict[str, Tensor]:
        return damage(batch, next_seed(torch.Generator().manual_seed(seeds[number])))

    return make


def _hold_out(phase: Phase, n_images: int, seed: int) -> tuple[ndarray, ndarray]:
    """Indices (held out, for training) of a phase: a random part, fixed by the seed, is held out for validation."""
    indices = np.arange(n_images) if phase.indices is None else phase.indices
    order = _random(seed, "held out", phase.name).permutation(indices)
    n = len(order)
    n_held_out = math.ceil(phase.val_fraction * n)
    if n_held_out == n:
        raise UserError(f"val_fraction={phase.val_fraction} leaves none of {n} images for training. Make it smaller.")
    return order[:n_held_out], order[n_held_out:]


def _out_of_patience(phase: Phase, progress: Progress) -> bool:
    if not phase.patience or not progress.best:
        return False
    last_epoch = progress.epoch - 1
    return last_epoch - progress.best["epoch"] >= phase.patience


def _check_finite(progress: Progress, phase: Phase, model: "Method") -> None:
    finite = torch.stack(progress.losses).isfinite().all(1)  # of each step
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise _diverged("loss", progress, phase, model, f", step {first + 1}")


def _diverged(what: str, progress: Progress, phase: Phase, model: "Method", step: str = "") -> UserError:
    return UserError(
        f"the {what} is not finite at phase {phase.name}, epoch {progress.epoch + 1}{step}, "
        f"with {model.settings}. A smaller lr usually fixes this."
    )


@torch.no_grad()
def _validate(
    model: "Method",
    losses_of: Losses,
    images: "ImageSet",
    held_out: ndarray,
    phase: Phase,
    device: torch.device,
    amp: bool,
    processes: Processes,
) -> float:
    """Mean total loss over the held-out images."""
    model.eval()
    total = torch.zeros((), device=device)
    B = phase.batch_size
    parts = [held_out[i : i + B] for i in range(0, len(held_out), B)]
    shares = [processes.share_of(len(part)) for part in parts]
    for part, own, batch in zip(parts, shares, batches(images, parts, device, shares=shares), strict=True):
        batch = processes.take(batch, own)
        with autocast(device, amp):
            total = total + _sum(processes.weighted(losses_of(batch))).float() * len(part)
    processes.add_up(total)
    return float(total) / len(held_out)


def _sum(losses: dict[str, Tensor]) -> Tensor:
    return cast(Tensor, sum(losses.values()))
