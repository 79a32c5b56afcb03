"""Time a training step of vitmem at the paper's size: what do memory and coordinate attention cost?

    python tests/bench_vitmem.py

The variants take turns, step by step, so that whatever else the machine does falls on all of them alike; the ratio is
the median over the rounds. Batches hold two images instead of eight to keep it short on a CPU.
"""

import statistics
import time

import torch

from vitad.methods import vitmem
from vitad.runs import find_device
from vitad.settings import resolve
from vitad.training import autocast

ROUNDS, BATCH = 7, 2
VARIANTS = {
    "base": vitmem.VARIANTS["base"],
    "full, 100 items": {},
    "full, 2000 items": {"items": 2000},
}


def step(model, optimizer, batch, device):
    with autocast(device, True):
        loss = sum(model.losses(batch).values())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()  # waits for the device


def main():
    device = find_device("auto")
    torch.manual_seed(0)
    batch = {"image": torch.rand(BATCH, 3, 384, 384, device=device)}
    models = {
        name: vitmem.Model(resolve(vitmem.Settings, vitmem.PRESETS, "paper", switches)).to(device).train()
        for name, switches in VARIANTS.items()
    }
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=2e-4) for name, model in models.items()}
    seconds = {name: [] for name in models}
    for _ in range(ROUNDS + 1):
        for name, model in models.items():
            began = time.perf_counter()
            step(model, optimizers[name], batch, device)
            seconds[name].append(time.perf_counter() - began)
    base = seconds["base"][1:]  # the first round warms up
    for name, times in seconds.items():
        ratio = statistics.median(t / b for t, b in zip(times[1:], base, strict=True))
        print(f"{name:<18} {statistics.median(times[1:]):6.2f} s a step of {BATCH} images   {ratio:.3f} of base")


if __name__ == "__main__":
    main()
