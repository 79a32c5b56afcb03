"""Verdicts on new images."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from vitad import runs
from vitad.cli import main
from vitad.data import ImageSet
from vitad.data.records import Record
from vitad.predict import EIGHT, Threshold, _regions, predict


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_toy):
    """A run on gears, and the folder of its data."""
    root = make_toy(("gear",), 12, 8, 2)
    out = tmp_path_factory.mktemp("predict") / "run"
    runs.run(runs.Request("patchknn", "toy", "gear", data_root=root, preset="smoke", device="cpu"), out)
    return out, root / "gear"


# --- the threshold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "asked", "expected"), [(99, 0.01, 0.01), (20, 0.01, 1 / 21), (200, 0.05, 10 / 201)])
def test_new_good_images_alarm_as_often_as_it_says(n, asked, expected):
    """Drawn from one distribution again and again: the mean share of alarms, and how often it lies in the interval."""
    random = np.random.default_rng(0)
    shares, inside = [], 0
    for _ in range(2000):
        found = Threshold.of_good(random.random(n), asked)
        shares.append(1 - found.value)  # exact, of a uniform distribution
        inside += found.interval[0] <= shares[-1] <= found.interval[1]
    assert found.false_alarms == pytest.approx(expected)
    assert np.mean(shares) == pytest.approx(expected, rel=0.06)
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_it_says_how_little_few_images_allow():
    text = str(Threshold.of_good(np.arange(20.0), 0.01))
    assert text.startswith("19; about 4.8% [0.1%, 16.8%] of good images lie above it, by 20 held-out")


# --- regions ------------------------------------------------------------------------------------------------


def test_regions_are_boxes_of_the_image():
    grid = np.zeros((8, 16))
    grid[1:3, 2:5] = 2
    grid[3, 5] = 4  # touches by a corner: the same region
    grid[6, 12] = 3
    first, second = _regions(grid, 1.0, (160, 40))
    assert (first.x, first.y, first.width, first.height, first.peak) == (20, 5, 40, 15, 4)
    assert first.area == pytest.approx(7 / 128)
    assert (second.x, second.y, second.width, second.height) == (120, 30, 10, 5)
    assert _regions(grid, 5.0, (160, 40)) == []


# --- the command --------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_run_and_the_worst_comes_first(finished, tmp_path):
    run, root = finished
    found = predict(run, [root / "test"], tmp_path / "new", device="cpu")
    known = runs.read_maps(run)
    of_run = {path.split("gear/")[1]: value for path, value in zip(known["paths"], known["scores"], strict=True)}
    of_new = {image.path.split("gear/")[1]: image.score for image in found.images}
    assert of_new.keys() == of_run.keys()
    for path, value in of_new.items():
        assert value == pytest.approx(of_run[path], abs=1e-5)
    scores = [image.score for image in found.images]
    assert scores == sorted(scores, reverse=True)
    good = known["scores"][known["labels"] == 0]
    assert found.threshold.value == pytest.approx(good.max())  # eight allow no less
    assert {image.defective for image in found.images} == {True, False}
    assert all(image.defective == (image.score > found.threshold.value) for image in found.images)
    maps = dict(zip(known["paths"], known["maps"], strict=True))
    for image in found.images:
        (grid,) = [m for path, m in maps.items() if image.path.endswith(path.split("gear/")[1])]
        assert len(image.regions) == ndimage.label(grid > found.region_threshold.value, EIGHT)[1]


def test_a_bad_file_is_named_and_passed_over(finished, tmp_path, capsys):
    run, root = finished
    folder, out = tmp_path / "photos", tmp_path / "verdicts"
    (folder / "more").mkdir(parents=True)
    (folder / "broken.png").write_text("no image")
    for n, path in enumerate(sorted((root / "test" / "good").iterdir())[:3]):
        Image.open(path).resize((90, 60)).convert("L").save(folder / "more" / f"a & {n}.jpg")
    command = ["predict", str(run), str(folder), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--good", str(root / "test" / "good"), "--false-alarms", "0.2"]) == 1
    said = capsys.readouterr()
    assert f"not readable, passed over: {folder / 'broken.png'}" in said.err
    assert "of 3 images are called defective" in said.out
    assert "about 11.1%" in said.out  # one in nine is the largest share below a fifth that eight images give
    written = json.loads((out / "predictions.json").read_text())
    assert written["unreadable"] == [str(folder / "broken.png")]
    assert written["run"]["method"] == "patchknn"
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [row["path"] for row in rows] == [image["path"] for image in written["images"]]
    report = (out / "report.html").read_text()
    assert "broken.png" in report and "a &amp; 0.jpg" in report and "://" not in report  # nothing from elsewhere
    for image in written["images"]:
        assert f'src="{image["picture"]}"' in report
        with Image.open(out / image["picture"]) as picture:
            assert picture.size == (768, 256)  # the image and its map, in its own shape

    assert main([*command, "--threshold", "-1"]) == 1  # again, into the same folder
    assert "3 of 3 images are called defective" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "{here}/none"], "none does not exist. Give image files"),
        (["{run}", "{here}/empty"], "empty holds no images"),
        (["{run}", "{images}", "--false-alarms", "5"], "false alarms 5.0 have to be a share between 0 and 1"),
        (["{run}", "{images}", "--out", "{run}"], "holds files that are no predictions"),
        (["{here}/none", "{images}"], "not a finished run"),
    ],
)
def test_mistakes_are_answered_in_a_line(words, message, finished, tmp_path, capsys):
    run, root = finished
    (tmp_path / "empty").mkdir()
    places = {"run": run, "here": tmp_path, "images": root / "test" / "good"}
    out = ["--out", str(tmp_path / "out")] if "--out" not in words else []
    assert main(["predict", *(word.format(**places) for word in words), *out]) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


def test_a_photograph_lies_as_it_is_looked_at(tmp_path):
    """Cameras note how they were held (EXIF orientation) and leave the pixels as the sensor saw them."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    images = ImageSet([Record(tmp_path / f"{n}.png", 0, "good") for n in ("upright", "turned")], tmp_path, (20, 30))
    first, second = images.batch([0, 1])["image"]
    assert (first == second).all()
