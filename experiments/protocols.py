"""What a protocol does to a metric: the same runs on the gears, measured as the book does and as some systems do.

    python experiments/protocols.py [METHOD ...]          # by default mkd and draem; seeds 0 to 2, about half an hour

Nothing is chosen here: the test images are looked at in order to show what looking at them gains. The rows of
`protocols.json`, beside this script, have metrics and their intervals over resamples of the test images.

    scored     the method, with its preset `demo`
    protocol   `last epoch`, as in the book; `best epoch`, of ten along the training that one which is best on the test
               images, for each metric another; `no good images`, where pixels of good test images do not count
    seed       of the run
    run        None: the weights of ten epochs are not those of a record

A row of the same names is replaced.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vitad import data, methods
from vitad.data import ImageSet
from vitad.methods.base import Method
from vitad.metrics import evaluate
from vitad.resampling import draw, intervals, resample
from vitad.runs import score
from vitad.settings import resolve
from vitad.training import train

OUT = Path(__file__).with_suffix(".json")
NAMES = ("scored", "protocol", "seed")
CPU, LOOKS = torch.device("cpu"), 10


def found(test: ImageSet, maps: np.ndarray, scores: np.ndarray, pixels: np.ndarray) -> dict:
    """`metrics` and `intervals`; `pixels` (N,) bool says whose pixels count."""
    metrics = evaluate(maps[pixels], test.masks[pixels], scores, test.labels)
    some = (test.paths[pixels], test.groups[pixels], test.labels[pixels])
    resamples = resample(maps[pixels], test.masks[pixels], scores[pixels], some[2], draw(*some))
    everything = draw(test.paths, test.groups, test.labels)
    resamples["image_auroc"] = resample(maps, None, scores, test.labels, everything)["image_auroc"]
    return {"metrics": metrics, "intervals": intervals(metrics, resamples)}


def look_each(model: Method, epochs: int, look: Callable[[], None]) -> None:
    """Have `look` called after each of these epochs; the training calls `model.train()` when one begins."""
    switch, begun = model.train, 0

    def train_mode(mode: bool = True) -> Method:
        nonlocal begun
        if mode:
            if begun and begun % epochs == 0:
                look()
            begun += 1
        return switch(mode)

    model.train = train_mode  # type: ignore[method-assign]


def rows_of(method: str, seed: int) -> list[dict]:
    """The rows of a run."""
    module = methods.get(method)
    settings = resolve(module.Settings, module.PRESETS, "demo")
    images = data.load("toy", category="gear", image_size=settings.image_size)
    torch.manual_seed(seed)
    model = module.Model(settings)
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def look() -> None:
        seen.append(score(model, images.test, CPU, settings.batch_size, settings.amp))

    model.prepare(images.train, CPU)
    look_each(model, max(1, model.phases()[-1].epochs // LOOKS), look)
    train(model, images.train, seed, CPU, settings.amp)
    look()
    everything, defective = np.ones(len(images.test), bool), images.test.labels == 1
    each = [found(images.test, *maps_and_scores, everything) for maps_and_scores in seen]
    best: dict[str, dict] = {"metrics": {}, "intervals": {}}
    for name in each[-1]["metrics"]:
        top = max(each, key=lambda e, name=name: e["metrics"][name])
        for part in best:
            best[part][name] = top[part][name]
    protocols = {
        "last epoch": each[-1],
        "best epoch": best,
        "no good images": found(images.test, *seen[-1], defective),
    }
    return [{"scored": method, "protocol": p, "seed": seed, "run": None} | values for p, values in protocols.items()]


def main(chosen: list[str]) -> None:
    rows = json.loads(OUT.read_text()) if OUT.exists() else []
    for method in chosen or ("mkd", "draem"):
        for seed in range(3):
            for new in rows_of(method, seed):
                shown = {name: round(value, 3) for name, value in new["metrics"].items()}
                print(*(new[name] for name in NAMES), shown, flush=True)
                rows = [r for r in rows if any(r[name] != new[name] for name in NAMES)] + [new]
            OUT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
