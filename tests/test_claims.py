"""Claims are checked against the committed records, and fall with them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

import vitad
from vitad import claims, runs
from vitad.claims import (
    above,
    above_on_average,
    above_on_each,
    all_of,
    at_least,
    at_most,
    by_all_metrics,
    claim,
    counted,
    gains_at_most,
    in_code,
    interaction_undecided,
    measured,
    minutes_at_most,
    near_chance,
    of_category,
    of_kind,
    runs_of,
    undecided,
)
from vitad.cli import main
from vitad.errors import UserError
from vitad.evidence import difference, estimate

ROOT = Path(__file__).resolve().parents[1]


def test_every_claim_of_the_book_holds():
    fallen = [(c.chapter, c.sentence, c.evidence.numbers) for c in claims.of_the_book() if not c.evidence.holds]
    assert not fallen


def test_a_claim_shows_its_sentence_with_numbers():
    shown = claim("Frozen features beat the convolutional autoencoder on gears.", TOKENS_WIN)
    assert "Frozen features beat" in shown.data and "image AUROC patchknn 0.9" in shown.data
    assert "difference +0." in shown.data and "\u00a0seeds" in shown.data


def test_a_claim_that_the_records_do_not_support_is_an_error():
    with pytest.raises(claims.ClaimError, match=r"do not support this: The autoencoder wins. \(image AUROC l2cae"):
        claim("The autoencoder wins.", above(runs_of("l2cae"), runs_of("patchknn"), "image_auroc"))


def test_each_kind_of_evidence():
    knn, cae = runs_of("patchknn"), runs_of("l2cae", name="autoencoder")
    assert not undecided(knn, cae, "image_auroc").holds
    assert at_least(knn, "image_auroc", 0.8).holds and not at_least(knn, "image_auroc", 0.99).holds
    assert at_most(cae, "image_auroc", 0.84).holds and not at_most(cae, "image_auroc", 0.3).holds
    assert near_chance(cae, margin=0.2).holds and not near_chance(knn, margin=0.2).holds
    both = all_of(at_least(knn, "image_auroc", 0.8), at_most(cae, "image_auroc", 0.84))
    assert both.holds and "autoencoder" in both.numbers and len(both.rests_on) == len(knn.records) + len(cae.records)
    assert not all_of(both, at_least(knn, "image_auroc", 0.99)).holds
    between = all_of(at_least(knn, "image_auroc", 0.8), at_most(knn, "image_auroc", 1.0))
    assert between.holds and between.numbers == at_least(knn, "image_auroc", 0.8).numbers
    dead = runs_of("vitmem", overrides={"shrink": 2.0})
    assert by_all_metrics(above, knn, dead).holds and not by_all_metrics(above, knn, runs_of("vitmem")).holds
    with pytest.raises(UserError, match="no committed record of patchknn-toy-weave"):
        runs_of("patchknn", category="weave")
    (missing,) = in_code('claim("It is better on cloth.", at_least(runs_of("patchknn", category="weave"), "pro", 0.5))')
    assert missing.sentence == "It is better on cloth." and not missing.evidence.holds
    assert missing.evidence.numbers.startswith("no committed record of patchknn-toy-weave")


def test_a_comparison_shows_the_seeds_that_both_have():
    ten, three = runs_of("vitmem"), runs_of("vitmem", name="dead", overrides={"shrink": 2.0})
    assert (len(ten.records), len(three.records)) == (10, 3)
    of_three = f"{estimate(ten.records[:3], 'pro').value:.3f}"
    assert f"PRO vitmem {of_three}, dead" in undecided(ten, three, "pro").numbers
    assert above(three, ten, "pro").rests_on == above(three, runs_of("vitmem", seeds=3), "pro").rests_on


def test_a_bound_on_what_a_step_gains():
    knn, cae = runs_of("patchknn"), runs_of("l2cae")
    assert gains_at_most(knn, cae, "image_auroc", 0.5).holds and not gains_at_most(knn, cae, "image_auroc", 0.3).holds
    assert gains_at_most(cae, knn, "image_auroc", 0.0).holds  # it loses
    once = gains_at_most(runs_of("patchknn", seeds=1), runs_of("l2cae", seeds=1), "image_auroc", 1.0)
    assert not once.holds  # one seed decides nothing
    assert by_all_metrics(gains_at_most, knn, knn, 0.0).holds and not by_all_metrics(gains_at_most, knn, cae, 0.0).holds


def test_one_category_and_one_kind_of_a_model_of_all():
    every = runs_of("mala", name="one model")
    gears, cloth = of_category(every, "toy/gear"), of_category(every, "toy/weave")
    assert gears.name == "one model (toy/gear)" and len(gears.records) == len(every.records)
    mean = every.records[0]["metrics_by_category"]["toy/gear"]["pro"]
    assert gears.records[0]["metrics"]["pro"] == mean and above(cloth, gears, "pro").holds
    all_stains, stains = of_kind(every, "stain"), of_kind(every, "stain", "gear")
    assert at_least(stains, "image_auroc", 0.8).holds
    assert all_stains.records[0]["metrics"] != stains.records[0]["metrics"]


def test_a_model_of_all_categories_is_not_compared_with_one_of_gears():
    every, gears = runs_of("mala"), runs_of("ssltok")
    with pytest.raises(UserError, match="ssltok and mala are tested on toy/gear and toy/all; see `of_category`"):
        above(gears, every, "pro")
    assert above(gears, of_category(every, "toy/gear"), "pro").holds
    with pytest.raises(UserError, match=r"ssltok \(stain\) and mala \(stain\) are tested on toy/gear and toy/all"):
        above(of_kind(gears, "stain"), of_kind(every, "stain"), "image_auroc")
    bores, of_the_gears = of_kind(runs_of("patchknn"), "misplaced"), of_kind(every, "misplaced", "gear")
    assert above(bores, of_the_gears, "image_auroc").holds


def test_one_kind_of_defect_has_the_doubt_of_its_test_images():
    missing, scratches = (of_kind(runs_of("anovit"), kind) for kind in ("missing", "scratch"))
    assert missing.name == "anovit (missing)"
    seeds_alone = [
        [{"seed": r["seed"], "metrics": r["metrics"]} for r in kind.records] for kind in (missing, scratches)
    ]
    both, less = difference(missing.records, scratches.records, "image_auroc"), difference(*seeds_alone, "image_auroc")
    assert both.complete and not less.complete and both.value == less.value
    assert both.low < less.low and both.high > less.high
    assert above(missing, scratches, "image_auroc").holds


def test_an_interval_says_which_doubt_it_lacks():
    one = at_least(runs_of("patchknn", seeds=1), "pro", 0.5)
    assert one.numbers.endswith("1\u00a0seed, not counting what other seeds would change")
    three = runs_of("patchknn", seeds=3)
    assert at_least(three, "pro", 0.5).numbers.endswith("3\u00a0seeds")
    bare = replace(three, records=tuple({k: v for k, v in r.items() if k != "folder"} for r in three.records))
    assert at_least(bare, "pro", 0.5).numbers.endswith("3\u00a0seeds, not counting what other test images would change")


def test_parts_that_add_up():
    full, base = runs_of("vitmem", name="full"), runs_of("vitmem", name="base", overrides=BASE)
    nothing = interaction_undecided(full, full, base, base, "pro")
    assert nothing.holds and "PRO full − full − base + base +0.000" in nothing.numbers
    dead = runs_of("vitmem", overrides={"shrink": 2.0})
    assert not interaction_undecided(full, dead, base, base, "pro").holds


def test_the_mean_over_data_sets_is_paired():
    knn, cae = ([runs_of(m), runs_of(m, "mt", preset="small")] for m in ("patchknn", "l2cae"))
    found = above_on_average(knn, cae, "image_auroc")
    on_gears, on_tiles = (
        difference(a.records[:3], b.records[:3], "image_auroc").value for a, b in zip(knn, cae, strict=True)
    )
    assert found.holds and f" {(on_gears + on_tiles) / 2:+.3f} [" in found.numbers and "3\u00a0seeds" in found.numbers
    assert found.rests_on == above(knn[0], cae[0], "pro").rests_on | above(knn[1], cae[1], "pro").rests_on
    assert not above_on_average(cae, knn, "image_auroc").holds and not above_on_average(knn, knn, "pro").holds


def test_counts():
    dead = runs_of("vitmem", overrides={"shrink": 2.0})
    every = counted(dead, "memory_empty", 1, 1, of="memory_queries")
    assert every.holds and "memory_empty / memory_queries vitmem 1 to 1, 3\u00a0seeds" in every.numbers
    assert not counted(dead, "memory_in_use", 1, 100).holds


def test_minutes_of_one_core():
    cae = runs_of("l2cae")
    seconds = min(sum(r["timings"][k] for k in PARTS) * r["environment"]["threads"] for r in cae.records)
    assert minutes_at_most(cae, seconds / 60 + 0.01).holds and not minutes_at_most(cae, seconds / 60 - 0.01).holds
    assert minutes_at_most(cae, 9.0).numbers.startswith(f"minutes l2cae {seconds / 60:.1f}, 10\u00a0seeds, ")


PARTS = ("load_s", "prepare_s", "train_s", "score_s")


def test_rows_of_an_experiment(tmp_path, monkeypatch):
    def row(what, state, seed, run, value, low, high):
        intervals = {"image_auroc": [low, high]}
        names = {"scored": what, "state": state, "seed": seed, "run": run}
        return names | {"metrics": {"image_auroc": value}, "intervals": intervals}

    rows = [row("grey", None, None, None, 1.0, 0.99, 1.0), row("cae", "trained", 0, "abc", 0.2, 0.1, 0.3)]
    rows += [row("cae", "untrained", 0, None, 0.8, 0.7, 0.9), row("cae", "untrained", 1, None, 0.9, 0.85, 0.95)]
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "nuts.json").write_text(json.dumps(rows))
    monkeypatch.setattr(vitad, "__file__", str(tmp_path / "vitad" / "__init__.py"))

    grey = measured("nuts", "image_auroc", 0.99, 1, scored="grey", state=None)
    assert grey.holds and grey.numbers == "image AUROC grey 1.000 [0.990,\u00a01.000]" and not grey.rests_on
    low = measured("nuts", "image_auroc", 0, 0.3, scored="cae", state="trained")
    assert low.holds and low.numbers == "image AUROC cae, trained 0.200 [0.100,\u00a00.300], 1\u00a0seed"
    assert low.rests_on == {"abc"}
    both = measured("nuts", "image_auroc", 0.7, 0.95, state="untrained")
    assert both.holds and both.numbers == "image AUROC cae, untrained 0.850 [0.700,\u00a00.950], 2\u00a0seeds"
    assert not measured("nuts", "image_auroc", 0.7, 0.94, state="untrained").holds
    assert not measured("nuts", "image_auroc", 0, 0.29, scored="cae", state="trained").holds
    assert not measured("nuts", "image_auroc", 0.11, 0.3, scored="cae", state="trained").holds
    assert not measured("nuts", "image_auroc", 0, 0.3, scored="cae").holds  # every row has to
    (missing,) = in_code('claim("Bolts.", measured("nuts", "image_auroc", 0, 1, scored="bolt"))')
    assert not missing.evidence.holds
    assert missing.evidence.numbers == "experiments/nuts.json has no row with {'scored': 'bolt'}"
    with pytest.raises(UserError, match=r"bolts.json is not there. Run experiments/bolts.py"):
        measured("bolts", "image_auroc", 0, 1)


def test_a_candidate_of_an_experiment_is_above_another_on_each_data_set(tmp_path, monkeypatch):
    def row(name, dataset, category, value):
        return {"name": name, "dataset": dataset, "category": category, "metrics": {"pit": {"pro": value}}}

    rows = [row("new", "mt", None, 0.8), row("old", "mt", None, 0.7), row("new", "mvtec", "nut", 0.6)]
    (tmp_path / "experiments").mkdir()
    file = tmp_path / "experiments" / "nuts.json"
    file.write_text(json.dumps(rows))
    monkeypatch.setattr(vitad, "__file__", str(tmp_path / "vitad" / "__init__.py"))
    with pytest.raises(UserError, match="does not have both new and old on each data set"):
        above_on_each("nuts", "new", "old", "pro", "pit")
    file.write_text(json.dumps([*rows, row("old", "mvtec", "nut", 0.5)]))
    found = above_on_each("nuts", "new", "old", "pro", "pit")
    assert (
        found.holds
        and found.numbers == "PRO, new and old: mt 0.800 and 0.700, nut 0.600 and 0.500, one seed, no interval"
    )
    file.write_text(json.dumps([*rows, row("old", "mvtec", "nut", 0.6)]))
    assert not above_on_each("nuts", "new", "old", "pro", "pit").holds


BASE = {"memory": False, "coord_att": False}
CELL = """
from vitad.claims import above, claim, runs_of

x = 3
claim(
    "Frozen features beat the convolutional autoencoder on gears.",
    above(runs_of("patchknn"), runs_of("l2cae"), "image_auroc"),
    before="The autoencoder won.",
)
claim("The autoencoder is below 0.84.", at_most(runs_of("l2cae"), "image_auroc", 0.84))
"""
TOKENS_WIN = above(runs_of("patchknn"), runs_of("l2cae"), "image_auroc")


def test_claims_are_found_in_the_code_of_a_cell():
    first, second = claims.in_code(CELL)
    assert first.sentence.startswith("Frozen") and first.evidence == TOKENS_WIN and first.before
    assert second.evidence.holds and not second.before
    assert list(claims.in_code("%matplotlib inline\n!ls\nprint('claim')")) == []


def test_a_claim_made_of_anything_else_is_refused():
    with pytest.raises(
        UserError, match="name 'records' is not defined. Use literals and the functions of vitad.claims"
    ):
        list(claims.in_code('claim("x", above(records["a"], records["b"], "pro"))'))


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A source tree with one chapter and the toy records of two methods."""
    for method in ("patchknn", "l2cae"):
        for seed in range(3):
            name = f"{method}-demo-s{seed}"
            shutil.copytree(ROOT / "results" / "toy" / name, tmp_path / "results" / "toy" / name)
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell(CELL)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "gears.ipynb")
    monkeypatch.setattr(vitad, "__file__", str(tmp_path / "vitad" / "__init__.py"))
    return tmp_path


def test_exactly_the_claims_fall_whose_records_change(book, capsys):
    assert main(["claims"]) == 0
    assert "2 of 2 claims hold" in capsys.readouterr().out
    for record in runs.read_records(book / "results"):
        if record["method"] == "l2cae":
            folder = record.pop("folder")
            record["metrics"]["image_auroc"] = 0.85 + 0.001 * record["seed"]
            (folder / "record.json").write_text(json.dumps(record))
            for more in ("scores.csv", "resamples.npz"):
                (folder / more).unlink(missing_ok=True)
    assert main(["claims"]) == 1
    out = capsys.readouterr().out
    assert "FALLS  gears: The autoencoder is below 0.84." in out and "1 of 2 claims hold" in out
    assert "holds  gears: Frozen features beat" in out


def test_a_page_lists_the_claims_that_it_asks_for(book, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    import vitad_book

    def expanded(text):
        source = [text]
        vitad_book.expand(SimpleNamespace(srcdir=book), "book/page", source)
        return source[0]

    every = expanded("Above\n<!-- claims -->")
    assert every.startswith("Above\n\n## [gears](../notebooks/gears.ipynb)\n\n* Frozen features beat")
    assert every.count("\n* ") == 2 and every.count("*Before:* The autoencoder won.") == 1
    assert expanded("<!-- claims chapter=gears dataset=toy -->").count("* ") == 2
    assert expanded("<!-- claims chapter=gears dataset=mt+toy -->").count("* ") == 2
    assert expanded("<!-- claims chapter=gears dataset=mt -->") == ""
