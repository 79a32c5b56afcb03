"""Time a training step of mala at the paper's size: what does masking save in stage 1, what does stage 2 cost?

    python tests/bench_mala.py

The steps take turns, so that whatever else the machine does falls on all of them alike; the ratio is the median over
the rounds. A step is losses and gradients. The optimiser, whose share depends on the size of the batch, is left out;
on a CPU a batch holds two images instead of 128 and 32.
"""

import statistics
import time

import torch

from vitad.methods import mala
from vitad.runs import find_device
from vitad.settings import resolve
from vitad.training import autocast

ROUNDS = 5


def main():
    device = find_device("auto")
    B = 2 if device.type == "cpu" else 32
    torch.manual_seed(0)
    batch = {"image": torch.rand(B, 3, 224, 224, device=device)}
    names = {"stage 1, nothing masked": 0.0, "stage 1, 75 % masked": 0.75, "stage 2": 0.75}
    seconds = {name: [] for name in names}
    overrides = {"pretrained": False, "mode": "global"}
    model = mala.Model(resolve(mala.Settings, mala.PRESETS, "paper", overrides)).to(device).train()
    for _ in range(ROUNDS + 1):
        for name, mask_ratio in names.items():
            model.settings = resolve(mala.Settings, mala.PRESETS, "paper", overrides | {"mask_ratio": mask_ratio})
            losses_of = model.stage1_losses if name.startswith("stage 1") else model.stage2_losses
            began = time.perf_counter()
            with autocast(device, True):
                loss = sum(losses_of(batch).values())
            loss.backward()
            float(loss), float(next(model.decoder.parameters()).grad.sum())  # waits for the device
            seconds[name].append(time.perf_counter() - began)
            model.zero_grad(set_to_none=True)
    whole = seconds["stage 1, nothing masked"][1:]  # the first round warms up
    for name, times in seconds.items():
        ratio = statistics.median(t / w for t, w in zip(times[1:], whole, strict=True))
        print(f"{name:<24} {statistics.median(times[1:]):7.3f} s a step of {B} images   {ratio:.3f} of the first")


if __name__ == "__main__":
    main()
