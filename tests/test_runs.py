"""A run and its record: contracts of the files, resuming, what is null, and the command line around it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vitad
from vitad import data, methods, runs, training
from vitad.backbones import import_timm
from vitad.cli import main
from vitad.errors import UserError
from vitad.files import read_safetensors
from vitad.metrics import evaluate
from vitad.runs import pipeline
from vitad.settings import as_json, resolve
from vitad.show import plots
from vitad.show.compare import compare

KEYS = [
    *("method", "paper", "revision", "dataset", "category", "split", "preset", "seed", "settings", "overrides"),
    *("protocol", "weights", "metrics", "intervals", "counts", "timings", "environment", "git", "finished"),
]
FILES = {"record.json", "maps.npz", "scores.csv", "resamples.npz", "checkpoint.safetensors", "heatmaps.png"}


@pytest.fixture(scope="module", params=methods.METHODS)
def finished(request, toy_root, tmp_path_factory):
    """(folder, record) of a run of each method."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    asked = dict(data_root=toy_root, category="gear", preset="smoke", seed=3, device="cpu")
    return out, runs.run(request.param, **asked, out=out)


@pytest.fixture(scope="module")
def finished_anovit(toy_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    runs.run("anovit", data_root=toy_root, preset="smoke", device="cpu", out=out)
    return out


@pytest.fixture
def smoke(toy_root, tmp_path, monkeypatch):
    """Run patchknn, the fastest, into `tmp_path/run`. It draws one heatmap, since all of them take half of the time."""

    def run(method="patchknn", **options):
        options = dict(data_root=toy_root, preset="smoke", device="cpu", out=tmp_path / "run") | options
        with monkeypatch.context() as patch:
            patch.setattr(plots, "examples", lambda *_: [0])
            return runs.run(method, **options)

    return run


def snapshot(folder):
    """Names, contents and times of all files."""
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def interrupt(*_):
    raise KeyboardInterrupt


def same_tensors(one, other):
    (one, other) = (load_file(folder / "checkpoint.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- what a run leaves ------------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_nothing_else(finished):
    out, record = finished
    phases = list(dict.fromkeys(row["phase"] for row in runs.read_history(out)))
    kept = {f"checkpoint-{phase}.safetensors" for phase in phases[:-1]}
    assert {p.name for p in out.iterdir()} == FILES | kept | ({"history.csv"} if phases else set())
    assert bool(phases) == bool(record["counts"]["epochs"]) and bool(kept) == (record["method"] in ("mala", "fanogan"))
    with Image.open(out / "heatmaps.png") as image:
        image.verify()
        assert image.format == "PNG" and min(image.size) > 100


def test_the_record_has_the_keys_of_the_design(finished):
    out, record = finished
    assert json.loads((out / "record.json").read_text()) == record
    assert list(record) == KEYS
    assert list(record["metrics"]) == ["image_auroc", "pixel_auroc", "pixel_ap", "pro"]
    assert all(0 <= value <= 1 for value in record["metrics"].values())


def test_the_record_says_what_was_asked(finished):
    _, record = finished
    module = methods.get(record["method"])
    assert record["paper"] == module.PAPER
    assert (record["dataset"], record["category"], record["split"]) == ("toy", "gear", None)
    assert (record["preset"], record["seed"], record["overrides"]) == ("smoke", 3, {})
    assert record["settings"] == as_json(resolve(module.Settings, module.PRESETS, "smoke"))
    assert record["weights"] == {"asked": "auto", "source": "random"}
    protocol = record["protocol"]
    assert protocol["image_size"] == [64, 64] and protocol["mask_resize"] == "nearest"
    assert (protocol["mask_threshold"], protocol["pro_limit"], protocol["pro_connectivity"]) == (0, 0.3, 8)
    assert {"smoothing", "image_score", "checkpoint", "normalisation"} <= protocol.keys()


def test_the_record_says_what_came_out_and_where(finished):
    out, record = finished
    counts = record["counts"]
    assert (counts["train"], counts["test_good"], counts["test_defective"]) == (12, 4, 8)
    assert (counts["empty_masks"], counts["skipped"]) == (0, [])
    tensors, model = load_file(out / "checkpoint.safetensors"), runs.load_model(out, "cpu")
    trained = bool(model.phases())
    parameters = {name: p for name, p in model.named_parameters() if name in tensors}
    assert parameters.keys() == dict(model.named_parameters()).keys()
    assert counts["parameters"] == sum(tensors[name].numel() for name in parameters)
    assert counts["trained_parameters"] == sum(p.numel() for p in parameters.values() if p.requires_grad)
    assert counts["epochs"] == sum(phase.epochs for phase in model.phases())
    times = record["timings"]
    assert all(seconds >= 0 for seconds in times.values()) and times["test_images_per_s"] > 0
    assert (times["train_s"] > 0.01) == trained
    environment = record["environment"]
    assert environment["torch"] == torch.__version__ and environment["vitad"] == vitad.__version__
    assert environment["device"] == "cpu" and environment["precision"] == "float32"
    assert datetime.fromisoformat(record["finished"]).tzinfo is not None


def test_the_record_names_the_commit():
    root = Path(vitad.__file__).parents[1]
    state = runs.git_state()
    if not (root / ".git").exists():
        assert state is None
        return
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert state["commit"] == head and type(state["changed"]) is bool


def test_maps_have_the_contract_of_the_design(finished, toy_root):
    out, record = finished
    maps = runs.read_maps(out)
    assert set(maps) == {"maps", "masks", "scores", "labels", "paths", "defects"}
    N = 12
    assert maps["maps"].shape == maps["masks"].shape == (N, 64, 64)
    assert maps["maps"].dtype == np.float32 and maps["masks"].dtype == bool
    for name, kind in {"scores": "f", "labels": "i", "paths": "U", "defects": "U"}.items():
        assert maps[name].shape == (N,) and maps[name].dtype.kind == kind
    test = data.load("toy", toy_root, "gear", image_size=64).test
    for name in ("masks", "labels", "paths", "defects"):
        assert np.array_equal(maps[name], getattr(test, name))
    assert np.isfinite(maps["maps"]).all() and np.isfinite(maps["scores"]).all()


def test_metrics_follow_from_the_maps(finished):
    out, record = finished
    maps = runs.read_maps(out)
    assert record["metrics"] == evaluate(maps["maps"], maps["masks"], maps["scores"], maps["labels"])


def test_the_checkpoint_gives_the_same_maps_again(finished, toy_root):
    out, record = finished
    model = runs.load_model(out, "cpu")
    assert not model.training
    test = data.load("toy", toy_root, "gear", image_size=64).test
    kept = runs.read_maps(out)
    same = runs.score(model, test, torch.device("cpu"), model.settings.batch_size, amp=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several share other batches otherwise, and round otherwise
    try:
        whole, fives = (runs.score(model, test, torch.device("cpu"), n, False) for n in (model.settings.batch_size, 5))
    finally:
        torch.set_num_threads(threads)
    for first, second in (same, (kept["maps"], kept["scores"])), (fives, whole):
        for values, expected in zip(first, second, strict=True):
            np.testing.assert_allclose(values, expected, atol=1e-6)
    tensors, metadata = read_safetensors(out / "checkpoint.safetensors")
    assert metadata["vitad_method"] == record["method"] and json.loads(metadata["settings"]) == record["settings"]


def test_history_is_kept_beside_the_record(finished):
    out, record = finished
    history = runs.read_history(out)
    assert len(history) == record["counts"]["epochs"]
    if history:
        epochs = Counter(row["phase"] for row in history)
        expected = [(phase, n) for phase, last in epochs.items() for n in range(1, last + 1)]
        assert [(row["phase"], row["epoch"]) for row in history] == expected
        losses = set(history[0]) - {"phase", "epoch", "seconds"}
        signed = {"critic", "fake"} if record["method"] == "fanogan" else set()  # differences of a critic's numbers
        assert losses and all(history[0][k] > 0 for k in losses - signed)
        assert history[-1]["seconds"] == record["timings"]["train_s"]


def test_records_of_many_runs_are_found(finished):
    out, record = finished
    (found,) = runs.read_records(out.parent)
    assert found == record | {"folder": out}


# --- seeds, overrides, precision --------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_result(finished, smoke, tmp_path):
    out, record = finished
    for name, seed in {"same": record["seed"], "other": record["seed"] + 1}.items():
        smoke(record["method"], category="gear", seed=seed, out=tmp_path / name)
    first, same, other = (runs.read_maps(folder) for folder in (out, tmp_path / "same", tmp_path / "other"))
    assert np.array_equal(first["maps"], same["maps"]) and np.array_equal(first["scores"], same["scores"])
    assert same_tensors(out, tmp_path / "same") and not same_tensors(out, tmp_path / "other")
    assert not np.array_equal(first["maps"], other["maps"])


def test_overrides_are_recorded_with_their_types(smoke):
    record = smoke(overrides=["bank_size=40", "blocks=1,3"])
    assert record["overrides"] == {"bank_size": 40, "blocks": [1, 3]}
    assert record["settings"]["bank_size"] == 40 and record["settings"]["score"] == "top1"


@pytest.mark.parametrize("method", methods.METHODS)
def test_half_precision_is_used_where_asked_for_and_recorded(method, smoke, toy_root, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_cpu_gains_from_bfloat16", lambda: True)
    found = {}
    for amp in (False, True):
        record = smoke(method, overrides={"amp": amp}, out=tmp_path / str(amp))
        found[amp] = record["environment"]["precision"], runs.read_maps(tmp_path / str(amp))["maps"]
    assert found[False][0] == "float32" and found[True][0] == "bfloat16 autocast"
    assert not np.array_equal(found[True][1], found[False][1])
    for _, maps in found.values():  # the map itself is not rounded to half precision
        cells = maps.size / (16 if method == "psvdd" else 1)  # its map is not smoothed: one value in 4 x 4 px
        assert len(np.unique(maps)) > 0.5 * cells
    # One training, since two that round otherwise may end elsewhere.
    model = vitad.load_model(tmp_path / "False", "cpu")
    images = data.load("toy", toy_root, record["category"], image_size=model.settings.image_size).test
    batch, maps = images.batch(range(8))["image"], []
    for amp in (False, True):
        with torch.no_grad(), training.autocast(torch.device("cpu"), amp):
            maps.append(model.anomaly_map(batch).float().numpy().ravel())
    assert np.corrcoef(maps)[0, 1] > 0.9


def test_weights_of_a_file_are_used_and_recorded(smoke, tmp_path):
    path = tmp_path / "given.safetensors"
    save_file(import_timm().create_model("test_vit", num_classes=0).state_dict(), path)
    record = smoke(weights=str(path), overrides={"pretrained": True})
    assert record["weights"]["asked"] == str(path) and record["weights"]["source"] == "file given.safetensors"
    state = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert torch.equal(state["backbone.norm.weight"], load_file(path)["norm.weight"])


@pytest.mark.parametrize("method, hint", [("patchknn", "pretrained=true"), ("l2cae", "Leave it out.")])
def test_weights_that_would_not_be_used_are_refused(method, hint, smoke, tmp_path):
    with pytest.raises(UserError, match=f"--weights some.safetensors would not be used.*{hint}"):
        smoke(method, weights="some.safetensors")
    assert not (tmp_path / "run").exists()


# --- no value is null, never zero -------------------------------------------------------------------------


@pytest.fixture
def own(toy_root, tmp_path):
    """A user's folder: copy some of the folders of `weave` there."""

    def make(*parts):
        root = tmp_path / "own"
        for part in parts:
            shutil.copytree(toy_root / "weave" / part, root / part)
        return root

    return make


PIXEL = ("pixel_auroc", "pixel_ap", "pro")


def test_without_masks_the_pixel_figures_are_null(own, smoke):
    record = smoke(dataset="folder", data_root=own("train", "test"))
    assert record["metrics"]["image_auroc"] is not None
    assert [record["metrics"][name] for name in PIXEL] == [None] * 3
    assert record["counts"]["empty_masks"] == 0


def test_without_defective_images_all_figures_are_null(own, smoke, tmp_path, capsys):
    record = smoke(dataset="folder", data_root=own("train", "test/good"))
    assert set(record["metrics"].values()) == {None}
    assert '"pro": null' in (tmp_path / "run" / "record.json").read_text()
    assert main(["show", str(tmp_path / "run")]) == 0
    assert "image_auroc  no value" in capsys.readouterr().out


def test_without_good_test_images_the_image_figure_is_null(own, smoke):
    record = smoke(
        dataset="folder", data_root=own("train", "test/hole", "test/stain", "ground_truth/hole", "ground_truth/stain")
    )
    assert record["metrics"]["image_auroc"] is None
    assert all(0 < record["metrics"][name] <= 1 for name in PIXEL)


def test_without_good_test_images_and_masks_the_run_succeeds(own, smoke):
    assert set(smoke(dataset="folder", data_root=own("train", "test/hole"))["metrics"].values()) == {None}


def test_one_kind_of_defect_is_enough(own, smoke):
    record = smoke(dataset="folder", data_root=own("train", "test/good", "test/hole", "ground_truth/hole"))
    assert all(0 <= value <= 1 for value in record["metrics"].values())


def test_defects_with_empty_masks_count_for_the_image_but_not_for_the_pixels(toy_root, smoke, tmp_path):
    record = smoke(dataset="folder", data_root=toy_root / "quirks")
    assert record["counts"]["empty_masks"] == 1 and record["counts"]["test_defective"] == 3
    maps = runs.read_maps(tmp_path / "run")
    located = [0, 2, 3]
    pixels = evaluate(maps["maps"][located], maps["masks"][located], maps["scores"], maps["labels"])
    assert record["metrics"] == pixels
    naive = evaluate(maps["maps"], maps["masks"], maps["scores"], maps["labels"])
    assert record["metrics"]["pixel_auroc"] != naive["pixel_auroc"]


# --- several categories -----------------------------------------------------------------------------------


def test_several_categories_are_evaluated_one_by_one_and_averaged(toy_root, smoke, tmp_path, capsys):
    record = smoke(category="all")
    assert (record["category"], record["counts"]["train"], record["counts"]["test_defective"]) == ("all", 36, 22)
    assert list(record["metrics_by_category"]) == ["toy/weave", "toy/grain", "toy/gear"]
    maps = runs.read_maps(tmp_path / "run")
    for key, figures in record["metrics_by_category"].items():
        here = np.char.startswith(maps["paths"], key.removeprefix("toy/"))
        assert figures == evaluate(*(maps[name][here] for name in ("maps", "masks", "scores", "labels")))
    for name, mean in record["metrics"].items():
        assert mean == np.mean([figures[name] for figures in record["metrics_by_category"].values()])
    assert main(["show", str(tmp_path / "run")]) == 0
    assert "toy/grain    image_auroc 0." in capsys.readouterr().out


def test_a_figure_that_one_category_lacks_has_no_mean(toy_root, smoke, tmp_path):
    shutil.copytree(toy_root / "gear", tmp_path / "own" / "a")
    shutil.copytree(toy_root / "grain", tmp_path / "own" / "b", ignore=shutil.ignore_patterns("ground_truth"))
    record = smoke(dataset="folder", data_root=tmp_path / "own", category="all")
    with_masks, without = record["metrics_by_category"].values()
    assert None not in with_masks.values() and without["pro"] is None and without["image_auroc"] is not None
    assert record["metrics"]["pro"] is None and record["metrics"]["image_auroc"] is not None


# --- again and again --------------------------------------------------------------------------------------


def test_a_finished_run_returns_at_once(smoke, tmp_path, monkeypatch):
    record = smoke()
    before = snapshot(tmp_path)
    monkeypatch.setattr(methods.get("patchknn").Model, "__init__", lambda *_: pytest.fail("made a model"))
    monkeypatch.setattr(data.Found, "load", lambda *_, **__: pytest.fail("decoded images"))
    assert smoke() == record
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name, saved",
    [
        ("checkpoint.safetensors", False),
        ("maps.npz", True),
        ("scores.csv", False),
        ("history.csv", False),
        ("heatmaps.png", False),
        ("record.json", False),
    ],
)
def test_the_record_comes_last(name, saved, finished_anovit, smoke, tmp_path, monkeypatch):
    """Whatever cannot be written, there is no record; and the same call then finishes the run."""
    original, out = vitad.files.os.replace, tmp_path / "run"

    def full(source, target):
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(vitad.files.os, "replace", full)
        patch.setattr(training, "SAVE_SECONDS", 0 if saved else 100)
        with pytest.raises(UserError, match=f"cannot write .*{name}: No space left"):
            smoke("anovit")
    if saved:
        assert (out / ".run" / "state.pt").exists() and not (out / "record.json").exists()
    else:
        assert not out.exists()  # nothing worth keeping
    smoke("anovit")
    assert {p.name for p in out.iterdir()} == FILES | {"history.csv"}
    assert same_tensors(out, finished_anovit)


def test_a_run_that_fails_keeps_what_others_put_into_its_folder(smoke, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def note(*_):
        (out / "notes.txt").write_text("mine")
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "score", note)
    with pytest.raises(KeyboardInterrupt):
        smoke()
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_leftovers_of_killed_sessions_are_removed(smoke, tmp_path):
    """Killed while a file was written aside, or between the record and the end."""
    out = tmp_path / "run"
    (out / ".run").mkdir(parents=True)
    (out / ".run" / ".state.pt.123.tmp").write_bytes(b"half")
    smoke()
    names = {p.name for p in out.iterdir()}
    assert names == FILES
    (out / ".run").mkdir()
    (out / ".run" / "state.pt").write_bytes(b"old")
    (out / ".maps.npz.123.tmp").write_bytes(b"half")
    smoke()
    assert {p.name for p in out.iterdir()} == names


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"preset": "demo"}, "preset is 'smoke' there and 'demo' here"),
        ({"overrides": {"lr": 1.0}}, "lr is 0.0002 there and 1.0 here"),
        ({"category": "grain"}, "category is 'gear' there and 'grain' here"),
        ({"method": "l2cae"}, "method is 'anovit' there and 'l2cae' here"),
        ({"weights": "random"}, "weights is 'auto' there and 'random' here"),
        ({"dataset": "folder", "category": "gear"}, "dataset is 'toy' there and 'folder' here"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_a_folder_with_another_run_is_left_alone(
    change, message, complete, finished_anovit, smoke, tmp_path, monkeypatch
):
    if complete:
        shutil.copytree(finished_anovit, tmp_path / "run")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(training, "SAVE_SECONDS", 0)
            patch.setattr(pipeline, "score", interrupt)
            with pytest.raises(KeyboardInterrupt):
                smoke("anovit")
    before = snapshot(tmp_path)
    assert before
    with pytest.raises(UserError, match=f"holds another run: {message}. Give another folder with --out"):
        smoke(**{"method": "anovit"} | change)
    assert snapshot(tmp_path) == before


def test_a_setting_that_is_newer_than_a_run_has_its_default(smoke, tmp_path, monkeypatch):
    record = smoke()
    file = tmp_path / "run" / "record.json"
    older = record | {"settings": {k: v for k, v in record["settings"].items() if k != "sigma"}}
    file.write_text(json.dumps(older))
    assert runs.settings_of(older) == record["settings"]
    assert smoke() == older  # found, not made again
    asked = runs.Request("patchknn", **{k: record[k] for k in ("dataset", "category", "split", "preset")})
    (tmp_path / "results").mkdir()
    shutil.copytree(tmp_path / "run", tmp_path / "results" / "run")
    monkeypatch.setattr(vitad, "__file__", str(tmp_path / "vitad" / "__init__.py"))
    assert [r["seed"] for r in runs.committed_seeds(asked)] == [record["seed"]]
    assert runs.committed_seeds(asked.override(sigma=1.0)) == []
    assert list(runs.by_hash()) == [runs.hash_of(record)]
    with pytest.raises(UserError, match="holds another run: sigma is 4.0 there and 1.0 here"):
        smoke(overrides={"sigma": 1.0})


def test_other_images_are_another_run(own, smoke):
    root = own("train", "test")
    smoke(dataset="folder", data_root=root)
    (root / "train" / "good" / "000.png").unlink()
    with pytest.raises(UserError, match="holds another run: data is"):
        smoke(dataset="folder", data_root=root)


# --- killed -----------------------------------------------------------------------------------------------

OFTEN = """
import sys, vitad.training as training
training.SAVE_SECONDS, training.CHECK_STEPS = 0, 1
from vitad.backbones import import_timm
from vitad.cli import main
sys.exit(main(sys.argv[1:]))
"""
EPOCHS = 20


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(toy_root, tmp_path, monkeypatch):
    """kill -9 in the middle of `vitad run`, then the same call again."""
    out = tmp_path / "killed"
    command = ["run", "anovit", "--data-root", str(toy_root), "--preset", "smoke", "--seed", "5", "--device", "cpu"]
    command += ["--set", f"epochs={EPOCHS}", "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", OFTEN, *command], env=env, stderr=subprocess.PIPE)
    state, patience = out / ".run" / "state.pt", time.monotonic() + 100
    while not state.exists() and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -9, errors.decode()
    assert {p.name for p in out.iterdir()} == {".run"}
    at = torch.load(state, weights_only=True)["at"]
    steps = 2  # 10 images in batches of 8, two are held out
    done = at["epoch"] * steps + at["step"]
    assert 0 < done < EPOCHS * steps

    anovit, calls = methods.get("anovit"), []
    losses = anovit.Model.losses
    monkeypatch.setattr(anovit.Model, "losses", lambda self, x: self.training and calls.append(1) or losses(self, x))
    assert main(command) == 0
    assert len(calls) == EPOCHS * steps - done  # went on, did not start again
    command[-1] = str(tmp_path / "unbroken")
    assert main(command) == 0
    assert same_tensors(out, tmp_path / "unbroken")
    killed, unbroken = (runs.read_maps(p) for p in (out, tmp_path / "unbroken"))
    assert all(np.array_equal(killed[k], unbroken[k]) for k in killed)
    assert {p.name for p in out.iterdir()} == FILES | {"history.csv"}


# --- loading ----------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_method_is_refused(smoke, tmp_path):
    smoke(out=tmp_path / "a")
    smoke("l2cae", out=tmp_path / "b")
    shutil.copy(tmp_path / "b" / "checkpoint.safetensors", tmp_path / "a")
    with pytest.raises(UserError, match="is a checkpoint of l2cae, but the record says patchknn"):
        runs.load_model(tmp_path / "a")


def test_a_checkpoint_that_does_not_fit_is_refused(smoke, tmp_path):
    smoke()
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, metadata = read_safetensors(path)
    bank = tensors.pop("bank")
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match="does not fit: .*bank"):
        runs.load_model(tmp_path / "run")
    save_file(tensors | {"bank": bank, "more": bank + 1}, path, metadata)
    with pytest.raises(UserError, match="does not fit: .*more"):
        runs.load_model(tmp_path / "run")
    path.unlink()
    with pytest.raises(UserError, match="checkpoint.safetensors does not exist"):
        runs.load_model(tmp_path / "run")


# --- the command line -------------------------------------------------------------------------------------


def test_the_command_line_runs_and_shows(toy_root, tmp_path, capsys):
    out = tmp_path / "run"
    command = f"run patchknn --data-root {toy_root} --category grain --preset smoke --set sigma=2 score=max --out {out}"
    assert main(command.split()) == 0
    shown = capsys.readouterr().out
    record = runs.read_record(out)
    assert (record["category"], record["overrides"]) == ("grain", {"sigma": 2.0, "score": "max"})
    assert "toy grain, 64x64 px" in shown and "weights: random" in shown
    assert main(["show", str(out)]) == 0
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert table["overrides"] == "sigma=2.0, score=max"
    assert table["pro"] == f"{record['metrics']['pro']:.4f}" and table["heatmaps"] == str(out / "heatmaps.png")
    assert table["data"].startswith("toy grain: 12 train, 4 good + 6 defective")


def test_the_command_line_draws_a_contact_sheet(toy_root, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(f"data show toy --data-root {toy_root} --category weave --image-size 48 --out {sheet}".split()) == 0
    assert "toy weave, 48x48 px" in capsys.readouterr().out
    with Image.open(sheet) as image:
        assert image.format == "PNG" and min(image.size) > 100


def test_runs_are_compared_on_the_same_images(smoke, toy_root, tmp_path, monkeypatch, capsys):
    smoke(out=tmp_path / "gear")
    smoke("l2cae", out=tmp_path / "l2cae", category="all", overrides={"image_size": 128})
    drawn = {}

    def watch(images, masks, maps, titles, *_):
        drawn.update(images=images, masks=masks, maps=maps, titles=titles)
        return grid(images, masks, maps, titles, *_)

    grid = plots.heatmap_grid
    monkeypatch.setattr(plots, "heatmap_grid", watch)
    sheet = tmp_path / "sheet.png"
    command = f"compare {tmp_path}/gear {tmp_path}/l2cae --data-root {toy_root} --out {sheet}"
    assert main(command.split()) == 0 and str(sheet) in capsys.readouterr().out
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    assert list(drawn["maps"]) == ["patchknn\n64 px", "l2cae\n128 px"]
    kinds = sorted(set(drawn["titles"]) - {"good"})
    assert drawn["titles"] == ["good"] * 2 + [k for k in kinds for _ in range(2)]
    assert [bool(m.any()) for m in drawn["masks"]] == [t != "good" for t in drawn["titles"]]
    for folder, shown in zip(("gear", "l2cae"), drawn["maps"].values(), strict=True):
        found = runs.read_maps(tmp_path / folder)
        test = data.load("toy", toy_root, "gear", image_size=128).test
        for image, map_ in zip(drawn["images"], shown, strict=True):
            number = next(i for i in range(len(test)) if np.array_equal(test.batch([i])["image"][0].numpy(), image))
            (row,) = np.flatnonzero(found["paths"] == test.paths[number])
            assert np.array_equal(found["maps"][row], map_)


def test_runs_of_one_method_are_told_apart_by_their_folders(smoke, toy_root, tmp_path, monkeypatch):
    smoke(out=tmp_path / "one")
    smoke(out=tmp_path / "two", overrides={"sigma": 2})
    drawn, grid = [], plots.heatmap_grid
    monkeypatch.setattr(plots, "heatmap_grid", lambda *given: drawn.append(given[2]) or grid(*given))
    compare([tmp_path / "one", tmp_path / "two"], tmp_path / "sheet.png", toy_root)
    assert list(drawn[0]) == ["one", "two"]


def test_runs_are_not_compared_on_data_that_lacks_their_images(smoke, toy_root, tmp_path, capsys):
    shutil.copytree(toy_root / "gear", tmp_path / "gear")
    smoke(dataset="folder", data_root=tmp_path / "gear")
    for path in (tmp_path / "gear" / "test" / "stain").iterdir():
        path.rename(path.with_stem(f"another-{path.stem}"))
    for path in (tmp_path / "gear" / "ground_truth" / "stain").iterdir():
        path.rename(path.with_stem(f"another-{path.stem}"))
    command = f"compare {tmp_path}/run --data-root {tmp_path}/gear --out {tmp_path}/sheet.png"
    assert main(command.split()) == 2 and not (tmp_path / "sheet.png").exists()
    assert re.search(r"does not hold test/stain/\d+.png, which these runs were tested on", capsys.readouterr().err)


def test_runs_of_other_images_are_not_compared(smoke, tmp_path, capsys):
    smoke(out=tmp_path / "gear")
    smoke(out=tmp_path / "grain", category="grain")
    sheet = tmp_path / "sheet.png"
    assert main(["compare", str(tmp_path / "gear"), str(tmp_path / "grain"), "--out", str(sheet)]) == 2
    assert "share no test images" in capsys.readouterr().err
    (tmp_path / "grain" / "maps.npz").unlink()
    assert main(["compare", str(tmp_path / "grain"), "--out", str(sheet)]) == 2
    assert "holds no maps.npz" in capsys.readouterr().err and not sheet.exists()


def test_the_device_is_found():
    assert runs.find_device("cpu").type == "cpu"
    assert runs.find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_notebooks_print_where_they_run(capsys):
    runs.describe_environment("cpu", dataset="toy", seed=0)
    shown = capsys.readouterr().out
    assert vitad.__version__ in shown and torch.__version__ in shown and "dataset='toy' · seed=0" in shown
