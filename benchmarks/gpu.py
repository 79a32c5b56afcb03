"""What only a GPU can tell: the CUDA tests, step times beside the bare network, and the runs of the `paper` presets.

    python benchmarks/gpu.py                                     # `make gpu`; the same call again goes on
    python benchmarks/gpu.py --device cpu --preset smoke --results runs/tried    # the whole path, without a GPU

A call ends after `--minutes`; what is finished is not done again, and a run is resumed where it was cut off. A step is
timed in the training loop, with its batches and damage, and beside it bare: losses, gradients and optimiser on a batch
that is there. The loop should reach 0.95 of the bare speed, and ViT-B and ViT-L 40 % of the card's peak in bfloat16.
The records of finished runs, their thumbnails and resamples go to `results/`.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from vitad import data, methods
from vitad.errors import UserError
from vitad.files import atomic_write
from vitad.methods import METHODS
from vitad.plan import CARDS, plan
from vitad.runs import Request, find_device
from vitad.settings import resolve
from vitad.training import autocast, train

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/test_training.py", "tests/test_synthesis.py", "-k", "cuda or gpu"]
ORDER = ("vitmem", "anovit", "ssltok", "mala")
WARM, STEPS = 3, 10  # steps that are not timed, and that are


class Stop(Exception):
    """Enough steps."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="of this call (default %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu to try the path")
    parser.add_argument("--preset", default="paper", help="default %(default)s")
    parser.add_argument("--dataset", default="mvtec", help="of the runs, before mt (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="what is done so far (default %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where records go (default results/)")
    args = parser.parse_args()
    try:
        device = find_device(args.device)
    except UserError as e:
        print(f"gpu: {e}", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    for part in (run_tests, time_steps, make_runs):
        if not part(args, device, end):
            print("time is over; the same call goes on from here")
            return 0
    print("all is done")
    return 0


def run_tests(args: argparse.Namespace, device: torch.device, end: float) -> bool:
    """The tests that need CUDA; whether there was time."""
    log = args.out / "tests.txt"
    if not log.exists():
        command = [sys.executable, "-m", "pytest", "-q", "-rs", *TESTS]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left(end))
        except subprocess.TimeoutExpired:
            return False
        with atomic_write(log) as temporary:
            temporary.write_text(done.stdout + done.stderr)
    print(f"tests: {log.read_text().strip().splitlines()[-1]}  ({log})")
    return True


def time_steps(args: argparse.Namespace, device: torch.device, end: float) -> bool:
    """Steps of all methods; whether there was time."""
    peak = peak_of(device)
    for name in METHODS:
        path = args.out / f"steps-{name}.json"
        if not path.exists():
            if left(end) < 60 and device.type == "cuda":
                return False
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(steps_of(name, args.preset, device), indent=2) + "\n")
        for row in json.loads(path.read_text()):
            share = f", {row['tflops'] / peak:.0%} of the peak" if peak else ""
            print(
                f"{name:<9} {row['phase']:<7} loop {row['loop_ms']:8.1f} ms, bare {row['bare_ms']:8.1f} ms, "
                f"{row['bare_ms'] / row['loop_ms']:.2f} of its speed; {row['tflops']:.2f} TFLOP/s{share}"
            )
    return True


def steps_of(name: str, preset: str, device: torch.device) -> list[dict]:
    """Milliseconds of a step of each phase, in the loop and bare, and the TFLOP/s of the bare one."""
    module = methods.get(name)
    settings = resolve(module.Settings, module.PRESETS, preset, {})
    images = data.load("toy", category="gear", image_size=settings.image_size).train
    parts = plan(Request(name, "toy", "gear", preset=preset)).parts
    torch.manual_seed(0)
    model = module.Model(settings, "random").to(device)
    model.prepare(images, device)
    rows = []
    for phase, part in zip(model.phases(), parts, strict=True):
        loop, batch = in_the_loop(model, phase, images, device)
        bare = alone(model, phase, batch, device)
        tflops = 2 * part.multiply_adds / bare / 1e12 * len(batch["image"]) / phase.batch_size
        rows.append({"phase": phase.name, "loop_ms": 1e3 * loop, "bare_ms": 1e3 * bare, "tflops": tflops})
    return rows


def in_the_loop(model, phase, images, device) -> tuple[float, dict]:
    """(seconds of a step of `train`, a batch that it made)"""
    n_images = len(images) if phase.indices is None else len(phase.indices)
    size = min(phase.batch_size, n_images - math.ceil(phase.val_fraction * n_images))
    losses, times, batches = phase.losses or model.losses, [], []

    def watched(batch):
        if model.training and len(batch["image"]) == size:  # the last batch of an epoch may be smaller
            if len(times) in (WARM, WARM + STEPS):
                wait(device)
            times.append(time.perf_counter())
            batches[:] = [batch]
            if len(times) > WARM + STEPS:
                raise Stop
        return losses(batch)

    phases, model.phases = model.phases, lambda: [replace(phase, losses=watched, epochs=10**4, patience=None)]
    try:
        train(model, images, 0, device, model.settings.amp)
    except Stop:
        pass
    finally:
        model.phases = phases
    return (times[-1] - times[WARM]) / STEPS, batches[0]


def alone(model, phase, batch, device) -> float:
    """Seconds of losses, gradients and a step of the optimiser on one batch."""
    optimizer = phase.optimizer(phase.parameters, lr=0.0)
    for step in range(WARM + STEPS):
        if step == WARM:
            wait(device)
            began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, model.settings.amp):
            losses = (phase.losses or model.losses)(batch)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    wait(device)
    return (time.perf_counter() - began) / STEPS


def make_runs(args: argparse.Namespace, device: torch.device, end: float) -> bool:
    """The runs in turn, each resumed; whether all are finished or cannot be made."""
    for method in ORDER:
        for dataset in dict.fromkeys((args.dataset, "mt")):
            for category in categories(method, dataset):
                request = Request(method, dataset, category, preset=args.preset)
                words = (method, args.preset, request.category, request.split, f"s{request.seed}")
                where, name = args.results / dataset / "-".join(filter(None, words)), request.name
                if (where / "record.json").exists():
                    continue
                if missing := data.get(dataset).where_to_get(None):
                    print(f"{name}: left out. {missing.splitlines()[0]}")
                    continue
                if left(end) < 5:
                    return False
                folder = args.out / name
                words = ["run", method, "--dataset", dataset, "--preset", args.preset, "--device", device.type]
                words += [*(["--category", category] if category else []), "--out", str(folder)]
                running = subprocess.Popen([sys.executable, "-m", "vitad", *words], stdout=subprocess.DEVNULL)
                try:
                    status = running.wait(left(end))
                except subprocess.TimeoutExpired:
                    running.terminate()  # its state was saved at most half a minute ago
                    running.wait()
                    return False
                if status:
                    print(f"{name}: failed, status {status}")
                    continue
                where.mkdir(parents=True, exist_ok=True)
                for file in ("heatmaps.png", "resamples.npz", "scores.csv", "record.json"):  # the record comes last
                    shutil.copy(folder / file, where / file)
                print(f"{name}: {where / 'record.json'}")
    return True


def categories(method: str, dataset: str) -> list[str | None]:
    """Those of which each has a model; `mala` has one for all."""
    found = {"mvtec": ["bottle", "pill", "screw"]}.get(dataset)
    if not found:
        return [None]
    return ["+".join(found)] if methods.get(method).CATEGORY else found


def left(end: float) -> float:
    """Seconds."""
    return max(0.1, end - time.monotonic())


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(device: torch.device) -> float | None:
    """TFLOP/s of the card in bfloat16, where `vitad plan` knows it; an H200 has the processor of an H100."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).replace("H200", "H100")
    known = [card for card in CARDS if card.name.split()[0] in name or card.name in name]
    known = [card for card in known if card.name in name] or known
    return known[0].tflops if known else None


if __name__ == "__main__":
    sys.exit(main())
