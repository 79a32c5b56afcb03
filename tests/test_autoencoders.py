"""AE-SSIM and the VAE: their losses and maps, and what sets them apart from the autoencoder that they share."""

import numpy as np
import pytest
import torch
from helpers import CPU, equal, make, state
from scipy.ndimage import gaussian_filter

from vitad.blocks import ssim_map
from vitad.errors import UserError
from vitad.methods.rivals import aessim, l2cae, vae
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
