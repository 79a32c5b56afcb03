"""What a finished run says of new images: score, verdict, and where.

    vitad predict runs/my-parts photographs/ --false-alarms 0.05 --out verdicts

The threshold comes from good images that were not trained on: those of the run's test set, or others that are given.
No defective image has a say in it.
"""

from __future__ import annotations

import csv
import html
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage, stats
from tqdm import tqdm

from vitad.data import ImageSet
from vitad.data.records import IMAGE_SUFFIXES, Record
from vitad.errors import UserError
from vitad.methods.base import Method
from vitad.runs import find_device, load_model, read_maps, read_record, score
from vitad.show.plots import HEAT, OUTLINE, heat_range

MOST_REGIONS = 20  # of an image, the ones with the highest peaks
SIDE = 384  # px, longer side of a picture in the report
EIGHT = np.ones((3, 3), bool)  # regions are 8-connected, as those of PRO


@dataclass(frozen=True)
class Threshold:
    """Above it a score is an alarm."""

    value: float
    n_good: int | None = None  # held-out good images that it was found with; None: the user's own
    false_alarms: float | None = None  # expected share of new good images above it
    interval: tuple[float, float] | None = None  # 95 %, of that share

    @classmethod
    def of_good(cls, scores: np.ndarray, false_alarms: float) -> Threshold:
        """Threshold with at most this expected share of false alarms, or the least that so few scores allow.

        If k of n good scores lie above the threshold, which is the next one, the share of all good images above it
        has the distribution Beta(k + 1, n - k), whatever that of the scores (order statistics). Its mean is
        (k + 1) / (n + 1): a share of .01 takes 99 good images.

        Examples
        --------
        >>> import numpy as np
        >>> t = Threshold.of_good(np.arange(39.0), 0.05)
        >>> t.value, t.n_good, t.false_alarms
        (37.0, 39, 0.05)
        """
        if not 0 < false_alarms < 1:
            raise UserError(f"false alarms {false_alarms} have to be a share between 0 and 1, such as 0.05.")
        n = len(scores)
        if not n:
            raise UserError("no held-out good image gives a threshold. Name some with --good, or give --threshold.")
        k = max(0, int(false_alarms * (n + 1) + 1e-9) - 1)
        low, high = stats.beta.ppf((0.025, 0.975), k + 1, n - k)
        return cls(float(np.sort(scores)[n - 1 - k]), n, (k + 1) / (n + 1), (float(low), float(high)))

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.4g}, as given"
        low, high = self.interval
        return (
            f"{self.value:.4g}; about {self.false_alarms:.1%} [{low:.1%}, {high:.1%}] of good images lie above it, "
            f"by {self.n_good} held-out good ones"
        )


@dataclass(frozen=True)
class Region:
    """Connected pixels of the map above its threshold, as a box of the image in px, and its highest value."""

    x: int
    y: int
    width: int
    height: int
    area: float  # share of the image
    peak: float


@dataclass(frozen=True)
class Prediction:
    """Of one image. `regions` has the highest peak first."""

    path: str
    score: float
    defective: bool
    regions: tuple[Region, ...]
    picture: str  # in the folder that is written


@dataclass(frozen=True)
class Predictions:
    """Of all images that could be read, the highest score first."""

    images: tuple[Prediction, ...]
    threshold: Threshold
    region_threshold: Threshold
    unreadable: tuple[str, ...]


def predict(
    run: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    false_alarms: float = 0.05,
    threshold: float | None = None,
    good: Sequence[str | Path] = (),
    device: str = "auto",
) -> Predictions:
    """Score new images, and write what is found.

    `out` gets `report.html`, which opens offline and shows the highest score first, `predictions.csv`,
    `predictions.json`, and a picture of each image beside its map.

    Parameters
    ----------
    run
        Folder of a finished run.
    images
        Files, and folders of which all images are taken, sub-folders included.
    out
        Folder; whole or not at all. Earlier predictions there are replaced.
    false_alarms
        Share of good images that may be called defective. Regions have a threshold of their own: it is the share of
        good images with a region.
    threshold
        Of the score, instead of the one that `false_alarms` gives.
    good
        Good images that were not trained on; without them those of the run's test set are taken.
    device
        `auto`, `cpu` or `cuda`.

    Raises
    ------
    UserError
        No finished run, no image, a share that is none, or an `out` that holds other files.
    """
    record, out = read_record(run), Path(out).expanduser()
    if out.exists() and not (out / "predictions.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds files that are no predictions. Give another folder with --out.")
    files = list(_files(images))
    model = load_model(run, device)
    by_good, of_region, unreadable = thresholds(run, model, false_alarms, good, device)
    of_score = by_good if threshold is None else Threshold(threshold)
    limits = heat_range(read_maps(run)["maps"])
    found: list[Prediction] = []

    with _replaced(out) as folder:
        (folder / "pictures").mkdir()
        for number, (path, value, grid) in enumerate(_scored(model, files, device)):
            if grid is None:
                unreadable.append(str(path))
                continue
            image, picture = _opened(path), f"pictures/{number:05}-{path.stem}.jpg"
            regions = tuple(_regions(grid, of_region.value, image.size))
            _draw(image, grid, grid > of_region.value, limits).save(folder / picture, quality=88)
            found.append(Prediction(str(path), value, value > of_score.value, regions, picture))
        found.sort(key=lambda p: -p.score)
        predictions = Predictions(tuple(found), of_score, of_region, tuple(unreadable))
        _write(predictions, record, folder)
    return predictions


def thresholds(
    run: str | Path, model: Method, false_alarms: float, good: Sequence[str | Path] = (), device: str = "auto"
) -> tuple[Threshold, Threshold, list[str]]:
    """Those of the score and of the map's highest value, and which of the good images cannot be read.

    Parameters as in `predict`; `model` is that of the run.
    """
    unreadable = []
    if good:
        held_out = list(_scored(model, list(_files(good)), device))
        unreadable = [str(path) for path, _, grid in held_out if grid is None]
        scores = np.array([value for _, value, grid in held_out if grid is not None])
        peaks = np.array([grid.max() for _, _, grid in held_out if grid is not None])
    else:
        known = read_maps(run)
        scores, peaks = known["scores"][known["labels"] == 0], known["maps"][known["labels"] == 0].max((1, 2))
    return Threshold.of_good(scores, false_alarms), Threshold.of_good(peaks, false_alarms), unreadable


def _files(images: Sequence[str | Path]) -> Iterator[Path]:
    """The files of `predict`, each once."""
    seen = set()
    for given in map(Path, images):
        inside = sorted(p for p in given.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not given.exists():
            raise UserError(f"{given} does not exist. Give image files, or folders that hold some.")
        if given.is_dir() and not inside:
            raise UserError(f"{given} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        for path in inside if given.is_dir() else [given]:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield path


def _scored(model: Method, files: Sequence[Path], device: str) -> Iterator[tuple[Path, float, np.ndarray | None]]:
    """(file, score, map (H,W)) of each; the map is None where the file cannot be read. Few are in memory at a time."""
    s, B = model.settings, model.settings.batch_size
    for start in tqdm(range(0, len(files), B), "predict", unit="batch", leave=False):
        part = files[start : start + B]
        records = [Record(path.resolve(), 0, "new") for path in part]
        images = ImageSet(records, Path(records[0].path.anchor), s.image_size, skip_bad=True)
        maps, scores = score(model, images, find_device(device), B, s.amp)
        seen = {record.path: (float(scores[i]), maps[i]) for i, record in enumerate(images.records)}
        for path, record in zip(part, records, strict=True):
            yield path, *seen.get(record.path, (0.0, None))


def _regions(grid: np.ndarray, threshold: float, size: tuple[int, int]) -> list[Region]:
    """Those of a map (H,W) whose image is `size` (width, height) px."""
    labels, n = ndimage.label(grid > threshold, EIGHT)
    fx, fy = size[0] / grid.shape[1], size[1] / grid.shape[0]
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        inside = labels[rows, columns] == number
        left, top = round(columns.start * fx), round(rows.start * fy)
        box = (left, top, round(columns.stop * fx) - left, round(rows.stop * fy) - top)
        peak = float(grid[rows, columns][inside].max())
        regions.append(Region(*box, area=float(inside.sum() / grid.size), peak=peak))
    return sorted(regions, key=lambda region: -region.peak)[:MOST_REGIONS]


def _opened(path: Path) -> Image.Image:
    """The image as it is looked at, in colour."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def _draw(image: Image.Image, grid: np.ndarray, above: np.ndarray, limits: tuple[float, float]) -> Image.Image:
    """The image, and beside it the same under its map (H,W), with the regions (H,W) outlined."""
    factor = SIDE / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    small = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
    low, high = limits
    heat = ((grid - low) / (high - low)).clip(0, 1).astype(np.float32)
    heat = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR))[..., None]
    colour = matplotlib.colormaps[HEAT](heat[..., 0])[..., :3] * 255
    under = small * (1 - 0.75 * heat) + colour * 0.75 * heat
    inside = np.asarray(Image.fromarray(above).resize(size, Image.Resampling.NEAREST))
    under[inside & ~ndimage.binary_erosion(inside, EIGHT, border_value=1)] = [
        int(OUTLINE[i : i + 2], 16) for i in (1, 3, 5)
    ]
    return Image.fromarray(np.concatenate([small, under], 1).round().astype(np.uint8))


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` when the block ends without an error."""
    new = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    except OSError as e:
        raise UserError(f"cannot write {folder}: {e.strerror or e}. Mend this, or give another --out.") from e
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(found: Predictions, record: dict[str, Any], folder: Path) -> None:
    """`predictions.json`, `predictions.csv` and `report.html`."""
    described = {"run": {name: record[name] for name in ("method", "dataset", "category", "preset", "seed")}}
    (folder / "predictions.json").write_text(json.dumps(described | asdict(found), indent=2) + "\n")
    with open(folder / "predictions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "score", "verdict", "regions", "x", "y", "width", "height", "area", "peak"])
        for image in found.images:
            first = asdict(image.regions[0]).values() if image.regions else [""] * 6
            rows.writerow([image.path, f"{image.score:.6g}", _verdict(image), len(image.regions), *first])
    (folder / "report.html").write_text(_report(found, record))


def _verdict(image: Prediction) -> str:
    return "defective" if image.defective else "good"


def _report(found: Predictions, record: dict[str, Any]) -> str:
    cards = "\n".join(
        f'<figure class="{_verdict(image)}"><img src="{image.picture}" loading="lazy" alt="{html.escape(image.path)}: '
        f'the image, and its anomaly map with {len(image.regions)} regions outlined">'
        f"<figcaption><b>{_verdict(image)}</b>, score {image.score:.4g}, {_where(image)}<br>"
        f"{html.escape(image.path)}</figcaption></figure>"
        for image in found.images
    )
    bad = "".join(f"<li>{html.escape(path)}</li>" for path in found.unreadable)
    n = sum(image.defective for image in found.images)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{n} of {len(found.images)} images are called defective</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
main {{ display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }}
figure {{ margin: 0; overflow-wrap: anywhere }} img {{ width: 100%; display: block }}
figure {{ border-top: .3rem solid #4477aa; padding-top: .3rem }} figure.defective {{ border-color: #cc3311 }}
</style>
<h1>{n} of {len(found.images)} images are called defective</h1>
<p>By {html.escape(record["method"])}, trained on {html.escape(record["dataset"])}. The highest score comes first.
On the left is the image, on the right its anomaly map, with the regions above
{found.region_threshold.value:.4g} outlined.</p>
<p>Threshold of the score: {html.escape(str(found.threshold))}.</p>
{f"<p>Not readable, and passed over:</p><ul>{bad}</ul>" if bad else ""}
<main>
{cards}
</main></html>
"""


def _where(image: Prediction) -> str:
    if not image.regions:
        return "no region"
    r = image.regions[0]
    more = f", and {len(image.regions) - 1} more" if len(image.regions) > 1 else ""
    return f"{r.width} x {r.height} px at ({r.x}, {r.y}){more}"
