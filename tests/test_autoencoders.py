"""AE-SSIM and the VAE: their losses and maps, and what sets them apart from the autoencoder that they share."""

import numpy as np
import pytest
import torch
from helpers import CPU, equal, make, state
from scipy.ndimage import gaussian_filter

from vitad.blocks import ssim_map
from vitad.errors import UserError
from vitad.methods.rivals import aessim, fanogan, l2cae, vae, vtadl
from vitad.training import train

# --- AE-SSIM ----------------------------------------------------------------------------------------------


def test_aessim_starts_as_l2cae_does():
    """The two differ in nothing but the loss and the map."""
    assert equal(state(make(aessim)), state(make(l2cae)))


def test_aessim_map_and_score(gears):
    model, images = make(aessim, sigma=1.5), gears.test.batch(range(3))["image"]
    with torch.no_grad():
        raw = 1 - ssim_map(images, model.reconstruct(images), 1.0)[:, 0].numpy()
        maps = model.anomaly_map(images)
        loss = model.losses({"image": images})["ssim"]
    assert loss.item() == pytest.approx(raw.mean(), rel=1e-5)
    expected = np.stack([gaussian_filter(r, 1.5) for r in raw])
    np.testing.assert_allclose(maps, expected, rtol=1e-4)
    np.testing.assert_allclose(model.image_score(maps), expected.max((1, 2)), rtol=1e-4)


def test_aessim_finds_no_fault_with_a_perfect_reconstruction(monkeypatch):
    model, images = make(aessim), torch.rand(2, 3, 64, 64)
    monkeypatch.setattr(model, "reconstruct", lambda images: images)
    assert model.losses({"image": images})["ssim"] == pytest.approx(0, abs=1e-6)
    assert model.anomaly_map(images).max() < 1e-5


def test_aessim_looks_at_structure_and_l2cae_at_brightness(monkeypatch):
    """A patch whose texture is gone, its mean kept, beside one that is a little brighter, its texture kept."""
    torch.manual_seed(0)
    normal = 0.5 + 0.04 * torch.randn(1, 3, 64, 64)
    damaged = normal.clone()
    damaged[..., 8:24, 8:24] = 0.5
    damaged[..., 40:56, 40:56] += 0.1
    ratio = {}
    for method in (aessim, l2cae):
        model = make(method, sigma=0)
        monkeypatch.setattr(model, "reconstruct", lambda images: normal)
        found = model.anomaly_map(damaged)[0]
        ratio[method] = float(found[10:22, 10:22].mean() / found[42:54, 42:54].mean())
    assert ratio[aessim] > 10 > 0.5 > ratio[l2cae]


def test_aessim_refuses_other_sizes():
    with pytest.raises(UserError, match="image_size=96 does not suit this autoencoder. Choose 64, 128, 256 or 512"):
        make(aessim, image_size=96)
    with pytest.raises(UserError, match="latent=0"):
        make(aessim, latent=0)


# --- VAE --------------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_samples():
    torch.manual_seed(0)
    mean, log_variance = torch.randn(1, 3), torch.randn(1, 3)
    q, p = torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    z = q.sample((100_000,))
    expected = (q.log_prob(z) - p.log_prob(z)).sum(2).mean()
    assert vae.kl(mean, log_variance).item() == pytest.approx(expected.item(), rel=0.02)


def test_vae_losses_are_the_error_of_a_sample_and_the_divergence(gears):
    model, batch = make(vae, beta=0.5), gears.train.batch(range(4))
    given = []
    model.decoder.register_forward_pre_hook(lambda _, z: given.extend(z))
    with torch.no_grad():
        found = model.losses(batch)
        mean, log_variance = model.encode(batch["image"])
        error = (model.decoder(given[0]) - batch["image"]).square().mean()
    noise = (given[0] - mean) / (0.5 * log_variance).exp()
    assert found["kl"].item() == pytest.approx(0.5 * vae.kl(mean, log_variance).mean().item() / (3 * 64 * 64))
    assert found["mse"] == pytest.approx(error.item())
    assert abs(noise.mean()) < 0.5 and 0.7 < noise.std() < 1.3  # a sample, not the mean


def test_vae_with_a_large_beta_forgets_its_images(gears):
    """The usual collapse: the divergence goes to zero and all reconstructions become the same."""
    spread = {}
    for beta in (0.0, 1e4):
        model = make(vae, beta=beta, epochs=25, lr=1e-3)
        train(model, gears.train, 0, CPU, amp=False)
        with torch.no_grad():
            images = gears.train.batch(range(6))["image"]
            mean, log_variance = model.encode(images)
            spread[beta] = float(mean.std(0).mean())
    assert spread[1e4] < 0.1 * spread[0.0] and vae.kl(mean, log_variance).mean() < 1


def test_vae_map_is_the_smoothed_error_and_repeats(gears):
    model, images = make(vae, sigma=1.5), gears.test.batch(range(3))["image"]
    with torch.no_grad():
        error = ((images - model.reconstruct(images)) ** 2).mean(1).numpy()
        maps = model.anomaly_map(images)
        assert torch.equal(maps, model.anomaly_map(images))
    np.testing.assert_allclose(maps, [gaussian_filter(e, 1.5) for e in error], rtol=1e-4)
    assert torch.equal(model.image_score(maps), maps.amax((1, 2)))


def test_vae_repairs_an_image_by_descent(gears):
    """The energy falls step by step; what the autoencoder rebuilds perfectly stays as it is."""
    images = gears.test.batch(range(3))["image"]
    energies = []
    for steps in range(1, 6):
        model = make(vae, map="grad", steps=steps, step_size=0.05)
        with torch.no_grad():
            x = model.repair(images)
            energies.append(model.energy(x, model.reconstruct(x), images))
            before = model.energy(images, model.reconstruct(images), images)
    fall = torch.stack([before, *energies]).diff(dim=0)
    assert (fall < 0).all()
    model.reconstruct = lambda x: x
    assert torch.equal(model.repair(images), images) and model.anomaly_map(images).max() == 0


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        ({"beta": -1.0}, "beta=-1.0"),
        ({"steps": 0}, "steps=0"),
        ({"map": "gradient"}, "setting map: 'gradient'"),
    ],
)
def test_vae_refuses_bad_settings(overrides, mend):
    with pytest.raises(UserError, match=mend):
        make(vae, **overrides)


# --- VT-ADL -----------------------------------------------------------------------------------------------


def test_vtadl_has_the_published_number_of_parameters_and_sides():
    with torch.device("meta"):
        s = vtadl.Settings()
        net = vtadl.encoder(s.image_size, s.patch, s.width, s.depth, s.heads)
        decoder, mixture = vtadl.decoder(512), vtadl.Mixture(512, 10)
        x, sides = torch.zeros(1, 8, 8, 8), []
        for layer in decoder:
            x = layer(x)
            sides += [x.shape[-1]] if isinstance(layer, torch.nn.ConvTranspose2d) else []
    counts = [sum(p.numel() for p in part.parameters()) for part in (net, decoder, mixture)]
    assert counts == [18_933_248, 142_099, 5_248_000] and sides == [15, 49, 245, 497, 502, 512]


def test_routing_to_one_capsule_routes_nothing():
    """Dynamic routing as in the code, by a loop: as many passes as one likes give what one linear layer gives."""
    torch.manual_seed(0)
    capsules, weight = torch.randn(2, 6, 4), torch.randn(6, 5, 4)
    votes = torch.einsum("bic,ioc->bio", capsules, weight)
    linear = torch.nn.Linear(24, 5, bias=False)
    linear.weight.data = weight.permute(1, 0, 2).reshape(5, 24)
    expected = vtadl.squashed(linear(capsules.flatten(1)))
    for passes in (1, 3):
        agreement = torch.zeros(2, 6, 1)  # of each capsule with the only output
        for _ in range(passes):
            share = agreement.softmax(-1)
            found = vtadl.squashed((share * votes).sum(1))
            agreement = agreement + (votes * found[:, None]).sum(-1, keepdim=True)
        torch.testing.assert_close(found, expected)


def test_the_mixture_has_the_likelihood_of_torch(seed=0):
    torch.manual_seed(seed)
    mixture, tokens = vtadl.Mixture(6, 3), torch.randn(2, 5, 6)
    seen = tokens.clamp_min(1e-12)
    scale = torch.nn.functional.softplus(mixture.variance(seen)).view(2, 5, 3, 6).exp().sqrt()
    normal = torch.distributions.Normal(mixture.mean(seen).view(2, 5, 3, 6), scale)
    parts = torch.distributions.Independent(normal, 1)
    weights = torch.distributions.Categorical(logits=mixture.weight(seen))
    expected = -torch.distributions.MixtureSameFamily(weights, parts).log_prob(tokens)
    torch.testing.assert_close(mixture.nll(tokens), expected, rtol=1e-4, atol=1e-4)
    assert (mixture.nll(tokens, legacy=True) >= mixture.nll(tokens) - 1e-5).all()  # Jensen
    assert (mixture.nll(tokens) >= mixture.least).all()


def test_vtadl_learns_to_rebuild_and_finds_a_strange_patch_unlikely(gears):
    torch.manual_seed(0)
    model = make(vtadl, epochs=30, lr=1e-3, batch_size=4)
    history = train(model, gears.train, 0, CPU, amp=False)
    model.eval()
    assert history[-1]["mse"] < 0.5 * history[0]["mse"] and history[-1]["nll"] < history[0]["nll"]
    image = gears.train.batch([0])["image"]
    strange = image.clone()
    strange[..., 24:32, 24:32] = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
    with torch.no_grad():
        before, after = model.anomaly_map(image)[0], model.anomaly_map(strange)[0]
        assert torch.equal(model.anomaly_map(image)[0], before)
    assert after[24:32, 24:32].mean() > 1.5 * before[24:32, 24:32].mean()


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        ({"patch": 7}, "patch=7 does not divide image_size=64"),
        ({"heads": 3}, "multiple of heads=3"),
        ({"components": 0}, "components=0"),
        ({"image_size": 96}, "image_size=96 does not suit the decoder. Choose 64, 128, 256 or 512"),
    ],
)
def test_vtadl_refuses_bad_settings(overrides, mend):
    with pytest.raises(UserError, match=mend):
        make(vtadl, **overrides)


# --- f-AnoGAN ---------------------------------------------------------------------------------------------


def test_fanogan_has_the_published_number_of_parameters():
    with torch.device("meta"):
        widths = [64, 128, 256, 512, 512]
        parts = (
            fanogan.Generator(128, widths),
            fanogan.Reader(widths, 1, lambda channels: torch.nn.GroupNorm(1, channels)),
            fanogan.Reader(widths, 128, torch.nn.BatchNorm2d),
        )
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [8_540_483, 7_491_841, 8_532_352]


def test_a_step_moves_generator_or_critic_and_never_both(gears):
    model = make(fanogan).train()
    optimizer = torch.optim.Adam([*model.generator.parameters(), *model.critic.parameters()], lr=0.1)
    seen = set()
    for seed in range(12):
        before = [[p.clone() for p in part.parameters()] for part in (model.generator, model.critic)]
        torch.manual_seed(seed)
        optimizer.zero_grad()
        losses = model.gan_losses(gears.train.batch(range(3)))
        sum(losses.values()).backward()
        optimizer.step()
        parts = zip(before, (model.generator, model.critic), strict=True)
        moved = [any(not torch.equal(a, b) for a, b in zip(old, part.parameters(), strict=True)) for old, part in parts]
        assert moved == ([True, False] if losses["fake"] else [False, True])
        seen.add(tuple(moved))
    assert len(seen) == 2


def test_a_critic_of_slope_one_pays_no_penalty():
    weight = torch.nn.functional.normalize(torch.randn(3 * 8 * 8, 1), dim=0)
    x = torch.rand(4, 3, 8, 8)
    assert fanogan.gradient_penalty(lambda x: x.flatten(1) @ weight, x) == pytest.approx(0, abs=1e-9)
    assert fanogan.gradient_penalty(lambda x: 3 * (x.flatten(1) @ weight), x) == pytest.approx(4, rel=1e-4)


def test_training_the_encoder_leaves_generator_and_critic_as_they_are(gears):
    model = make(fanogan, epochs=8, lr=1e-3)
    before = state(model.generator), state(model.critic)
    first, second = model.phases()
    model.phases = lambda: [second]
    history = train(model, gears.train, 0, CPU, amp=False)
    assert equal(state(model.generator), before[0]) and equal(state(model.critic), before[1])  # running means, too
    assert history[-1]["mse"] < history[0]["mse"]


def test_the_search_finds_nearer_drawings(gears):
    x = 2 * gears.test.batch(range(3))["image"] - 1
    found = {}
    for steps in (1, 5, 60):
        model = make(fanogan, steps=steps)
        with torch.no_grad():
            found[steps] = model.distance(x, model.critic(x)[0], model.search(x))
    assert (found[5] <= found[1]).all() and (found[60] < found[1]).all()


def test_a_gan_covers_a_ring():
    """Eight Gaussians on a ring, as images of two numbers: the penalty keeps the critic smooth, so none is lost."""
    torch.manual_seed(0)
    relu = torch.nn.ReLU()
    make_net = lambda out: torch.nn.Sequential(  # noqa: E731
        torch.nn.Linear(2, 64), relu, torch.nn.Linear(64, 64), relu, torch.nn.Linear(64, out)
    )
    draw, critic = make_net(2), make_net(1)
    optimizers = [torch.optim.Adam(net.parameters(), 2e-3, (0.0, 0.9)) for net in (draw, critic)]
    angles = torch.arange(8) * torch.pi / 4
    modes = torch.stack([angles.cos(), angles.sin()], 1)
    for step in range(1800):
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step % 6 == 5:
            (-critic(draw(torch.randn(128, 2))).mean()).backward()
            optimizers[0].step()
            continue
        x = modes[torch.randint(8, (128,))] + 0.02 * torch.randn(128, 2)
        fake = draw(torch.randn(128, 2)).detach()
        penalty = fanogan.gradient_penalty(critic, torch.lerp(x, fake, torch.rand(128, 1)))
        (critic(fake).mean() - critic(x).mean() + 0.1 * penalty).backward()
        optimizers[1].step()
    with torch.no_grad():
        distance, nearest = torch.cdist(draw(torch.randn(2000, 2)), modes).min(1)
    assert sum((distance[nearest == k] < 0.2).sum() > 20 for k in range(8)) >= 6


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        ({"image_size": 48}, "Choose 8, 16, 32, 64 or 128"),
        ({"latent": 0}, "latent=0"),
        ({"steps": 0}, "steps=0"),
        ({"inference": "find"}, "setting inference: 'find'"),
    ],
)
def test_fanogan_refuses_bad_settings(overrides, mend):
    with pytest.raises(UserError, match=mend):
        make(fanogan, **overrides)
