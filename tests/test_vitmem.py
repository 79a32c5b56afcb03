"""Yang & Guo 2024: memory, coordinate attention, losses, and what each row of the ablation changes."""

import math
from dataclasses import replace
from functools import partial

import helpers
import numpy as np
import pytest
import torch
from helpers import CPU
from scipy.ndimage import gaussian_filter
from torch import nn

from vitad import runs
from vitad.errors import UserError
from vitad.methods import vitmem
from vitad.methods.vitmem import CoordinateAttention, Memory, entropy, shrunk
from vitad.settings import resolve
from vitad.training import train

make = partial(helpers.make, vitmem)


# --- memory -----------------------------------------------------------------------------------------------


def test_memory_follows_the_equations_query_by_query():
    """Eq. 7 to 10 in plain Python, one query and one item at a time."""
    torch.manual_seed(0)
    memory = Memory(width=6, items=5)
    features = torch.randn(2, 6, 3, 4)
    recalled, w_hat = memory(features)
    assert recalled.shape == (2, 6, 3, 4) and w_hat.shape == (2, 3, 4, 5)
    items = memory.items.tolist()

    def norm(v):
        return math.sqrt(sum(a * a for a in v))

    for b, row, column in [(0, 0, 0), (1, 2, 3), (0, 1, 2)]:
        z = features[b, :, row, column].tolist()
        d = [sum(a * c for a, c in zip(z, m, strict=True)) / (norm(z) * norm(m)) for m in items]  # Eq. 7
        w = [math.exp(x) / sum(map(math.exp, d)) for x in d]  # Eq. 8
        kept = [max(x - 1 / 5, 0) * x / (abs(x - 1 / 5) + 1e-12) for x in w]  # Eq. 10
        kept = [x / sum(kept) for x in kept]
        np.testing.assert_allclose(w_hat[b, row, column].tolist(), kept, atol=1e-6)
        expected = [sum(x * m[i] for x, m in zip(kept, items, strict=True)) for i in range(6)]  # Eq. 9
        np.testing.assert_allclose(recalled[b, :, row, column].tolist(), expected, atol=1e-6)


@pytest.mark.parametrize("items", [100, 2000])
def test_about_half_of_the_items_survive_shrinkage_at_initialisation(items):
    torch.manual_seed(0)
    _, w_hat = Memory(768, items)(torch.randn(2, 768, 6, 6))
    share = (w_hat > 0).float().mean(-1)
    assert share.min() > 0.4 and share.max() < 0.6
    torch.testing.assert_close(w_hat.sum(-1), torch.ones(2, 6, 6))


def test_shrinkage_keeps_weights_as_they_are_and_drops_the_others():
    w = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(shrunk(w, 0.2), torch.tensor([[0.625, 0.375, 0, 0], [0.25, 0.25, 0.25, 0.25]]))


def test_one_aligned_item_among_orthogonal_ones_is_recalled_alone():
    """What cosine addressing can do at best: e / (e + N - 1) against 1 / N."""
    memory = Memory(16, 10)
    memory.items.data = torch.eye(10, 16) * 3
    recalled, w_hat = memory(torch.eye(10, 16)[4][None, :, None, None])
    assert w_hat.flatten().tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    torch.testing.assert_close(recalled.flatten(), torch.eye(10, 16)[4] * 3)


@pytest.mark.parametrize("shrink, empty", [(1.0, False), (2.0, False), (3.0, True)])
def test_a_large_threshold_empties_every_look_up_among_orthogonal_items(shrink, empty):
    """The largest weight is near e / N, so 3 / N leaves nothing; the guard then recalls zeros, and trains on."""
    torch.manual_seed(0)
    memory = Memory(64, 50, shrink=shrink)
    memory.items.data = torch.linalg.qr(torch.randn(64, 64))[0][:50]
    recalled, w_hat = memory(memory.items.data[7][None, :, None, None])
    assert bool((w_hat == 0).all()) == empty
    recalled.sum().backward()
    assert memory.items.grad.isfinite().all() and recalled.isfinite().all()
    assert entropy(w_hat).isfinite().all()


def test_cosine_addressing_ignores_length_and_the_dot_product_does_not():
    torch.manual_seed(0)
    z, cosine, dot = torch.randn(1, 8, 2, 2), Memory(8, 5), Memory(8, 5, "dot")
    dot.load_state_dict(cosine.state_dict())
    torch.testing.assert_close(cosine(10 * z)[0], cosine(z)[0])
    assert dot(10 * z)[1].amax() > dot(z)[1].amax() + 0.1


def test_a_low_temperature_makes_the_look_up_single():
    torch.manual_seed(0)
    z = torch.randn(1, 32, 4, 4)
    kept = {t: float((Memory(32, 40, temperature=t)(z)[1] > 0).sum(-1).float().mean()) for t in (1.0, 0.1, 0.01)}
    assert kept[1.0] > 15 > 12 > kept[0.1] > kept[0.01] > 0.99


def test_memory_is_exact_under_autocast():
    torch.manual_seed(0)
    memory, z = Memory(32, 40), torch.randn(1, 32, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        recalled, w_hat = memory(z)
    assert torch.equal(recalled, memory(z)[0]) and torch.equal(w_hat, memory(z)[1])


def test_memory_in_use_is_counted(gears):
    model = make(items=10)
    found = model.observe(gears.train, CPU)
    w_hat = model.reconstruct(gears.train.batch(range(len(gears.train)))["image"])[2].flatten(0, 2)
    assert found == {
        "memory_queries": 16 * len(gears.train),
        "memory_empty": 0,
        "memory_kept": round(float((w_hat > 0).sum(1).float().mean()), 2),
        "memory_in_use": int((w_hat > 0).any(0).sum()),
        "memory_first": len(w_hat.argmax(1).unique()),
    }
    assert make(items=10, shrink=10).observe(gears.train, CPU)["memory_empty"] == 16 * len(gears.train)
    assert make(memory=False).observe(gears.train, CPU) == {}


def test_the_record_counts_what_the_memory_does(toy_root, tmp_path):
    counts = runs.run("vitmem", data_root=toy_root, preset="smoke", out=tmp_path / "run")["counts"]
    assert counts["memory_queries"] == 16 * counts["train"] and 0 < counts["memory_in_use"] <= 20
    without = {"memory": False}
    counts = runs.run("vitmem", data_root=toy_root, preset="smoke", overrides=without, out=tmp_path / "base")["counts"]
    assert not [key for key in counts if key.startswith("memory")]


# --- coordinate attention ---------------------------------------------------------------------------------


def test_coordinate_attention_weighs_rows_and_columns():
    torch.manual_seed(0)
    attention = CoordinateAttention(768).eval()
    assert attention.squeeze[0].out_channels == 24 and CoordinateAttention(64).squeeze[0].out_channels == 8
    x = torch.randn(2, 768, 5, 7)
    a_h, a_w = attention.attention(x)
    assert a_h.shape == (2, 768, 5, 1) and a_w.shape == (2, 768, 1, 7)
    assert min(a_h.min(), a_w.min()) > 0 and max(a_h.max(), a_w.max()) < 1
    torch.testing.assert_close(attention(x), x * a_h * a_w)


def test_coordinate_attention_sees_the_whole_row_and_the_whole_column():
    """A change at one place moves a_h in its row and a_w in its column, and nothing else."""
    torch.manual_seed(0)
    attention, x = CoordinateAttention(16).eval(), torch.randn(1, 16, 5, 7)
    changed = x.clone()
    changed[:, :, 3, 2] += 5
    pairs = zip(attention.attention(changed), attention.attention(x), strict=True)
    moved = [(a - b).abs().amax((0, 1)).flatten() for a, b in pairs]
    assert [int(m.argmax()) for m in moved] == [3, 2]
    assert [int((m > 1e-6).sum()) for m in moved] == [1, 1]


def test_coordinate_attention_of_a_transposed_map():
    """Rows and columns share the squeeze; only the two last convolutions tell them apart."""
    torch.manual_seed(0)
    attention, x = CoordinateAttention(16).eval(), torch.randn(1, 16, 5, 7)
    mirror = CoordinateAttention(16).eval()
    mirror.load_state_dict(attention.state_dict())
    mirror.to_h, mirror.to_w = attention.to_w, attention.to_h
    torch.testing.assert_close(mirror(x.transpose(2, 3)), attention(x).transpose(2, 3))


# --- the model --------------------------------------------------------------------------------------------


def test_the_four_variants_hold_what_table_6_names():
    holds = {
        name: (any("memory" in k for k in keys), any("coord_att" in k for k in keys))
        for name, switches in vitmem.VARIANTS.items()
        for keys in [make(**switches).state_dict().keys()]
    }
    assert holds == {"base": (False, False), "base_m": (True, False), "base_ca": (False, True), "full": (True, True)}


def test_the_variants_share_everything_else():
    """Same initial encoder for a seed, same shapes of the decoder, same training."""
    models = {name: make(**switches) for name, switches in vitmem.VARIANTS.items()}
    base = models.pop("base")
    for model in models.values():
        own = model.state_dict()
        assert all(torch.equal(v, own[k]) for k, v in base.state_dict().items() if k.startswith("encoder"))
        assert {k: v.shape for k, v in base.decoder.state_dict().items()} == {
            k: v.shape for k, v in model.decoder.state_dict().items()
        }
        mine, its = model.phases()[0], base.phases()[0]
        assert (mine.epochs, mine.batch_size, mine.lr, mine.betas) == (its.epochs, its.batch_size, its.lr, its.betas)


def test_nothing_passes_around_the_memory(gears):
    """With a single item every image is rebuilt the same, with coordinate attention or without."""
    images = gears.test.batch(range(4))["image"]
    for coord_att in (False, True):
        model = make(items=1, shrink=0, coord_att=coord_att)
        with torch.no_grad():
            rebuilt = model.reconstruct(images)[1]
        torch.testing.assert_close(rebuilt, rebuilt[:1].expand(4, -1, -1, -1))
    with torch.no_grad():
        rebuilt = make(memory=False).reconstruct(images)[1]
    assert not torch.allclose(rebuilt[0], rebuilt[1], atol=1e-4)


def test_order_of_memory_and_coordinate_attention(gears):
    after, before = make(), make(ca_position="before_memory")
    before.load_state_dict(after.state_dict())
    with torch.no_grad():
        features = after.encode(gears.train.batch(range(3))["image"])
        found = before.recall(features)[0]
        torch.testing.assert_close(after.recall(features)[0], after.coord_att(after.memory(features)[0]))
        torch.testing.assert_close(found, after.memory(after.coord_att(features))[0])


@pytest.mark.parametrize("image_size, patch, expected", [(384, 16, [48, 96, 192, 384, 384, 384])])
def test_exact_decoder_reaches_the_image_without_a_resize(image_size, patch, expected):
    torch.manual_seed(0)
    decoder, found = vitmem.exact_decoder(32, patch, "batch").eval(), []
    for layer in decoder:
        if isinstance(layer, nn.ConvTranspose2d):
            layer.register_forward_hook(lambda _, __, y: found.append(y.shape[-1]))
    with torch.no_grad():
        y = decoder(torch.randn(1, 32, image_size // patch, image_size // patch))
    assert found == expected and y.shape == (1, 3, image_size, image_size) and y.abs().max() < 1


def test_sec34_is_the_paper_with_six_layers_and_no_resize():
    paper, sec34 = (resolve(vitmem.Settings, vitmem.PRESETS, preset) for preset in ("paper", "sec34"))
    assert sec34 == replace(paper, decoder="exact")


def test_paper_preset_is_section_4_2():
    paper = resolve(vitmem.Settings, vitmem.PRESETS, "paper")
    assert (paper.image_size, paper.encoder, paper.heads, paper.pretrained) == (384, "vit_base_patch16_384", 8, False)
    assert (paper.batch_size, paper.epochs, paper.lr) == (8, 200, 2e-4)
    assert (paper.lambda_recon, paper.lambda_ent, paper.shrink, paper.temperature) == (1, 1e-3, 1, 1)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"items": 0}, "items=0: the memory needs at least 1"),
        ({"temperature": 0}, "temperature=0.0 has to be above 0"),
        ({"ca_reduction": 0}, "ca_reduction=0 has to be at least 1"),
        ({"image_top": 2}, "image_top=2.0 is a share"),
        ({"score_terms": "l2,sim"}, "unknown score_terms 'sim'. Did you mean 'ssim'"),
        ({"score_terms": ""}, "unknown score_terms"),
        ({"betas": "0.5"}, "betas="),
        ({"decoder": "exact", "encoder": "vit_small_patch14_dinov2.lvd142m", "image_size": 70, "heads": 6}, "14 px"),
        ({"heads": 7}, "cannot be made with {'num_heads': 7"),
    ],
)
def test_unusable_settings_are_refused(overrides, message):
    with pytest.raises(UserError) as raised:
        make(**overrides)
    assert message in str(raised.value)


# --- losses and score -------------------------------------------------------------------------------------


def test_losses_are_those_of_section_3_5(gears):
    from skimage.metrics import structural_similarity

    images = gears.test.batch(range(3))["image"]
    model = make(lambda_ssim=0.7, lambda_ent=0.01, lambda_recon=2.0)
    with torch.no_grad():
        losses = {k: v.item() for k, v in model.losses({"image": images}).items()}
        x, x_hat, w_hat = (t.double().numpy() for t in model.reconstruct(images))
    pairs = [  # zeros beyond the edges
        [np.pad(t.transpose(1, 2, 0), ((8, 8), (8, 8), (0, 0))) for t in pair] for pair in zip(x, x_hat, strict=True)
    ]
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=2, channel_axis=2)
    maps = [structural_similarity(a, b, full=True, **options)[1][8:-8, 8:-8] for a, b in pairs]
    assert losses["l2"] == pytest.approx(2 * ((x - x_hat) ** 2).mean(), rel=1e-5)
    assert losses["ssim"] == pytest.approx(2 * 0.7 * (1 - np.mean(maps)), rel=1e-4)
    logs = np.log(np.where(w_hat > 0, w_hat, 1))
    assert losses["entropy"] == pytest.approx(-0.01 * (w_hat * logs).sum(-1).mean(), rel=1e-4)
    assert "entropy" not in make(memory=False).losses({"image": images})


def test_map_is_the_smoothed_sum_of_the_three_errors(gears):
    images = gears.test.batch(range(3))["image"]
    for terms in (("l2", "ssim", "entropy"), ("ssim",), ("l2", "entropy")):
        model = make(sigma=1.5, lambda_ent=0.1, score_terms=terms)
        with torch.no_grad():
            errors, maps = model.error_maps(images), model.anomaly_map(images)
        expected = np.stack([gaussian_filter(m, 1.5) for m in sum(errors[t] for t in terms).numpy()])
        np.testing.assert_allclose(maps, expected, rtol=1e-4)
        assert torch.equal(model.image_score(maps), maps.amax((1, 2)))


def test_entropy_of_one_item_is_0_and_of_equal_weights_log_n():
    assert entropy(torch.tensor([0.0, 1.0, 0.0])).item() == pytest.approx(0, abs=1e-6)
    assert entropy(torch.full((4,), 0.25)).item() == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize("sign, rises", [("corrected", False), ("printed", True)])
def test_entropy_falls_when_minimised_and_rises_with_the_printed_sign(sign, rises, gears):
    """The entropy term alone, at a temperature that leaves it room both ways."""
    model = make(entropy=sign, lambda_ent=1.0, lambda_recon=0.0, temperature=0.1, epochs=4, lr=3e-4)

    def measure():
        with torch.no_grad():
            return entropy(model.eval().reconstruct(gears.train.batch(range(12))["image"])[2]).mean().item()

    before = measure()
    train(model, gears.train, seed=0, device=CPU, amp=False)
    assert (measure() > before + 0.05) if rises else (measure() < before - 0.05)


def test_training_lowers_every_loss(gears):
    history = train(make(epochs=6, lr=2e-3, batch_size=4), gears.train, seed=0, device=CPU, amp=False)
    for name in ("l2", "ssim"):
        assert history[-1][name] < 0.8 * history[0][name]
