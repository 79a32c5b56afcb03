"""Time a training step of vitmem at the paper's size: what do memory and coordinate attention cost?

    python benchmarks/vitmem.py

Each line gives the median time of a step and its ratio to the variant `base`, which has neither part. The variants take
turns, step by step, so that whatever else the machine does falls on all of them alike; the ratio is the median over the
rounds. Batches hold two images instead of the paper's eight, which keeps it short on a CPU (about five minutes).
"""

import argparse
import statistics
import time

import torch

from vitad.methods import vitmem
from vitad.runs import find_device
from vitad.settings import resolve
from vitad.training import autocast

BATCH = 2
VARIANTS = {
    "base": vitmem.VARIANTS["base"],
    "full, 100 items": {},
    "full, 2000 items": {"items": 2000},
}


def step(
    model: vitmem.Model, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor], device: torch.device
) -> float:
    """One training step; the loss."""
    with autocast(device, True):
        loss = sum(model.losses(batch).values())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()  # waits for the device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="of one step of each variant (default %(default)s)"
    )
    rounds = parser.parse_args().rounds
    device = find_device("auto")
    torch.manual_seed(0)
    batch = {"image": torch.rand(BATCH, 3, 384, 384, device=device)}
    models = {
        name: vitmem.Model(resolve(vitmem.Settings, vitmem.PRESETS, "paper", switches)).to(device).train()
        for name, switches in VARIANTS.items()
    }
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=2e-4) for name, model in models.items()}
    seconds = {name: [] for name in models}
    for _ in range(rounds + 1):
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
