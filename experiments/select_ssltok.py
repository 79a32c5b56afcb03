"""Choose the settings of ssltok for the tiles of `mt`, on synthetic damage of held-out normal tiles.

    python experiments/select_ssltok.py MT_FOLDER TOKENS_FOLDER OUT.json NAME [key=value ...]
    python experiments/select_ssltok.py data/mt tokens out.json "no reconstruction" reconstruct=false

One call trains one candidate, the preset `small` with the given changes, on four fifths of the training tiles of the
split `grouped`, and measures it on the remaining fifth. Test images are never looked at. NAME names the candidate; the
name "patchknn" measures that method instead, on the same tokens. The tokens of the normal images and of three damaged
versions of each are computed once and kept in TOKENS_FOLDER (2.4 GB at 224 px; another image size needs another
folder), so all candidates see the same images.

OUT.json is a list of rows, one for each candidate; a row of the same name is replaced. A row holds the metrics on the
held-out fifth, and image AUROC by rule of the image score and by kind of damage. In the committed `select_ssltok.json`
the row "chosen" is the preset `small`: it leads in image AUROC and PRO.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitad import data
from vitad.backbones import DINOV2_S14, intermediate, normalise, vit
from vitad.blocks import gaussian_blur, top_mean
from vitad.data import ImageSet
from vitad.data.sets import mt
from vitad.data.synthesis import Synthesis
from vitad.methods import ssltok
from vitad.metrics import evaluate
from vitad.settings import as_json, parse_overrides, resolve
from vitad.training import train

BLOCKS = (2, 4, 6, 8)  # whose tokens are kept; a candidate uses some of them
VERSIONS = 3  # damaged versions of each image
BANK = 40_000  # tokens in patchknn's memory
KINDS = 3 * ("crack", "pit", "patch") + 2 * ("fray", "perlin") + ("paste",)


class Part:
    """Some images of an `ImageSet`, which keep their index in it."""

    def __init__(self, images: ImageSet, indices: np.ndarray):
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions, device="cpu") -> dict:
        return self.images.batch(self.indices[np.asarray(positions)], device)


def held_out(paths: list[str]) -> np.ndarray:
    """(N,) bool: the images of the fifth of the physical tiles that is held out."""
    names = [Path(p).name for p in paths]
    tiles = sorted(mt.tiles(names), key=lambda tile: hashlib.sha256(("hold" + tile[0]).encode()).digest())
    chosen = {name for tile in tiles[: round(0.2 * len(tiles))] for name in tile}
    return np.array([name in chosen for name in names])


@torch.no_grad()
def tokenize(images: ImageSet, folder: Path) -> None:
    """Write tokens of every block, (N,blocks,tokens,D) in half precision, of the images and their damaged versions."""
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    encoder = vit(DINOV2_S14, images.size)[0].eval()
    for version in range(1 + VERSIONS):  # version 0 is the images as they are
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


def load(folder: Path, blocks: tuple[int, ...]) -> tuple[list[Tensor], np.ndarray, np.ndarray]:
    """What `tokenize` wrote, by version.

    Returns
    -------
    tokens : list of Tensors (N,tokens,D)
        Mean over the given blocks.
    masks : array (1 + VERSIONS,N,H,W) of bool
    kinds : array (1 + VERSIONS,N) of str
    """
    columns = [BLOCKS.index(b) for b in sorted(blocks)]
    stored = [np.load(folder / f"tokens{v}.npy", mmap_mode="r") for v in range(1 + VERSIONS)]
    tokens = [torch.from_numpy(t[:, columns].mean(1, dtype=np.float32)).half() for t in stored]
    damage = [dict(np.load(folder / f"damage{v}.npz")) for v in range(1 + VERSIONS)]
    return tokens, np.stack([d["masks"] for d in damage]), np.stack([d["kinds"] for d in damage])


def maps_of_patchknn(model: ssltok.Model, held: np.ndarray, parts: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
    """(n,H,W): cosine distance of the tokens `parts` to the nearest of those that are not held out."""
    bank = F.normalize(model.clean[~held].flatten(0, 1).float(), dim=-1)
    bank = bank[torch.randperm(len(bank))[:BANK]]
    distance = [1 - (F.normalize(t, dim=-1) @ bank.T).amax(-1) for t in parts]
    grid = torch.cat(distance).view(-1, 1, *model.tokenizer.patch_embed.grid_size)
    return F.interpolate(grid, size, mode="bilinear", align_corners=False)[:, 0]


def maps_of_ssltok(model: ssltok.Model, held: np.ndarray, parts: tuple[Tensor, ...], images: ImageSet) -> Tensor:
    """(n,H,W): train on the images that are not held out and predict from the tokens `parts`."""
    model._measure(model.clean[~held])
    train(model, Part(images, np.flatnonzero(~held)), 0, torch.device("cpu"), model.settings.amp)
    model.eval()
    with torch.no_grad():
        return torch.cat([model._predict(model._standard(t), images.size)["map"] for t in parts])


def measure(model: ssltok.Model, maps: Tensor, masks: np.ndarray, kinds: np.ndarray) -> dict:
    """The metrics of smoothed maps (n,H,W), and image AUROC by rule and by kind of damage."""
    rules = {
        "top 1 %": top_mean(maps, 0.01),
        "top 5 %": top_mean(maps, 0.05),
        "maximum": maps.amax((1, 2)),
        "window 21": F.avg_pool2d(maps[:, None], 21, 1, 10).amax((1, 2, 3)),
    }

    def image_auroc(scores: Tensor, kind: str | None = None) -> float:
        """Good images against those with one kind of damage, or with any."""
        part = (kinds == "good") | (kinds == kind if kind else kinds != "good")
        labels = (kinds[part] != "good").astype(int)
        return round(evaluate(maps[part].numpy(), None, scores[part].numpy(), labels)["image_auroc"], 4)

    scores = model.image_score(maps)
    metrics = evaluate(maps.numpy(), masks, scores.numpy(), (kinds != "good").astype(int))
    return {
        "metrics": {name: round(value, 4) for name, value in metrics.items()},
        "image_auroc_by_rule": {rule: image_auroc(values) for rule, values in rules.items()},
        "image_auroc_by_kind": {kind: image_auroc(scores, kind) for kind in sorted(set(KINDS))},
    }


def candidate(mt_folder: str, tokens_folder: Path, name: str, changes: list[str]) -> dict:
    """Train and measure one candidate: its row."""
    overrides = parse_overrides(changes)
    settings = resolve(ssltok.Settings, ssltok.PRESETS, "small", overrides)
    images = data.load("mt", mt_folder, None, "grouped", settings.image_size).train
    tokenize(images, tokens_folder)
    torch.manual_seed(0)
    model = ssltok.Model(settings)
    tokens, masks, kinds = load(tokens_folder, settings.blocks)
    model.clean = tokens[0]  # as model.prepare() would leave them
    model.pool = {"tokens": torch.stack(tokens[1:]), "mask": torch.from_numpy(masks[1:])}

    held = held_out(images.paths)
    parts = torch.cat([t[held] for t in tokens]).float().split(32)
    began = time.perf_counter()
    if name == "patchknn":
        maps = maps_of_patchknn(model, held, parts, images.size)
    else:
        maps = maps_of_ssltok(model, held, parts, images)
    seconds = time.perf_counter() - began

    masks, kinds = masks[:, held].reshape(-1, *images.size), kinds[:, held].reshape(-1)
    used = masks.any((1, 2)) | (kinds == "good")  # some damage is empty
    maps = gaussian_blur(maps, settings.sigma)[torch.from_numpy(used)]
    masks, kinds = masks[used], kinds[used]
    good = int((kinds == "good").sum())
    return {
        "name": name,
        "overrides": overrides,
        "settings": as_json(settings),
        **measure(model, maps, masks, kinds),
        "counts": {"train": int((~held).sum()), "good": good, "damaged": len(kinds) - good},
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mt_folder", help="the data set as published")
    parser.add_argument("tokens_folder", type=Path, help="where tokens are kept between calls")
    parser.add_argument("out", type=Path, help="JSON file to which the row is added")
    parser.add_argument("name", help="of the candidate")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="settings that differ from the preset small")
    arguments = parser.parse_args()
    row = candidate(arguments.mt_folder, arguments.tokens_folder, arguments.name, arguments.changes)
    print(json.dumps(row, indent=2))
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    rows = [r for r in rows if r["name"] != row["name"]] + [row]
    arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
