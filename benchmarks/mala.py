"""Time a training step of mala at the paper's size: what does masking save in stage 1, what does stage 2 cost?

    python benchmarks/mala.py

Each line gives the median time of a step and its ratio to a step of stage 1 with nothing masked. The steps take turns,
so that whatever else the machine does falls on all of them alike; the ratio is the median over the rounds. A step is
losses and gradients. The optimiser is left out, since its share depends on the size of the batch; on a CPU a batch
holds two images instead of the paper's 128 (stage 1) and 32 (stage 2).
"""

import argparse
import statistics
import time

import torch

from vitad.methods import mala
from vitad.runs import find_device
from vitad.settings import resolve
from vitad.training import autocast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="of one step of each kind (default %(default)s)"
    )
    rounds = parser.parse_args().rounds
    device = find_device("auto")
    B = 2 if device.type == "cpu" else 32
    torch.manual_seed(0)
    batch = {"image": torch.rand(B, 3, 224, 224, device=device)}
    names = {"stage 1, nothing masked": 0.0, "stage 1, 75 % masked": 0.75, "stage 2": 0.75}
    seconds = {name: [] for name in names}
    overrides = {"pretrained": False, "mode": "global"}
    model = mala.Model(resolve(mala.Settings, mala.PRESETS, "paper", overrides)).to(device).train()
    for _ in range(rounds + 1):
        for name, mask_ratio in names.items():
            model.settings = resolve(mala.Settings, mala.PRESETS, "paper", overrides | {"mask_ratio": mask_ratio})
            losses = model.stage1_losses if name.startswith("stage 1") else model.stage2_losses
            began = time.perf_counter()
            with autocast(device, True):
                loss = sum(losses(batch).values())
            loss.backward()
            loss.item(), next(model.decoder.parameters()).grad.sum().item()  # wait for the device
            seconds[name].append(time.perf_counter() - began)
            model.zero_grad(set_to_none=True)
    unmasked = seconds["stage 1, nothing masked"][1:]  # the first round warms up
    for name, times in seconds.items():
        ratio = statistics.median(t / u for t, u in zip(times[1:], unmasked, strict=True))
        print(f"{name:<24} {statistics.median(times[1:]):7.3f} s a step of {B} images   {ratio:.3f} of the first")


if __name__ == "__main__":
    main()
