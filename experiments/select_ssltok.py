"""Compare settings of ssltok on synthetic damage of held-out normal images, of several data sets at once.

    python experiments/select_ssltok.py OUT.json NAME METHOD [key=value ...]
    python experiments/select_ssltok.py out.json "no memory" ssltok remember=false

One call trains one candidate, the preset `small` of METHOD (ssltok, or patchknn to compare with) with the given
changes, on four fifths of the training images of each of the SETS, found below `VITAD_DATA`, and measures it on the
remaining fifth. Images of one item stay together; of `mt` only MOST images are taken, to save time. Test images are
never looked at. NAME names the candidate.

A held-out image is measured as it is and once with each kind of damage. Training draws the kind `anything` alone, so
the other kinds are damage that a candidate has not seen. OUT.json is a list of rows, one for each candidate and data
set; a row of the same names is replaced.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch

from vitad import data, methods
from vitad.data import ImageSet
from vitad.data.synthesis import KINDS, Synthesis, foregrounds
from vitad.methods.base import Method
from vitad.metrics import evaluate
from vitad.settings import parse_overrides, resolve
from vitad.training import autocast, train

SETS = (("mt", None), ("mvtec", "bottle"), ("mvtec", "pill"), ("mvtec", "screw"))
MOST = 320  # images of a data set, as many as screw has
SEED = 1234  # of the damage; a run's own seed gives other damage
CPU = torch.device("cpu")


class Part:
    """Some images of an `ImageSet`, numbered anew."""

    def __init__(self, images: ImageSet, chosen: np.ndarray):
        self.images, self.indices, self.size = images, np.flatnonzero(chosen), images.size
        self.groups, self.categories = images.groups[chosen], images.categories[chosen]
        self.textures = images.textures[chosen]

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions, device="cpu") -> dict:
        positions = np.asarray(positions)
        return self.images.batch(self.indices[positions], device) | {"index": torch.from_numpy(positions)}


def parts(images: ImageSet) -> tuple[Part, Part]:
    """The images to train on and those held out, a fifth of the items. Of a large set only MOST images are taken."""
    items = sorted(set(images.groups), key=lambda item: hashlib.sha256(("hold" + item).encode()).digest())
    so_far = np.cumsum([(images.groups == item).sum() for item in items])
    items = [item for item, count in zip(items, so_far, strict=True) if count <= MOST]
    split = round(0.2 * len(items))
    return Part(images, np.isin(images.groups, items[split:])), Part(images, np.isin(images.groups, items[:split]))


@torch.no_grad()
def score(model: Method, images: Part, kind: str | None, amp: bool) -> tuple[torch.Tensor, ...]:
    """Maps (n,S,S), scores (n,) and masks (n,S,S) of the images, damaged by `kind` or as they are."""
    found = []
    for i in range(0, len(images), 16):
        x = images.batch(range(i, min(i + 16, len(images))))["image"]
        mask = torch.zeros(len(x), *images.size, dtype=torch.bool)
        if kind:
            within = foregrounds(images.images, images.indices[i : i + 16])
            damaged = Synthesis((kind,), 1.0, "both", keep_grey=True)(x, SEED, i, within)
            x, mask = damaged["image"], damaged["mask"][:, 0]
        with autocast(CPU, amp):
            maps = model.anomaly_map(x).float()
        found.append((maps, model.image_score(maps), mask))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def candidate(dataset: str, category: str | None, method: str, changes: list[str]) -> dict:
    """Train and measure one candidate on one data set: `metrics` of each kind of damage, and what was counted."""
    module = methods.get(method)
    settings = resolve(module.Settings, module.PRESETS, "small", parse_overrides(changes))
    images = data.load(dataset, None, category, image_size=settings.image_size).train
    fit, rest = parts(images)
    began = time.perf_counter()
    torch.manual_seed(0)
    model = module.Model(settings)
    model.prepare(fit, CPU)
    if model.phases():
        train(model, fit, 0, CPU, settings.amp)
    model.eval()

    good, good_scores, unmarked = score(model, rest, None, settings.amp)
    metrics = {}
    for kind in KINDS:
        maps, scores, masks = score(model, rest, kind, settings.amp)
        used = masks.flatten(1).any(1)  # some damage is empty
        both = [torch.cat(pair).numpy() for pair in ((good, maps[used]), (unmarked, masks[used]))]
        labels = np.repeat([0, 1], [len(good), int(used.sum())])
        found = evaluate(*both, torch.cat((good_scores, scores[used])).numpy(), labels)
        metrics[kind] = {name: round(value, 4) for name, value in found.items()}
    unseen = [metrics[kind] for kind in KINDS if kind != "anything"]
    metrics["mean of unseen kinds"] = {name: round(float(np.mean([m[name] for m in unseen])), 4) for name in unseen[0]}
    return {
        "metrics": metrics,
        "counts": {"train": len(fit), "held_out": len(rest)},
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to which the rows are added")
    parser.add_argument("name", help="of the candidate")
    parser.add_argument("method", choices=("ssltok", "patchknn"))
    parser.add_argument("changes", nargs="*", metavar="key=value", help="settings that differ from the preset small")
    given = parser.parse_args()
    for dataset, category in SETS:
        names = {"name": given.name, "dataset": dataset, "category": category}
        row = names | {"method": given.method, "changes": given.changes}
        row |= candidate(dataset, category, given.method, given.changes)
        print(given.name, category or dataset, row["metrics"]["mean of unseen kinds"], row["seconds"], flush=True)
        rows = json.loads(given.out.read_text()) if given.out.exists() else []
        rows = [r for r in rows if any(r[key] != value for key, value in names.items())] + [row]
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
