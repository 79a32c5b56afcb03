"""The ONNX file of a run: on images of any size it says what the run said, and a script without torch can use it."""

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from vitad import export, runs
from vitad.cli import main
from vitad.export import to_onnx
from vitad.methods import METHODS

REDRAWN = (
    "aessim",
    "anovit",
    "draem",
    "fanogan",
    "l2cae",
    "vae",
    "vitmem",
    "vtadl",
)  # methods that compare images with images


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_toy):
    """A function that gives the folder of a method's run on gears, made once, and that of the data."""
    root, out = make_toy(("gear",), 12, 4, 2), tmp_path_factory.mktemp("export")

    def run(method):
        if not (out / method / "record.json").exists():
            runs.run(runs.Request(method, "toy", "gear", data_root=root, preset="smoke", device="cpu"), out / method)
        return out / method, root

    return run


@pytest.mark.parametrize("method", METHODS)
def test_it_gives_the_maps_and_scores_of_the_run(method, finished, tmp_path):
    run, root = finished(method)
    file = to_onnx(run, tmp_path / "model.onnx", false_alarms=0.2)
    known = runs.read_maps(run)
    chosen = [0, len(known["paths"]) - 1]
    images = np.stack([np.asarray(Image.open(root / known["paths"][i]).convert("RGB")) for i in chosen])
    session = onnxruntime.InferenceSession(file)
    scores, maps = session.run(["score", "map"], {"image": images})
    # The run may have multiplied in half precision, and a pixel in a hundred is rounded to the next of 255 steps.
    span = np.ptp(known["maps"])
    assert np.abs(maps - known["maps"][chosen]).max() < 0.05 * span
    assert np.abs(maps - known["maps"][chosen]).mean() < 0.002 * span
    np.testing.assert_allclose(scores, known["scores"][chosen], atol=0.03 * span)
    shapes = [part.shape for part in session.run(None, {"image": images[:1, 5:, 11:]})]
    S = maps.shape[-1]
    assert shapes == [(1,), (1, S, S), (1, 3, S, S)][: 2 + (method in REDRAWN)]
    about = session.get_modelmeta().custom_metadata_map
    good = known["scores"][known["labels"] == 0]
    assert float(about["threshold"]) == pytest.approx(good.max())  # four allow no less
    assert (about["method"], about["false_alarms"], about["format"]) == (method, "0.2", "2")


def test_the_example_needs_neither_torch_nor_this_library(finished, tmp_path, capsys):
    run, root = finished("l2cae")
    assert main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "model.onnx")]) == 0
    said = capsys.readouterr().out
    assert export.EXAMPLE in said
    bad = sorted((root / "gear" / "test").glob("*/*.png"))[:3]
    (tmp_path / "example.py").write_text("import sys\nsys.modules.update(torch=None, vitad=None)\n" + export.EXAMPLE)
    words = [sys.executable, tmp_path / "example.py", tmp_path / "model.onnx", *bad]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[2] for line in lines] == [str(path) for path in bad]
    known = runs.read_maps(run)
    scores = {path: score for path, score in zip(known["paths"], known["scores"], strict=True)}
    for verdict, score, path in lines:
        assert float(score) == pytest.approx(scores[path.removeprefix(f"{root}/")], rel=0.01)
        assert verdict in ("good", "defective")


def test_a_file_that_differs_from_torch_is_not_written(finished, tmp_path, monkeypatch):
    run, _ = finished("l2cae")
    monkeypatch.setattr(export, "TOLERANCE", -1)
    with pytest.raises(export.UserError, match="would differ from torch by"):
        to_onnx(run, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_has_no_form_in_onnx_is_said(finished, tmp_path, monkeypatch):
    """A map that is a gradient, for instance."""
    run, _ = finished("l2cae")

    def gradient(self, images):
        with torch.enable_grad():
            x = images.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.reconstruct(x).square().sum(), x)
        return slope.abs().sum(1)

    monkeypatch.setattr("vitad.methods.rivals.l2cae.Model.anomaly_map", gradient)
    with pytest.raises(export.UserError, match="l2cae with these settings has no form in ONNX: "):
        to_onnx(run, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(finished, tmp_path, monkeypatch, capsys):
    run, _ = finished("l2cae")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(run), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "pip install vitad[export]" in capsys.readouterr().err


def test_pixels_are_resized_as_an_image_set_does():
    random = np.random.default_rng(0)
    for height, width, size in ((60, 91, 32), (20, 33, 64), (240, 606, 140)):
        image = random.integers(0, 256, (height, width, 3), np.uint8)
        expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        found = export._resized(export._resized(pixels, size, -1), size, -2)[0].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - expected).max() <= 1 and (found != expected).mean() < 0.02
