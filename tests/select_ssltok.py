"""How the settings of ssltok for MT were chosen: on synthetic damage of held-out normal tiles, never on the test set.

    python tests/select_ssltok.py MT_FOLDER TOKENS_FOLDER OUT.json NAME key=value key=value ...

One call trains one setting (preset `small` with the given changes) on four fifths of the tiles of the split `grouped`
and adds a row to OUT.json: AUROC, PRO and AUROC by kind of damage on the remaining fifth. The tokens of the normal
images and of three damaged versions of each are computed once and kept in TOKENS_FOLDER: all settings see the same.
The name "patchknn" adds the reference on the same tokens.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from vitad import data
from vitad.backbones import DINOV2_S14, intermediate, normalise, vit
from vitad.blocks import gaussian_blur, top_mean
from vitad.data import mt
from vitad.data.synthesis import Synthesis
from vitad.methods import ssltok
from vitad.metrics import evaluate
from vitad.settings import as_json, parse_overrides, resolve
from vitad.training import train

BLOCKS, VERSIONS, BANK = (2, 4, 6, 8), 3, 40_000
KINDS = 3 * ("crack", "pit", "patch") + 2 * ("fray", "perlin") + ("paste",)


def held_out(paths):
    """Which images belong to the fifth of the physical tiles that is held out."""
    names = [Path(p).name for p in paths]
    groups = sorted(mt.tiles(names), key=lambda g: hashlib.sha256(("hold" + g[0]).encode()).digest())
    chosen = {name for group in groups[: round(0.2 * len(groups))] for name in group}
    return np.array([name in chosen for name in names])


class Part:
    """Some images of an `ImageSet`, which keep their index in it."""

    def __init__(self, images, chosen):
        self.images, self.chosen = images, chosen

    def __len__(self):
        return len(self.chosen)

    def batch(self, indices, device="cpu"):
        return self.images.batch(self.chosen[np.asarray(indices)], device)


@torch.no_grad()
def tokenize(images, folder):
    """Tokens of every block, (N,blocks,tokens,D) in half precision, of the images and of their damaged versions."""
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    encoder = vit(DINOV2_S14, images.size)[0].eval()
    for version in range(1 + VERSIONS):
        kinds = np.random.default_rng(version).choice(KINDS if version else ["good"], len(images))
        shape = (len(images), len(BLOCKS), encoder.patch_embed.num_patches, encoder.embed_dim)
        tokens = np.lib.format.open_memmap(folder / f"tokens{version}.npy", "w+", np.float16, shape)
        masks = np.zeros((len(images), *images.size), bool)
        for i in range(len(images)):
            x = images.batch([i])["image"]
            if version:
                damaged = Synthesis((str(kinds[i]),), 1.0, keep_grey=True)(x, version, i)
                x, masks[i] = damaged["image"], damaged["mask"][0, 0].numpy()
            tokens[i] = torch.cat(intermediate(encoder, normalise(x), BLOCKS)).numpy()
        np.savez_compressed(folder / f"damage{version}.npz", masks=masks, kinds=kinds)
    (folder / "complete").touch()


def main(mt_folder, folder, out, name, *changes):
    overrides = parse_overrides(changes)
    settings = resolve(ssltok.Settings, ssltok.PRESETS, "small", overrides)
    images, folder, out = (
        data.load("mt", mt_folder, None, "grouped", settings.image_size).train,
        Path(folder),
        Path(out),
    )
    tokenize(images, folder)
    torch.manual_seed(0)
    model = ssltok.Model(settings)
    chosen = [BLOCKS.index(b) for b in sorted(settings.blocks)]
    stored = [np.load(folder / f"tokens{v}.npy", mmap_mode="r") for v in range(1 + VERSIONS)]
    tokens = [torch.from_numpy(t[:, chosen].mean(1, dtype=np.float32)).half() for t in stored]
    damage = [dict(np.load(folder / f"damage{v}.npz")) for v in range(1 + VERSIONS)]
    masks, kinds = (np.stack([d[name] for d in damage]) for name in ("masks", "kinds"))
    model.clean = tokens[0]
    model.pool = {"tokens": torch.stack(tokens[1:]), "mask": torch.from_numpy(masks[1:])}
    held = held_out(images.paths)
    parts = torch.cat([t[held] for t in tokens]).float().split(32)
    began = time.perf_counter()
    if name == "patchknn":  # the reference, on the same tokens
        bank = F.normalize(model.clean[~held].flatten(0, 1).float(), dim=-1)
        bank = bank[torch.randperm(len(bank))[:BANK]]
        distance = [1 - (F.normalize(t, dim=-1) @ bank.T).amax(-1) for t in parts]
        distance = torch.cat(distance).view(-1, 1, *model.tokenizer.patch_embed.grid_size)
        maps = F.interpolate(distance, images.size, mode="bilinear", align_corners=False)[:, 0]
    else:
        model._measure(model.clean[~held])
        train(model, Part(images, np.flatnonzero(~held)), 0, torch.device("cpu"), settings.amp)
        model.eval()
        with torch.no_grad():
            maps = torch.cat([model._predict(model._standard(t), images.size)["map"] for t in parts])
    seconds = time.perf_counter() - began
    masks, kinds = masks[:, held].reshape(-1, *images.size), kinds[:, held].reshape(-1)
    seen = masks.any((1, 2)) | (kinds == "good")  # damage may be empty
    maps, masks, kinds = gaussian_blur(maps, settings.sigma)[torch.from_numpy(seen)], masks[seen], kinds[seen]
    rules = {
        "top 1 %": top_mean(maps, 0.01),
        "top 5 %": top_mean(maps, 0.05),
        "maximum": maps.amax((1, 2)),
        "window 21": F.avg_pool2d(maps[:, None], 21, 1, 10).amax((1, 2, 3)),
    }

    def image_auroc(scores, of=None):
        part = (kinds == "good") | (kinds == of if of else kinds != "good")
        labels = (kinds[part] != "good").astype(int)
        return round(evaluate(maps[part].numpy(), None, scores[part].numpy(), labels)["image_auroc"], 4)

    labels = (kinds != "good").astype(int)
    figures = evaluate(maps.numpy(), masks, model.image_score(maps).numpy(), labels)
    row = {
        "name": name,
        "overrides": overrides,
        "settings": as_json(settings),
        "metrics": {k: round(v, 4) for k, v in figures.items()},
        "image_auroc_by_rule": {rule: image_auroc(scores) for rule, scores in rules.items()},
        "image_auroc_by_kind": {k: image_auroc(model.image_score(maps), k) for k in sorted(set(KINDS))},
        "counts": {"train": int((~held).sum()), "good": int((labels == 0).sum()), "damaged": int(labels.sum())},
        "seconds": round(seconds, 1),
    }
    print(json.dumps(row, indent=2))
    rows = json.loads(out.read_text()) if out.exists() else []
    out.write_text(json.dumps([r for r in rows if r["name"] != name] + [row], indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
