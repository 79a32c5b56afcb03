"""Tables of the book: what they make of run records."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from vitad import evidence, runs
from vitad.methods import mala
from vitad.metrics import METRICS
from vitad.runs import Request, by_hash, committed, committed_seeds, hash_of, on_other_processors
from vitad.settings import resolve
from vitad.show import cost, tables


def record(method, split, seed, auroc, pro=0.5, **overrides):
    return {
        "method": method,
        "dataset": "mt",
        "category": None,
        "split": split,
        "preset": "small",
        "seed": seed,
        "settings": {"sigma": 4.0} | overrides,
        "overrides": overrides,
        "weights": {"asked": "auto", "source": "random"},
        "protocol": {"image_size": [224, 224]},
        "metrics": {"image_auroc": auroc, "pixel_auroc": 0.75, "pixel_ap": 0.25, "pro": pro},
        "timings": {"load_s": 6, "prepare_s": 0, "train_s": 60, "score_s": 24},
    }


RECORDS = [
    record("a", "grouped", 0, 0.7),
    record("a", "grouped", 1, 0.8),
    record("a", "grouped", 2, 0.9),
    record("a", "differnet", 0, 0.95),
    record("b", "grouped", 0, 0.6, pro=None),
]


def test_a_table_has_a_line_a_run(toy_root, tmp_path):
    record = runs.run("patchknn", data_root=toy_root, preset="smoke", seed=3, out=tmp_path / "run")
    (row,) = tables.by_run([record]).to_dict("records")
    assert (row["method"], row["data"], row["px"], row["seed"]) == ("patchknn", "toy gear", 64, 3)
    assert row["PRO"] == record["metrics"]["pro"]
    assert tables.by_run(RECORDS)["minutes"].tolist() == [1.5] * 5
    assert list(tables.by_run([]).columns) == list(tables.by_run(RECORDS).columns)


def test_a_table_over_seeds_shows_mean_and_spread():
    rows = tables.over_seeds(RECORDS).set_index(["method", "data"])
    assert rows["seeds"].to_dict() == {("a", "mt grouped"): 3, ("a", "mt differnet"): 1, ("b", "mt grouped"): 1}
    assert rows.loc[("a", "mt grouped"), "image AUROC"] == "0.800\u00a0±\u00a00.100"
    assert rows.loc[("a", "mt differnet"), "image AUROC"] == "0.950"
    assert rows.loc[("b", "mt grouped"), "PRO"] == "–"


def test_runs_with_other_settings_are_no_seeds():
    rows = tables.over_seeds([*RECORDS[:2], record("a", "grouped", 2, 0.3, sigma=1.0)])
    assert dict(zip(rows["preset"], rows["seeds"], strict=True)) == {"small": 2, "small, sigma=1.0": 1}


def test_one_model_for_all_stands_beside_one_for_each_category():
    def multi(seed, gear):
        both = {"toy/gear": gear, "toy/weave": {"image_auroc": 0.5, "pixel_auroc": 0.5, "pixel_ap": 0.5, "pro": None}}
        return {"method": "a", "dataset": "toy", "category": "all", "metrics": {}, "metrics_by_category": both}

    gear = {"image_auroc": 0.7, "pixel_auroc": 0.8, "pixel_ap": 0.2, "pro": 0.5}
    single = {"method": "a", "dataset": "toy", "category": "gear", "metrics": gear}
    shown = tables.by_category([multi(0, gear), multi(1, gear | {"image_auroc": 0.9}), single])
    assert shown.loc[("toy/gear", "a", "toy/all"), "image AUROC"] == "0.800\u00a0±\u00a00.141"
    assert shown.loc[("toy/gear", "a", "toy/gear"), "image AUROC"] == "0.700"
    assert shown["seeds"].tolist() == [2, 2, 1] and shown.loc[("toy/weave", "a", "toy/all"), "PRO"] == "–"


def test_kinds_of_defects_are_told_apart(toy_root, tmp_path):
    settings = dict(category="gear", data_root=toy_root, preset="smoke", device="cpu")
    made = [
        runs.run("patchknn", **settings, seed=s, out=tmp_path / str(s)) | {"folder": tmp_path / str(s)} for s in (0, 1)
    ]
    shown = tables.by_defect([*made, made[0] | {"folder": tmp_path}])
    assert shown.columns.tolist() == ["misplaced", "missing", "scratch", "stain"]
    figures = []
    for r in made:
        found = runs.read_maps(r["folder"])
        part = np.isin(found["defects"], ["good", "stain"])
        figures.append(roc_auc_score(found["labels"][part], found["scores"][part]))
    mean, spread = np.mean(figures), np.std(figures, ddof=1)
    assert shown.loc[("patchknn", 64), "stain"] == f"{mean:.3f}\u00a0±\u00a0{spread:.3f}"


def test_kinds_of_defects_of_one_category_among_several(toy_root, tmp_path):
    settings = dict(category="all", data_root=toy_root, preset="smoke", device="cpu")
    made = runs.run("patchknn", **settings, out=tmp_path) | {"folder": tmp_path}
    shown, found = tables.by_defect([made], "grain"), runs.read_maps(tmp_path)
    assert shown.columns.tolist() == ["hole", "scratch", "stain"]
    part = np.char.startswith(found["paths"], "grain/") & np.isin(found["defects"], ["good", "hole"])
    assert shown.loc[("patchknn", 64), "hole"] == f"{roc_auc_score(found['labels'][part], found['scores'][part]):.3f}"
    assert "missing" in tables.by_defect([made]).columns


def test_the_cost_of_an_image():
    shown = cost.cost(["l2cae", "anovit", "patchknn", "mala"], image_size=70, preset="smoke", device="cpu")
    assert shown["px"].tolist() == [64, 64, 64, 64]  # what patches of 16 px divide
    model = mala.Model(resolve(mala.Settings, mala.PRESETS, "smoke"))
    assert shown.loc["mala", "parameters, million"] == round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
    assert (shown["images a second"] > 0).all() and (shown["multiply-adds, billion"] >= 0).all()


def test_multiply_adds_are_those_of_the_layers():
    """ViT-B/16 at 224 px is known for 17.6 billion: of a plain autoencoder on top there is little more."""
    shown = cost.cost(["anovit"], image_size=224, device="cpu").loc["anovit"]
    assert 17.5 < shown["multiply-adds, billion"] < 25 and 85 < shown["parameters, million"] < 95


def test_splits_are_compared_where_a_method_ran_on_both():
    image, *others = tables.across_splits(RECORDS, "grouped", "differnet").to_dict("records")
    assert (image["method"], image["grouped"], image["differnet"], image["gain"]) == ("a", 0.8, 0.95, 0.15)
    assert [image["metric"], *(row["metric"] for row in others)] == list(METRICS.values())
    assert [row["gain"] for row in others] == [0, 0, 0]


def test_panels_hold_all_metrics_and_intervals_where_there_are_some():
    values, intervals = tables.panels({"a": RECORDS[:3], "b": RECORDS[4:]})
    assert list(values) == list(intervals) == list(METRICS.values())
    assert values["image AUROC"] == {"a": [0.7, 0.8, 0.9], "b": [0.6]} and values["PRO"]["b"] == []
    low, high = intervals["image AUROC"]["a"]
    assert (low, high) == (pytest.approx(0.8 - 4.3027 * 0.1 / 3**0.5, abs=1e-4), 1.0)
    assert "b" not in intervals["PRO"]


def with_resamples(record, folder, **sd):
    """The record beside resamples of its test set; `sd` of each metric."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.savez(folder / "resamples.npz", **{metric: rng.normal(0, s, 1000) for metric, s in sd.items()})
    return record | {"folder": folder}


def test_intervals_say_what_they_lack_and_what_is_at_chance(tmp_path):
    protocol = {"protocol": {"image_size": [224, 224], "pro_limit": 0.3}}
    guess = [record("a", "grouped", s, v, pro=p) | protocol for s, v, p in [(0, 0.49, 0.2), (1, 0.52, 0.1)]]
    wrong = with_resamples(record("a", "grouped", 0, 0.2, pro=None) | protocol, tmp_path / "wrong", image_auroc=0.05)
    old = record("a", "grouped", 0, 0.9)
    del old["metrics"]["pixel_ap"]
    shown = tables.intervals({("tiles", "a"): guess, ("tiles", "b"): [wrong], ("tiles", "c"): [old | protocol]})
    assert shown.loc[("tiles", "a"), "seeds"] == 2
    assert "[0.314,\u00a00.696]\u00a0*" in shown.loc[("tiles", "a"), "image AUROC"]  # no line breaks within it
    shown = shown.replace("\u00a0", " ", regex=True)
    assert shown.loc[("tiles", "a"), "image AUROC"] == "0.505 [0.314, 0.696] *, at chance"  # t(0.975, 1) is 12.7
    assert shown.loc[("tiles", "a"), "pixel AUROC"] == "0.750 [0.750, 0.750] *"
    assert shown.loc[("tiles", "a"), "PRO"] == "0.150 [0.000, 0.785] *, at chance"
    assert shown.loc[("tiles", "b"), "image AUROC"] == "0.200 [0.104, 0.296], below chance"
    assert shown.loc[("tiles", "b"), "PRO"] == "–"
    assert shown.loc[("tiles", "c")].tolist() == [1, "0.900", "0.750", "not measured", "0.500"]


def test_differences_are_paired_and_corrected_together(tmp_path):
    low, high = ([record("a", "grouped", s, v + 0.001 * s, pro=None) for s in range(3)] for v in (0.5, 0.9))
    once = [[with_resamples(record("a", "grouped", 0, v), tmp_path / str(v), image_auroc=v / 10)] for v in (0.5, 0.8)]
    shown = tables.differences({("tiles", "x"): (high, low), ("tiles", "y"): (low[:1], high), ("pills", "z"): once})
    shown = shown.replace("\u00a0", " ", regex=True)
    assert shown["seeds"].tolist() == [3, 1, 1]
    assert shown["image AUROC"].tolist() == [
        "+0.400 [+0.400, +0.400] *, above",
        "-0.400, undecided: one seed",  # paired with the same seed of the other
        "-0.300 [-0.357, -0.243], undecided: one seed",  # the same resamples, 0.03 apart
    ]
    assert shown["pixel AUROC"].tolist()[0] == "+0.000 [+0.000, +0.000] *, undecided"
    assert shown["PRO"].tolist() == ["–", "–", "+0.000, undecided: one seed"]
    assert shown.index.tolist() == [("tiles", "x"), ("tiles", "y"), ("pills", "z")]


def test_costs_are_minutes_of_one_core_and_weights():
    def run(seed, threads, **timings):
        r = record("a", "grouped", seed, 0.5)
        r["timings"] = r["timings"] | timings
        return r | {
            "environment": {"threads": threads, "device_name": f"processor {threads}"},
            "counts": {"parameters": 2_000_000, "trained_parameters": 500_000},
        }

    (row,) = tables.costs({("tiles", "a"): [run(0, 2), run(1, 1, train_s=180)]}).to_dict("records")
    assert row == {
        "parameters": 2.0,
        "trained": 0.5,
        "pre-trained weights": "none",
        "minutes": 3.0,  # 1.5 of two cores, against 3.5
        "processor": "processor 2",
    }
    loaded = run(0, 1) | {"weights": {"asked": "auto", "source": "a file"}}
    assert tables.costs({("tiles", "a"): [loaded]})["pre-trained weights"].item() == "a file"


def test_what_is_expected_comes_from_the_spread_of_the_runs():
    mean, tolerance, n = evidence.expected(RECORDS[:3])
    assert (mean, n) == (pytest.approx(0.8), 3)
    assert tolerance == pytest.approx(9.9248 * 0.1 * (4 / 3) ** 0.5, rel=1e-4)  # t(0.995) with 2 degrees of freedom
    alone, unknown, n = evidence.expected(RECORDS[3:4])
    assert (alone, n) == (0.95, 1) and np.isnan(unknown)
    assert np.isnan(evidence.expected([])[0]) and evidence.expected([])[2] == 0


def test_one_more_run_lies_within_the_tolerance_as_often_as_is_said():
    rng, inside = np.random.default_rng(0), []
    for _ in range(20_000):
        *known, more = rng.normal(0.9, 0.02, 5)
        mean, tolerance, _ = evidence.expected([{"metrics": {"image_auroc": value}} for value in known])
        inside.append(abs(more - mean) <= tolerance)
    assert np.mean(inside) == pytest.approx(evidence.EXPECTED, abs=0.003)


def test_a_run_far_from_the_others_is_refused():
    runs_ = [{"metrics": {"image_auroc": 0.9 + 0.002 * k}} for k in range(12)]
    near, far = ({"metrics": {"image_auroc": value}} for value in (0.92, 0.95))
    assert evidence.check_expected(near, runs_) == "image AUROC 0.920, expected 0.911 ± 0.023 from 12 runs"
    with pytest.raises(AssertionError, match="0.950, expected 0.911 ± 0.023 from 12 runs: outside"):
        evidence.check_expected(far, runs_)
    assert evidence.check_expected(far, runs_[:1]) == "", "one run says nothing of the spread"


def test_runs_on_other_processors_count_only_for_what_to_expect():
    request = Request("anovit")
    repeated = on_other_processors(request)
    assert {r["environment"]["cpu_capability"] for r in repeated} >= {"AVX2", "DEFAULT"}
    assert all(hash_of(r) in {replace(request, seed=seed).hash for seed in range(3)} for r in repeated)
    folders = {r["folder"] for r in repeated}
    assert len(folders) == len(repeated) and folders.isdisjoint(r["folder"] for r in committed())
    assert [r["seed"] for r in committed_seeds(request)] == list(range(10))
    assert by_hash()[request.hash]["folder"] not in folders
    assert on_other_processors(request.override(lr=1e-3)) == []
    shown = tables.expectation(request)[""]["PRO"]
    assert shown.endswith(f"({10 + len(repeated)} runs)")


def test_only_the_very_same_run_tells_what_to_expect():
    demo = committed_seeds(Request("anovit"))
    assert {r["seed"] for r in demo} >= {0, 1, 2} and {r["category"] for r in demo} == {"gear"}
    assert committed_seeds(Request("anovit", category="weave")) == []
    assert committed_seeds(Request("anovit", overrides={"lr": 1e-3})) == []
    shown = tables.expectation(Request("anovit", category="weave", seed=1, overrides={"lr": 1e-3}))[""]
    assert "--category weave --preset demo --seed 1 --set lr=0.001 --out" in shown["command"]
    assert shown["PRO"] == "never run so far"


def test_committed_records_are_found_without_the_data(monkeypatch):
    monkeypatch.delenv("VITAD_MT_ROOT", raising=False)
    (one, *_) = committed_seeds(Request("patchknn", "mt", preset="small"))
    assert (one["dataset"], one["split"]) == ("mt", "grouped")
    assert committed_seeds(Request("patchknn", "mt", split="mala100", preset="small"))[0]["split"] == "mala100"


def test_an_ablation_shows_each_variant_beside_what_is_printed():
    shown = tables.ablation({"a": RECORDS[:3], "b": RECORDS[4:]}, {"a": {"image_auroc": 91.2}})
    assert (
        shown.loc["a", "image AUROC"] == "0.800\u00a0±\u00a00.100" and shown.loc["a", "image AUROC, printed"] == "0.912"
    )
    assert shown.loc["b", "image AUROC"] == "0.600" and shown.loc["b", "PRO"] == "–"
    assert shown["seeds"].to_dict() == {"a": 3, "b": 1}


def variants(**figures):
    return {name: [record("a", "grouped", s, f) for s, f in enumerate(values)] for name, values in figures.items()}


def contrast(found, weights):
    return evidence.contrast(found, weights, "image_auroc")


def test_a_contrast_is_taken_seed_by_seed():
    """Equal gains at very different levels: certain in pairs, lost in the spread otherwise. Against scipy."""
    from scipy.stats import ttest_rel

    base, full = [0.5, 0.7, 0.9], [0.53, 0.72, 0.925]
    found = contrast(variants(base=base, full=full), {"full": 1, "base": -1})
    test = ttest_rel(full, base)
    interval = test.confidence_interval(0.95)
    assert found.value == pytest.approx(0.025) and found.verdict == "above" and found.n_seeds == 3
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(test.pvalue) and not found.complete
    assert contrast(variants(base=full, full=base), {"full": 1, "base": -1}).verdict == "below"
    shuffled = contrast(variants(base=base, full=full[::-1]), {"full": 1, "base": -1})
    assert shuffled.verdict == "undecided"


def test_a_contrast_of_more_than_two_variants_and_of_few_seeds():
    four = variants(base=[0.5, 0.5], m=[0.6, 0.61], ca=[0.55, 0.55], full=[0.8, 0.8])
    found = contrast(four, {"full": 1, "m": -1, "ca": -1, "base": 1})
    assert found.value == pytest.approx(0.145) and found.n_seeds == 2
    one = contrast(variants(base=[0.5], full=[0.9, 0.9]), {"full": 1, "base": -1})
    assert (one.n_seeds, one.verdict) == (1, "undecided")
    none = contrast(variants(base=[], full=[0.9]), {"full": 1, "base": -1})
    assert (none.n_seeds, none.verdict) == (0, "undecided")


def test_contrasts_stand_beside_the_printed_ones():
    runs_ = variants(base=[0.5, 0.6], full=[0.6, 0.7])
    printed = {"base": {"image_auroc": 82.2, "pro": 79.6}, "full": {"image_auroc": 91.2, "pro": 92.3}}
    found = evidence.contrasts(runs_, {"full − base": {"full": 1, "base": -1}}, printed=printed)
    assert found.index.get_level_values("metric").tolist() == list(METRICS.values())
    assert np.isnan(found.loc[("full − base", "pixel AP"), "printed"])
    assert found.loc[("full − base", "image AUROC"), ["difference", "printed"]].tolist() == pytest.approx([0.1, 0.09])
    assert found.loc[("full − base", "PRO"), ["difference", "printed"]].tolist() == pytest.approx([0.0, 0.127])


def test_an_ablation_runs_each_variant_with_each_seed(toy_root, tmp_path):
    own = {"as it is": {}, "max": {"score": "max"}}
    request = Request("patchknn", overrides={"sigma": 2.0}, preset="smoke", data_root=toy_root)
    found = runs.run_variants(request, own, (3, 4), out=tmp_path)
    assert {n: [r["seed"] for r in records] for n, records in found.items()} == {"as it is": [3, 4], "max": [3, 4]}
    assert found["max"][0]["overrides"] == {"sigma": 2.0, "score": "max"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["as-it-is-3", "as-it-is-4", "max-3", "max-4"]


def test_a_run_that_is_committed_is_found_and_any_other_is_made(toy_root, tmp_path):
    found = runs.find_or_run("patchknn", seed=1, out=tmp_path / "a")
    assert found["seed"] == 1 and found["preset"] == "demo" and not (tmp_path / "a").exists()
    made = runs.find_or_run("patchknn", seed=1, out=tmp_path / "a", preset="smoke", data_root=toy_root)
    assert made == runs.read_record(tmp_path / "a")
