"""Figures and widgets: what is drawn is what was given."""

import io
import re

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from vitad.errors import UserError
from vitad.metrics import METRICS
from vitad.show import plots
from vitad.show.widgets import bars, slider_over, threshold_explorer


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def data(n, side=12):
    rng = np.random.default_rng(0)
    masks = np.zeros((n, side, side), bool)
    masks[1:, 3:6, 3:6] = True
    titles = [f"title {i}" for i in range(n)]
    return rng.random((n, 3, side, side)), masks, rng.random((n, side, side)), titles


def drawn(fig):
    """The figure as pixels."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=40)
    return np.asarray(Image.open(buffer).convert("RGB"))


# --- grids of images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_heatmap_grid_has_a_column_an_image_and_a_row_a_method(n, with_masks):
    images, masks, maps, titles = data(n)
    fig = plots.heatmap_grid(images, masks if with_masks else None, {"one": maps, "other": 2 * maps}, titles)
    axes = np.array(fig.axes).reshape(3, n)
    assert [axis.get_title() for axis in axes[0]] == titles
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["image", "one", "other"]
    for j in range(n):
        assert np.array_equal(axes[0, j].images[0].get_array(), images[j].transpose(1, 2, 0))
        assert np.array_equal(axes[1, j].images[0].get_array(), maps[j])
        assert np.array_equal(axes[2, j].images[0].get_array(), 2 * maps[j])
        outlined = [bool(axis.collections) for axis in axes[:, j]]
        assert outlined == [with_masks and j > 0] * 3  # the first has no defect
    assert drawn(fig).std() > 10


def test_all_columns_share_the_scale_of_their_method():
    images, masks, maps, titles = data(3)
    fig = plots.heatmap_grid(images, masks, {"one": maps, "other": maps}, titles, {"one": (0.1, 0.7), "other": None})
    axes = np.array(fig.axes).reshape(3, 3)
    assert {axis.images[0].get_clim() for axis in axes[1]} == {(0.1, 0.7)}
    assert {axis.images[0].get_clim() for axis in axes[2]} == {plots.heat_range(maps)}


def test_a_small_map_is_stretched_over_its_image():
    images, masks, maps, titles = data(2)
    fig = plots.heatmap_grid(images, masks, maps[:, :4, :4], titles)
    upper, lower = (np.array(fig.axes).reshape(2, 2)[i, 1] for i in (0, 1))
    assert list(upper.images[0].get_extent()) == list(lower.images[0].get_extent())


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("n, columns, shape", [(1, 8, (1, 1)), (3, 8, (1, 3)), (8, 8, (1, 8)), (11, 4, (3, 4))])
def test_a_contact_sheet_shows_every_image(n, columns, shape, with_masks):
    images, masks, _, titles = data(n)
    fig = plots.contact_sheet(images, masks if with_masks else None, titles, columns)
    assert len(fig.axes) == shape[0] * shape[1]
    shown = [axis for axis in fig.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == titles
    assert [bool(axis.collections) for axis in shown] == [with_masks and i > 0 for i in range(n)]
    assert drawn(fig).std() > 10


def test_heat_range_leaves_room_for_the_outliers_only():
    low, high = plots.heat_range(np.linspace(0, 1, 10_000).reshape(4, 50, 50))
    assert low == pytest.approx(0.5, abs=1e-3) and high == pytest.approx(0.998, abs=1e-3)
    low, high = plots.heat_range(np.ones((2, 3, 3)))
    assert low == 1 and high > low


# --- which images are shown -------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [1, 2, 3, 5])
@pytest.mark.parametrize("members", [1, 2, 3, 4, 8])
def test_examples_are_different_images_spread_over_the_ranking(members, wanted):
    defects = np.array(["good"] * members + ["hole"] * members)
    labels = (defects != "good").astype(int)
    order = np.random.default_rng(members).permutation(2 * members)
    picked = plots.examples(labels, defects, per_kind=wanted, good=1, order=order)
    holes = picked[1:]
    assert len(set(picked)) == 1 + min(wanted, members)
    assert labels[picked].tolist() == [0] + [1] * len(holes)
    ranks = [int((order[members:] < order[i]).sum()) for i in holes]
    assert ranks == sorted(ranks)
    if wanted >= members:
        assert ranks == list(range(members))
    elif wanted == 2:
        assert ranks[0] < members / 2 <= ranks[1]


def test_examples_without_an_order_are_the_first_ones():
    defects = np.array(["hole", "good", "cut", "good", "hole", "cut"])
    labels = (defects != "good").astype(int)
    assert plots.examples(labels, defects, per_kind=1, good=2) == [1, 3, 2, 0]
    assert plots.examples(labels, defects, per_kind=9, good=0) == [2, 5, 0, 4]


# --- curves -----------------------------------------------------------------------------------------------


def test_a_training_curve_draws_each_loss_and_the_validation():
    history = [{"phase": "p", "epoch": i, "mse": 1 / i, "val": 2 / i, "seconds": i} for i in (1, 2, 3)]
    (axis,) = plots.training_curve(history).axes
    lines = {line.get_label(): line for line in axis.lines}
    assert lines.keys() == {"mse", "val"}
    assert lines["mse"].get_xdata().tolist() == [1, 2, 3]
    assert lines["val"].get_ydata().tolist() == [2, 1, pytest.approx(2 / 3)]
    assert (lines["mse"].get_linestyle(), lines["val"].get_linestyle()) == ("-", "--")


def test_a_training_curve_of_phases_with_other_losses():
    history = [
        {"phase": "one", "epoch": 1, "mse": 0.5, "seconds": 1},
        {"phase": "two", "epoch": 1, "focal": 0.3, "val": 0.4, "seconds": 2},
        {"phase": "two", "epoch": 2, "focal": 0.2, "val": 0.3, "seconds": 3},
    ]
    (axis,) = plots.training_curve(history).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines == {"mse": [[1, 0.5]], "focal": [[2, 0.3], [3, 0.2]], "val": [[2, 0.4], [3, 0.3]]}


def test_a_score_histogram_counts_every_image():
    scores, labels = np.arange(50.0), np.arange(50) % 5 == 0
    (axis,) = plots.score_histogram(scores, labels).axes
    counts = [sum(bar.get_height() for bar in group) for group in axis.containers]
    assert counts == [40, 10]
    plots.score_histogram(np.ones(4), np.array([0, 0, 1, 1]))


def test_rows_of_pictures_are_drawn_column_by_column():
    drawn = []
    rows = {name: lambda axis, j, name=name: drawn.append((name, j)) for name in ("image", "map")}
    fig = plots.picture_rows(rows, ["a", "b", "c"])
    assert drawn == [(name, j) for name in rows for j in range(3)]
    assert [axis.get_title() for axis in fig.axes[:3]] == ["a", "b", "c"]
    assert [axis.get_ylabel() for axis in fig.axes] == ["image", "", "", "map", "", ""]


def test_principal_components_show_like_patches_in_like_colours():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 32))
    which = rng.integers(0, 4, (2, 36))
    tokens = torch.from_numpy(centres[which] + 0.01 * rng.normal(size=(2, 36, 32)))
    colours = plots.principal_components(tokens, (6, 6))
    assert colours.shape == (2, 6, 6, 3) and colours.min() >= 0 and colours.max() <= 1
    flat, which = colours.reshape(-1, 3), which.ravel()
    means = np.stack([flat[which == k].mean(0) for k in range(4)])
    assert np.abs(flat - means[which]).max() < 0.1
    assert min(np.linalg.norm(means[a] - means[b]) for a in range(4) for b in range(a)) > 0.3
    mirrored = plots.principal_components(tokens.flip(0), (6, 6))[::-1]
    np.testing.assert_allclose(mirrored, colours, atol=1e-6)


def test_a_figure_is_saved_whole_and_closed(tmp_path):
    fig = plots.contact_sheet(*data(2)[:2], ["a", "b"])
    plots.save(fig, tmp_path / "sheet.png", dpi=50)
    assert not plt.fignum_exists(fig.number) and [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.format == "PNG"
    with pytest.raises(UserError, match="cannot write"):
        plots.save(fig, tmp_path / "sheet.png" / "below.png")


# --- widgets ----------------------------------------------------------------------------------------------


def frames(widget):
    slider, stack = widget.children
    assert isinstance(slider, ipywidgets.IntSlider) and isinstance(stack, ipywidgets.Stack)
    assert slider.value == stack.selected_index and (slider.min, slider.max) == (0, len(stack.children) - 1)
    return [child.value for child in stack.children]


@pytest.mark.parametrize("tied", [False, True])
def test_the_threshold_explorer_counts_as_scikit_learn_does(tied):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 60)
    scores = rng.random(60) + 0.4 * labels
    if tied:
        scores = np.floor(8 * scores)
    thresholds = np.linspace(scores.min(), scores.max(), 21)
    shown = frames(threshold_explorer(scores, labels, steps=21))
    assert len(shown) == 21
    for threshold, frame in zip(thresholds, shown, strict=True):
        (passed, alarms), (missed, hit) = confusion_matrix(labels, scores >= threshold, labels=[0, 1])
        cells = re.findall(r"<td[^>]*>(.*?)</td>", frame)
        assert cells[4:6] == [f"<b>{hit}</b>", f"{missed} missed"]
        assert cells[7:9] == [f"{alarms} false alarm{'s' * int(alarms != 1)}", f"<b>{passed}</b>"]
        assert hit + missed + alarms + passed == frame.count("<circle") == 60
        assert f"threshold {threshold:.3g}" in frame


def test_the_threshold_explorer_starts_in_the_middle_and_takes_equal_scores():
    slider, _ = threshold_explorer(np.arange(101.0), np.arange(101) > 50, steps=11).children
    assert slider.value == 5
    assert len(frames(threshold_explorer(np.ones(3), np.array([0, 1, 1]), steps=5))) == 5


def test_a_slider_over_sliders_gives_two_directions():
    inner = [slider_over([f"{a}{b}" for b in range(3)], ["x", "y", "z"], "second", start=1) for a in "ab"]
    outer = slider_over(inner, ["first a", "first b"], "first")
    slider, stack = outer.children
    assert (slider.value, slider.max, stack.selected_index) == (0, 1, 0)
    for child, name, held in zip(stack.children, ["first a", "first b"], inner, strict=True):
        title, panel = child.children
        assert title.value == f"<b>{name}</b>" and panel is held
    assert frames(inner[1])[2] == "<b>z</b><br>b2"


def test_bars_have_the_heights_that_they_are_given():
    svg = bars([0.0, 0.1, 0.2], "weights")
    assert re.findall(r"v-([\d.]+)h", svg) == ["0.0", "45.0", "90.0"] and 'aria-label="weights"' in svg
    assert ">0.2</text>" in svg
    assert re.findall(r"v-([\d.]+)h", bars([0.0, 0.0], "nothing")) == ["0.0", "0.0"]


def test_dots_show_every_run_and_the_mean_of_each_row():
    fig = plots.dots({"AUROC": {"one": [0.5, 0.75], "two": [0.9]}, "PRO": {"one": [], "two": [0.25]}}, one_scale=True)
    left, right = fig.axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["one", "two"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in left.lines] == [
        ([0.5, 0.75], [0, 0]),
        ([0.625], [0]),
        ([0.9], [1]),
        ([0.9], [1]),
    ]
    assert [list(line.get_xdata()) for line in right.lines] == [[0.25], [0.25]]
    assert left.get_xlim() == right.get_xlim()


def test_dots_of_all_metrics_stand_in_pairs_with_their_intervals():
    values = {name: {"one": [0.5, 0.6], "two": [0.7]} for name in METRICS.values()}
    fig = plots.dots(values, {name: {"one": (0.4, 0.7)} for name in METRICS.values()})
    assert [axis.get_title() for axis in fig.axes] == list(METRICS.values())
    assert len({axis.get_position().y0 for axis in fig.axes}) == 2
    (line,) = fig.axes[3].collections
    assert line.get_segments()[0].tolist() == [[0.4, 0], [0.7, 0]]
