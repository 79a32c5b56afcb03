"""The experiments on screws and on settings of ssltok: what they measure, and that rows belong to committed records."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trees

from experiments import select_ssltok
from experiments.screw import NAMES, Scaled, brightness, every, of_run, row
from vitad import data, runs
from vitad.runs.request import hash_of

ROOT = Path(__file__).resolve().parents[1]
ROWS = json.loads((ROOT / "experiments" / "screw.json").read_text())


def test_scaled_images_differ_in_nothing_but_their_brightness(gears):
    dark = Scaled(gears.test, 0.25)
    assert torch.allclose(brightness(dark), torch.tensor(0.25), atol=1e-4)
    before, after = every(gears.test)[0], every(dark)[0]
    assert torch.allclose(before / before.mean(), after / after.mean(), atol=1e-4)
    assert every(Scaled(gears.test, 0.9)).max() == 1


def test_a_row_has_metric_and_interval_as_a_record_has(gears, toy_root, tmp_path):
    record = runs.run("patchknn", data_root=toy_root, preset="smoke", out=tmp_path)
    maps = runs.read_maps(tmp_path)
    found = row(data.load("toy", toy_root, "gear", image_size=64).test, maps["scores"], scored="patchknn")
    assert found["scored"] == "patchknn"
    assert found["metrics"]["image_auroc"] == record["metrics"]["image_auroc"]
    assert found["intervals"]["image_auroc"] == pytest.approx(record["intervals"]["image_auroc"], abs=1e-6)


def test_a_run_is_scored_as_in_its_record_and_otherwise(tmp_path):
    record = runs.run("l2cae", preset="smoke", out=tmp_path)
    rows = of_run(tmp_path)
    found = {(r["images"], r["score"]): r["metrics"]["image_auroc"] for r in rows}
    assert len(set(found.values())) == len(rows) == 4
    assert found["as they are", "own"] == pytest.approx(record["metrics"]["image_auroc"], abs=0.02)
    assert {(r["scored"], r["state"], r["seed"], r["run"]) for r in rows} == {("l2cae", "trained", 0, hash_of(record))}


def test_the_rows_of_runs_are_those_of_committed_records():
    records = {hash_of(r): r for r in runs.committed("mvtec")}
    of_runs = [r for r in ROWS if r["run"]]
    assert {r["run"] for r in of_runs} <= records.keys()
    own = [r for r in of_runs if (r["images"], r["score"]) == ("as they are", "own")]
    assert len(own) > 1
    for r in own:
        committed = records[r["run"]]["metrics"]["image_auroc"]
        assert r["metrics"]["image_auroc"] == pytest.approx(committed, abs=0.02)  # of another processor


def test_no_row_is_there_twice():
    names = [tuple(r[name] for name in NAMES) for r in ROWS]
    assert len(set(names)) == len(names)


def test_a_candidate_is_trained_and_measured_on_training_images_alone(gears, monkeypatch):
    fit, rest = select_ssltok.parts(gears.train)
    assert len(fit) + len(rest) == len(gears.train) and not set(fit.groups) & set(rest.groups)
    only_train = SimpleNamespace(train=gears.train)
    monkeypatch.setattr(select_ssltok.data, "load", lambda *given, **named: only_train)
    tiny = {"tokenizer": "test_vit", "pretrained": "false", "image_size": 64, "blocks": "(2,4)", "bank_size": 200}
    tiny |= {"width": 32, "depth": 1, "heads": 2, "seg_width": 32, "pool": 1, "epochs": 1, "min_steps": 2}
    found = select_ssltok.candidate("toy", "gear", "ssltok", [f"{key}={value}" for key, value in tiny.items()])
    assert found["counts"] == {"train": len(fit), "held_out": len(rest)}
    assert found["metrics"].keys() == {*select_ssltok.KINDS, "mean of unseen kinds"}
    assert all(0 <= value <= 1 for kind in found["metrics"].values() for value in kind.values())


@trees.needs_real("mvtec", "screw")
def test_brightness_alone_is_what_the_data_say():
    test = data.load("mvtec", category="screw", image_size=256).test
    found = row(test, brightness(test).numpy())
    (committed,) = [r for r in ROWS if (r["scored"], r["category"]) == ("brightness", "screw")]
    assert found["metrics"] == committed["metrics"]


def test_every_candidate_was_measured_on_each_data_set():
    rows = json.loads((ROOT / "experiments" / "select_ssltok.json").read_text())
    names = {r["name"] for r in rows}
    assert len(names) > 1
    assert sorted((r["name"], r["dataset"], r["category"] or "") for r in rows) == sorted(
        (name, dataset, category or "") for name in names for dataset, category in select_ssltok.SETS
    )
