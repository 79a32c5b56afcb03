"""The committed notebooks hold the outputs of today's library and records."""

import ast
import base64
import io
import sys
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))

import notebooks  # noqa: E402  book/notebooks.py


def test_committed_notebooks_are_up_to_date():
    behind = notebooks.lagging()
    lines = [f"  {path.stem}: {', '.join(changed)}" for path, changed in behind.items()]
    assert not behind, "\n".join(["these notebooks lag; `make notebooks` executes them again:", *lines])


def test_what_a_notebook_shows_counts_in_full():
    """A comment is part of a page that shows the code, and of no other."""
    line = "from vitad import blocks\nfrom vitad.show.notebook import source\n"
    _, shown = notebooks.uses(ast.parse(f"{line}source(blocks.ssim_map)"))
    _, used = notebooks.uses(ast.parse(f"{line}blocks.ssim_map(1, 2, 3)"))
    assert "vitad.blocks" in shown and "vitad.blocks" not in used
    line = "from vitad import methods\nfrom vitad.show.departures import departures\nmethods.METHODS\n"
    _, shown = notebooks.uses(ast.parse(f"{line}departures(request)"))
    _, used = notebooks.uses(ast.parse(line))
    assert "vitad.methods.rivals.vae" in shown and "vitad.methods.rivals.vae" not in used


def test_large_pictures_are_kept_as_jpeg_and_look_the_same():
    rng = np.random.default_rng(0)
    x = np.add.outer(np.linspace(0, 1, 400), np.linspace(0, 1, 400))[..., None] / 2 * [255, 200, 90]
    grained = np.clip(x + 12 * rng.random(x.shape), 0, 255).astype(np.uint8)
    outputs = []
    for picture in (grained, grained[:8, :8]):
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG")
        data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": "<Figure>"}
        outputs.append(nbformat.v4.new_output("display_data", data))
    cells = [nbformat.v4.new_markdown_cell("# Two"), nbformat.v4.new_code_cell("figure", outputs=outputs)]
    nb = notebooks.with_small_pictures(nbformat.v4.new_notebook(cells=cells))
    nbformat.validate(nb)
    large, small = (output.data for output in nb.cells[1].outputs)
    assert large.keys() == {"image/jpeg", "text/plain"} and small.keys() == {"image/png", "text/plain"}
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(large["image/jpeg"]))), float)
    assert np.abs(found - grained).mean() < 6  # of 255
