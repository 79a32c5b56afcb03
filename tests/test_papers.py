"""The papers' tables run again: requests, what is there, estimates, cells and verdicts, and `vitad table`."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vitad import data, runs
from vitad.cli import main
from vitad.errors import UserError
from vitad.methods import vitmem
from vitad.papers import layout, printed, tables
from vitad.papers.cells import COLUMNS, cells, printed_numbers
from vitad.papers.estimates import duration, estimate, n_images, overview
from vitad.papers.tables import TABLES, Reproduction, run_missing
from vitad.runs import Request, by_hash, committed_seeds, hash_of
from vitad.runs.request import IDENTITY

MACHINE = {"device": "cuda", "device_name": "some GPU", "threads": 4}


def record(request, image=0.9, seconds=100.0, textures="DTD, 5,640 of 5,640 files", **changed):
    """What a run of a request would leave, with every figure `image` (or a dict by category)."""
    figures = {c: dict.fromkeys(("image_auroc", "pixel_auroc", "pixel_ap", "pro"), v) for c, v in _each(image).items()}
    means = {k: float(np.mean([f[k] for f in figures.values()])) for k in next(iter(figures.values()))}
    train, test = n_images(request) or (100, 50)
    settings = json.loads(json.dumps(request.settings))
    return {
        **{k: getattr(request, k) for k in (*IDENTITY, "preset", "overrides")},
        "settings": settings,
        "protocol": {"textures": textures},
        "weights": {"asked": request.weights, "source": "file" if settings.get("pretrained") else "random"},
        "metrics": means,
        **({"metrics_by_category": figures} if isinstance(image, dict) else {}),
        "counts": {"train": train, "test_good": test, "test_defective": 0},
        "timings": {"load_s": 0.0, "prepare_s": 0.0, "train_s": seconds, "score_s": 10.0, "evaluate_s": 0.0},
        "environment": MACHINE,
        **changed,
    }


def _each(image):
    return image if isinstance(image, dict) else {"": image}


def requests(name, dataset=None, category=None, **options):
    return Reproduction(name, dataset, category, **options).requests


def made(name, value, seeds=3, **options):
    """{digest: record} of a whole table; `value(request)` is the figure of a run."""
    return {r.hash: record(r, value(r)) for r in requests(name, seeds=seeds, **options)}


def cell(frame, category, column, metric="image_auroc"):
    (row,) = frame[frame[["category", "column", "metric"]].eq([category, column, metric]).all(axis=1)].to_dict(
        "records"
    )
    return row


def reason(frame, *place):
    """Why a cell has no verdict; None where it has one."""
    found = cell(frame, *place)["reason"]
    return None if pd.isna(found) else found


# --- requests -----------------------------------------------------------------------------------------------------


def test_a_request_is_the_run_that_its_command_makes(toy_root, tmp_path, capsys):
    overrides = {"epochs": 1, "score_terms": ("l2", "ssim"), "memory": False}
    request = Request("vitmem", "toy", preset="smoke", seed=4, overrides=overrides, data_root=toy_root)
    command = request.command(tmp_path / "run")
    assert command[0] == "vitad" and main(command[1:]) == 0
    found = runs.read_record(tmp_path / "run")
    assert hash_of(found) == request.hash
    assert {k: found[k] for k in ("category", "split", "seed")} == {"category": "gear", "split": None, "seed": 4}
    capsys.readouterr()


def test_every_setting_and_every_part_is_in_the_hash_of():
    base = Request("vitmem", "mvtec", "bottle", preset="paper")
    others = [
        Request("anovit", "mvtec", "bottle", preset="paper"),
        Request("vitmem", "mvtec", "cable", preset="paper"),
        Request("vitmem", "mvtec", "bottle", preset="small"),
        Request("vitmem", "mvtec", "bottle", preset="paper", seed=1),
        Request("vitmem", "mvtec", "bottle", preset="paper", overrides={"memory": False}),
    ]
    assert len({r.hash for r in [base, *others]}) == len({r.name for r in [base, *others]}) == 6
    same = Request("vitmem", "mvtec", "Bottle", preset="paper", overrides={"memory": True, "coord_att": True})
    assert (same.hash, same.name) == (base.hash, base.name)


def test_a_changed_default_is_another_run(monkeypatch):
    from vitad.methods.rivals import l2cae

    before = Request("l2cae", "btad", "01", preset="paper")
    assert before.folder.startswith(f"{before.name}-")
    monkeypatch.setitem(l2cae.PRESETS, "paper", {"epochs": 7})
    after = Request("l2cae", "btad", "01", preset="paper")
    assert after.settings["epochs"] == 7
    assert before.hash != after.hash and before.folder != after.folder and before.name == after.name


def test_names_are_readable_unique_and_safe():
    found = [r for name in TABLES for r in requests(name)]
    assert "vitmem-base_m-mvtec-bottle-paper-s0" in {r.name for r in found}
    assert len({r.name for r in found}) == len({r.hash for r in found})
    odd = [Request("patchknn", "folder", c) for c in ("a b", "a_b", "A_b", "ä/b", "..")]
    names = [r.name for r in odd] + [Request("vitmem", "toy", overrides={"lr": x}).name for x in (0.1, 0.2)]
    assert len(set(names)) == 7
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_.+-]*", n) for n in [*names, *(r.name for r in found)])


def test_the_data_and_presets_of_tables():
    by_method = pd.Series([r.method for r in requests("yang2024-3")]).value_counts()
    assert by_method.to_dict() == dict.fromkeys(("vitmem", "anovit", "l2cae", "fanogan", "aessim", "vae", "mkd"), 45)
    assert {r.preset for r in requests("yang2024-3")} == {"paper"}
    assert {r.category for r in requests("yang2024-5")} == {"01", "02", "03"}
    assert len(requests("yang2024-6")) == 4 * 15 * 3
    assert {r.hash for r in requests("yang2024-4") if r.method == "vitmem"} <= {r.hash for r in requests("yang2024-6")}
    # one model for the categories of both data sets, which serves both tables
    assert [r.name for r in requests("mala2023-1", seeds=1)] == [
        "mala-mvtec+visa-all-paper-s0",
        "padim-mvtec+visa-all-paper-s0",
        "uniad-mvtec+visa-all-paper-s0",
        "draem-mvtec+visa-all-paper-s0",
        "mkd-mvtec+visa-all-paper-s0",
    ]
    assert requests("mala2023-1")[:9] == requests("mala2023-3")
    assert {(r.split, r.preset) for r in requests("mala2023-mt")} == {("mala100", "small_dinov2")}
    assert {(r.split, r.preset) for r in requests("yang2024-6", "mt")} == {("grouped", "small")}
    assert {(r.category, r.preset) for r in requests("yang2024-6", "toy")} == {("gear", "demo")}
    assert {r.category for r in requests("yang2024-4", "toy", "each")} == {"gear", "grain", "weave"}
    assert {r.category for r in requests("yang2024-4", category="Metal nut,bottle")} == {"metal_nut", "bottle"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="yang2024-9"), "Did you mean 'yang2024-6'"),
        (dict(dataset="mvtc"), "unknown dataset 'mvtc'. Did you mean 'mvtec'"),
        (dict(category="bottel"), "unknown category of mvtec 'bottel'. Did you mean 'bottle'"),
        (dict(preset="papr"), "unknown preset 'papr'. Did you mean 'paper'"),
        (dict(split="grouped"), "split 'grouped' was given"),
        (dict(dataset="mt", category="bottle"), "'mt' has no categories"),
        (dict(seeds="many"), "seeds=many is not usable"),
        (dict(seeds=0), "seeds=0 is not usable"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        requests(**{"name": "yang2024-6"} | options)


def test_columns_and_metrics_of_every_table_are_printed_ones():
    for name, asked in TABLES.items():
        if asked.printed != "":
            numbers = printed_numbers(Reproduction(name))
            assert set(asked.columns) <= set(numbers["column"]), name
            assert set(asked.metrics) == set(numbers["metric"]), name


def test_committed_records_fill_the_ablation_on_toy_and_tiles():
    found = by_hash()
    for dataset in ("toy", "mt"):
        frame = cells(Reproduction("yang2024-6", dataset), found)
        assert len(frame) == 12 and set(frame["reason"]) == {"other data"} and set(frame["seeds"]) == {3}
        assert set(frame["verdict"]) == {"not comparable"}
        (first,) = committed_seeds(Request("vitmem", dataset, preset=tables.USUAL_PRESETS[dataset]))[:1]
        assert first["dataset"] == dataset
    own = [r["metrics"]["pro"] for r in committed_seeds(Request("vitmem", "toy", overrides={"memory": False}))[:3]]
    assert cell(cells(Reproduction("yang2024-6", "toy"), found), "average", "Base + CA", "pro")[
        "reproduced"
    ] == pytest.approx(100 * np.mean(own))


# --- cells and verdicts ---------------------------------------------------------------------------------------------


def test_a_cell_has_what_is_printed_recomputed_and_reproduced():
    numbers = printed.table("yang2024-3")
    value = {"bottle": [0.93, 0.94, 0.95]}
    found = made("yang2024-3", lambda r: value.get(r.category, [0.5] * 3)[r.seed])
    frame = cells(Reproduction("yang2024-3"), found)
    bottle = cell(frame, "bottle", "Ours")
    assert (bottle["reported"], bottle["verdict"], bottle["seeds"]) == (94.0, "undecided", 3)
    assert (bottle["reproduced"], bottle["spread"]) == (pytest.approx(94), pytest.approx(1))
    assert set(layout.as_text(frame).query("category == 'average'")["reported"]) >= {"91.2", "78", "87.8"}
    assert bottle["difference"] == pytest.approx(0) and np.isnan(bottle["recomputed"])
    average = cell(frame, "average", "Ours")
    rows = numbers[(numbers["method"] == "Ours") & (numbers["category"] != "average")]["value_percent"]
    assert (average["reported"], average["recomputed"]) == (91.2, pytest.approx(rows.mean()))
    assert average["reproduced"] == pytest.approx((94 + 14 * 50) / 15)
    assert average["spread"] == pytest.approx(1 / 15)  # of the means, seed by seed
    assert average["difference"] == pytest.approx(average["reproduced"] - rows.mean())
    assert average["verdict"] == "differs" and reason(frame, "average", "Ours") is None
    assert average["tier"] == "paper; cuda, some GPU"
    assert cell(frame, "cable", "CAVGA") | {"seeds": None} == {
        **dict.fromkeys(frame.columns, None),
        **{"category": "cable", "column": "CAVGA", "metric": "image_auroc", "reported": 63, "step": 1.0},
        "fill": "not in this library",
        **{k: pytest.approx(np.nan, nan_ok=True) for k in ("recomputed", "reproduced", "spread")},
        **{k: pytest.approx(np.nan, nan_ok=True) for k in ("difference", "low", "high")},
        **{k: pytest.approx(np.nan, nan_ok=True) for k in ("method", "verdict", "reason", "tier")},
    }


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        # printed is 94.0, the margin of one category 2.0, the half-width of three seeds t(0.975, 2) * sqrt(4/3) = 4.968
        # spreads
        ([0.98, 0.985, 0.99], "differs"),  # 4.5 off by 2.5, which is just outside
        ([0.975, 0.98, 0.985], "undecided"),  # 4.0 off by 2.5
        ([0.95, 0.96, 0.97], "undecided"),  # 2 off by 5.0: seeds that differ so much decide nothing
        ([0.89, 0.8901, 0.8902], "differs"),
        ([0.935, 0.937, 0.939], "reproduced"),
        ([0.9601, 0.9601, 0.9601], "differs"),
        ([0.94, 0.98], "undecided"),  # two seeds: t = 12.7
        ([0.94], "undecided"),
    ],
)
def test_the_interval_is_where_one_more_seed_may_lie(values, verdict):
    found = made("yang2024-3", lambda r: values[r.seed], len(values))
    frame = cells(Reproduction("yang2024-3", seeds=len(values)), found)
    judged = cell(frame, "bottle", "Ours")
    assert judged["verdict"] == verdict
    if len(values) == 1:
        assert judged["reason"] == "one seed" and np.isnan([judged["low"], judged["high"]]).all()
    if len(values) == 3:
        half = 4.30265 * 100 * np.std(values, ddof=1) * (4 / 3) ** 0.5
        assert [judged["low"], judged["high"]] == pytest.approx(
            [judged["difference"] - half, judged["difference"] + half], rel=1e-5
        )


def test_a_mean_of_categories_has_a_narrower_margin():
    """Each 1.5 points above what is printed: equal for a category, not for their mean."""
    numbers = printed.table("yang2024-5").query("method == 'Ours' and metric == 'image_auroc'")
    value = dict(zip(numbers["category"], numbers["value_percent"] / 100 + 0.015, strict=True))
    frame = cells(Reproduction("yang2024-5"), made("yang2024-5", lambda r: value[r.category]))
    assert {cell(frame, c, "Ours")["verdict"] for c in ("01", "02", "03")} == {"reproduced"}
    assert cell(frame, "average", "Ours")["verdict"] == "differs"
    assert reason(frame, "01", "Ours", "pro") is None


def test_what_is_ours_in_part_is_not_held_against_a_paper():
    """Kim & Kwon's method is not public, L2-CAE's layers are unknown, AnoViT's code is its preset `legacy`."""
    frame = cells(Reproduction("kimkwon-btad"), made("kimkwon-btad", lambda r: 0.9))
    assert set(frame["verdict"]) == {"not comparable"} and set(frame["reason"]) == {"in the manner of"}
    frame = cells(Reproduction("anovit-mvtec"), made("anovit-mvtec", lambda r: 0.9))
    assert set(frame["reason"]) == {"other settings"} and frame["difference"].notna().all()
    options = dict(preset="legacy", category="bottle")
    frame = cells(Reproduction("anovit-mvtec", **options), made("anovit-mvtec", lambda r: 0.83, **options))
    assert cell(frame, "bottle", "AnoViT")["verdict"] == "reproduced"
    assert {r.preset for r in Reproduction("anovit-mvtec", **options).columns["L2-CAE"]} == {"paper"}  # has no `legacy`


def test_figures_of_one_line_have_the_digits_of_their_column():
    """93.0, the only pixel AUROC of the complete model in the ablation, is not printed in whole percents."""
    found = made("yang2024-6", lambda r: 0.934)
    full = cell(cells(Reproduction("yang2024-6"), found), "average", "Base + M + CA (Ours)", "pixel_auroc")
    assert (full["reported"], full["step"], full["verdict"]) == (93.0, 0.1, "reproduced")
    for frame in (cells(Reproduction("yang2024-6"), found), cells(Reproduction("yang2024-6", "toy"), {})):
        show = layout.as_text(frame)
        (pixel,) = show.query("column == 'Base + M + CA (Ours)' and metric == 'pixel AUROC'")["reported"]
        assert pixel == "93.0"
    bottle = cells(Reproduction("yang2024-3", category="bottle"), {})
    assert bottle.set_index("column")["step"][["Ours", "AnoViT"]].tolist() == [0.1, 1]
    assert set(layout.as_text(cells(Reproduction("mala2023-mt"), {}))["reported"]) == {""}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("timm hub x, decoder random", "other weights"),
        ("file encoder.pth, decoder random", "other weights"),
        ("random", "other weights"),
        ("file mae.pth", None),
    ],
)
def test_weights_that_start_at_random_are_not_the_papers(source, why):
    value = {f"{one}/{c}": 0.999 for one in ("mvtec", "visa") for c in data.get(one).categories()}
    options = dict(weights="mae.pth", overrides={"textures": "/data/dtd"})
    found = made("mala2023-3", lambda r: value, **options)
    for r in found.values():
        r["weights"] = {"asked": "mae.pth", "source": source}
    frame = cells(Reproduction("mala2023-3", **options), found)
    place = ("average", "Ours", "pixel_auroc")
    assert reason(frame, *place) == why
    assert cell(frame, *place)["verdict"] == ("not comparable" if why else "differs")
    # what the paper trains from the start is random rightly
    frame = cells(Reproduction("yang2024-5"), made("yang2024-5", lambda r: 0.9))
    assert set(frame.query("column == 'Ours'")["reason"].dropna()) == set()
    assert set(frame.query("column in ('DRAEM', 'SSPCAB')")["reason"]) == {"other settings"}


def test_settings_and_weights_of_a_table_go_to_the_methods_that_have_them():
    asked = requests("mala2023-3", weights="mae.pth", overrides={"textures": "/data/dtd", "amp": False}, seeds=1)
    given = {r.method: (r.weights, r.overrides.keys()) for r in asked}
    assert given == {"mala": ("mae.pth", {"textures", "amp"}), **dict.fromkeys(("padim", "uniad"), ("auto", {"amp"}))}
    with pytest.raises(UserError, match="unknown setting 'texture'. Did you mean 'textures'"):
        requests("mala2023-3", overrides={"texture": "/data/dtd"})


def test_a_substitute_of_the_network_is_never_judged():
    value = {f"{one}/{c}": 0.9 for one in ("mvtec", "visa") for c in data.get(one).categories()}
    found = made("mala2023-1", lambda r: value)
    for r in found.values():
        if r["method"] == "padim":
            r["protocol"]["substitute"] = "lite0 for resnet18"
    frame = cells(Reproduction("mala2023-1"), found)
    (one,) = frame.query("column == 'PaDim' and category == 'average' and metric == 'image_auroc'").to_dict("records")
    assert (one["verdict"], one["reason"], one["reported"]) == ("not comparable", "substitute network", 82.4)
    assert one["difference"] == pytest.approx(90 - one["recomputed"])


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"textures": "/data/dtd"}, None),
        (["textures=/data/dtd"], None),
        ({"textures": "/data/dtd", "epochs": 7}, "other settings"),
        ({"epochs": 7}, "other settings"),
    ],
)
def test_settings_for_the_whole_table(given, why):
    """The folder of DTD is the paper's own setting, which it needs; others make another method of it."""
    value = {f"{one}/{c}": 0.999 for one in ("mvtec", "visa") for c in data.get(one).categories()}
    options = dict(weights="mae.pth", overrides=given)
    asked = [r for r in requests("mala2023-3", **options) if r.method == "mala"]
    assert {r.hash for r in asked}.isdisjoint(r.hash for r in requests("mala2023-3", weights="mae.pth"))
    assert len({r.name.removesuffix(f"-s{r.seed}") for r in asked}) == 1  # seeds differ in nothing else
    found = made("mala2023-3", lambda r: value, **options)
    for r in found.values():
        r["weights"]["source"] = "file mae.pth"
    frame = cells(Reproduction("mala2023-3", **options), found)
    assert reason(frame, "average", "Ours", "pixel_auroc") == why
    plain = cells(Reproduction("mala2023-3", weights="mae.pth"), found)
    assert plain.query("column == 'Ours'")["reproduced"].isna().all()
    for r in found.values():  # a folder of that name with other images in it
        r["protocol"]["textures"] = "other images, 12 of 12 files"
    frame = cells(Reproduction("mala2023-3", **options), found)
    assert reason(frame, "average", "Ours", "pixel_auroc") == "other settings"
    assert Reproduction("mala2023-3", **options).stem != Reproduction("mala2023-3", weights="mae.pth").stem


def test_a_setting_of_the_columns_cannot_be_set_for_the_whole_table():
    with pytest.raises(UserError, match="memory=False: the columns of yang2024-6 differ in memory"):
        requests("yang2024-6", overrides={"memory": False})


def test_other_data_other_settings_and_fewer_images_are_not_judged():
    frame = cells(Reproduction("yang2024-5", preset="small"), made("yang2024-5", lambda r: 0.9, preset="small"))
    assert set(frame["reason"].dropna()) == {"other settings"}
    frame = cells(Reproduction("yang2024-5", "visa"), made("yang2024-5", lambda r: 0.9, dataset="visa"))
    assert set(frame["reason"].dropna()) == {"other data"}
    assert frame["reproduced"].notna().any() and frame[["difference", "low", "high"]].isna().all(axis=None)
    found = made("yang2024-5", lambda r: 0.9)
    for r in found.values():
        r["counts"]["train"] -= r["category"] == "02"
    frame = cells(Reproduction("yang2024-5"), found)
    assert cell(frame, "02", "Ours")["reason"] == cell(frame, "average", "Ours")["reason"] == "other data"
    assert pd.isna(cell(frame, "02", "Ours")["difference"]) and cell(frame, "01", "Ours")["difference"] < 0
    assert cell(frame, "01", "Ours")["verdict"] == "differs"


def test_an_average_needs_all_categories_of_a_seed():
    found = made("yang2024-5", lambda r: 0.9)
    (gone,) = [k for k, r in found.items() if (r["method"], r["category"], r["seed"]) == ("vitmem", "02", 1)]
    del found[gone]
    frame = cells(Reproduction("yang2024-5"), found)
    average, second = cell(frame, "average", "Ours"), cell(frame, "02", "Ours")
    assert (average["seeds"], second["seeds"]) == (2, 2)
    assert average["fill"] == "1 of 9 runs: vitmem-btad-02-paper-s1"
    assert second["fill"] == "1 of 3 runs: vitmem-btad-02-paper-s1"
    assert pd.isna(cell(frame, "01", "Ours")["fill"])


def test_a_cell_never_run_is_empty_and_says_what_fills_it():
    frame = cells(Reproduction("kimkwon-mvtec"), {})
    assert len(frame) == 1 and frame["reported"].item() == 99.05
    assert frame[["reproduced", "difference", "verdict", "tier"]].isna().all(axis=None)
    assert frame["fill"].item() == "45 of 45 runs: ssltok-mvtec-bottle-paper-s0, ..."


def test_one_model_of_all_categories_fills_both_tables():
    value = {f"{one}/{c}": i / 30 for one in ("mvtec", "visa") for i, c in enumerate(data.get(one).categories(), 1)}
    found = made("mala2023-1", lambda r: value)
    frame = cells(Reproduction("mala2023-3"), found)
    assert cell(frame, "pcb1", "Ours")["reproduced"] == pytest.approx(100 * value["visa/pcb1"])
    assert cell(frame, "average", "Ours")["reproduced"] == pytest.approx(100 * np.mean(range(1, 13)) / 30)
    frame = cells(Reproduction("mala2023-1"), found)
    assert cell(frame, "zipper", "Ours", "pixel_auroc")["reproduced"] == pytest.approx(50)
    # trained on one of the two, it is not the paper's model
    alone = {k: v for k, v in value.items() if k.startswith("mvtec")}
    frame = cells(Reproduction("mala2023-1", "mvtec"), made("mala2023-1", lambda r: alone, dataset="mvtec"))
    assert set(frame["reason"].dropna()) == {"other data"}


def test_a_figure_that_needs_masks_has_none_without():
    found = made("yang2024-5", lambda r: 0.9, dataset="folder")
    for r in found.values():
        r["metrics"]["pro"] = None
    frame = cells(Reproduction("yang2024-5", "folder"), found)
    assert cell(frame, "average", "Ours", "pro")["fill"] == "data without masks have no such metric"
    assert cell(frame, "average", "Ours")["reproduced"] == pytest.approx(90)


def test_anovit_is_counted_against_the_convolutions():
    better = {"bottle", "cable"}
    found = made("anovit-mvtec", lambda r: 0.6 + 0.1 * (r.method == "anovit") * (r.category in better))
    frame = cells(Reproduction("anovit-mvtec"), found)
    assert set(frame["column"]) == {"AnoViT", "L2-CAE"}
    lines = layout.remarks(Reproduction("anovit-mvtec"), frame)
    assert lines[1:] == [
        "AnoViT as reported, by the higher number: above L2-CAE in 9 of 15 categories, equal in 2.",
        "AnoViT as reproduced, by the higher number: above L2-CAE in 2 of 15 categories, equal in 13.",
    ]


# --- runs that stand in -----------------------------------------------------------------------------------------------


def of(method, category, preset, value, dataset="mvtec", seeds=3, **overrides):
    """{hash: record} of the seeds of a run."""
    asked = [Request(method, dataset, category, None, preset, seed, overrides) for seed in range(seeds)]
    return {r.hash: record(r, value) for r in asked}


def test_an_interval_keeps_its_two_ends_however_close_they_are():
    frame = cells(Reproduction("yang2024-3"), of("vitmem", "bottle", "small", 0.9)).head(3)
    frame = frame.assign(low=[-5.93, 1.0, np.nan], high=[-5.88, 2.0, np.nan])
    assert list(layout.as_text(frame)["interval"]) == ["-5.93\u00a0to\u00a0-5.88", "+1.0\u00a0to\u00a0+2.0", ""]


def without_masks(found):
    for r in found.values():
        r["metrics"] |= dict.fromkeys(("pixel_auroc", "pixel_ap", "pro"))
    return found


def test_the_preset_nearest_to_the_paper_stands_in_category_by_category():
    found = of("vitmem", "bottle", "small", 0.9) | of("vitmem", "bottle", "near", 0.95, seeds=1)
    found |= of("vitmem", "pill", "small", 0.8) | of("l2cae", "pill", "small", 0.6)
    found |= without_masks(of("vitmem", "screw", "small", 0.7))
    frame = cells(Reproduction("yang2024-3"), found)
    bottle, pill, screw = (cell(frame, c, "Ours") for c in ("bottle", "pill", "screw"))
    assert [c["tier"].partition(";")[0] for c in (bottle, pill, screw)] == ["near", "small", "small"]
    assert [c["reproduced"] for c in (bottle, pill, screw)] == pytest.approx([95, 80, 70])
    assert [c["difference"] for c in (bottle, pill, screw)] == pytest.approx([95 - 94, 80 - 86.3, 70 - 100])
    assert {c["verdict"] for c in (bottle, pill, screw)} == {"not comparable"}
    assert {c["reason"] for c in (bottle, pill, screw)} == {"other settings"}
    assert bottle["fill"] == "3 of 3 runs: vitmem-mvtec-bottle-paper-s0, ..."
    assert cell(frame, "pill", "L2-CAE")["difference"] == pytest.approx(60 - 68)
    assert np.isnan(cell(frame, "bottle", "L2-CAE")["reproduced"]) and len(frame) == 16 * 8
    # never a mean over three of fifteen
    assert np.isnan(cell(frame, "average", "Ours")["reproduced"]) and cell(frame, "average", "Ours")["seeds"] == 0
    text = layout.for_terminal(frame)
    assert re.search(r"^bottle +94.0 +95.0 +near +\+1.0 not comparable: other settings", text, re.M)
    assert layout.remarks(Reproduction("yang2024-3"), frame) == [
        "Where runs of the preset paper are missing, others stand in: near, small."
    ]
    shown = layout.beside(frame)
    assert list(shown.index) == [("image AUROC", c, "Ours") for c in ("bottle", "pill", "screw")] + [
        ("image AUROC", "pill", "L2-CAE")
    ]
    assert list(shown.loc[("image AUROC", "bottle", "Ours")][:3]) == ["94.0", "95.0", "1"]
    assert list(shown["preset"]) == ["near", "small", "small", "small"] and set(shown["difference"]) >= {"+1.0", "-8.0"}
    local = cells(Reproduction("yang2024-4"), found)
    assert cell(local, "screw", "Ours", "pro")["fill"] == "data without masks have no such metric"
    assert cell(local, "pill", "Ours", "pro")["difference"] < 0


def test_a_run_of_the_paper_s_preset_comes_first_and_a_preset_that_is_asked_for_is_the_only_one():
    found = {
        k: v
        for p, x in (("paper", 0.94), ("near", 0.9), ("small", 0.8))
        for k, v in of("vitmem", "bottle", p, x).items()
    }
    bottle = cell(cells(Reproduction("yang2024-4"), found), "bottle", "Ours", "pixel_auroc")
    assert (bottle["tier"], bottle["verdict"]) == ("paper; cuda, some GPU", "reproduced")
    asked = cells(Reproduction("yang2024-4", preset="small"), found)
    assert cell(asked, "bottle", "Ours", "pro")["reproduced"] == pytest.approx(80)
    assert cells(Reproduction("yang2024-4", preset="demo"), found)["reproduced"].isna().all()
    on_toy = cells(Reproduction("yang2024-4", "toy"), of("vitmem", "gear", "small", 0.9, "toy"))
    assert on_toy["reproduced"].isna().all()  # there, the preset is demo


def test_variants_are_compared_within_one_preset():
    """That which most of them have; the nearest to the paper among these. Only averages are printed of an ablation."""
    found = of("vitmem", "bottle", "near", 0.95)
    for i, overrides in enumerate(vitmem.VARIANTS.values()):
        found |= of("vitmem", "bottle", "small", 0.6 + 0.1 * i, **overrides)
        found |= of("vitmem", "pill", "small", 0.5, **overrides) | of("vitmem", "pill", "near", 0.7, **overrides)
    frame = cells(Reproduction("yang2024-6"), found)
    assert list(dict.fromkeys(frame["category"])) == ["bottle", "pill", "average"]
    assert {t.partition(";")[0] for t in frame.query("category == 'bottle'")["tier"]} == {"small"}
    assert {t.partition(";")[0] for t in frame.query("category == 'pill'")["tier"]} == {"near"}
    assert cell(frame, "bottle", "Base + M + CA (Ours)")["reproduced"] == pytest.approx(90)
    assert reason(frame, "bottle", "Base") == "other settings" and np.isnan(cell(frame, "bottle", "Base")["difference"])
    average = frame.query("category == 'average'")
    assert average["reported"].notna().all() and average["reproduced"].isna().all()
    assert cell(cells(Reproduction("yang2024-4"), found), "bottle", "Ours", "pro")["reproduced"] == pytest.approx(95)


def test_a_model_of_several_categories_stands_in_for_one_of_all():
    value = {"mvtec/bottle": 0.9, "mvtec/pill": 0.8, "mvtec/screw": 0.7}
    found = of("mala", "bottle+pill+screw", "near", value, seeds=1)
    found |= of("mala", "bottle+pill", "near", dict.fromkeys(["mvtec/bottle", "mvtec/pill"], 0.5))
    found |= of("mala", "bottle", "near", 0.4)
    for r in found.values():
        for metrics in (r.get("metrics_by_category", {}).get("mvtec/screw", {}), r["metrics"]):
            metrics["pixel_auroc"] = None
    frame = cells(Reproduction("mala2023-1"), found)
    bottle = cell(frame, "bottle", "Ours")
    assert (bottle["reproduced"], bottle["reason"]) == (pytest.approx(90), "model of 3 of 27 categories")
    assert (bottle["verdict"], bottle["difference"], bottle["seeds"]) == ("not comparable", pytest.approx(-10), 1)
    assert cell(frame, "screw", "Ours", "pixel_auroc")["fill"] == "data without masks have no such metric"
    assert frame.query("category in ('cable', 'average')")["reproduced"].isna().all()
    assert cells(Reproduction("mala2023-3"), found)["reproduced"].isna().all()  # its categories are VisA's
    # one model each is nobody's stand-in, and is filled by no model of several
    assert cells(Reproduction("mala2023-1"), of("mala", "bottle", "near", 0.4))["reproduced"].isna().all()
    joint = of("vitmem", "bottle+pill", "near", {"mvtec/bottle": 0.9, "mvtec/pill": 0.8})
    assert cells(Reproduction("yang2024-3"), joint)["reproduced"].isna().all()


# --- what is there ---------------------------------------------------------------------------------------------------


def test_own_runs_come_first_and_other_weights_are_other_runs(tmp_path):
    request = Request("vitmem", "toy")
    (committed,) = [r for r in by_hash().values() if hash_of(r) == request.hash]
    assert committed["folder"].name == "vitmem-demo-s0"
    write(tmp_path, request, record(request, 0.123))
    assert by_hash(tmp_path)[request.hash]["metrics"]["image_auroc"] == 0.123
    other = Request("vitmem", "toy", seed=77)
    write(tmp_path, other, record(other, weights={"asked": "my.safetensors", "source": "file"}))
    assert other.hash not in by_hash(tmp_path)
    with_file = Request("vitmem", "toy", seed=77, weights="my.safetensors")
    assert with_file.hash in by_hash(tmp_path)
    elsewhere = Request("vitmem", "toy", seed=77, weights="../my.safetensors")
    assert len({r.name for r in (other, with_file, elsewhere)}) == 3
    assert with_file.name.startswith("vitmem-my_") and with_file.name.endswith("-toy-gear-demo-s77")
    assert by_hash(tmp_path / "nowhere").keys() == by_hash().keys()


def write(folder, request, record):
    (folder / request.folder).mkdir(parents=True)
    (folder / request.folder / "record.json").write_text(json.dumps(record, indent=2))


# --- time -----------------------------------------------------------------------------------------------------------


def test_an_estimate_scales_images_and_epochs():
    basis = Request("vitmem", "btad", "01", preset="paper", overrides={"epochs": 2})
    there = [record(basis, seconds=s) for s in (70.0, 80.0, 1000.0)]  # 400 training, 70 test images
    seconds, said = estimate(Request("vitmem", "mvtec", "bottle", preset="paper"), there)
    assert seconds == pytest.approx(80 / 400 / 2 * 209 * 200 + 10 / 70 * 83)
    assert said == "3 runs on cuda, some GPU, 4 thread(s)"


def test_an_estimate_has_a_basis_or_says_that_it_has_none():
    asked = Request("vitmem", "mvtec", "bottle", preset="paper")
    other = [record(Request("vitmem", "mvtec", "bottle", preset="small"))]
    other += [record(Request("anovit", "mvtec", "bottle", preset="paper"))]
    other += [record(Request("vitmem", "mvtec", "bottle", preset="paper", overrides={"image_size": 128}))]
    assert estimate(asked, other) == (
        None,
        "for a measured time, run one epoch on toy: "
        "vitad run vitmem --preset paper --set epochs=1 --out runs/pace-vitmem",
    )
    unknown = Request("vitmem", "folder", preset="paper")
    assert "images of folder is not known" in estimate(unknown, [record(asked)])[1]
    known = record(
        Request("vitmem", "folder", preset="small"), counts={"train": 50, "test_good": 5, "test_defective": 5}
    )
    assert estimate(unknown, [record(asked), known])[0] == pytest.approx(100 / 209 * 50 + 10 / 83 * 10)


def test_runs_on_a_machine_like_this_one_count_first():
    asked = Request("vitmem", "mvtec", "bottle", preset="paper")
    on_cpu = Request.make(asked, device="cpu")
    here = runs.environment(runs.find_device("cpu"))
    there = [record(asked, seconds=5.0)] * 5 + [record(asked, seconds=500.0, environment=here)]
    assert estimate(on_cpu, there)[0] == pytest.approx(510)
    assert estimate(on_cpu, there[:5])[0] == pytest.approx(15)


def test_published_and_generated_counts(toy_root):
    assert n_images(Request("mala", "mvtec+visa")) == (3629 + 8659, 1725 + 2162)
    assert n_images(Request("mala", "ksdd2")) == (2085, 1004)
    found = data.find("toy", None, "all")
    assert n_images(Request("mala", "toy")) == (len(found.train), len(found.test))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0.4 s"), (42, "42 s"), (150, "2.5 min"), (5400, "1.5 h"), (400000, "4.63 days")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def where_to_get(name, root=None):
    return data.get(name).where_to_get(root)


def test_where_data_can_be_had(tmp_path, monkeypatch):
    for variable in ("VITAD_DATA", "VITAD_MT_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    both = where_to_get("mvtec+visa")
    assert "vitad data download mvtec --root DIR/mvtec --accept-licence" in both and "VisA" not in both
    assert "CC BY-NC-SA 4.0" in both and "vitad data download visa --root DIR/visa" in both
    assert "git clone https://github.com" in where_to_get("mt")
    (tmp_path / "mvtec").mkdir()
    assert "'mvtec'" not in where_to_get("mvtec+visa", tmp_path)
    assert where_to_get("mvtec", tmp_path) is where_to_get("toy") is None
    assert "nowhere" in where_to_get("btad", tmp_path / "nowhere")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """`table(*words)` is `vitad table` in an empty folder; gives (status, what it printed)."""
    monkeypatch.chdir(tmp_path)
    for variable in ("VITAD_DATA", "VITAD_MT_ROOT"):
        monkeypatch.delenv(variable, raising=False)

    def call(*words):
        status = main(["table", *map(str, words)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


def test_the_list_of_tables(table):
    status, text = table()
    assert status == 0
    found = by_hash()
    for name in TABLES:
        there = sum(r.hash in found for r in requests(name))
        preset = requests(name)[0].preset
        assert re.search(rf"^ *{name} .* {preset} +{len(requests(name))} +{there}$", text, re.M), name
    assert re.search(r"^ *yang2024-6 .* toy +demo +12 +12$", table("--dataset", "toy")[1], re.M)


def test_a_table_of_committed_records_is_filled(table, tmp_path):
    status, text = table("yang2024-6", "--dataset", "toy")
    assert (
        status == 0
        and "12 needed, 12 there, 0 missing" in text
        and "reproduced with (preset; hardware): demo; " in text
    )
    assert re.search(r"^Base \+ M +85\.7 +\d\d\.\d\s±\s\d\.\d +3 .* other data$", text, re.M)
    stem = tmp_path / "runs" / "tables" / "yang2024-6-toy-demo"
    frame = pd.read_csv(f"{stem}.csv")
    assert list(frame.columns) == list(COLUMNS) and frame["reproduced"].notna().all()
    rows = [line for line in Path(f"{stem}.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 12


def test_a_table_without_its_data_lists_runs_and_says_what_it_needs(table):
    status, text = table("yang2024-5")
    assert status == 0 and "45 needed, 0 there, 45 missing" in text and "vitad data download btad" in text
    single = (
        "vitad run vitmem --dataset btad --category 01 --preset paper --seed 0 --data-root DIR --out runs/vitmem-btad"
    )
    assert single in text
    assert text.splitlines()[1].startswith("data: 'btad' is not at hand")  # the cause before its effects
    assert "unknown so far\n  about " in text and "by counted operations: vitad plan vitmem --preset paper" in text
    assert "\n  for a measured time, run one epoch on toy: vitad run vitmem" in text and "cells are empty" in text
    (number,) = printed.table("yang2024-5").query("category == '02' and method == 'Ours'")["value_percent"][:1]
    assert re.search(rf"^02 +{number}( |$)", text, re.M)
    assert table("yang2024-5", "--category", "01,02", "--out", "here")[0] == 0
    assert Path("here/yang2024-5-btad-01_02-paper.csv").exists()
    status, text = table("yang2024-5", "--run")
    assert status == 2 and text.count("error") == 1 and "'btad' is not at hand" in text


def test_mistakes_end_with_one_line(table):
    status, text = table("yang2023-6")
    assert status == 2 and text.startswith("vitad: error: unknown table 'yang2023-6'. Did you mean 'yang2024-6'?")
    status, text = table("yang2024-6", "--dataset", "toi")
    assert status == 2 and "Did you mean 'toy'" in text and text.count("\n") == 1


def test_missing_runs_are_made_and_a_failing_one_stops_no_other(table, toy_root, tmp_path, monkeypatch):
    words = ["anovit-mvtec", "--dataset", "toy", "--preset", "smoke", "--seeds", 2, "--data-root", toy_root, "--run"]
    first, *others = requests("anovit-mvtec", "toy", preset="smoke", seeds=2)
    (tmp_path / "runs" / first.folder).mkdir(parents=True)
    (tmp_path / "runs" / first.folder / "notes.txt").write_text("mine")
    status, text = table(*words)
    assert status == 1 and "1 of 4 runs failed: anovit-toy-gear-smoke-s0" in text
    assert "[1/4] anovit-toy-gear-smoke-s0" in text and "holds files that are not a run" in text
    assert re.search(r"\[4/4\] l2cae-toy-gear-smoke-s1, about \S+ (s|min) left", text)
    assert {r.hash for r in others} == {hash_of(r) for r in runs.read_records("runs")}
    (line,) = [line for line in text.splitlines() if line.startswith("AnoViT ")][-1:]
    frame = pd.read_csv("runs/tables/anovit-mvtec-toy-smoke.csv")
    assert cell(frame, "average", "AnoViT")["fill"] == "1 of 2 runs: anovit-toy-gear-smoke-s0"
    assert cell(frame, "average", "L2-CAE")["seeds"] == 2 and line

    shutil.rmtree(tmp_path / "runs" / first.folder)
    assert table(*words)[0] == 0
    monkeypatch.setattr(runs, "run", lambda *a, **k: pytest.fail("nothing is left to run"))
    began = time.perf_counter()
    status, text = table(*words)
    assert status == 0 and "4 there, 0 missing" in text and time.perf_counter() - began < 5
    anovit = [r["metrics"]["image_auroc"] for r in runs.read_records("runs") if r["method"] == "anovit"]
    shown = cell(pd.read_csv("runs/tables/anovit-mvtec-toy-smoke.csv"), "average", "AnoViT")
    assert shown["reproduced"] == pytest.approx(100 * np.mean(anovit)) and shown["tier"].startswith("smoke; ")


def test_weights_are_passed_on_and_their_runs_found_again(table, toy_root, monkeypatch):
    options = dict(dataset="toy", preset="smoke", seeds=1, weights="mae.pth")
    (asked,) = requests("mala2023-ksdd2", **options)
    assert asked.command("x")[-4:] == ["--weights", "mae.pth", "--out", "x"]
    made = []

    def run(request, out):
        made.append(request)
        write(out.parent, asked, record(asked, weights={"asked": request.weights, "source": "file mae.pth"}))
        return runs.read_record(out)

    monkeypatch.setattr(runs, "run", run)
    words = ["mala2023-ksdd2", "--dataset", "toy", "--preset", "smoke", "--seeds", 1, "--data-root", toy_root]
    status, text = table(*words, "--set", "textures=/dtd", "stage1_epochs=1", "--weights", "mae.pth")
    assert "--set textures=/dtd stage1_epochs=1 --weights mae.pth" in text and "1 missing" in text
    status, text = table(*words, "--weights", "mae.pth", "--run")
    assert status == 0 and [r.weights for r in made] == ["mae.pth"]
    assert list(Path("runs/tables").glob("mala2023-ksdd2-toy-smoke-mae_*.csv"))
    assert "1 there, 0 missing" in table(*words, "--weights", "mae.pth")[1]
    status, text = table(*words)
    assert "0 there, 1 missing" in text and "--weights" not in text


def test_an_unexpected_failure_is_shown_whole(monkeypatch, toy_root, tmp_path):
    def broken(*words, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(runs, "run", broken)
    asked, said = requests("yang2024-4", "toy", preset="smoke", seeds=1, data_root=toy_root), []
    failed = run_missing(asked, {}, tmp_path, say=said.append)
    assert list(failed) == [r.name for r in asked] and "Traceback" in said[1] and "a bug" in said[1]


def test_a_thousand_records_are_tabulated_in_four_seconds(tmp_path):
    asked = requests("yang2024-3", seeds=23)[:1000]
    for request in asked:
        write(tmp_path, request, record(request, 0.8 + 0.01 * (request.seed % 5)))
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        found = by_hash(tmp_path)
        table = Reproduction("yang2024-3", seeds=23)
        lines, _, _ = overview(table.requests, found)
        frame = cells(table, found)
        text = layout.for_terminal(frame)
        best = min(best, time.process_time() - began)
        if best < 4:
            break
    assert sum(r.hash in found for r in asked) == 1000 and len(lines) == 7 * 15
    assert cell(frame, "carpet", "Ours")["seeds"] == 23 and "judged" in text
    assert best < 4  # two on most processors


def test_help_needs_no_torch():
    code = "import sys; sys.argv[1:] = ['table', '--help']; from vitad.cli import main\n"
    code += "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
