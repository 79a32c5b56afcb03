"""The pictures of real images, drawn here of the toy."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from vitad import data, runs
from vitad.show import plots

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "book"))
import pictures

GOOD, STAIN = (("toy", "gear", f"gear/test/{kind}/000.png") for kind in ("good", "stain"))


@pytest.fixture(autouse=True)
def on_the_toy(toy_root, monkeypatch):
    find = data.find
    monkeypatch.setattr(pictures.data, "find", lambda name, root, *more: find(name, root or toy_root, *more))
    monkeypatch.setattr(pictures, "PRESETS", ("smoke", "demo"))
    yield
    plt.close("all")


def titles(fig):
    return [axis.get_title() for axis in fig.axes]


def test_the_first_picture_shows_good_defective_and_close_by():
    fig = pictures.intro({"gear": (GOOD, STAIN)})
    good, defective, close = (np.asarray(axis.images[0].get_array()) for axis in fig.axes)
    assert titles(fig)[0] == "gear: stain" and not np.array_equal(good, defective)
    image, mask, kind = pictures.image_of(STAIN)
    assert kind == "stain" and mask.any()
    parts = pictures.close_by(mask)
    assert np.array_equal(close, image[:, *parts].transpose(1, 2, 0)) and close.shape[0] == close.shape[1]
    assert mask[parts].any()
    assert [bool(axis.collections) for axis in fig.axes] == [False, True, False], "only the second is outlined"
    assert "CC BY-NC-SA 4.0" in fig.get_supxlabel()


def test_a_square_around_a_defect_stays_in_the_image():
    mask = np.zeros((100, 100), bool)
    mask[:3, 95:] = True
    assert pictures.close_by(mask, 0.4) == (slice(0, 40), slice(60, 100))
    mask[:] = False
    mask[50, 30] = True
    assert pictures.close_by(mask, 0.4) == (slice(30, 70), slice(10, 50))


def test_maps_stand_beside_their_image_and_those_that_are_missing_are_named(toy_root, tmp_path, capsys):
    runs.run("patchknn", data_root=toy_root, preset="smoke", device="cpu", out=tmp_path / "run")
    maps = pictures.drawn({"gear": STAIN}, runs.read_records(tmp_path))
    fig = pictures.compare({"gear": STAIN}, maps)
    assert titles(fig)[:7] == [
        "gear: stain",
        *(f"{name}: no map" for name in ("l2cae", "anovit", "vitmem", "mala")),
        "patchknn, 64 px",
        "ssltok: no map",
    ]
    found = runs.read_maps(tmp_path / "run")
    (row,) = np.flatnonzero(found["paths"] == STAIN[2])
    low, high = plots.heat_range(found["maps"])
    shown = fig.axes[5].images[0]
    assert shown.get_clim() == (0, 255) and np.array_equal(shown.get_array(), maps["gear/patchknn"])
    scaled = low + shown.get_array() / 255 * (high - low)
    np.testing.assert_allclose(scaled, found["maps"][row].clip(low, high), atol=(high - low) / 500)
    assert "no map of mala on gear" in capsys.readouterr().out and "CC BY-NC-SA 4.0" in fig.get_supxlabel()


def test_of_several_runs_the_first_preset_with_the_lowest_seed_is_shown():
    def record(preset, seed=0, split=None, **overrides):
        same = {"method": "vitmem", "dataset": "toy", "category": "gear", "split": split}
        return same | {"preset": preset, "seed": seed, "overrides": overrides}

    others = [record("smoke", memory=False), record("small"), record("smoke", split="grouped")]
    demo, smoke = record("demo"), record("smoke")
    assert pictures.run_of("vitmem", STAIN, [*others, demo, record("smoke", 1), smoke, record("smoke", 2)]) is smoke
    assert pictures.run_of("vitmem", STAIN, [*others, demo]) is demo
    others.append(demo | {"revision": 99})
    assert pictures.run_of("vitmem", STAIN, others) is None and pictures.run_of("mala", STAIN, [demo]) is None


def test_maps_of_several_days_are_kept_together(toy_root, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "COMPARE", {"gear": STAIN})
    monkeypatch.setattr(pictures, "results_folder", lambda: tmp_path)
    for method in ("patchknn", "l2cae"):
        runs.run(method, data_root=toy_root, preset="smoke", device="cpu", out=tmp_path / method / "run")
        pictures.main(["compare", str(tmp_path / method)])
    assert set(np.load(tmp_path / "compare.npz")) == {"gear/patchknn", "gear/l2cae"}
    assert (tmp_path / "compare.png").exists()


def test_pictures_of_what_happens_inside_a_memory(toy_root, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "results_folder", lambda: tmp_path)
    runs.run("vitmem", data_root=toy_root, preset="smoke", device="cpu", out=tmp_path / "run")
    pictures.main(["inside", str(tmp_path / "run")])
    parts = {path.stem for path in (tmp_path / "inside").glob("*.jpg")}
    assert parts == {f"vitmem-gear-{part}" for part in ("features", "memory", "attention", "errors")}
