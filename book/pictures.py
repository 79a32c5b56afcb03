"""Draw the pictures of real images that the book shows.

    python book/pictures.py intro              results/intro.png: good and defective products, and the defects close by
    python book/pictures.py compare [RUNS]     results/compare.png: one defect of each data set, as every method maps it
    python book/pictures.py inside RUN         results/inside/METHOD-DATA-PART.jpg: what happens inside a trained method

Images come from `VITAD_DATA`, maps from the finished runs below RUNS (default `runs`): of each method the one with the
lowest seed, without overrides, of the preset that its page quotes. results/compare.npz keeps the maps that are drawn,
so that runs of several days make one picture. What is not there stays empty and is named. The images were chosen by
eye, for defects that a reader can see, and before any map was drawn.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from vitad import data, methods
from vitad.files import atomic_write
from vitad.runs.folder import load_model, read_maps
from vitad.runs.pipeline import MASK_THRESHOLD
from vitad.runs.record import Record, read_record, read_records, results_folder
from vitad.show import lessons, plots

SIZE = 384  # px
ORDER = ("l2cae", "anovit", "vitmem", "mala", "patchknn", "ssltok")
PRESETS = ("small", "small_dinov2", "near")  # the first that was run
MVTEC = "{}: MVTec AD, Bergmann et al. 2019, CC BY-NC-SA 4.0, resized, outlines added."
TILES = "Tile{}: Huang et al. 2020, magnetic tiles."
Place = tuple[str, str | None, str]  # data set, category, image

INTRO: dict[str, tuple[Place, Place]] = {  # good, defective
    "bottle": (
        ("mvtec", "bottle", "bottle/test/good/005.png"),
        ("mvtec", "bottle", "bottle/test/broken_small/012.png"),
    ),
    "pill": (("mvtec", "pill", "pill/test/good/005.png"), ("mvtec", "pill", "pill/test/contamination/012.png")),
    "tile": (
        ("mt", None, "MT_Free/Imgs/exp6_num_114490.jpg"),
        ("mt", None, "MT_Crack/Imgs/exp6_num_249821.jpg"),
    ),
}
COMPARE: dict[str, Place] = {
    "bottle": ("mvtec", "bottle", "bottle/test/broken_small/005.png"),
    "pill": ("mvtec", "pill", "pill/test/color/006.png"),
    "tile": ("mt", None, "MT_Blowhole/Imgs/exp6_num_108812.jpg"),
    "screw": ("mvtec", "screw", "screw/test/defective/001(4).png"),
}


def image_of(place: Place) -> tuple[np.ndarray, np.ndarray, str]:
    """(image (3,S,S) in [0,1], mask (S,S), kind of defect)"""
    dataset, category, path = place
    found = data.find(dataset, None, category)
    (record,) = [r for r in [*found.train, *found.test] if r.path.relative_to(found.root).as_posix() == path]
    image = data.ImageSet([record], found.root, SIZE, mask_threshold=MASK_THRESHOLD)
    return image.batch([0])["image"][0].numpy(), image.masks[0], record.defect


def title(name: str, kind: str) -> str:
    return f"{name}: {kind.replace('_', ' ').lower()}"


def close_by(mask: np.ndarray, share: float = 0.4) -> tuple[slice, slice]:
    """Where a square around the defect lies that has this share of the side."""
    side = int(share * len(mask))
    starts = [
        int(np.clip(np.flatnonzero(mask.any(1 - axis)).mean() - side / 2, 0, len(mask) - side)) for axis in (0, 1)
    ]
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def intro(products: dict[str, tuple[Place, Place]]) -> Figure:
    """A column a product: a good one, one with a defect, and the defect close by."""
    good, defective = ([image_of(pair[k]) for pair in products.values()] for k in (0, 1))
    parts = [close_by(mask) for _, mask, _ in defective]
    rows = {
        "good": lambda axis, j: plots.show(axis, good[j][0]),
        "defective": lambda axis, j: plots.show(axis, *defective[j][:2]),
        "the defect": lambda axis, j: plots.show(axis, defective[j][0][:, *parts[j]]),
    }
    titles = [title(name, kind) for name, (*_, kind) in zip(products, defective, strict=True)]
    fig = plots.picture_rows(rows, titles, width=9)
    fig.supxlabel(f"{MVTEC.format('Bottle and pill')} {TILES.format('s')}", fontsize=7)
    return fig


def run_of(method: str, place: Place, records: list[Record]) -> Record | None:
    """The run of a method on a data set whose map is shown; one of an older revision of the method does not count."""
    dataset, category, _ = place
    split, revision = data.get(dataset).resolve(category)[1], methods.get(method).Model.revision
    records = [r for r in records if r.get("revision", 1) == revision]
    wanted = {"method": method, "dataset": dataset, "category": category, "split": split, "overrides": {}}
    same = [r for r in records if all(r[key] == value for key, value in wanted.items()) and r["preset"] in PRESETS]
    return min(same, key=lambda r: (PRESETS.index(r["preset"]), r["seed"]), default=None)


def drawn(places: dict[str, Place], records: list[Record]) -> dict[str, np.ndarray]:
    """{NAME/METHOD: map (S,S) uint8} of the runs that are there; 0 is the low, 255 the high end of a method's scale."""
    maps = {}
    for name, place in places.items():
        for method in ORDER:
            if record := run_of(method, place, records):
                found = read_maps(record["folder"])
                (row,) = np.flatnonzero(found["paths"] == place[2])
                low, high = plots.heat_range(found["maps"])
                share = (found["maps"][row].astype(float) - low) / (high - low)
                maps[f"{name}/{method}"] = (255 * share.clip(0, 1)).round().astype(np.uint8)
    return maps


def compare(places: dict[str, Place], maps: dict[str, np.ndarray]) -> Figure:
    """A block a data set: the image with its defect outlined, and beside it, half as wide, the map of each method."""
    n, columns = len(places), -(-len(ORDER) // 2)
    fig = plt.figure(figsize=(10, 4.2 * n + 0.6), layout="constrained")
    *blocks, foot = fig.subfigures(n + 1, 1, height_ratios=[4.2] * n + [0.6])
    for block, (name, place) in zip(blocks, places.items(), strict=True):
        image, mask, kind = image_of(place)
        grid = block.add_gridspec(2, 2 + columns)
        axis = block.add_subplot(grid[:, :2])
        plots.show(axis, image, mask)
        axis.set_title(title(name, kind), fontsize=11)
        axis.set_axis_off()
        for k, method in enumerate(ORDER):
            axis = block.add_subplot(grid[k // columns, 2 + k % columns])
            axis.set_axis_off()
            if (shown := maps.get(f"{name}/{method}")) is None:
                axis.imshow(np.ones((SIZE, SIZE)), cmap="gray", vmin=0, vmax=1)  # keeps the place
                axis.set_title(f"{method}: no map", fontsize=9)
                print(f"no map of {method} on {name}")
                continue
            extent = (-0.5, SIZE - 0.5, SIZE - 0.5, -0.5)  # the map may be smaller than the image
            axis.imshow(shown, cmap=plots.HEAT, vmin=0, vmax=255, extent=extent)
            plots.outline(axis, mask, "white", 0.6)
            axis.set_title(f"{method}, {len(shown)} px", fontsize=9)
    scale = foot.add_axes((0.2, 0.5, 0.6, 0.25))
    bar = foot.colorbar(ScalarMappable(cmap=plots.HEAT), scale, orientation="horizontal", ticks=[0, 1])
    bar.ax.set_xticklabels(["median of a method's test pixels", "highest 0.2 %"], fontsize=8)
    fig.supxlabel(f"{MVTEC.format('Bottle, pill, screw')} {TILES.format('')}", fontsize=7)
    return fig


# --- inside a method: one function each, {part: figure} of a finished run ------------------------------------------


@torch.no_grad()
def inside_anovit(record: Record) -> dict[str, Figure]:
    """Tokens, rebuilt image, error and map; of each kind of image the middle one by score."""
    model, found = load_model(record["folder"], "cpu"), read_maps(record["folder"])
    few = plots.examples(found["labels"], found["defects"], good=2, order=found["scores"])[-6:]
    size = model.settings.image_size
    test = data.load(record["dataset"], None, record["category"], record["split"], image_size=size).test
    batch = test.batch(few)["image"]
    x, x_hat = model.reconstruct(batch)
    features = model.encode(x)
    tokens = features.flatten(2).transpose(1, 2)
    rows = {
        "image": batch.numpy(),
        "tokens": plots.principal_components(tokens, features.shape[2:]).transpose(0, 3, 1, 2),
        "rebuilt": (x_hat * model.std + model.mean).numpy(),
        "error": (x - x_hat).square().mean(1).numpy(),
        "map": found["maps"][few],
    }
    limits = {name: (0.0, float(np.quantile(rows[name], 0.998))) for name in ("error", "map")}
    titles = [kind.replace("_", " ").lower() for kind in found["defects"][few]]
    return {"steps": lessons.rebuilt(rows, titles, found["masks"][few], limits)}


@torch.no_grad()
def inside_ssltok(record: Record) -> dict[str, Figure]:
    """Tokens, given and as they should be, distance, probability and map; of each kind the middle one by score."""
    model, found = load_model(record["folder"], "cpu"), read_maps(record["folder"])
    few = plots.examples(found["labels"], found["defects"], good=2, order=found["scores"])[-6:]
    size = model.settings.image_size
    test = data.load(record["dataset"], None, record["category"], record["split"], image_size=size).test
    batch = test.batch(few)["image"]
    out = model.predict(batch)
    tokens = {"given": out["t_a"], "unseen": out["unseen"], "remembered": out["t_m"]}
    colours = plots.principal_components(torch.cat(list(tokens.values())), model.tokenizer.patch_embed.grid_size)
    rows = {"image": batch.numpy()}
    rows |= dict(zip(tokens, np.split(colours.transpose(0, 3, 1, 2), len(tokens)), strict=True))
    rows |= {"d": out["distance"].numpy(), "p": out["segmented"].numpy(), "map": found["maps"][few]}
    limits = {name: (0.0, float(np.quantile(rows[name], 0.998))) for name in ("d", "map")} | {"p": (0.0, 1.0)}
    titles = [kind.replace("_", " ").lower() for kind in found["defects"][few]]
    return {"steps": lessons.rebuilt(rows, titles, found["masks"][few], limits)}


INSIDE = {"anovit": inside_anovit, "ssltok": inside_ssltok}


def inside(record: Record) -> None:
    name = f"{record['method']}-{record['category'] or record['dataset']}"
    lessons.style()
    for part, fig in INSIDE[record["method"]](record).items():
        source = {"mvtec": MVTEC.format("Photographs"), "mt": TILES.format("s")}.get(record["dataset"], "")
        fig.supxlabel(source, fontsize=6)
        out = results_folder() / "inside" / f"{name}-{part}.jpg"
        out.parent.mkdir(exist_ok=True)
        fig.savefig(out, dpi=170, pil_kwargs={"quality": 64, "optimize": True})
        plt.close(fig)
        print(out)


def main(arguments: list[str]) -> None:
    what, *runs = arguments or ["nothing"]
    if what == "intro":
        fig = intro(INTRO)
    elif what == "compare":
        assert set(ORDER) <= set(methods.METHODS)
        kept = results_folder() / "compare.npz"
        finished = [r for r in read_records(Path(runs[0] if runs else "runs")) if (r["folder"] / "maps.npz").exists()]
        maps = (dict(np.load(kept)) if kept.exists() else {}) | drawn(COMPARE, finished)
        with atomic_write(kept) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **maps)  # type: ignore[arg-type]
        fig = compare(COMPARE, maps)
    elif what == "inside":
        return inside(read_record(runs[0]) | {"folder": Path(runs[0])})
    else:
        sys.exit(__doc__)
    out = results_folder() / f"{what}.png"
    plots.save(fig, out, dpi=100)
    print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
