"""The systems that the papers compare with, beside `l2cae` and `patchknn`: the ideas that make them work."""

import numpy as np
import pytest
import torch
from helpers import CPU, equal, make, state
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from vitad.errors import UserError
from vitad.methods.rivals import dinomaly, draem, padim, uniad
from vitad.training import train

# --- PaDiM ------------------------------------------------------------------------------------------------


def padim_of(images, **overrides):
    model = make(padim, **overrides)
    model.prepare(images, CPU)
    return model


@pytest.mark.parametrize("shared", [False, True])
def test_padim_map_is_the_mahalanobis_distance_at_each_place(gears, shared):
    """Against numpy, in double precision, place by place."""
    model = padim_of(gears.train, shared=shared, batch_size=5)
    images = gears.test.batch(range(3))["image"]

    def grid(images):
        """(B,64,C): coarse cells repeated; all three maps begin at the grid of stride 8, which is the mean of 2 x 2."""
        fine, same, coarse = model.backbone(images)
        fine = F.avg_pool2d(fine, 2)
        coarse = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return torch.cat([fine, same, coarse], 1)[:, model.chosen].flatten(2).mT.double().numpy()

    normal, tested = grid(gears.train.batch(range(12))["image"]), grid(images)
    expected = np.zeros((3, 64))
    for place in range(64):
        samples = normal.reshape(-1, 20) if shared else normal[:, place]
        inverse = np.linalg.inv(np.cov(samples.T) + 0.01 * np.eye(20))
        for i in range(3):
            d = tested[i, place] - samples.mean(0)
            expected[i, place] = np.sqrt(d @ inverse @ d)
    expected = torch.from_numpy(expected).view(3, 1, 8, 8)
    expected = F.interpolate(expected, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    expected = np.stack([gaussian_filter(m, 1.0) for m in expected.numpy()])
    maps = model.anomaly_map(images)
    np.testing.assert_allclose(maps, expected, rtol=2e-3)
    assert torch.equal(model.image_score(maps), maps.amax((1, 2)))


def test_padim_distances_of_fresh_draws_have_the_mean_that_theory_gives(gears):
    """The squared distance of a Gaussian vector of 20 channels is 20 on average."""
    model, random = make(padim, ridge=0.0, shared=True), torch.Generator().manual_seed(0)
    mix = torch.randn(20, 20, generator=random)
    model.features = lambda images: torch.randn(1, 4000, 20, generator=random) @ mix + 3
    model.prepare(gears.train, CPU)
    centred = model.features(None)[0] - model.mean
    assert (centred @ model.whiten[0].T).square().sum(1).mean() == pytest.approx(20, rel=0.05)


def test_padim_without_a_ridge_does_not_care_for_the_scale_of_a_channel(gears):
    def distance(scale):
        model, random = make(padim, ridge=0.0, shared=True), torch.Generator().manual_seed(0)
        model.features = lambda images: torch.randn(1, 64, 20, generator=random) * scale
        model.prepare(gears.train, CPU)
        return model.anomaly_map(torch.zeros(1, 3, 64, 64))

    scale = torch.ones(20)
    scale[3] = 10
    torch.testing.assert_close(distance(scale), distance(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"channels": 273}, "channels=273: the maps of test_resnet have 272 in all"),
        ({"grid": 7}, "grid=7 does not divide image_size=64"),
        ({"strides": (3,)}, r"strides=\(3,\): test_resnet has 2, 4, 8"),
    ],
)
def test_padim_refuses_what_it_cannot_do(overrides, message):
    with pytest.raises(UserError, match=message):
        make(padim, **overrides)


def test_padim_needs_a_ridge_where_images_are_few(gears):
    with pytest.raises(UserError, match="ridge=0.0 leaves covariances of 12 samples singular"):
        padim_of(gears.train, ridge=0.0)


# --- Dinomaly ---------------------------------------------------------------------------------------------


def test_linear_attention_is_its_formula_token_by_token():
    """Each token takes the mean of all values, weighed by phi(q) . phi(k) with phi = elu + 1."""
    torch.manual_seed(0)
    attention = make(dinomaly).decoder[0].attn
    x = torch.randn(2, 5, 64)
    q, k, v = attention.qkv(x).view(2, 5, 3, 2, 32).unbind(2)  # (B,N,heads,d) each
    expected = torch.zeros(2, 5, 2, 32)
    for b, n, head in np.ndindex(2, 5, 2):
        weight = torch.stack([(F.elu(q[b, n, head]) + 1) @ (F.elu(k[b, m, head]) + 1) for m in range(5)])
        expected[b, n, head] = weight / weight.sum() @ v[b, :, head]
    torch.testing.assert_close(attention(x), attention.proj(expected.flatten(2)), atol=1e-6, rtol=1e-4)


def test_the_loss_of_dinomaly_compares_whole_maps_and_its_map_compares_places(gears):
    model, images = make(dinomaly, sigma=0.0), gears.test.batch(range(3))["image"]
    with torch.no_grad():
        fused, targets = model.encode(images)
        rebuilt = model.decode(fused)
        loss, maps = model.losses({"image": images})["cosine"], model.anomaly_map(images)
    assert fused.shape == (3, 17, 64) and targets.shape == rebuilt.shape == (3, 2, 16, 64)  # the class token goes along
    cosine = F.cosine_similarity(rebuilt.view(6, -1), targets.view(6, -1))
    assert loss.item() == pytest.approx(1 - cosine.mean().item(), abs=1e-5)
    at_places = (1 - F.cosine_similarity(rebuilt, targets, dim=-1)).mean(1).view(3, 4, 4)
    torch.testing.assert_close(maps[:, ::63, ::63], at_places[:, ::3, ::3], atol=1e-5, rtol=1e-4)  # at the corners


def test_dinomaly_compares_the_middle_layers_as_they_are(gears):
    """Not after the last layer norm; the last of the decoder's blocks answers to the first of the layers."""
    model, images = make(dinomaly), gears.test.batch(range(2))["image"]
    outputs = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda _, __, x: outputs.append(x))
    with torch.no_grad():
        fused, targets = model.encode(images)
    second, third, fourth, fifth = outputs[1:]
    torch.testing.assert_close(fused, (second + third + fourth + fifth) / 4)
    torch.testing.assert_close(targets[:, 0], (second + third)[:, 1:] / 2)
    rebuilt = []
    for block in model.decoder:
        block.register_forward_hook(lambda _, __, x: rebuilt.append(x))
    with torch.no_grad():
        decoded = model.decode(fused)
    assert torch.equal(decoded[:, 0], rebuilt[1][:, 1:]) and torch.equal(decoded[:, 1], rebuilt[0][:, 1:])


def test_easy_places_have_a_tenth_of_the_gradient_and_the_others_all_of_it(gears):
    """At step 0 no place is easy. When the share has risen to 0.9, those with the lowest error are."""
    model = make(dinomaly)
    fused, targets = model.encode(gears.train.batch(range(4))["image"])
    rebuilt = model.decode(fused).detach().requires_grad_()

    def gradient(done):
        model.done.fill_(done)
        weakened = model.weaken(rebuilt, targets)
        assert torch.equal(weakened, rebuilt)  # the values stay
        (found,) = torch.autograd.grad((weakened * targets).sum(), rebuilt)
        return found

    factor = (gradient(99) / gradient(0)).mean(-1)
    assert torch.equal(gradient(0), targets)
    error = 1 - F.cosine_similarity(rebuilt, targets, dim=-1)
    for group in range(2):
        limit = error[:, group].flatten().sort().values[int(0.9 * 64)]
        expected = torch.where(error[:, group] < limit, 0.1, 1.0)
        torch.testing.assert_close(factor[:, group], expected, rtol=1e-3, atol=1e-3)


def test_dinomaly_trains_its_decoder_alone_and_finds_a_pasted_square(gears):
    model = make(dinomaly, steps=60, batch_size=12, depth=2)
    before = state(model.backbone)
    model.prepare(gears.train, CPU)
    history = train(model, gears.train, 0, CPU, amp=False)
    assert equal(state(model.backbone), before) and model.done == 60
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert history[-1]["cosine"] < 0.7 * history[0]["cosine"]
    image = gears.train.batch([0])["image"]
    pasted = image.clone()
    pasted[..., 16:32, 32:48] = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        normal, damaged = model.eval().anomaly_map(torch.cat([image, pasted]))
    rise = damaged - normal
    row, column = divmod(int(rise.argmax()), 64)
    assert 12 <= row < 36 and 28 <= column < 52 and rise.max() > 0.05


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"blocks": (2, 9)}, "test_vit has blocks 1 to 6"),
        ({"groups": 3}, "groups=3 has to divide depth=2"),
        ({"dropout": 1.5}, "are shares"),
    ],
)
def test_dinomaly_refuses_what_it_cannot_do(overrides, message):
    with pytest.raises(UserError, match=message):
        make(dinomaly, **overrides)


# --- DRAEM ------------------------------------------------------------------------------------------------


def test_draem_has_the_parameters_of_the_published_networks():
    with torch.device("meta"):
        networks = draem.Reconstruction(128), draem.Segmentation(64), draem.SSPCAB(1024)
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert sizes == [69_048_579, 28_374_146, 4_461_696]


def test_sspcab_sees_four_places_and_not_its_own():
    torch.manual_seed(0)
    block, x = draem.SSPCAB(8), torch.randn(1, 8, 9, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(block.predict(x)[0, :, 4, 4].sum(), x)
    seen = gradient[0].abs().sum(0).nonzero().tolist()
    assert seen == [[2, 2], [2, 6], [6, 2], [6, 6]]
    with torch.no_grad():
        flat = block(torch.ones(1, 8, 9, 9))
    assert flat.shape == (1, 8, 9, 9) and flat.min() >= 0
    torch.testing.assert_close(flat[..., 2:-2, 2:-2], flat[..., 4:5, 4:5].expand(1, 8, 5, 5))


def test_draem_learns_to_repair_damage_and_to_mark_it(gears):
    """On damage that it has not seen, of images that it has."""
    torch.manual_seed(0)
    model = make(draem, epochs=40, batch_size=4, lr=2e-3)
    model.prepare(gears.train, CPU)
    history = train(model, gears.train, 0, CPU, amp=False)
    assert history[-1]["focal"] < 0.5 * history[0]["focal"]
    x = gears.train.batch(range(12))["image"]
    damaged = model.synthesis(x, 99, 0, which=np.ones(12, bool))
    mask = damaged["mask"][:, 0]
    with torch.no_grad():
        x_hat, _ = model.eval().repair(damaged["image"])
        maps = model.anomaly_map(damaged["image"])

    def error(image):
        return (image - x).square().mean(1)[mask].mean()

    assert error(x_hat) < 0.8 * error(damaged["image"])
    assert maps[mask].mean() > 1.15 * maps[~mask].mean()


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"image_size": 80}, "image_size=80 has to be a multiple of 32"),
        ({"width": 3, "sspcab": True}, "width even with sspcab"),
        ({"damage": 0.0}, "damage=0 leaves"),
        ({"window": 4}, "window=4 has to be odd"),
    ],
)
def test_draem_refuses_what_it_cannot_do(overrides, message):
    with pytest.raises(UserError, match=message):
        make(draem, **overrides)


# --- UniAD ------------------------------------------------------------------------------------------------


def test_uniad_has_the_parameters_of_the_published_network():
    """With the 272 channels of EfficientNet-B4."""
    with torch.device("meta"):
        transformer = uniad.Transformer(272, 14, 256, 4, 8, 0.1, 7)
    assert sum(p.numel() for p in transformer.parameters()) == 7_717_392


def test_uniad_keeps_a_place_from_itself_and_its_neighbours(gears):
    """What a place takes from a first attention does not depend on any place in the window around it."""
    model = make(uniad, width=32, window=3)
    blind = model.transformer.blind.view(8, 8, 8, 8)
    assert blind[0, 0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert blind[4, 5].nonzero().tolist() == [[i, j] for i in (3, 4, 5) for j in (4, 5, 6)]
    attention = model.transformer.encoder[0].attention[0]
    x = torch.randn(1, 64, 32, requires_grad=True)
    query = torch.randn(1, 64, 32)
    found, _ = attention(query, x, x, attn_mask=model.transformer.blind)
    (gradient,) = torch.autograd.grad(found[0, 4 * 8 + 5].sum(), x)
    assert torch.equal(gradient[0].abs().sum(1).view(8, 8) > 0, ~blind[4, 5])


def test_the_jitter_of_uniad_has_the_stated_strength():
    """The noise is 20 / sqrt(C) times as long as the vector that it is added to."""
    model, f = make(uniad), torch.randn(4, 64, 272)
    torch.manual_seed(0)
    noise = model.jittered(f, {"image": f}) - f
    assert (noise.norm(dim=-1) / f.norm(dim=-1)).mean() == pytest.approx(20 / 272**0.5, rel=0.05)


def test_uniad_map_is_the_distance_of_seen_and_rebuilt(gears):
    model, images = make(uniad, pool=3), gears.test.batch(range(2))["image"]
    model.prepare(gears.train, CPU)
    with torch.no_grad():
        f, maps = model.features(images), model.anomaly_map(images)
        distance = (f - model.transformer(f)).norm(dim=-1).view(2, 8, 8)
    torch.testing.assert_close(maps[:, ::63, ::63], distance[:, ::7, ::7])  # at the corners
    torch.testing.assert_close(model.image_score(maps), F.avg_pool2d(maps, 3, 1).amax((1, 2)))
    normal = model.features(gears.train.batch(range(12))["image"]).flatten(0, 1)
    assert normal.mean(0).abs().max() < 1e-3
    assert normal.std(0).median() == pytest.approx(1, abs=0.01)  # a random network has channels that are dead


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"width": 30}, "width=30 has to be a multiple of twice the number of heads=2"),
        ({"window": 4}, "window=4 has to be odd"),
        ({"window": 7, "grid": 7}, "window=7 has to be odd and below grid=7"),
    ],
)
def test_uniad_refuses_what_it_cannot_do(overrides, message):
    with pytest.raises(UserError, match=message):
        make(uniad, **overrides)
