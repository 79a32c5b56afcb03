"""AE-SSIM and the VAE: their losses and maps, and what sets them apart from the autoencoder that they share."""

import numpy as np
import pytest
import torch
from helpers import equal, make, state
from scipy.ndimage import gaussian_filter

from vitad.blocks import ssim_map
from vitad.errors import UserError
from vitad.methods.rivals import aessim, l2cae

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
