"""A built site that is made smaller: what its pages show is there, what nobody sees is gone."""

import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))
from lighten import lighten  # noqa: E402

PAGE = """<link href="../_static/style.css"><meta property="og:image" content="https://a.org/book/_images/photo.png">
<a href="../_images/photo.png"><img src="../_images/photo.png" alt="a photo"></a>
<img src="../_images/dot.png">
<img src="../_static/logo.png"><p>It is called photo.png.</p>"""


@pytest.fixture
def site(tmp_path):
    for folder in ("_images", "_static/scripts", "_static/locales/de", "_sources/notebooks", "notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    x = np.linspace(0, 255, 300)
    photo = np.stack([np.add.outer(x, x) / 2 + 8 * np.random.default_rng(0).random((300, 300))] * 3, -1)
    Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(tmp_path / "_images" / "photo.png")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(tmp_path / "_images" / "dot.png", optimize=True)
    for name in ("scripts/a.js.map", "theme-macros.html", "locales/de/a.po", "logo.png", "style.css"):
        (tmp_path / "_static" / name).write_text("x")
    (tmp_path / "notebooks" / "page.html").write_text(PAGE)
    cell = nbformat.v4.new_code_cell("1 + 1", execution_count=3)
    cell.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=3)]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Two"), cell], metadata={"widgets": {}})
    nbformat.write(nb, tmp_path / "_sources" / "notebooks" / "page.ipynb")
    return tmp_path


def test_pictures_are_smaller_and_every_page_finds_them(site):
    before = np.asarray(Image.open(site / "_images" / "photo.png").convert("RGB"), float)
    size = (site / "_images" / "photo.png").stat().st_size
    lighten(site)
    found = site / "_images" / "photo.webp"
    assert found.stat().st_size < size / 2 and not (site / "_images" / "photo.png").exists()
    assert np.abs(np.asarray(Image.open(found).convert("RGB"), float) - before).mean() < 4  # of 255
    text = (site / "notebooks" / "page.html").read_text()
    assert "It is called photo.png." in text and "_static/logo.png" in text
    assert {(site / "_images" / name).exists() for name in re.findall(r"_images/([\w.]+)\"", text)} == {True}


def test_notebooks_to_download_are_whole_but_for_their_outputs(site):
    lighten(site)
    nb = nbformat.read(site / "_sources" / "notebooks" / "page.ipynb", 4)
    nbformat.validate(nb)
    assert [cell.source for cell in nb.cells] == ["# Two", "1 + 1"] and "widgets" not in nb.metadata
    assert nb.cells[1].outputs == [] and nb.cells[1].execution_count is None


def test_what_pages_need_stays(site):
    lighten(site)
    left = sorted(p.relative_to(site / "_static").as_posix() for p in (site / "_static").rglob("*") if p.is_file())
    assert left == ["logo.png", "style.css"]


def test_code_keeps_its_words_and_its_colours(site):
    schemes = {"light": ("#080808", "#00622F"), "dark": ("#F8F8F2", "#ABE338")}
    (site / "_static" / "pygments.css").write_text(
        "".join(
            f"""html[data-theme="{scheme}"] .highlight pre {{ line-height: 125%; }}
html[data-theme="{scheme}"] .highlight .hll {{ background-color: #fae4c2 }}
html[data-theme="{scheme}"] .highlight {{ background: #fefefe; color: {text} }}
html[data-theme="{scheme}"] .highlight .n {{ color: {text} }} /* Name */
html[data-theme="{scheme}"] .highlight .o {{ color: {operator} }} /* Operator */
html[data-theme="{scheme}"] .highlight .p {{ color: {text if scheme == "light" else operator} }} /* Punctuation */
"""
            for scheme, (text, operator) in schemes.items()
        )
    )
    page = site / "notebooks" / "code.html"
    page.write_text('<pre><span class="n">x</span> <span class="o">&lt;</span> <span class="p">(</span></pre>')
    lighten(site)
    assert page.read_text() == '<pre>x <span class="o">&lt;</span> <span class="p">(</span></pre>'


def test_icons_come_in_one_format(site):
    style = site / "_static" / "icons.css"
    style.write_text('@font-face{src:url(a.woff2) format("woff2"),url(a.ttf) format("truetype")}')
    for name in ("a.woff2", "a.ttf", "alone.ttf"):
        (site / "_static" / name).write_text("x")
    lighten(site)
    assert style.read_text() == '@font-face{src:url(a.woff2) format("woff2")}'
    assert sorted(p.name for p in (site / "_static").rglob("*a*.[tw]*")) == ["a.woff2", "alone.ttf"]


def test_a_second_time_changes_nothing(site):
    lighten(site)
    before = {p: p.read_bytes() for p in site.rglob("*") if p.is_file()}
    lighten(site)
    assert {p: p.read_bytes() for p in site.rglob("*") if p.is_file()} == before
