"""The folder of a run: whose it is, what is written to it, and what is read from it."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vitad import data as data_sets
from vitad import methods
from vitad.data import Found, ImageSet
from vitad.errors import UserError
from vitad.files import atomic_write, read_safetensors
from vitad.methods.base import Method
from vitad.resampling import Resamples, draw, fingerprint, image_auroc, mean_of
from vitad.runs.machine import find_device
from vitad.runs.record import Record, read_record
from vitad.runs.request import IDENTITY, Request, hash_of, settings_of
from vitad.settings import resolve

UNFINISHED = ".run"  # folder within: the request and the training state of a run that is not finished
BEFORE_THE_RECORD = (
    *("checkpoint.safetensors", "maps.npz", "scores.csv", "resamples.npz", "history.csv", "heatmaps.png"),
)


def claim(folder: Path, request: Request, data: Found) -> Record | None:
    """The record, if `folder` holds this very run finished; None if the run can be made or resumed there.

    Raises
    ------
    UserError
        `folder` is a file, or holds another run or other files.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Give a folder with --out.")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if (folder / "record.json").exists():
        record = previous = read_record(folder)
    elif (folder / UNFINISHED / "request.json").exists():
        record, previous = None, json.loads((folder / UNFINISHED / "request.json").read_text())
    elif {p.name for p in folder.iterdir()} == {UNFINISHED}:
        return None
    else:
        raise UserError(f"{folder} holds files that are not a run. Give another folder with --out.")
    previous = _described(previous)
    if hash_of(previous) != request.hash:
        key, theirs, ours = _first_difference(previous, request)
    elif (theirs := previous["data"]) != (ours := data_identity(data, previous["data_files"])):
        key = "data"
    else:
        return record
    raise UserError(
        f"{folder} holds another run: {key} is {theirs!r} there and {ours!r} here. Give another folder with --out."
    )


def describe(request: Request, data: Found) -> dict[str, Any]:
    """What `request.json` keeps of an unfinished run, and what a record keeps beside its results."""
    names = ("method", "revision", "dataset", "split", "preset", "seed", "settings")
    return {
        **{name: getattr(request, name) for name in names},
        "category": data.category,  # none where all are asked for and there are none
        "weights": {"asked": request.weights},
        "data": data_identity(data),
        "data_files": "contents",
    }


def data_identity(data: Found, files: str = "contents") -> str:
    """Hash of the files of a split. Records before version 0.2 have one of their names and sizes."""
    return data.contents_sha256() if files == "contents" else data.names_sha256()


def _described(previous: Record) -> dict[str, Any]:
    """A record, or what is kept of an unfinished run, of this version or an older one, in the form of `describe`."""
    if "protocol" in previous:
        protocol = previous["protocol"]
        return previous | {"data": protocol["data_sha256"], "data_files": protocol.get("data_files", "names")}
    if "weights_asked" in previous:
        return previous | {"weights": {"asked": previous["weights_asked"]}, "data_files": "names"}
    return previous


def _first_difference(previous: Mapping[str, Any], request: Request) -> tuple[str, Any, Any]:
    """(name, value there, value here) of the first thing that differs."""

    def flat(described: Mapping[str, Any]) -> dict[str, Any]:
        names = ("seed", "preset", "category", "method", "dataset", "split")
        weights, revision = described["weights"]["asked"], described.get("revision", 1)
        settings = settings_of(described)
        return {n: described[n] for n in names} | settings | {"revision": revision, "weights": weights}

    asked = {name: getattr(request, name) for name in (*IDENTITY, "preset")}
    theirs, ours = flat(previous), flat(asked | {"weights": {"asked": request.weights}})
    key = next((name for name in ours if theirs.get(name) != ours[name]), "weights")
    return key, theirs.get(key), ours[key]


@contextmanager
def unfinished(folder: Path, request: Request, data: Found, writes: bool = True) -> Iterator[Path]:
    """Mark `folder` as this run, unfinished; gives the path for its training state.

    The mark goes when the run is complete. A run that fails before there is a state worth resuming leaves nothing.
    Of several processes only the one that `writes` does any of this.
    """
    mark = folder / UNFINISHED
    state = mark / "state.pt"
    if not writes:
        yield state
        return
    try:
        with atomic_write(mark / "request.json") as temporary:
            temporary.write_text(json.dumps(describe(request, data)))
        yield state
    except BaseException:
        if folder.is_dir() and not state.exists():
            for written in [*(folder / name for name in BEFORE_THE_RECORD), *folder.glob("checkpoint-*.safetensors")]:
                written.unlink(missing_ok=True)
            tidy(folder)
            if not any(folder.iterdir()):
                folder.rmdir()
        raise
    tidy(folder)


def tidy(folder: Path) -> None:
    """Remove what is needed only until a run is finished, and what a killed one had begun to write."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    for half in folder.glob(".*.tmp"):
        half.unlink()


# --- what is written ----------------------------------------------------------------------------------------------


def write_maps(folder: Path, test: ImageSet, maps: np.ndarray, scores: np.ndarray) -> None:
    """`maps.npz`: maps (N,H,W), masks (N,H,W) bool, scores, labels, paths and defects (N,)."""
    arrays = dict(
        maps=maps, scores=scores, masks=test.masks, labels=test.labels, paths=test.paths, defects=test.defects
    )
    with atomic_write(folder / "maps.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def write_scores(folder: Path, test: ImageSet, scores: np.ndarray) -> None:
    """`scores.csv`: image, kind of defect, label and score of each test image."""
    lines = zip(test.paths, test.defects, test.labels, scores, strict=True)
    rows = [dict(image=str(p), defect=str(d), label=int(y), score=f"{s:.6g}") for p, d, y, s in lines]
    _write_rows(folder / "scores.csv", rows)


def write_resamples(folder: Path, test: ImageSet, by_category: Mapping[str, Resamples]) -> None:
    """`resamples.npz`: each metric on the resamples of the test set, and `test_set`, which says what set that is.

    Of several categories it holds the mean, and beside it `CATEGORY:METRIC` of each.
    """
    columns = dict(mean_of(list(by_category.values())))
    if len(by_category) > 1:
        columns |= {f"{c}:{name}": values for c, found in by_category.items() for name, values in found.items()}
    arrays = {name: values for name, values in columns.items() if values is not None}
    arrays["test_set"] = np.array(fingerprint(test.paths, test.groups, test.labels))
    with atomic_write(folder / "resamples.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """`history.csv`: a row an epoch; no file where nothing was trained."""
    _write_rows(folder / "history.csv", history)


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    if rows := list(rows):
        with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            table.writeheader()
            table.writerows(rows)


# --- what is read -------------------------------------------------------------------------------------------------


def load_model(folder: str | Path, device: str = "auto", phase: str | None = None) -> Method:
    """The trained model of a finished run, in evaluation mode.

    Parameters
    ----------
    folder
        Of the run.
    device
        `auto`, `cpu` or `cuda`.
    phase
        Take the weights after this phase of training instead of the last ones.

    Raises
    ------
    UserError
        No finished run there, or its checkpoint is missing or does not fit.
    """
    record = read_record(folder)
    module = methods.get(record["method"])
    path = Path(folder) / (f"checkpoint-{phase}.safetensors" if phase else "checkpoint.safetensors")
    tensors, metadata = read_safetensors(path)
    method = metadata.get("vitad_method")
    if method != record["method"]:
        raise UserError(
            f"{path} is a checkpoint of {method or 'something else'}, but the record says {record['method']}. "
            "Run it again into another folder."
        )
    settings = resolve(module.Settings, {"recorded": {}}, "recorded", record["settings"])
    model = module.Model(settings, "random").to(find_device(device))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:
        raise UserError(f"{path} does not fit: {str(e).splitlines()[-1].strip()}") from e
    return model.eval()


def read_maps(folder: str | Path) -> dict[str, np.ndarray]:
    """`maps.npz` of a run: arrays `maps, masks, scores, labels, paths, defects`."""
    try:
        with np.load(Path(folder) / "maps.npz") as file:
            return dict(file)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no maps.npz. Run it again: records that come with the book have none."
        ) from None


def read_resamples(folder: str | Path, category: str | None = None) -> dict[str, np.ndarray]:
    """`resamples.npz` of a run: arrays by metric, and the string `test_set`.

    A run before there was such a file has those of image AUROC if it kept its scores, else {}. Of a run over several
    categories they are of the mean, or of one `category` as its record names it, then without `test_set`.
    """
    found: dict[str, np.ndarray] = {}
    for name, read in {"resamples.npz": _read_arrays, "scores.csv": image_resamples_from_scores}.items():
        if (path := Path(folder) / name).exists():
            found = _cached(read, path.parent, path.stat().st_mtime_ns)
            break
    if category is None:
        return {name: values for name, values in found.items() if ":" not in name}
    prefix = f"{category}:"
    return {name.removeprefix(prefix): values for name, values in found.items() if name.startswith(prefix)}


@lru_cache(1024)  # a table asks for those of the same runs again and again
def _cached(read: Callable[[Path], dict[str, np.ndarray]], folder: Path, changed: int) -> dict[str, np.ndarray]:
    return read(folder)


def _read_arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "resamples.npz") as file:
        return dict(file)


def image_resamples_from_scores(
    folder: str | Path, kind: str | None = None, category: str | None = None
) -> dict[str, np.ndarray]:
    """What `resamples.npz` holds, for image AUROC alone, from `scores.csv`.

    Groups come from the paths, as the data set says. For several categories it is their mean, as in the record. With
    `kind` or `category` only the good images and that kind of defect count, of the category or of all together.
    """
    record = read_record(folder)
    with open(Path(folder) / "scores.csv", newline="") as file:
        rows = [
            (row["image"], int(row["label"]), float(row["score"]))
            for row in csv.DictReader(file)
            if row["image"].startswith(f"{category}/" if category else "")
            and (kind is None or int(row["label"]) == 0 or row["defect"] == kind)
        ]
    paths, labels, scores = map(np.array, zip(*rows, strict=True))
    groups = np.array(data_sets.get(record["dataset"]).groups(paths.tolist()))
    several = {}
    for name in [""] if kind or category else record.get("metrics_by_category", [""]):
        # Paths begin with the category, and in joined data sets with the data set, as the name of the category does.
        places = [f"{name}/", f"{name.partition('/')[2]}/"] if name else [""]
        chosen = next(c for place in places if (c := np.char.startswith(paths, place)).any())
        weights = draw(paths[chosen], groups[chosen], labels[chosen])
        several[name] = image_auroc(scores[chosen], labels[chosen], weights).astype(np.float32)
    found = {
        "image_auroc": np.mean(list(several.values()), 0),
        "test_set": np.array(fingerprint(paths, groups, labels)),
    }
    return found | {f"{name}:image_auroc": values for name, values in several.items() if name}


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """`history.csv` of a run, numbers as floats; empty where nothing was trained."""
    path = Path(folder) / "history.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{k: v if k == "phase" else float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
