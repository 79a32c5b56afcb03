"""The lab: its files say what torch says, small as they are, and the page reads them and is painted on."""

import gzip
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from vitad import data, export, runs
from vitad.export import to_onnx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))
import browsers  # noqa: E402
import check_lab  # noqa: E402
import lab  # noqa: E402

PAGE = """<!doctype html><meta charset="utf-8"><title>The lab</title><link rel="icon" href="data:,">
<div id="lab"></div><script src="../_static/lab.js"></script>"""
needs_chromium = pytest.mark.skipif(
    not any(map(shutil.which, browsers.NAMES)), reason="needs Chromium: apt install chromium"
)
needs_firefox = pytest.mark.skipif(
    not any(map(shutil.which, browsers.FIREFOX)), reason="needs Firefox: apt install firefox-esr"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that gives (folder of the run, its ONNX model) of a method's smoke run on gears, made once."""
    out, made = tmp_path_factory.mktemp("lab"), {}

    def of(method):
        if method not in made:
            runs.run(runs.Request(method, "toy", "gear", preset="smoke", device="cpu"), out / method)
            made[method] = out / method, onnx.load(to_onnx(out / method, out / f"{method}.onnx"))
        return made[method]

    return of


def some_pixels():
    return [lab.pixels(r)[None] for r in data.find("toy", None, "gear").test[::9]]


@pytest.mark.parametrize("method", lab.METHODS)
def test_a_file_says_what_torch_says_and_its_weights_cost_little(method, exported):
    folder, exact = exported(method)
    small, images = lab.in_int8(exact), some_pixels()
    model = runs.load_model(folder, "cpu").eval()
    scores, maps = lab.looked_at(exact, images)
    with torch.no_grad():
        of_torch = export._Whole(model)(torch.from_numpy(np.concatenate(images)))
    names = [output.name for output in exact.graph.output]
    span = float(of_torch[1].max() - of_torch[1].min())
    found = lab.session(exact).run(names, {"image": np.concatenate(images)})
    for name, one, other in zip(names, of_torch, found, strict=True):
        assert np.abs(one.numpy() - other).max() <= 1e-3 * (1 if name == "reconstruction" else span), name
    of_small = lab.looked_at(small, images)
    assert np.abs(of_small[1] - maps).mean() < 0.01 * span
    assert np.corrcoef(of_small[0], scores)[0, 1] > 0.98
    assert len(small.SerializeToString()) < 0.75 * len(exact.SerializeToString())


def test_only_trained_weights_become_int8(exported):
    _, exact = exported("l2cae")
    kept = {w.name: w for w in lab.in_int8(exact).graph.initializer}
    for weight in exact.graph.initializer:
        large = weight.name.startswith("model.") and np.prod(weight.dims) >= lab.LARGE
        assert (weight.name in kept) != large
        if large:
            q, scale = (numpy_helper.to_array(kept[f"{weight.name}.{part}"]) for part in "qs")
            assert q.dtype == np.int8 and q.shape == tuple(weight.dims) and len(scale) in q.shape


def test_scales_follow_the_channels_that_differ():
    weight = np.random.default_rng(0).standard_normal((20, 50)).astype(np.float32) * np.logspace(0, 3, 20)[:, None]
    for of, axis_of in ((weight, 0), (weight.T, 1)):
        q, scale, axis = lab.quantised(of, 127)
        steps = scale[:, None] if axis == 0 else scale
        assert axis == axis_of and np.abs(q * steps - of).max() <= 0.51 * scale.max()
        assert (np.abs(q * steps - of) <= 0.51 * steps).all()


def test_what_is_not_a_number_is_refused():
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1])
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("score", "map")]
    nodes = [helper.make_node("Log", ["image"], [name]) for name in ("score", "map")]
    graph = helper.make_graph(nodes, "logarithm", [image], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(SystemExit, match="not a number"):
        lab.looked_at(model, [np.array([-1.0], np.float32)])


def test_the_export_tells_nothing_of_this_machine(exported):
    folder, exact = exported("l2cae")
    assert str(ROOT).encode() not in exact.SerializeToString()
    assert {p.key: p.value for p in exact.metadata_props}["format"] == "2"


def unpacked(part):
    """What lab.js does with a part, in one line."""
    length, text = part
    bits = "".join(f"{ord(c) - 0x3000:015b}" for c in text)
    return gzip.decompress(bytes(int(bits[8 * i : 8 * i + 8], 2) for i in range(length)))


@pytest.mark.parametrize("n", [0, 1, 14, 15, 16, 1000])
def test_packed_bytes_come_back(n):
    content = np.random.default_rng(0).integers(0, 256, n, np.uint8).tobytes()
    text = lab.script("one", {"part": content}).decode("utf-16")  # the mark tells the order of the bytes
    handed = json.loads(re.fullmatch(r"labFile\((.*)\);\n", text)[1])
    assert handed["format"] == lab.FORMAT and unpacked(handed["parts"]["part"]) == content


def test_page_and_files_have_one_format():
    source = (ROOT / "book" / "_static" / "lab.js").read_text()
    assert re.search(r"const FORMAT = (\d+);", source)[1] == str(lab.FORMAT)
    assert f'"format": {lab.FORMAT}, "name": "runtime"' in lab.RUNTIME.read_bytes()[:200].decode("utf-16")


@pytest.fixture(scope="module")
def site(tmp_path_factory, exported):
    """A page with one small method, as `make book` lays it out."""
    folder, _ = exported("l2cae")
    html = tmp_path_factory.mktemp("site") / "html"
    (html / "book").mkdir(parents=True)
    (html / "book" / "lab.html").write_text(PAGE)
    shutil.copytree(ROOT / "book" / "_static", html / "_static", ignore=shutil.ignore_patterns("mathjax"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "PRESET", "smoke")
        patch.setattr(lab, "METHODS", {"l2cae": lab.METHODS["l2cae"]})
        made = lab.make([folder.parent], folder.parent / "own", html / "_static" / "lab")
        times = {file: file.stat().st_mtime_ns for file in made.iterdir()}
        lab.make([], folder.parent / "own", made)
    assert {file.name for file in times} == {"index.js", "l2cae.js"}
    assert {file: file.stat().st_mtime_ns for file in made.iterdir()} == times, "what is there is not made again"
    assert not (folder.parent / "own").exists(), "the run at hand is taken"
    return html


@pytest.mark.parametrize(
    "asked", [pytest.param(None, marks=needs_chromium, id="chromium"), pytest.param("firefox", marks=needs_firefox)]
)
@pytest.mark.parametrize("way", ["file", "server"])
def test_it_computes_in_the_browser_what_python_computes(site, way, asked):
    server = browsers.served(site.parent)
    address = {
        "file": (site / "book" / "lab.html").as_uri(),
        "server": f"http://127.0.0.1:{server.server_port}/html/book/lab.html",
    }[way]
    with browsers.opened(browsers.browser(asked)) as page:
        page.open(address)
        page.wait(check_lab.LAB)
        page.evaluate("document.querySelector('.lab-load').click()")
        page.wait(f"{check_lab.LAB}.methods[0].map")
        said = page.evaluate(f"{check_lab.LAB}.methods[0].score")
        good = page.evaluate(f"{check_lab.LAB}.methods[0].good[0]")
        before = page.evaluate(f"Array.from({check_lab.LAB}.picture.pixels)")
        page.stroke(".lab-canvas canvas", (0.2, 0.5), (0.4, 0.5))
        page.evaluate("document.querySelector('.lab-canvas canvas').focus()")
        page.press("ArrowDown")
        page.press("ArrowDown", shift=True)
        page.press(" ")
        page.wait(check_lab.QUIET)
        strokes = page.evaluate(f"{check_lab.LAB}.picture.before.length")
        for _ in range(strokes):
            page.evaluate("[...document.querySelectorAll('button')].find((b) => b.textContent === 'Undo').click()")
        after = page.evaluate(f"Array.from({check_lab.LAB}.picture.pixels)")
        assert not page.problems
        own = (address.partition("/html/")[0], "data:", "blob:")
        assert all(asked.startswith(own) for asked in page.requests)
    server.shutdown()
    assert said == pytest.approx(good, rel=1e-3), "the first picture is the first good test image"
    assert strokes == 3 and before == after


@needs_chromium
def test_files_of_another_format_and_missing_ones_are_named(site, tmp_path):
    html = shutil.copytree(site, tmp_path / "html")
    model, index = (html / "_static" / "lab" / name for name in ("l2cae.js", "index.js"))
    model.write_bytes(model.read_bytes().decode("utf-16").replace('"format": 1', '"format": 7').encode("utf-16"))
    with browsers.opened(browsers.browser(None)) as page:
        page.open((html / "book" / "lab.html").as_uri())
        page.wait(check_lab.LAB)
        page.evaluate("document.querySelector('.lab-load').click()")
        page.wait("document.querySelector('.lab-status').textContent.includes('did not work')")
        said = page.evaluate("document.querySelector('.lab-status').textContent")
        assert "lab/l2cae.js has format 7; this page reads format 1. Build the book again." in said
        index.unlink()
        page.open((html / "book" / "lab.html").as_uri())
        page.wait("document.querySelector('.lab-message')")
        said = page.evaluate("document.querySelector('.lab-message').textContent")
        assert said == 'The lab did not start: lab/index.js is missing. "make book" makes it.'
