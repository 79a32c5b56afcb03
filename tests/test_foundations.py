"""The foundations: exercises come with hint and solution, terms are in the glossary, drawings are whole."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest

from vitad.metrics import evaluate
from vitad.papers import field as literature
from vitad.papers import printed
from vitad.show import drawings, field, lessons, live

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "quickstart",
    "your-own-data",
    "problem",
    "transformer",
    "reconstruction",
    "metrics",
    "synthesis",
    "anovit",
    "vitmem",
    "vitmem-ablation",
    "mala",
    "mala-ablation",
    "ssltok",
    "ssltok-ablation",
    "families",
    "comparison",
    "papers-check",
)
TERM = re.compile(r"\{term\}`(?:[^`<]*<)?([^`<>]+)>?`")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def cells_of(page):
    return nbformat.read(ROOT / "notebooks" / f"{page}.ipynb", 4).cells


def prose(page):
    return "\n".join(cell.source for cell in cells_of(page) if cell.cell_type == "markdown")


@pytest.mark.parametrize("page", PAGES)
def test_an_exercise_has_a_hint_and_a_solution_that_runs(page):
    exercises = re.split(r"^\*\*(?=\d+\. )", prose(page), flags=re.M)[1:]
    written = sum("<summary>Solution" in text for text in exercises)
    run = [cell for cell in cells_of(page) if "solution" in cell.metadata.get("tags", [])]
    assert exercises and all("<summary>Hint" in text for text in exercises)
    assert written + len(run) == len(exercises)
    assert all("hide-cell" in cell.metadata.tags and cell.outputs for cell in run)


@pytest.mark.parametrize("page", PAGES)
def test_questions_are_numbered_and_every_answer_is_closed(page):
    text = prose(page)
    numbers = [int(n) for n in re.findall(r"<summary>(\d+)\. ", text)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 6
    assert text.count("<details>") == text.count("</details>") == text.count("<summary>") == text.count("</summary>")


@pytest.mark.parametrize("page", PAGES)
def test_terms_are_in_the_glossary(page):
    glossary = (ROOT / "book" / "glossary.md").read_text().split("```{glossary}")[1]
    known = {line.lower() for line in glossary.splitlines() if line and not line.startswith(" ")}
    used = {" ".join(term.split()).lower() for term in TERM.findall(prose(page))}
    assert used and not used - known


def test_the_glossary_is_in_order():
    glossary = (ROOT / "book" / "glossary.md").read_text().split("```{glossary}")[1]
    terms = [line for line in glossary.splitlines() if line and not line.startswith((" ", "`"))]
    assert terms == sorted(terms, key=str.lower)


@pytest.mark.parametrize("page", PAGES)
def test_figures_have_a_text_and_most_a_caption(page):
    for cell in cells_of(page):
        if any(kind.startswith("image/") for output in cell.get("outputs", []) for kind in output.get("data", {})):
            assert len(cell.metadata["mystnb"]["image"]["alt"]) > 30
            assert page == "metrics" or cell.metadata["mystnb"]["figure"]["caption"]


DRAWINGS = {
    "vision_transformer": lambda: drawings.vision_transformer(224, 14, 384, 12),
    "block": drawings.block,
    "autoencoder": lambda: drawings.autoencoder(12288, 16),
    "flow": lambda: drawings.flow(
        [("image", "3 × S × S", "blue"), ("network", "", "red"), ("map", "S × S", "green")],
        "An image passes through a network and becomes a map.",
        "From an image to a map.",
    ),
    "memory_variants": drawings.memory_variants,
    "memory_autoencoder": lambda: drawings.memory_autoencoder(384, 16, 768, 12, 100),
    "mala": lambda: drawings.mala(112, 14, 384, 6, 192, 16),
    "painted_damage": drawings.painted_damage,
    "families": lambda: field.families(literature.SYSTEMS),
    "anovit": lambda: drawings.anovit(384, 16, 768, 12, (24, 26, 28, 30, 59, 117, 233)),
    "ssltok": lambda: drawings.ssltok(224, 14, 384),
    "timeline": lambda: field.timeline(literature.SYSTEMS),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_whole_and_stays_on_its_sheet(name):
    figure = ElementTree.fromstring(DRAWINGS[name]().data)
    (svg,) = figure.findall("svg")
    _, _, width, height = map(float, svg.get("viewBox").split())
    assert len(svg.get("aria-label")) > 30 and figure.find("figcaption").text
    for text in svg.iter("text"):
        assert 0 <= float(text.get("x")) <= width and 0 < float(text.get("y")) <= height
    for box in svg.iter("rect"):
        assert float(box.get("x")) >= 0 and float(box.get("x")) + float(box.get("width")) <= width
        assert float(box.get("y")) >= 0 and float(box.get("y")) + float(box.get("height")) <= height


def test_the_map_of_the_field_has_every_system_once():
    svg = ElementTree.fromstring(field.families(literature.SYSTEMS).data).find("svg")
    shown = [text.text for text in svg.iter("text") if (text.text or "").endswith(")")]
    assert sorted(shown) == sorted(f"{s.name} ({s.year})" for s in literature.SYSTEMS)
    assert [s.year for s in literature.SYSTEMS] == sorted(s.year for s in literature.SYSTEMS)
    assert {s.paper for s in literature.SYSTEMS if s.paper} == set(printed.PAPERS)
    assert len(literature.table()) == len(literature.SYSTEMS)


def test_rivals_are_those_of_the_printed_tables():
    rivals = literature.rivals()
    assert rivals.keys() == {"yang2024", "mala2023"}
    named = {name for s in literature.SYSTEMS for name in s.names}
    for paper, names in rivals.items():
        tables = [printed.table(name) for name in printed.results() if name.startswith(paper)]
        methods = {m for t in tables for m in t["method"] if m != "Ours" and not m.startswith("Base")}
        assert methods <= named and len(names) == len({re.sub("_", "-", m) for m in methods})


def test_points_of_a_threshold_are_what_their_names_say():
    rng = np.random.default_rng(0)
    mask = np.zeros((20, 20), bool)
    mask[2:4, 2:4] = mask[10:16, 10:16] = True
    scores = rng.random((20, 20)) + 0.5 * mask
    steps = live.thresholds_of(scores, mask, 50)
    found = live.rates(scores, mask, steps)
    assert all(len(values) == 50 for values in found.values())
    for k in (0, 10, 49):
        called = scores >= steps[k]
        assert found["recall"][k] == called[mask].mean()
        assert found["false-positive rate"][k] == called[~mask].mean()
        assert found["precision"][k] == (mask[called].mean() if called.any() else 1)
        overlaps = called[2:4, 2:4].mean(), called[10:16, 10:16].mean()
        assert found["mean overlap"][k] == pytest.approx(np.mean(overlaps))
    assert found["recall"][0] == 0 and found["false-positive rate"][-1] == 1
    fine = live.rates(scores, mask, live.thresholds_of(scores, mask, 2000))
    area = np.trapezoid(fine["recall"], fine["false-positive rate"])
    assert area == pytest.approx(evaluate(scores[None], mask[None], [], [])["pixel_auroc"], abs=0.01)


def test_the_live_figure_asks_no_other_host_and_has_a_label():
    mask = np.eye(8, dtype=bool)
    shown = live.one_map(mask + 0.1 * np.arange(8), mask, np.full((8, 8), 0.5), "a detector").data
    assert "http" not in shown and shown.count("<svg") == 3
    (name,) = re.findall(r'<label for="([^"]+)"', shown)
    assert f'id="{name}" type="range"' in shown


def test_figures_of_the_lessons_draw_what_they_are_given():
    rng = np.random.default_rng(0)
    image, mask = rng.random((3, 28, 28)), np.zeros((28, 28), bool)
    mask[5:9, 5:9] = True
    lessons.style()
    assert len(lessons.patches(image, 7, [0, 5, 9, 15]).axes) == 5
    fig = lessons.maps({"one": rng.random((4, 4)), "two": rng.random((4, 4))}, 3, image, mask, 5, 4, (0.0, 1.0))
    assert [axis.get_title() for axis in fig.axes[:3]] == ["image", "one", "two"] and len(fig.axes) == 4
    images, heat = rng.random((2, 3, 28, 28)), rng.random((2, 28, 28))
    assert len(lessons.over_image(images, heat, None, ["a", "b"], "score", (0.0, 1.0)).axes) == 5
    rows = lessons.rebuilt({"image": images, "error": heat}, ["a", "b"], np.stack([mask, mask]))
    assert len(rows.axes) == 5
    own = lessons.rebuilt(
        {"image": images, "a": heat, "b": heat[:, ::2, ::2]}, ["a", "b"], limits={"a": (0, 1), "b": (0, 2)}
    )
    assert len(own.axes) == 6 + 2
    lines = lessons.against([1, 4], {"up": [0.1, 0.2], "down": [0.2, 0.1]}, "x", "y", log=True).axes[0].lines
    assert [line.get_ydata()[0] for line in lines] == [0.1, 0.2]
    parts = lessons.parts_of_a_sum(images, np.stack([mask, mask]), {"one": heat, "sum": heat}, ["a", "b"], "logit")
    assert [axis.get_title() for axis in parts.axes[:3]] == ["image", "one", "sum"] and len(parts.axes) == 7
    assert len(lessons.histograms({"a": [0.1, 0.2], "b": [0.9]}, "x", (0, 1)).axes[0].patches) == 60
    index = pd.MultiIndex.from_product([["a", "b"], list("wxyz")], names=["contrast", "metric"])
    found = pd.DataFrame({"difference": 0.1, "low": 0.0, "high": 0.2, "verdict": "undecided"}, index=index)
    assert [len(axis.collections) for axis in lessons.differences(found).axes] == [2, 2, 2, 2]
    assert len(lessons.arrows(rng.random((28, 28)), rng.random((5, 5))).axes) == 2
    assert len(lessons.filters(rng.normal(size=(24, 3, 4, 4))).axes) == 24
    assert len(lessons.reach(rng.random((3, 2)), 0.5).axes[0].lines) == 4
    assert len(field.dot_table({"a": ["x"], "b": ["x", "y"]}, ["x", "y"]).axes[0].lines) == 2
    assert lessons.matrix(rng.normal(size=(4, 5)), "x", "y").axes[0].images[0].get_array().shape == (4, 5)


def test_figures_of_a_memory_and_of_differences_draw_what_they_are_given():
    rng = np.random.default_rng(0)
    images, mask = rng.random((2, 3, 28, 28)), np.zeros((2, 28, 28), bool)
    mask[:, 5:9, 5:9] = True
    weights = np.array([[0.3, 0.2], [0.5, 0.1]])
    patches = rng.random((2, 2, 3, 4, 4))
    shown = lessons.answers(patches[:, 0], patches, weights, ["a", "b"]).axes
    assert [axis.get_title() for axis in shown] == ["patch", "30.0%", "20.0%", "", "50.0%", "10.0%"]
    strips = lessons.strips(images, rng.random((2, 4)), rng.random((2, 4)), mask, ["a", "b"])
    assert [len(axis.images) for axis in strips.axes[:2]] == [3, 3] and len(strips.axes) == 3
    fig = lessons.rebuilt({"image": images, "x": mask * 0.1, "y": mask * 9.0}, ["a", "b"], mask, limits=None)
    assert len(fig.axes) == 6 + 2 and fig.axes[2].images[0].get_clim() != fig.axes[4].images[0].get_clim()
    index = pd.MultiIndex.from_product([["up", "open"], ["AUROC", "PRO"]], names=["contrast", "metric"])
    columns = {"difference": [0.2, None, 0.1, None], "low": [0.1, None, -0.1, None], "high": [0.3, None, 0.3, None]}
    verdicts = {"verdict": ["above", "undecided", "undecided", "undecided"]}
    (panel,) = lessons.differences(pd.DataFrame(columns | verdicts, index=index)).axes
    assert panel.get_title() == "AUROC" and len({tuple(line.get_color()[0]) for line in panel.collections}) == 2
