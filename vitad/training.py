"""The only training loop.

A method says in `phases()` what is trained and how; this file does it. A run that is killed at any step and
started again ends with the same weights as an unbroken one: the order of the images depends on seed and epoch
only, and everything else that changes is saved, aside and then renamed, every half minute.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from tqdm import tqdm

from vitad.errors import UserError
from vitad.files import atomic_write

SAVE_SECONDS = 30.0  # at least; and saving never takes more than a twentieth of the time
CHECK_STEPS = 25  # the losses stay on the device for this many steps, so that no step waits for it


@dataclass(frozen=True)
class Phase:
    """One stage of training."""

    name: str
    parameters: list = field(repr=False)
    epochs: int
    batch_size: int
    lr: float
    optimizer: type = torch.optim.Adam
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = None  # largest norm of the gradient
    schedule: Callable[[float], float] | None = field(default=None, repr=False)  # share done, 0 to 1 -> factor on lr
    val_fraction: float = 0.0  # share of the normal training images that is held out
    patience: int | None = None  # epochs without a better validation loss before stopping; needs val_fraction
    losses: Callable[[dict], dict] | None = field(default=None, repr=False)  # of this phase; None: `model.losses`
    images: np.ndarray | None = field(default=None, repr=False)  # numbers of those it is trained on; None: all
    draw: Callable[[np.random.Generator], np.ndarray] | None = field(default=None, repr=False)  # as many, each epoch


def warm_up_then_cosine(warm_up):
    """Schedule of a `Phase`: linear from 0 to 1 over the share `warm_up` of the steps, then a half cosine down to 0."""

    def factor(done):
        if done < warm_up:
            return done / warm_up
        return 0.5 + 0.5 * math.cos(math.pi * (done - warm_up) / (1 - warm_up))

    return factor


def autocast(device, enabled):
    """bfloat16 autocast where it helps: on CUDA, and on CPUs that multiply faster in it. Elsewhere float32."""
    enabled = enabled and (device.type == "cuda" or _cpu_gains_from_bfloat16())
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@lru_cache
def _cpu_gains_from_bfloat16():
    """Measured once: among CPUs that list AVX512-BF16 some take half the time of float32 and some twice."""
    if not torch.cpu._is_avx512_bf16_supported():
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


def train(model, images, seed, device, amp=True, state_path=None, keep=None):
    """Train `model` on the `ImageSet` `images` through all its phases, resuming from `state_path` if it exists.

    Args:
        keep: called with a phase's name and the weights behind it, for every phase but the last.

    Returns:
        history: one dict an epoch with `phase, epoch, seconds`, the mean of each loss, and `val` if there is one.

    Raises:
        UserError: a loss is not finite; the message names the step and the settings.
    """
    at = {"phase": 0, "epoch": 0, "step": 0, "losses": [], "best": None, "history": [], "seconds": 0.0}
    saved = (
        torch.load(state_path, map_location="cpu", weights_only=True) if state_path and state_path.exists() else None
    )
    if saved:
        at = saved["at"]
    phases = model.phases()
    for number in range(at["phase"], len(phases)):
        phase = phases[number]
        optimizer = phase.optimizer(phase.parameters, lr=phase.lr, betas=phase.betas, weight_decay=phase.weight_decay)
        val, fit = _hold_out(len(images) if phase.images is None else phase.images, phase, [seed, number])
        losses_of = phase.losses or model.losses
        steps = math.ceil(len(fit) / phase.batch_size)
        if saved:
            at["losses"] = [x.to(device) for x in at["losses"]]
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            _set_random_state(saved["random"])
            at["losses"] = [x.to(device) for x in at["losses"]]
            saved = None
        save = _Saver(state_path, at, model, optimizer)
        done = at["epoch"] * steps + at["step"]
        with tqdm(desc=phase.name, total=phase.epochs * steps, initial=done, unit="step") as bar:
            while at["epoch"] < phase.epochs and not _out_of_patience(phase, at):
                model.train()
                random = np.random.default_rng([seed, number, at["epoch"]])
                order = random.permutation(phase.draw(random) if phase.draw else fit)
                while at["step"] < steps:
                    chosen = order[at["step"] * phase.batch_size :][: phase.batch_size]
                    with autocast(device, amp):
                        losses = losses_of(images.batch(chosen, device))
                    optimizer.zero_grad(set_to_none=True)
                    sum(losses.values()).backward()
                    if phase.clip:
                        torch.nn.utils.clip_grad_norm_(phase.parameters, phase.clip)
                    if phase.schedule:  # a function of the step alone, so that a resumed run goes on with the same
                        share = (at["epoch"] * steps + at["step"] + 1) / (phase.epochs * steps)
                        for group in optimizer.param_groups:
                            group["lr"] = phase.lr * phase.schedule(share)
                    optimizer.step()
                    at["losses"].append(torch.stack([x.detach().float() for x in losses.values()]))
                    at["step"] += 1
                    bar.update()
                    if at["step"] % CHECK_STEPS == 0 and at["step"] < steps:
                        _check_finite(at, phase, model)
                        save.if_due()
                _check_finite(at, phase, model)
                means = dict(zip(losses, torch.stack(at["losses"]).mean(0).tolist(), strict=True))
                row = {"phase": phase.name, "epoch": at["epoch"] + 1, **means}
                if len(val):
                    row["val"] = _validate(model, losses_of, images, val, phase, device, amp)
                    if not math.isfinite(row["val"]):
                        raise _diverged("validation loss", at, phase, model)
                    if at["best"] is None or row["val"] < at["best"]["val"]:
                        weights = {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
                        at["best"] = {"val": row["val"], "epoch": at["epoch"], "weights": weights}
                at["history"].append(row)
                at["epoch"], at["step"], at["losses"] = at["epoch"] + 1, 0, []
                row["seconds"] = round(save.seconds(), 3)
                bar.set_postfix(epoch=row["epoch"], **{k: f"{row[k]:.4f}" for k in (*means, "val") if k in row})
                save.if_due()
        if at["best"]:
            model.load_state_dict(at["best"]["weights"])
        if keep and number + 1 < len(phases):
            keep(phase.name, model.state_dict())
        at |= {"phase": number + 1, "epoch": 0, "best": None, "seconds": save.seconds()}
    return at["history"]


class _Saver:
    """Keeps the time spent so far and writes the state of the run now and then."""

    def __init__(self, path, at, model, optimizer):
        self.path, self.at, self.model, self.optimizer = path, at, model, optimizer
        self.began = time.monotonic() - at["seconds"]
        self.last, self.took = time.monotonic(), 0.0

    def seconds(self):
        return time.monotonic() - self.began

    def if_due(self):
        if not self.path or time.monotonic() - self.last < max(SAVE_SECONDS, 20 * self.took):
            return
        began = time.monotonic()
        self.at["seconds"] = self.seconds()
        state = {
            "at": self.at,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": _random_state(),
        }
        with atomic_write(self.path) as aside:
            try:
                torch.save(state, aside)
            except RuntimeError as e:  # in place of an OSError when the disk is full
                raise OSError(f"torch could not save it, as on a full disk ({e})") from e
        self.last = time.monotonic()
        self.took = self.last - began


def _hold_out(images, phase, seed):
    """Indices (validation, training): a fixed random part of the images, numbers or how many, is held out."""
    order = np.random.default_rng(seed).permutation(images)
    n = len(order)
    n_val = math.ceil(phase.val_fraction * n)
    if n_val == n:
        raise UserError(f"val_fraction={phase.val_fraction} leaves none of {n} images for training. Make it smaller.")
    return order[:n_val], order[n_val:]


def _out_of_patience(phase, at):
    best = at["best"]
    return bool(phase.patience and best and at["epoch"] - 1 - best["epoch"] >= phase.patience)


def _check_finite(at, phase, model):
    finite = torch.stack(at["losses"]).isfinite().all(1)
    if not finite.all():
        raise _diverged("loss", at, phase, model, f", step {int((~finite).nonzero()[0]) + 1}")


def _diverged(what, at, phase, model, step=""):
    return UserError(
        f"the {what} is not finite at phase {phase.name}, epoch {at['epoch'] + 1}{step}, "
        f"with {model.settings}. A smaller lr is the usual mend."
    )


@torch.no_grad()
def _validate(model, losses_of, images, val, phase, device, amp):
    """Mean total loss over the held-out images."""
    model.eval()
    total = 0.0
    for i in range(0, len(val), phase.batch_size):
        batch = images.batch(val[i : i + phase.batch_size], device)
        with autocast(device, amp):
            total = total + sum(losses_of(batch).values()).float() * len(batch["image"])
    return float(total) / len(val)


def _random_state():
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
