"""`vitad plan`: counted operations and memory against measured ones, steps, cards, and what the command says."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU, make
from torch.profiler import ProfilerActivity, profile

from vitad import data, methods
from vitad.backbones import vit
from vitad.cli import main
from vitad.data.sets import toy
from vitad.errors import UserError
from vitad.methods import METHODS
from vitad.papers.estimates import overview
from vitad.papers.tables import TABLES, Reproduction
from vitad.plan import (
    CARDS,
    GIB,
    SHARE,
    SPARE,
    Card,
    _counted,
    _too_small,
    _undamaged,
    as_text,
    counter,
    multiply_adds,
    plan,
    step,
)
from vitad.runs import Request
from vitad.settings import resolve
from vitad.training import train

TRAINED = [name for name in METHODS if make(methods.get(name)).phases()]


def asked(method, dataset="mvtec", category="bottle", **options):
    return Request(method, dataset, category=category, **{"preset": "smoke"} | options)


def real(name, **overrides):
    """A real model as `_counted` makes one without numbers, and a batch for each of its phases."""
    model = make(methods.get(name), **overrides)
    model.fill_for_timing()
    if hasattr(model, "synthesis"):
        model.synthesis = _undamaged
    batches = []
    for phase in model.phases():
        first = torch.zeros(phase.batch_size, dtype=torch.long)
        side = model.settings.image_size
        images = torch.rand(phase.batch_size, 3, side, side)
        batches.append({"image": images, "index": first, "texture": first.bool()})
    return model, batches


# --- operations and memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_counted_without_numbers_is_what_real_tensors_take(name, amp):
    model, batches = real(name, amp=amp)
    module = methods.get(name)
    _, parts, image = _counted(name, resolve(module.Settings, module.PRESETS, "smoke", {"amp": amp}))
    measured = [step(model, *both) for both in zip(model.phases(), batches, strict=True)]
    for part, found in zip(parts, measured, strict=True):
        for name in ("multiply_adds", "weights", "gradients", "state"):
            assert getattr(part, name) == getattr(found, name) > 0
        assert part.activations == pytest.approx(found.activations, rel=0.01)  # single numbers may be kept or not
        assert part.calls == pytest.approx(found.calls, rel=0.05)
    with torch.no_grad(), counter() as counted:
        model.image_score(model.eval().anomaly_map(torch.rand(1, 3, 64, 64)))
    assert multiply_adds(counted) == image > 0


@pytest.mark.parametrize("name", TRAINED)
def test_saved_activations_are_what_a_step_leaves_allocated(name):
    """The profiler sees what the allocator gives and takes, whoever asks."""
    model, batches = real(name)
    for phase, batch in zip(model.phases(), batches, strict=True):
        part = step(model, phase, batch)
        model.train()
        torch.manual_seed(0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            losses = (phase.losses or model.losses)(batch)
        left = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
        kept = part.activations - batch["image"].nbytes  # the batch was there before
        assert left == pytest.approx(kept, rel=0.1)
        del losses  # not while the next phase is measured


def test_multiply_adds_of_a_small_vit_by_hand():
    """Of a linear layer the backward pass takes twice the forward one, of fused attention 2.5 times."""
    model, _ = vit("vit_tiny_patch16_224", 96, "random")
    D, N, layers, patches = 192, 37, 12, 36  # 6 x 6 patches and the class token
    linear, attention, embedding = 12 * N * D**2, 2 * N**2 * D, patches * 3 * 16 * 16 * D
    with counter() as counted:
        tokens = model.forward_features(torch.rand(1, 3, 96, 96))
        assert multiply_adds(counted) == layers * (linear + attention) + embedding
        tokens.sum().backward()
    backward = layers * (2 * linear + 2.5 * attention) + embedding  # pixels need no gradient
    assert multiply_adds(counted) == layers * (linear + attention) + embedding + backward


def test_memory_of_the_weights_and_of_adam():
    """MALA's second stage trains the decoder and TBM: their gradients and two moments, 4 bytes each."""
    model = make(methods.get("mala"))
    trained = [sum(p.numel() for p in phase.parameters) for phase in model.phases()]
    unused = sum(p.numel() for p in model.decoder.pred.parameters())  # paints pixels, in stage 1
    first, second = plan(asked("mala")).parts
    assert first.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert (first.gradients, second.gradients) == (4 * trained[0], 4 * (trained[1] - unused))
    assert (first.state, second.state) == (8 * trained[0], 8 * trained[1])
    assert second.memory == (second.weights + second.gradients + second.state + second.activations) / GIB + SPARE


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_steps_are_those_of_a_training(name, gears, monkeypatch):
    monkeypatch.setattr(toy, "N_TRAIN", len(gears.train))
    overrides = {"patience": 0} if name == "anovit" else {}  # it holds images out; none of its epochs may be left out
    model = make(methods.get(name), **overrides)
    model.prepare(gears.train, CPU)
    planned = plan(asked(name, "toy", "gear", overrides=overrides)).steps
    taken, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *words: taken.append(1) or backward(*words))
    train(model, gears.train, 0, CPU, amp=False)
    assert sum(planned) == len(taken) > 0


@pytest.mark.parametrize(
    ("method", "dataset", "category", "settings", "steps"),
    [
        ("vitmem", "mvtec", "bottle", {"epochs": 200}, [27 * 200]),  # 209 images in batches of 8
        ("vitmem", "btad", "01", {"epochs": 200}, [50 * 200]),  # 400
        ("anovit", "mvtec", "bottle", {"epochs": 200}, [24 * 200]),  # 188, since 21 are held out
        # At most 200 and 80 images of each of 15 categories. The toothbrush has 60.
        ("mala", "mvtec", None, {"stage1_batch_size": 128, "batch_size": 32}, [23 * 2, 37 * 2]),
        ("mala", "mvtec+visa", None, {"stage1_batch_size": 128, "batch_size": 32}, [42 * 2, 67 * 2]),
        ("ssltok", "mvtec", "bottle", {"min_steps": 5000}, [14 * 358]),  # as many epochs as 5,000 steps need
        ("patchknn", "mvtec", "bottle", {}, []),
        ("padim", "mvtec", "bottle", {}, []),
        ("dinomaly", "mvtec", "bottle", {"steps": 5000}, [14 * 358]),
        ("uniad", "mvtec", "bottle", {}, [27 * 2]),
        ("psvdd", "mvtec", "bottle", {}, [27 * 2]),
        ("vtadl", "mvtec", "bottle", {}, [27 * 2]),
        ("fanogan", "mvtec", "bottle", {}, [53 * 3, 53 * 2]),
        ("draem", "mvtec", "bottle", {"batch_size": 8, "epochs": 60, "max_steps": 900}, [27 * 33]),
    ],
)
def test_steps_of_known_data_sets(method, dataset, category, settings, steps):
    assert plan(asked(method, dataset, category, overrides=settings)).steps == steps


@pytest.mark.parametrize("name", ["mvtec", "mvtec+visa", "toy", "ksdd2", "mt"])
def test_counts_by_category_add_up(name):
    described = data.get(name)
    category = "all" if name in ("mvtec", "toy") else None
    by_category = described.counts_by_category(category)
    assert tuple(np.sum(list(by_category.values()), 0)) == described.counts(category)


def test_categories_are_named_as_images_name_them(toy_root):
    train = data.load("toy", toy_root, "all", image_size=32).train
    assert set(train.categories) - {"toy/quirks"} == set(data.get("toy").counts_by_category("all"))


# --- cards ------------------------------------------------------------------------------------------------------------


def test_time_is_that_of_operations_at_the_assumed_share_or_of_starting_them():
    found = plan(asked("vitmem"))
    (part,), (steps,) = found.parts, found.steps
    slow, fast = Card("slow", 1, 1e-3), Card("fast", 1, 1e9)
    of_images = 292 * 2 * found.image / (SHARE * 1e9)
    assert found.seconds(slow) == pytest.approx(steps * 2 * part.multiply_adds / (SHARE * 1e9) + of_images)
    assert found.seconds(fast) == pytest.approx(steps * part.calls * 1e-5)
    assert 100 < part.calls < 1000


def test_the_batch_that_is_proposed_fits_and_a_larger_one_does_not():
    (part,) = plan(asked("l2cae", overrides={"batch_size": 64})).parts
    assert part.largest_batch(Card("none", SPARE, 1)) == 0
    card = Card("small", part.fixed + 0.5 * part.activations / GIB, 1)
    assert part.memory > card.memory and part.largest_batch(card) == 32
    for n, fits in ((32, True), (33, False)):
        (smaller,) = plan(asked("l2cae", overrides={"batch_size": n})).parts
        assert (smaller.memory <= card.memory) == fits


def test_a_page_says_what_is_too_small_and_which_setting_helps(monkeypatch):
    found = plan(asked("mala", category="all"))
    parted = plan(asked("mala", category="all", overrides={"micro_batch": 1}))
    between = Card("between", (found.parts[0].memory + parted.parts[0].memory) / 2, 100.0)
    monkeypatch.setattr("vitad.plan.CARDS", (*CARDS, between, Card("tiny", 1.0, 100.0)))
    text = as_text([found])
    assert re.search(r"between .* too small for stage1: --set micro_batch=(8|4|2|1) fits\n", text)
    assert re.search(r"tiny .* too small for stage1: so is it .*; too small for stage2: so is it with any batch", text)
    assert re.search(r"H100 SXM +80 +989.4 bfloat16 .* fits", text) and re.search("T4 +16 +8.1 float32", text)
    assert "40% of the peak is assumed, not measured" in text and "1.5 GiB are spare" in text


def test_a_smaller_batch_is_proposed_only_where_micro_batches_do_not_help():
    found = plan(asked("mala", category="all"))
    first, second = found.parts
    parted, _ = plan(asked("mala", category="all", overrides={"micro_batch": 4})).parts
    of_one = (first.activations - parted.activations) / first.phase.batch_size
    room = first.fixed + (parted.activations + 4.5 * of_one) / GIB
    assert _too_small(found, 0, Card("four", room, 1.0)) == "too small for stage1: --set micro_batch=4 fits"
    tight = Card("tight", second.memory - 1e-6, 1.0)  # the second stage has none
    assert _too_small(found, 1, tight) == f"too small for stage2: --set batch_size={second.largest_batch(tight)} fits"
    small = Card("small", first.fixed + 0.9 * parted.activations / GIB, 1.0)
    assert re.search("stage1: --set stage1_batch_size=[1-9]", _too_small(found, 0, small))


# --- the command ------------------------------------------------------------------------------------------------------


def says(capsys, *words):
    status = main(["plan", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out or said.err


def test_each_phase_has_a_column_and_each_category_a_model(capsys):
    status, text = says(capsys, "mala", "--preset", "smoke")
    assert status == 0 and re.search(r"^ +stage1 +stage2$", text, re.M)
    assert "data mvtec all: 3,629 training and 1,725 test images, one model" in text
    status, text = says(capsys, "anovit", "--preset", "smoke")
    assert "a model for each of 15 categories" in text and "at most, since it may stop early" in text
    each = [plan(asked("anovit", category=category)) for category in data.get("mvtec").categories()]
    assert re.search(rf"^steps, all models +{sum(p.steps[0] for p in each)}$", text, re.M)
    status, text = says(capsys, "patchknn", "--preset", "smoke", "--category", "pill")
    assert status == 0 and "nothing is trained" in text and "267 training and 167 test" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mal"], "unknown method 'mal'. Did you mean 'mala'?"),
        (["mala", "--preset", "papr"], "unknown preset 'papr'. Did you mean 'paper'?"),
        (["mala", "--dataset", "mvtek"], "unknown dataset 'mvtek'. Did you mean 'mvtec'?"),
        (["vitmem", "--category", "botle"], "unknown category of mvtec 'botle'. Did you mean 'bottle'?"),
        (["vitmem", "--preset", "smoke", "--set", "epoch=3"], "unknown setting 'epoch'. Did you mean 'epochs'?"),
        (
            ["l2cae", "--set", "image_size=100"],
            "image_size=100 does not suit this autoencoder. Choose 64, 128,",
        ),
        (["l2cae", "--dataset", "folder"], "number of images of folder is not published. Plan with a data set of"),
    ],
)
def test_bad_input_is_named_with_its_mend(capsys, words, message):
    status, text = says(capsys, *words)
    assert status == 2 and text.startswith("vitad: error: ") and message in text and text.count("\n") == 1


def test_a_plan_without_counts_is_refused():
    with pytest.raises(UserError, match="--dataset mvtec --category bottle"):
        plan(asked("l2cae", "folder", None))


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_every_printed_table_has_a_plan(name):
    """On the paper's data, with networks that are quickly counted."""
    table = Reproduction(name, preset="smoke")
    lines, left, basis = overview(table.requests, {})
    assert left is None and re.match(r"about \S+ \w+ on one H100 SXM, \S+ \w+ on one RTX 4090, by counted oper", basis)
    for request in {replace(r, seed=0) for r in table.requests}:
        assert f"vitad plan {request.method} --preset {request.preset} --dataset {request.dataset}" in basis


def test_a_table_counts_only_what_no_record_times(capsys, tmp_path, monkeypatch, toy_root):
    monkeypatch.chdir(tmp_path)
    words = [
        "table",
        "kimkwon-mvtec",
        "--dataset",
        "toy",
        "--preset",
        "smoke",
        "--seeds",
        "2",
        "--set",
        "image_size=32",
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "time of the missing here: unknown so far\n  about " in text
    assert "by counted operations: vitad plan ssltok --preset smoke --dataset toy" in text
