"""In the manner of Kim & Kwon 2024: frozen tokens, memory, pairs, masking, the two subnetworks, losses and score."""

import copy
import math
from functools import partial

import helpers
import numpy as np
import pytest
import torch
from helpers import CPU
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.nn import functional as F

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


def prepared(images, **overrides):
    """A model in training mode with its caches filled."""
    model = make(**overrides)
    model.prepare(images, CPU)
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


def test_tokens_have_mean_0_and_deviation_1_over_the_training_images(gears):
    model = prepared(gears.train)
    tokens = model.tokens(gears.train.batch(range(len(gears.train)))["image"]).flatten(0, 1)
    np.testing.assert_allclose(tokens.mean(0), 0, atol=0.01)
    np.testing.assert_allclose(tokens.std(0), 1, atol=0.01)
    model._measure(torch.ones(3, 16, 64))  # channels that are always the same
    assert model._standard(torch.ones(1, 16, 64)).eq(0).all()


def test_the_tokenizer_stays_as_it_is(gears):
    model, modes = prepared(gears.train, pool=0, lr=0.01), []
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


# --- memory -----------------------------------------------------------------------------------------------


def in_groups_of_three(gears):
    """The twelve training images as four items."""
    images = copy.copy(gears.train)
    images.groups = np.repeat(["d", "b", "c", "a"], 3)
    return images


def cosines(tokens, bank):
    """(B,N,M) in double precision."""
    tokens, bank = tokens.double().numpy(), bank.double().numpy()
    lengths = np.linalg.norm(tokens, axis=-1)[..., None] * np.linalg.norm(bank, axis=-1)
    return tokens @ bank.T / lengths


@pytest.mark.parametrize("size", [60, 200])
def test_the_bank_holds_tokens_drawn_evenly_or_all(gears, size):
    """There are 192 tokens."""
    model, other = prepared(in_groups_of_three(gears), bank_size=size), make(bank_size=size)
    tokens = model.clean.view(-1, 64).float()
    place = [(tokens == row).all(1).nonzero().item() for row in model.bank]
    assert place == sorted(set(place)) and len(place) == min(size, 192)
    assert model.owners.tolist() == [(3, 1, 2, 0)[p // 48] for p in place]
    other.seed += 1
    other.prepare(gears.train, CPU)
    if size == 60:
        assert len({p // 16 for p in place}) > 8
        assert not torch.equal(other.bank, model.bank)


@pytest.mark.parametrize("chunk", [7, 24, 100])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_look_up_is_that_of_a_loop(monkeypatch, sign, chunk):
    """Also where all rows lie on the other side, and for a bank that is no multiple of what is compared at a time."""
    monkeypatch.setattr("vitad.methods.ssltok.CHUNK", chunk)
    torch.manual_seed(0)
    model, direction = make(), 30 * torch.randn(64)
    model.bank = direction + torch.randn(24, 64)
    model.owners = torch.randint(4, (24,))
    tokens, items = sign * direction + torch.randn(3, 16, 64), torch.tensor([3, 0, 1])
    for given in (None, items):
        found = model.look_up(tokens, given)
        for b in range(3):
            for n in range(16):
                best, nearest = -math.inf, None
                for m in range(24):
                    if given is not None and model.owners[m] == items[b]:
                        continue
                    cosine = cosines(tokens[b, n], model.bank[m]).item()
                    if cosine > best:
                        best, nearest = cosine, m
                assert found[b, n] == nearest
    assert not torch.equal(model.look_up(tokens), model.look_up(tokens, items))


def test_half_precision_around_it_does_not_disturb_the_look_up():
    torch.manual_seed(0)
    model = make()
    model.bank = 30 * torch.randn(64) + torch.randn(30, 64)
    expected = model.look_up(model.bank[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.look_up(model.bank[None]), expected)
    assert expected.tolist() == [list(range(30))]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_training_image_finds_only_other_items_and_a_test_image_all(gears, grouped):
    images = in_groups_of_three(gears) if grouped else gears.train
    model = prepared(images, pool=2)
    assert len(model.items.unique()) == (4 if grouped else 12)
    assert model.nearest.shape == (3, 12, 16)
    owners = model.owners[model.nearest.long()]  # (3,12,16)
    assert not (owners == model.items[:, None]).any()

    batch = images.batch(range(12))
    _, t_a, t_m, M = model.pairs(batch)
    assert not (t_a[..., None, :] == t_m[:, None]).all(-1).any()
    with torch.no_grad():
        seen = model.eval().predict(batch["image"])
        strange = model.predict(gears.test.batch(range(12))["image"])
    assert torch.equal(model.owners[model.look_up(model.clean)], model.items[:, None].expand(12, 16))
    assert seen["distances"]["t_m"].abs().max() < 1e-5 < 1e-3 < strange["distances"]["t_m"].amax((1, 2)).min()
    near = model.bank[model.look_up(model._raw_tokens(batch["image"]))]
    assert torch.equal(seen["t_m"], model._standard(near))


def test_a_token_of_the_bank_is_found_at_distance_0(gears):
    model = prepared(gears.train).eval()
    with torch.no_grad():
        seen = model._predict(model.clean.float(), (64, 64))
    assert torch.equal(model.look_up(model.clean), torch.arange(192).view(12, 16))
    assert torch.equal(seen["t_m"], seen["t_a"]) and seen["distances"]["t_m"].abs().max() < 1e-6


def test_the_cached_rows_are_those_that_a_look_up_finds(gears):
    model = prepared(in_groups_of_three(gears), pool=2, bank_size=60)
    batch = gears.train.batch([7, 2, 11, 5, 0])
    looked_up, look_up = [], model.look_up
    model.look_up = lambda *arguments: looked_up.append(1) or look_up(*arguments)
    for seed in range(5):
        torch.manual_seed(seed)
        cached = model.pairs(batch)
        assert len(looked_up) == seed
        nearest, model.nearest = model.nearest, None
        torch.manual_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(cached, model.pairs(batch), strict=True))
        model.nearest = nearest
    for version, tokens in zip(model.nearest, [model.clean, *model.pool["tokens"]], strict=True):
        allowed = np.where(model.items[:, None, None] == model.owners, -math.inf, cosines(tokens, model.bank))
        assert np.array_equal(version, allowed.argmax(-1))


def test_images_of_one_item_alone_are_refused(gears):
    images = copy.copy(gears.train)
    images.groups = np.repeat("a", 12)
    with pytest.raises(UserError, match=r"the 192 tokens that are kept are all of one item.*set remember to false"):
        prepared(images)
    with pytest.raises(UserError, match="the 1 tokens that are kept"):
        prepared(gears.train, bank_size=1)
    assert prepared(images, remember=False).pairs(images.batch([0]))[2] is None


def test_it_is_timed_with_a_full_bank():
    model = make()
    model.fill_for_timing()
    assert torch.equal(model.look_up(model.bank[None]), torch.arange(200)[None])


# --- cache and training pairs -----------------------------------------------------------------------------

LARGE = {"kinds": ("perlin",), "mode": "global"}  # damage that no token misses


def test_cached_tokens_are_those_of_the_tokenizer(gears):
    """To the rounding of half precision, eleven bits."""
    model = prepared(gears.train, damage=1.0, **LARGE)
    batch = gears.train.batch([7, 2, 11])
    t, t_a, t_m, M = model.pairs(batch)
    torch.testing.assert_close(t, model.tokens(batch["image"]), rtol=2**-10, atol=2**-8)
    changed = (t - t_a).abs().amax((1, 2)) > 0.05
    assert torch.equal(changed, M.any((1, 2))) and changed.any()
    assert t.shape == t_a.shape == t_m.shape == (3, 16, 64) and M.shape == (3, 64, 64)


def test_the_pool_holds_the_tokens_of_the_damaged_images(gears):
    model = make(pool=3, batch_size=12)
    images = gears.train.batch(range(12))["image"]
    model.prepare(gears.train, CPU)
    for version in range(3):
        damaged = model.synthesis(images, seed_of(model.seed, "pool", version), 0)
        assert torch.equal(model.pool["mask"][version], damaged["mask"][:, 0])
        tokens = model._standard(model.pool["tokens"][version].float())
        torch.testing.assert_close(tokens, model.tokens(damaged["image"]), rtol=2**-10, atol=2**-8)
    masks = model.pool["mask"].flatten(1)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    again = make(pool=3, batch_size=12)
    again.seed += 1
    again.prepare(gears.train, CPU)
    assert not torch.equal(again.pool["mask"], model.pool["mask"])


@pytest.mark.parametrize("pool", [0, 2])
def test_only_new_damage_is_tokenized_in_training(gears, pool):
    model = prepared(gears.train, pool=pool, damage=0.5, **LARGE)
    sizes = tokenized(model)
    batches = [model.pairs(gears.train.batch(range(12))) for _ in range(20)]
    share = sum(sizes) / 240
    assert share == 0 if pool else 0.35 < share < 0.65
    damaged = torch.stack([M.any((1, 2)) for *_, M in batches])
    assert 0.25 < damaged.float().mean() < 0.65  # some damage is empty
    versions = {M[0].numpy().tobytes() for *_, M in batches}
    assert len(versions) <= 1 + pool if pool else len(versions) > 3


def test_undamaged_images_are_their_own_target(gears):
    """Also where one image alone is damaged."""
    model, counts = prepared(gears.train, damage=0.1, pool=0), set()
    for seed in range(12):
        torch.manual_seed(seed)
        t, t_a, _, M = model.pairs(gears.train.batch(range(12)))
        same = (t == t_a).all(2).all(1)
        counts.add(12 - int(same.sum()))
        assert not M[same].any()
    assert {0, 1, 2} <= counts and max(counts) < 6


def test_other_images_than_those_cached_are_tokenized(gears, monkeypatch):
    model = prepared(gears.train)
    sizes = tokenized(model)
    model.eval().losses(gears.test.batch(range(3)))
    assert sizes[0] == 3
    monkeypatch.setattr(ssltok, "CACHE_BYTES", 5 * (2 * 64 + 4) * 16)  # tokens and nearest rows of five images
    model = prepared(gears.train, pool=0, damage=0.0, segment=False)
    sizes = tokenized(model)
    model.pairs(gears.train.batch([0, 4]))
    assert len(model.clean) == 5 and not sizes
    _, _, t_m, _ = model.pairs(gears.train.batch([0, 5]))
    assert sizes == [2]
    nearest = model.look_up(model._raw_tokens(gears.train.batch([0, 5])["image"]), torch.tensor([0, 5]))
    assert torch.equal(t_m, model._standard(model.bank[nearest]))
    with pytest.raises(UserError, match=r"pool=2: the tokens of 12 images .* take .* GiB, more than"):
        prepared(gears.train, pool=2)


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
    model, seen = prepared(gears.train, mask_max=0.6), []
    forward = model.reconstruction.forward
    model.reconstruction.forward = lambda tokens, masked=None: seen.append(masked) or forward(tokens, masked)
    for _ in range(60):
        model.losses(gears.train.batch(range(12)))
    share = torch.cat(seen).float().mean(1)
    assert share.mean().item() == pytest.approx(0.3, abs=0.03)
    assert share.min() < 0.05 and 0.5 < share.max() < 0.95
    seen.clear()
    model.eval().anomaly_map(gears.test.batch([0])["image"])
    shown, *hidden = seen  # at test time nothing is masked, then one half after the other
    assert shown is None and torch.equal(hidden[0], ~hidden[1]) and hidden[0].sum() == 8


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
    """And leave the weights of all else as they are."""
    models = {name: make(**switches) for name, switches in ssltok.VARIANTS.items()}
    full = models["full"].state_dict()
    differing = {}
    for name, model in models.items():
        state = model.state_dict()
        differing[name] = {k for k, v in full.items() if k not in state or not torch.equal(v, state[k])}
        assert state.keys() <= full.keys()
        demo = resolve(ssltok.Settings, ssltok.PRESETS, "demo", {})
        assert all(v != getattr(demo, k) for k, v in ssltok.VARIANTS[name].items())
    R, G = ({k for k in full if k.startswith(part)} for part in ("reconstruction.", "segmentation."))
    embed = {"segmentation.embed.weight", "segmentation.embed.bias"}
    assert differing == {
        "full": set(),
        "no_seg": G,
        "no_rec": R | embed,
        "no_mem": embed,
        "no_mask": set(),
        "no_synth": G,
    }
    for name, damaged in (("no_synth", False), ("no_seg", True)):
        model = models[name].train()
        model.prepare(gears.train, CPU)
        assert bool(model.pairs(gears.train.batch(range(12)))[3].any()) == damaged
        assert set(model.losses(gears.train.batch(range(4)))) == {"cosine", "smooth_l1"}
    assert set(prepared(gears.train, reconstruct=False).losses(gears.train.batch(range(4)))) == {"segmentation"}


def test_the_segmentation_sees_tokens_prediction_and_differences():
    torch.manual_seed(0)
    t_a, t_hat, t_m = torch.randn(3, 1, 16, 64)
    predicted, remembered = [t_hat, (t_a - t_hat).abs()], [(t_a - t_m).abs()]
    for reconstruct, remember, expected in (
        (True, True, [t_a, *predicted, *remembered]),
        (False, True, [t_a, *remembered]),
        (True, False, [t_a, *predicted]),
        (False, False, [t_a]),
    ):
        model, seen = make(reconstruct=reconstruct, remember=remember), []
        model.segmentation.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        model.segment(t_a, t_hat if reconstruct else None, t_m if remember else None)
        assert torch.equal(seen[0], torch.cat(expected, -1))


def test_gradients_of_the_segmentation_do_not_reach_the_reconstruction(gears):
    model = prepared(gears.train)
    losses = model.losses(gears.train.batch(range(4)))
    losses["segmentation"].backward()
    assert all(p.grad is None for p in model.reconstruction.parameters())
    assert all(p.grad is not None for p in model.segmentation.parameters())
    (losses["cosine"] + losses["smooth_l1"]).backward()
    assert all(p.grad is not None for p in model.reconstruction.parameters())


# --- losses and score -------------------------------------------------------------------------------------


def test_losses_of_the_reconstruction_follow_their_formulas(gears):
    """t_hat comes from the damaged tokens, its target are the clean ones."""
    model = prepared(gears.train, damage=1.0, mask_max=0.0, pool=0, **LARGE).eval()
    batch = gears.train.batch(range(5))
    torch.manual_seed(3)
    with torch.no_grad():
        losses = {k: v.item() for k, v in model.losses(batch).items()}
        torch.manual_seed(3)
        t, t_a, _, M = model.pairs(batch)
        t_hat = model.reconstruction(t_a)
    assert M.any() and set(losses) == {"cosine", "smooth_l1", "segmentation"}
    t, t_hat = t.double().numpy(), t_hat.double().numpy()
    cosine = (t * t_hat).sum(-1) / np.linalg.norm(t, axis=-1) / np.linalg.norm(t_hat, axis=-1)
    error = np.abs(t - t_hat)
    smooth = np.where(error < 1, error**2 / 2, error - 0.5)
    assert losses["cosine"] == pytest.approx((1 - cosine).mean(), rel=1e-4)
    assert losses["smooth_l1"] == pytest.approx(0.5 * smooth.mean(), rel=1e-4)


def test_the_damage_of_each_image_has_half_of_the_weight_unless_it_is_tiny(gears):
    """Of 4096 pixels none, one, 64, half and all are damaged; a thousandth is 4.096."""
    torch.manual_seed(0)
    model, M = make(mask_max=0.0), torch.zeros(5, 64, 64, dtype=torch.bool)
    M[1, 30, 30], M[2, :8, :8], M[3, :32], M[4] = True, True, True, True
    t, t_a, t_m = torch.randn(3, 5, 16, 64)
    model.pairs = lambda batch: (t, t_a, t_m, M)
    with torch.no_grad():
        loss = model.losses({"image": M})["segmentation"].item()
        p = model.segment(t_a, model.reconstruction(t_a), t_m).double().numpy()
    each = []
    for q, m in zip(p, M.numpy(), strict=True):
        damaged, normal = -np.log(q[m]).sum(), -np.log(1 - q[~m]).sum()
        each.append((damaged / max(m.sum(), 4.096) + normal / max((~m).sum(), 4.096)) / 2)
    assert loss == pytest.approx(np.mean(each), rel=1e-4)


@pytest.mark.parametrize(
    "overrides, distances",
    [
        ({}, ["t_hat", "unseen", "t_m"]),
        ({"hidden_parts": 0}, ["t_hat", "t_m"]),
        ({"segment": False}, ["t_hat", "unseen", "t_m"]),
        ({"reconstruct": False}, ["t_m"]),
        ({"remember": False}, ["t_hat", "unseen"]),
        ({"reconstruct": False, "remember": False}, []),
    ],
)
def test_map_is_the_smoothed_product_of_probability_and_mean_distance(gears, overrides, distances):
    images, model = gears.test.batch(range(3))["image"], prepared(gears.train, sigma=1.5, **overrides).eval()
    with torch.no_grad():
        seen, maps = model.predict(images), model.anomaly_map(images)
    assert [name for name in ("t_hat", "unseen", "t_m") if seen[name] is not None] == distances
    assert list(seen["distances"]) == distances
    raw, expected = model._raw_tokens(images), np.ones((3, 64, 64))
    for name in distances:  # that of the memory is the one of the look-up, of tokens that are not standardised
        one, other = (raw, model.bank[model.look_up(raw)]) if name == "t_m" else (seen["t_a"], seen[name])
        distance = (1 - F.cosine_similarity(one.double(), other.double(), dim=-1)).view(3, 1, 4, 4)
        distance = F.interpolate(distance, (64, 64), mode="bilinear")[:, 0].numpy()
        np.testing.assert_allclose(seen["distances"][name], distance, atol=1e-6)
        expected *= distance ** (1 / len(distances))
    assert seen["distance"] is None if not distances else np.allclose(seen["distance"], expected, atol=1e-6)
    if "segment" in overrides:
        assert seen["segmented"] is None
    else:
        with torch.no_grad():
            p = model.segment(seen["t_a"], seen["t_hat"], seen["t_m"]).double().numpy()
        assert 0 < p.min() < p.max() < 1
        expected *= p
    np.testing.assert_allclose(maps, [gaussian_filter(m, 1.5) for m in expected], rtol=1e-3, atol=1e-6)


def test_hidden_tokens_are_predicted_unseen():
    torch.manual_seed(0)
    t_a, model = torch.randn(2, 16, 64), make(hidden_parts=4)
    with torch.no_grad():
        unseen = model.unseen(t_a)
        for n in range(16):
            other = t_a.clone()
            other[:, n] += 5
            moved = (model.unseen(other) - unseen).abs().amax((0, 2)) > 1e-6
            assert not moved[n] and moved.sum() == 12  # the part that it is hidden with does not see it either
        everything = make(hidden_parts=1).unseen(t_a)
        assert torch.equal(everything, model.reconstruction(t_a, torch.ones(2, 16, dtype=torch.bool)))


def test_the_protocol_says_how_maps_and_scores_are_made(gears):
    model, maps = make(sigma=2.5, top=0.1), torch.rand(3, 64, 64)
    assert torch.equal(model.image_score(maps), top_mean(maps, 0.1))
    model.prepare(gears.train, CPU)
    assert model.protocol == {
        "normalisation": "imagenet",
        "smoothing": "Gaussian, sigma 2.5 px",
        "image_score": "mean of the highest 10.0% of the map",
        "checkpoint": "last epoch",
        "textures": "procedural",
    }
    assert "textures" not in prepared(gears.train, damage=0.0, segment=False).protocol


# --- training ---------------------------------------------------------------------------------------------


def test_there_are_at_least_min_steps():
    for min_steps, epochs in ((0, 2), (6, 2), (7, 3), (100, 34)):
        model = make(min_steps=min_steps, batch_size=5)
        model.size_up(np.repeat("toy/gear", 12))  # three steps an epoch
        assert model.phases()[0].epochs == epochs


def test_biases_and_norms_do_not_decay():
    model = make(weight_decay=0.3)
    groups = training._optimizer(model.phases()[0]).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [decay[id(p)] for p in trained] == [0.3 if p.ndim > 1 else 0.0 for p in trained]
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert decay[id(model.reconstruction.head[0].weight)] == 0 < decay[id(model.reconstruction.head[1].weight)]


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


@pytest.mark.parametrize("remember", [True, False])
def test_a_loaded_checkpoint_gives_the_maps_of_the_run_to_the_bit(toy_root, tmp_path, remember):
    """It holds tokenizer, subnetworks and bank once, and no cache."""
    overrides = {"remember": remember}
    record = runs.run("ssltok", data_root=toy_root, preset="smoke", overrides=overrides, out=tmp_path / "run")
    tensors, _ = read_safetensors(tmp_path / "run" / "checkpoint.safetensors")
    buffers = {"mean", "std", "bank"}
    assert {k.split(".")[0] for k in tensors} == {"tokenizer", "reconstruction", "segmentation"} | buffers
    assert tensors["bank"].shape == (192 if remember else 0, 64)  # all tokens, fewer than bank_size
    weights = {k for k in tensors if k not in buffers and "running" not in k and "num_batches" not in k}
    assert sum(tensors[k].numel() for k in weights) == record["counts"]["parameters"]
    model, images = runs.load_model(tmp_path / "run", "cpu"), data.load("toy", toy_root, image_size=64).test
    maps, scores = runs.score(model, images, CPU, model.settings.batch_size, amp=False)
    assert np.array_equal(maps, runs.read_maps(tmp_path / "run")["maps"])
    assert np.array_equal(scores, runs.read_maps(tmp_path / "run")["scores"])


def test_record_counts_steps_cache_and_speed(toy_root, tmp_path):
    counts = runs.run("ssltok", data_root=toy_root, preset="smoke", out=tmp_path / "run")["counts"]
    assert counts["train_steps"] == 2 * math.ceil(counts["train"] / 16)
    tokens, mask, nearest = 2 * 16 * 64, 64 * 64, 4 * 16
    assert counts["cache_mib"] == round(counts["train"] * (2 * tokens + mask + 2 * nearest) / 2**20, 1)
    assert counts["images_per_s_from_tokens"] > counts["images_per_s"] > 0


def test_training_lowers_every_loss(gears):
    model = prepared(gears.train, epochs=30, lr=2e-3, batch_size=6, damage=0.7, kinds=("pit", "patch"))
    history = train(model, gears.train, seed=0, device=CPU, amp=False)
    for name in ("cosine", "smooth_l1", "segmentation"):
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
        ({"bank_size": 0}, "bank_size=0 has to be at least 1, or set remember to false"),
        ({"kinds": "pit,crak"}, "Did you mean 'crack'"),
        ({"blocks": "7"}, "blocks 1 to 6"),
        ({"blocks": ""}, "blocks 1 to 6"),
    ],
)
def test_unusable_settings_are_refused(overrides, message):
    with pytest.raises(UserError) as raised:
        make(**overrides)
    assert message in str(raised.value)
