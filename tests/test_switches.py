"""Every setting of every method changes what it names: one test each, or one for all those that only pass through.

A test says with `covers` which settings it is about; the last test here finds those that have none.
"""

from dataclasses import fields
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import CPU, layers
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

from vitad import data, methods
from vitad.errors import UserError

COVERED = set()  # (method, setting)


def covers(method, *names):
    """Mark a test as one of these settings of a method."""
    COVERED.update((method, name) for name in names)
    return lambda test: test


def each(names, *rows):
    """Parametrize a test with rows that begin with a method and one of its settings."""
    COVERED.update((method, name) for method, name, *_ in rows)
    return pytest.mark.parametrize(names, rows, ids=[f"{method}-{name}" for method, name, *_ in rows])


def make(method, weights="auto", **overrides):
    return helpers.make(methods.get(method), weights, **overrides)


def changed(method, name, value, **both):
    """Two models, the second of which has one setting changed."""
    usual, other = make(method, **both), make(method, **both, **{name: value})
    assert getattr(usual.settings, name) != value == getattr(other.settings, name)
    return usual, other


def anomaly_map(model, gears):
    """Of one defective image, after a look at the training images."""
    torch.manual_seed(0)
    model.prepare(gears.train, CPU)
    with torch.no_grad():
        return model.anomaly_map(gears.test.batch([5])["image"])


def losses(model, gears, n=4):
    """Of the first training images, the same random numbers each time."""
    torch.manual_seed(1)
    with torch.no_grad():
        found = model.losses(gears.train.batch(range(n)))
    return {name: loss.item() for name, loss in found.items()}


def score_of_a_point(model):
    """Image score of a map with a single pixel of 1, to four digits."""
    point = torch.zeros(1, 64, 64)
    point[0, 30, 30] = 1
    return round(float(model.image_score(point)), 4)


# --- settings that pass through ---------------------------------------------------------------------------


@each(
    "method, name, value",
    ("anovit", "epochs", 3),
    ("anovit", "patience", 1),
    ("anovit", "val_fraction", 0.25),
    ("anovit", "batch_size", 3),
    ("anovit", "lr", 0.5),
    ("anovit", "betas", (0.1, 0.2)),
    ("vitmem", "epochs", 3),
    ("vitmem", "batch_size", 3),
    ("vitmem", "lr", 0.5),
    ("vitmem", "betas", (0.1, 0.2)),
    ("vitmem", "val_fraction", 0.25),
    ("mala", "epochs", 3),
    ("mala", "batch_size", 3),
    ("mala", "lr", 0.5),
    ("ssltok", "epochs", 3),
    ("ssltok", "batch_size", 3),
    ("ssltok", "lr", 0.5),
    ("ssltok", "weight_decay", 0.5),
    ("l2cae", "epochs", 3),
    ("l2cae", "batch_size", 3),
    ("l2cae", "lr", 0.5),
    ("l2cae", "weight_decay", 0.5),
    ("dinomaly", "batch_size", 3),
    ("dinomaly", "lr", 0.5),
    ("dinomaly", "weight_decay", 0.5),
    ("dinomaly", "clip", 3.0),
    ("draem", "epochs", 3),
    ("draem", "batch_size", 5),
    ("draem", "lr", 0.5),
    ("aessim", "epochs", 3),
    ("aessim", "batch_size", 3),
    ("aessim", "lr", 0.5),
    ("aessim", "weight_decay", 0.5),
    ("vae", "epochs", 3),
    ("vae", "batch_size", 3),
    ("vae", "lr", 0.5),
    ("mkd", "epochs", 3),
    ("mkd", "batch_size", 3),
    ("mkd", "lr", 0.5),
    ("dfr", "epochs", 3),
    ("dfr", "batch_size", 3),
    ("dfr", "lr", 0.5),
    ("cflow", "epochs", 3),
    ("cflow", "batch_size", 3),
    ("cflow", "lr", 0.5),
    ("uniad", "epochs", 3),
    ("uniad", "batch_size", 3),
    ("uniad", "lr", 0.5),
    ("uniad", "weight_decay", 0.5),
    ("uniad", "clip", 3.0),
    ("psvdd", "epochs", 3),
    ("psvdd", "batch_size", 3),
    ("psvdd", "lr", 0.5),
    ("vtadl", "epochs", 3),
    ("vtadl", "batch_size", 3),
    ("vtadl", "lr", 0.5),
    ("vtadl", "weight_decay", 0.5),
    ("fanogan", "epochs", 3),
    ("fanogan", "batch_size", 3),
    ("fanogan", "lr", 0.5),
)
def test_settings_of_training_reach_the_last_phase(method, name, value):
    usual, other = changed(method, name, value)
    assert getattr(other.phases()[-1], name) == value != getattr(usual.phases()[-1], name)


@each("method, name, value", ("mala", "betas", (0.1, 0.2)), ("mala", "weight_decay", 0.5))
def test_settings_of_the_optimiser_reach_both_stages_of_mala(method, name, value):
    usual, other = changed(method, name, value)
    assert {getattr(phase, name) for phase in other.phases()} == {value} and len(other.phases()) == 2
    assert value not in {getattr(phase, name) for phase in usual.phases()}


@each(
    "method, name, value, attribute",
    ("mala", "damage", 0.3, "probability"),
    ("mala", "mode", "local", "mode"),
    ("mala", "textures", "a folder", "textures"),
    ("mala", "keep_grey", True, "keep_grey"),
    ("ssltok", "kinds", ("pit", "crack"), "kinds"),
    ("ssltok", "mode", "local", "mode"),
    ("ssltok", "textures", "a folder", "textures"),
    ("ssltok", "keep_grey", False, "keep_grey"),
    ("draem", "damage", 0.3, "probability"),
    ("draem", "textures", "a folder", "textures"),
    ("draem", "keep_grey", True, "keep_grey"),
)
def test_settings_of_damage_reach_the_synthesis(method, name, value, attribute):
    usual, other = changed(method, name, value)
    assert getattr(other.synthesis, attribute) == value != getattr(usual.synthesis, attribute)


@covers("mala", "foreground")
def test_the_foreground_can_be_given_as_masks(toy_root, tmp_path):
    images = data.load("toy", toy_root, "gear", image_size=64).train
    _, other = changed("mala", "foreground", str(tmp_path))
    for path in images.paths:
        mask = Image.new("L", (96, 96))
        mask.paste(255, (0, 0, 48, 96))  # the left half
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        mask.save((tmp_path / path).with_suffix(".png"))
    other.prepare(images, CPU)
    assert other.foreground[..., :32].all() and not other.foreground[..., 32:].any()
    (tmp_path / images.paths[3]).with_suffix(".png").write_text("no image")
    with pytest.raises(UserError, match=f"cannot read foreground .*{Path(images.paths[3]).stem}.png"):
        other.prepare(images, CPU)
    (tmp_path / images.paths[0]).with_suffix(".png").unlink()
    with pytest.raises(UserError, match="foreground .* is missing.*foreground=otsu"):
        other.prepare(images, CPU)


# --- encoders and sizes -----------------------------------------------------------------------------------

VITS = {"anovit": "encoder", "vitmem": "encoder", "mala": "encoder", "ssltok": "tokenizer"} | {
    "patchknn": "backbone",
    "dinomaly": "backbone",
}


@each("method, name", *VITS.items())
def test_another_vit_can_be_taken(method, name):
    usual, other = changed(method, name, "vit_tiny_patch16_224")
    assert (getattr(usual, name).embed_dim, getattr(other, name).embed_dim) == (64, 192)


@each("method, name", *((method, "pretrained") for method in VITS))
def test_pretrained_reads_the_weights(method, name, weights):
    _, other = changed(method, name, True, weights=weights)
    decoder = ", decoder random" if method == "mala" else ""
    assert other.weights["source"] == f"file given.safetensors{decoder}"
    assert make(method, weights).weights["source"] == "random"


@each(
    "method, name",
    ("padim", "pretrained"),
    ("mkd", "pretrained"),
    ("dfr", "pretrained"),
    ("cflow", "pretrained"),
    ("uniad", "pretrained"),
)
def test_pretrained_reads_the_weights_of_a_cnn(method, name, cnn_weights):
    _, other = changed(method, name, True, weights=cnn_weights)
    assert other.weights["source"] == "file cnn.safetensors" and make(method, cnn_weights).weights["source"] == "random"


@each("method, name", *((method, "image_size") for method in VITS))
def test_the_grid_of_patches_follows_the_image_size(method, name):
    models = changed(method, name, 96)
    assert [getattr(model, VITS[method]).patch_embed.grid_size for model in models] == [(4, 4), (6, 6)]


def test_the_decoders_follow_the_image_size():
    assert layers(make("anovit", image_size=96), nn.Upsample)[0].size == (96, 96)
    assert make("ssltok", image_size=96).segmentation.image_size == 96
    mala = make("mala", image_size=96)
    assert mala.grid == (6, 6) and mala.decoder.pos_embed.shape[1] == 1 + 36


@each("method, name, value", ("l2cae", "image_size", 128), ("aessim", "image_size", 128), ("vae", "image_size", 128))
def test_an_autoencoder_has_another_layer_for_twice_the_size(method, name, value):
    usual, other = changed(method, name, value)
    assert [len(layers(model.encoder, nn.Conv2d)) for model in (usual, other)] == [8, 9]


# --- maps -------------------------------------------------------------------------------------------------


@each(
    "method, name, sigma",
    ("anovit", "seg_sigma", 2.0),
    ("vitmem", "sigma", 2.0),
    ("ssltok", "sigma", 2.0),
    ("l2cae", "sigma", 2.0),
    ("aessim", "sigma", 2.0),
    ("vae", "sigma", 2.0),
    ("mkd", "sigma", 4.0),
    ("dfr", "sigma", 4.0),
    ("cflow", "sigma", 8.0),
    ("patchknn", "sigma", 8.0),
    ("padim", "sigma", 2.0),
    ("dinomaly", "sigma", 8.0),
    ("vtadl", "sigma", 4.0),
    ("fanogan", "sigma", 4.0),
)
def test_a_larger_sigma_makes_the_map_smoother(method, name, sigma, gears):
    usual, other = changed(method, name, sigma)
    assert anomaly_map(other, gears).std() < anomaly_map(usual, gears).std()


@each(
    "method, name, value, both",
    ("vitmem", "score_terms", ("ssim",), {}),
    ("mala", "recon_passes", "unmasked", {"pipeline": "recon"}),
    ("ssltok", "blocks", (1,), {}),
    ("ssltok", "hidden_parts", 4, {}),
    ("ssltok", "remember", False, {}),
    ("patchknn", "blocks", (1,), {}),
    ("mkd", "map", "guided", {}),
    ("mkd", "strides", (2, 4), {}),
    ("mkd", "backbone", "test_efficientnet", {}),
    ("dfr", "strides", (8,), {}),
    ("dfr", "backbone", "test_efficientnet", {}),
    ("dfr", "grid", 16, {}),
    ("cflow", "strides", (8,), {}),
    ("cflow", "backbone", "test_efficientnet", {}),
    ("padim", "strides", (8, 16), {}),
    ("padim", "ridge", 1.0, {}),
    ("padim", "shared", True, {}),
    ("dinomaly", "blocks", (1, 2), {}),
    ("dinomaly", "groups", 1, {}),
    ("dinomaly", "linear_attention", False, {}),
    ("vae", "map", "grad", {}),
    ("vae", "steps", 5, {"map": "grad"}),
    ("vae", "step_size", 0.1, {"map": "grad"}),
    ("vae", "sparsity", 5.0, {"map": "grad"}),
    ("uniad", "strides", (8, 16), {}),
    ("uniad", "standardise", False, {}),
    ("uniad", "window", 5, {}),
    ("vtadl", "mixture", "legacy", {}),
    ("fanogan", "inference", "search", {}),
    ("fanogan", "encoder_out", "linear", {}),
    ("fanogan", "steps", 5, {"inference": "search"}),
)
def test_settings_of_the_score_change_the_map(method, name, value, both, gears):
    usual, other = changed(method, name, value, **both)
    assert anomaly_map(other, gears).std() != anomaly_map(usual, gears).std()


# --- anovit -----------------------------------------------------------------------------------------------


@covers("anovit", "freeze_encoder")
def test_anovit_can_freeze_its_encoder():
    usual, other = changed("anovit", "freeze_encoder", True)
    assert {p.requires_grad for p in usual.encoder.parameters()} == {True}
    assert {p.requires_grad for p in other.encoder.parameters()} == {False}


@covers("anovit", "channels")
def test_anovit_has_the_given_channels():
    usual, other = changed("anovit", "channels", (12, 10, 8, 6, 4, 3))
    assert [c.out_channels for c in layers(other, nn.ConvTranspose2d)] == [12, 10, 8, 6, 4, 3]
    assert [c.out_channels for c in layers(usual, nn.ConvTranspose2d)] == [256, 128, 64, 32, 16, 3]


@covers("anovit", "decoder_norm")
def test_anovit_can_normalise_over_the_batch():
    usual, other = changed("anovit", "decoder_norm", "batch")
    assert [len(layers(model.decoder, nn.BatchNorm2d)) for model in (usual, other)] == [0, 5]


@covers("anovit", "last_act")
def test_anovit_with_a_last_relu_rebuilds_nothing_below_zero(gears):
    usual, other = changed("anovit", "last_act", "legacy_relu")
    images = gears.train.batch([0])["image"]
    lowest = [model.reconstruct(images)[1].min().item() for model in (usual, other)]
    assert lowest[0] < 0 == lowest[1]


@covers("anovit", "norm")
def test_anovit_can_normalise_with_the_statistics_of_the_training_images(gears):
    usual, other = changed("anovit", "norm", "dataset_stats")
    for model in (usual, other):
        model.prepare(gears.train, CPU)
    assert usual.mean.unique().tolist() == [0.5] != other.mean.unique().tolist()


@covers("anovit", "det_sigma")
def test_anovit_smooths_further_for_the_image_score():
    """By what is missing from the map's sigma, 1 px."""
    usual, other = changed("anovit", "det_sigma", 4.0)
    point = np.zeros((64, 64))
    point[30, 30] = 1
    expected = round(float(gaussian_filter(point, (4.0**2 - 1) ** 0.5).max()), 4)
    assert score_of_a_point(other) == expected != score_of_a_point(usual)


# --- vitmem -----------------------------------------------------------------------------------------------


@covers("vitmem", "heads")
def test_vitmem_has_the_given_heads():
    usual, other = changed("vitmem", "heads", 4)
    assert [model.encoder.blocks[0].attn.num_heads for model in (usual, other)] == [8, 4]


@covers("vitmem", "depth")
def test_vitmem_has_the_given_depth():
    usual, other = changed("vitmem", "depth", 3)
    assert [len(model.encoder.blocks) for model in (usual, other)] == [6, 3]


@covers("vitmem", "input_range")
def test_vitmem_can_take_images_from_0_to_1(gears):
    usual, other = changed("vitmem", "input_range", "unit")
    images = gears.train.batch([0])["image"]
    assert other.reconstruct(images)[0].min() >= 0 > usual.reconstruct(images)[0].min()


@covers("vitmem", "memory")
def test_vitmem_can_do_without_its_memory():
    usual, other = changed("vitmem", "memory", False)
    assert usual.memory is not None and other.memory is None


@covers("vitmem", "items")
def test_vitmem_has_the_given_items_and_a_threshold_of_one_share():
    usual, other = changed("vitmem", "items", 7)
    assert (other.memory.items.shape, other.memory.threshold) == ((7, 64), 1 / 7)
    assert (usual.memory.items.shape, usual.memory.threshold) == ((20, 64), 1 / 20)


@each("method, name, value", ("vitmem", "similarity", "dot"), ("vitmem", "ca_position", "before_memory"))
def test_what_vitmem_recalls_depends_on_similarity_and_order(method, name, value, gears):
    usual, other = changed(method, name, value)
    images = gears.train.batch([0])["image"]
    with torch.no_grad():
        recalled = [model.recall(model.encode(images))[0] for model in (usual, other)]
    assert not torch.allclose(*recalled)


@covers("vitmem", "temperature")
def test_a_low_temperature_gives_vitmem_larger_weights(gears):
    usual, other = changed("vitmem", "temperature", 0.05)
    images = gears.train.batch(range(4))["image"]
    with torch.no_grad():
        largest = [model.reconstruct(images)[2].max().item() for model in (usual, other)]
    assert largest[1] > 2 * largest[0]


@covers("vitmem", "shrink")
def test_vitmem_without_shrinkage_keeps_every_item(gears):
    usual, other = changed("vitmem", "shrink", 0.0)
    assert other.observe(gears.train, CPU)["memory_kept"] == 20 > usual.observe(gears.train, CPU)["memory_kept"]


@covers("vitmem", "coord_att")
def test_vitmem_can_do_without_coordinate_attention():
    usual, other = changed("vitmem", "coord_att", False)
    assert isinstance(other.coord_att, nn.Identity) and not isinstance(usual.coord_att, nn.Identity)


@covers("vitmem", "ca_reduction")
def test_vitmem_squeezes_by_the_given_factor():
    usual, other = changed("vitmem", "ca_reduction", 4)
    assert [model.coord_att.squeeze[0].out_channels for model in (usual, other)] == [8, 16]


@covers("vitmem", "decoder")
def test_vitmem_has_a_decoder_without_a_resize():
    usual, other = changed("vitmem", "decoder", "exact")
    assert [len(layers(model.decoder, nn.Upsample)) for model in (usual, other)] == [1, 0]


@covers("vitmem", "decoder_norm")
def test_vitmem_can_normalise_each_image():
    usual, other = changed("vitmem", "decoder_norm", "instance")
    assert [len(layers(model.decoder, nn.InstanceNorm2d)) for model in (usual, other)] == [0, 5]


@each(
    "method, name, value, factors",
    ("vitmem", "lambda_recon", 3.0, {"l2": 3, "ssim": 3}),
    ("vitmem", "lambda_ssim", 3.0, {"l2": 1, "ssim": 3}),
    ("vitmem", "lambda_ent", 0.003, {"l2": 1, "entropy": 3}),
    ("vitmem", "entropy", "printed", {"l2": 1, "entropy": -1}),
    ("vitmem", "l2", "sum", {"l2": 3, "ssim": 1, "entropy": 1}),
)
def test_the_losses_of_vitmem_have_their_weights(method, name, value, factors, gears):
    usual, other = (losses(model, gears) for model in changed(method, name, value))
    assert [other[k] / usual[k] for k in factors] == pytest.approx(list(factors.values()))


@covers("vitmem", "image_top")
def test_vitmem_can_score_the_mean_of_the_highest_half():
    usual, other = changed("vitmem", "image_top", 0.5)
    assert score_of_a_point(other) == round(1 / 2048, 4) != score_of_a_point(usual)


# --- mala -------------------------------------------------------------------------------------------------


def stages(model):
    return {phase.name: phase for phase in model.phases()}


@covers("mala", "depth")
def test_mala_has_the_given_depth():
    usual, other = changed("mala", "depth", 3)
    assert [len(model.encoder.blocks) for model in (usual, other)] == [6, 3]


@covers("mala", "decoder_width")
def test_mala_has_a_decoder_of_the_given_width():
    models = changed("mala", "decoder_width", 64)
    widths = [(model.decoder.embed.out_features, model.tbm.lp2.in_features) for model in models]
    assert widths == [(32, 64), (64, 128)]


@covers("mala", "decoder_depth")
def test_mala_has_a_decoder_of_the_given_depth():
    usual, other = changed("mala", "decoder_depth", 3)
    assert [len(model.decoder.blocks) for model in (usual, other)] == [1, 3]


@covers("mala", "decoder_heads")
def test_mala_has_a_decoder_with_the_given_heads():
    usual, other = changed("mala", "decoder_heads", 4)
    assert [model.decoder.blocks[0].attn.num_heads for model in (usual, other)] == [2, 4]


@covers("mala", "pipeline", "stage1")
def test_mala_can_train_either_stage_alone():
    assert list(stages(make("mala"))) == ["stage1", "stage2"]
    assert list(stages(make("mala", pipeline="recon"))) == ["stage1"]
    assert list(stages(make("mala", stage1=False))) == ["stage2"]


@covers("mala", "stage1_encoder")
def test_mala_can_leave_its_encoder_as_it_comes():
    usual, other = changed("mala", "stage1_encoder", False)
    assert any(p.requires_grad for p in usual.encoder.parameters())
    assert not any(p.requires_grad for p in other.encoder.parameters())


@covers("mala", "stage1_images", "stage2_images")
def test_mala_takes_the_given_number_of_images_in_each_stage(gears):
    def numbers(**overrides):
        model = make("mala", **overrides)
        model.prepare(gears.train, CPU)
        return [len(phase.indices) for phase in model.phases()]

    assert numbers() == [12, 12]
    assert numbers(stage1_images=5) == [5, 12]
    assert numbers(stage2_images=5) == [12, 5]


@covers("mala", "resample_each_epoch")
def test_mala_can_draw_other_images_in_each_epoch(gears):
    usual, other = changed("mala", "resample_each_epoch", True, stage1_images=5)
    for model in (usual, other):
        model.prepare(gears.train, CPU)
    draw = other.phases()[0].draw
    assert usual.phases()[0].draw is None
    assert any(draw(np.random.default_rng(0)) != draw(np.random.default_rng(1)))


@covers("mala", "stage1_epochs")
def test_stage_1_has_the_given_epochs():
    usual, other = changed("mala", "stage1_epochs", 3)
    assert [stages(model)["stage1"].epochs for model in (usual, other)] == [2, 3]


@covers("mala", "stage1_batch_size", "stage1_lr")
def test_the_learning_rate_of_stage_1_is_for_256_images():
    def batch_size_and_rate(**overrides):
        stage1 = stages(make("mala", **overrides))["stage1"]
        return stage1.batch_size, stage1.lr

    assert batch_size_and_rate() == (16, 5e-4)
    assert batch_size_and_rate(stage1_batch_size=32) == (32, 1e-3)
    assert batch_size_and_rate(stage1_lr=0.5) == (16, 0.5 * 16 / 256)


@covers("mala", "micro_batch")
def test_mala_computes_its_first_stage_in_parts_of_the_given_size(gears):
    def at_a_time(model):
        rows = []
        model.encoder.patch_embed.register_forward_hook(lambda *call: rows.append(len(call[1][0])))
        model.stage1_losses(gears.train.batch(range(5)))
        return rows

    assert [at_a_time(model) for model in changed("mala", "micro_batch", 2)] == [[5], [2, 2, 1]]


@covers("mala", "warm_up")
def test_stage_1_warms_up_over_the_given_share_of_its_steps():
    usual, other = changed("mala", "warm_up", 0.5)
    assert stages(other)["stage1"].schedule(0.25) == 0.5 != stages(usual)["stage1"].schedule(0.25)


@covers("mala", "mask_ratio")
def test_mala_leaves_the_given_share_of_patches_visible():
    usual, other = changed("mala", "mask_ratio", 0.5)
    assert [model.random_visible(2, CPU).shape for model in (usual, other)] == [(2, 4), (2, 8)]


@covers("mala", "mask_fill")
def test_mala_can_fill_hidden_places_with_a_learned_token():
    usual, other = changed("mala", "mask_fill", "mask_token")
    assert usual.decoder.mask_token is None and other.decoder.mask_token.shape == (1, 1, 32)


@covers("mala", "plpm")
def test_plpm_can_be_trained_jointly(gears):
    usual, other = changed("mala", "plpm", "joint")
    batch = gears.train.batch(range(6))
    assert set(other.stage1_losses(batch)) == {"l1", "ssim", "plpm"} != set(usual.stage1_losses(batch))


@covers("mala", "plpm_channels")
def test_plpm_has_the_given_channels():
    usual, other = changed("mala", "plpm_channels", (2, 4))
    assert [c.out_channels for c in layers(other.plpm, nn.Conv2d)] == [2, 4]
    assert [c.out_channels for c in layers(usual.plpm, nn.Conv2d)] == [4, 8, 8, 8]


@covers("mala", "alpha")
def test_alpha_weighs_the_losses_of_stage_1(gears):
    usual, other = (losses(model, gears, 6) for model in changed("mala", "alpha", (2.0, 3.0, 0.04), pipeline="recon"))
    factors = {"l1": 2, "ssim": 3, "plpm": 1, "fool": 4}
    assert other == {name: pytest.approx(factors[name] * loss, rel=1e-4) for name, loss in usual.items()}


@covers("mala", "tbm")
def test_mala_can_put_a_linear_layer_in_place_of_tbm():
    usual, other = changed("mala", "tbm", False)
    assert isinstance(other.tbm, nn.Linear) and not isinstance(usual.tbm, nn.Linear)


@covers("mala", "beta")
def test_beta_weighs_the_losses_of_stage_2(gears):
    usual, other = (losses(model, gears, 6) for model in changed("mala", "beta", (1.2, 2.0)))
    factors = {"l1": 2, "focal": 5}
    assert other == {name: pytest.approx(factors[name] * loss, rel=1e-4) for name, loss in usual.items()}


@covers("mala", "gamma")
def test_a_small_gamma_makes_the_focal_loss_larger(gears):
    usual, other = (losses(model, gears, 6) for model in changed("mala", "gamma", 2.0))
    assert other["focal"] > 1.5 * usual["focal"]


@covers("mala", "window")
def test_mala_scores_the_mean_over_the_given_window():
    usual, other = changed("mala", "window", 3)
    assert score_of_a_point(other) == round(1 / 9, 4) != score_of_a_point(usual)


# --- ssltok -----------------------------------------------------------------------------------------------


@covers("ssltok", "remember")
def test_ssltok_can_do_without_its_memory():
    usual, other = changed("ssltok", "remember", False)
    for model in (usual, other):
        model.fill_for_timing()
    assert [len(model.bank) for model in (usual, other)] == [200, 0]
    assert [model.segmentation.embed.in_channels for model in (usual, other)] == [256, 192]


@covers("ssltok", "bank_size")
def test_ssltok_keeps_the_given_number_of_tokens(gears):
    """Of 192 that there are."""
    usual, other = changed("ssltok", "bank_size", 50)
    for model in (usual, other):
        model.prepare(gears.train, CPU)
    assert [int(model.bank.any(1).sum()) for model in (usual, other)] == [192, 50]


@covers("ssltok", "damage")
def test_ssltok_damages_the_given_share_of_images(gears):
    def share(model):
        torch.manual_seed(0)
        *_, mask = model.pairs(gears.train.batch(range(12)))
        return mask.any((1, 2)).float().mean().item()

    usual, other = changed("ssltok", "damage", 1.0, remember=False)
    assert share(other) > 0.7 > share(usual)


@covers("ssltok", "pool")
def test_ssltok_keeps_the_given_number_of_damaged_versions(gears):
    usual, other = changed("ssltok", "pool", 3)
    for model in (usual, other):
        model.prepare(gears.train, CPU)
    assert [len(model.pool["tokens"]) for model in (usual, other)] == [1, 3]


@covers("ssltok", "reconstruct")
def test_ssltok_can_do_without_reconstruction():
    usual, other = changed("ssltok", "reconstruct", False)
    assert usual.reconstruction is not None and other.reconstruction is None


@covers("ssltok", "mask_max")
def test_ssltok_masks_up_to_the_given_share_of_tokens(gears):
    def largest_share(model):
        seen, forward = [], model.reconstruction.forward
        model.reconstruction.forward = lambda tokens, masked: seen.append(masked) or forward(tokens, masked)
        torch.manual_seed(1)
        with torch.no_grad():
            for _ in range(10):
                model.losses(gears.train.batch(range(10)))
        return torch.cat(seen).float().mean(1).max().item()

    usual, other = changed("ssltok", "mask_max", 1.0, remember=False)
    assert largest_share(other) > 0.8 > 0.7 > largest_share(usual)


@covers("ssltok", "width")
def test_the_reconstruction_has_the_given_width():
    usual, other = changed("ssltok", "width", 64)
    assert [model.reconstruction.positions.shape for model in (usual, other)] == [(16, 32), (16, 64)]


@covers("ssltok", "depth")
def test_the_reconstruction_has_the_given_depth():
    usual, other = changed("ssltok", "depth", 3)
    assert [len(model.reconstruction.blocks) for model in (usual, other)] == [1, 3]


@covers("ssltok", "heads")
def test_the_reconstruction_has_the_given_heads():
    usual, other = changed("ssltok", "heads", 4)
    assert [model.reconstruction.blocks[0].attn.num_heads for model in (usual, other)] == [2, 4]


@covers("ssltok", "dropout")
def test_the_reconstruction_has_the_given_dropout():
    usual, other = changed("ssltok", "dropout", 0.5)
    assert [model.reconstruction.dropout.p for model in (usual, other)] == [0.1, 0.5]


@covers("ssltok", "segment")
def test_ssltok_can_do_without_segmentation():
    usual, other = changed("ssltok", "segment", False)
    assert usual.segmentation is not None and other.segmentation is None


@covers("ssltok", "seg_width")
def test_the_segmentation_has_the_given_width():
    usual, other = changed("ssltok", "seg_width", 64)
    assert [model.segmentation.embed.out_channels for model in (usual, other)] == [32, 64]


@covers("ssltok", "min_steps")
def test_ssltok_trains_longer_where_the_steps_are_few(gears):
    """Twelve images are one step an epoch."""
    usual, other = changed("ssltok", "min_steps", 50)
    for model in (usual, other):
        model.prepare(gears.train, CPU)
    assert [model.phases()[0].epochs for model in (usual, other)] == [2, 50]


@covers("ssltok", "warm_up")
def test_ssltok_warms_up_over_the_given_share_of_its_steps():
    usual, other = changed("ssltok", "warm_up", 0.5)
    rates = [round(model.phases()[0].schedule(0.25), 4) for model in (usual, other)]
    assert rates[1] == 0.5 != rates[0]


@covers("ssltok", "top")
def test_ssltok_scores_the_given_share_of_pixels():
    usual, other = changed("ssltok", "top", 0.5)
    assert score_of_a_point(other) == round(1 / 2048, 4) != score_of_a_point(usual)


# --- rivals -----------------------------------------------------------------------------------------------


@each("method, name, value", ("l2cae", "latent", 7), ("aessim", "latent", 7), ("vae", "latent", 7))
def test_an_autoencoder_has_a_latent_vector_of_the_given_length(method, name, value):
    usual, other = changed(method, name, value)
    assert [model.decoder[0].in_channels for model in (usual, other)] == [16, 7]


@covers("vae", "beta")
def test_beta_weighs_the_divergence_of_the_vae(gears):
    usual, other = (losses(model, gears) for model in changed("vae", "beta", 0.3))
    assert other == pytest.approx({"mse": usual["mse"], "kl": 3 * usual["kl"]})


@covers("mkd", "lambda_mse")
def test_lambda_weighs_the_squared_error_of_mkd(gears):
    usual, other = (losses(model, gears) for model in changed("mkd", "lambda_mse", 1.5))
    assert other == pytest.approx({"cosine": usual["cosine"], "mse": 3 * usual["mse"]})


@covers("mkd", "width")
def test_the_cloner_of_mkd_has_the_given_width():
    usual, other = changed("mkd", "width", 4)
    assert [model.cloner.stages[0][0].out_channels for model in (usual, other)] == [8, 4]


@each("method, value, side", ("mkd", "image_size", 128))
def test_maps_have_the_image_size(method, value, side):
    usual, other = changed(method, value, side)
    assert [model.source(torch.rand(1, 3, s, s))[0].shape[-1] for model, s in ((usual, 64), (other, side))] == [32, 64]


@covers("dfr", "variance")
def test_the_bottleneck_of_dfr_holds_the_given_share_of_variance(gears):
    usual, other = changed("dfr", "variance", 0.999)
    for model in (usual, other):
        model.prepare(gears.train, CPU)
    assert usual.latent < other.latent


@covers("dfr", "image_size")
def test_dfr_has_more_places_in_a_larger_image():
    assert [model.side for model in changed("dfr", "image_size", 128)] == [8, 16]


@covers("cflow", "couplings")
def test_the_flows_of_cflow_have_the_given_couplings():
    assert [len(model.flows[0].blocks) for model in changed("cflow", "couplings", 3)] == [2, 3]


@covers("cflow", "condition")
def test_a_place_of_cflow_has_the_given_number_of_numbers():
    inputs = [model.flows[0].blocks[0].subnet[0].in_features for model in changed("cflow", "condition", 16)]
    assert inputs == [24 + 8, 24 + 16]


@covers("cflow", "warm_up")
def test_cflow_warms_up_over_the_given_share_of_its_steps():
    usual, other = changed("cflow", "warm_up", 0.5)
    assert other.phases()[0].schedule(0.25) == 0.5 != usual.phases()[0].schedule(0.25)


@covers("cflow", "image_size")
def test_cflow_has_more_places_in_a_larger_image():
    usual, other = changed("cflow", "image_size", 128)
    assert [m.surprise(torch.rand(1, 3, s, s))[0].shape for m, s in ((usual, 64), (other, 128))] == [
        (1, 8, 8),
        (1, 16, 16),
    ]


@covers("patchknn", "bank_size")
def test_patchknn_keeps_the_given_number_of_patches(gears):
    usual, other = changed("patchknn", "bank_size", 20)
    for model in (usual, other):
        model.prepare(gears.train, CPU)
    assert [len(model.bank) for model in (usual, other)] == [12 * 16, 20]


@covers("patchknn", "rotations")
def test_patchknn_turns_the_training_images_in_the_given_number_of_steps(gears):
    usual, other = changed("patchknn", "rotations", 2)
    for model in (usual, other):
        model.prepare(gears.train, CPU)
    assert [len(model.bank) for model in (usual, other)] == [12 * 16, 2 * 12 * 16]
    assert torch.equal(other.bank[: 12 * 16], usual.bank)  # those of the images as they are


@covers("patchknn", "mask")
def test_patchknn_can_leave_the_background_out(gears, monkeypatch):
    half = torch.arange(4.0).expand(1, 1, 4, 4) > 1.5
    monkeypatch.setattr(methods.get("patchknn"), "foreground", lambda tokens, grid: half)
    usual, other = changed("patchknn", "mask", "pca", sigma=0)
    maps = [anomaly_map(model, gears) for model in (usual, other)]
    assert maps[1][..., :24].max() == 0 < maps[0][..., :24].min()
    torch.testing.assert_close(*(m[..., 40:] for m in maps))


@covers("patchknn", "sampling")
def test_a_coreset_leaves_no_training_patch_far_from_the_bank(gears):
    def farthest(model):
        torch.manual_seed(0)
        model.prepare(gears.train, CPU)
        patches = model.features(gears.train.batch(range(len(gears.train)))["image"]).flatten(0, 1)
        return torch.cdist(patches, model.bank).amin(1).max().item()

    usual, other = changed("patchknn", "sampling", "coreset", bank_size=30)
    assert farthest(other) < 0.9 * farthest(usual)


@covers("patchknn", "score")
def test_patchknn_can_score_the_maximum():
    usual, other = changed("patchknn", "score", "max")
    assert score_of_a_point(other) == 1.0 != score_of_a_point(usual)


@covers("patchknn", "batch_size")
def test_patchknn_reads_the_given_number_of_images_at_a_time(gears):
    def at_a_time(model):
        sizes, features = [], model.features
        model.features = lambda images: sizes.append(len(images)) or features(images)
        model.prepare(gears.train, CPU)
        return sizes[0]

    usual, other = changed("patchknn", "batch_size", 5)
    assert [at_a_time(model) for model in (usual, other)] == [8, 5]


@each(
    "method, name, own", ("padim", "backbone", "resnet18.tv_in1k"), ("uniad", "backbone", "tf_efficientnet_b4.aa_in1k")
)
def test_another_cnn_can_be_taken(method, name, own):
    usual, other = changed(method, name, "test_efficientnet")
    assert [model.backbone.channels for model in (usual, other)] == [[32, 48, 192], [24, 32, 48]]
    assert make(method, backbone=own).protocol.get("substitute") is None
    assert other.protocol["substitute"] == f"test_efficientnet for {own}"


@each("method, name, value, shape", ("padim", "image_size", 96, (144, 20)), ("padim", "grid", 16, (16, 20)))
def test_padim_has_a_gaussian_at_each_place_of_its_grid(method, name, value, shape):
    assert [model.mean.shape for model in changed(method, name, value)] == [(64, 20), shape]


@covers("padim", "channels")
def test_padim_keeps_the_given_number_of_channels():
    usual, other = changed("padim", "channels", 30)
    assert [len(set(model.chosen.tolist())) for model in (usual, other)] == [20, 30]


@covers("padim", "batch_size")
def test_padim_reads_the_given_number_of_images_at_a_time(gears):
    def at_a_time(model):
        sizes, features = [], model.features
        model.features = lambda images: sizes.append(len(images)) or features(images)
        model.prepare(gears.train, CPU)
        return sizes

    usual, other = changed("padim", "batch_size", 5)
    assert [at_a_time(model) for model in (usual, other)] == [[12], [5, 5, 2]]
    torch.testing.assert_close(usual.mean, other.mean)
    torch.testing.assert_close(usual.whiten, other.whiten, rtol=1e-3, atol=1e-3)


@covers("dinomaly", "depth")
def test_the_decoder_of_dinomaly_has_the_given_depth():
    usual, other = changed("dinomaly", "depth", 4)
    assert [len(model.decoder) for model in (usual, other)] == [2, 4]


@covers("dinomaly", "dropout")
def test_the_bottleneck_of_dinomaly_has_the_given_dropout():
    usual, other = changed("dinomaly", "dropout", 0.5)
    assert [{layer.p for layer in layers(model.bottleneck, nn.Dropout)} for model in (usual, other)] == [{0.2}, {0.5}]


def weakened(model):
    """Gradients (n,) of equal and opposite ones at 100 places whose errors rise, once ten steps are done."""
    targets = torch.eye(2)[0].expand(1, model.settings.groups, 100, 2)
    angle = torch.linspace(0.1, 1, 100)
    rebuilt = torch.stack([angle.cos(), angle.sin()], -1).expand_as(targets).clone().requires_grad_()
    model.done.fill_(10)
    model.weaken(rebuilt, targets).sum().backward()
    return rebuilt.grad[0, 0, :, 0]


@covers("dinomaly", "easy")
def test_dinomaly_weakens_the_given_share_of_places():
    usual, other = changed("dinomaly", "easy", 0.3)
    assert [int((weakened(model) < 1).sum()) for model in (usual, other)] == [90, 30]
    one = torch.rand(1, 2, 16, 64)
    assert torch.equal(make("dinomaly", easy=0.0).weaken(one, one), one)


@covers("dinomaly", "easy_weight")
def test_dinomaly_weakens_by_the_given_factor():
    usual, other = changed("dinomaly", "easy_weight", 0.5)
    assert [round(weakened(model).min().item(), 4) for model in (usual, other)] == [0.1, 0.5]


@covers("dinomaly", "easy_steps")
def test_dinomaly_weakens_more_places_from_step_to_step():
    usual, other = changed("dinomaly", "easy_steps", 20)
    assert [int((weakened(model) < 1).sum()) for model in (usual, other)] == [90, 45]


@covers("dinomaly", "steps")
def test_dinomaly_trains_for_the_given_steps(gears):
    """Twelve images in batches of five are three steps an epoch."""
    usual, other = changed("dinomaly", "steps", 31, batch_size=5)
    for model in (usual, other):
        model.prepare(gears.train, CPU)
    assert [model.phases()[0].epochs for model in (usual, other)] == [1, 11]


@each("method, name, value, rates", ("dinomaly", "lr_end", 1e-3, (1, 0.5)), ("dinomaly", "warm_up", 0.5, (0.4, 0.1)))
def test_the_rate_of_dinomaly_rises_and_falls(method, name, value, rates):
    """After a fifth of the steps and at their end, in units of the highest."""
    both = {} if name == "warm_up" else {"warm_up": 0.2}
    usual, other = (model.phases()[0].schedule for model in changed(method, name, value, **both))
    assert (other(0.2), other(1.0)) == pytest.approx(rates) and usual(1.0) == pytest.approx(0.1)


@covers("dinomaly", "cache")
def test_dinomaly_sees_the_same_whether_tokens_are_kept_or_not(gears):
    usual, other = changed("dinomaly", "cache", False)
    for model in (usual, other):
        model.prepare(gears.train, CPU)
        model.train()
    assert usual.cache and other.cache is None
    assert losses(usual, gears)["cosine"] == pytest.approx(losses(other, gears)["cosine"], rel=1e-3)


@covers("dinomaly", "top")
def test_dinomaly_scores_the_given_share_of_pixels():
    usual, other = changed("dinomaly", "top", 0.5)
    assert score_of_a_point(other) == round(1 / 2048, 4) != score_of_a_point(usual)


@each("method, name, value, sides", ("draem", "image_size", 96, (4, 6)))
def test_draem_takes_larger_images(method, name, value, sides):
    found = [
        m.reconstruction.encode(torch.rand(1, 3, n, n))
        for m, n in zip(changed(method, name, value), (64, 96), strict=True)
    ]
    assert tuple(features.shape[-1] for features in found) == sides


@covers("draem", "width")
@covers("draem", "seg_width")
def test_the_networks_of_draem_have_the_given_widths():
    usual, other = make("draem"), make("draem", width=16, seg_width=16)
    assert [m.reconstruction.head.in_channels for m in (usual, other)] == [8, 16]
    assert [m.segmentation.head.in_channels for m in (usual, other)] == [8, 16]


@covers("draem", "sspcab")
@covers("draem", "sspcab_weight")
def test_sspcab_adds_a_loss_of_the_given_weight(gears):
    usual, other = changed("draem", "sspcab_weight", 0.2, sspcab=True)
    a, b = losses(usual, gears), losses(other, gears)
    assert set(losses(make("draem"), gears)) == set(a) - {"sspcab"} and a["sspcab"] > 0
    assert b == {name: pytest.approx((1 + (name == "sspcab")) * loss, rel=1e-4) for name, loss in a.items()}


@covers("draem", "gamma")
def test_a_larger_gamma_makes_the_focal_loss_of_draem_smaller(gears):
    usual, other = (losses(model, gears) for model in changed("draem", "gamma", 4.0))
    assert other["focal"] < 0.9 * usual["focal"] and other["mse"] == usual["mse"]


@covers("draem", "max_steps")
def test_draem_trains_for_fewer_epochs_where_its_steps_are_limited(gears):
    """Twelve images are four steps an epoch."""
    usual, other = changed("draem", "max_steps", 13, epochs=10)
    for model in (usual, other):
        model.prepare(gears.train, CPU)
    assert [model.phases()[0].epochs for model in (usual, other)] == [10, 3]


@covers("draem", "window")
def test_draem_scores_the_mean_over_the_given_window():
    usual, other = changed("draem", "window", 3)
    assert score_of_a_point(other) == round(1 / 9, 4) != score_of_a_point(usual)


@each("method, name, value, shapes", ("uniad", "image_size", 96, (64, 64)), ("uniad", "grid", 10, (64, 100)))
def test_uniad_sees_the_given_grid(method, name, value, shapes):
    models = changed(method, name, value)
    found = [m.features(torch.rand(1, 3, m.settings.image_size, m.settings.image_size)) for m in models]
    assert tuple(f.shape[1] for f in found) == shapes and not torch.equal(found[0].mean(), found[1].mean())


@covers("uniad", "width")
@covers("uniad", "depth")
@covers("uniad", "heads")
@covers("uniad", "dropout")
def test_the_transformer_of_uniad_has_the_given_size():
    layer = make("uniad", width=48, depth=2, heads=3, dropout=0.3).transformer
    assert (layer.project.out_features, len(layer.encoder), len(layer.decoder)) == (48, 2, 2)
    assert {m.num_heads for m in layers(layer, nn.MultiheadAttention)} == {3}
    assert (
        {m.dropout for m in layers(layer, nn.MultiheadAttention)} == {0.3} == {m.p for m in layers(layer, nn.Dropout)}
    )


@covers("uniad", "jitter")
def test_uniad_can_do_without_jitter(gears):
    usual, other = (model.train() for model in changed("uniad", "jitter", 0.0, dropout=0.0))
    assert losses(usual, gears) != losses(other, gears) == losses(usual.eval(), gears)


@covers("uniad", "cache")
def test_uniad_sees_the_same_whether_features_are_kept_or_not(gears):
    usual, other = changed("uniad", "cache", False)
    for model in (usual, other):
        model.prepare(gears.train, CPU)
        model.train()
    assert usual.cache is not None and other.cache is None
    assert losses(usual, gears)["mse"] == pytest.approx(losses(other, gears)["mse"], rel=1e-2)


@covers("uniad", "pool")
def test_uniad_scores_the_mean_over_the_given_window():
    usual, other = changed("uniad", "pool", 3)
    assert score_of_a_point(other) == round(1 / 9, 4) != score_of_a_point(usual)


@covers("psvdd", "image_size")
@covers("psvdd", "widths")
@covers("psvdd", "strides")
def test_psvdd_looks_at_the_given_patches():
    def shapes(**overrides):
        model = make("psvdd", **overrides)
        images = torch.rand(1, 3, model.settings.image_size, model.settings.image_size)
        return [tuple(model.grid(images, number).shape[1:]) for number in (0, 1)]

    assert shapes() == [(16, 13, 13), (16, 5, 5)]  # patches of 16 and 32 px, each 4 and 8 px
    assert shapes(image_size=96) == [(16, 21, 21), (16, 9, 9)]
    assert shapes(widths=(8, 4), strides=(4, 6)) == [(4, 15, 15), (4, 9, 9)]  # of 8 and 16 px, the latter each 6 px
    assert shapes(strides=(8, 16)) == [(16, 7, 7), (16, 3, 3)]


@covers("psvdd", "lambda_svdd")
def test_lambda_weighs_the_distance_of_near_patches(gears):
    usual, other = (losses(model, gears) for model in changed("psvdd", "lambda_svdd", 3e-3))
    near = {name: 3 * value for name, value in usual.items() if name.startswith("near")}
    assert other == pytest.approx(usual | near)


@covers("psvdd", "jitter")
def test_psvdd_changes_colours_so_much(gears):
    """Of the pair whose side is told, and of no other."""
    usual, other = (losses(model, gears) for model in changed("psvdd", "jitter", 0.5))
    assert {name for name in usual if usual[name] != other[name]} == {"side_small", "side_large"}


@covers("psvdd", "pairs")
def test_psvdd_draws_so_many_pairs_of_each_image(gears):
    for model, pairs in zip(changed("psvdd", "pairs", 7), (4, 7), strict=True):
        at, noise = model.draws(gears.train.batch(range(3)), 16)
        assert at.shape == (3 * pairs, 9) and noise.shape == (2 * 3 * pairs, 3, 16, 16)


@covers("psvdd", "bank_size")
def test_psvdd_keeps_so_many_patches(gears):
    for size, kept in ((200, 200), (7, 7), (0, 12 * 25)):
        model = make("psvdd", bank_size=size)
        model.finish(gears.train, CPU)
        assert len(model.large_bank) == kept


@each("method, name, value, side", ("vtadl", "image_size", 128, 16), ("vtadl", "patch", 16, 4))
def test_vtadl_has_the_given_patches(method, name, value, side):
    usual, other = changed(method, name, value)
    assert (usual.side, other.side) == (8, side)
    S = other.settings.image_size
    assert other.encode(torch.rand(1, 3, S, S)).shape == (1, side**2, 32)
    assert other.reconstruct(torch.rand(1, 3, S, S)).shape == (1, 3, S, S)


@covers("vtadl", "width")
@covers("vtadl", "depth")
@covers("vtadl", "heads")
@covers("vtadl", "components")
def test_the_networks_of_vtadl_have_the_given_size():
    model = make("vtadl", width=48, depth=2, heads=3, components=5)
    assert (model.encoder.embed_dim, len(model.encoder.blocks), model.encoder.blocks[0].attn.num_heads) == (48, 2, 3)
    assert (model.mixture.weight.out_features, model.mixture.mean.out_features) == (5, 5 * 48)


@covers("vtadl", "noise")
def test_noise_is_added_to_the_tokens_in_training_alone(gears):
    usual, other = changed("vtadl", "noise", 0.0)
    assert losses(usual, gears) == losses(other, gears)
    usual, other = usual.train(), other.train()
    assert losses(usual, gears) != losses(other, gears)


@covers("vtadl", "detach")
def test_vtadl_can_keep_the_mixture_from_moving_the_tokens(gears):
    found = []
    for model in changed("vtadl", "detach", True):
        model.losses(gears.train.batch(range(3)))["nll"].backward()
        found.append([any(p.grad is not None for p in part.parameters()) for part in (model.encoder, model.mixture)])
    assert found == [[True, True], [False, True]]


@covers("fanogan", "image_size")
@covers("fanogan", "latent")
@covers("fanogan", "width")
def test_the_networks_of_fanogan_have_the_given_size():
    for overrides, side, features, numbers in (
        ({}, 64, 256, 8),
        ({"image_size": 32, "latent": 5, "width": 3}, 32, 384, 5),
    ):
        model = make("fanogan", **overrides)
        found = model.encoder(torch.rand(2, 3, side, side))
        assert [tuple(x.shape) for x in found] == [(2, features), (2, numbers)]
        assert model.generator(found[1]).shape == (2, 3, side, side)


@covers("fanogan", "n_critic")
def test_the_generator_of_fanogan_has_one_step_in_so_many(gears):
    batch, turns = gears.train.batch(range(2)), []
    for model in changed("fanogan", "n_critic", 5):
        torch.manual_seed(0)
        turns.append(sum(model.gan_losses(batch)["fake"] != 0 for _ in range(90)) / 90)
    assert 1 / 4 < turns[0] < 5 / 12 and 1 / 12 < turns[1] < 1 / 4  # 1/3 and 1/6


@covers("fanogan", "penalty")
def test_the_gradient_penalty_has_its_weight(gears):
    found = []
    for model in changed("fanogan", "penalty", 30.0):
        torch.manual_seed(1)
        found.append({name: float(value) for name, value in model.gan_losses(gears.train.batch(range(3))).items()})
    assert found[0]["penalty"] > 0 and found[1] == pytest.approx(found[0] | {"penalty": 3 * found[0]["penalty"]})


@covers("fanogan", "gan_epochs")
@covers("fanogan", "gan_lr")
def test_generator_and_critic_of_fanogan_have_a_phase_of_their_own():
    first, second = make("fanogan", gan_epochs=7, gan_lr=0.5).phases()
    assert (first.epochs, first.lr, first.name) == (7, 0.5, "gan") and (second.epochs, second.name) == (2, "encoder")


@covers("fanogan", "kappa")
def test_kappa_weighs_the_features_of_the_critic(gears):
    usual, other = (losses(model, gears) for model in changed("fanogan", "kappa", 3.0))
    assert other == pytest.approx(usual | {"features": 3 * usual["features"]})


# --- none is missing --------------------------------------------------------------------------------------


def test_every_setting_of_every_method_has_a_test():
    """`amp` belongs to a whole run: test_runs.py."""
    settings = {(name, field.name) for name in methods.METHODS for field in fields(methods.get(name).Settings)}
    assert {(method, name) for method, name in settings if name != "amp"} == COVERED
