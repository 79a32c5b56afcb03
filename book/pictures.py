"""Draw the pictures of real images that the book shows.

    python book/pictures.py intro              results/intro.png: good and defective products, and the defects close by
    python book/pictures.py compare [RUNS]     results/compare.png: one defect of each data set, as every method maps it
    python book/pictures.py inside RUN         results/inside/METHOD-*.jpg: what happens inside a trained method
    python book/pictures.py damage             results/inside/*.jpg: damage painted onto good images
    python book/pictures.py families [RUNS]    results/inside/family-*.jpg: the same bottles, as each family maps them

Images come from `VITAD_DATA`, maps from the finished runs below RUNS (default `runs`): of each method the one with the
lowest seed, without overrides, of the preset that its page quotes. results/compare.npz keeps the maps that are drawn,
so that runs of several days make one picture. What is not there stays empty and is named. The images were chosen by
eye, for defects that a reader can see, and before any map was drawn.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vitad import data, methods, runs
from vitad.data import synthesis
from vitad.files import atomic_write
from vitad.methods import mala
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
FAMILIES = {  # as notebooks/families.ipynb sorts them
    "pixels": ("l2cae", "aessim", "vae", "fanogan", "vtadl", "anovit", "vitmem"),
    "damage": ("draem", "mala", "ssltok"),
    "density": ("padim", "patchknn", "psvdd"),
    "students": ("mkd", "cflow"),
    "features": ("dfr", "uniad", "dinomaly"),
}
BOTTLES = ("good/005", "broken_large/010", "broken_small/000", "contamination/000", "contamination/007")

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


def families(records: list[Record]) -> None:
    """The maps of all members of a family on the same bottles. Each method has its own colour scale."""
    lessons.style()
    places: list[Place] = [("mvtec", "bottle", f"bottle/test/{name}.png") for name in BOTTLES]
    images, masks, kinds = zip(*map(image_of, places), strict=True)
    for family, members in FAMILIES.items():
        rows, limits = {"image": np.stack(images)}, {}
        runs_of_members = {method: run_of(method, places[0], records) for method in members}
        if absent := [method for method, record in runs_of_members.items() if record is None]:
            print(f"{family}: left as it is, since there is no run on bottle of {', '.join(absent)}")
            continue
        for method, record in runs_of_members.items():
            found = read_maps(record["folder"])
            few = [list(found["paths"]).index(path) for *_, path in places]
            rows[method], limits[method] = found["maps"][few], plots.heat_range(found["maps"])
        fig = lessons.rebuilt(rows, [kind.replace("_", " ") for kind in kinds], np.stack(masks), limits)
        fig.supxlabel(MVTEC.format("Photographs"), fontsize=6)
        keep(fig, f"family-{family}", 75)


# --- inside a method: one function each, {part: figure} of a finished run ------------------------------------------


@torch.no_grad()
def inside_vitmem(record: Record) -> dict[str, Figure]:
    model = load_model(record["folder"], "cpu")
    s = model.settings
    images = data.load(record["dataset"], None, record["category"], record["split"], image_size=s.image_size)
    labels, kinds = images.test.labels, images.test.defects
    few = plots.examples(labels, kinds)[:5]
    sample = images.test.batch(few)
    batch, masks = sample["image"], sample["mask"][:, 0].numpy()
    names = [kinds[i].replace("_", " ").lower() for i in few]
    x, rebuilt, w_hat = model.reconstruct(batch)
    features = model.encode(x)
    recalled, _ = model.memory(features)
    g = features.shape[-1]
    tensors = {"F": features, "F′": recalled, "F″": model.coord_att(recalled)}
    colours = {
        name: plots.principal_components(z.flatten(2).transpose(1, 2), (g, g)).transpose(0, 3, 1, 2)
        for name, z in tensors.items()
    }
    figures = {"features": lessons.rebuilt({"image": batch.numpy(), **colours}, names, masks)}
    figures["memory"] = answers_of(model, images, batch, masks, w_hat)
    a_h, a_w = model.coord_att.attention(recalled)
    rows, columns = a_h.mean(1)[..., 0].numpy(), a_w.mean(1)[:, 0].numpy()
    figures["attention"] = lessons.strips(batch.numpy(), rows, columns, masks, names)
    errors = {name: error.numpy() for name, error in model.error_maps(batch).items()}
    pictures = {"image": batch.numpy(), "rebuilt": (rebuilt.numpy() + 1) / 2 if x.min() < 0 else rebuilt.numpy()}
    shown = dict(zip(("squared error", "1 − SSIM", "entropy"), errors.values(), strict=True))
    figures["errors"] = lessons.rebuilt(pictures | shown, names, masks, limits=None)
    return figures


def answers_of(model, images, batch, masks, w_hat) -> Figure:
    """The heaviest items for a patch on the largest defect, for the same place of a good image, and for a corner.

    An item is shown as the patch of a good training image that gives it the most weight.
    """
    g, P = w_hat.shape[1], model.encoder.patch_embed.patch_size[0]
    share = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(masks[:, None].astype(np.float32)), g)[:, 0]
    worst, row, column = np.unravel_index(int(share.argmax()), share.shape)
    queries = {"defect": (worst, row, column), "same place,\ngood": (0, row, column), "corner": (worst, 0, 0)}
    weights = torch.stack([w_hat[place] for place in queries.values()])
    heaviest, chosen = weights.topk(5)
    best = torch.full((w_hat.shape[-1],), -1.0)
    patch = torch.zeros(len(best), 3, P, P)
    for i in range(0, len(images.train), 16):
        good = images.train.batch(range(i, min(i + 16, len(images.train))))["image"]
        w = model.reconstruct(good)[2].flatten(0, 2)  # (B g g, N)
        value, place = w.max(0)
        cut = good.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, P, P)
        better = value > best
        best[better], patch[better] = value[better], cut[place[better]]
    asked = [batch[i, :, r * P : (r + 1) * P, c * P : (c + 1) * P].numpy() for i, r, c in queries.values()]
    return lessons.answers(np.stack(asked), patch[chosen].numpy(), heaviest.numpy(), list(queries))


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


def keep(fig: Figure, name: str, quality: int = 82) -> None:
    """results/inside/NAME.jpg, twice as fine as the page shows it."""
    out = results_folder() / "inside" / f"{name}.jpg"
    out.parent.mkdir(exist_ok=True)
    fig.savefig(out, dpi=200, pil_kwargs={"quality": quality, "optimize": True})
    plt.close(fig)
    print(out)


def good_ones(size: int = 224) -> tuple[Tensor, Tensor]:
    """A good bottle, pill and tile of the training images (3,3,S,S), and where the object is (3,1,S,S)."""
    images = []
    for dataset, category in (("mvtec", "bottle"), ("mvtec", "pill"), ("mt", None)):
        images.append(data.load(dataset, None, category, image_size=size).train.batch([7])["image"])
    found = torch.cat([synthesis.foreground_mask(x) for x in images])
    found[2] = True  # a tile fills its picture
    return torch.cat(images), found


def inside_mala(record: Record) -> None:
    """Stage 1 at four shares of hidden patches, and the parts of TBM's sum."""
    folder = record["folder"]
    request = runs.Request("mala", record["dataset"], record["category"], preset=record["preset"])
    test, result = request.load().test, runs.read_maps(folder)
    lessons.style()

    model = runs.load_model(folder, "cpu", "stage1")
    (h, w), ratios = model.grid, (0.25, 0.5, 0.75, 0.9)
    image = test.batch([int(np.flatnonzero(test.labels == 0)[0])])["image"]
    order = torch.rand(1, h * w, generator=torch.Generator().manual_seed(0)).argsort(1)
    fig, axes = plt.subplots(4, 4, figsize=(lessons.WIDTH, 7.4), layout="constrained")
    for j, ratio in enumerate(ratios):
        visible = order[:, : mala.n_visible(h * w, ratio)]
        seen = torch.zeros(1, h * w).scatter(1, visible, 1.0).view(1, 1, h, w)
        seen = F.interpolate(seen, size=image.shape[-2:])
        with torch.no_grad():
            rebuilt = model.reconstruct(image, visible).clamp(0, 1)
        # The tiles are from a run of the preset `small_dinov2` on `mt`; each file holds three, seen above rebuilt.
        tiles = Image.open(results_folder() / "mt" / "mala-masking" / f"{ratio:.2f}.jpg")
        S = tiles.height // 2
        column = [seen * image + 0.5 * (1 - seen), rebuilt]
        column = [picture[0].permute(1, 2, 0) for picture in column]
        column += [tiles.crop((0, top, S, top + S)) for top in (0, S)]
        for axis, picture in zip(axes[:, j], column, strict=True):
            axis.imshow(picture)
            lessons.blank(axis)
        axes[0, j].set_title(f"{ratio:.0%} hidden")
    for axis, name in zip(axes[:, 0], ("seen", "rebuilt", "seen", "rebuilt"), strict=True):
        axis.set_ylabel(name)
    keep(fig, "mala-masking", 70)

    model = runs.load_model(folder, "cpu")
    few = []  # of each kind the defect in the middle of the ranking
    for kind in sorted(set(test.defects[test.labels == 1])):
        members = np.flatnonzero(test.defects == kind)
        few.append(int(members[np.argsort(result["scores"][members])[len(members) // 2]]))
    images = test.batch(few)["image"]
    with torch.no_grad():
        first, last = model.tokens(images)
        decoded = model.decoder(last)
        sources = {"first block": first, "last block": last, "decoder": decoded}
        nothing = [torch.zeros_like(t) for t in sources.values()]
        shares = {}
        for k, name in enumerate(sources):
            alone = [t if i == k else nothing[i] for i, t in enumerate(sources.values())]
            shares[name] = model.tbm(*alone) - model.tbm(*nothing)
        shares["sum"] = model.tbm(first, last, decoded)
    logits = {}
    for name, share in shares.items():
        both = mala.unpatchify(share, model.grid, 2)
        logits[name] = (both[:, 0] - both[:, 1]).numpy()
    titles = [test.defects[i].replace("_", " ") for i in few]
    keep(lessons.parts_of_a_sum(images.numpy(), result["masks"][few], logits, titles, "logit"), "mala-tbm", 55)

    good = np.flatnonzero(test.labels == 0)
    few = [int(good[np.argsort(result["scores"][good])[len(good) // 2]]), *few]
    shown = test.batch(few)["image"].numpy(), result["maps"][few], result["masks"][few]
    titles = [test.defects[i].replace("_", " ") for i in few]
    keep(lessons.over_image(*shown, titles, "anomaly map", (0.0, 1.0)), "mala-maps")


def inside_of(record: Record, figures: dict[str, Figure]) -> None:
    """Keep the figures {part: figure} of a run, with the source of its photographs."""
    source = {"mvtec": MVTEC.format("Photographs"), "mt": TILES.format("s")}.get(record["dataset"], "")
    for part, fig in figures.items():
        fig.supxlabel(source, fontsize=6)
        keep(fig, f"{record['method']}-{record['category'] or record['dataset']}-{part}", 80)


INSIDE = {
    "anovit": lambda record: inside_of(record, inside_anovit(record)),
    "mala": inside_mala,
    "ssltok": lambda record: inside_of(record, inside_ssltok(record)),
    "vitmem": lambda record: inside_of(record, inside_vitmem(record)),
}


# --- painted damage -------------------------------------------------------------------------------------------------


def damage() -> None:
    """The steps of DRAEM's recipe, MALA's two modes, and all kinds of damage, on a bottle, a pill and a tile."""
    lessons.style()
    images, found = good_ones()
    names, size = ("bottle", "pill", "tile"), tuple(images.shape[-2:])
    rng, device = np.random.default_rng(3), images.device
    noise = synthesis.perlin_noise(rng, np.array([[2, 3], [3, 3], [1, 4]]), size, device)
    angles = rng.uniform(-math.pi / 2, math.pi / 2, 3)
    s, y, x = synthesis.turned(synthesis.pixels_above(noise, 0.5), angles, size)
    turned = torch.zeros_like(noise, dtype=torch.bool)
    turned[s, y, x] = True
    bank = synthesis.texture_bank("procedural", size, device)
    chosen = torch.tensor([20, 70, 40])
    texture = bank.images[chosen].float() / 255
    texture[2] = texture[2].mean(0)  # grey, as on grey images
    M = turned[:, None] & found
    result = torch.where(M, torch.lerp(texture, images, 0.2), images)
    fig, axes = plt.subplots(3, 6, figsize=(lessons.WIDTH, 3.9), layout="constrained")
    for j in range(3):
        plots.show(axes[j, 0], images[j])
        axes[j, 1].imshow(noise[j], "RdBu_r", vmin=-1, vmax=1)
        axes[j, 2].imshow(turned[j], "gray")
        axes[j, 3].imshow(found[j, 0], "gray", vmin=0, vmax=1.2)  # a white page would hide white
        plots.show(axes[j, 4], texture[j])
        plots.show(axes[j, 5], result[j])
        axes[j, 0].set_ylabel(names[j])
    for axis, title in zip(axes[0], ("image", "noise", "mask, turned", "object", "texture", "result"), strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        lessons.blank(axis)
    keep(fig, "synthesis-steps")

    kinds = tuple(synthesis.KINDS)
    fig, axes = plt.subplots(len(kinds), 6, figsize=(lessons.WIDTH, 1.2 * len(kinds) + 0.3), layout="constrained")
    for row, kind in zip(axes, kinds, strict=True):
        painted = synthesis.Synthesis((kind,), mode="local", keep_grey=True)(images, 3, 2, found, np.ones(3, bool))
        for j in range(3):
            plots.show(row[2 * j], painted["image"][j])
            row[2 * j + 1].imshow(painted["mask"][j, 0], "gray", vmin=0, vmax=1)
        row[0].set_ylabel(kind)
    for j, title in enumerate(t for name in names for t in (name, "mask")):
        axes[0, j].set_title(title)
    for axis in axes.flat:
        lessons.blank(axis)
    keep(fig, "synthesis-kinds", 72)

    fig, axes = plt.subplots(2, 5, figsize=(lessons.WIDTH, 3.2), layout="constrained")
    columns = [(0, "global"), (0, "local"), (1, "global"), (1, "local"), (2, "global")]
    for (top, below), (j, mode) in zip(axes.T, columns, strict=True):
        recipe = synthesis.Synthesis(mode=mode, keep_grey=True)  # type: ignore[arg-type]
        painted = recipe(images[j : j + 1], 4, (3, 1, 2)[j], found[j : j + 1], np.array([True]))
        plots.show(top, painted["image"][0])
        below.imshow(painted["mask"][0, 0], "gray", vmin=0, vmax=1)
        top.set_title(f"{names[j]}, {mode}")
    axes[0, 0].set_ylabel("damaged")
    axes[1, 0].set_ylabel("mask")
    for axis in axes.flat:
        lessons.blank(axis)
    keep(fig, "mala-damage")


def finished_runs(given: list[str]) -> list[Record]:
    """The runs below the folder that is given, or below `runs`, that have maps."""
    return [r for r in read_records(Path(given[0] if given else "runs")) if (r["folder"] / "maps.npz").exists()]


def main(arguments: list[str]) -> None:
    what, *given = arguments or ["nothing"]
    if what == "intro":
        fig = intro(INTRO)
    elif what == "compare":
        assert set(ORDER) <= set(methods.METHODS)
        kept = results_folder() / "compare.npz"
        maps = (dict(np.load(kept)) if kept.exists() else {}) | drawn(COMPARE, finished_runs(given))
        with atomic_write(kept) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **maps)  # type: ignore[arg-type]
        fig = compare(COMPARE, maps)
    elif what == "inside" and given:
        lessons.style()
        record = read_record(given[0]) | {"folder": Path(given[0])}
        return INSIDE[record["method"]](record)
    elif what == "damage":
        return damage()
    elif what == "families":
        return families(finished_runs(given))
    else:
        sys.exit(__doc__)
    out = results_folder() / f"{what}.png"
    plots.save(fig, out, dpi=100)
    print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
