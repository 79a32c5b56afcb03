"""In the manner of Kim & Kwon 2024: frozen tokens, their cache, masking, the two subnetworks, losses and score."""

import math
from functools import partial

import helpers
import numpy as np
import pytest
import torch
from helpers import CPU
from scipy.ndimage import gaussian_filter, uniform_filter
from torch import nn

from vitad import data, runs, training
from vitad.backbones import intermediate, normalise
from vitad.blocks import top_mean
from vitad.errors import UserError
from vitad.files import read_safetensors
from vitad.methods import ssltok
from vitad.methods.ssltok import Reconstruction, Segmentation
from vitad.randomness import seed_of
from vitad.settings import resolve
from vitad.training import train

make = partial(helpers.make, ssltok)


def prepared(gears, **overrides):
    """A model in training mode with its caches filled."""
    model = make(**overrides)
    model.prepare(gears.train, CPU)
    return model.train()


def tokenized(model):
    """List that grows by the number of images whenever the tokenizer is run."""
    sizes = []
    model.tokenizer.patch_embed.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    return sizes


# --- tokenizer --------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_chosen_blocks_without_class_token(gears):
    images, model = gears.test.batch(range(3))["image"], make(blocks=(5, 2))
    with torch.no_grad():
        second, fifth = intermediate(model.tokenizer, normalise(images), [2, 5])
    assert second.shape == (3, 16, 64)
    torch.testing.assert_close(model.tokens(images), (second + fifth) / 2)


def test_standardised_tokens_have_mean_0_and_deviation_1_over_the_training_images(gears):
    model = prepared(gears, standardise=True)
    tokens = model.tokens(gears.train.batch(range(len(gears.train)))["image"]).flatten(0, 1)
    np.testing.assert_allclose(tokens.mean(0), 0, atol=0.01)
    np.testing.assert_allclose(tokens.std(0), 1, atol=0.01)
    assert prepared(gears).mean.eq(0).all() and prepared(gears).std.eq(1).all()


def test_the_tokenizer_stays_as_it_is(gears):
    model, modes = prepared(gears, pool=0, lr=0.01), []
    model.tokenizer.blocks[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, gears.train, 0, CPU, amp=False)
    after = model.state_dict()
    assert modes and not any(modes)
    assert all(p.grad is None for p in model.tokenizer.parameters())
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k.startswith("tokenizer."))
    for name in ("reconstruction.embed.weight", "reconstruction.mask", "segmentation.embed.weight"):
        assert not torch.equal(before[name], after[name])
    trained = {id(p) for p in model.phases()[0].parameters}
    assert trained == {id(p) for part in (model.reconstruction, model.segmentation) for p in part.parameters()}


# --- cache and training pairs -----------------------------------------------------------------------------


@pytest.mark.parametrize("standardise", [False, True])
def test_cached_tokens_are_those_of_the_tokenizer(gears, standardise):
    """To the rounding of half precision, eleven bits."""
    model = prepared(gears, damage=1.0, standardise=standardise)
    batch = gears.train.batch([7, 2, 11])
    t, t_a, M = model.pairs(batch)
    torch.testing.assert_close(t, model.tokens(batch["image"]), rtol=2**-10, atol=2**-8)
    changed = (t - t_a).abs().amax((1, 2)) > 0.05
    assert torch.equal(changed, M.any((1, 2)))


def test_the_pool_holds_the_tokens_of_the_damaged_images(gears):
    model = make(pool=3, batch_size=12)
    images = gears.train.batch(range(12))["image"]
    model.prepare(gears.train, CPU)
    for version in range(3):
        damaged = model.synthesis(images, seed_of(model.seed, "pool", version), 0)
        assert torch.equal(model.pool["mask"][version], damaged["mask"][:, 0])
        tokens = model.pool["tokens"][version].float()
        torch.testing.assert_close(tokens, model.tokens(damaged["image"]), rtol=2**-10, atol=2**-8)
    masks = model.pool["mask"].flatten(1)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    again = make(pool=3, batch_size=12)
    again.seed += 1
    again.prepare(gears.train, CPU)
    assert not torch.equal(again.pool["mask"], model.pool["mask"])


@pytest.mark.parametrize("pool", [0, 2])
def test_only_new_damage_is_tokenized_in_training(gears, pool):
    model = prepared(gears, pool=pool, damage=0.5)
    sizes = tokenized(model)
    batches = [model.pairs(gears.train.batch(range(12))) for _ in range(20)]
    share = sum(sizes) / 240
    assert share == 0 if pool else 0.35 < share < 0.65
    damaged = torch.stack([M.any((1, 2)) for _, _, M in batches])
    assert 0.25 < damaged.float().mean() < 0.65  # some damage is empty
    versions = {M[0].numpy().tobytes() for _, _, M in batches}
    assert len(versions) <= 1 + pool if pool else len(versions) > 3


def test_undamaged_images_are_their_own_target(gears):
    model = prepared(gears, damage=0.5, pool=0)
    t, t_a, M = model.pairs(gears.train.batch(range(12)))
    same = (t == t_a).all(2).all(1)
    assert 0 < same.sum() < 12 and not M[same].any()


def test_other_images_than_those_cached_are_tokenized(gears, monkeypatch):
    model = prepared(gears)
    sizes = tokenized(model)
    model.eval().losses(gears.test.batch(range(3)))
    assert sizes[0] == 3
    monkeypatch.setattr(ssltok, "CACHE_BYTES", 5 * 2 * 16 * 64)  # five images
    model = prepared(gears, pool=0, damage=0.0, segment=False)
    sizes = tokenized(model)
    model.losses(gears.train.batch([0, 4]))
    assert len(model.clean) == 5 and not sizes
    model.losses(gears.train.batch([0, 5]))
    assert sizes == [2]
    with pytest.raises(UserError, match=r"pool=2: the tokens of 12 images .* take .* GiB, more than"):
        prepared(gears, pool=2)


# --- masking and reconstruction ---------------------------------------------------------------------------


def reconstruction(**options):
    torch.manual_seed(0)
    return Reconstruction(**dict(token_width=6, n_tokens=9, width=8, depth=2, heads=2, dropout=0.5) | options)


def test_masked_tokens_cannot_be_seen():
    R, tokens = reconstruction().eval(), torch.randn(2, 9, 6)
    masked = torch.zeros(2, 9, dtype=torch.bool)
    masked[:, 3] = True
    other = tokens.clone()
    other[:, 3] += 1
    assert torch.equal(R(tokens, masked), R(other, masked))
    assert not torch.equal(R(tokens), R(other))
    other[:, 4] += 1
    assert not torch.equal(R(tokens, masked), R(other, masked))


def test_the_share_of_masked_tokens_is_uniform_up_to_its_limit(gears):
    model, seen = prepared(gears, mask_max=0.6), []
    forward = model.reconstruction.forward
    model.reconstruction.forward = lambda tokens, masked=None: seen.append(masked) or forward(tokens, masked)
    for _ in range(60):
        model.losses(gears.train.batch(range(12)))
    share = torch.cat(seen).float().mean(1)
    assert share.mean().item() == pytest.approx(0.3, abs=0.03)
    assert share.min() < 0.05 and 0.5 < share.max() < 0.95
    model.eval().anomaly_map(gears.test.batch([0])["image"])
    assert seen[-1] is None  # nothing is masked at test time


def test_dropout_acts_on_the_tokens_and_only_in_training():
    R, tokens = reconstruction(), torch.randn(1, 9, 6)
    assert not torch.equal(R.train()(tokens), R(tokens))
    assert torch.equal(R.eval()(tokens), R(tokens))


@pytest.mark.parametrize("block", [0, 1, -1])
def test_attention_is_that_of_the_block(block):
    R, tokens, seen = reconstruction().eval(), torch.randn(2, 9, 6), []
    attn = R.blocks[block].attn
    handle = attn.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    R(tokens)
    handle.remove()
    weights = R.attention(tokens, block)
    assert weights.shape == (2, 2, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 9))
    x, y = seen[0]
    v = attn.qkv(x).view(2, 9, 3, 2, 4)[:, :, 2].transpose(1, 2)
    torch.testing.assert_close(attn.proj((weights @ v).transpose(1, 2).reshape(2, 9, 8)), y)


# --- segmentation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid, image_size, expected", [(16, 224, [32, 64, 128]), (28, 392, [56, 112, 224]), (4, 64, [8, 16, 32])]
)
def test_segmentation_doubles_until_half_of_the_image(grid, image_size, expected):
    torch.manual_seed(0)
    G, found = Segmentation(5, (grid, grid), 32, image_size).eval(), []
    for layer in G.up:
        if isinstance(layer, nn.Upsample):
            layer.register_forward_hook(lambda _, __, y: found.append(y.shape[-1]))
    with torch.no_grad():
        assert G(torch.randn(1, grid**2, 5)).shape == (1, 2, image_size, image_size)
    assert found == expected


def test_segmentation_puts_every_token_in_its_place():
    """Logits change around the token that changes: row 1, column 3 of a grid of 4 at 64 px."""
    torch.manual_seed(0)
    G, tokens = Segmentation(5, (4, 4), 32, 64).eval(), torch.zeros(1, 16, 5)
    G.residual = nn.ModuleList()
    other = tokens.clone()
    other[0, 1 * 4 + 3] = 5
    with torch.no_grad():
        change = (G(other) - G(tokens)).abs().sum(1)[0].numpy()
    y, x = (np.average(np.indices((64, 64))[axis], weights=change) for axis in (0, 1))
    assert abs(y - 24) < 6 and abs(x - 56) < 12 and x > 40


# --- variants ---------------------------------------------------------------------------------------------


def test_variants_take_away_what_they_name(gears):
    models = {name: make(**switches) for name, switches in ssltok.VARIANTS.items()}
    parts = {k: (m.reconstruction is not None, m.segmentation is not None) for k, m in models.items()}
    assert parts == {
        "full": (True, True),
        "no_seg": (True, False),
        "no_rec": (False, True),
        "no_mask": (True, True),
        "no_synth": (True, False),
    }
    full = models["full"].state_dict()
    for name, model in models.items():
        same = {k for k, v in model.state_dict().items() if full[k].shape == v.shape and torch.equal(v, full[k])}
        if parts[name][0]:
            assert {k for k in full if k.startswith("reconstruction.")} <= same
        assert {k for k in full if k.startswith("tokenizer.")} <= same
        demo = resolve(ssltok.Settings, ssltok.PRESETS, "demo", {})
        assert all(v != getattr(demo, k) for k, v in ssltok.VARIANTS[name].items())
    assert models["no_rec"].segmentation.embed.in_channels == 64
    for name, damaged in (("no_synth", False), ("no_seg", True)):
        model = models[name].train()
        model.prepare(gears.train, CPU)
        assert bool(model.pairs(gears.train.batch(range(12)))[2].any()) == damaged
        assert set(model.losses(gears.train.batch(range(4)))) == {"cosine", "smooth_l1"}
    assert set(prepared(gears, reconstruct=False).losses(gears.train.batch(range(4)))) == {"focal", "l1"}


def test_the_segmentation_sees_tokens_prediction_and_difference():
    torch.manual_seed(0)
    t_a, t_hat = torch.randn(2, 1, 16, 64)
    for options, expected in (
        ({}, [t_a, t_hat, (t_a - t_hat).abs()]),
        ({"use_diff": False}, [t_a, t_hat]),
        ({"reconstruct": False}, [t_a]),
    ):
        model, seen = make(**options), []
        model.segmentation.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        model.segment(t_a, t_hat if len(expected) > 1 else None)
        assert torch.equal(seen[0], torch.cat(expected, -1))


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_of_the_segmentation_reach_the_reconstruction_unless_detached(gears, detach):
    model = prepared(gears, detach_rec=detach)
    losses = model.losses(gears.train.batch(range(4)))
    (losses["focal"] + losses["l1"]).backward()
    assert all((p.grad is None) == detach for p in model.reconstruction.parameters())
    assert all(p.grad is not None for p in model.segmentation.parameters())


# --- losses and score -------------------------------------------------------------------------------------


def test_losses_follow_their_formulas(gears):
    model = make(damage=1.0, kinds=("pit",), mask_max=0.0, pool=0)
    batch = gears.train.batch(range(5))
    torch.manual_seed(3)
    with torch.no_grad():
        losses = {k: v.item() for k, v in model.losses(batch).items()}
        torch.manual_seed(3)
        t, t_a, M = model.pairs(batch)
        t_hat = model.reconstruction(t_a)
        p = model.segment(t_a, t_hat).double().numpy()
    t, t_hat, M = t.double().numpy(), t_hat.double().numpy(), M.numpy()
    cosine = (t * t_hat).sum(-1) / np.linalg.norm(t, axis=-1) / np.linalg.norm(t_hat, axis=-1)
    error = np.abs(t - t_hat)
    smooth = np.where(error < 1, error**2 / 2, error - 0.5)
    p_true = np.where(M, p, 1 - p)
    assert M.any() and not M.all()
    assert losses["cosine"] == pytest.approx((1 - cosine).mean(), rel=1e-4)
    assert losses["smooth_l1"] == pytest.approx(0.5 * smooth.mean(), rel=1e-4)
    assert losses["focal"] == pytest.approx((-((1 - p_true) ** 2) * np.log(p_true)).mean(), rel=1e-4)
    assert losses["l1"] == pytest.approx(np.abs(p - M).mean(), rel=1e-4)


def test_balanced_loss_gives_the_damage_of_each_image_half_of_the_weight(gears):
    model = make(damage=0.5, kinds=("patch", "pit"), mask_max=0.0, pool=0, seg_loss="balanced")
    batch = gears.train.batch(range(12))
    torch.manual_seed(3)
    with torch.no_grad():
        losses = model.losses(batch)
        torch.manual_seed(3)
        t, t_a, M = model.pairs(batch)
        p = model.segment(t_a, model.reconstruction(t_a)).double().numpy()
    assert set(losses) == {"cosine", "smooth_l1", "segmentation"}
    each = []
    for q, m in zip(p, M.numpy(), strict=True):
        if m.any():
            assert m.mean() > 1e-3
            each.append(-(np.log(q[m]).mean() + np.log(1 - q[~m]).mean()) / 2)
        else:
            each.append(-np.log(1 - q).mean() / 2)
    assert 0 < M.any((1, 2)).sum() < 12
    assert losses["segmentation"].item() == pytest.approx(np.mean(each), rel=1e-4)


@pytest.mark.parametrize("parts", ["segmentation", "distance", "product"])
def test_map_is_smoothed_probability_distance_or_product(gears, parts):
    images = gears.test.batch(range(3))["image"]
    model = make(sigma=1.5, segment=parts != "distance", product=parts == "product")
    with torch.no_grad():
        seen, maps = model.predict(images), model.anomaly_map(images)
    t_a, t_hat = seen["t_a"].double(), seen["t_hat"].double()
    distance = 1 - (t_a * t_hat).sum(-1) / t_a.norm(dim=-1) / t_hat.norm(dim=-1)
    distance = nn.functional.interpolate(distance.view(3, 1, 4, 4), (64, 64), mode="bilinear")[:, 0].numpy()
    p = 1
    if parts != "distance":
        with torch.no_grad():
            p = model.segment(seen["t_a"], seen["t_hat"]).double().numpy()
        assert 0 < p.min() < p.max() < 1
    expected = p if parts == "segmentation" else p * distance
    np.testing.assert_allclose(maps, [gaussian_filter(m, 1.5) for m in expected], rtol=1e-4)


def test_hidden_tokens_are_predicted_unseen(gears):
    torch.manual_seed(0)
    t_a = torch.randn(2, 16, 64)
    model = make(hidden_parts=4)
    with torch.no_grad():
        t_hat = model.reconstruct(t_a)
        for n in range(16):
            other = t_a.clone()
            other[:, n] += 5
            moved = (model.reconstruct(other) - t_hat).abs().amax((0, 2)) > 1e-6
            assert not moved[n] and moved.sum() == 12  # the part that it is hidden with does not see it either
        assert torch.equal(make().reconstruct(t_a, parts=4), t_hat)
        everything = make(hidden_parts=1).reconstruct(t_a)
        assert torch.equal(everything, model.reconstruction(t_a, torch.ones(2, 16, dtype=torch.bool)))
        assert torch.equal(make().reconstruct(t_a), model.reconstruction(t_a))


def test_without_reconstruction_there_is_no_product(gears):
    images = gears.test.batch(range(2))["image"]
    maps = [make(reconstruct=False, product=product).anomaly_map(images) for product in (False, True)]
    assert torch.equal(*maps)


def test_image_scores():
    maps = torch.rand(3, 64, 64)
    expected = [uniform_filter(m, 5, mode="constant").max() for m in maps.double().numpy()]
    np.testing.assert_allclose(make().image_score(maps), expected, rtol=1e-5)
    assert torch.equal(make(score="top", top=0.1).image_score(maps), top_mean(maps, 0.1))


# --- training ---------------------------------------------------------------------------------------------


def test_there_are_at_least_min_steps():
    class Twelve:
        def __len__(self):
            return 12

    for min_steps, epochs in ((0, 2), (6, 2), (7, 3), (100, 34)):
        model = make(min_steps=min_steps, batch_size=5)
        with pytest.raises(AttributeError):  # three steps an epoch; there are no images to go on with
            model.prepare(Twelve(), CPU)
        assert model.phases()[0].epochs == epochs


@pytest.mark.parametrize("pool", [0, 2])
def test_broken_off_it_ends_with_the_same_weights(gears, tmp_path, monkeypatch, pool):
    monkeypatch.setattr(training, "CHECK_STEPS", 1)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)

    def run(stop=math.inf, state=None):
        model = make(pool=pool, batch_size=4, dropout=0.2)  # sets the seed, as a run does
        model.prepare(gears.train, CPU)
        losses, calls = model.losses, []

        def breaking(batch):
            calls.append(1)
            if len(calls) > stop:
                raise KeyboardInterrupt
            return losses(batch)

        model.losses = breaking
        train(model, gears.train, 0, CPU, amp=False, state_path=state)
        return model.state_dict(), len(calls)

    unbroken, steps = run()
    with pytest.raises(KeyboardInterrupt):
        run(stop=4, state=tmp_path / "state.pt")
    resumed, rest = run(state=tmp_path / "state.pt")
    assert steps == 6 and rest < 6
    assert all(torch.equal(v, resumed[k]) for k, v in unbroken.items())


def test_checkpoint_holds_tokenizer_and_subnetworks_once_and_no_cache(toy_root, tmp_path):
    record = runs.run("ssltok", data_root=toy_root, preset="smoke", out=tmp_path / "run")
    tensors, _ = read_safetensors(tmp_path / "run" / "checkpoint.safetensors")
    assert {k.split(".")[0] for k in tensors} == {"tokenizer", "reconstruction", "segmentation", "mean", "std"}
    buffers = [v for k, v in tensors.items() if k in ("mean", "std") or "running" in k or "num_batches" in k]
    held = sum(v.numel() for v in tensors.values()) - sum(v.numel() for v in buffers)
    assert held == record["counts"]["parameters"]
    model, images = runs.load_model(tmp_path / "run", "cpu"), data.load("toy", toy_root, image_size=64).test
    maps, _ = runs.score(model, images, CPU, 4, amp=False)
    np.testing.assert_allclose(maps, runs.read_maps(tmp_path / "run")["maps"], atol=1e-5)


def test_record_counts_steps_cache_and_speed(toy_root, tmp_path):
    counts = runs.run("ssltok", data_root=toy_root, preset="smoke", out=tmp_path / "run")["counts"]
    assert counts["train_steps"] == 2 * math.ceil(counts["train"] / 16)
    tokens, mask = 2 * 16 * 64, 64 * 64
    assert counts["cache_mib"] == round(counts["train"] * (2 * tokens + mask) / 2**20, 1)
    assert counts["images_per_s_from_tokens"] > counts["images_per_s"] > 0


def test_training_lowers_every_loss(gears):
    model = prepared(gears, epochs=30, lr=2e-3, batch_size=6, damage=0.7, kinds=("pit", "patch"))
    history = train(model, gears.train, seed=0, device=CPU, amp=False)
    for name in ("cosine", "smooth_l1", "focal", "l1"):
        assert history[-1][name] < 0.8 * history[0][name], name


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"reconstruct": False, "segment": False}, "both off"),
        ({"damage": 0}, "damage=0 leaves the segmentation nothing to learn from"),
        ({"damage": 1.5}, "damage=1.5 is a share"),
        ({"mask_max": 2}, "mask_max=2.0 is a share"),
        ({"dropout": 2}, "dropout=2.0 is a share"),
        ({"top": 2}, "top=2.0 is a share"),
        ({"warm_up": 1}, "warm_up=1.0 leaves no step"),
        ({"heads": 5}, "width=32 cannot be split between heads=5"),
        ({"heads": 0}, "heads=0"),
        ({"window": 4}, "window=4: give an odd number"),
        ({"kinds": "pit,crak"}, "Did you mean 'crack'"),
        ({"blocks": "7"}, "blocks 1 to 6"),
        ({"blocks": ""}, "blocks 1 to 6"),
    ],
)
def test_unusable_settings_are_refused(overrides, message):
    with pytest.raises(UserError) as raised:
        make(**overrides)
    assert message in str(raised.value)
