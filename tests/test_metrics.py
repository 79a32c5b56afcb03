"""The metrics against independent references: scikit-learn, and a plain sweep over all thresholds for PRO."""

import doctest
import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from vitad import metrics
from vitad.errors import UserError
from vitad.metrics import METRICS, evaluate, pro_curve

SCORES, LABELS = np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])


def regions_of(mask):
    """8-connected regions by flood fill: a list of sets of pixels."""
    left, regions = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        region, front = set(), [left.pop()]
        while front:
            y, x = front.pop()
            region.add((y, x))
            neighbours = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= neighbours
            front += neighbours
        regions.append(region)
    return regions


def sweep(maps, masks):
    """The PRO curve with every distinct score as a threshold: a list of (false-positive rate, mean overlap)."""
    regions = [
        np.array([m[p] for p in region]) for m, mask in zip(maps, masks, strict=True) for region in regions_of(mask)
    ]
    background = maps[~masks]
    curve = [(0.0, 0.0)]
    for t in np.unique(maps)[::-1]:
        curve.append((np.mean(background >= t), np.mean([np.mean(r >= t) for r in regions])))
    return curve


def mean_height(curve, limit):
    """Trapezoid rule from 0 to `limit`, with a straight line to the point at the limit."""
    area = 0.0
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x0 < limit < x1:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def blobs(rng, n, side, per_image=3):
    """Masks (n,side,side) of random rectangles."""
    masks = np.zeros((n, side, side), bool)
    for mask in masks[1:]:  # the first image stays free of defects
        for _ in range(per_image):
            y, x, h, w = (*rng.integers(0, side, 2), *rng.integers(1, side // 3, 2))
            mask[y : y + h, x : x + w] = True
    return masks


def case(kind):
    """Maps and masks (4,16,16) of one of KINDS."""
    rng = np.random.default_rng(7)
    masks = blobs(rng, 4, 16)
    maps = rng.random(masks.shape) + 0.4 * masks
    if kind == "tied":
        maps = np.floor(5 * maps)
    elif kind == "nearly all tied":
        maps = (maps > 1.1).astype(float)
    elif kind == "partly tied":
        maps = np.minimum(maps, 0.9)
    elif kind == "constant":
        maps[:] = 0.5
    elif kind == "perfect":
        maps += masks
    elif kind == "inverted":
        maps -= 2 * masks
    elif kind == "single region":
        masks[:] = False
        masks[2, 3:9, 4:12] = True
    elif kind == "single pixel":
        masks[:] = False
        masks[3, 15, 0] = True
    elif kind == "regions touch diagonally":
        masks = np.broadcast_to(np.indices((16, 16)).sum(0) % 4 == 0, masks.shape).copy()
    elif kind == "salt":
        masks = rng.random(masks.shape) < 0.1
    elif kind == "one background pixel":
        masks[:] = True
        masks[1, 5, 5] = False
    else:
        assert kind == "random"
    return maps, masks


KINDS = [
    "random",
    "tied",
    "nearly all tied",
    "partly tied",
    "constant",
    "perfect",
    "inverted",
    "single region",
    "single pixel",
    "regions touch diagonally",
    "salt",
    "one background pixel",
]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_pixel_metrics_equal_the_references(kind, dtype):
    maps, masks = case(kind)
    maps = maps.astype(dtype)
    exact = maps.astype(np.float64)
    auroc = roc_auc_score(masks.ravel(), exact.ravel())
    ap = average_precision_score(masks.ravel(), exact.ravel())
    curve = sweep(exact, masks)
    for limit in (0.01, 0.05, 0.3, 1.0):
        values = evaluate(maps, masks, SCORES, LABELS, pro_limit=limit)
        assert values["pixel_auroc"] == pytest.approx(auroc, abs=1e-6)
        assert values["pixel_ap"] == pytest.approx(ap, abs=1e-6)
        assert values["pro"] == pytest.approx(mean_height(curve, limit), abs=1e-6)


def test_every_metric_of_the_list_is_computed_and_no_other():
    maps, masks = case("random")
    values = evaluate(maps, masks, SCORES, LABELS)
    assert list(values) == list(METRICS) == ["image_auroc", "pixel_auroc", "pixel_ap", "pro"]
    assert None not in values.values()
    assert list(evaluate(maps, None, [], [])) == list(METRICS)


def test_examples_in_docstrings():
    results = doctest.testmod(metrics)
    assert results.attempted and not results.failed


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_image_auroc_equals_the_reference(levels):
    rng = np.random.default_rng(levels)
    labels = rng.integers(0, 2, 200)
    scores = rng.integers(0, levels, 200) / levels + 0.2 * labels
    values = evaluate(np.zeros((1, 2, 2)), None, scores, labels)
    assert values["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)


def test_values_equal_those_worked_out_by_hand():
    # Half of the region lies above all background; the other half ties with the upper half of the background.
    maps = np.array([[[3, 3, 2, 2], [2, 2, 1, 1]]])
    masks = np.array([[[1, 1, 1, 1], [0, 0, 0, 0]]])
    assert evaluate(maps, masks, SCORES, LABELS, pro_limit=0.5) == dict(
        image_auroc=0.75,  # one of the four pairs is the wrong way round
        pixel_auroc=0.875,  # (1 + 3/4) / 2
        pixel_ap=pytest.approx((1 + 4 / 6) / 2),
        pro=0.75,  # the curve climbs from (0, 1/2) to (1/2, 1)
    )
    assert evaluate(maps, masks, SCORES, LABELS, pro_limit=0.25)["pro"] == pytest.approx(0.625)


@pytest.mark.parametrize(("corner", "overlap"), [((4, 4), 1 / 17), ((5, 5), 1 / 2)])
def test_contact_at_a_corner_joins_regions(corner, overlap):
    # A square of 16 pixels and a single one, which alone is detected: 1/17 of one region if they touch, 1 of 2 if not.
    masks, maps = np.zeros((1, 8, 8), bool), np.zeros((1, 8, 8))
    masks[0, :4, :4] = masks[0][corner] = maps[0][corner] = 1
    pro = evaluate(maps, masks, SCORES, LABELS, pro_limit=0.3)["pro"]
    assert pro == pytest.approx(overlap + (1 - overlap) * 0.15)  # all else ties: a ramp, on average 0.15 below 0.3


def test_regions_of_neighbouring_images_stay_apart():
    maps, masks = case("random")
    masks[:, 4:8, 4:8] = True
    twice = evaluate(np.repeat(maps, 2, 0), np.repeat(masks, 2, 0), SCORES, LABELS)
    assert twice == pytest.approx(evaluate(maps, masks, SCORES, LABELS))


@pytest.mark.parametrize("change", [np.exp, lambda x: 1e6 * x - 3, lambda x: -1 / (1 + x), lambda x: x**9])
def test_a_monotone_map_of_the_scores_changes_nothing(change):
    maps, masks = case("random")
    scores = np.random.default_rng(0).random(40)
    labels = np.arange(40) % 2
    assert np.unique(change(maps)).size == np.unique(maps).size
    assert evaluate(change(maps), masks, change(scores), labels) == evaluate(maps, masks, scores, labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_area_under_the_drawn_curve_is_pro(kind, limit):
    maps, masks = case(kind)
    fpr, pro = pro_curve(maps, masks)
    assert (np.diff(fpr) >= 0).all() and (np.diff(pro) >= 0).all()
    assert fpr[0] == pro[0] == 0 and fpr[-1] == 1 and pro[-1] == pytest.approx(1)
    area = mean_height(list(zip(fpr, pro, strict=True)), limit)
    assert area == pytest.approx(evaluate(maps, masks, SCORES, LABELS, limit)["pro"], abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_and_a_channel_axis_are_taken(dtype):
    maps, masks = case("random")
    maps = torch.tensor(maps).to(dtype)
    expected = evaluate(maps.double().numpy(), masks, SCORES, LABELS)
    assert expected == evaluate(
        maps[:, None].requires_grad_(),
        255 * torch.tensor(masks[:, None]).int(),
        torch.tensor(SCORES),
        torch.tensor(LABELS).bool(),
    )
    assert all(type(v) is float for v in expected.values())


def test_layout_in_memory_does_not_matter():
    maps, masks = case("tied")
    turned = np.asfortranarray(maps), np.ascontiguousarray(masks.transpose(2, 1, 0)).transpose(2, 1, 0)
    assert evaluate(*turned, SCORES, LABELS) == evaluate(maps, masks, SCORES, LABELS)


def test_metrics_that_are_not_defined_are_none():
    maps, masks = case("random")
    pixel = ["pixel_auroc", "pixel_ap", "pro"]
    without = evaluate(maps, None, SCORES, LABELS)
    assert [without[k] for k in pixel] == [None] * 3 and without["image_auroc"] == 0.75
    for one_kind in (np.zeros_like(masks), np.ones_like(masks)):
        assert evaluate(maps, one_kind, SCORES, LABELS) == without
    for one_class in (np.zeros(4), np.ones(4)):
        values = evaluate(maps, masks, SCORES, one_class)
        assert values["image_auroc"] is None and None not in [values[k] for k in pixel]
    nothing = evaluate(np.zeros((0, 4, 4)), np.zeros((0, 4, 4)), [], [])
    assert nothing == dict(image_auroc=None, pixel_auroc=None, pixel_ap=None, pro=None)


def with_value(x, value):
    x = np.array(x, float)
    x.flat[1] = value
    return x


MAPS, MASKS = np.arange(32.0).reshape(2, 4, 4), np.eye(4, dtype=bool)[None].repeat(2, 0)
BAD = {
    "maps hold 1 values that are NaN": (with_value(MAPS, np.nan), MASKS, SCORES, LABELS),
    "maps hold 1 values that are NaN or infinite": (with_value(MAPS, np.inf), None, SCORES, LABELS),
    "scores hold 1 values": (MAPS, MASKS, with_value(SCORES, -np.inf), LABELS),
    "labels hold 1 values": (MAPS, MASKS, SCORES, with_value(LABELS, np.nan)),
    "masks hold 1 values": (MAPS, with_value(MASKS, np.nan), SCORES, LABELS),
    r"maps \(2, 4, 4\) and masks \(2, 4, 3\) disagree": (MAPS, MASKS[:, :, :3], SCORES, LABELS),
    r"maps \(2, 4, 4\) and masks \(1, 4, 4\) disagree": (MAPS, MASKS[:1], SCORES, LABELS),
    r"maps have shape \(4, 4\)": (MAPS[0], MASKS[0], SCORES, LABELS),
    r"maps have shape \(2, 3, 4, 4\)": (np.stack([MAPS] * 3, 1), MASKS, SCORES, LABELS),
    r"masks have shape \(4, 4\)": (MAPS, MASKS[0], SCORES, LABELS),
    r"scores \(4,\) and labels \(3,\) disagree": (MAPS, MASKS, SCORES, LABELS[:3]),
    r"scores \(4, 1\) and labels \(4, 1\)": (MAPS, MASKS, SCORES[:, None], LABELS[:, None]),
    "maps are of type object": (None, MASKS, SCORES, LABELS),
    "labels are of type <U4": (MAPS, MASKS, SCORES, ["good", "bad", "bad", "good"]),
    "maps are not an array": ([[1.0], [1.0, 2.0]], MASKS, SCORES, LABELS),
    "pro_limit is 0:": (MAPS, MASKS, SCORES, LABELS, 0),
    "pro_limit is 30:": (MAPS, MASKS, SCORES, LABELS, 30),
    "pro_limit is nan": (MAPS, MASKS, SCORES, LABELS, float("nan")),
    "pro_limit is '0.3'": (MAPS, MASKS, SCORES, LABELS, "0.3"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(UserError, match=message):
        evaluate(*BAD[message])


def test_the_curve_needs_both_kinds_of_pixel():
    with pytest.raises(UserError, match="one kind only"):
        pro_curve(MAPS, np.zeros_like(MASKS))


@pytest.mark.parametrize("share", [0.03, 0.5, 0.97])
@pytest.mark.parametrize("mask_type", [bool, np.uint8])
def test_memory_stays_under_three_times_the_maps_and_input_is_kept(share, mask_type):
    rng = np.random.default_rng(0)
    maps = rng.random((50, 96, 96), dtype=np.float32)
    masks = (rng.random((50, 1, 12, 12)) < share).repeat(8, 2).repeat(8, 3).astype(mask_type)
    before = maps.copy(), masks.copy()
    tracemalloc.start()
    evaluate(maps, masks, SCORES, LABELS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak + maps.nbytes < 3 * maps.nbytes  # the maps themselves included
    assert (before[0] == maps).all() and (before[1] == masks).all()
