"""How sure a number is: resamples of the test set, intervals, differences, corrections and verdicts."""

import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import norm, t

from vitad import data, evidence, resampling, runs
from vitad.data.sets import mt
from vitad.metrics import METRICS, auroc, evaluate
from vitad.resampling import draw, fingerprint, resample


def maps_of(kind="plain", n=40, side=96, seed=0):
    """maps, masks, scores, labels; half of the images have one to three defects."""
    rng = np.random.default_rng(seed)
    maps = np.stack([gaussian_filter(rng.normal(size=(side, side)), 2) for _ in range(n)])
    masks = np.zeros((n, side, side), bool)
    for mask in masks[n // 2 :]:
        for _ in range(rng.integers(1, 4)):
            y, x, height, width = *rng.integers(0, side - 20, 2), *rng.integers(3, 20, 2)
            mask[y : y + height, x : x + width] = True
    maps = maps / maps.std() + 1.5 * masks
    shapes = {
        "plain": lambda z: z,
        "tied": lambda z: np.round(z),
        "half tied": lambda z: np.maximum(z, 0.5),
        "heavy tails": lambda z: np.exp(4 * z),
        "two clusters": lambda z: np.where(z > 1.5, 1 - 1e-5 * np.exp(-z), 1e-6 * np.exp(z)),
        "constant": np.zeros_like,
    }
    maps = shapes[kind](maps).astype(np.float32)
    return maps, masks, maps.max((1, 2)), (np.arange(n) >= n // 2).astype(int)


def names(n, prefix="image"):
    return np.array([f"{prefix}{i:04}.png" for i in range(n)])


# --- groups -------------------------------------------------------------------------------------------------------


def test_an_image_without_a_group_is_one_of_its_own(toy_root):
    test = data.load("toy", toy_root, "gear", image_size=16).test
    assert test.groups.tolist() == test.paths.tolist() and test.records[0].group == ""


def test_tiles_are_the_groups_of_their_photographs():
    paths = [f"MT_Free/Imgs/exp{e}_num_{100 + 17 * e}.jpg" for e in range(1, 7)]
    paths += ["MT_Free/Imgs/exp1_num_900.jpg", "MT_Crack/Imgs/exp1_num_110.jpg", "MT_Crack/Imgs/exp2_num_130.jpg"]
    groups = mt.DATASET.groups(paths)
    assert groups[:6] == [paths[0]] * 6 and groups[6] == paths[6]
    assert groups[7:] == [paths[7]] * 2  # of another kind, so taken for another tile


@pytest.mark.skipif(not (os.environ.get("VITAD_DATA") or os.environ.get("VITAD_MT_ROOT")), reason="needs mt")
def test_the_groups_of_the_tiles_as_published():
    found = data.find("mt")
    count = {label: len({r.group for r in found.test if r.label == label}) for label in (0, 1)}
    assert count == {0: 32, 1: 78}
    paths = [r.path.relative_to(found.root).as_posix() for r in found.test]
    assert mt.DATASET.groups(paths) == [r.group for r in found.test]
    assert not {r.group for r in found.train} & {r.group for r in found.test}


# --- resamples ----------------------------------------------------------------------------------------------------


def test_groups_are_drawn_whole_and_the_labels_apart():
    groups = np.repeat(names(12, "tile"), 3)
    labels = np.repeat([0, 1], 18)
    weights = draw(names(36), groups, labels, 500)
    assert weights.shape == (500, 36)
    by_group = weights.reshape(500, 12, 3)
    assert (by_group == by_group[:, :, :1]).all()
    assert (by_group[:, :6, 0].sum(1) == 5).all() and (by_group[:, 6:, 0].sum(1) == 5).all()
    assert weights.mean() == pytest.approx(5 / 6) and len(np.unique(weights, axis=0)) > 400


def test_draws_depend_on_the_test_set_alone():
    paths, labels = names(30), np.repeat([0, 1], 15)
    weights = draw(paths, paths, labels)
    order = np.random.default_rng(0).permutation(30)
    np.testing.assert_array_equal(draw(paths[order], paths[order], labels[order]), weights[:, order])
    assert fingerprint(paths[order], paths[order], labels[order]) == fingerprint(paths, paths, labels)
    other = np.where(labels == 0, np.char.add("other ", paths), paths)
    changed = draw(other, other, labels)
    assert not np.array_equal(changed[:, :15], weights[:, :15])
    np.testing.assert_array_equal(changed[:, 15:], weights[:, 15:])  # the defective images are the same
    assert fingerprint(other, other, labels) != fingerprint(paths, paths, labels)
    assert weights[0, :15].astype(int).tolist() == [0, 1, 1, 0, 2, 0, 3, 0, 2, 2, 0, 0, 1, 2, 0]  # on any machine


@pytest.mark.parametrize("kind", ["plain", "tied", "half tied", "heavy tails", "two clusters", "constant"])
def test_bins_are_as_good_as_exact(kind):
    maps, masks, scores, labels = maps_of(kind)
    exact = evaluate(maps, masks, scores, labels)
    binned = resample(maps, masks, scores, labels, np.ones((1, len(labels)), np.float32))
    assert list(binned) == list(METRICS)
    for name, value in exact.items():
        assert binned[name] == pytest.approx(value, abs=1e-3), name


def test_a_resample_is_the_metric_of_the_images_drawn():
    maps, masks, scores, labels = maps_of(n=20)
    paths = names(20)
    weights = draw(paths, paths, labels, 3)
    binned = resample(maps, masks, scores, labels, weights)
    for row, w in enumerate(weights.astype(int)):
        exact = evaluate(*(np.repeat(x, w, axis=0) for x in (maps, masks, scores, labels)))
        assert [binned[name][row] for name in METRICS] == pytest.approx([exact[name] for name in METRICS], abs=1e-3)


def test_a_few_anomalous_pixels_count_one_by_one():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(4, 64, 64)).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[2, 3, 4:9] = masks[3, 40, 10] = True
    maps[masks] += 2
    exact = evaluate(maps, masks, [0, 1, 2, 3], [0, 0, 1, 1])
    binned = resample(maps, masks, np.arange(4), np.array([0, 0, 1, 1]), np.ones((1, 4), np.float32))
    assert binned["pixel_ap"] == pytest.approx(exact["pixel_ap"], abs=1e-3)


def test_what_is_not_defined_has_no_resamples():
    maps, masks, scores, labels = maps_of(n=12)
    weights = draw(names(12), names(12), labels)
    without = resample(maps, None, scores, labels, weights)
    assert without["image_auroc"].shape == (1000,) and without["pro"] is without["pixel_ap"] is None
    one_class = resample(maps, masks, scores, np.ones(12), weights)
    assert one_class["image_auroc"] is None
    one_group = draw(names(12), np.where(labels == 0, "a tile", names(12)), labels)
    assert set(map(type, resample(maps, masks, scores, labels, one_group).values())) == {type(None)}
    unlocated = masks.copy()
    unlocated[6] = False  # a defect without a mask is no background
    exact = evaluate(np.delete(maps, 6, 0), np.delete(masks, 6, 0), scores, labels)
    binned = resample(maps, unlocated, scores, labels, np.ones((1, 12), np.float32))
    assert binned["pixel_auroc"] == pytest.approx(exact["pixel_auroc"], abs=1e-3)


def test_six_hundred_maps_are_resampled_in_seconds():
    """Two seconds of one core are the budget; three times that on whatever runs this test."""
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((600, 256, 256), np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[300:, 50:90, 100:140] = True
    labels = np.repeat([0, 1], 300)
    weights = draw(names(600), names(600), labels)
    began = time.process_time()
    resample(maps, masks, maps.max((1, 2)), labels, weights)
    assert time.process_time() - began < 6


# --- intervals ----------------------------------------------------------------------------------------------------


def simulated(rng, groups, photographs, shift=1.2, of_group=0.7):
    """Scores of good and defective images, whose items have an effect of their own."""
    effect = rng.normal(size=2 * groups) * of_group**0.5
    effect[groups:] += shift
    return np.repeat(effect, photographs) + rng.normal(size=2 * groups * photographs) * (1 - of_group) ** 0.5


def test_intervals_cover_what_they_promise():
    """In 93 to 97 % of 1,000 test sets of 40 items each; photographs taken for items of their own do far worse."""
    rng, G, n = np.random.default_rng(1), 40, 4
    labels, item = np.repeat([0, 1], G * n), np.repeat(names(2 * G), n)
    truth = norm.cdf(1.2 / 2**0.5)
    paths = names(2 * G * n)
    weights = {"items": draw(paths, item, labels, 300), "photographs": draw(paths, paths, labels, 300)}
    inside = dict.fromkeys(weights, 0)
    for _ in range(1000):
        scores = simulated(rng, G, n)
        value = auroc(scores, labels == 1)
        for name, w in weights.items():
            inside[name] += abs(value - truth) <= 1.96 * resampling.image_auroc(scores, labels, w).std(ddof=1)
    assert 930 <= inside["items"] <= 970
    assert inside["photographs"] < 850


def delong(scores, labels):
    """Standard deviation of the AUROC by DeLong, DeLong & Clarke-Pearson 1988."""
    good, bad = scores[labels == 0], scores[labels == 1]
    right = (bad[:, None] > good) + 0.5 * (bad[:, None] == good)
    return math.sqrt(right.mean(1).var(ddof=1) / len(bad) + right.mean(0).var(ddof=1) / len(good))


@pytest.mark.parametrize("digits", [6, 0])
def test_without_groups_resamples_agree_with_delong(digits):
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], [150, 250])
    scores = np.round(rng.normal(size=400) + labels, digits)
    spread = resampling.image_auroc(scores, labels, draw(names(400), names(400), labels, 5000)).std(ddof=1)
    assert spread == pytest.approx(delong(scores, labels), rel=0.05)


def test_the_record_has_intervals_beside_its_metrics(toy_root, tmp_path):
    made = {}
    for method in ("patchknn", "l2cae"):
        made[method] = runs.run(method, data_root=toy_root, preset="smoke", device="cpu", out=tmp_path / method)
    record, kept = made["patchknn"], runs.read_resamples(tmp_path / "patchknn")
    assert {name: values.shape for name, values in kept.items()} == {**dict.fromkeys(METRICS, (1000,)), "test_set": ()}
    assert (tmp_path / "patchknn" / "resamples.npz").stat().st_size < 30_000
    assert list(record["intervals"]) == list(METRICS)
    for name, (low, high) in record["intervals"].items():
        half = 1.96 * kept[name].std(ddof=1, dtype=float)
        value = record["metrics"][name]
        assert (low, high) == pytest.approx((max(value - half, 0), min(value + half, 1)), abs=1e-4)
    # another method on the same images has the same resamples, so both draw the same images
    other = runs.read_resamples(tmp_path / "l2cae")
    assert other["test_set"] == kept["test_set"]
    maps = runs.read_maps(tmp_path / "l2cae")
    weights = draw(maps["paths"], maps["paths"], maps["labels"])
    np.testing.assert_allclose(
        resampling.image_auroc(maps["scores"], maps["labels"], weights), other["image_auroc"], atol=1e-6
    )
    weave = runs.run("patchknn", category="weave", data_root=toy_root, preset="smoke", device="cpu", out=tmp_path / "w")
    assert weave["intervals"] and runs.read_resamples(tmp_path / "w")["test_set"] != kept["test_set"]


def test_several_categories_are_resampled_apart_and_averaged(toy_root, tmp_path):
    settings = dict(data_root=toy_root, preset="smoke", device="cpu")
    record = runs.run("patchknn", category="all", **settings, out=tmp_path / "all") | {"folder": tmp_path / "all"}
    kept = runs.read_resamples(tmp_path / "all")
    assert kept["pro"].mean() == pytest.approx(record["metrics"]["pro"], abs=0.1)
    alone = evidence.of_category(record, "toy/gear")
    assert alone["metrics"] == record["metrics_by_category"]["toy/gear"] and set(alone["resamples"]) == set(METRICS)
    for name in METRICS:
        each = [runs.read_resamples(tmp_path / "all", category)[name] for category in record["metrics_by_category"]]
        np.testing.assert_allclose(np.mean(each, 0), kept[name], atol=1e-6)
        estimated = evidence.estimate([alone], name)
        assert estimated.low < alone["metrics"][name] < estimated.high and not estimated.complete
    from_scores = runs.image_resamples_from_scores(tmp_path / "all")
    np.testing.assert_allclose(from_scores["image_auroc"], kept["image_auroc"], atol=1e-6)
    assert from_scores["test_set"] == kept["test_set"]
    (tmp_path / "all" / "resamples.npz").unlink()
    assert set(runs.read_resamples(tmp_path / "all")) == {"image_auroc", "test_set"}
    without = evidence.of_category(record, "toy/gear")["resamples"]
    assert list(without) == ["image_auroc"]
    np.testing.assert_allclose(without["image_auroc"], alone["resamples"]["image_auroc"], atol=1e-6)


def test_data_without_masks_have_an_interval_of_the_image_metric_only(toy_root, tmp_path):
    (tmp_path / "root").mkdir()
    for part in ("train", "test"):
        os.symlink(toy_root / "gear" / part, tmp_path / "root" / part)
    record = runs.run(
        "patchknn", tmp_path / "run", dataset="folder", data_root=tmp_path / "root", preset="smoke", device="cpu"
    )
    assert record["intervals"]["pro"] is None and len(record["intervals"]["image_auroc"]) == 2
    assert set(runs.read_resamples(tmp_path / "run")) == {"image_auroc", "test_set"}


# --- estimates and differences --------------------------------------------------------------------------------------


def record(folder, seed, value, resamples=None, test_set="one", metric="image_auroc"):
    """A record in a folder, with resamples if some are given."""
    folder = Path(folder) / f"{value}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if resamples is not None:
        np.savez(folder / "resamples.npz", **{metric: np.float32(resamples)}, test_set=test_set)
    return {"seed": seed, "metrics": {metric: value}, "folder": folder}


def spread(sd, seed=0):
    """1,000 numbers with exactly this standard deviation."""
    x = np.random.default_rng(seed).normal(size=1000)
    return sd * (x - x.mean()) / x.std(ddof=1)


def test_an_estimate_holds_both_sources_of_doubt(tmp_path):
    values = [0.80, 0.82, 0.87]
    records = [record(tmp_path, s, v, v + spread(0.03)) for s, v in enumerate(values)]
    found = evidence.estimate(records, "image_auroc")
    sd = np.std(values, ddof=1)
    half = math.hypot(1.96 * 0.03, t.ppf(0.975, 2) * sd / 3**0.5)
    assert (found.value, found.n_seeds, found.complete) == (pytest.approx(0.83), 3, True)
    assert (found.sd_seeds, found.sd_test) == (pytest.approx(sd), pytest.approx(0.03, rel=1e-4))
    assert (found.low, found.high) == pytest.approx((0.83 - half, 0.83 + half), abs=1e-5)


def test_an_estimate_says_what_it_does_not_know(tmp_path):
    old = [record(tmp_path / "old", s, v) for s, v in enumerate([0.80, 0.82])]
    found = evidence.estimate(old, "image_auroc")
    assert found.sd_test is None and not found.complete
    assert found.high - found.value == pytest.approx(t.ppf(0.975, 1) * np.std([0.8, 0.82], ddof=1) / 2**0.5)
    one = evidence.estimate([record(tmp_path / "one", 0, 0.8, spread(0.03))], "image_auroc")
    assert one.sd_seeds is None and not one.complete
    assert (one.low, one.high) == pytest.approx((0.8 - 1.96 * 0.03, 0.8 + 1.96 * 0.03), abs=1e-5)
    mixed = [record(tmp_path / "one", 0, 0.8, spread(0.03)), old[1]]
    assert evidence.estimate(mixed, "image_auroc").sd_test is None
    nothing = evidence.estimate(old[:1], "image_auroc")
    assert (nothing.low, nothing.high) == (0, 1)  # nothing is known
    assert math.isnan(evidence.estimate(old, "pro").value) and evidence.estimate(old, "pro").n_seeds == 0
    # an interval is cut at 1
    assert evidence.estimate([record(tmp_path, 0, 0.99, spread(0.03))], "image_auroc").high == 1


def test_differences_are_paired(tmp_path):
    """Two methods that fail on the same images: each is very unsure, their difference is not."""
    common = spread(0.05)
    first = [record(tmp_path / "a", s, v, v + common) for s, v in enumerate([0.80, 0.84])]
    second = [
        record(tmp_path / "b", s, v - 0.02, v - 0.02 + common + spread(0.001, 1)) for s, v in [(0, 0.8), (1, 0.84)]
    ]
    found = evidence.difference(first, second, "image_auroc")
    assert (found.value, found.verdict, found.n_seeds, found.complete) == (pytest.approx(0.02), "above", 2, True)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.001, rel=0.01)
    assert found.p < 1e-6
    assert evidence.difference(second, first, "image_auroc").verdict == "below"
    apart = [record(tmp_path / "c", s, v - 0.02, v - 0.02 + spread(0.05, 3)) for s, v in [(0, 0.8), (1, 0.84)]]
    assert evidence.difference(first, apart, "image_auroc").verdict == "undecided"
    assert evidence.difference(first, first, "image_auroc").p == 1
    one = evidence.difference(first[:1], second[:1], "image_auroc")
    assert (one.verdict, one.complete) == ("undecided", False) and math.isnan(one.p)
    assert one.low > 0  # the test set alone


@pytest.mark.parametrize("sd_test", [None, 0.01, 0.05])
def test_the_p_value_and_the_interval_agree(sd_test, tmp_path):
    """An interval of 1 - p just reaches 0; without resamples p is that of the paired t-test."""
    rng = np.random.default_rng(0)
    for trial in range(20):
        gains = rng.normal(0.05, 0.03, 3)
        resamples = (0 if sd_test is None else spread(sd_test)), (0.0 * spread(1))
        pair = [
            [
                record(tmp_path / f"{trial}{k}", s, g * (1 - k), None if sd_test is None else resamples[k])
                for s, g in enumerate(gains)
            ]
            for k in (0, 1)
        ]
        found = evidence.difference(*pair, "image_auroc")
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0) == (found.verdict != "undecided")
        half = math.hypot(
            norm.ppf(1 - found.p / 2) * (sd_test or 0), t.ppf(1 - found.p / 2, 2) * gains.std(ddof=1) / 3**0.5
        )
        assert half == pytest.approx(abs(gains.mean()), rel=1e-3)


def naive_holm(p_values):
    adjusted, largest = {}, 0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return [adjusted[i] for i in range(len(p_values))]


def test_holms_correction():
    assert evidence.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])  # by hand
    p = np.random.default_rng(0).uniform(size=30) ** 3
    assert evidence.holm(p).tolist() == pytest.approx(naive_holm(p))
    with_gap = evidence.holm([0.02, math.nan, 0.01])
    assert with_gap[[0, 2]].tolist() == pytest.approx([0.02, 0.02]) and math.isnan(with_gap[1])
    assert evidence.holm([]).size == 0


def test_a_family_of_comparisons_is_corrected(tmp_path):
    """Each of twenty differences would pass alone; together they do not."""
    base = [record(tmp_path / "base", s, 0.5, spread(0.0)) for s in range(3)]
    gains = [0.019, 0.02, 0.021]
    pairs = {
        str(k): ([record(tmp_path / f"{k}", s, 0.5 + g, spread(0.009, k)) for s, g in enumerate(gains)], base)
        for k in range(20)
    }
    alone = evidence.compare({"0": pairs["0"]}, ["image_auroc"])
    assert alone.loc[("0", "image_auroc"), "verdict"] == "above"
    together = evidence.compare(pairs, ["image_auroc"])
    assert set(together["verdict"]) == {"undecided"} and (together["p"] < 0.05).all()
    assert list(together) == ["value", "low", "high", "p", "p_adjusted", "seeds", "complete", "verdict"]
    every = evidence.compare({"0": pairs["0"]})
    assert every.index.get_level_values("metric").tolist() == list(METRICS)
    assert every["p_adjusted"].isna().tolist() == [False, True, True, True]  # what was not measured does not count


# --- against printed numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "printed", "categories", "metric", "verdict"),
    [
        ([0.940, 0.941, 0.942], 0.94, 15, "image_auroc", "reproduced"),
        ([0.952, 0.953, 0.954], 0.94, 15, "image_auroc", "undecided"),  # .013 ± .005 around a margin of .01
        ([0.952, 0.953, 0.954], 0.94, 1, "image_auroc", "reproduced"),  # one category: .02
        ([0.952, 0.953, 0.954], 0.94, 15, "pro", "reproduced"),
        ([0.970, 0.971, 0.972], 0.94, 15, "pro", "differs"),
        ([0.970, 0.971, 0.972], 0.94, 1, "pixel_ap", "reproduced"),
        ([0.900, 0.901, 0.902], 0.94, 15, "pixel_auroc", "differs"),
        ([0.90, 0.94, 0.98], 0.94, 1, "pro", "undecided"),  # seeds that scatter do not agree more
        ([0.94], 0.94, 1, "pro", "undecided"),
    ],
)
def test_verdicts_against_printed_numbers(values, printed, categories, metric, verdict):
    records = [{"metrics": {metric: v}} for v in values]
    found, low, high = evidence.against_printed(records, printed, categories, metric)
    assert found == verdict
    assert evidence.against_printed(np.array(values), printed, categories, metric) == (found, low, high)
    if len(values) > 1:
        half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) * (1 + 1 / len(values)) ** 0.5
        assert (low, high) == pytest.approx((np.mean(values) - printed - half, np.mean(values) - printed + half))
    assert evidence.against_printed(values, printed, categories, metric, comparable=False)[0] == "not comparable"


def test_every_metric_has_a_margin():
    assert set(evidence.MARGINS) == set(METRICS)


# --- records of the book ----------------------------------------------------------------------------------------------


def test_committed_records_of_tiles_have_the_doubt_of_their_tiles():
    """32 good tiles: a standard deviation near .036, seven times that of the seeds."""
    records = runs.committed_seeds(runs.Request("patchknn", "mt", preset="small"))
    found = evidence.estimate(records, "image_auroc")
    assert found.sd_test == pytest.approx(0.036, abs=0.004) and found.sd_seeds < 0.01
    assert found.value == pytest.approx(np.mean([r["metrics"]["image_auroc"] for r in records])) and found.complete
