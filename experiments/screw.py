"""What a reconstruction error gives on the screws of MVTec AD, and how much of it is the brightness of the images.

    python experiments/screw.py               what needs no training
    python experiments/screw.py RUN [RUN ...]

RUN is the folder of a finished run on `mvtec` `screw`, with its checkpoint. The data are found below `VITAD_DATA`.
Nothing is chosen here: the test images are looked at to explain a printed number, 100.0 in Table 3 of Yang & Guo 2024.

The rows of `screw.json`, beside this script, hold the image AUROC of the test images and its interval over their
resamples (`vitad.resampling`). A higher score means more anomalous; with the sign turned, an AUROC of a is 1 - a.

    scored     a method; `brightness`, the mean of the image, for each category at hand, with its `values`; `mid-grey`
               and `mean training image`, the squared error to a picture that no network has painted, smoothed as that
               of l2cae
    state      `trained`, or `untrained`, the network of the preset `small` as a run begins; none where there is nothing
               to train
    seed       of the run, or of the untrained network; none where nothing is drawn
    run        hash of the record of a trained network; none otherwise
    images     `as they are`, or `scaled`, each to the mean brightness of the training images
    score      `own`, the method's, which for autoencoders is the maximum of the map; or `mean`, of the map

A row of the same names is replaced.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitad import data, methods
from vitad.blocks import gaussian_blur
from vitad.data import ImageSet
from vitad.methods.base import Method
from vitad.metrics import auroc
from vitad.resampling import draw, image_auroc, intervals
from vitad.review import request_of
from vitad.runs import Request, hash_of, load_model, read_record, score
from vitad.settings import resolve

OUT = Path(__file__).with_suffix(".json")
NAMES = ("scored", "category", "state", "seed", "images", "score")
CPU = torch.device("cpu")
PX, SIGMA = 256, 4.0  # of l2cae, where there is no network
AUTOENCODERS = ("l2cae", "vitmem", "anovit")  # those of which Table 3 prints 100.0


class Scaled:
    """Images of an `ImageSet`, each multiplied so that its mean is `brightness`."""

    def __init__(self, images: ImageSet, brightness: float):
        self.images, self.brightness, self.size = images, brightness, images.size

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices, device="cpu") -> dict[str, Tensor]:
        x = self.images.batch(indices, device)["image"]
        return {"image": (x * self.brightness / x.mean((1, 2, 3), keepdim=True)).clamp(0, 1)}


def every(images: ImageSet | Scaled) -> Tensor:
    """All images (N,3,H,W)."""
    return images.batch(range(len(images)))["image"]


def brightness(images: ImageSet) -> Tensor:
    """The mean of each image (N,)."""
    return every(images).mean((1, 2, 3))


def treatments(split: data.Split) -> dict[str, ImageSet | Scaled]:
    """The test images, as they are and scaled."""
    return {"as they are": split.test, "scaled": Scaled(split.test, float(brightness(split.train).mean()))}


def row(test: ImageSet, scores: np.ndarray, **names) -> dict:
    """A row of the JSON file; `scores` (N,) are of the test images."""
    metrics = {"image_auroc": auroc(scores, test.labels == 1)}
    weights = draw(test.paths, test.groups, test.labels)
    resamples = {"image_auroc": image_auroc(scores, test.labels, weights)}
    return names | {"metrics": metrics, "intervals": intervals(metrics, resamples)}


def of_model(model: Method, split: data.Split, **names) -> list[dict]:
    """The rows of a method's model."""
    rows = []
    for treatment, images in treatments(split).items():
        maps, own = score(model, images, CPU, 16, model.settings.amp)
        for rule, scores in {"own": own, "mean": maps.mean((1, 2))}.items():
            rows.append(row(split.test, scores, **names, images=treatment, score=rule))
    return rows


def of_run(folder: str) -> list[dict]:
    """The rows of a finished run."""
    record, model = read_record(folder), load_model(folder, "cpu")
    names = {name: record[name] for name in ("category", "seed")} | {"run": hash_of(record)}
    state = "trained" if model.phases() else None
    return of_model(model, request_of(record).load(), scored=record["method"], state=state, **names)


def of_untrained(method: str) -> list[dict]:
    """The rows of a network before its first step, of three seeds."""
    rows = []
    for seed in range(3):
        request = Request(method, "mvtec", category="screw", preset="small", seed=seed)
        module = methods.get(method)
        torch.manual_seed(seed)
        model = module.Model(resolve(module.Settings, module.PRESETS, request.preset))
        names = {"category": request.category, "seed": seed, "run": None}
        rows += of_model(model, request.load(), scored=method, state="untrained", **names)
    return rows


def of_no_method() -> list[dict]:
    """The rows of pictures that no network has painted, and of brightness alone."""
    rows, names = [], {"category": "screw", "state": None, "seed": None, "run": None}
    split = data.load("mvtec", category="screw", image_size=PX)
    pictures = {"mid-grey": torch.tensor(0.5), "mean training image": every(split.train).mean(0)}
    for name, picture in pictures.items():
        for treatment, images in treatments(split).items():
            maps = gaussian_blur((every(images) - picture).square().mean(1), SIGMA)
            for rule, scores in {"own": maps.amax((1, 2)), "mean": maps.mean((1, 2))}.items():
                rows.append(row(split.test, scores.numpy(), scored=name, **names, images=treatment, score=rule))
    for category in ("bottle", "pill", "screw"):
        split = data.load("mvtec", category=category, image_size=PX)
        names |= {"category": category, "images": "as they are", "score": "mean"}
        scores, bad = brightness(split.test).numpy(), split.test.labels == 1
        values = {"training": brightness(split.train), "good": scores[~bad], "defective": scores[bad]}
        values = {name: [round(float(v), 3) for v in some] for name, some in values.items()}
        rows.append(row(split.test, scores, scored="brightness", **names) | {"values": values})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run on mvtec screw, with its checkpoint")
    rows = json.loads(OUT.read_text()) if OUT.exists() else []
    runs = parser.parse_args().runs
    for found in map(of_run, runs) if runs else (of_no_method(), *map(of_untrained, AUTOENCODERS)):
        for new in found:
            print(*(new[name] for name in NAMES), f"{new['metrics']['image_auroc']:.3f}", sep=", ", flush=True)
            rows = [r for r in rows if any(r[name] != new[name] for name in NAMES)] + [new]
        OUT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
